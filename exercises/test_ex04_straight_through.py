import torch

from exercises.hints import same
from quant import weight_ternary


def test_forward_is_w_hat(student):
    w = torch.randn(48, 32, requires_grad=True)
    codes, scale = weight_ternary(w)
    same(student.ternary_ste(w), codes * scale, 'going forward this is not W^: what is added to it '
         'for the gradient must be 0', (w, 'going forward this is W itself'))


def test_backward_is_the_identity(student):
    """Everywhere, for weights far above alpha too, and with nothing added by alpha = mean|W|."""
    w, g = torch.randn(48, 32, requires_grad=True), torch.randn(48, 32)
    y, scale = student.ternary_ste(w), weight_ternary(w)[1]
    assert y.requires_grad, 'no gradient comes back at all: does W itself occur in your sum?'
    grad, = torch.autograd.grad(y, w, g)
    alpha = w.abs().mean()
    plain, = torch.autograd.grad(alpha * (w / alpha).round().clamp(-1, 1), w, g)
    same(grad, g, 'the gradient is not handed on as it is',
         (plain, 'this gradient is that of a rounding: only alpha gets any'),
         (2 * g, 'the gradient comes twice: a detach is missing'),
         (g * scale, 'the gradient is multiplied by alpha: dL/dW := dL/dW^, all of it'),
         (g * (w.abs() <= scale), 'the gradient is cut off where |W| > alpha'))
