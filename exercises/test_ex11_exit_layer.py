import itertools
import math

import torch
from torch.testing import assert_close

from exits import expected_exit_layer


def test_is_the_mean_over_all_outcomes(student):
    """Of every combination of open and closed gates; a token leaves at the first open one, or at the last layer."""
    p = [0.1, 0.5, 0.3, 0.8]
    E = 0
    for z in itertools.product((0, 1), repeat=len(p)):
        E += math.prod(p_l if z_l else 1 - p_l for p_l, z_l in zip(p, z)) * (z.index(1) if 1 in z else len(p))
    assert_close(student.expected_exit_layer(torch.tensor(p, dtype=torch.float64)), torch.tensor(E).double())


def test_takes_any_shape(student):
    for shape in ((1,), (11,), (2, 3, 5)):
        p = torch.rand(shape)
        assert_close(student.expected_exit_layer(p), expected_exit_layer(p))


def test_who_never_leaves_leaves_last(student):
    assert_close(student.expected_exit_layer(torch.zeros(11)), torch.tensor(11.0))


def test_gradient(student):
    p = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    E = student.expected_exit_layer(p)
    assert E.requires_grad, 'no gradient: the gates could not learn'
    assert_close(torch.autograd.grad(E.sum(), p), torch.autograd.grad(expected_exit_layer(p).sum(), p))
