import torch
from torch.utils.flop_counter import FlopCounterMode

from exercises.hints import same
from hadamard import fwht_butterfly


def test_is_the_butterfly(student):
    for n in (1, 2, 4, 8, 16, 128, 512):
        x = torch.randn(3, n, dtype=torch.float64)
        y = fwht_butterfly(x)
        same(student.fwht_kronecker(x), y, f'n = {n}: these numbers are not H x. X is x row by row '
             'and meets a matrix on each side',
             (y * n ** 0.5, 'not orthonormal: `signs` has entries +-1'))


def test_acts_on_the_last_dimension_only(student):
    x = torch.randn(2, 3, 4, 32)
    same(student.fwht_kronecker(x), fwht_butterfly(x), 'wrong for x of four dimensions')


def test_needs_no_more_multiplications_than_two_small_products(student):
    for n, sizes in ((64, 8 + 8), (512, 16 + 32)):
        with FlopCounterMode(display=False) as counter:
            student.fwht_kronecker(torch.randn(5, n))
        done = counter.get_total_flops() // 10  # a multiplication and an addition each, 5 rows
        assert 0 < done <= n * sizes, (f'{done:,} multiplications for n = {n}: two products with '
                                       f'small matrices take {n * sizes:,}')
