"""
Our BitLinear beside two others: transformers' (integrations.bitnet, "online" quantization) and torchao's BitNet
training linear (prototype.quantized_training). On the same latent weights and inputs the three give the same outputs
and gradients, up to float32 sums. What they define differently:

- eps. We divide by max|x| and mean|W| however small they are, down to 1e-20. transformers takes 1e-5 for anything
  below. torchao does so too, for mean|W| and for max|x| / 127, but only to find the codes: it scales by the true ones.
  So a token that is smaller than 1e-5 (transformers) or 127e-5 (torchao) loses levels there, and keeps them here.
- Ties. Scales are per token and per matrix, and codes of tokens are clipped to -128 ... 127, for all. But we divide x
  by max|x| / 127 where transformers multiplies by 127 / max|x| and torchao by the inverse of our divisor; for weights
  torchao divides by the mean as we do, and transformers multiplies by its inverse. Where the last bit decides about a
  half, codes can differ by one. Ours can have 4 bits as well, theirs have 8.
- Products. transformers multiplies x^ and W^ as floats; torchao and, where the hardware does, we multiply codes in int8
  and scale once. Gradients are the same straight-through ones for all: dL/dx = dL/dy W^, dL/dW = dL/dy^T x^.
- Bias and norm: transformers' layer may have a bias and an RMSNorm of its own; ours has a norm without parameters as an
  option, and no bias. Neither of the others knows the Hadamard transform: HBitLinear is their layer behind ours.
"""
import pytest
import torch
from torch.testing import assert_close

from hadamard import fwht
from quant import BitLinear, HBitLinear, activation_quant, weight_ternary

EXTRA = 'pip install -r requirements-extra.txt'


def transformers_linear(weight):
    """transformers' BitNet layer for training with the latent `weight` (out, in), eager (its parts are compiled)."""
    bitnet = pytest.importorskip('transformers.integrations.bitnet', reason=f'transformers is not installed: {EXTRA}')
    layer = bitnet.AutoBitLinear(*weight.t().shape, bias=False, online_quant=True)
    layer.weight = torch.nn.Parameter(weight.clone())
    return layer


def torchao_linear(weight):
    """torchao's, by its public way: quantize_ on an nn.Linear."""
    training = pytest.importorskip('torchao.prototype.quantized_training', reason=f'torchao is not installed: {EXTRA}')
    from torchao.quantization import quantize_
    layer = torch.nn.Linear(*weight.t().shape, bias=False)
    layer.weight = torch.nn.Parameter(weight.clone())
    quantize_(layer, training.bitnet_training())
    return layer


others = pytest.mark.parametrize('make', [transformers_linear, torchao_linear])


@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance('force_eager'):
        yield


def inputs(*shape):
    """Activations as they are: tokens of different sizes, some with outliers."""
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[-2])[:, None]
    x[..., ::3, 1] *= 20
    return x


def forward_backward(layer, x, grad_y):
    """y, dL/dx and dL/dW of a layer, for dL/dy = grad_y."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad_y)
    return y.detach(), x.grad, getattr(layer.weight.grad, '_data', layer.weight.grad)


def same(ours, other):
    """Equal up to float32 sums, relative to the largest number of each row: codes that differ by one would show."""
    for a, b in zip(ours, other):
        scale = b.abs().amax(-1, keepdim=True)
        assert_close(a / scale, b / scale, rtol=0, atol=1e-5)


@others
@pytest.mark.parametrize('product', ['integer', 'fake'])
@pytest.mark.parametrize('shape', [(2, 5, 64), (1, 1, 48), (17, 256)])
def test_forward_and_backward_agree(make, product, shape, use_product):
    use_product(product)
    ours = BitLinear(shape[-1], 32)
    x, grad_y = inputs(*shape), torch.randn(*shape[:-1], 32)
    same(forward_backward(ours, x, grad_y), forward_backward(make(ours.weight.detach()), x, grad_y))


@others
def test_hbitlinear_is_their_layer_behind_our_transform(make):
    ours = HBitLinear(64, 32)
    other = make(ours.weight.detach())
    x, grad_y = inputs(5, 64), torch.randn(5, 32)
    ours_x, other_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, other_y = ours(ours_x), other(fwht(other_x))
    (y * grad_y).sum().backward()
    (other_y * grad_y).sum().backward()
    same((y.detach(), ours_x.grad), (other_y.detach(), other_x.grad))


@others
def test_the_comparison_can_fail(make):
    """Other weights, or the latent ones as they are, are not the same."""
    ours, x, grad_y = BitLinear(64, 32), inputs(5, 64), torch.randn(5, 32)
    for weight in (ours.weight.detach().roll(1, 0), ours.weight.detach() + 0.02):
        with pytest.raises(AssertionError):
            same(forward_backward(ours, x, grad_y), forward_backward(make(weight), x, grad_y))


@others
def test_small_tokens_are_where_definitions_part(make):
    """max|x| = 1e-7, below their eps: we keep the 127 levels of its sign, theirs are down to one or two."""
    ours, x = BitLinear(64, 32), torch.randn(3, 64)
    other = make(ours.weight.detach())
    tiny = x * 1e-7 / x.abs().amax(-1, keepdim=True)
    expected = ours(x) * 1e-7 / x.abs().amax(-1, keepdim=True)
    same([ours(tiny).detach()], [expected.detach()])
    assert (other(tiny) - expected).abs().max() > 0.05 * expected.abs().max()


def test_packed_layer_of_transformers_computes_with_our_codes():
    """Its layer for inference, BitLinear, takes codes as we make them, packed its way, with one over our scale."""
    bitnet = pytest.importorskip('transformers.integrations.bitnet', reason=f'transformers is not installed: {EXTRA}')
    ours, x = BitLinear(64, 32), inputs(5, 64)
    codes, scale = weight_ternary(ours.weight)
    theirs = bitnet.BitLinear(64, 32, bias=False, dtype=torch.float32)
    theirs.weight = bitnet.pack_weights(codes.clone())
    theirs.weight_scale = 1 / scale
    same([ours(x).detach()], [theirs(x)])
    assert torch.equal(theirs.activation_quant(x)[0], activation_quant(x)[0])
