"""Early exit: weights and loss (A4, B6), skipping (A5, B2), gates (A6, A9), and the loss's twin."""
import itertools
import math

import pytest
import torch
from formulas import norm
from torch.testing import assert_close

from exits import (Gate, LinearCrossEntropy, exit_loss, exit_weights,
                   expected_exit_layer, sample_exits, skip_probabilities)

# ---- A4, B6

@pytest.mark.parametrize('L, weighting, ratios', [
    (4, 'early', [4, 3, 2]), (4, 'late', [1, 2, 3]), (12, 'early', range(12, 1, -1)),
    (2, 'early', [1]), (5, 'uniform', [1, 1, 1, 1]), (1, 'late', [])])
def test_a4_b6_exit_weights(L, weighting, ratios):
    """w_l is proportional to L - l (A4) or to l + 1 (B6) at the exits 0 ... L-2, and sums to 1."""
    expected = torch.tensor([r / sum(ratios) for r in ratios])
    assert_close(exit_weights(L, weighting), expected)

def loss_and_gradients(loss, inputs):
    return [loss, *torch.autograd.grad(3 * loss, inputs)]  # 3: the gradient from above is used

@pytest.mark.parametrize('frozen', ['', 'h', 'w'])
@pytest.mark.parametrize('padding', [1, 4])
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('chunk', [1, 4, 100])
def test_a4_exit_loss_is_the_sum_over_exits(chunk, autocast, padding, frozen, monkeypatch):
    """By hand, and in chunks, of which the last is smaller. With the gradients that are asked for.
    Exits may have different tokens, and one may have none. On a GPU the vocabulary is padded."""
    monkeypatch.setattr(LinearCrossEntropy, 'CPU', (4096, chunk * 17 + 5, padding))
    rows = [torch.randn(n, 8, requires_grad=frozen != 'h') for n in (5, 4, 0)]
    targets, weights = [torch.randint(17, (len(h),)) for h in rows], [0.5, 0.3, 0.2]
    head = torch.randn(17, 8, requires_grad=frozen != 'w')
    learned = [x for x in (*rows[:2], head) if x.requires_grad]
    by_hand = sum(w * -((h @ head.T).log_softmax(-1)[range(len(h)), target]).mean()
                  for h, target, w in zip(rows[:2], targets, weights))
    reference = loss_and_gradients(by_hand, learned)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        loss = exit_loss(rows, targets, weights, head)
    for a, b in zip(loss_and_gradients(loss, learned), reference):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= (0.03 if autocast else 1e-5) * b.norm()

def test_a4_cross_entropy_survives_large_logits():
    h, w = torch.eye(3) * 1000, torch.eye(3)
    assert exit_loss([h], [torch.arange(3)], [1.0], w) == 0
    assert exit_loss([h], [torch.tensor([1, 2, 0])], [1.0], w) == 1000

# ---- A5, B2

def test_a5_skip_probabilities_by_hand():
    """p_max (l / (L-1))^2, never the last layer, and no block always."""
    expected = [0, 0.7 / 16, 0.7 / 4, 0.7 * 9 / 16, 0]
    assert skip_probabilities(5, 0.7) == pytest.approx(expected)
    normalized = [p / sum(expected) for p in expected]
    assert skip_probabilities(5, 0.7, normalize=True) == pytest.approx(normalized)
    for L in (1, 2):  # nothing is left to skip
        assert skip_probabilities(L, 1.0) == skip_probabilities(L, 1.0, True) == [0] * L
    assert skip_probabilities(12, 0.0, True) == [0] * 12  # sum 1 of nothing: 0 / 0
    # of three blocks only the middle one can be skipped: scaled to sum 1, it would never run
    with pytest.raises(ValueError, match='a block of these 3 would always be skipped'):
        skip_probabilities(3, 0.5, normalize=True)

# ---- A6, A9

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a6_gate_is_the_formula(dtype):
    """p = sigmoid(W2 ReLU(W1 norm(h))), in float32: p near 1 is a threshold's whole business."""
    gate, h = Gate(16, 4).to(dtype), (torch.randn(2, 3, 16) * 5).to(dtype)
    W1, W2 = (p.float() for p in gate.parameters())
    z = (norm(h.float(), 'layernorm') @ W1.T).clamp(min=0) @ W2.T
    assert gate(h).dtype == torch.float32
    assert_close(gate(h), (1 / (1 + (-z).exp()))[..., 0], rtol=0,
                 atol=1e-6 if dtype == torch.float32 else 0.02)
    assert [tuple(p.shape) for p in gate.parameters()] == [(4, 16), (1, 4)]  # no biases

def test_a6_samples_are_bernoulli_and_straight_through():
    p = torch.rand(5, requires_grad=True)
    z = sample_exits(p.expand(10_000, 5))
    assert ((z == 0) | (z == 1)).all()
    assert ((z.mean(0) - p).abs() < 5 * (p * (1 - p) / 10_000).sqrt()).all()  # standard errors
    g = torch.randn(5)
    assert torch.equal(torch.autograd.grad(sample_exits(p), p, g)[0], g)  # dz/dp = 1
    assert sample_exits(torch.tensor([0.0, 1.0])).tolist() == [0, 1]

@pytest.mark.parametrize('L', [2, 3, 6])
def test_a9_expected_exit_layer_is_the_mean_over_all_outcomes(L):
    """2^(L-1) outcomes of the gates: a token leaves at the first open one, or else at layer L-1.
    (The authors' code drops those that never leave.) With gradients."""
    p, expected = torch.rand(L - 1, dtype=torch.float64, requires_grad=True), 0
    for z in itertools.product((0, 1), repeat=L - 1):
        probability = math.prod(p_l if z_l else 1 - p_l for p_l, z_l in zip(p, z))
        left_at = z.index(1) if 1 in z else L - 1
        expected = expected + probability * left_at
        assert expected_exit_layer(torch.tensor(z)) == left_at
    E = expected_exit_layer(p)
    assert_close(E, expected)
    assert_close(torch.autograd.grad(E, p), torch.autograd.grad(expected, p))
