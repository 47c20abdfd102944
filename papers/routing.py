"""
Why the routing loss (A9) costs what it costs: keep its gradient from the blocks, or make it small.

    python -m papers.routing Detached config/bitskip_h.py config/cpu.py --lambda_r=0.2
    python -m papers.routing Clipped config/bitskip_h.py config/cpu.py --lambda_r=0.2

A9 trains the gates, and through them the blocks: a block can make its gate's work easier by
changing what all later blocks read. `Detached` trains the gates alone. In `Clipped` the blocks
learn from A9, too, but what comes back to a state is no longer than CLIP.
"""
import torch

from configurator import UserError, run
from model import BitSkip
from train import TrainSettings, main

CLIP = 1e-4  # what comes back to h_0 begins at 8e-3, and is 1e-3 while E finds its target

class Detached(BitSkip):
    def route_loss(self, states, last):
        return super().route_loss([h.detach() for h in states], last.detach())

class ClipGradient(torch.autograd.Function):
    """h, any shape; on the way back its gradient, scaled down to the norm CLIP if it is longer."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        return grad * (CLIP / grad.norm().clamp(min=CLIP))

class Clipped(BitSkip):
    def route_loss(self, states, last):
        return super().route_loss([ClipGradient.apply(h) for h in states], last)

VARIANTS = {'Detached': Detached, 'Clipped': Clipped}

def start(argv):
    if not argv or argv[0] not in VARIANTS:
        raise UserError(f'name a variant first: {" or ".join(VARIANTS)}')
    main(argv[1:], TrainSettings, VARIANTS[argv[0]])

if __name__ == '__main__':
    run(start)
