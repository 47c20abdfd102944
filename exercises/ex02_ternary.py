"""2. Ternary weights, twice (A1, B7)."""
import torch


def ternary(w):
    """A1: w (out, in) -> codes (out, in) int8 in {-1, 0, 1}, and the scale alpha (), one a matrix.

        alpha = mean|W|,    W^ = alpha clip(round(W / alpha), -1, 1)

    A matrix of zeros has codes 0, not NaN."""
    raise NotImplementedError


def ternary_by_thresholds(w):
    """B7: w (out, in) -> the same codes (out, in), without alpha, by comparisons with +-alpha/2
    alone. What is exactly on a threshold becomes 0."""
    raise NotImplementedError


def observe():
    w = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    codes, alpha = ternary(w)
    shares = [(codes == c).float().mean().item() for c in (-1, 0, 1)]
    print('Gaussian weights: shares of -1, 0, +1: ' + ', '.join(f'{s:.3f}' for s in shares))
    print(f'|W^ - W| / |W| = {(codes * alpha - w).norm() / w.norm():.3f}')
    again, smaller = ternary(codes * alpha)
    print(f'W^ ternarized once more: {(again != codes).sum()} codes differ, '
          f'and alpha is multiplied by {smaller / alpha:.3f}')


if __name__ == '__main__':
    observe()
