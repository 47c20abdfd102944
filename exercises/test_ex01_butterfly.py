import torch
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from hadamard import fwht


def test_is_the_product_with_h(student):
    for n in (1, 2, 4, 8, 64, 512):
        x = torch.randn(5, n, dtype=torch.float64)
        assert_close(student.fwht(x), fwht(x))


def test_acts_on_the_last_dimension_only(student):
    for shape in ((8,), (2, 8), (2, 3, 4, 8)):
        x = torch.randn(shape)
        assert_close(student.fwht(x), fwht(x))


def test_leaves_x_as_it_was(student):
    x = torch.randn(3, 8)
    before = x.clone()
    student.fwht(x)
    assert torch.equal(x, before)


def test_uses_no_matrix_product(student):
    with FlopCounterMode(display=False) as counter:
        student.fwht(torch.randn(3, 64))
    assert counter.get_total_flops() == 0
