"""7. The same transform as two small products (B4)."""
import torch
from torch.utils.flop_counter import FlopCounterMode

from hadamard import signs  # signs(n, dtype, device): the +-1 matrix sqrt(n) H, (n, n)


def fwht_kronecker(x):
    """H_m = H_a (x) H_b whenever a + b = m. So with x as a matrix X (2^a, 2^b), row by row, H x is H_a X H_b.

    x (..., n) -> (..., n), orthonormal. Take a and b as equal as can be: n (2^a + 2^b) multiplications, not n^2."""
    raise NotImplementedError


def observe():
    for n in (512, 2048):
        with FlopCounterMode(display=False) as counter:
            fwht_kronecker(torch.randn(1, n))
        print(f'n = {n}: {counter.get_total_flops() // 2:,} multiplications; {n ** 2:,} as one matrix; '
              f'the butterfly needs {n * (n.bit_length() - 1):,} additions')


if __name__ == '__main__':
    observe()
