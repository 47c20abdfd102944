"""
How fast: every claim as cases that take turns in one process.

    python -m fast.bench                    everything, some half an hour on two cores
    python -m fast.bench --quick            small shapes, about a minute
    python -m fast.bench --only=decode      the benchmarks with this in their names
    python -m fast.bench --device=cuda      what PyTorch and Triton do on a GPU

Machines drift and are shared, so a lone time means little. The cases of a benchmark take turns, and
the ratio of their medians is what counts. Prints a table and writes JSON.

Of a training step it also tells the launches (operations of PyTorch that are no views), on CUDA the
memory that it takes above what is held, and the model FLOPs utilization: 6 operations for each
weight of projections and head and 12 L C T for attention, a token, against those of a large product
of the same dtype, here. (Of integers a machine may do more, so ternary training may exceed 1.)
"""
import ctypes
import functools
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from common import (atomic_write, autocast, keep_freed_memory, pick_device, require_suffix,
                    synchronize)
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import UserError, configure, run
from decode import Decoder
from exits import skip_probabilities
from fast import found_once, native
from fast.machine import commit, machine
from fast.packed import to_ternary
from model import BitSkip, BitSkipConfig
from quant import int8_support
from train import TrainSettings, make_optimizer

def recipe(*names):
    """The model and the batch of config files, for a vocabulary of bytes."""
    folder = Path(__file__).parents[1] / 'config'
    paths = [str(folder / f'{name}.py') for name in names]
    s = configure(TrainSettings, paths)
    return asdict(BitSkipConfig.of(vars(s))) | dict(batch_size=s.batch_size, vocab_size=256)

PAPER_A = dict(batch_size=4)  # and BitSkipConfig's defaults
PAPER_B = dict(n_layer=24, n_embd=2048, n_head=32, n_kv_head=8, ffn_dim=4096, ffn='swiglu',
               norm='rmsnorm', sub_norm=False)
SMALL = dict(batch_size=16, n_layer=6, n_embd=256, n_head=4, n_kv_head=2, ffn_dim=1024,
             vocab_size=256, block_size=256)
TINY = SMALL | dict(batch_size=2)
SQUARE = dict(n_layer=1, n_embd=2048, n_head=16, n_kv_head=16, ffn_dim=2048, vocab_size=256,
              sub_norm=False)
WIDE = dict(n_embd=128, ffn_dim=512, n_head=4, n_kv_head=2)  # over config/cpu.py

# --------------------------------------------------------------------------------------------------
# cases: functions that build something and return what is to be timed

def build(shape, **changes):
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig.of(shape | changes))
    with torch.no_grad():
        model.head.weight.mul_(6)  # logits as far apart as a trained model's (native.py:MARGIN)
    return model

def training(shape, dtype='float32', compiled=False, **changes):
    """One step of training: forward, backward, clipping, AdamW."""
    model = build(shape, **changes).train()
    optimizer, c = make_optimizer(model, TrainSettings()), model.config
    for block in model.blocks if compiled else ():
        block.compile()
    idx = torch.randint(c.vocab_size, (shape['batch_size'], c.block_size))

    def loss():
        with autocast(model.device, dtype):
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
    """What decodes one text: how is 'eager', 'once' (W^ is found once) or 'packed', all in PyTorch,
    or 'native' (C, int8 head)."""
    model = build(shape, **changes).eval()
    if how == 'native':
        return native.Decoder(model)
    ways = {'eager': lambda model: model, 'once': found_once,
            'packed': functools.partial(to_ternary, head='int8' if model.device.type == 'cpu'
                                        else 'fp32')}  # as fast.quick_decoder
    return Decoder(ways[how](model))

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

def reading_memory(shape, n_tokens=12):
    """A sum over as many bytes as native decoding reads for these tokens."""
    c = BitSkipConfig.of(shape)
    with torch.device('meta'):
        ternary = BitSkip(c).quantizable_parameters()
    numbers = torch.ones((ternary // 4 + c.vocab_size * c.n_embd // 2) // 8, dtype=torch.int64)
    return lambda: [numbers.sum() for _ in range(n_tokens)]

def int8_products(shape, prompt=256):
    """The products of the projections with a prompt, by torch._int_mm."""
    with torch.device('meta'):
        linears = BitSkip(BitSkipConfig.of(shape)).linears()
    sizes = [(layer.out_features, layer.in_features) for layer in linears]
    codes = {size: torch.randint(-1, 2, size, dtype=torch.int8) for size in sizes}
    x = {k: torch.randint(-127, 128, (prompt, k), dtype=torch.int8) for _, k in codes}
    return lambda: [torch._int_mm(x[size[1]], codes[size].t()) for size in sizes]

PRODUCT = """#include "%s"
void product(const Decoder *d, int T, const float *in, float *out) {
    Run run;
    const Linear *L = &d->blocks->o;
    lay_out(d, &run);
    for (int t = 0; t < T; t += CHUNK) {
        run.T = smaller(CHUNK, T - t);
        linear(&run, L, in + (int64_t)t * L->inputs, L->inputs, out + (int64_t)t * L->rows, L->rows,
               0);
    }
}
"""

def product(shape, tokens, times, isa=2):
    """A ternary product of native.c with a square matrix, one thread: so many times, of tokens
    (T, C) in float32, which are quantized first."""
    best = native.library()[0].bitskip_isa()
    runs = native.Decoder(build(shape), threads=1, isa=min(isa, best))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, 'product.c'), Path(folder, 'product.so')
        source.write_text(PRODUCT % native.SOURCE, encoding='utf-8')
        target.write_bytes(native.compile_library(native.find_compiler(), source))
        lib = ctypes.CDLL(str(target))
    x, y = torch.randn(2, tokens, shape['n_embd'])
    x_at, y_at = ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr())

    def multiply():
        for _ in range(times):
            lib.product(ctypes.byref(runs.c), tokens, x_at, y_at)
    multiply.keeps = x, y
    return multiply

# --------------------------------------------------------------------------------------------------
# figures: what a benchmark makes of the seconds of its cases

def ratio(a, *b):
    """time of the first case as a multiple of the last's"""
    return a / b[-1]

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

BF16 = dict(dtype='bfloat16')
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
    'decode, 1.06B, native, share of memory': (speedup, 7, {
        'native': (generation, PAPER_B, dict(how='native')),
        'memory': (reading_memory, PAPER_B, {})}),
    'prompt of 256, 86M, native': cases(speedup, 5, reading, PAPER_A, native=dict(how='native'),
                                        fp=FP),
    'prompt of 256, 1.06B, native, share of _int_mm': (speedup, 5, {
        'native': (reading, PAPER_B, dict(how='native')),
        '_int_mm': (int8_products, PAPER_B, {})})}
BENCHMARKS |= {
    f'product, 2048 x 2048, {n} tokens': cases(
        ratio, 15, product, SQUARE, AVX2=dict(isa=1, tokens=n, times=times),
        best=dict(tokens=n, times=times)) for n, times in ((1, 1000), (128, 20))}

def on_a_gpu(shape, name, *compiled):
    """What PyTorch and Triton do, on any device; compiled as well, if 'compiled' is named."""
    kinds = {'BitLinear': {}, 'H': dict(linear='hbitlinear'), 'compose': dict(
        linear='hbitlinear', exit_norm='none', ee_weighting='uniform', lambda_ee=2.0,
        ee_positions='sampled', gate_loss='divergence', lambda_r=0.1)}  # config/compose.py
    ways = {f'{way} ': BF16 | dict(compiled=True) for way in compiled} | {'': BF16}
    found = {}
    for kind, changes in kinds.items():
        ours = {f'{way}ternary': changes | how for way, how in ways.items()}
        fp = {f'{way}fp': FP | how for way, how in reversed(ways.items())}
        found[f'train, {name}, {kind}'] = cases(ratio, 9, training, shape, **ours, **fp)
    return found | {f'decode, {name}, {how}': cases(
        speedup, 7, generation, shape, ours=dict(how=how), fp=FP)
        for how in ('eager', 'once', 'packed')}

ON_A_GPU = on_a_gpu(PAPER_A | dict(batch_size=16), '86M', 'compiled')
QUICK = on_a_gpu(TINY, 'tiny')
QUICK_IN_C = {'decode, tiny, native': cases(speedup, 3, generation, TINY, native=dict(how='native'),
                                            fp=FP)}

def take_turns(functions, rounds, device):
    """The median seconds of each function over rounds in which each runs once."""
    seconds = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, times in zip(functions, seconds):
            started = time.perf_counter()
            function()
            synchronize(device)
            times.append(time.perf_counter() - started)
    return [statistics.median(times[1:]) for times in seconds]  # the first round warms up

class Launches(TorchDispatchMode):
    """Counts the operations that are no views, and not only memory or a mark."""
    n = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        idle = any(word in op.name() for word in ('empty', '_unsafe_view', 'profiler'))
        self.n += not (op.is_view or idle)
        return op(*args, **(kwargs or {}))

@functools.cache
def product_speed(dtype, device):
    """Operations a second in a large product."""
    n = 2 ** 11 if device.type == 'cpu' else 2 ** 13
    x = torch.ones(n, n, dtype=getattr(torch, dtype))
    return 2 * n ** 3 / take_turns([lambda: x @ x], 5, device)[0]

def of_a_step(step, device, seconds, shape, dtype='float32', compiled=False, **changes):
    """What a training step tells besides its time: a dict."""
    found = {}
    if device.type == 'cuda':
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        found['MiB'] = (torch.cuda.max_memory_allocated(device) - held) // 2 ** 20
    if not compiled:
        with Launches() as launches:
            step()
        found['launches'] = launches.n
    c = BitSkipConfig.of(shape | changes)
    with torch.device('meta'):
        weights = BitSkip(c).quantizable_parameters() + c.vocab_size * c.n_embd
    a_token = 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size
    flops = a_token * shape['batch_size'] * c.block_size
    found['MFU'] = flops / product_speed(dtype, device) / seconds
    return found

@dataclass
class BenchSettings:
    """Measures speed, in cases that take turns."""
    quick: bool = False  # small shapes, about a minute
    only: str = ''  # run the benchmarks with this in their names
    device: str = 'cpu'  # cuda: without what is in C
    json: str = 'bench.json'  # where to write the figures

def main(argv):
    s = configure(BenchSettings, argv)
    require_suffix('json', s.json, '.json')
    keep_freed_memory()
    device = pick_device(s.device)
    on_cpu = device.type == 'cpu'
    there = (QUICK if s.quick else {} if on_cpu else ON_A_GPU) | (
        {} if not on_cpu else QUICK_IN_C if s.quick else BENCHMARKS)
    chosen = {name: benchmark for name, benchmark in there.items() if s.only in name}
    if not chosen:
        raise UserError(f"no benchmark has '{s.only}' in its name; there are: {'; '.join(there)}")
    report = {'commit': commit(), 'machine': machine(device),
              'products': int8_support(device.type)[1], 'benchmarks': {}}
    if on_cpu:
        report['native'] = native.available()[1]
    print(report['machine'])
    with torch.device(device):  # tensors are made there
        for name, benchmark in chosen.items():
            report['benchmarks'][name] = measure(name, *benchmark, device)
            with atomic_write(s.json, 'w') as file:  # what is measured stays, whatever comes next
                json.dump(report, file, indent=1)
    print(f'\nwritten: {s.json}')

def measure(name, figure, rounds, made, device):
    """Run a benchmark, and print it; what the report says of it: a dict."""
    functions = [f(shape, **changes) for f, shape, changes in made.values()]
    times = [changes.get('times', 1) for _, _, changes in made.values()]
    seconds = [t / n for t, n in zip(take_turns(functions, rounds, device), times)]
    result = figure(*seconds)
    print(f'\n{name}: {result:.2f} ({figure.__doc__})')
    details = {}
    for (case, (f, shape, changes)), function, t in zip(made.items(), functions, seconds):
        if f is generation:
            details[case] = {'tokens/s': changes.get('n_tokens', 12) / t}
        elif f is training:
            details[case] = of_a_step(function, device, t, shape, **changes)
        told = [f'{what} {number:.3g}' if number < 10 else f'{what} {number:,.0f}'
                for what, number in details.get(case, {}).items()]
        print(f'  {case:12} {1000 * t:10.3f} ms  {", ".join(told)}', flush=True)
    return {'figure': result, 'means': figure.__doc__, 'rounds': rounds,
            'seconds': dict(zip(made, seconds)), 'details': details}

if __name__ == '__main__':
    run(main)
