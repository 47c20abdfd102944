"""
Write a trained model as a folder for Hugging Face's transformers.

    python export_hf.py                             the newest run: out/<name>/hf-latent/
    python export_hf.py --weights=packed            ternary codes, five to a byte: out/<name>/hf-packed/
    python export_hf.py --out_dir=out/... --hf_dir=my-model

    model.safetensors    the weights
    config.json          the settings, and where transformers finds the code: modeling_bitskip.py
    *.py                 that file and what it imports of this repository, as it is but for relative imports
    tokenizer.json       bytes or GPT-2's BPE, with the ids of tokenizer.py
    README.md            a model card: how to use it, and what each of its exits is worth, measured now

The folder needs nothing of this repository. Nothing is sent anywhere; `hf upload` does that.
"""
import contextlib
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
from configurator import UserError, configure, run
from eval_exits import bits_per_byte, evaluate, measure_speed, perplexity
from native import UNPACKABLE
from packed import to_ternary
from prepare import data_of
from runtime import keep_freed_memory
from tokenizer import byte_spelling, get_tokenizer, last_merge

ROOT = Path(__file__).resolve().parent
CODE = 'modeling_bitskip'


@dataclass
class ExportSettings:
    """Exports a trained model for Hugging Face's transformers."""
    out_dir: str = ''  # the run to export; empty: the newest
    hf_dir: str = ''  # the folder to write; empty: hf-latent or hf-packed in the run's folder
    weights: Literal['latent', 'packed'] = 'latent'  # full precision as in training, or ternary codes and an int8 head


def main(argv):
    s = configure(ExportSettings, argv)
    keep_freed_memory()
    try:
        from transformers import GenerationConfig

        from modeling_bitskip import BitSkipForCausalLM, HFConfig
    except ImportError as error:
        raise UserError('exporting needs transformers: pip install -r requirements-extra.txt') from error
    out_dir = checkpoint.find_run(s.out_dir)
    hf_dir = os.path.normpath(s.hf_dir or os.path.join(out_dir, f'hf-{s.weights}'))
    if os.path.exists(hf_dir):
        raise UserError(f'{hf_dir} is there already; move it away, or name another folder: --hf_dir=...')
    model, settings = checkpoint.load_checkpoint(os.path.join(out_dir, 'ckpt.pt'))
    if not model.config.causal:
        raise UserError(f'{out_dir} holds a model that sees the future (causal=False), which cannot decode')
    if s.weights == 'packed':
        if model.config.linear in UNPACKABLE:
            raise UserError(f'{out_dir} holds a model with linear={model.config.linear!r}: it has no ternary weights '
                            'to pack; --weights=latent exports it as it is')
        model = to_ternary(model)
    tokenizer = get_tokenizer(*checkpoint.told(settings['meta'], 'tokenizer'))

    config = HFConfig(**model.settings(), weights=s.weights, auto_map={
        'AutoConfig': f'{CODE}.HFConfig', 'AutoModelForCausalLM': f'{CODE}.BitSkipForCausalLM'})
    exits = measure_exits(model, settings)
    hf_model = BitSkipForCausalLM(config, model)
    eot = tokenizer.eot
    hf_model.generation_config = GenerationConfig(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
    with atomic_folder(hf_dir) as folder:
        hf_model.save_pretrained(folder)
        hf_tokenizer(tokenizer, config.block_size).save_pretrained(folder)
        for name in needed_modules(CODE):
            source = (ROOT / f'{name}.py').read_text(encoding='utf-8')
            Path(folder, f'{name}.py').write_text(relative_imports(source), encoding='utf-8')
        Path(folder, 'README.md').write_text(
            model_card(os.path.basename(hf_dir), config, settings, exits), encoding='utf-8')
    size = sum(file.stat().st_size for file in Path(hf_dir).iterdir())
    print(f'{hf_dir}: {size / 1e6:.2f} MB, validation PPL {exits[-1]["ppl"]:.4f}')
    print(f"AutoModelForCausalLM.from_pretrained('{hf_dir}', trust_remote_code=True) loads it")


@contextlib.contextmanager
def atomic_folder(path):
    """A folder to write into that appears under `path` only when the block has ended without an error."""
    aside = f'{path}.tmp'
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    try:
        os.makedirs(aside)
        yield aside
        os.rename(aside, path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


# ----------------------------------------------------------------------------------------------------------------------
# code

def local_imports(source):
    """The modules of this repository that a source imports."""
    names = re.findall(r'^(?:import|from) (\w+)', source, re.M)
    return {name for name in names if (ROOT / f'{name}.py').exists()}


def needed_modules(name):
    """The module `name` and all of this repository that it imports, directly or not: a sorted list of names."""
    found, new = set(), {name}
    while new:
        found |= new
        new = {i for n in new for i in local_imports((ROOT / f'{n}.py').read_text(encoding='utf-8'))} - found
    return sorted(found)


def relative_imports(source):
    """`import x` -> `from . import x` and `from x import y` -> `from .x import y` for the modules of this repository:
    transformers loads a model's code as a package, whose files it finds by the second kind of import alone."""
    names = '|'.join(local_imports(source))
    source = re.sub(rf'^import ({names})$', r'from .\1 import __name__ as _; from . import \1', source, flags=re.M)
    return re.sub(rf'^from ({names}) import', r'from .\1 import', source, flags=re.M)


# ----------------------------------------------------------------------------------------------------------------------
# tokenizer

def hf_tokenizer(tokenizer, block_size):
    """A tokenizer of tokenizer.py as transformers' PreTrainedTokenizerFast: same ids, same text.

    One difference: half a surrogate pair, which is no text, raises an error instead of being replaced."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    spelling = byte_spelling()

    def spell(token):
        return ''.join(spelling[b] for b in token)
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    is_bpe = tokenizer.name == 'gpt2'
    ranks = {token: i for i, token in enumerate(tokens) if i != tokenizer.eot or not is_bpe}
    eot = '<|endoftext|>' if is_bpe else spell(tokens[tokenizer.eot])
    merges = [tuple(map(spell, last_merge(token, ranks))) for token in ranks if len(token) > 1]
    bpe = Tokenizer(models.BPE({spell(token): i for token, i in ranks.items()} | {eot: tokenizer.eot}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_bpe)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=eot, eos_token=eot, pad_token=eot, model_max_length=block_size,
        padding_side='left',  # so that a batch can be continued
        model_input_names=['input_ids', 'attention_mask'], clean_up_tokenization_spaces=False,
        split_special_tokens=True)  # text is taken literally: no text stands for the end of text


# ----------------------------------------------------------------------------------------------------------------------
# model card

def measure_exits(model, settings):
    """Loss, PPL, bits per byte on the validation split and decoding speed at every exit: list of dicts."""
    meta, tokens = data_of(settings)
    layers = list(range(model.config.n_layer))
    print(f'measuring {len(layers)} exits on {len(tokens):,} tokens')
    losses, speeds = evaluate(model, tokens, layers), measure_speed(model, layers, tokens)
    return [{'blocks': layer + 1, 'loss': loss, 'ppl': perplexity(loss), 'tok_per_s': speed,
             'bits_per_byte': bits_per_byte(loss, meta)} for layer, loss, speed in zip(layers, losses, speeds)]


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
license: mit
tags: [bitskip, ternary, early-exit]
---

# {name}

A BitSkip language model: {n_layer} blocks, of which any can be the last, with {weights}.

| | |
|---|---|
| layers, width, FFN | {n_layer}, {n_embd}, {ffn_dim} ({ffn}) |
| heads, key-value heads | {n_head}, {n_kv_head} |
| norm | {norm}{sub_norm} |
| projections | {linear}, {act_bits}-bit activations |
| context | {block_size} tokens, rotary positions |
| vocabulary | {vocab_size:,} ({tokenizer}) |
| data | {dataset}: {train_tokens:,} tokens; trained for {iters:,} steps, seed {seed} |
| early exit | λ_ee = {lambda_ee} ({ee_weighting}), layers skipped with p_max = {p_max} |

## Use

`pip install transformers torch`, then

```python
from transformers import AutoTokenizer, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
outputs = model.generate(**inputs, max_length=100)
print(tokenizer.decode(outputs[0]))
```

Leave after {half} blocks, compare exits, or draft with a few blocks and verify with all, which gives the text of all:

```python
model.set_exit_layer({half})
outputs = model.generate(**inputs, max_length=100)
for exit_layer in {quarters}:
    model.set_exit_layer(exit_layer)
    outputs = model.generate(**inputs, max_length=100)
    print(f"Layer {{exit_layer}}: {{tokenizer.decode(outputs[0])}}")
outputs = model.generate(**inputs, max_length=100, do_sample=False, assistant_early_exit={draft})
```

## Exits

On the whole validation split of {dataset} ({val_tokens:,} tokens), in consecutive windows of {block_size} tokens.
Speed: greedy, batch 1, on a CPU with {threads} thread{s} in PyTorch, without the overhead of `generate`.

| Exit Layer | Perplexity | Bits per byte | Speed (tok/s) |
|---|---|---|---|
{rows}

## Limits

Prompt and continuation together have at most {block_size} tokens; `generate` ends in an error there. The model writes
in the manner of its training text and knows nothing else.
"""


def model_card(name, config, settings, exits):
    """The README.md of an exported model."""
    L, splits = config.n_layer, settings['meta']['splits']
    quarters = sorted({math.ceil(L * i / 4) for i in (1, 2, 3, 4)})
    rows = [f'| {"All layers" if e["blocks"] == L else e["blocks"]} | {e["ppl"]:.4g} | {e["bits_per_byte"]:.3f} '
            f'| {e["tok_per_s"]:.0f} |' for e in reversed(exits)]
    weights = {'fp': 'full-precision weights'}.get(config.linear) or {
        'latent': 'ternary weights, stored as the full-precision latent ones that they are computed from',
        'packed': 'ternary weights, stored at 1.6 bits each, and an int8 head and embedding'}[config.weights]
    return CARD.format(**config.to_dict() | {
        'name': name, 'weights': weights, 'half': math.ceil(L / 2), 'quarters': quarters, 'draft': quarters[0],
        'sub_norm': ', SubLN' if config.sub_norm else '', 'tokenizer': settings['meta']['tokenizer'],
        'dataset': settings['meta']['dataset'], 'train_tokens': splits['train']['tokens'],
        'val_tokens': splits['val']['tokens'], 'iters': settings['progress']['iter'], 'seed': settings['seed'],
        'threads': torch.get_num_threads(), 's': 's' * (torch.get_num_threads() > 1), 'rows': '\n'.join(rows)})


if __name__ == '__main__':
    run(main)
