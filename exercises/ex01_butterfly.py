"""1. The butterfly (B3, B4)."""
import torch


def fwht(x):
    """The orthonormal Walsh-Hadamard transform of the last dimension: x (..., n) -> (..., n), the
    same dtype, n = 2^m.

        H_0 = (1),    H_m = 1/sqrt(2) [[H_{m-1},  H_{m-1}],
                                       [H_{m-1}, -H_{m-1}]]

    By sums and differences alone, in m rounds of n additions. There is no matrix."""
    raise NotImplementedError


def observe():
    x = torch.zeros(64)
    x[17] = 80.0
    y = fwht(x)
    print(f'an outlier of 80 among 64 zeros: |y_i| is {y.abs().min():.1f} to {y.abs().max():.1f}')
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    print(f'Gaussian noise of norm {x.norm():.3f}: norm {fwht(x).norm():.3f} after once, '
          f'and {(fwht(fwht(x)) - x).norm():.4f} from x after twice')


if __name__ == '__main__':
    observe()
