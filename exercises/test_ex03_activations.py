import torch
from torch.testing import assert_close

from quant import activation_quant


def test_is_a2(student):
    for bits in (8, 4, 2):
        x = torch.randn(2, 5, 64) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 1.0])[:, None]
        codes, step = student.activation_quant(x, bits)
        expected_codes, expected_step = activation_quant(x, bits)
        assert_close(step, expected_step)
        assert ((codes.int() - expected_codes.int()).abs() <= 1).all()  # x q / s and x / (s / q) may round differently
        assert (codes == expected_codes).float().mean() > 0.99
        assert codes.dtype == torch.int8


def test_the_largest_takes_the_last_level(student):
    for bits in (8, 4):
        x = torch.tensor([[3.0, -1.0], [0.5, -9.0]])
        codes, _ = student.activation_quant(x, bits)
        q = 2 ** (bits - 1) - 1
        assert (codes[0, 0], codes[1, 1]) == (q, -q)


def test_a_loud_token_does_not_disturb_the_others(student):
    x = torch.randn(2, 64)
    alone = student.activation_quant(x[:1], 8)[0]
    x[1] *= 1000
    assert torch.equal(student.activation_quant(x, 8)[0][:1], alone)
