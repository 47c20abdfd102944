"""
Our BitLinear beside transformers' (integrations.bitnet, online) and torchao's (BitNet training):
outputs and gradients are the same, up to float32 sums. What they define differently: where max|x|
or mean|W| is below 1e-5 they take 1e-5. And we divide x by max|x| / 127, transformers multiplies by
127 / max|x|, torchao by the inverse of our divisor: at a tie, codes can differ by one.
"""
import pytest
import torch
from runs import EXTRA
from torch.testing import assert_close

from hadamard import fwht
from quant import BitLinear, HBitLinear

def transformers_linear(weight):
    name = 'transformers.integrations.bitnet'
    bitnet = pytest.importorskip(name, reason=f'transformers {EXTRA}')
    layer = bitnet.AutoBitLinear(*weight.t().shape, bias=False, online_quant=True)
    layer.weight = torch.nn.Parameter(weight.clone())
    return layer

def torchao_linear(weight):
    name = 'torchao.prototype.quantized_training'
    training = pytest.importorskip(name, reason=f'torchao {EXTRA}')
    from torchao.quantization import quantize_
    layer = torch.nn.Linear(*weight.t().shape, bias=False)
    layer.weight = torch.nn.Parameter(weight.clone())
    quantize_(layer, training.bitnet_training())
    return layer

@pytest.fixture(autouse=True)
def eager():
    with torch.compiler.set_stance('force_eager'):
        yield

def inputs(*shape):
    """Tokens of different sizes, some with outliers."""
    x = torch.randn(shape) * torch.logspace(-2, 2, shape[-2])[:, None]
    x[..., ::3, 1] *= 20
    return x

def same(ours, other):
    """Equal up to float32 sums, relative to the largest of each row: a code off by one shows."""
    for a, b in zip(ours, other):
        scale = b.abs().amax(-1, keepdim=True)
        assert_close(a / scale, b / scale, rtol=0, atol=1e-5)

@pytest.mark.parametrize('make', [transformers_linear, torchao_linear])
@pytest.mark.parametrize('product', ['integer', 'fake'])
@pytest.mark.parametrize('kind', [BitLinear, HBitLinear])
def test_outputs_and_gradients_agree(make, product, kind, use_product):
    """And the comparison can fail: other weights are not the same."""
    use_product(product)
    ours, x, grad = kind(64, 32), inputs(2, 5, 64), torch.randn(2, 5, 32)
    results = []
    for layer in (ours, make(ours.weight.detach()), make(ours.weight.detach().roll(1, 0))):
        latent = x.clone().requires_grad_()
        y = layer(latent if layer is ours or kind is BitLinear else fwht(latent))
        y.backward(grad)
        dW = layer.weight.grad
        results.append((y.detach(), latent.grad, getattr(dW, '_data', dW)))
    same(results[0], results[1])
    with pytest.raises(AssertionError):
        same(results[0], results[2])
