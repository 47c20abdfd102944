"""
The papers' figures, and one that they should have had, made from what ablate.py and tradeoff.py measured.

    python plots.py                    results/experiments.png, results/tradeoff.png

Colours are told apart by colour-blind readers, too. A band spans the seeds, its line is their mean.
"""
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import checkpoint
import papers
from configurator import configure, run
from measured import relative_exits, results

COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')


def band(axes, x, curves, color, label, **style):
    """The mean of some curves, and the range that they span."""
    axes.plot(x, [statistics.mean(values) for values in zip(*curves)], color=color, label=label, **style)
    axes.fill_between(x, [min(values) for values in zip(*curves)], [max(values) for values in zip(*curves)],
                      color=color, alpha=0.2, linewidth=0)


def smooth(curve, n=5):
    """Means of n neighbours: a step's loss is that of a few sentences, and noisy."""
    return [statistics.mean(curve[i:i + n]) for i in range(0, len(curve) - n + 1, n)]


def experiments(plt, scale):
    """Loss curves, exits, activation spread, weights of Paper A's four cells and ours; spread of Paper B's variants."""
    figure, ((losses, exits, theirs), (weights, spread, spread_b)) = plt.subplots(
        2, 3, figsize=(14, 7), constrained_layout=True)
    cells = results('A2', scale) | {'config/compose.py': results('compose', scale).get('joint training')}
    cliff, variants = results('cliff', scale), results('B', scale)
    for (label, several), color in zip(cells.items(), COLORS):
        if not several:
            continue
        curves = [smooth([loss for _, loss in r['train']]) for r in several]
        shared = min(map(len, curves))  # patience may have stopped some runs earlier
        steps = smooth([step for step, _ in several[0]['train']])[:shared]
        band(losses, steps, [curve[:shared] for curve in curves], color, label)
        layers = range(len(several[0]['exits']))
        band(exits, layers, list(map(relative_exits, several)), color, label)
        band(spread, layers, [r['activation_std'] for r in several], color, label)
        ratio = [-2.95 + 0.1 * i for i in range(60)]
        weights.step(ratio, several[0]['histogram'], where='mid', color=color, label=label)
    for (label, several), color in zip(cliff.items(), COLORS):
        band(theirs, range(len(several[0]['exits'])), list(map(relative_exits, several)), color, label)
    theirs.plot(range(len(papers.A5)), [value / papers.A5[-1] for value in papers.A5], 'k--', label='Paper A, Table 5')
    for label, several in variants.items():
        variant, phase = label.split(', phase ')
        band(spread_b, range(len(several[0]['activation_std'])), [r['activation_std'] for r in several],
             COLORS[('V1', 'V2', 'V3', 'Llama3').index(variant)], variant if phase == '2' else None,
             linestyle={'1': '--', '2': '-'}[phase])
    spread_b.plot(23, papers.B_SPREAD['V1'], 'o', color=COLORS[0], label='V1, as Paper B has it')
    spread_b.axhspan(*papers.B_SPREAD['V3'], color=COLORS[2], alpha=0.15, label='V3, as Paper B has it')
    for threshold in (-0.5, 0.5):
        weights.axvline(threshold, color='grey', linestyle=':')
    losses.set(title='Training loss', xlabel='step', ylabel='nats per byte', ylim=(None, 3.5))
    exits.set(title='PPL at each exit', xlabel='exit layer', ylabel='times that of full depth', yscale='log')
    theirs.set(title='H+EE: what makes the cliff', xlabel='exit layer', ylabel='times that of full depth', yscale='log')
    spread.set(title='Spread of the activations', xlabel='layer', ylabel='standard deviation of h')
    spread_b.set(title="Paper B's variants; dashed: phase 1", xlabel='layer', ylabel='standard deviation of h',
                 yscale='log', ylim=(0.1, None))
    weights.set(title='Latent weights, thresholds of A1', xlabel='w / α', ylabel='share of the weights',
                ylim=(0, 0.09))
    theirs.set_visible(bool(cliff))
    spread_b.set_visible(bool(variants))
    decorate(losses, exits, theirs, weights, spread, spread_b)
    return figure


def tradeoff(plt, scale):
    """Quality against compute: exits of Paper A, of its recipe rerun and of ours; every way to leave ours early."""
    figure, (exits, ways) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    n = len(papers.A5)
    share = [(layer + 1) / n for layer in range(n)]
    compose, cliff = results('compose', scale), results('cliff', scale)
    exits.plot(share, [value / papers.A5[-1] for value in papers.A5], 'ks--', label='Paper A, Table 5')
    for label, several, color in (
            ("its recipe, the authors' labels at the exits", cliff.get('unshifted labels, final norm'), COLORS[1]),
            ('its recipe, shifted labels', compose.get("Paper A's recipe"), COLORS[4]),
            ('exits on a finished model', compose.get('exits on a finished model'), COLORS[2]),
            ('joint training (config/compose.py)', compose.get('joint training'), COLORS[0])):
        if several:
            band(exits, share, list(map(relative_exits, several)), color, label, marker='o')
    report = json.loads(Path('results/tradeoff.json').read_text())
    full = report['points'][report['n_layer'] - 1]['loss']
    for way, marker, color in (('fixed', 'o-', COLORS[0]), ('confidence', '^-', COLORS[2]),
                               ('saturation', 's-', COLORS[5]), ('gate', 'D-', COLORS[3]),
                               ('oracle', ':', COLORS[3]), ('drafts', '*', 'k')):
        points = sorted((p['blocks'] / report['n_layer'], math.exp(p['loss'] - full))
                        for p in report['points'] if p['way'] == way and p['knob'] != 'argmax')
        ways.plot(*zip(*points), marker, color=color, label=way)
    ways.axhline(1.01, color='grey', linestyle=':')
    ways.axvline(0.7, color='grey', linestyle=':')
    exits.set(title='Fixed exits', yscale='log', ylabel='PPL, times that of full depth',
              xlabel='blocks run, share of all')
    ways.set(title='Joint training: ways to leave early', ylim=(0.99, 1.5),
             xlabel='blocks that a token waits for, share of all')
    decorate(exits, ways)
    return figure


def decorate(*all_axes):
    for axes in all_axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)


@dataclass
class PlotsSettings:
    """Draws the papers' figures from what was measured."""
    scale: Literal['cpu', 'paper'] = 'cpu'  # whose results
    folder: str = 'results'  # where the pictures go


def main(argv):
    s = configure(PlotsSettings, argv)
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    for draw in (experiments, tradeoff):
        path = Path(s.folder, f'{draw.__name__}.png')
        figure = draw(plt, s.scale)
        with checkpoint.atomic_write(path) as file:
            figure.savefig(file, format='png', dpi=80, bbox_inches='tight')  # without the panels that have no data yet
        plt.close(figure)
        print(f'written: {path}')


if __name__ == '__main__':
    run(main)
