"""8. What the transform is for: outliers (A3)."""
import sys

import torch

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from hadamard import fwht
from quant import activation_quant


def quantization_error(x, bits, order):
    """|x^ - x| / |x| over all of x (..., n): a float. Where the transform H stands:

        'none'      x^ = Q(x)
        'before'    x^ is what H takes to Q(H x)                A3, BitNet v2
        'after'     x^ is what H takes to H Q(x)                the authors' older code

    H is its own inverse. `fwht` and `activation_quant` are yours to use."""
    raise NotImplementedError


def observe():
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    with_outliers = x.clone()
    with_outliers[:, [7, 70, 200, 400]] *= 30
    for name, data in (('Gaussian', x), ('with 4 outliers', with_outliers)):
        for bits in (8, 4):
            errors = [f'{order} {quantization_error(data, bits, order):.4f}'
                      for order in ('none', 'before', 'after')]
            print(f'{name}, {bits} bits: ' + ', '.join(errors))


if __name__ == '__main__':
    observe()
