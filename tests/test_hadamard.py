"""The Walsh-Hadamard transform (B3, B4) and the padding before it (A3)."""
import pytest
import torch
from torch.testing import assert_close

from hadamard import fwht, fwht_butterfly, next_pow2, pad_to_pow2
from quant import activation_quant_ste

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}  # on values of size 1
both = pytest.mark.parametrize('transform', [fwht, fwht_butterfly])

def H(m):
    """B4 as it is printed."""
    if m == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    h = H(m - 1)
    return torch.cat((torch.cat((h, h), dim=1), torch.cat((h, -h), dim=1))) / 2 ** 0.5

@both
@pytest.mark.parametrize('dtype', TOLERANCE, ids=str)
@pytest.mark.parametrize('m', [0, 1, 2, 5, 10])
def test_b3_b4_transform_is_the_product_with_h(transform, dtype, m):
    """The Kronecker form splits m into two halves, of which one may be empty, or the larger one."""
    x = torch.randn(5, 2 ** m, dtype=dtype)
    y = transform(x)
    assert y.dtype == dtype
    assert_close(y.double(), x.double() @ H(m).T, rtol=0, atol=TOLERANCE[dtype])

@both
def test_b3_acts_on_the_last_dimension_of_any_shape(transform):
    for shape in ((8,), (0, 8), (2, 3, 4, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_close(transform(x), x @ H(3))
    x = torch.randn(8, 5, dtype=torch.float64).T  # not contiguous
    assert_close(transform(x), x @ H(3))

@both
def test_b3_is_its_own_inverse_and_its_own_gradient(transform):
    x = torch.randn(4, 64, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    assert_close(transform(transform(x)), x)
    assert_close(torch.autograd.grad(transform(x), x, g)[0], transform(g))

@both
@pytest.mark.parametrize('n', [0, 3, 1000])
def test_b4_needs_a_power_of_two(transform, n):
    with pytest.raises(ValueError, match=f'power of two, got size {n}'):
        transform(torch.zeros(2, n))

def test_b3_spreads_an_outlier_evenly():
    """An outlier c in one of n coordinates becomes c / sqrt(n) in each. Four bits, which round all
    beside the outlier away, then lose less than half as much."""
    x = torch.zeros(64)
    x[17] = 80.0
    assert_close(fwht(x).abs(), torch.full((64,), 10.0))
    x = torch.randn(32, 512)
    x[:, 77] = 100.0
    error, error_h = ((activation_quant_ste(z, 4) - z).norm() for z in (x, fwht(x)))
    assert error_h < error / 2

@both
def test_b3_does_not_overflow_in_float16(transform):
    """Before its scale the sum would be 131,072. float16 ends at 65,504; the result is 2,896."""
    y = transform(torch.full((2048,), 64.0, dtype=torch.float16))
    assert_close(y[0].item(), 64 * 2048 ** 0.5, rtol=0.01, atol=0)

def test_signs_cached_in_inference_mode_serve_training():
    """The first use of a size may be in a generation; its cached matrix was an inference tensor."""
    with torch.inference_mode():
        fwht(torch.ones(2, 2 ** 12))
    x = torch.ones(2, 2 ** 12, requires_grad=True)
    fwht(x).sum().backward()
    assert x.grad is not None

@pytest.mark.parametrize('k, n', [(1, 1), (3, 4), (48, 64), (64, 64), (513, 1024)])
def test_a3_pad_appends_zeros_up_to_the_next_power_of_two(k, n):
    x = torch.randn(2, 3, k)
    y = pad_to_pow2(x)
    assert next_pow2(k) == n and y.shape == (2, 3, n)
    assert torch.equal(y[..., :k], x) and not y[..., k:].any()
