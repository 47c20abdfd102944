"""
The fast Walsh-Hadamard transform (B3, B4), and why a quantizer likes it.

    H_0 = (1),    H_m = 1/sqrt(2) [[H_{m-1},  H_{m-1}],        y = H_m x,   x of size n = 2^m
                                   [H_{m-1}, -H_{m-1}]]

H is orthonormal and symmetric: its own inverse and, for autograd, its own gradient. Each y_i sums
all x_j with signs, so an outlier in one coordinate is spread over all. A quantizer that scales by
max|x| then wastes fewer of its levels. That is all the transform is for. Two ways to compute it:

- The butterfly: n log2(n) additions. It is the definition above, unrolled, and for reading.
- Kronecker: H_m = H_a (x) H_b whenever a + b = m. With x laid out as a 2^a by 2^b matrix X, H x is
  H_a X H_b. That is more work, n (2^a + 2^b) multiplications, but it passes over memory twice
  instead of log2(n) times: 3 to 6 times faster on a CPU.
"""
import functools

import torch
import torch.nn.functional as F

def fwht(x):
    """Orthonormal Walsh-Hadamard transform of the last dimension (B3, B4): (..., n) -> (..., n).

    Any floating dtype (under autocast its products are in bfloat16, as all are), any leading shape,
    differentiable. ValueError if n is not a power of two."""
    n = require_pow2(x.shape[-1] if x.dim() else 0)
    a = 1 << (n.bit_length() - 1) // 2
    b = n // a  # n = a b, as square as can be
    X = x.reshape(-1, a, b)
    H_b = signs(b, x.dtype, x.device) * n ** -0.5  # the whole scale: no sum outgrows a 16-bit float
    return (signs(a, x.dtype, x.device) @ (X @ H_b)).reshape(x.shape)  # H_a X H_b

def fwht_butterfly(x):
    """The same transform by its definition (B4): log2(n) rounds of sums and differences."""
    n = require_pow2(x.shape[-1] if x.dim() else 0)
    y, half = x * n ** -0.5, 1
    while half < n:
        pairs = y.reshape(*x.shape[:-1], n // (2 * half), 2, half)
        top, bottom = pairs.unbind(dim=-2)
        y = torch.stack((top + bottom, top - bottom), dim=-2).reshape(x.shape)
        half *= 2
    return y

def pad_to_pow2(x):
    """Pad of A3: zeros up to the next power of two, (..., k) -> (..., n)."""
    return F.pad(x, (0, next_pow2(x.shape[-1]) - x.shape[-1]))

def next_pow2(k):
    """The smallest power of two that is not below k >= 1."""
    return 1 << (k - 1).bit_length()

def require_pow2(n):
    if n < 1 or n & (n - 1):
        raise ValueError(f'the Walsh-Hadamard transform needs a power of two, got size {n}; '
                         'pad_to_pow2 makes one')
    return n

@functools.cache
def signs(n, dtype, device):
    """The +-1 matrix sqrt(n) H: (n, n)."""
    with torch.inference_mode(False):  # one cached matrix serves training and inference
        H_1 = torch.tensor([[1, 1], [1, -1]], dtype=dtype, device=device)
        return functools.reduce(torch.kron, [H_1] * (n.bit_length() - 1), H_1[:1, :1])
