"""6. The product in exact integers."""
import torch
import torch.nn.functional as F

from quant import activation_quant, weight_ternary


def integer_linear(x, w, bits=8):
    """Q_b(x) W^T (A1, A2): x (..., in), w (out, in) -> (..., out) float32.

    Multiply the codes as integers, with sums that cannot overflow, and scale once at the end. `activation_quant` and
    `weight_ternary` are yours to use."""
    raise NotImplementedError


def observe():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 2048, generator=generator), torch.randn(512, 2048, generator=generator)
    y = integer_linear(x, w)
    (x_codes, x_scale), (w_codes, w_scale) = activation_quant(x), weight_ternary(w)
    print(f'largest |sum of codes|: {(y / (x_scale * w_scale)).abs().max():,.0f}; int8 ends at 127, int16 at 32,767')
    for dtype in (torch.float32, torch.bfloat16):
        fake = F.linear((x_codes * x_scale).to(dtype), (w_codes * w_scale).to(dtype)).float()
        print(f'fake quantization in {str(dtype)[6:]}: off by {(fake - y).norm() / y.norm():.3f}')


if __name__ == '__main__':
    observe()
