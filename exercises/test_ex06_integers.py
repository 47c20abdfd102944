import torch
import torch.nn.functional as F
from torch.testing import assert_close

from quant import activation_quant_ste, weight_ternary_ste


def test_is_fake_quantization(student):
    for bits in (8, 4):
        for shape in ((64,), (3, 64), (2, 3, 64)):
            x = torch.randn(shape) * 7
            w = torch.randn(10, 64) * 0.02
            fake = F.linear(activation_quant_ste(x, bits).double(), weight_ternary_ste(w).double())
            y = student.integer_linear(x, w, bits)
            assert y.dtype == torch.float32 and y.shape == fake.shape
            assert_close(y.double(), fake, rtol=1e-5, atol=1e-6)


def test_each_token_has_its_own_scale(student):
    x, w = torch.randn(2, 64), torch.randn(10, 64)
    alone = student.integer_linear(x[:1], w)
    x[1] *= 1000
    assert_close(student.integer_linear(x, w)[:1], alone)


def test_sums_are_exact(student):
    """Integers up to 127 and weights +-1 have scales of 1: the answer is the sum itself, up to 127 * 4095."""
    x = torch.randint(100, 128, (2, 4096)).float()
    x[:, 0] = 127
    w = torch.ones(3, 4096)
    w[1] = -1
    w[2, ::2] = -1
    assert torch.equal(student.integer_linear(x, w), (x.double() @ w.double().T).float())
