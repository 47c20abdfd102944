"""6. The product in exact integers."""
import sys

import torch
import torch.nn.functional as F

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from quant import activation_quant, weight_ternary


def integer_linear(x, w, bits=8):
    """Q_b(x) W^T (A1, A2): x (..., in), w (out, in) -> (..., out) float32.

    Multiply the codes as integers, with sums that cannot overflow, and scale once, at the end.
    `activation_quant` and `weight_ternary` are yours to use."""
    raise NotImplementedError


def observe():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 4096, generator=generator), torch.randn(512, 4096, generator=generator)
    x[0] = w[0]  # a token that looks like a row of weights
    y = integer_linear(x, w)
    (x_codes, x_scale), (w_codes, w_scale) = activation_quant(x), weight_ternary(w)
    unit = x_scale * w_scale  # what a sum of 1 is worth
    sums = (y / unit).abs()
    print(f'largest |sum of codes|: {sums[1:].max():,.0f}, for a token like a row of weights '
          f'{sums.max():,.0f}; int8 ends at 127, int16 at 32,767')
    for dtype in (torch.float32, torch.bfloat16):
        fake = F.linear((x_codes * x_scale).to(dtype), (w_codes * w_scale).to(dtype)).float()
        off = (fake - y).abs() / unit
        print(f'fake quantization in {str(dtype)[6:]}: exact: {not bool(off.any())}, sums are off '
              f'by {off.mean():.1g} on average')


if __name__ == '__main__':
    observe()
