import torch
from torch.utils.flop_counter import FlopCounterMode

from exercises.hints import Work, close, same
from hadamard import fwht


def test_is_the_product_with_h(student):
    for n in (1, 2, 4, 8, 64, 512):
        x = torch.randn(5, n, dtype=torch.float64)
        y = student.fwht(x)
        moved = close(y.sort(dim=-1)[0], fwht(x).sort(dim=-1)[0])
        same(y, fwht(x), 'the right numbers in another order: in which order do the sums and the '
             'differences of a round stand?' if moved else
             'these numbers are not H x: try n = 2, and then n = 4, by hand',
             (fwht(x) * n ** 0.5, 'not orthonormal: each round has its 1/sqrt(2)'),
             (fwht(x) / n ** 0.5, 'too small: m rounds have 1/sqrt(2)^m, which is not 1/n'))


def test_acts_on_the_last_dimension_only(student):
    for shape in ((8,), (2, 8), (2, 3, 4, 8)):
        x = torch.randn(shape)
        rows = student.fwht(x.reshape(-1, 8)).reshape(shape)
        same(student.fwht(x), rows, f'wrong for a shape {shape}, whose last dimension is x')


def test_leaves_x_as_it_was(student):
    x = torch.randn(3, 8)
    before = x.clone()
    student.fwht(x)
    assert torch.equal(x, before), 'x has changed: it belongs to the caller'


def test_adds_n_log_n_times(student):
    n = 2048
    with FlopCounterMode(display=False) as counter, Work() as work:
        student.fwht(torch.randn(1, n))
    assert counter.get_total_flops() == 0, 'that is a product with a matrix (exercise 7)'
    assert work.total <= 440 * n, (
        f'some {work.total:,} numbers were made for n = {n:,}: n log2(n) is {11 * n:,}, and n^2, a '
        f'matrix, is {n * n:,}')
