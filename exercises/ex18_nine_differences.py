"""18. Find the nine differences (papers/as_run.py)."""
import math
import sys

import torch
import torch.nn.functional as F

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from papers.measures import LADDER

RUNGS = list(LADDER)[1:]  # the changes from as run to BitSkip, each by its name


def places():
    """papers/as_run.py numbers nine differences from minimal.py. At which place of minimal.py does
    each stand the other way? {1: name, ..., 9: name}, with names of functions and classes there,
    such as 'Block', or 'main' for what stands under `if __name__`."""
    raise NotImplementedError


def ffn_as_run(x, up, down, norm):
    """The FFN as run: x (N, C), up (F, C), down (C, F) -> (N, C), in plain floats.

    phi, a squared ReLU, ends both projections, and the FFN has its own between them (number 2).
    norm: whether a LayerNorm, without parameters, stands inside each projection, in front of its
    product (number 3)."""
    raise NotImplementedError


def predict():
    """Before you look: which rung moves the PPL at full depth most, and which moves the last step
    most (PPL one block before the end, over PPL at the end)? Two names of RUNGS."""
    raise NotImplementedError


def observe():
    """The FFN of the first step, in Paper A's size: how large is its output, and its gradient?"""
    generator = torch.Generator().manual_seed(0)

    def uniform(out, n_in):  # number 5: a tenth of PyTorch's own
        return (torch.rand(out, n_in, generator=generator) - 0.5) * 0.2 * n_in ** -0.5
    x, up, down = torch.randn(256, 512, generator=generator), uniform(2048, 512), uniform(512, 2048)
    for norm in (False, True):
        up.requires_grad_()
        y = ffn_as_run(x, up, down, norm)
        grad, = torch.autograd.grad((y * torch.randn(y.shape, generator=generator)).mean(), up)
        size, slope = y.square().mean().sqrt(), grad.square().mean().sqrt()
        print(f'{"with" if norm else "without"} a LayerNorm inside: output {size:.0e}, gradient of '
              f'up {slope:.0e}')


def climb():
    """The ladder of the cell with exits, as far as it is measured, beside your prediction."""
    from papers.tables import on_rung
    rows, names = [], predict()
    for rung in LADDER:
        runs = [r['exits'] for r in on_rung(rung, 'H + EE')]
        if runs:
            nats = torch.tensor(runs).mean(dim=0)  # of each exit
            rows.append((rung, nats[-1].item(), (nats[-2] - nats[-1]).item()))
    moves = [{}, {}]  # rung: by which factor, in nats, it moves the PPL, and the last step
    for before, (rung, *now) in zip([None, *rows], rows):
        for move, old, new in zip(moves, before[1:] if before else (), now):
            move[rung] = abs(new - old)
        print(f'{rung:36} PPL {math.exp(now[0]):8.2f}   last step x{math.exp(now[1]):.2f}')
    print(f'{len(rows)} of {len(LADDER)} rungs are measured; the others:\n'
          'python -m papers.ablate --table=ladder')
    for what, move, name in zip(('full depth', 'the last step'), moves, names):
        most = max(move, key=move.get, default='nothing yet')
        print(f'moves {what} most: you said "{name}", measured is "{most}"')


if __name__ == '__main__':
    observe()
    climb()
