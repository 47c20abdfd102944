"""5. Five trits in a byte."""
import math
import sys

import torch

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from quant import weight_ternary


def pack(codes):
    """codes (out, k) int8 in {-1, 0, 1} -> (out, ceil(k / 5)) uint8, each row by itself:

        byte = (c0 + 1) + 3 (c1 + 1) + 9 (c2 + 1) + 27 (c3 + 1) + 81 (c4 + 1)

    The last byte of a row is filled up with codes 0."""
    raise NotImplementedError


def unpack(packed, k):
    """What was packed: (out, ceil(k / 5)) uint8 -> codes (out, k) int8."""
    raise NotImplementedError


def observe():
    w = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    codes, _ = weight_ternary(w)
    shares = [(codes == c).double().mean().item() for c in (-1, 0, 1)]
    entropy = -sum(share * math.log2(share) for share in shares)
    print(f'{8 * pack(codes).numel() / codes.numel():.4f} bits a weight; '
          f'log2(3) = {math.log2(3):.4f}; entropy of these codes {entropy:.4f}')
    n = 34_603_008
    print(f"Paper A's {n:,} weights: {n * 4 / 1e6:.1f} MB in float32, {n / 5 / 1e6:.1f} MB packed")


if __name__ == '__main__':
    observe()
