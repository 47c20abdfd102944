import torch
from torch.testing import assert_close

from quant import weight_ternary


def test_ternary_is_a1(student):
    for power in (-3, 0, 3):
        w = torch.randn(48, 32) * 10.0 ** power
        codes, scale = student.ternary(w)
        expected_codes, expected_scale = weight_ternary(w)
        assert torch.equal(codes, expected_codes)
        assert codes.dtype == torch.int8
        assert_close(torch.as_tensor(scale), expected_scale)


def test_b7_has_the_same_codes(student):
    w = torch.randn(48, 32)
    assert torch.equal(student.ternary_by_thresholds(w).to(torch.int8), weight_ternary(w)[0])


def test_both_agree_on_the_threshold(student):
    w = torch.tensor([[0.5, -0.5, 1.5, -1.5]])  # alpha is 1
    assert student.ternary(w)[0].tolist() == [[0, 0, 1, -1]]
    assert student.ternary_by_thresholds(w).tolist() == [[0, 0, 1, -1]]


def test_zeros_stay_zeros(student):
    w = torch.zeros(4, 4)
    codes, scale = student.ternary(w)
    assert not codes.any() and (codes * scale == 0).all()
    assert not student.ternary_by_thresholds(w).any()
