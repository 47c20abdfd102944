import torch
from torch import nn
from torch.testing import assert_close

from quant import BitLinear, quantization_loss


def layers():
    return nn.Sequential(BitLinear(8, 4), BitLinear(64, 32))  # of which each counts the same


def test_is_the_mean_over_matrices(student):
    model = layers()
    assert_close(student.quantization_loss([layer.weight for layer in model]), quantization_loss(model))


def test_pulls_each_weight_to_its_ternary_value(student):
    """With W^ a constant the gradient is 2 (W - W^) / size / number of matrices; without, there is none."""
    model = layers()
    quantization_loss(model).backward()
    expected = [layer.weight.grad.clone() for layer in model]
    matrices = [layer.weight.detach().clone().requires_grad_() for layer in model]
    for W, grad in zip(torch.autograd.grad(student.quantization_loss(matrices), matrices), expected):
        assert_close(W, grad)


def test_ratio_of_norms_over_all_matrices(student):
    """By hand: the gradients are (3, 4) and (0, 12) for a, ones for b."""
    matrices = [torch.zeros(1, 2, requires_grad=True) for _ in range(2)]
    a = (matrices[0] * torch.tensor([3.0, 4.0])).sum() + (matrices[1] * torch.tensor([0.0, 12.0])).sum()
    b = sum(W.sum() for W in matrices)
    ratio = student.gradient_ratio(a, b, matrices)
    assert isinstance(ratio, float)
    assert abs(ratio - 13 / 2) < 1e-6
    assert all(W.grad is None for W in matrices)


def test_losses_may_share_a_graph(student):
    W = torch.ones(2, 2, requires_grad=True)
    h = W.square().sum()
    try:
        ratio = student.gradient_ratio(3 * h, h, [W])
    except NotImplementedError:  # (a RuntimeError, too)
        raise
    except RuntimeError as error:
        raise AssertionError(f'what both losses share is gone after the first: {error}') from None
    assert abs(ratio - 3) < 1e-6
