"""
Draw what was measured (papers/results), or runs of your own:

    python -m papers.plots                                exits.png and ladder.png in papers/results
    python -m papers.plots --runs=out/a,out/b --to=my.png   runs that eval_exits.py has seen
"""
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from common import atomic_write, require_suffix
from configurator import UserError, configure, run
from papers.measures import LADDER
from papers.tables import kept, learned, on_rung, ppl, results

RESULTS = Path(__file__).with_name('results')
BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#777777'  # colour-blind safe

def save(figure, path):
    with atomic_write(str(path)) as file:
        figure.savefig(file, format='png', dpi=120)

def draw_exits(curves, path):
    """PPL at each exit. curves: {label: one list of PPL per seed}; bands span the seeds."""
    figure = Figure(figsize=(7, 3.6), layout='constrained')
    axes = figure.subplots()
    for (label, seeds), colour in zip(curves.items(), (BLUE, ORANGE, GREEN, GREY)):
        layers, by_layer = range(len(seeds[0])), list(zip(*seeds))
        axes.plot(layers, [statistics.mean(p) for p in by_layer], 'o-', color=colour, label=label)
        axes.fill_between(layers, [min(p) for p in by_layer], [max(p) for p in by_layer],
                          color=colour, alpha=0.2, linewidth=0)
    values = [p for seeds in curves.values() for seed in seeds for p in seed]
    wide = max(values) > 20 * min(values)
    axes.set(xlabel='exit after block', ylabel='perplexity per token of test text',
             yscale='log' if wide else 'linear')
    axes.grid(alpha=0.3, which='both')
    axes.legend(frameon=False)
    save(figure, path)

def draw_ladder(path):
    """PPL of Baseline and H-only, their ratio, and the last step of H + EE, rung by rung."""
    rungs = [rung for rung in LADDER if on_rung(rung, 'H-only') or on_rung(rung, 'H + EE')]
    if not rungs:
        return print('ladder: nothing is measured yet')
    figure = Figure(figsize=(9, 6), layout='constrained')
    panels = figure.subplots(3, sharex=True)

    def line(axes, column, colour, value):
        found = [(i, on_rung(rung, column)) for i, rung in enumerate(rungs)]
        points = [(i, [value(r) for r in several]) for i, several in found if several]
        axes.plot([i for i, _ in points], [statistics.mean(v) for _, v in points], 'o-',
                  color=colour, label=column)
        for i, values in points:
            axes.plot([i] * len(values), values, '.', color=colour, alpha=0.5)
    for column, colour in (('Baseline', ORANGE), ('H-only', BLUE), ('H + EE', GREEN)):
        line(panels[0], column, colour, lambda r: ppl(r['exits'][-1]))
    ratios = []
    for i, rung in enumerate(rungs):
        pair = [on_rung(rung, column) for column in ('H-only', 'Baseline')]
        if all(pair):
            h, base = (statistics.mean(ppl(r['exits'][-1]) for r in side) for side in pair)
            ratios.append((i, h / base))
    panels[1].plot(*zip(*ratios), 's-', color=BLUE) if ratios else None
    panels[1].axhline(1, color=GREY, linewidth=1)
    line(panels[2], 'H + EE', GREEN, lambda r: ppl(r['exits'][-2] - r['exits'][-1]))
    panels[0].set(ylabel='PPL, full depth')
    panels[1].set(ylabel='H-only / Baseline')
    panels[2].set(ylabel='PPL one block early\n/ full depth', yscale='log')
    panels[2].set_xticks(range(len(rungs)), rungs, rotation=30, ha='right')
    for axes in panels:
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False)
    save(figure, path)

def read_run(folder):
    path = os.path.join(folder, 'eval.json')
    if not os.path.exists(path):
        raise UserError(f'there is no {path}: run python eval_exits.py --out_dir={folder} first')
    with open(path, encoding='utf-8') as file:
        return [[e['ppl'] for e in json.load(file)['exits']]]

@dataclass
class PlotSettings:
    """Draws what was measured."""
    runs: str = ''  # folders of runs, with commas; empty: papers/results
    to: str = 'exits.png'  # where to draw the exits of these runs

def main(argv):
    s = configure(PlotSettings, argv)
    if s.runs:
        path = require_suffix('--to', s.to, '.png')
        return draw_exits({folder: read_run(folder) for folder in s.runs.split(',')}, path)
    curves = {"the first command's model": [[e['ppl'] for e in kept('first_run')['exits']]]}
    curves |= {label: [[ppl(loss) for loss in r['exits']] for r in learned(results(table, cell))]
              for label, table, cell in (
                  ('joint exits (config/compose.py)', 'fixed', 'H + joint exits'),
                  ("Paper A's recipe, fixed (H + EE)", 'fixed', 'H + EE'),
                  ('no exits trained (H-only)', 'fixed', 'H-only'))}
    curves = {label: seeds for label, seeds in curves.items() if seeds}
    draw_exits(curves, RESULTS / 'exits.png')
    draw_ladder(RESULTS / 'ladder.png')

if __name__ == '__main__':
    run(main)
