import torch
from torch import nn

from exercises.hints import same
from quant import BitLinear, quantization_loss, weight_ternary


def layers():
    return nn.Sequential(BitLinear(8, 4), BitLinear(64, 32))  # of which each counts the same


def test_is_the_mean_over_matrices(student):
    model = layers()
    matrices = [layer.weight for layer in model]
    right = quantization_loss(model)
    errors = [(W - codes * alpha).square().flatten() for W, (codes, alpha) in
              ((W, weight_ternary(W)) for W in matrices)]
    same(student.quantization_loss(matrices), right,
         'not the mean over matrices of the mean of (W - W^)^2, with W^ = alpha * codes',
         (2 * right, 'this is the sum over matrices, not their mean'),
         (torch.cat(errors).mean(), 'each matrix counts the same, whatever its size'),
         (torch.cat(errors).sum() / 2, 'inside a matrix it is a mean, not a sum'), atol=1e-9)


def test_pulls_each_weight_to_its_ternary_value(student):
    """With W^ a constant the gradient is 2 (W - W^) / size / number of matrices."""
    model = layers()
    quantization_loss(model).backward()
    right = [layer.weight.grad.clone() for layer in model]
    matrices = [layer.weight.detach().clone().requires_grad_() for layer in model]
    grads = torch.autograd.grad(student.quantization_loss(matrices), matrices, allow_unused=True)
    for got, expected in zip(grads, right):
        assert got is not None and got.any(), (
            'no gradient: going straight through W^, it cancels the one of W')
        same(got, expected, 'a wrong gradient: W^ is a constant', atol=1e-9)


def test_ratio_of_norms_over_all_matrices(student):
    """By hand: the gradients are (3, 4) and (0, 12) for a, ones for b."""
    matrices = [torch.zeros(1, 2, requires_grad=True) for _ in range(2)]
    a = (matrices[0] * torch.tensor([3.0, 4])).sum() + (matrices[1] * torch.tensor([0, 12.0])).sum()
    b = sum(W.sum() for W in matrices)
    ratio = student.gradient_ratio(a, b, matrices)
    assert isinstance(ratio, float), f'the ratio is a {type(ratio).__name__}, it should be a float'
    same(ratio, 13 / 2, 'gradients (3, 4), (0, 12) and (1, 1), (1, 1) have a ratio of 13 / 2: the '
         'norm is taken over all matrices at once', (2 / 13, 'upside down: da over db'),
         (19 / 4, 'a norm, not a mean of absolute values'))
    assert all(W.grad is None for W in matrices), 'a .grad was touched: see torch.autograd.grad'


def test_losses_may_share_a_graph(student):
    W = torch.ones(2, 2, requires_grad=True)
    h = W.square().sum()
    try:
        ratio = student.gradient_ratio(3 * h, h, [W])
    except NotImplementedError:  # (a RuntimeError, too)
        raise
    except RuntimeError:
        raise AssertionError('what both losses share is gone after the first: the graph has to be '
                             'kept, retain_graph') from None
    same(ratio, 3.0, 'the gradient of 3 h is three times that of h')
