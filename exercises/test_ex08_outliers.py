import torch

from exercises.hints import same
from hadamard import fwht
from quant import activation_quant_ste


def heavy_tailed():
    x = torch.randn(64, 256)
    x[:, :3] *= 40
    return x


def error(student, x, bits, order):
    return torch.tensor(float(student.quantization_error(x, bits, order)))


def test_none_is_the_quantizers_error(student):
    x = torch.randn(4, 256)
    miss = activation_quant_ste(x, 4) - x
    same(error(student, x, 4, 'none'), miss.norm() / x.norm(), 'without a transform this is |x^ - '
         'x| / |x|, and x^ = codes * step', (miss.norm(), 'divide by |x|'), rtol=1e-3)


def test_before_is_measured_where_x_lives(student):
    for bits in (8, 4):
        x = heavy_tailed()
        right = (fwht(activation_quant_ste(fwht(x), bits)) - x).norm() / x.norm()
        plain = (activation_quant_ste(x, bits) - x).norm() / x.norm()
        same(error(student, x, bits, 'before'), right, "'before': x^ is compared with x, so it has "
             'to be turned back, by the same H', (plain, "'before' does as well as no transform: "
             'is the transform in front of the quantizer?'), rtol=1e-3)


def test_before_helps_at_any_scale(student):
    x = heavy_tailed()
    for scale in (1e-3, 1.0, 1e3):
        none, before = (error(student, x * scale, 4, order) for order in ('none', 'before'))
        assert 0 < before < 0.7 * none < 1, 'the transform should help against outliers'
        same(before, error(student, x, 4, 'before'), f'a share does not depend on the scale of x, '
             f'{scale}', rtol=1e-2)


def test_after_changes_nothing(student):
    """H is orthonormal: it turns the error, and leaves its length. What is lost is lost."""
    x = heavy_tailed()
    same(error(student, x, 4, 'after'), error(student, x, 4, 'none'), "'after' the quantizer has "
         'done its damage: H turns the error, and turns it back', rtol=1e-3)
