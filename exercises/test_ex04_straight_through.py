import torch
from torch.testing import assert_close

from quant import weight_ternary


def test_forward_is_w_hat(student):
    w = torch.randn(48, 32, requires_grad=True)
    codes, scale = weight_ternary(w)
    assert_close(student.ternary_ste(w), codes * scale)


def test_backward_is_the_identity(student):
    """Everywhere, for weights far above alpha too, and with nothing added by alpha = mean|W|."""
    w, g = torch.randn(48, 32, requires_grad=True), torch.randn(48, 32)
    y = student.ternary_ste(w)
    assert y.requires_grad, 'no gradient comes back at all'
    grad, = torch.autograd.grad(y, w, g)
    assert_close(grad, g)
