import torch
import torch.nn.functional as F

from exercises.hints import same
from quant import activation_quant, activation_quant_ste, dequantize, weight_ternary


def test_is_fake_quantization(student):
    for bits in (8, 4):
        for shape in ((64,), (3, 64), (2, 3, 64)):
            x, w = torch.randn(shape) * 7, torch.randn(10, 64) * 0.02
            fake = F.linear(activation_quant_ste(x, bits), dequantize(*weight_ternary(w)))
            y = student.integer_linear(x, w, bits)
            assert y.dtype == torch.float32, f'the result is {y.dtype}, it should be float32'
            (codes, step), (signs, alpha) = activation_quant(x, bits), weight_ternary(w)
            scales, wrapped = (step, alpha), (codes.long() @ signs.long().T).to(torch.int8)
            same(y, fake, f'not Q_{bits}(x) W^T for x of shape {shape}: does every number of bits '
                 'arrive, and is each token scaled by its own step?',
                 (wrapped * step * alpha, 'int8 codes have int8 sums, where 127 + 1 is -128'),
                 (fake / scales[0], 'the step of each token is missing'),
                 (fake / scales[1], 'alpha is missing'),
                 (fake / scales[1] ** 2, 'divided by alpha: codes times alpha is W^'))


def test_each_token_has_its_own_scale(student):
    x, w = torch.randn(2, 64), torch.randn(10, 64)
    alone = student.integer_linear(x[:1], w)
    x[1] *= 1000
    same(student.integer_linear(x, w)[:1], alone, 'a loud token changes what its neighbour gets')


def test_sums_do_not_overflow(student):
    """Integers up to 127 and weights +-1 have scales of 1: the answer is the sum itself."""
    x = torch.randint(100, 128, (2, 4096)).float()
    x[:, 0] = 127
    w = torch.ones(3, 4096)
    w[1] = -1
    w[2, ::2] = -1
    right = (x.double() @ w.double().T).float()
    assert torch.equal(student.integer_linear(x, w), right), (
        f'sums go up to {right.max():,.0f} here: which type holds them exactly?')


def test_sums_are_exact(student):
    """4,096 inputs and awkward scales. Floats would be off where a sum nearly cancels."""
    x, w = torch.randn(16, 4096), torch.randn(64, 4096) * 0.0217
    x *= torch.logspace(-3, 3, 16)[:, None]
    (x_codes, x_scale), (w_codes, w_scale) = activation_quant(x), weight_ternary(w)
    right = (x_codes.long() @ w_codes.long().T).double() * x_scale.double() * w_scale.double()
    least = right.abs().maximum(x_scale.double() * w_scale)  # a sum is an integer: 0, or 1 and more
    off = ((student.integer_linear(x, w) - right).abs() / least).max()
    assert off < 4e-7, (f'off by a share of {off:.0e} where a sum nearly cancels: only the last '
                        'step may round. Are codes multiplied as integers, and scaled afterwards?')
