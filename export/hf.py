"""
A trained model as a folder for Hugging Face's transformers.

    python -m export.hf                       the newest run: out/<name>/hf-latent/
    python -m export.hf --weights=packed      ternary codes, five to a byte: out/<name>/hf-packed/
    python -m export.hf --as=arcee            a model of config/arcee.py, for an architecture that
                                              transformers has; --exit_layer=3: blocks 0 to 3 only
    python -m export.hf --name=user/repo      what its model card calls it

    model.safetensors    the weights
    config.json          the settings, and where transformers finds the code
    *.py                 modeling_bitskip.py and what it imports, as they are but for relative
                         imports (--as=arcee needs none)
    tokenizer.json       bytes or GPT-2's BPE, with the ids of prepare.py
    README.md, LICENSE   a model card: how to use it, and what each of its exits is worth

The folder needs nothing of this repository. Nothing is sent anywhere; `hf upload` does that.
"""
import contextlib
import json
import math
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import find_run, open_model
from common import keep_freed_memory
from configurator import UserError, configure, run
from eval_exits import bits_per_byte, evaluate, measure_speed, perplexity
from export import last_merge, spelling
from export.gguf import require_arcee
from fast.packed import to_ternary
from model import BitSkip
from prepare import HUB, data_of, get_tokenizer

ROOT, CODE = Path(__file__).resolve().parent.parent, 'modeling_bitskip'
TESTED = '4.57.6, 5.20.2, 5.23.0 and 5.24.0'  # of transformers

@dataclass
class ExportSettings:
    """Exports a trained model for Hugging Face's transformers."""
    out_dir: str = ''  # the run to export; empty: the newest
    hf_dir: str = ''  # the folder to write; empty: hf-... in the run's folder
    kind: Literal['bitskip', 'arcee'] = 'bitskip'  # also --as: the architecture of config.json
    weights: Literal['latent', 'packed'] = 'latent'  # as trained, or ternary codes and int8 head
    exit_layer: int | None = None  # with --as=arcee: write blocks 0 to exit_layer only; none: all
    name: str = ''  # user/repo in the model card; empty: the folder's name

    def __post_init__(self):
        if self.kind == 'arcee' and self.weights == 'packed':
            raise ValueError('transformers makes the weights of arcee ternary; leave out --weights')
        if self.kind == 'bitskip' and self.exit_layer is not None:
            raise ValueError('a BitSkip folder has all exits (set_exit_layer); --exit_layer is for '
                             '--as=arcee')

def main(argv):
    s = configure(ExportSettings, [re.sub('^--as(?==|$)', '--kind', arg) for arg in argv])
    keep_freed_memory()
    try:
        from transformers import GenerationConfig
    except ImportError:
        raise UserError('this needs transformers: pip install -r requirements-extra.txt') from None
    out_dir, what = find_run(s.out_dir), s.kind if s.kind == 'arcee' else s.weights
    what += '' if s.exit_layer is None else f'-exit{s.exit_layer}'
    hf_dir = os.path.normpath(s.hf_dir or os.path.join(out_dir, f'hf-{what}'))
    if os.path.lexists(hf_dir):
        raise UserError(f'{hf_dir} is there already; move it away, or name another: --hf_dir=...')
    model, settings = open_model(os.path.join(out_dir, 'ckpt.pt'))
    if s.kind == 'arcee':
        last = require_arcee(model, s.exit_layer)
    else:
        model, last = exportable(model, s.weights), model.config.n_layer - 1
    tokenizer, facts = get_tokenizer(settings['meta']['tokenizer']), measure(model, settings, last)
    with atomic_folder(hf_dir) as folder:
        if s.kind == 'arcee':
            write_arcee(folder, model, last, tokenizer.eot)
        else:
            write_bitskip(folder, model, s.weights)
        ends = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'), tokenizer.eot)
        GenerationConfig(**ends).save_pretrained(folder)
        hf_tokenizer(tokenizer, model.config.block_size).save_pretrained(folder)
        file = Path(folder, 'tokenizer_config.json')  # transformers 4 does not know the newer name
        file.write_text(file.read_text().replace('TokenizersBackend', 'PreTrainedTokenizerFast'))
        shutil.copy(ROOT / 'LICENSE', folder)
        text = model_card(s.name or os.path.basename(hf_dir), s, model, settings, facts)
        Path(folder, 'README.md').write_text(text, encoding='utf-8')
    size = sum(file.stat().st_size for file in Path(hf_dir).iterdir())
    print(f'{hf_dir}: {size / 1e6:.2f} MB, {facts["split"]} PPL {facts["exits"][-1]["ppl"]:.4f}')

def exportable(model, weights):
    """The model to write. UserError, in one sentence, if it is not one of model.py and quant.py."""
    c = model.config
    if type(model) is not BitSkip or ':' in c.linear:
        own = f"linear='{c.linear}'" if ':' in c.linear else type(model).__name__
        raise UserError(f'{own} is a variant, whose code the folder would lack; only models of '
                        'model.py with the layers of quant.py are exported')
    try:
        return to_ternary(model) if weights == 'packed' else model
    except ValueError as error:
        raise UserError(f'it cannot be packed ({error}); leave out --weights=packed') from None

@contextlib.contextmanager
def atomic_folder(path):
    """A folder to write into, which appears under `path` when the block has ended without an error.
    Nothing that another has made is ever deleted."""
    aside = f'{path}.{secrets.token_hex(4)}.tmp'
    os.makedirs(aside)
    try:
        yield aside
        os.rename(aside, path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        number = re.search(r'os error (\d+)', str(error))  # an error of a library in Rust
        if number and not isinstance(error, OSError):
            raise OSError(int(number[1]), os.strerror(int(number[1])), path) from None
        raise

# ---- model and code ----

def write_bitskip(folder, model, weights):
    """Weights, config.json and code of a BitSkip that transformers runs with trust_remote_code."""
    from export.modeling_bitskip import BitSkipForCausalLM, HFConfig
    config = HFConfig(**vars(model.config), weights=weights, architectures=['BitSkipForCausalLM'],
                      auto_map={'AutoConfig': f'{CODE}.HFConfig',
                                'AutoModelForCausalLM': f'{CODE}.BitSkipForCausalLM'})
    BitSkipForCausalLM(config, model).save_pretrained(folder)
    for name, source in flat_sources(f'export.{CODE}').items():
        Path(folder, name).write_text(source, encoding='utf-8')

def flat_sources(module):
    """A module of this repository, and all that it imports of it, as files of one folder:
    {name: source}. Their imports of each other become relative. transformers finds files by
    `from .x import` alone, so `from . import x` comes behind one."""
    def local(name):
        return ROOT.joinpath(*name.split('.')).with_suffix('.py')

    def relative(match):
        package, name = match.groups()  # from package import name; import name
        if package and local(package).is_file():
            todo.append(package)
            return f'from .{package.rpartition(".")[2]} import {name}'
        if local(f'{package}.{name}' if package else name).is_file():
            todo.append(f'{package}.{name}' if package else name)
            return f'from .{name} import __name__ as _; from . import {name}'
        return match[0]
    todo, files = [module], {}
    while todo:
        name = todo.pop()
        file = f'{name.rpartition(".")[2]}.py'
        if file not in files:
            files[file] = re.sub(r'^(?:from ([\w.]+) )?import ([\w(]+)', relative,
                                 local(name).read_text(encoding='utf-8'), flags=re.M)
    first, *others = files  # transformers 4 takes along only what the first one imports itself
    files[first] += ''.join(f'from .{name[:-3]} import __name__ as _  # noqa\n' for name in others)
    return files

ARCEE = {  # our names of weights, and transformers'
    '^blocks': 'model.layers', 'attn_norm': 'input_layernorm', '^embedding': 'model.embed_tokens',
    'ffn_norm': 'post_attention_layernorm', '^norm': 'model.norm', '^head': 'lm_head',
    r'attn\.(.)': r'self_attn.\1_proj', r'ffn\.(up|down)': r'mlp.\1_proj'}

def write_arcee(folder, model, last, eot):
    """Blocks 0 ... last as ArceeForCausalLM of transformers, whose BitNet layers make the latent
    weights ternary as A1 does, and the activations as A2."""
    from safetensors.torch import save_file
    c, state = model.config, {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(('gates.', *(f'blocks.{i}.' for i in range(last + 1, c.n_layer)))):
            for ours, theirs in ARCEE.items():
                name = re.sub(ours, theirs, name)
            state[name] = tensor
    save_file(state, os.path.join(folder, 'model.safetensors'), {'format': 'pt'})
    config = {
        'architectures': ['ArceeForCausalLM'], 'model_type': 'arcee', 'dtype': 'float32',
        'vocab_size': c.vocab_size, 'hidden_size': c.n_embd, 'intermediate_size': c.ffn_dim,
        'num_hidden_layers': last + 1, 'num_attention_heads': c.n_head,
        'num_key_value_heads': c.n_kv_head, 'hidden_act': 'relu2', 'rms_norm_eps': model.norm.eps,
        'max_position_embeddings': c.block_size, 'rope_theta': c.rope_theta,
        'tie_word_embeddings': False, 'bos_token_id': eot, 'eos_token_id': eot, 'pad_token_id': eot}
    if c.linear != 'fp':
        config['quantization_config'] = {
            'quant_method': 'bitnet', 'linear_class': 'autobitlinear', 'use_rms_norm': False,
            'quantization_mode': 'online', 'modules_to_not_convert': ['lm_head']}
    Path(folder, 'config.json').write_text(json.dumps(config, indent=1))

def hf_tokenizer(tokenizer, block_size):
    """A tokenizer of prepare.py for transformers: same ids, same text. One difference: half a
    surrogate pair, which is no text, is an error there, and replaced here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    spell, tokens = spelling(tokenizer)
    is_bpe = tokenizer.name == 'gpt2'
    ranks = {token: i for i, token in enumerate(tokens) if i != tokenizer.eot or not is_bpe}
    eot = '<|endoftext|>' if is_bpe else spell(tokens[tokenizer.eot])
    merges = [tuple(map(spell, last_merge(token, ranks))) for token in ranks if len(token) > 1]
    vocabulary = {spell(token): i for token, i in ranks.items()} | {eot: tokenizer.eot}
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_bpe)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=eot, eos_token=eot, pad_token=eot,
        model_max_length=block_size, padding_side='left',  # so that a batch can be continued
        model_input_names=['input_ids', 'attention_mask'], clean_up_tokenization_spaces=False,
        split_special_tokens=True)  # text is taken literally: no text stands for the end of text

# ---- model card ----

def measure(model, settings, last):
    """What the exits 0 ... last are worth, and on what text: a dict."""
    split = 'test' if 'test' in settings['meta']['splits'] else 'val'
    meta, tokens = data_of(settings, split)
    layers = range(last + 1)
    print(f'measuring {len(layers)} exits on {len(tokens):,} tokens')
    losses, speeds = evaluate(model, tokens, layers), measure_speed(model, layers, tokens)
    exits = [{'blocks': layer + 1, 'ppl': perplexity(loss), 'tok_per_s': speed,
              'bits_per_byte': bits_per_byte(loss, meta, split)}
             for layer, loss, speed in zip(layers, losses, speeds)]
    return {'exits': exits, 'split': {'val': 'validation'}.get(split, split), 'tokens': len(tokens)}

def hub_data(name, kind, dataset, facts):
    """What a data set is called, and the YAML on top of a model card, which the hub reads."""
    from huggingface_hub import EvalResult, ModelCardData
    hub, _, config = HUB.get(dataset, dataset).partition(':')
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', hub) or os.path.exists(hub):  # a path, not the hub's
        hub, dataset = '', os.path.basename(os.path.normpath(dataset))
    exits = facts['exits'][::-1]
    results = [EvalResult('text-generation', hub or dataset, dataset, metric, round(e[key], 4),
                          dataset_config=config or None, dataset_split=facts['split'],
                          metric_name=f'{words}, {e["blocks"]} of {len(exits)} blocks')
               for e in exits for metric, key, words in (
                   ('perplexity', 'ppl', 'Perplexity'), ('speed', 'tok_per_s', 'Tokens/s, CPU'))]
    return dataset, ModelCardData(
        library_name='transformers', pipeline_tag='text-generation', license='mit', model_name=name,
        datasets=[hub] if hub else None, tags=['bitskip', 'ternary', 'early-exit', kind],
        eval_results=results).to_yaml()

def model_card(name, s, model, settings, facts):
    """The README.md of an exported model: card.md, filled in."""
    template = re.sub(r'(?s)<(bitskip|arcee)>\n?(.*?)</\1>\n?', lambda m: m[2] * (m[1] == s.kind),
                      Path(__file__).with_name('card.md').read_text(encoding='utf-8'))
    c, n, meta = model.config, len(facts['exits']), settings['meta']
    dataset, yaml = hub_data(name, s.kind, settings['dataset'], facts)
    weights = {'latent': 'ternary weights, stored as the latent ones that they are made of',
               'packed': 'ternary weights at 1.6 bits each, and an int8 head and embedding'}
    quarters = sorted({math.ceil(n * i / 4) for i in (1, 2, 3, 4)})
    return template.format(**vars(c) | facts | {
        'metadata': f'---\n{yaml}\n---', 'name': name, 'title': name.rpartition('/')[2],
        'weights': 'full-precision weights' if c.linear == 'fp' else weights[s.weights],
        'blocks': n, 'half': math.ceil(n / 2), 'quarters': quarters, 'draft': quarters[0],
        'sub_norm': ', SubLN' if c.sub_norm else '', 'tokenizer': meta['tokenizer'],
        'dataset': dataset, 'max_iters': settings['max_iters'], 'seed': settings['seed'],
        'train_tokens': meta['splits']['train']['tokens'], 'tested': TESTED,
        'threads': torch.get_num_threads(), 'rows': '\n'.join(
            f'| {"All layers" if e["blocks"] == n else e["blocks"]} | {e["ppl"]:.4g} '
            f'| {e["bits_per_byte"]:.3f} | {e["tok_per_s"]:.0f} |' for e in facts['exits'][::-1])})

if __name__ == '__main__':
    run(main)
