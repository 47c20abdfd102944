"""4. The straight-through estimator (A1)."""
import sys

import torch
import torch.nn.functional as F

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from quant import weight_ternary


def ternary_ste(w):
    """W^ of A1 going forward, the identity going back: (out, in) -> (out, in), with
    dL/dw := dL/dW^, all of it.

    `weight_ternary` is yours to use (exercise 2)."""
    raise NotImplementedError


def ternary_plain(w):
    """A1 with the gradient that autograd finds."""
    alpha = w.abs().mean()
    return alpha * (w / alpha).round().clamp(-1, 1)


def fit(quantize, steps=300):
    """Teach a matrix W to do, with quantize(W), what a ternary one does. Losses before, after, and
    after with W itself."""
    generator = torch.Generator().manual_seed(0)
    teacher, w, x = (torch.randn(shape, generator=generator)
                     for shape in ((32, 32), (32, 32), (256, 32)))
    codes, scale = weight_ternary(teacher)
    y = F.linear(x, codes * scale)

    def loss(w_hat):
        return F.mse_loss(F.linear(x, w_hat), y)
    w.requires_grad_()
    optimizer = torch.optim.Adam([w], lr=0.02)
    before = loss(quantize(w)).item()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(quantize(w)).backward()
        optimizer.step()
    return before, loss(quantize(w)).item(), loss(w).item()


def observe():
    for name, quantize in (('plain autograd', ternary_plain), ('straight-through', ternary_ste)):
        before, after, latent = fit(quantize)
        print(f'{name}: loss {before:.2f} -> {after:.2f} with W^ ({latent:.2f} with the latent W)')


if __name__ == '__main__':
    observe()
