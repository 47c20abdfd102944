"""
The papers' experiments (experiments.py): train every cell of a table, then set what we measured beside what they say.

    python ablate.py --table=A2 --seeds=3              Paper A's four cells at the scale of two CPU cores
    python ablate.py --table=A2 --scale=paper          the same at Paper A's own scale: needs a GPU
    python ablate.py --table=all --seeds=3             everything, twelve hours of two cores
    python tables.py                                   print what is known by now

A cell is a command line of train.py, and nothing else; a run is a cell with a learning rate and a seed. Each run leaves
one file, results/SCALE/NAME.json, named after its command line: what is there is not run again, tables that share a
cell share its runs, and a run that was interrupted goes on where it was. Start the command in several terminals, and
they share the work.

The learning rate decides more than anything that is compared here, so that no cell of a table is compared at a rate
that suits another: each is first trained briefly at several rates, then with every seed at the rate that was best for
it. (Tables that have one rate only do without.)
"""
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import tradeoff
import train
from configurator import UserError, configure, run
from eval_exits import activation_and_gate_statistics, bits_per_byte, evaluate, weight_statistics
from experiments import SEEDS, SHORT, TABLES
from prepare import data_of
from quant import bit_linears, latent_weights
from runtime import commit, keep_freed_memory, machine, pick_device


SHARES = (0.45, 0.55, 0.65, 0.75, 0.85, 0.95)  # of the blocks, around those that tables ask for
COMMIT = commit()  # of the code that this process has loaded


@dataclass(frozen=True)
class Run:
    """One training: a cell's arguments, a learning rate (None: the config's own) and a seed, at a scale, from scratch
    or on the model of another run."""
    arguments: str
    rate: float | None
    seed: int
    steps: int
    scale: str
    base: 'Run | None' = None

    def command(self, compile=False):
        words = self.arguments.split()
        configs = [word for word in words if word.endswith('.py')]
        configs += ['config/cpu.py'] * (self.scale == 'cpu' and not self.base)  # (a finished model is small already)
        flags = [word for word in words if not word.endswith('.py')]
        if self.rate is not None:
            flags += [f'--learning_rate={self.rate:g}']
        if self.scale == 'cpu':
            flags += [f'--max_iters={self.steps}', f'--eval_interval={self.steps}']
        if self.base:
            flags += [f'--init_from={self.base.out_dir}']
        return configs + flags + [f'--seed={self.seed}'] + ['--compile=True'] * compile

    def line(self, compile):
        return ' '.join(['python train.py', *self.command(compile)])

    @property
    def name(self):
        words = [Path(word).stem if word.endswith('.py') else word.removeprefix('--') for word in self.command()]
        words = [word for word in words if word != 'cpu' and not word.startswith(('eval_interval', 'init_from'))]
        return '-'.join(words + (['on', self.base.name] if self.base else []))

    @property
    def path(self):
        return Path('results', self.scale, self.name + '.json')

    @property
    def out_dir(self):
        return Path('out', 'ablate', self.scale, self.name)

    def result(self):
        """What the run measured, or None if it has not been done."""
        return json.loads(self.path.read_text()) if self.path.exists() else None


def loss_of(result):
    """Validation loss at full depth with ternary weights, nats per token; infinite where training diverged."""
    return result['exits'][-1] if result['exits'] else math.inf


def swept_runs(table, label, scale):
    """The runs that find a cell's learning rate, if there is a choice."""
    rates = table.rates if scale == 'cpu' and label not in table.on and len(table.rates) > 1 else ()
    return [Run(table.arguments(label, scale), rate, SEEDS[0], SHORT, scale) for rate in rates]


def compared_runs(table, label, scale, n_seeds):
    """The runs of a cell that its table compares: one a seed, at the best rate. [] while that is not known."""
    if label in table.on:
        bases = compared_runs(table, table.on[label], scale, n_seeds)
        return [Run(table.arguments(label, scale), None, base.seed, SHORT, scale, base) for base in bases
                if base.result()]
    sweep = swept_runs(table, label, scale)
    results = [run.result() for run in sweep]
    if None in results:
        return []
    best = min(zip(results, sweep), key=lambda pair: loss_of(pair[0]), default=(None, None))[1]
    rate = best.rate if best else table.rates[0] if scale == 'cpu' else None
    seeds = SEEDS[:min(n_seeds, table.seeds)]
    return [Run(table.arguments(label, scale), rate, seed, table.steps, scale) for seed in seeds]


def fit(run, compile):
    """Train the run's model, or go on training it; first the model that it starts from, if only what that one measured
    was kept. False if it was interrupted."""
    if run.base:
        with checkpoint.exclusive(f'{run.base.out_dir}.run'):  # other runs may start from it, too
            if not (run.base.out_dir / 'ckpt.pt').exists() and not fit(run.base, compile):
                return False
    resume = ['--init_from=resume'] if (run.out_dir / 'last.pt').exists() else []
    torch.compiler.reset()  # forget the graphs of other cells
    print(f'\n{run.line(compile)}')
    return train.main([*run.command(compile), f'--out_dir={run.out_dir}', *resume])


def do(run, compile):
    """Train the run's model and write what it measures. False if it was interrupted."""
    try:
        if not fit(run, compile):
            return False
        measured = measure(run.out_dir / 'ckpt.pt')
    except train.Diverged as diverged:
        print(diverged)
        measured = {'exits': [], 'diverged': str(diverged)}
    result = {'command': run.line(compile), 'commit': COMMIT, 'machine': machine(), **measured}
    with checkpoint.atomic_write(run.path, 'w') as file:
        json.dump(result, file, indent=1)
    return True


def measure(path):
    """Everything that a table or a plot may want of a trained model, over the whole validation split."""
    model, settings = checkpoint.load_checkpoint(path, pick_device('auto'))
    meta, progress = settings['meta'], settings['progress']
    _, tokens = data_of(settings)
    losses = evaluate(model, tokens, list(range(model.config.n_layer)))
    latent = None
    if bit_linears(model):
        with latent_weights(model):
            latent = evaluate(model, tokens)[-1]
    std, gates = activation_and_gate_statistics(model, tokens)
    has_exits = settings['lambda_ee'] or settings['freeze']
    ways = tradeoff.measure(model, tokens[:2 ** 15 + 1], shares=SHARES) if has_exits else None
    log = [json.loads(line) for line in (Path(path).parent / 'log.jsonl').read_text().splitlines()]
    return {'minutes': round(progress['seconds'] / 60, 1), 'steps': progress['iter'],
            'tokens': progress['iter'] * settings['batch_size'] * settings['gradient_accumulation_steps']
            * settings['block_size'],
            'exits': losses, 'bits_per_byte': bits_per_byte(losses[-1], meta), 'latent': latent,
            'unshifted': evaluate(model, tokens, unshifted=True)[-1] if model.config.unshifted == 'all' else None,
            'weights': weight_statistics(model), 'histogram': weight_histogram(model),
            'activation_std': std, 'gates': gates,
            'ways': ways,
            'train': [[e['iter'], round(e['ce'], 4)] for e in log if 'ce' in e],
            'val': [[e['iter'], round(e['val_loss'], 4)] for e in log if 'val_loss' in e]}


def weight_histogram(model):
    """Shares of the latent weights with w / alpha in each of 60 bins from -3 to 3, over all ternary matrices."""
    ratios = [layer.weight.detach().flatten() / layer.ternary()[1] for layer in bit_linears(model)]
    counts = sum(ratio.histc(60, -3, 3) for ratio in ratios)
    return (counts / sum(map(len, ratios))).tolist() if ratios else None


def train_all(tables, scale, seeds, compile):
    """Do every run that is missing. False if this was interrupted. Other processes may be doing the same."""
    while True:
        missing = [run for table in tables for label in table.cells
                   for run in swept_runs(table, label, scale) + compared_runs(table, label, scale, seeds)
                   if run.result() is None]
        if not missing:
            return True
        for each in missing:
            with checkpoint.exclusive(f'{each.out_dir}.run', wait=False) as mine:
                if mine and each.result() is None:
                    if not do(each, compile):
                        return False
                    break  # its result may tell what to do next
        else:
            time.sleep(5)  # what is missing is being done elsewhere


@dataclass
class AblateSettings:
    """Trains the cells of a table and prints what they measure beside the papers' figures."""
    table: str = 'A2'  # which one, or several with commas, or all
    scale: Literal['cpu', 'paper'] = 'cpu'  # two CPU cores and the embedded text, or the papers' own
    seeds: int = 3  # runs of each cell at its best learning rate
    compile: bool = False  # torch.compile each block: a fifth faster on a CPU, the same losses to three figures

    def __post_init__(self):
        if not 1 <= self.seeds <= len(SEEDS):
            raise ValueError(f'seeds is 1 to {len(SEEDS)}, got {self.seeds}')


def main(argv):
    s = configure(AblateSettings, argv)
    keep_freed_memory()
    there = [name for name, table in TABLES.items() if s.scale in table.scales]
    names = there if s.table == 'all' else s.table.split(',')
    for name in names:
        if name not in there:
            raise UserError(f"there is no table '{name}' at the {s.scale} scale; there are {', '.join(there)} and all")
    if train_all([TABLES[name] for name in names], s.scale, s.seeds, s.compile):
        from tables import markdown  # (which reads our plan)
        for name in names:
            print(f'\n{name}: {TABLES[name].title}\n{markdown(name, s.scale)}')


if __name__ == '__main__':
    run(main)
