import itertools
import math

import torch

from exercises.hints import same
from exits import expected_exit_layer


def test_is_the_mean_over_all_outcomes(student):
    """Of every combination of open and closed gates; a token leaves at the first open one."""
    p = [0.1, 0.5, 0.3, 0.8]
    E = 0
    for z in itertools.product((0, 1), repeat=len(p)):
        chance = math.prod(p_l if z_l else 1 - p_l for p_l, z_l in zip(p, z))
        E += chance * (z.index(1) if 1 in z else len(p))
    stay = math.prod(1 - p_l for p_l in p)
    reach = torch.cumprod(1 - torch.tensor(p), 0)
    late = sum(l * p_l * r for l, (p_l, r) in enumerate(zip(p, reach))) + len(p) * stay
    same(student.expected_exit_layer(torch.tensor(p, dtype=torch.float64)), E,
         'this is not the mean over all outcomes: how likely is it to get to layer l at all?',
         (E - len(p) * stay, 'who never left has been forgotten: they leave at layer L-1'),
         (late, 'the product goes over the layers *before* l: one factor too many'),
         (E + 1, 'layers count from 0'), (E + stay, 'the last layer is L-1, not L'))


def test_takes_any_shape(student):
    for shape in ((1,), (11,), (2, 3, 5)):
        p = torch.rand(shape)
        same(student.expected_exit_layer(p), expected_exit_layer(p),
             f'wrong for p of shape {shape}: layers are the last dimension')


def test_who_never_leaves_leaves_last(student):
    same(student.expected_exit_layer(torch.zeros(11)), 11.0,
         'with all gates shut every token runs to the last layer, 11: its probability is left over')


def test_gradient(student):
    p = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    E = student.expected_exit_layer(p)
    assert E.requires_grad, 'no gradient: the gates could not learn'
    got, right = (torch.autograd.grad(e.sum(), p)[0] for e in (E, expected_exit_layer(p)))
    same(got, right, 'the gradient is wrong: is something detached on its way?')
