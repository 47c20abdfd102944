"""3. Integer activations, one scale a token (A2)."""
import torch


def activation_quant(x, bits):
    """A2: x (..., k) -> codes (..., k) int8, and the step of each token, (..., 1): codes * step is
    x^.

        s = max|x|,  q = 2^(b-1) - 1,    x^ = clip(round(x q / s), -q-1, q) s / q

    A token of zeros has codes 0, not NaN."""
    raise NotImplementedError


def observe():
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        codes, step = activation_quant(x, bits)
        error = (codes * step - x).norm() / x.norm()
        print(f'{bits} bits: {len(codes.unique())} levels in use, |x^ - x| / |x| = {error:.4f}')


if __name__ == '__main__':
    observe()
