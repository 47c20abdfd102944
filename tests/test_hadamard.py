"""The Walsh-Hadamard transform (B3, B4). The padding before it is part of A3 (test_quant.py)."""
import pytest
import torch
from torch.testing import assert_close

from hadamard import fwht, fwht_butterfly

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
    """The Kronecker form splits m into two halves, of which one may be empty, or the larger one.
    Of any shape, the last dimension is x. It need not be contiguous."""
    n = 2 ** m
    for x in (torch.randn(n), torch.randn(0, n), torch.randn(2, 3, 2, n), torch.randn(n, 5).T):
        x = x.to(dtype)
        y = transform(x)
        assert y.dtype == dtype
        assert_close(y.double(), x.double() @ H(m).T, rtol=0, atol=TOLERANCE[dtype])

@both
@pytest.mark.parametrize('n', [0, 3, 1000])
def test_b4_needs_a_power_of_two(transform, n):
    with pytest.raises(ValueError, match=f'power of two, got size {n}'):
        transform(torch.zeros(2, n))

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
