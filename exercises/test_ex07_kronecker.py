import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hadamard import fwht_butterfly


def test_is_the_butterfly(student):
    for n in (1, 2, 4, 8, 16, 128, 512):
        x = torch.randn(3, n, dtype=torch.float64)
        assert_close(student.fwht_kronecker(x), fwht_butterfly(x))


def test_acts_on_the_last_dimension_only(student):
    x = torch.randn(2, 3, 4, 32)
    assert_close(student.fwht_kronecker(x), fwht_butterfly(x))


def test_needs_no_more_multiplications_than_two_small_products(student):
    for n, sizes in ((64, 8 + 8), (512, 16 + 32)):
        with FlopCounterMode(display=False) as counter:
            student.fwht_kronecker(torch.randn(5, n))
        assert 0 < counter.get_total_flops() <= 2 * 5 * n * sizes  # a multiplication and an addition each
