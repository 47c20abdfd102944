"""The papers' equations of a projection, as they are printed: what the tests compare with."""
import torch

def ternary_a1(w):
    alpha = w.abs().mean()
    return alpha * (w / alpha).round().clip(-1, 1)

def ternary_b7(w, alpha):
    return torch.where(w > 0.5 * alpha, alpha, torch.where(w < -0.5 * alpha, -alpha, 0.0))

def activation_a2(x, bits=8):
    s, q = x.abs().amax(dim=-1, keepdim=True), 2 ** (bits - 1) - 1
    return ((x * q / s).round().clip(-q - 1, q) * s / q).nan_to_num(0.0)  # 0 / 0 is 0 here

def hadamard_b3(x):
    """Zeros up to n features (Pad); H_ij = (-1)^(ones that i and j have in common) / sqrt(n)."""
    k, n = x.shape[-1], 1
    while n < k:
        n *= 2
    H = [[(-1.0) ** (i & j).bit_count() / n ** 0.5 for j in range(n)] for i in range(k)]
    return x @ torch.tensor(H)

def norm(x, kind, weight=1.0):
    if kind == 'none':
        return x
    x = x - x.mean(-1, keepdim=True) if kind == 'layernorm' else x
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

def through(x, x_hat):
    """Straight-through: forward x_hat, gradient of x."""
    return x + (x_hat - x).detach()

def projection_a3(x, W, hadamard=False, bits=8, linear_norm='none'):
    """y = W^ Q_b(FWHT(Pad(norm(x)))), or without FWHT and Pad."""
    z = norm(x, linear_norm)
    z = hadamard_b3(z) if hadamard else z
    return through(z, activation_a2(z, bits)) @ through(W, ternary_a1(W)).T
