"""
How fast, and how small: every claim as cases that take turns in one process.

    python bench.py                         everything, some 40 minutes on two cores
    python bench.py --quick                 small shapes, under a minute
    python bench.py --only=decode           the benchmarks with this in their names

Machines drift and are shared, so a lone time means little: the cases of a benchmark take turns, and the ratio of their
medians is what counts. Peak memory is that of a process of its own for each case. Prints a table and writes JSON.
"""
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import checkpoint
import native
from configurator import UserError, configure, read_config, run
from decode import Decoder
from exits import skip_probabilities
from model import BitSkip, BitSkipConfig
from packed import packed_state, to_ternary
from quant import int8_support
from runtime import autocast, commit, keep_freed_memory, machine
from train import TrainSettings, make_optimizer

PAPER_A = dict(n_layer=12, n_embd=512, n_head=8, n_kv_head=4, ffn_dim=2048, vocab_size=50257, block_size=512, B=4)
PAPER_B = dict(n_layer=24, n_embd=2048, n_head=32, n_kv_head=8, ffn_dim=4096, vocab_size=50257, block_size=512, B=1,
               ffn='swiglu', norm='rmsnorm', sub_norm=False)
SMALL = dict(n_layer=6, n_embd=256, n_head=4, n_kv_head=2, ffn_dim=1024, vocab_size=256, block_size=256, B=16)
TINY = SMALL | dict(B=2)  # for --quick


def config(name, settings):
    """What this config file sets, on top of settings."""
    return read_config(str(Path(__file__).with_name('config') / name), settings)


COMPOSE = config('compose.py', asdict(TrainSettings()))
OVERLAY = config('cpu.py', asdict(TrainSettings()) | COMPOSE)
CPU = {name: value for name, value in OVERLAY.items() if hasattr(BitSkipConfig, name)} | dict(
    vocab_size=256, B=OVERLAY['batch_size'])


# ----------------------------------------------------------------------------------------------------------------------
# cases: functions that build something and return what is to be timed

def build(shape, **changes):
    torch.manual_seed(0)
    settings = dict(lambda_q=0.0, lambda_r=0.0, gate_dim=0) | shape | changes
    return BitSkip(BitSkipConfig(**{key: value for key, value in settings.items() if key != 'B'}))


def training(shape, dtype='float32', **changes):
    """One step of training: forward, backward, clipping, AdamW."""
    model = build(shape, **changes).train()
    optimizer = make_optimizer(model, TrainSettings())
    idx = torch.randint(shape['vocab_size'], (shape['B'], shape['block_size']))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast(torch.device('cpu'), dtype):
            _, losses = model(idx, idx, return_logits=False)
        losses['total'].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return step


def decoder(shape, how, **changes):
    """What runs a model of this shape, batch 1. how: 'eager', 'packed' (PyTorch) or 'native' (C, int8 head)."""
    model = build(shape, **changes).eval()
    return native.Decoder(model) if how == 'native' else Decoder(to_ternary(model) if how == 'packed' else model)


def generation(shape, how='eager', n_tokens=12, exit_layer=None, prompt=16, **changes):
    """n_tokens greedy tokens behind a prompt that has been read already."""
    runs, idx = decoder(shape, how, **changes), torch.randint(shape['vocab_size'], (1, prompt))
    runs.step(idx)

    def generate():
        runs.length, token = prompt, idx[:, -1:]
        for _ in range(n_tokens):
            logits, _ = runs.step(token, exit_layer=exit_layer)
            token = logits.argmax(dim=-1, keepdim=True)
    return generate


def reading(shape, how='eager', prompt=256, **changes):
    """A prompt, up to the logits behind it."""
    runs, idx = decoder(shape, how, **changes), torch.randint(shape['vocab_size'], (1, prompt))

    def read():
        runs.length = 0
        runs.step(idx)
    return read


# ----------------------------------------------------------------------------------------------------------------------
# figures: what a benchmark makes of the seconds of its cases

def ratio(a, b, *_):
    """Time of the first case as a multiple of the second's."""
    return a / b


def speedup(a, b, *_):
    """How many times faster the first case is than the second."""
    return b / a


def skipped_share(skipping, full, one_block):
    """Layer skipping: the time saved, as a share of what the skipped blocks would have cost."""
    p = skip_probabilities(PAPER_A['n_layer'], 0.7)
    block = (full - one_block) / (len(p) - 1)
    return (full - skipping) / (sum(p) * block)


def exit_share(at_5, full, at_0):
    """Leaving at layer 5: speed-up over full depth, as a share of what the times of blocks and head allow."""
    block = (full - at_0) / (PAPER_A['n_layer'] - 1)
    return (full / at_5) / (full / (at_0 + 5 * block))


# name: (figure, its target, rounds, {case: (function, shape, settings)}); A is the first case, B the second
Benchmark = namedtuple('Benchmark', 'figure target rounds cases')
EE = dict(lambda_ee=0.3)


def train_pair(shape, dtype, a='bitlinear', b='fp'):
    return {linear: (training, shape, dict(dtype=dtype, linear=linear)) for linear in (a, b)}


def compose_pair(shape, **changes):
    return {'compose': (training, shape, COMPOSE | dict(gate_dim=32) | shape | changes),
            'H-only': (training, shape, dict(linear='hbitlinear', lambda_r=0.0))}


BENCHMARKS = {
    'train, 86M, float32': Benchmark(ratio, '<= 0.85', 3, train_pair(PAPER_A, 'float32')),
    'train, 86M, bfloat16': Benchmark(ratio, '<= 1.00', 3, train_pair(PAPER_A, 'bfloat16')),
    'train, small, float32': Benchmark(ratio, '<= 0.75', 7, train_pair(SMALL, 'float32')),
    'train, small, bfloat16': Benchmark(ratio, '<= 1.05', 7, train_pair(SMALL, 'bfloat16')),
    'Hadamard, 86M, float32': Benchmark(ratio, '<= 1.12', 3, train_pair(PAPER_A, 'float32', 'hbitlinear', 'bitlinear')),
    'Hadamard, 86M, bfloat16': Benchmark(
        ratio, '<= 1.12', 3, train_pair(PAPER_A, 'bfloat16', 'hbitlinear', 'bitlinear')),
    'exits, exact loss': Benchmark(ratio, 'memory <= 1.25', 2, {
        'all exits': (training, PAPER_A, EE), 'no exits': (training, PAPER_A, {})}),
    'exits, sampled': Benchmark(ratio, '<= 1.35', 3, {
        'sampled exits': (training, PAPER_A, EE | dict(ee_positions='sampled')), 'no exits': (training, PAPER_A, {})}),
    'compose, 2.3M': Benchmark(ratio, '<= 1.15', 45, compose_pair(CPU)),
    'compose, 86M': Benchmark(ratio, '<= 1.15', 3, compose_pair(PAPER_A)),
    'compose, 86M, a quarter of them': Benchmark(ratio, '<= 1.15', 3, compose_pair(PAPER_A, ee_share=0.25)),
    'layer skipping': Benchmark(skipped_share, '>= 0.80', 9, {
        'p_max 0.7': (training, PAPER_A, dict(p_max=0.7)), 'no skipping': (training, PAPER_A, {}),
        'one block': (training, PAPER_A | dict(n_layer=1), {})}),
    'decode, 86M, packed PyTorch / eager float32': Benchmark(speedup, '>= 3.5', 7, {
        'packed': (generation, PAPER_A, dict(how='packed')), 'float32': (generation, PAPER_A, dict(linear='fp'))}),
    'decode, 86M, packed PyTorch / as trained, quantizing at each step': Benchmark(speedup, '>= 8', 5, {
        'packed': (generation, PAPER_A, dict(how='packed')), 'as trained': (generation, PAPER_A, {})}),
    'decode, 86M, native / eager float32': Benchmark(speedup, '>= 14', 7, {
        'native': (generation, PAPER_A, dict(how='native', n_tokens=48)),
        'float32': (generation, PAPER_A, dict(linear='fp', n_tokens=48))}),
    'decode, 86M, native: leave at 5 of 12': Benchmark(exit_share, '>= 0.85', 7, {
        'layer 5': (generation, PAPER_A, dict(how='native', exit_layer=5)),
        'layer 11': (generation, PAPER_A, dict(how='native')),
        'layer 0': (generation, PAPER_A, dict(how='native', exit_layer=0))}),
    'decode, 1.06B, native / packed PyTorch': Benchmark(speedup, '>= 80 tok/s', 3, {
        'native': (generation, PAPER_B, dict(how='native')), 'packed': (generation, PAPER_B, dict(how='packed'))}),
    'prompt of 256, packed PyTorch / eager float32': Benchmark(speedup, '>= 3', 5, {
        'packed': (reading, PAPER_A, dict(how='packed')), 'float32': (reading, PAPER_A, dict(linear='fp'))}),
    'prompt of 256, native / eager float32': Benchmark(speedup, '-', 5, {
        'native': (reading, PAPER_A, dict(how='native')), 'float32': (reading, PAPER_A, dict(linear='fp'))}),
}
QUICK = {
    'train, tiny, float32': Benchmark(ratio, '-', 3, train_pair(TINY, 'float32')),
    'train, tiny, Hadamard': Benchmark(ratio, '-', 3, train_pair(TINY, 'float32', 'hbitlinear', 'bitlinear')),
    'decode, tiny, packed PyTorch / eager float32': Benchmark(speedup, '-', 3, {
        'packed': (generation, TINY, dict(how='packed')), 'float32': (generation, TINY, dict(linear='fp'))}),
    'decode, tiny, native / eager float32': Benchmark(speedup, '-', 3, {
        'native': (generation, TINY, dict(how='native')), 'float32': (generation, TINY, dict(linear='fp'))}),
}


# ----------------------------------------------------------------------------------------------------------------------
# measuring

def take_turns(functions, rounds):
    """Seconds of each function: the median over `rounds` rounds in which each runs once, after a warm-up round."""
    seconds = [[] for _ in functions]
    for n in range(rounds + 1):
        for function, times in zip(functions, seconds):
            started = time.perf_counter()
            function()
            if n > 0:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


def own_peak():
    """MiB that this process has held at most."""
    if not os.path.exists('/proc/self/status'):  # macOS (on Linux this would count the parent's, up to the fork)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith('VmHWM'))


def peak_memory(name, case):
    """MiB of a fresh process that runs this case twice."""
    done = subprocess.run([sys.executable, __file__, f'--only={name}', f'--memory_of={case}'], capture_output=True,
                          text=True)
    if done.returncode:
        raise UserError(f'{name}, {case} failed in a process of its own: {done.stderr.strip()[-300:]}')
    return float(done.stdout.split()[-1])


def measure(name, benchmark):
    """One benchmark: its figure, and the seconds and MiB of each case."""
    functions = [make(shape, **settings) for make, shape, settings in benchmark.cases.values()]
    seconds = take_turns(functions, benchmark.rounds)
    del functions
    cases = {case: {'seconds': s, 'peak_mib': peak_memory(name, case)} for case, s in zip(benchmark.cases, seconds)}
    for (make, _, settings), case in zip(benchmark.cases.values(), cases.values()):
        if make is generation:
            case['tok_per_s'] = settings.get('n_tokens', 12) / case['seconds']
    return {'figure': benchmark.figure(*seconds), 'means': benchmark.figure.__doc__, 'target': benchmark.target,
            'rounds': benchmark.rounds, 'cases': cases}


def storage():
    """Bits per ternary weight on disk, and the size of Paper A's model when packed (int8 head and embedding)."""
    packed = to_ternary(build(PAPER_A))
    state = packed_state(packed)
    codes = sum(t.numel() for name, t in state.items() if name.startswith('blocks.') and name.endswith('.codes'))
    size = sum(t.numel() * t.element_size() for t in state.values())
    return {'bits_per_ternary_weight': 8 * codes / packed.quantizable_parameters(), 'megabytes': size / 1e6,
            'targets': '<= 1.61 bits, <= 62 MB'}


@dataclass
class BenchSettings:
    """Measures speed and memory on a CPU."""
    quick: bool = False  # small shapes, under a minute
    only: str = ''  # run the benchmarks with this in their names
    json: str = ''  # where to write the figures, beside others; empty: results/bench.json (quick: bench.json)
    memory_of: str = ''  # (used for its own processes) print the peak memory of this case of --only


def main(argv):
    s = configure(BenchSettings, argv)
    keep_freed_memory()
    everything = BENCHMARKS | QUICK
    if s.memory_of:
        make, shape, settings = everything[s.only].cases[s.memory_of]
        function = make(shape, **settings)
        function(), function()
        return print(own_peak())
    there = QUICK if s.quick else BENCHMARKS
    chosen = {name: benchmark for name, benchmark in there.items() if s.only in name}
    if not chosen:
        raise UserError(f"no benchmark has '{s.only}' in its name; there are: {'; '.join(there)}")
    path = s.json or ('bench.json' if s.quick else 'results/bench.json')
    report = json.loads(Path(path).read_text()) if Path(path).exists() else {'benchmarks': {}}
    here = {'commit': commit(),
            'machine': f'{machine()}, {int8_support("cpu")[1]}, native step: {native.available()[1]}'}
    print(here['machine'])
    for name, benchmark in chosen.items():
        result = report['benchmarks'][name] = here | measure(name, benchmark)
        target = f' (target {result["target"]})' if result['target'] != '-' else ''
        print(f'\n{name}: {result["figure"]:.2f}{target}\n  {result["means"]}', flush=True)
        for case, r in result['cases'].items():
            speed = f'{r["tok_per_s"]:8.1f} tok/s' if 'tok_per_s' in r else ''
            print(f'  {case:16} {1000 * r["seconds"]:9.1f} ms {r["peak_mib"]:7.0f} MiB {speed}', flush=True)
    if not s.quick and not s.only:
        report['storage'] = storage()
        print(f'\nstorage: {report["storage"]}')
    with checkpoint.atomic_write(path, 'w') as file:
        json.dump(report, file, indent=1)
    print(f'\nwritten: {path}')


if __name__ == '__main__':
    run(main)
