"""
Four figures for slides, drawn by the project's own functions. Large type, colours for all eyes, and
one sentence each.

    python -m exercises.figures                 into figures/
    python -m exercises.figures --to=slides

    ternary.png    A1: the staircase, and the line that its gradient pretends it to be
    outlier.png    A2, A3: an outlier before and after the transform, at 4 bits
    exits.png      A4, A5: exits over one head, what they weigh, and how often a block is skipped
    cliff.png      A, Table 5: exits that learned the current token, scored on the next one

The cliff is drawn from papers/results, where the ladder is measured. Else two tiny models are
trained (some two minutes).
"""
import math
import os
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure

from common import atomic_write, say
from configurator import check, configure, run
from eval_exits import evaluate
from exits import exit_weights, skip_probabilities
from hadamard import fwht
from model import BitSkip, BitSkipConfig
from papers.mistakes import UnshiftedExits
from prepare import load_tokens, prepare
from quant import activation_quant, dequantize, straight_through, weight_ternary
from train import get_batch

BLUE, ORANGE, GREEN, GREY = '#0072B2', '#D55E00', '#009E73', '#777777'  # Okabe and Ito's


def slide(sentence, n=1, **ratios):
    """A figure of 16:9 with its sentence on top, and n panels side by side."""
    figure = Figure(figsize=(12.8, 7.2), layout='constrained')
    figure.suptitle(sentence, fontsize=24)
    figure.get_layout_engine().set(w_pad=0.2, h_pad=0.2)
    panels = figure.subplots(1, n, squeeze=False, **ratios)[0]
    for axes in panels:
        axes.spines[['top', 'right']].set_visible(False)
        axes.tick_params(labelsize=16)
    return figure, panels


def label(axes, x, y):
    axes.set_xlabel(x, fontsize=20)
    axes.set_ylabel(y, fontsize=20)


# --------------------------------------------------------------------------------------------------

def ternary():
    """A1 of Gaussian weights; its own gradient, and the straight-through one."""
    figure, (left, right) = slide('A weight becomes -1, 0 or 1. Its gradient goes straight '
                                  'through.', 2)
    w = torch.randn(4096, generator=torch.Generator().manual_seed(0)).sort().values
    w.requires_grad_()
    w_hat = dequantize(*weight_ternary(w[None]))[0]
    alpha = weight_ternary(w[None])[1].item()
    x = w.detach()
    left.hist(x, bins=60, density=True, color='#dddddd')
    left.plot(x, x, '--', color=ORANGE, linewidth=2.5, label='what the gradient sees: W')
    left.plot(x, w_hat.detach(), color=BLUE, linewidth=3.5, label='what the model uses: Ŵ')
    left.set(xlim=(-2.5, 2.5), ylim=(-2, 2))
    left.set_yticks([-alpha, 0, alpha], ['-α', '0', 'α'])
    left.legend(fontsize=16, frameon=False, loc='upper left')
    label(left, 'latent weight W', '')
    passed, = torch.autograd.grad(straight_through(w, w_hat).sum(), w)
    right.plot(x, passed, '--', color=ORANGE, linewidth=3.5, label='straight-through: 1')
    right.plot(x, torch.zeros_like(x), color=BLUE, linewidth=3.5, label='of the staircase: 0')
    right.set(xlim=(-2.5, 2.5), ylim=(-0.25, 1.6))
    for edge in (-alpha / 2, alpha / 2):
        right.axvline(edge, ymax=0.75, color=GREY, linestyle=':')
    right.set_xticks([-2, -alpha / 2, alpha / 2, 2], ['-2', '-α/2', 'α/2', '2'])
    right.legend(fontsize=16, frameon=False, loc='upper left')
    label(right, 'latent weight W', 'dŴ / dW')
    return figure


def outlier(bits=4):
    """A token with one loud feature, and what its quantizer leaves of the others."""
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    x[0, 20] = 14.0
    y = fwht(x)
    errors = [(a - b).norm() / a.norm() for a, b in (
        (x, dequantize(*activation_quant(x, bits))), (y, dequantize(*activation_quant(y, bits))))]
    figure, panels = slide(f'One outlier wastes the levels of {bits} bits. The transform spreads '
                           'it.', 2)
    for axes, values, name, error, colour in zip(
            panels, (x, y), ('x', 'H x'), errors, (ORANGE, BLUE)):
        codes, step = activation_quant(values, bits)
        for level in range(-7, 8):
            axes.axhline(level * step.item(), color='#cccccc', linewidth=1, zorder=0)
        axes.vlines(range(64), 0, values[0], color=colour, linewidth=1.5, alpha=0.5)
        axes.plot(range(64), values[0], 'o', color=colour, markersize=6)
        axes.set_title(f'{name}: {len(codes.unique())} of 15 levels in use, error {error:.0%}',
                       fontsize=20)
        label(axes, 'feature', 'value; grey: levels')
    return figure


def exits(L=12, p_max=0.7):
    """The blocks, the head that reads them all, and two bars for each block."""
    figure, (drawing, weights, skips) = slide(
        'Every block can be the last: one head reads them all.', 3, width_ratios=(1.5, 1, 1),
        sharey=True)
    w, p = exit_weights(L, 'early').tolist(), skip_probabilities(L, p_max)
    drawing.set_axis_off()
    drawing.set(xlim=(0, 10), ylim=(-1.2, L))
    for layer in range(L):
        last = layer == L - 1
        drawing.text(2, layer, f'block {layer}', fontsize=16, ha='center', va='center',
                     bbox=dict(boxstyle='round', facecolor='#dbeaf5', edgecolor=BLUE))
        drawing.annotate('', (6.75, (L - 1) / 2 + (layer - (L - 1) / 2) * 0.15), (3.3, layer),
                         arrowprops=dict(arrowstyle='->', color=GREEN if last else ORANGE,
                                         linewidth=2.5 if last else 1.3))
    drawing.annotate('', (0.4, L - 0.6), (0.4, -0.7), arrowprops=dict(
        arrowstyle='->', color=GREY, linewidth=2))
    drawing.text(2, -1, 'tokens', fontsize=16, ha='center', va='center')
    drawing.text(7.8, (L - 1) / 2, 'norm\nhead', fontsize=18, ha='center', va='center',
                 bbox=dict(boxstyle='round,pad=0.6', facecolor='#d9efe6', edgecolor=GREEN))
    weights.barh(range(L - 1), w, color=ORANGE)
    weights.plot(0.005, L - 1, '*', color=GREEN, markersize=18)
    weights.text(0.014, L - 1, 'full depth: CE', fontsize=16, va='center')
    weights.set_title('weight of its loss (A4)', fontsize=20)
    skips.barh(range(L), p, color=BLUE)
    skips.set_title('chance to be skipped\nin training (A5)', fontsize=20)
    skips.text(0.02, L - 1, 'never', fontsize=16, va='center')
    return figure


# --------------------------------------------------------------------------------------------------

def train_tiny(Model, steps, layers=6):
    """PPL at each exit of a small model of its kind, on the next token."""
    torch.manual_seed(7)
    model = Model(BitSkipConfig(vocab_size=256, block_size=64, n_layer=layers, n_head=4,
                                n_kv_head=2, n_embd=64, ffn_dim=256, lambda_ee=0.3, gate_dim=0))
    folder, optimizer = prepare('pydocs'), torch.optim.AdamW(model.parameters(), lr=4e-3)
    tokens = load_tokens(folder, 'train')
    for step in range(steps):
        optimizer.param_groups[0]['lr'] = 4e-3 * min(1, (step + 1) / 50, 4 - 4 * step / steps)
        optimizer.zero_grad()
        model(*get_batch(tokens, 16, 64, 'cpu'), return_logits=False)[1]['total'].backward()
        optimizer.step()
    losses = evaluate(model, load_tokens(folder, 'val')[:8_000], layers=range(layers))
    return [math.exp(loss) for loss in losses]


def measured():
    """{label: PPL at each exit, the mean over seeds} of the ladder's two rungs around the exits'
    labels, or None while they are not measured."""
    from papers.measures import LADDER
    from papers.tables import on_rung
    rungs = list(LADDER)
    at = rungs.index('exits learn the next token')
    curves = {}
    for name, rung in (('next', rungs[at]), ('current', rungs[at - 1])):
        runs = [r['exits'] for r in on_rung(rung, 'H + EE')]
        if not runs:
            return None
        curves[name] = torch.tensor(runs).mean(dim=0).exp().tolist()
    return curves


def cliff(steps=300):
    """PPL of the next token at each exit, by what the exits have learned."""
    curves, source = measured(), 'papers/results, table ladder'
    if curves is None:
        say(f'the ladder is not measured yet: training two small models, {steps} steps each')
        curves = {'next': train_tiny(BitSkip, steps), 'current': train_tiny(UnshiftedExits, steps)}
        source = f'two models of 6 blocks, {steps} steps, one seed'
    figure, (axes,) = slide('Exits that learned the current token stand before a cliff.')
    for (name, ppl), colour, marker in zip(curves.items(), (BLUE, ORANGE), 'os'):
        axes.plot(range(len(ppl)), ppl, f'{marker}-', color=colour, linewidth=3, markersize=10,
                  label=f'exits learned the {name} token')
    axes.axhline(256, color=GREY, linestyle=':', linewidth=2)
    axes.text(0, 256, 'a uniform guess: 256', fontsize=16, color=GREY, va='bottom')
    axes.set(yscale='log')
    axes.set_xticks(range(len(ppl)))
    axes.legend(fontsize=18, frameon=False)
    label(axes, f'exit after block   ({source})', 'perplexity of the next token')
    return figure


FIGURES = {'ternary': ternary, 'outlier': outlier, 'exits': exits, 'cliff': cliff}


@dataclass
class FigureSettings:
    """Draws four figures for slides."""
    to: str = 'figures'  # the folder to write into
    steps: int = 300  # of training, where the cliff is not measured yet

    def __post_init__(self):
        check(self, {'steps': (1, 10 ** 6)})


def main(argv):
    s = configure(FigureSettings, argv)
    for name, draw in FIGURES.items():
        figure = draw(steps=s.steps) if name == 'cliff' else draw()
        path = os.path.join(s.to, f'{name}.png')
        with atomic_write(path) as file:
            figure.savefig(file, format='png', dpi=100)
        say(f'{path}: {figure.get_suptitle()}')


if __name__ == '__main__':
    run(main)
