import pytest
import torch

from hadamard import fwht
from quant import activation_quant_ste


def heavy_tailed():
    x = torch.randn(64, 256)
    x[:, :3] *= 40
    return x


def test_none_is_the_quantizers_error(student):
    x = torch.randn(4, 256)
    expected = (activation_quant_ste(x, 4) - x).norm() / x.norm()
    assert float(student.quantization_error(x, 4, 'none')) == pytest.approx(expected.item(), rel=1e-4)


def test_before_is_measured_where_x_lives(student):
    for bits in (8, 4):
        x = heavy_tailed()
        expected = (fwht(activation_quant_ste(fwht(x), bits)) - x).norm() / x.norm()
        assert float(student.quantization_error(x, bits, 'before')) == pytest.approx(expected.item(), rel=1e-3)


def test_before_helps_at_any_scale(student):
    for scale in (1e-3, 1.0, 1e3):
        x = heavy_tailed() * scale
        none, before = (float(student.quantization_error(x, 4, order)) for order in ('none', 'before'))
        assert 0 < before < 0.7 * none < 1


def test_after_changes_nothing(student):
    """H is orthonormal: it turns the error, and leaves its length. What the quantizer lost is lost."""
    x = heavy_tailed()
    none, after = (float(student.quantization_error(x, 4, order)) for order in ('none', 'after'))
    assert after == pytest.approx(none, rel=1e-3)
