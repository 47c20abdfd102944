import torch

from exercises.hints import Work, same
from quant import weight_ternary

SCALE = 'alpha is the mean of |W| over the whole matrix'


def test_ternary_is_a1(student):
    for power in (-3, 0, 3):
        w = torch.randn(48, 32) * 10.0 ** power
        codes, scale = student.ternary(w)
        right, alpha = weight_ternary(w)
        same(scale, alpha, SCALE, (w.abs().max(), SCALE + ', not its maximum'), rtol=1e-4, atol=0)
        assert codes.dtype == torch.int8, f'the codes are {codes.dtype}, they should be int8'
        same(codes, right, 'some codes are wrong: W / alpha is rounded to the nearest integer, '
             'then clipped', (w.sign(), 'this is the sign of W: small weights become 0'))


def test_b7_has_the_same_codes(student):
    w = torch.randn(48, 32)
    same(student.ternary_by_thresholds(w).to(torch.int8), weight_ternary(w)[0],
         'other codes than A1 has: from which W / alpha on does rounding give 1?')


def test_both_agree_on_the_threshold(student):
    w, right = torch.tensor([[0.5, -0.5, 1.5, -1.5]]), torch.tensor([[0, 0, 1, -1]])  # alpha is 1
    same(student.ternary(w)[0].int(), right.int(), 'a weight that is exactly on the threshold, '
         'alpha/2, should become 0: torch.round takes ties to the even neighbour')
    same(student.ternary_by_thresholds(w).int(), right.int(), 'ternary_by_thresholds: a weight '
         'exactly on the threshold becomes 0: is it > or >=?')


def test_zeros_stay_zeros(student):
    w = torch.zeros(4, 4)
    with Work() as work:
        codes, scale = student.ternary(w)
    assert not work.nan and not codes.any() and (codes * scale == 0).all(), (
        'a matrix of zeros has W^ = 0: 0 / 0 is NaN, so alpha needs a least value')
    assert not student.ternary_by_thresholds(w).any(), (
        'ternary_by_thresholds: a matrix of zeros has codes 0: is it > or >=?')
