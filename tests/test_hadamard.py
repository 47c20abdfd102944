"""The Walsh-Hadamard transform (B3, B4)."""
import pytest
import torch

from hadamard import fwht, fwht_butterfly, next_pow2, pad_to_pow2
from quant import activation_quant_ste

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}  # on values of size 1
both = pytest.mark.parametrize('transform', [fwht, fwht_butterfly])
dtypes = pytest.mark.parametrize('dtype', TOLERANCE, ids=str)


def H(m):
    """B4 as it is printed."""
    if m == 0:
        return torch.ones(1, 1, dtype=torch.float64)
    h = H(m - 1)
    return torch.cat((torch.cat((h, h), dim=1), torch.cat((h, -h), dim=1))) / 2 ** 0.5


@both
@dtypes
@pytest.mark.parametrize('m', [0, 1, 2, 3, 6, 9, 11])
def test_b3_b4_transform_is_the_product_with_h(transform, dtype, m):
    x = torch.randn(5, 2 ** m, dtype=dtype)
    y = transform(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ H(m).T, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize('m', [0, 1, 5, 8])
def test_b4_matrix_is_scipys(m):
    hadamard = pytest.importorskip('scipy.linalg').hadamard
    reference = torch.tensor(hadamard(2 ** m), dtype=torch.float64) * 2 ** (-m / 2)
    torch.testing.assert_close(fwht(torch.eye(2 ** m, dtype=torch.float64)), reference)


@pytest.mark.parametrize('m', range(11))
def test_b4_kronecker_equals_butterfly(m):
    x = torch.randn(3, 2 ** m, dtype=torch.float64)
    torch.testing.assert_close(fwht(x), fwht_butterfly(x), rtol=0, atol=1e-13)


@both
@pytest.mark.parametrize('shape', [(8,), (0, 8), (3, 0, 8), (1, 8), (2, 3, 4, 8)], ids=str)
def test_b3_acts_on_the_last_dimension_of_any_shape(transform, shape):
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(transform(x), x @ H(3))
    transposed = torch.randn(8, 5, dtype=torch.float64).T  # not contiguous
    torch.testing.assert_close(transform(transposed), transposed @ H(3))


@both
@pytest.mark.parametrize('m', [0, 1, 4, 7])
def test_b4_is_orthonormal_and_its_own_inverse(transform, m):
    x = torch.randn(6, 2 ** m, dtype=torch.float64)
    torch.testing.assert_close(transform(transform(x)), x)
    torch.testing.assert_close(transform(x).norm(dim=-1), x.norm(dim=-1))
    identity = torch.eye(2 ** m, dtype=torch.float64)
    torch.testing.assert_close(transform(identity) @ transform(identity).T, identity)


@both
@pytest.mark.parametrize('m', [0, 1, 3, 6])
def test_b3_gradient_is_the_transform_of_the_gradient(transform, m):
    x = torch.randn(4, 2 ** m, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(x)
    grad, = torch.autograd.grad(transform(x), x, g)
    torch.testing.assert_close(grad, transform(g))
    assert torch.autograd.gradcheck(transform, x)


@both
@pytest.mark.parametrize('n', [0, 3, 6, 12, 1000])
def test_b4_needs_a_power_of_two(transform, n):
    with pytest.raises(ValueError, match=f'power of two, got {n}'):
        transform(torch.zeros(2, n))


def test_b3_spreads_an_outlier_evenly():
    """An outlier c in one of n coordinates becomes c / sqrt(n) in each: the reason for the transform."""
    x = torch.zeros(64)
    x[17] = 80.0
    torch.testing.assert_close(fwht(x).abs(), torch.full((64,), 10.0))


@pytest.mark.parametrize('n', [256, 1024])
def test_b3_noise_of_bfloat16_is_small_beside_the_quantizers(n):
    """Under autocast the transform runs in bfloat16. Its rounding must not show beside that of the 8 bits to come."""
    x = torch.randn(64, n)
    with torch.autocast('cpu', torch.bfloat16):
        noise = (fwht(x).float() - fwht_butterfly(x)).square().mean()
    rounding = (activation_quant_ste(fwht_butterfly(x)) - fwht_butterfly(x)).square().mean()
    assert 0 < noise < 0.2 * rounding


@both
def test_b3_does_not_overflow_in_float16(transform):
    """The sum before the scale would be 131,072, and float16 ends at 65,504; the result is 2,896."""
    y = transform(torch.full((2048,), 64.0, dtype=torch.float16))
    torch.testing.assert_close(y[0].item(), 64 * 2048 ** 0.5, rtol=0.01, atol=0)


def test_signs_cached_in_inference_mode_serve_training():
    """The first call with some size may come from a generation; its cached matrix must not be an inference tensor."""
    with torch.inference_mode():
        fwht(torch.ones(2, 2 ** 12))
    x = torch.ones(2, 2 ** 12, requires_grad=True)
    fwht(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize('k, n', [(1, 1), (2, 2), (3, 4), (5, 8), (48, 64), (64, 64), (513, 1024)])
def test_a3_pad_appends_zeros_up_to_the_next_power_of_two(k, n):
    x = torch.randn(2, 3, k)
    y = pad_to_pow2(x)
    assert next_pow2(k) == n and y.shape == (2, 3, n)
    assert torch.equal(y[..., :k], x) and not y[..., k:].any()
