"""
Generate text from a trained model.

    python sample.py                                        the newest run, at full depth
    python sample.py --exit_layer 10                        every token leaves after block 10
    python sample.py --exit_mode=confidence --exit_threshold=0.9 --show_exits
    python sample.py --draft_layer=2 --draft_len=4          full depth's text, drafted by block 2
    python sample.py --prompt='Return the' --temperature=0
"""
import codecs
import sys
import time
from dataclasses import dataclass
from typing import Literal

from checkpoint import find_run, open_model, run_file
from common import pick_device
import torch

from configurator import UserError, check, configure, run, side_room
from decode import stream
from prepare import get_tokenizer

RAMP = (19, 25, 31, 37, 36, 71, 107, 143, 179, 208, 202, 196)  # terminal colours, early to late

@dataclass
class SampleSettings:
    """Generates text. Layers count from 0: exit_layer k runs blocks 0 to k."""
    out_dir: str = ''  # the run to sample from; empty: the newest
    checkpoint: str = ''  # the file in its folder; empty: ckpt.pt, or else packed.pt
    prompt: str = ''  # the text to continue; empty: start a new document
    num_samples: int = 1  # how many texts to write
    max_new_tokens: int = 300  # how many tokens to generate, at most: a text may end before
    temperature: float = 0.8  # 0 takes the likeliest token, 1 samples as the model says
    top_k: int | None = None  # choose among the k likeliest tokens only
    exit_layer: int | None = None  # the deepest block to run; none: all
    exit_mode: Literal['none', 'gate', 'confidence'] = 'none'  # leave when ready
    exit_threshold: float = 0.5  # leave when the gate or the largest probability exceeds it
    show_exits: bool = False  # colour each token by the layer that it left at
    draft_layer: int | None = None  # speculative decoding: this exit drafts, full depth checks
    draft_len: int = 4  # how many tokens a pass drafts
    packed: bool = True  # decode by fast/, with packed weights; False: the model as trained
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    seed: int = 1337  # of the sampling

    def __post_init__(self):
        check(self, {'num_samples': (1, 2 ** 20), 'max_new_tokens': (0, 2 ** 40),
                     'seed': (0, 2 ** 62)})
        if self.draft_layer is not None and (self.exit_layer, self.exit_mode) != (None, 'none'):
            raise ValueError('--draft_layer checks each token at full depth, so it goes without '
                             '--exit_layer and --exit_mode')

def main(argv):
    s = configure(SampleSettings, argv)
    device, drafts = pick_device(s.device), s.draft_layer is not None
    model, settings = open_model(run_file(find_run(s.out_dir), s.checkpoint), device)
    tokenizer = get_tokenizer(settings['meta']['tokenizer'])
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(f'this model has {model.config.vocab_size} tokens, its tokenizer '
                        f'{tokenizer.name} {tokenizer.vocab_size}: they do not belong together')
    ids = list(tokenizer.encode(s.prompt)) or [tokenizer.eot]
    if len(ids) > model.config.block_size:
        print(f'the model sees the last {model.config.block_size} tokens of {len(ids)} only')
    decoder, how, fast = None, 'PyTorch', side_room('fast', required=drafts)
    if s.packed and fast:
        model, decoder, how = fast.quick_decoder(model)
    print(f'decoding: {how}')
    mode = None if s.exit_mode == 'none' else s.exit_mode
    if (drafts or mode or s.exit_layer is not None) and not model.config.lambda_ee:
        print('note: the exits of this model were not trained (lambda_ee=0)')
    idx = torch.tensor([ids], device=device)  # (1, T)
    options = dict(temperature=s.temperature, top_k=s.top_k, decoder=decoder,
                   generator=torch.Generator(device).manual_seed(s.seed))
    if drafts:
        options |= dict(draft_layer=s.draft_layer, draft_len=s.draft_len)
    else:
        options |= dict(exit_layer=s.exit_layer, exit_mode=mode, exit_threshold=s.exit_threshold)
    for n in range(s.num_samples):
        try:
            write = fast.draft_and_check if drafts else stream
            steps = write(model, idx, s.max_new_tokens, **options)
        except ValueError as error:
            raise UserError(str(error)) from None
        print('-' * 79 + '\n' if n else '', end='')
        show(s.prompt, steps, tokenizer, model.config.n_layer, s.show_exits)

def show(prompt, steps, tokenizer, n_layer, show_exits):
    """Print the prompt and its continuation as it comes, to the end of the text, and a summary.

    steps yields tokens (1, 1), and the layer that each left at."""
    coloured = show_exits and sys.stdout.isatty()
    text = codecs.getincrementaldecoder('utf-8')(errors='replace')  # a character may take several
    print(prompt, end='', flush=True)
    layers, started = [], None
    for token, layer in steps:
        started = started or time.perf_counter()  # the first one came with the prompt
        layers.append(int(layer))
        if token.item() == tokenizer.eot:  # what the model would write next is another text
            break
        piece = text.decode(tokenizer.decode_bytes([token.item()]))
        print(in_colour(piece, layers[-1], n_layer) if coloured else piece, end='', flush=True)
    print(text.decode(b'', final=True))
    if show_exits:
        counts = [f'{layer}:{layers.count(layer)}' for layer in range(n_layer)]
        print('tokens that left after block: ' + ' '.join(
            in_colour(count, layer, n_layer) if coloured else count
            for layer, count in enumerate(counts)))
    if len(layers) > 1:
        speed = (len(layers) - 1) / (time.perf_counter() - started)
        mean = sum(layers) / len(layers)
        print(f'\n{len(layers)} tokens, {speed:,.0f} tokens/s, mean exit layer {mean:.2f} of 0 to '
              f'{n_layer - 1} ({mean + 1:.2f} blocks)')

def in_colour(text, layer, n_layer):
    colour = RAMP[layer * (len(RAMP) - 1) // max(1, n_layer - 1)]
    return f'\x1b[38;5;{colour}m{text}\x1b[0m'

if __name__ == '__main__':
    run(main)
