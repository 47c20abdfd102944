"""
How fast, on a CPU: every claim as cases that take turns in one process.

    python -m fast.bench                    everything, some half an hour on two cores
    python -m fast.bench --quick            small shapes, under a minute
    python -m fast.bench --only=decode      the benchmarks with this in their names

Machines drift and are shared, so a lone time means little. The cases of a benchmark take turns, and
the ratio of their medians is what counts. Prints a table and writes JSON.
"""
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common import atomic_write, autocast, keep_freed_memory, require_suffix
import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import UserError, configure, run
from decode import Decoder
from exits import skip_probabilities
from fast import native
from fast.machine import commit, machine
from fast.packed import to_ternary
from model import BitSkip, BitSkipConfig
from quant import int8_support
from train import TrainSettings, make_optimizer

def recipe(*names):
    """The settings of config files, for a vocabulary of bytes."""
    folder = Path(__file__).parents[1] / 'config'
    paths = [str(folder / f'{name}.py') for name in names]
    return asdict(configure(TrainSettings, paths)) | dict(vocab_size=256)

PAPER_A = dict(batch_size=4)  # and BitSkipConfig's defaults
PAPER_B = dict(n_layer=24, n_embd=2048, n_head=32, n_kv_head=8, ffn_dim=4096, ffn='swiglu',
               norm='rmsnorm', sub_norm=False)
SMALL = dict(batch_size=16, n_layer=6, n_embd=256, n_head=4, n_kv_head=2, ffn_dim=1024,
             vocab_size=256, block_size=256)
TINY = SMALL | dict(batch_size=2)
WIDE = dict(n_embd=128, ffn_dim=512, n_head=4, n_kv_head=2)  # over config/cpu.py

# --------------------------------------------------------------------------------------------------
# cases: functions that build something and return what is to be timed

def build(shape, **changes):
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig.of(shape | changes))
    with torch.no_grad():
        model.head.weight.mul_(6)  # logits as far apart as a trained model's (native.py:MARGIN)
    return model

def training(shape, dtype='float32', **changes):
    """One step of training: forward, backward, clipping, AdamW."""
    model = build(shape, **changes).train()
    optimizer, c = make_optimizer(model, TrainSettings()), model.config
    idx = torch.randint(c.vocab_size, (shape['batch_size'], c.block_size))

    def loss():
        with autocast(torch.device('cpu'), dtype):
            return model(idx, idx, return_logits=False)[1]['total']
    return step_of(model, optimizer, loss)

def step_of(model, optimizer, loss):
    def step():
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step

class GPT2(nn.Module):
    """What training is compared with: GPT-2 as nanoGPT has it, in few lines. idx, targets (B, T)
    int64 -> the loss, a scalar."""

    def __init__(self, c):
        super().__init__()
        self.tokens, self.positions = (nn.Embedding(n, c.n_embd) for n in (c.vocab_size,
                                                                           c.block_size))
        self.n_head, self.norm = c.n_head, nn.LayerNorm(c.n_embd)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            'norm1': nn.LayerNorm(c.n_embd), 'qkv': nn.Linear(c.n_embd, 3 * c.n_embd),
            'o': nn.Linear(c.n_embd, c.n_embd), 'norm2': nn.LayerNorm(c.n_embd),
            'ffn': nn.Sequential(nn.Linear(c.n_embd, c.ffn_dim), nn.GELU(),
                                 nn.Linear(c.ffn_dim, c.n_embd))}) for _ in range(c.n_layer))

    def forward(self, idx, targets):
        h = self.tokens(idx) + self.positions.weight[:idx.shape[1]]
        for block in self.blocks:
            qkv = block['qkv'](block['norm1'](h)).unflatten(-1, (3 * self.n_head, -1))
            q, k, v = qkv.transpose(1, 2).chunk(3, dim=1)  # (B, n_head, T, D) each
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + block['o'](y.transpose(1, 2).flatten(2))
            h = h + block['ffn'](block['norm2'](h))
        logits = F.linear(self.norm(h), self.tokens.weight)  # tied
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

def training_gpt2(shape):
    """A step of it, as `training`."""
    model = GPT2(BitSkipConfig.of(shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    idx = torch.randint(shape['vocab_size'], (shape['batch_size'], shape['block_size']))
    return step_of(model, optimizer, lambda: model(idx, idx))

def decoder(shape, how, **changes):
    """What decodes one text: how is 'eager' or 'packed' (PyTorch), or 'native' (C, int8 head)."""
    model = build(shape, **changes).eval()
    if how == 'native':
        return native.Decoder(model)
    return Decoder(to_ternary(model) if how == 'packed' else model)

def generation(shape, how='eager', n_tokens=12, exit_layer=None, prompt=16, **changes):
    """n_tokens greedy tokens behind a prompt that has been read already."""
    runs, idx = decoder(shape, how, **changes), torch.randint(256, (1, prompt))
    runs.step(idx)

    def generate():
        runs.length, token = prompt, idx[:, -1:]
        for _ in range(n_tokens):
            logits, _ = runs.step(token, exit_layer=exit_layer)
            token = logits.argmax(dim=-1, keepdim=True)
    return generate

def reading(shape, how='eager', prompt=256, **changes):
    """A prompt, up to the logits behind it."""
    runs, idx = decoder(shape, how, **changes), torch.randint(256, (1, prompt))

    def read():
        runs.length = 0
        runs.step(idx)
    return read

# --------------------------------------------------------------------------------------------------
# figures: what a benchmark makes of the seconds of its cases

def ratio(a, b):
    """time of the first case as a multiple of the second's"""
    return a / b

def speedup(a, b):
    """how many times faster the first case is than the second"""
    return b / a

def skipped_share(skipping, full, one_block):
    """time that layer skipping saves, as a share of what the skipped blocks would have cost"""
    p = skip_probabilities(12, 0.7)
    return (full - skipping) / (sum(p) * (full - one_block) / 11)

def exit_share(at_5, full, at_0):
    """speed-up of leaving at layer 5 of 12, as a share of what blocks and head allow"""
    return (at_0 + 5 * (full - at_0) / 11) / at_5

def cases(figure, rounds, function, shape, **settings):
    """A benchmark: its figure, and what to build for each of its cases."""
    return figure, rounds, {case: (function, shape, changes) for case, changes in settings.items()}

def against_gpt2(config, **changes):
    """A recipe at 12 blocks of width 128, and GPT-2 of that shape."""
    shape = recipe(config, 'cpu') | WIDE
    return speedup, 15, {'ours': (training, shape, changes), 'GPT-2': (training_gpt2, shape, {})}

FP, PACKED, NATIVE = dict(linear='fp'), dict(how='packed'), dict(how='native', n_tokens=48)
BENCHMARKS = {
    f'train, {name}, {dtype}': cases(ratio, rounds, training, shape, ternary=dict(dtype=dtype),
                                     fp=FP | dict(dtype=dtype))
    for name, shape, rounds in (('86M', PAPER_A, 3), ('small', SMALL, 7))
    for dtype in ('float32', 'bfloat16')}
BENCHMARKS |= {f'train, 12 x 128, {name}, against GPT-2': against_gpt2(config, **changes)
               for name, config, changes in (
                   ('full precision', 'baseline', FP), ('BitLinear', 'baseline', {}),
                   ('H', 'bitskip_h', {}), ('H + EE', 'bitskip_h_ee', {}),
                   ('compose', 'compose', {}))}
BENCHMARKS |= {
    'train, 86M, Hadamard': cases(ratio, 3, training, PAPER_A,
                                  hbitlinear=dict(linear='hbitlinear'), bitlinear={}),
    'train, 86M, sampled exits': cases(
        ratio, 3, training, PAPER_A, sampled=dict(lambda_ee=0.3, ee_positions='sampled'), none={}),
    'train, 86M, layer skipping': cases(
        skipped_share, 9, training, PAPER_A, skipping=dict(p_max=0.7), full={},
        one_block=dict(n_layer=1)),
    'train, 0.6M, compose': cases(ratio, 45, training, recipe('compose', 'cpu'), compose={},
                                  H_only=recipe('bitskip_h', 'cpu')),
    'train, 0.6M, compose, BitLinear': cases(
        ratio, 45, training, recipe('compose', 'cpu'), compose=dict(linear='bitlinear'),
        baseline=recipe('baseline', 'cpu')),
    'decode, 86M, packed': cases(speedup, 7, generation, PAPER_A, packed=PACKED, fp=FP),
    'decode, 86M, native': cases(speedup, 7, generation, PAPER_A, native=NATIVE,
                                 fp=FP | dict(n_tokens=48)),
    'decode, 86M, native, leave at 5': cases(
        exit_share, 7, generation, PAPER_A, layer_5=NATIVE | dict(exit_layer=5), layer_11=NATIVE,
        layer_0=NATIVE | dict(exit_layer=0)),
    'decode, 1.06B, native': cases(speedup, 3, generation, PAPER_B, native=dict(how='native'),
                                   packed=PACKED),
    'prompt of 256, 86M, native': cases(speedup, 5, reading, PAPER_A, native=dict(how='native'),
                                        fp=FP)}
QUICK = {
    'train, tiny': cases(ratio, 3, training, TINY, ternary={}, fp=FP),
    'decode, tiny, packed': cases(speedup, 3, generation, TINY, packed=PACKED, fp=FP),
    'decode, tiny, native': cases(speedup, 3, generation, TINY, native=dict(how='native'), fp=FP)}

def take_turns(functions, rounds):
    """The median seconds of each function over rounds in which each runs once."""
    seconds = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, times in zip(functions, seconds):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return [statistics.median(times[1:]) for times in seconds]  # the first round warms up

@dataclass
class BenchSettings:
    """Measures speed on a CPU."""
    quick: bool = False  # small shapes, under a minute
    only: str = ''  # run the benchmarks with this in their names
    json: str = 'bench.json'  # where to write the figures

def main(argv):
    s = configure(BenchSettings, argv)
    require_suffix('json', s.json, '.json')
    keep_freed_memory()
    there = QUICK if s.quick else BENCHMARKS
    chosen = {name: benchmark for name, benchmark in there.items() if s.only in name}
    if not chosen:
        raise UserError(f"no benchmark has '{s.only}' in its name; there are: {'; '.join(there)}")
    report = {'commit': commit(), 'machine': machine('cpu'), 'products': int8_support('cpu')[1],
              'native': native.available()[1], 'benchmarks': {}}
    print(report['machine'])
    for name, (figure, rounds, made) in chosen.items():
        seconds = take_turns([f(shape, **changes) for f, shape, changes in made.values()], rounds)
        result = figure(*seconds)
        report['benchmarks'][name] = {'figure': result, 'means': figure.__doc__, 'rounds': rounds,
                                      'seconds': dict(zip(made, seconds))}
        print(f'\n{name}: {result:.2f} ({figure.__doc__})')
        for (case, (f, _, changes)), t in zip(made.items(), seconds):
            n = changes.get('n_tokens', 12)
            speed = f'{n / t:10.1f} tok/s' if f is generation else ''
            print(f'  {case:12} {1000 * t:9.1f} ms {speed}', flush=True)
        with atomic_write(s.json, 'w') as file:  # what is measured stays, whatever comes next
            json.dump(report, file, indent=1)
    print(f'\nwritten: {s.json}')

if __name__ == '__main__':
    run(main)
