"""Ternary weights (A1, B7), integer activations (A2), the layers made of them (A3), A8, storage."""
import subprocess
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import flags
from formulas import activation_a2, projection_a3, ternary_a1, ternary_b7
from torch.testing import assert_close

import quant
from model import BitSkip, BitSkipConfig
from quant import (BitLinear, HBitLinear, activation_quant, activation_quant_ste, bit_linears,
                   dequantize, int8_support, integers_serve, latent_weights, linear_class,
                   pack_ternary, project, quantization_loss, straight_through, ternary_linear,
                   unpack_ternary, weight_ternary)

all_bits = pytest.mark.parametrize('bits', [4, 8])
both_products = pytest.mark.parametrize('product', ['integer', 'definition'])

# ---- A1, B7

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('power', [1, 3], ids=['normal', 'heavy tails'])
def test_a1_and_b7_are_the_same_function(dtype, power):
    """In bfloat16, w / alpha would round, and a weight above alpha / 2 be taken for a tie."""
    for _ in range(10):
        w = torch.randn(64, 48).pow(power).mul(0.02).to(dtype)
        codes, alpha = weight_ternary(w)
        assert codes.dtype == torch.int8 and alpha.shape == ()
        assert_close(alpha.double(), w.double().abs().mean(), rtol=1e-5, atol=0)
        assert torch.equal(codes * alpha, ternary_b7(w.float(), alpha))

def test_a1_ties_and_zeros():
    """|w| = alpha / 2 is 0, the next float above is not: round() takes 0.5 to 0, as B7's <= does.
    And a matrix of zeros is no 0 / 0."""
    above = torch.tensor(0.5).nextafter(torch.tensor(1.0))
    w = torch.tensor([0.5, -0.5, 1.5, -1.5, above, -above, 1.5, -1.5, 1.0, -1.0, 0.0, 2.0])
    codes, alpha = weight_ternary(w)
    assert alpha == 1 and codes.tolist() == [0, 0, 1, -1, 1, -1, 1, -1, 1, -1, 0, 1]
    codes, alpha = weight_ternary(torch.zeros(3, 4))
    assert alpha > 0 and not codes.any()

# ---- A2

@all_bits
def test_a2_is_the_formula(bits):
    """Ties: s / q is a power of two, so that x q / s is exact. A token of zeros stays zeros. An
    outlier costs the rest of its token everything, and other tokens nothing. There is no epsilon:
    small tokens are quantized as large ones are."""
    q = 2 ** (bits - 1) - 1
    ties = torch.arange(-2 * q, 2 * q + 1) / 2 / 64
    assert torch.equal(activation_quant_ste(ties, bits), activation_a2(ties, bits))
    x = torch.randn(4, 32)
    x[0], x[1, 5], x[3] = 0, 1000, x[2] * 2.0 ** -40
    x_hat = activation_quant_ste(x, bits)
    assert_close(x_hat, activation_a2(x, bits))
    assert not x_hat[0].any() and x_hat[1].count_nonzero() == 1 and x_hat[1, 5] == 1000
    assert torch.equal(x_hat[3], x_hat[2] * 2.0 ** -40)

@pytest.mark.parametrize('quantize', [weight_ternary, activation_quant], ids=['a1', 'a2'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a1_a2_straight_through_is_exact(quantize, dtype):
    """Forward the very bits of the quantized value, backward the very bits of the gradient.
    x + (x_hat - x).detach() would be neither."""
    x = torch.randn(7, 24).to(dtype).requires_grad_()
    codes, scale = quantize(x)
    y = straight_through(x, dequantize(codes, scale))
    assert y.dtype == dtype and torch.equal(y, (codes * scale).to(dtype))
    g = torch.randn(7, 24).to(dtype)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], g)

# ---- the product of A3

def rows_a1(w):
    """A1 with one scale a row."""
    scale = w.detach().abs().mean(dim=1, keepdim=True)
    return (w.detach() / scale).round().clip(-1, 1).to(torch.int8), scale

@pytest.fixture(params=['integer', 'integer, plain products', 'definition'])
def machine(request, monkeypatch):
    """One that multiplies in this way, whatever the one below is."""
    monkeypatch.setattr(quant, 'VNNI', 'integer' in request.param)
    monkeypatch.setattr(quant, 'AMD', request.param == 'integer')
    return request.param

def run_product(x, w, quantize, bits, g):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = ternary_linear(x, w, *quantize(w), bits)
    return y, *torch.autograd.grad(y, (x, w), g.to(y.dtype))

@all_bits
@pytest.mark.parametrize('quantize', [weight_ternary, rows_a1])
@pytest.mark.parametrize('shape', [(40,), (2, 5, 40), (0, 40), (3, 1)], ids=str)
def test_a3_product_is_the_formula(machine, bits, quantize, shape):
    """y = x^ W^T, dL/dx = g W^, dL/dW = g^T x^, g the gradient of y: by integers or by floats.
    (Of one column, torch._int_mm gives wrong sums.)"""
    x, g, w = torch.randn(shape), torch.randn(*shape[:-1], 24), torch.randn(24, shape[-1]) * 0.02
    x_hat, (codes, scale) = activation_a2(x, bits), quantize(w)
    y, grad_x, grad_w = run_product(x, w, quantize, bits, g)
    assert ('IntegerLinear' in y.grad_fn.name()) == ('integer' in machine and shape[-1] > 1)
    assert_close(y, x_hat @ (codes * scale).T)
    assert_close(grad_x, g @ (codes * scale))
    assert_close(grad_w, g.reshape(-1, 24).T @ x_hat.reshape(-1, shape[-1]))

def test_a3_product_under_autocast(machine, monkeypatch):
    """The output in bfloat16, the gradients in float32, all one rounding or so from exact."""
    x, w, g = torch.randn(3, 9, 64), torch.randn(24, 64) * 0.02, torch.randn(3, 9, 24)
    with torch.autocast('cpu', torch.bfloat16):
        low = run_product(x, w, weight_ternary, 8, g)
    assert [tensor.dtype for tensor in low] == [torch.bfloat16, torch.float32, torch.float32]
    monkeypatch.setattr(quant, 'VNNI', False)
    for a, b in zip(low, run_product(x, w, weight_ternary, 8, g)):
        assert (a - b).norm() < 0.01 * b.norm()

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a3_product_hands_on_nan(machine, bad):
    """Garbage in a token must show in that token. It came out as an innocent integer."""
    x, w, g = torch.randn(4, 16), torch.randn(8, 16), torch.zeros(4, 8)
    good = run_product(x, w, weight_ternary, 8, g)[0]
    x[2, 3] = bad
    y = run_product(x, w, weight_ternary, 8, g)[0]
    assert not y[2].isfinite().any() and torch.equal(y[[0, 1, 3]], good[[0, 1, 3]])

def test_integers_serve_where_the_machine_and_the_shapes_allow(monkeypatch):
    """On CUDA torch._int_mm takes more than 16 rows, multiples of 8; groups it takes nowhere."""
    for vnni in (True, False):
        monkeypatch.setattr(quant, 'VNNI', vnni)
        assert int8_support('cpu')[0] == vnni and 'VNNI' in int8_support('cpu')[1]
    assert int8_support('mps') == (False, 'no int8 products on this mps')
    monkeypatch.setattr(quant, 'int8_support', lambda device_type: (True, ''))

    def serve(device, rows, out, k, *scale):
        return integers_serve(torch.empty(rows, k, device=device), torch.empty(out, k),
                              torch.empty(scale))
    assert serve('meta', 17, 8, 16) and serve('meta', 17, 8, 16, 8, 1) and serve('cpu', 1, 9, 13)
    assert not serve('meta', 16, 8, 16) and not serve('meta', 17, 9, 16)
    assert not serve('meta', 17, 8, 12) and not serve('cpu', 17, 8, 16, 8, 2)

# ---- A3: the layers

@both_products
@all_bits
@pytest.mark.parametrize('linear_norm', ['none', 'layernorm', 'rmsnorm'])
@pytest.mark.parametrize('cls, width', [(BitLinear, 48), (HBitLinear, 64), (HBitLinear, 48)],
                         ids=['bitlinear', 'hbitlinear', 'hbitlinear padded'])
def test_a3_layers_are_the_formula(cls, width, linear_norm, bits, product, use_product):
    """W^ Q_b(norm(x)), or W^ Q_b(FWHT(Pad(norm(x)))): padding first would change the norm.
    Gradients go straight through."""
    use_product(product)
    layer = cls(width, 24, act_bits=bits, linear_norm=linear_norm)
    x, W = torch.randn(2, 5, width, requires_grad=True), layer.weight
    reference = projection_a3(x, W, cls is HBitLinear, bits, linear_norm)
    assert_close(layer(x), reference, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(reference)
    for a, b in zip(*(torch.autograd.grad(y, (x, W), g) for y in (layer(x), reference))):
        assert_close(a, b, rtol=1e-4, atol=1e-5)

def test_a3_layer_takes_its_own_width_only():
    """50 features are padded to 64 as 48 are, and would have passed."""
    with pytest.raises(ValueError, match='this layer takes 48 features, got 50'):
        HBitLinear(48, 8)(torch.randn(2, 50))

@both_products
@pytest.mark.parametrize('kind', ['fp', 'bitlinear', 'hbitlinear', 'Grouped'])
def test_project_equals_each_layer_alone(kind, product, use_product):
    use_product(product)
    cls = getattr(seam, kind, None) or linear_class(kind)
    layers = nn.ModuleList(cls(48, out, 8, 'rmsnorm') for out in (32, 16, 16))
    x = torch.randn(2, 5, 48, requires_grad=True)
    together, alone = project(x, *layers), [layer(x) for layer in layers]
    inputs, weights = [x, *layers.parameters()], [torch.randn_like(y) for y in alone]
    for a, b in zip(together, alone, strict=True):
        assert_close(a, b)
    for a, b in zip(*(torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weights)), inputs)
                      for ys in (together, alone)), strict=True):
        assert_close(a, b)

def test_layers_that_prepare_in_ways_of_their_own_are_not_merged():
    """k was given what q had made of x, and its own gain no gradient."""
    class Gain(HBitLinear):
        def __init__(self, *args):
            super().__init__(*args)
            self.gain = nn.Parameter(torch.rand(self.width) + 0.5)

        def prepare(self, x):
            return super().prepare(x * self.gain)
    q, k, x = Gain(32, 16), Gain(32, 16), torch.randn(3, 32)
    ys = project(x, q, k)
    assert torch.equal(ys[0], q(x)) and torch.equal(ys[1], k(x))
    ys[1].sum().backward()
    assert k.gain.grad.norm() > 0 and q.gain.grad is None

# ---- the seam: a layer of one's own

SEAM = '''
import torch
from quant import BitLinear

class Grouped(BitLinear):
    """One scale for each 16 neighbours in a row."""

    def ternary(self):
        groups = self.weight.detach().unflatten(-1, (-1, 16))  # (out, groups, 16)
        scale = groups.abs().mean(dim=-1).clamp(min=1e-20)  # (out, groups)
        codes = (groups / scale[..., None]).round().clamp(-1, 1).to(torch.int8)
        return codes.flatten(1), scale
'''
seam = types.ModuleType('seam')
exec(SEAM, vars(seam))

USE = """
import sys
import eval_exits, sample, train
assert train.main([*sys.argv[1:], '--linear=my_layer:Grouped', '--max_iters=2'])
assert train.main(['--out_dir=out/run', '--init_from=resume', '--max_iters=3'])
eval_exits.main([])
sample.main(['--prompt=def ', '--max_new_tokens=5'])
"""

@both_products
def test_a_group_of_neighbours_may_have_its_own_scale(product, use_product):
    """Forward and backward, whatever the machine multiplies best: int8 products know no groups."""
    use_product(product)
    layer, x, g = seam.Grouped(48, 8), torch.randn(5, 48, requires_grad=True), torch.randn(5, 8)
    W_hat = torch.cat([torch.stack([ternary_a1(row) for row in part])
                       for part in layer.weight.detach().split(16, dim=1)], dim=1)
    y, x_hat = layer(x), activation_a2(x.detach())
    assert_close(y, x_hat @ W_hat.T)
    grad_x, grad_W = torch.autograd.grad(y, (x, layer.weight), g)
    assert_close(grad_x, g @ W_hat)
    assert_close(grad_W, g.T @ x_hat)

def test_a_layer_of_ones_own_trains_resumes_evaluates_and_samples(core_alone):
    """`ternary` in a file of one's own is all it takes: at most 15 lines, and no other file."""
    assert len(SEAM.split('class ')[1].strip().splitlines()) <= 15
    (core_alone / 'my_layer.py').write_text(SEAM)
    done = subprocess.run([sys.executable, '-c', USE, *flags()], cwd=core_alone, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert 'written: ' in done.stdout and '\n5 tokens' in done.stdout

# ---- A8, latent weights, storage

def test_a8_is_the_mean_over_matrices_and_treats_w_hat_as_constant():
    """Each matrix counts the same, whatever its size; d/dW mean((W - W^)^2) = 2 (W - W^) / size."""
    model = nn.Sequential(BitLinear(8, 4), nn.Linear(4, 4), HBitLinear(48, 8))
    matrices = [layer.weight for layer in (model[0], model[2])]
    loss = quantization_loss(model)
    assert_close(loss, sum((W - ternary_a1(W)).square().mean() for W in matrices) / 2)
    loss.backward()
    for W in matrices:
        assert_close(W.grad, 2 * (W - ternary_a1(W)).detach() / W.numel() / 2)
    assert model[1].weight.grad is None
    with torch.device('meta'):  # without such matrices it is zero, on the model's device
        loss = quantization_loss(BitSkip(BitSkipConfig(linear='fp', n_layer=1)))
    assert loss.shape == () and loss.device.type == 'meta'

def test_latent_weights_compute_with_w_and_quantized_activations_and_are_gone_after_an_error():
    layer, x = BitLinear(16, 8), torch.randn(3, 16)
    ternary = layer(x)
    with pytest.raises(ZeroDivisionError), latent_weights(layer) as same:
        assert same is layer
        assert_close(layer(x), F.linear(activation_a2(x), layer.weight))
        assert_close(project(x, layer)[0], layer(x))
        raise ZeroDivisionError
    assert torch.equal(layer(x), ternary) and not bit_linears(layer)[0].latent

def test_pack_is_a_bijection_between_five_codes_and_the_bytes_up_to_242():
    """243 quintuples, each byte once; the first column is the lowest digit, 0 fills up the last."""
    every = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * 5)
    assert pack_ternary(every).flatten().sort().values.tolist() == list(range(243))
    assert torch.equal(unpack_ternary(pack_ternary(every), 5), every)
    codes = torch.tensor([[1, 0, -1, 1, 1, 0, -1]], dtype=torch.int8)
    assert pack_ternary(codes).tolist() == [[2 + 3 + 0 + 27 * 2 + 81 * 2, 1 + 0 + 9 + 27 + 81]]
    assert torch.equal(unpack_ternary(pack_ternary(codes), 7), codes)

def test_pack_and_unpack_refuse_what_is_not_theirs():
    for code in (2, -128):
        with pytest.raises(ValueError, match='-1, 0 and 1'):
            pack_ternary(torch.tensor([[0, code, 1]], dtype=torch.int8))
    with pytest.raises(ValueError, match='int8 codes, got torch.float32'):
        pack_ternary(torch.zeros(1, 3))
    for k in (5, 11):
        with pytest.raises(ValueError, match=f'{k} columns take'):
            unpack_ternary(torch.zeros(2, 2, dtype=torch.uint8), k)
    with pytest.raises(ValueError, match='over 242'):
        unpack_ternary(torch.tensor([[0, 243]], dtype=torch.uint8), 10)
