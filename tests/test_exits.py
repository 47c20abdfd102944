"""Early exit: weights (A4, B6), skipping (A5, B2), gates (A6, A9), and the cross-entropy of many exits."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from exits import (Adapter, Gate, LinearCrossEntropy, curriculum_weights, exit_weights, expected_exit_layer,
                   linear_cross_entropy, ramp, sample_exits, skip_probabilities)

# --------------------------------------------------------------------------------------------------------------------
# A4, B6


@pytest.mark.parametrize('L, weighting, ratios', [(4, 'early', [4, 3, 2]), (4, 'late', [1, 2, 3]),
                                                  (12, 'early', range(12, 1, -1)), (12, 'late', range(1, 12)),
                                                  (2, 'early', [1]), (2, 'late', [1]), (5, 'uniform', [1, 1, 1, 1])])
def test_a4_b6_exit_weights(L, weighting, ratios):
    """w_l is proportional to L - l (A4) or to l + 1 (B6) at the exits 0 ... L-2, and sums to 1."""
    assert_close(exit_weights(L, weighting), torch.tensor([r / sum(ratios) for r in ratios]))


def test_a4_one_layer_has_no_early_exits():
    assert exit_weights(1, 'early').shape == (0,)


@pytest.mark.parametrize('curriculum, step, expected', [
    ('none', 77, [3 / 6, 2 / 6, 1 / 6]),
    ('rotational', 0, [1, 0, 0]), ('rotational', 1, [0, 1, 0]), ('rotational', 5, [0, 0, 1]),
    ('gradual', 0, [0, 0, 1]), ('gradual', 16, [0, 0, 1]), ('gradual', 17, [0, 2 / 3, 1 / 3]),
    ('gradual', 34, [3 / 6, 2 / 6, 1 / 6]), ('gradual', 99, [3 / 6, 2 / 6, 1 / 6])])
def test_a4_curricula_by_hand(curriculum, step, expected):
    """Of 100 steps. What is on sums to 1, so the loss keeps its weight lambda_ee."""
    weights = torch.tensor([3 / 6, 2 / 6, 1 / 6])
    assert_close(curriculum_weights(weights, curriculum, step, max_iters=100), torch.tensor(expected).float())


def test_a4_curricula_of_a_model_without_early_exits():
    for curriculum in ('none', 'rotational', 'gradual'):
        assert curriculum_weights(exit_weights(1, 'early'), curriculum, 3, 10).shape == (0,)


def test_ramps_by_hand():
    assert [ramp(kind, 25, 100) for kind in ('none', 'up', 'down')] == [1, 0.25, 0.75]


def test_adapter_is_a_low_rank_step_from_h():
    """h + B A norm(h), with the norm's numbers those of a layer norm without parameters."""
    adapter, h = Adapter(8, 2), torch.randn(3, 5, 8)
    step = adapter.b.weight @ adapter.a.weight
    norm = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    assert torch.linalg.matrix_rank(step) == 2
    assert_close(adapter(h), h + norm @ step.T)



# --------------------------------------------------------------------------------------------------------------------
# A5, B2

@pytest.mark.parametrize('schedule, expected', [
    ('quadratic', [0, 0.7 / 16, 0.7 / 4, 0.7 * 9 / 16, 0]),
    ('linear', [0, 0.7 / 4, 0.7 / 2, 0.7 * 3 / 4, 0]),
    ('exp', [0, 0.7 * (2 ** 0.25 - 1), 0.7 * (2 ** 0.5 - 1), 0.7 * (2 ** 0.75 - 1), 0]),
    ('uniform', [0.7, 0.7, 0.7, 0.7, 0])])
def test_a5_skip_probabilities_by_hand(schedule, expected):
    assert skip_probabilities(5, 0.7, schedule) == pytest.approx(expected)
    normalized = skip_probabilities(5, 0.7, schedule, normalize=True)
    assert normalized == pytest.approx([p / sum(expected) for p in expected])
    assert skip_probabilities(5, 0.7, schedule, skip_last=True) == pytest.approx([*expected[:-1], 0.7])


@pytest.mark.parametrize('schedule', ['quadratic', 'linear', 'exp', 'uniform'])
@pytest.mark.parametrize('L', [1, 2, 3, 12, 24])
@pytest.mark.parametrize('p_max', [0, 0.5, 1])
def test_a5_b2_skip_probabilities_in_general(schedule, L, p_max):
    for normalize in (False, True):
        alone = L == 2 and schedule == 'uniform' or L == 3 and schedule != 'uniform'  # one block can be skipped
        if normalize and alone and p_max:
            with pytest.raises(ValueError, match='always skipped'):
                skip_probabilities(L, p_max, schedule, normalize)
            continue
        p = skip_probabilities(L, p_max, schedule, normalize)
        assert len(p) == L and p[-1] == 0  # the last layer is never skipped
        assert all(0 <= p_l <= 1 for p_l in p)
        assert p[:-1] == sorted(p[:-1])  # deeper blocks are skipped more
        if normalize and any(p):
            assert sum(p) == pytest.approx(1)
        if not normalize:
            assert max(p) <= p_max


# --------------------------------------------------------------------------------------------------------------------
# A6, A9

def test_a6_gate_is_the_formula():
    """p = sigmoid(W2 ReLU(W1 norm(h)))"""
    gate, h = Gate(16, 4), torch.randn(2, 3, 16) * 5
    norm = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    z = (norm @ gate.w1.weight.T).clamp(min=0) @ gate.w2.weight.T
    assert_close(gate(h), (1 / (1 + (-z).exp()))[..., 0])
    assert [tuple(p.shape) for p in gate.parameters()] == [(4, 16), (1, 4)]  # W1 and W2, no biases


def test_a6_samples_are_bernoulli_and_straight_through():
    p = torch.rand(5, requires_grad=True)
    z = sample_exits(p.expand(10_000, 5))
    assert ((z == 0) | (z == 1)).all()
    assert ((z.mean(0) - p).abs() < 5 * (p * (1 - p) / 10_000).sqrt()).all()  # five standard errors
    g = torch.randn(5)
    assert torch.equal(torch.autograd.grad(sample_exits(p), p, g)[0], g)  # dz/dp = 1
    assert sample_exits(torch.tensor([0.0, 1.0])).tolist() == [0, 1]


def expected_exit_by_enumeration(p):
    """The mean over all 2^(L-1) outcomes of the gates; a token leaves at the first open one, or at layer L-1."""
    E = 0
    for z in itertools.product((0, 1), repeat=len(p)):
        probability = math.prod(p_l if z_l else 1 - p_l for p_l, z_l in zip(p, z))
        E = E + probability * (z.index(1) if 1 in z else len(p))
    return E


def expected_exit_a9(p):
    """A9 as printed, and the probability left over on the last layer."""
    stay = [math.prod(1 - p_j for p_j in p[:layer]) for layer in range(len(p) + 1)]  # prod_{j < l} (1 - p_j)
    return sum(layer * p[layer] * stay[layer] for layer in range(len(p))) + len(p) * stay[-1]


@pytest.mark.parametrize('reference', [expected_exit_by_enumeration, expected_exit_a9])
@pytest.mark.parametrize('L', [2, 3, 6])
def test_a9_expected_exit_layer(reference, L):
    p = torch.rand(L - 1, dtype=torch.float64, requires_grad=True)
    E, expected = expected_exit_layer(p), reference(p)
    assert_close(E, expected)
    assert_close(torch.autograd.grad(E, p), torch.autograd.grad(expected, p))


def test_a9_leftover_probability_belongs_to_the_last_layer():
    """Never leaving is leaving at L-1. (Dropping it, as the authors' code does, would make this 0.)"""
    assert expected_exit_layer(torch.zeros(11)) == 11
    assert expected_exit_layer(torch.ones(11)) == 0
    assert expected_exit_layer(torch.tensor([0.0, 0, 1, 0, 1])) == 2


def test_a9_lies_between_the_first_and_the_last_layer():
    E = expected_exit_layer(torch.rand(1000, 5).pow(3))
    assert E.shape == (1000,) and (E >= 0).all() and (E <= 5).all()


def test_a9_on_samples_is_unbiased():
    """E(z) for z ~ Bernoulli(p) is the layer left at; its mean and mean gradient are E(p) and its gradient."""
    p = torch.tensor([0.1, 0.5, 0.3, 0.8], requires_grad=True)
    many = p.detach().expand(20_000, 4).clone().requires_grad_()
    E = expected_exit_layer(sample_exits(many))
    assert set(E.tolist()) == {0, 1, 2, 3, 4}
    samples = torch.cat((E[:, None], *torch.autograd.grad(E.sum(), many)), dim=1)  # value and gradient of each
    exact = expected_exit_layer(p)
    exact = torch.cat((exact[None], *torch.autograd.grad(exact, p)))
    assert ((samples.mean(0) - exact).abs() <= 5 * samples.std(0) / 20_000 ** 0.5 + 1e-6).all()


# --------------------------------------------------------------------------------------------------------------------
# the cross-entropy of the head

@pytest.mark.parametrize('weighted', [False, True], ids=['mean', 'weighted'])
@pytest.mark.parametrize('rows', [1, 4, 10, 100])
def test_a4_linear_cross_entropy_is_f_cross_entropy(rows, weighted, monkeypatch):
    """Value and both gradients, for any number of rows in a chunk (of 10), the last one smaller than the others."""
    monkeypatch.setattr(LinearCrossEntropy, 'CHUNK', rows * 17 + 5)
    h, w = torch.randn(10, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    targets, weights = torch.randint(17, (10,)), torch.rand(10) if weighted else None
    loss = linear_cross_entropy(h, w, targets, weights)
    reference = F.cross_entropy(h @ w.T, targets, reduction='none')
    reference = (reference * weights).sum() if weighted else reference.mean()
    assert_close(loss, reference)
    # times 3: the gradient that comes from above is used
    for a, b in zip(torch.autograd.grad(3 * loss, (h, w)), torch.autograd.grad(3 * reference, (h, w))):
        assert_close(a, b)


@pytest.mark.parametrize('frozen', ['h', 'w'])
def test_a4_linear_cross_entropy_with_one_gradient(frozen):
    h, w = torch.randn(10, 8, requires_grad=frozen != 'h'), torch.randn(17, 8, requires_grad=frozen != 'w')
    targets, learned = torch.randint(17, (10,)), w if frozen == 'h' else h
    assert_close(torch.autograd.grad(linear_cross_entropy(h, w, targets), learned),
                 torch.autograd.grad(F.cross_entropy(h @ w.T, targets), learned))


@pytest.mark.parametrize('distill', [0.25, 1.0])
def test_linear_cross_entropy_towards_a_teacher(distill, monkeypatch):
    """The target is a mixture of the next token and what the head makes of the teacher, which learns nothing."""
    monkeypatch.setattr(LinearCrossEntropy, 'CHUNK', 17 * 4)
    h, w, teacher = torch.randn(10, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True), torch.randn(10, 8)
    targets, weights = torch.randint(17, (10,)), torch.rand(10)
    mixture = (1 - distill) * F.one_hot(targets, 17) + distill * (teacher @ w.T).softmax(-1).detach()
    reference = (F.cross_entropy(h @ w.T, mixture, reduction='none') * weights).sum()
    loss = linear_cross_entropy(h, w, targets, weights, teacher.requires_grad_(), distill)
    assert_close(loss, reference)
    for a, b in zip(torch.autograd.grad(loss, (h, w), retain_graph=True), torch.autograd.grad(reference, (h, w))):
        assert_close(a, b)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


def test_a4_linear_cross_entropy_survives_large_logits():
    h, w = torch.eye(3) * 1000, torch.eye(3)
    assert linear_cross_entropy(h, w, torch.arange(3)) == 0
    assert linear_cross_entropy(h, w, torch.tensor([1, 2, 0])) == 1000


def test_a4_linear_cross_entropy_under_autocast(monkeypatch):
    monkeypatch.setattr(LinearCrossEntropy, 'CHUNK', 17 * 12)
    h, w = torch.randn(64, 32, requires_grad=True), torch.randn(17, 32, requires_grad=True)
    targets = torch.randint(17, (64,))
    exact = F.cross_entropy(h @ w.T, targets)
    with torch.autocast('cpu', torch.bfloat16):
        loss = linear_cross_entropy(h, w, targets)
    assert loss.dtype == torch.float32
    assert_close(loss, exact, rtol=0.01, atol=0)
    for a, b in zip(torch.autograd.grad(loss, (h, w)), torch.autograd.grad(exact, (h, w))):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.02 * b.norm()


def test_a4_linear_cross_entropy_without_gradients_costs_one_product(monkeypatch):
    """Evaluation must not pay for the two products of a gradient that nobody asked for."""
    monkeypatch.setattr('exits.float_product', torch.mm)  # the counter does not know oneDNN's
    h, w, targets = torch.randn(10, 8), torch.nn.Parameter(torch.randn(17, 8)), torch.randint(17, (10,))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(h, w, targets)
    assert counter.get_total_flops() == 2 * 10 * 8 * 17
