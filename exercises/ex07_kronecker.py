"""7. The same transform as two small products (B4)."""
import sys

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from hadamard import signs  # signs(n, dtype, device): the +-1 matrix sqrt(n) H, (n, n)


def fwht_kronecker(x):
    """H_m = H_a (x) H_b whenever a + b = m. So with x as a matrix X (2^a, 2^b), row by row, H x is
    H_a X H_b.

    x (..., n) -> (..., n), orthonormal. Take a and b as equal as can be: that is n (2^a + 2^b)
    multiplications, and not n^2."""
    raise NotImplementedError


def observe():
    for n in (512, 2048):
        with FlopCounterMode(display=False) as counter:
            fwht_kronecker(torch.randn(1, n))
        print(f'n = {n}: {counter.get_total_flops() // 2:,} multiplications; {n ** 2:,} as one '
              f'matrix; the butterfly needs {n * (n.bit_length() - 1):,} additions')


if __name__ == '__main__':
    observe()
