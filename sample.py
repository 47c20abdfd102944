"""
Generate text from a trained model.

    python sample.py                                        the newest run, at full depth
    python sample.py --exit_layer 10                        every token leaves after block 10
    python sample.py --exit_mode=confidence --exit_threshold=0.9
    python sample.py --draft_layer=2 --draft_len=4          as at full depth, drafted by block 2 and checked
    python sample.py --prompt='Return the' --temperature=0
    echo 'Return the' | python sample.py --prompt_file=-    prompt from stdin, or from a file by name
"""
import codecs
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

import checkpoint
from configurator import UserError, configure, run
from decode import Decoder, stream
from native import fast_decoder
from runtime import pick_device
from speculate import speculate
from tokenizer import get_tokenizer


@dataclass
class SampleSettings:
    """Generates text. Layers count from 0: exit_layer k runs blocks 0 to k."""
    out_dir: str = ''  # the run to sample from; empty: the newest
    checkpoint: str = 'ckpt.pt'  # the file in its folder: the best model, or packed.pt, which pack.py writes
    prompt: str = ''  # the text to continue; empty: start a new document
    prompt_file: str = ''  # read the prompt from this file instead, - for stdin
    num_samples: int = 1  # how many texts to write
    max_new_tokens: int = 300  # how many tokens to generate, at most: a text may end before
    temperature: float = 0.8  # 0 takes the likeliest token, 1 samples as the model says
    top_k: int | None = None  # choose among the k likeliest tokens only
    exit_layer: int | None = None  # the deepest block to run; none: all
    exit_mode: Literal['none', 'gate', 'confidence', 'saturation'] = 'none'  # let each token leave when it may
    draft_layer: int | None = None  # speculative decoding: this exit drafts, full depth checks; none: no drafts
    draft_len: int = 4  # how many tokens a pass drafts
    packed: bool = True  # decode with packed weights: stored codes; on a CPU an int8 head, and C where it compiles
    exit_threshold: float = 0.5  # leave when the gate (A6), largest probability or similarity exceeds this
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    seed: int = 1337  # of the sampling

    def __post_init__(self):
        if not 1 <= self.num_samples <= 2 ** 20:
            raise ValueError(f'num_samples is 1 to {2 ** 20}, got {self.num_samples}')


def read_prompt(s):
    if not s.prompt_file:
        return s.prompt
    if s.prompt:
        raise UserError('--prompt and --prompt_file both give a prompt; choose one')
    if s.prompt_file != '-' and not os.path.isfile(s.prompt_file):
        raise UserError(f'there is no prompt file {s.prompt_file}')
    try:
        with sys.stdin if s.prompt_file == '-' else open(s.prompt_file, encoding='utf-8') as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise UserError(f'the prompt is not UTF-8 text ({error.reason} at byte {error.start})') from None


def main(argv):
    s = configure(SampleSettings, argv)
    device = pick_device(s.device)
    prompt = read_prompt(s)
    out_dir = checkpoint.find_run(s.out_dir)
    model, settings = checkpoint.load_checkpoint(os.path.join(out_dir, s.checkpoint), device)
    tokenizer = get_tokenizer(*checkpoint.told(settings['meta'], 'tokenizer'))
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f'{out_dir} has {model.config.vocab_size} tokens, its tokenizer {tokenizer.name} '
                        f'{tokenizer.vocab_size}: they do not belong together')

    ids = list(tokenizer.encode(prompt)) or [tokenizer.eot]
    block_size = model.config.block_size
    if len(ids) > block_size:
        print(f'the prompt has {len(ids)} tokens, the model sees {block_size}: the first {len(ids) - block_size} are '
              'cropped')
    generator, prompt_ids = torch.Generator(device).manual_seed(s.seed), torch.tensor([ids], device=device)
    drafting, exit_mode = s.draft_layer is not None, None if s.exit_mode == 'none' else s.exit_mode
    if drafting and (s.exit_layer is not None or exit_mode):
        raise UserError('--draft_layer checks every token at full depth; leave out --exit_layer and --exit_mode')
    trained, decoder = model, None
    try:
        if s.packed:
            model, decoder, how = fast_decoder(trained)
            otherwise = '' if model is trained else ' (--packed=False for the model as it was trained)'
            print(f'decoding: {how}{otherwise}')
        options = dict(temperature=s.temperature, top_k=s.top_k, generator=generator,
                       decoder=decoder or Decoder(model))  # one for all samples, which come one after another
        texts = [speculate(model, prompt_ids, s.max_new_tokens, s.draft_layer, s.draft_len, **options) if drafting else
                 stream(model, prompt_ids, s.max_new_tokens, exit_layer=s.exit_layer, exit_mode=exit_mode,
                        exit_threshold=s.exit_threshold, **options) for _ in range(s.num_samples)]  # (not begun yet)
    except ValueError as error:
        raise UserError(str(error)) from None
    note_what_was_not_trained(s, model.config, bool(settings.get('freeze')))
    for n, steps in enumerate(texts):
        print('-' * 80 + '\n' if n else '', end='')
        counts, told, seconds = show(prompt, steps, tokenizer)
        if counts:
            print(f'\n{sum(counts)} tokens, {sum(counts) / seconds:.1f} tokens/s, '
                  + (report_drafts if drafting else report_exits)(counts, told, model.config.n_layer))


def note_what_was_not_trained(s, config, frozen):
    """Say so where the settings `s` ask for exits or gates that the model of this config has not trained. (Those of a
    frozen one may have been trained before.)"""
    drafting = s.draft_layer is not None
    leaves_early = s.exit_layer not in (None, config.n_layer - 1) or s.exit_mode != 'none'
    if (drafting or leaves_early) and not config.lambda_ee and not frozen:
        print('note: the exits of this model were not trained (lambda_ee=0), so '
              + ('few drafts will stand' if drafting else 'what they say makes little sense'))
    if s.exit_mode == 'gate' and not config.lambda_r:
        print('note: the gates of this model were not trained (lambda_r=0); --exit_mode=saturation needs no training')


def show(prompt, steps, tokenizer):
    """Print the prompt and its continuation as it comes, to the end of the text. How many tokens each step brought,
    what it told (the exit layer, or how many tokens were drafted), and the seconds that all took."""
    text = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a character may take several tokens
    print(prompt, end='', flush=True)
    counts, told, started = [], [], time.perf_counter()
    for tokens, what in steps:
        new = tokens[0].tolist()
        ends = tokenizer.eot in new
        print(text.decode(tokenizer.decode_bytes(new[:new.index(tokenizer.eot)] if ends else new)), end='', flush=True)
        counts.append(tokens.shape[1])
        told.append(int(what))
        if ends:  # what the model would write next is another text
            break
    print(text.decode(b'', final=True))
    return counts, told, time.perf_counter() - started


def report_exits(counts, layers, n_layer):
    mean = sum(layers) / len(layers)
    return f'mean exit layer {mean:.2f} of 0 to {n_layer - 1} ({mean + 1:.2f} blocks)'


def report_drafts(counts, drafted, n_layer):
    accepted = sum(counts) - len(counts)
    return (f'{accepted / max(1, sum(drafted)):.1%} of {sum(drafted)} drafts accepted, '
            f'{sum(counts) / len(counts):.2f} tokens per pass')


if __name__ == '__main__':
    run(main)
