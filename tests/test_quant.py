"""Ternary weights (A1, B7), integer activations (A2), the layers made of them (A3), their loss (A8) and storage."""
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import quant
from model import BitSkip, BitSkipConfig
from quant import (BitLinear, HadamardAfter, HBitLinear, IntegerLinear, activation_quant, activation_quant_ste,
                   bit_linears, fake_quant_linear, int8_support, latent_weights, make_linear, pack_ternary, project,
                   quantization_loss, unpack_ternary, weight_ternary, weight_ternary_ste)

both_products = pytest.mark.parametrize('product', ['integer', 'fake'])
all_bits = pytest.mark.parametrize('bits', [4, 8])


# --------------------------------------------------------------------------------------------------------------------
# the papers' formulas, as they are printed

def ternary_a1(w):
    alpha = w.abs().mean()
    return alpha * (w / alpha).round().clip(-1, 1)


def ternary_b7(w, alpha):
    return torch.where(w > 0.5 * alpha, alpha, torch.where(w < -0.5 * alpha, -alpha, 0.0))


def activation_a2(x, bits):
    s = x.abs().amax(dim=-1, keepdim=True)
    q = 2 ** (bits - 1) - 1
    return ((x * q / s).round().clip(-q - 1, q) * s / q).nan_to_num(0.0)  # 0 / 0 of an all-zero token is 0


def hadamard(x):
    """B3, in one line: H_ij = (-1)^(number of ones that i and j have in common) / sqrt(n)."""
    n = x.shape[-1]
    return x @ torch.tensor([[(-1.0) ** (i & j).bit_count() / n ** 0.5 for j in range(n)] for i in range(n)])


def norm_a3(x, kind):
    if kind == 'layernorm':
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    return x / x.square().mean(-1, keepdim=True).sqrt() if kind == 'rmsnorm' else x


def through(x, x_hat):
    """Forward x_hat, gradient of x."""
    return x + (x_hat - x).detach()


# --------------------------------------------------------------------------------------------------------------------
# A1, B7

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize('power', [1, 3], ids=['normal', 'heavy tails'])
def test_a1_and_b7_are_the_same_function(dtype, power):
    """In bfloat16, too, although w / alpha rounds there: a weight above alpha / 2 must not be taken for a tie."""
    for seed in range(20):
        w = torch.randn(64, 48, generator=torch.Generator().manual_seed(seed)).pow(power).mul(0.02).to(dtype)
        codes, alpha = weight_ternary(w)
        assert codes.dtype == torch.int8 and alpha.shape == ()
        assert_close(alpha.double(), w.double().abs().mean(), rtol=1e-5, atol=0)
        assert torch.equal(codes * alpha, ternary_b7(w.float(), alpha))


def test_a1_and_b7_agree_on_ties():
    """|w| = alpha / 2 exactly is 0, and the next float above it is not: round() takes 0.5 to 0, as B7's <= does."""
    half, above = torch.tensor(0.5), torch.tensor(0.5).nextafter(torch.tensor(1.0))
    w = torch.tensor([0.5, -0.5, 1.5, -1.5, above, -above, 1.5, -1.5, 1.0, -1.0, 0.0, 2.0])
    codes, alpha = weight_ternary(w)
    assert alpha == 1
    assert codes.tolist() == [0, 0, 1, -1, 1, -1, 1, -1, 1, -1, 0, 1]
    assert torch.equal(codes * alpha, ternary_b7(w, alpha)) and torch.equal(half.round(), torch.tensor(0.0))


@pytest.mark.parametrize('w', [torch.zeros(3, 4), torch.full((2, 2), 1e-30)], ids=['zeros', 'tiny'])
def test_a1_scale_is_clamped(w):
    assert torch.equal(weight_ternary_ste(w), torch.zeros_like(w))


# --------------------------------------------------------------------------------------------------------------------
# A2

@all_bits
@pytest.mark.parametrize('shape', [(16,), (1, 16), (5, 64), (2, 3, 48)], ids=str)
def test_a2_is_the_formula(bits, shape):
    x = torch.randn(shape) * 3
    codes, scale = activation_quant(x, bits)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (*shape[:-1], 1)
    assert codes.abs().max() == 2 ** (bits - 1) - 1
    assert_close(codes * scale, activation_a2(x, bits))
    assert_close(activation_quant_ste(x, bits), activation_a2(x, bits))


@all_bits
def test_a2_rounds_ties_as_the_formula(bits):
    """s / q is a power of two here, so that x q / s is exact, and every second value a tie."""
    q = 2 ** (bits - 1) - 1
    x = torch.arange(-2 * q, 2 * q + 1) / 2 / 64
    assert torch.equal(activation_quant_ste(x, bits), activation_a2(x, bits))


@all_bits
def test_a2_has_one_scale_per_token(bits):
    x = torch.randn(6, 32)
    louder = x.clone()
    louder[2] *= 1000  # an outlying token costs the others nothing
    codes, scale = activation_quant(x, bits)
    louder_codes, louder_scale = activation_quant(louder, bits)
    assert torch.equal(codes, louder_codes)
    assert_close(louder_scale / scale, torch.tensor([1.0, 1, 1000, 1, 1, 1])[:, None])


@all_bits
def test_a2_zeros_and_outliers(bits):
    x = torch.randn(3, 32)
    x[0], x[1, 5] = 0, 1000  # an outlying value costs the rest of its token everything
    x_hat = activation_quant_ste(x, bits)
    assert not x_hat[0].any()
    assert x_hat[1].count_nonzero() == 1 and x_hat[1, 5] == 1000
    assert_close(x_hat, activation_a2(x, bits))


@all_bits
@pytest.mark.parametrize('power', [-40, -20, 20, 40])
def test_a2_is_scale_free(bits, power):
    """A2 has no epsilon: tokens of any size, however small, are quantized alike."""
    x = torch.randn(4, 32)
    assert torch.equal(activation_quant_ste(x * 2.0 ** power, bits), activation_quant_ste(x, bits) * 2.0 ** power)


# --------------------------------------------------------------------------------------------------------------------
# straight-through

@pytest.mark.parametrize('quantize, codes_and_scale', [(weight_ternary_ste, weight_ternary),
                                                       (activation_quant_ste, activation_quant)], ids=['a1', 'a2'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_a1_a2_straight_through_is_exact(quantize, codes_and_scale, dtype):
    """Forward the very bits of the quantized value, backward the very bits of the gradient."""
    x = torch.randn(7, 24).to(dtype).requires_grad_()
    codes, scale = codes_and_scale(x)
    y = quantize(x)
    assert y.dtype == dtype and torch.equal(y, (codes * scale).to(dtype))
    g = torch.randn(7, 24).to(dtype)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], g)


# --------------------------------------------------------------------------------------------------------------------
# the product

def run_product(product, x, weights, bits, g):
    """Output and gradients (x first) of Q_b(x) W^T for all weights, given the gradient g of the output."""
    x, weights = x.detach().requires_grad_(), [w.detach().requires_grad_() for w in weights]
    if product == 'integer':
        y = IntegerLinear.apply(x, bits, *weights)
    else:
        y = torch.cat([fake_quant_linear(x, w, bits) for w in weights], dim=-1)
    return y, *torch.autograd.grad(y, (x, *weights), g.to(y.dtype))


@both_products
@all_bits
@pytest.mark.parametrize('outs', [(24,), (16, 8, 8)], ids=['one weight', 'three weights'])
@pytest.mark.parametrize('shape', [(40,), (1, 40), (7, 40), (2, 5, 40)], ids=str)
def test_a1_a2_product_is_the_formula(product, bits, outs, shape):
    """y = x^ W^T, dL/dx = g W^, dL/dW = g^T x^, where g is the gradient of y."""
    x, g = torch.randn(shape), torch.randn(*shape[:-1], sum(outs))
    weights = [torch.randn(out, 40) * 0.02 for out in outs]
    y, grad_x, *grads_w = run_product(product, x, weights, bits, g)
    x_hat, w_hat = activation_a2(x, bits), torch.cat([ternary_a1(w) for w in weights])
    assert_close(y, x_hat @ w_hat.T)
    assert_close(grad_x, g @ w_hat)
    assert_close(torch.cat(grads_w), g.reshape(-1, sum(outs)).T @ x_hat.reshape(-1, 40))


@all_bits
def test_a1_a2_products_agree_under_autocast(bits):
    """Output and gradients in bfloat16 are one rounding or so from those in float32, and of the same types."""
    x, weights, g = torch.randn(3, 9, 64), [torch.randn(24, 64) * 0.02, torch.randn(8, 64)], torch.randn(3, 9, 32)
    exact = run_product('fake', x, weights, bits, g)
    with torch.autocast('cpu', torch.bfloat16):
        fake, integer = (run_product(product, x, weights, bits, g) for product in ('fake', 'integer'))
    for a, b, c in zip(exact, fake, integer):
        assert b.dtype == c.dtype
        assert (b - a).norm() < 0.01 * a.norm() and (c - a).norm() < 0.01 * a.norm()


@both_products
def test_a2_product_takes_any_strides(product):
    x, w, g = torch.randn(40, 6, 3).permute(2, 1, 0), torch.randn(40, 24).t(), torch.randn(24, 6, 3).permute(2, 1, 0)
    assert not x.is_contiguous() and not w.is_contiguous()
    for strided, plain in zip(run_product(product, x, [w], 8, g),
                              run_product(product, x.contiguous(), [w.contiguous()], 8, g.contiguous())):
        assert_close(strided, plain)


@both_products
@pytest.mark.parametrize('shape', [(0, 16), (2, 0, 16)], ids=str)
def test_a2_product_of_an_empty_batch_is_empty(product, shape):
    y, grad_x, grad_w = run_product(product, torch.zeros(shape), [torch.randn(8, 16)], 8, torch.zeros(*shape[:-1], 8))
    assert y.shape == (*shape[:-1], 8) and grad_x.shape == shape and not grad_w.any()


@both_products
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_a2_product_hands_on_nan(product, bad):
    """Garbage in a token must be seen in that token, not come out as an innocent integer; the others are safe."""
    x, w = torch.randn(4, 16), torch.randn(8, 16)
    y = run_product(product, x, [w], 8, torch.zeros(4, 8))[0]
    x[2, 3] = bad
    y_bad = run_product(product, x, [w], 8, torch.zeros(4, 8))[0]
    assert not y_bad[2].isfinite().any()
    others = torch.tensor([0, 1, 3])
    assert_close(y_bad[others], y[others])
    w[0, 0] = float('nan')  # one scale per matrix, so all of it
    assert run_product(product, x, [w], 8, torch.zeros(4, 8))[0].isnan().all()


@pytest.mark.parametrize('kind', ['fp', 'bitlinear', 'hbitlinear'])
@both_products
@all_bits
def test_project_equals_each_layer_alone(kind, bits, product, use_product):
    use_product(product)
    layers = nn.ModuleList(make_linear(kind, 48, out, bits, linear_norm='rmsnorm') for out in (32, 16, 16))
    x = torch.randn(2, 5, 48, requires_grad=True)
    together, alone = project(x, layers), [layer(x) for layer in layers]
    inputs = [x, *layers.parameters()]
    for a, b in zip(together, alone, strict=True):
        assert_close(a, b)
    weights = [torch.randn_like(y) for y in alone]
    for a, b in zip(*(torch.autograd.grad(sum((y * w).sum() for y, w in zip(ys, weights)), inputs)
                      for ys in (together, alone)), strict=True):
        assert_close(a, b)


def test_int8_support_says_why():
    for device in ('cpu', 'mps', 'xpu'):
        fast, how = int8_support(device)
        assert isinstance(fast, bool) and how
    assert not int8_support('mps')[0] and 'mps' in int8_support('mps')[1]


# --------------------------------------------------------------------------------------------------------------------
# A3: the layers

@both_products
@all_bits
@pytest.mark.parametrize('linear_norm', ['none', 'layernorm', 'rmsnorm'])
@pytest.mark.parametrize('cls, width', [(BitLinear, 48), (HBitLinear, 64), (HBitLinear, 48)],
                         ids=['bitlinear', 'hbitlinear', 'hbitlinear padded'])
def test_a3_layers_are_the_formula(cls, width, linear_norm, bits, product, use_product):
    """BitLinear: y = Q_b(LN(x)) W^T. HBitLinear: y = Q_b(FWHT(Pad(LN(x)))) W^T. Gradients go straight through."""
    use_product(product)
    layer = cls(width, 24, act_bits=bits, linear_norm=linear_norm)
    assert layer.weight.shape == (24, 64 if cls is HBitLinear else 48)
    x = torch.randn(2, 5, width, requires_grad=True)
    z = norm_a3(x, linear_norm)
    if cls is HBitLinear:
        z = hadamard(torch.cat((z, torch.zeros(2, 5, 64 - width)), dim=-1))
    W = layer.weight
    reference = through(z, activation_a2(z, bits)) @ through(W, ternary_a1(W)).T
    assert_close(layer(x), reference, rtol=1e-4, atol=1e-5)
    g = torch.randn_like(reference)
    for a, b in zip(torch.autograd.grad(layer(x), (x, W), g), torch.autograd.grad(reference, (x, W), g)):
        assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a3_layer_normalizes_before_it_pads():
    """Padding first would count the zeros into mean and variance."""
    layer, x = HBitLinear(48, 8, linear_norm='layernorm'), torch.randn(3, 48) + 5
    assert_close(layer.prepare(x).norm(dim=-1), torch.full((3,), 48 ** 0.5), rtol=1e-3, atol=0)


def test_a3_hadamard_helps_four_bits_to_bear_an_outlier():
    """A2 at 4 bits rounds everything beside the outlier away; after the transform, it does not."""
    x = torch.randn(32, 512)
    x[:, 77] = 100.0
    error = (activation_quant_ste(x, 4) - x).norm()
    transformed = HBitLinear(512, 1).prepare(x)
    error_h = (activation_quant_ste(transformed, 4) - transformed).norm()
    assert error_h < error / 2


@pytest.mark.parametrize('kind, cls', [('fp', nn.Linear), ('bitlinear', BitLinear), ('hbitlinear', HBitLinear)])
def test_a3_make_linear_kinds(kind, cls):
    layer = make_linear(kind, 8, 4)
    assert type(layer) is cls and layer(torch.randn(3, 8)).shape == (3, 4)
    assert [name for name, _ in layer.named_parameters()] == ['weight']  # no bias


@pytest.mark.parametrize('wrong', [dict(act_bits=3), dict(act_bits=16), dict(linear_norm='batchnorm')], ids=str)
@pytest.mark.parametrize('cls', [BitLinear, HBitLinear])
def test_a3_layers_refuse_wrong_settings(cls, wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        cls(8, 4, **wrong)


# --------------------------------------------------------------------------------------------------------------------
# A8

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


def test_a8_hardly_reaches_the_weights():
    """The mean over all weights leaves each of them a gradient that cross-entropy drowns: Paper A's sweep of lambda_q
    compares runs that are the same but for rounding."""
    model = BitSkip(BitSkipConfig(vocab_size=256, block_size=64, n_head=4, n_kv_head=2, n_embd=128, ffn_dim=512))
    _, losses = model(*torch.randint(256, (2, 4, 64)))
    weights = [layer.weight for layer in model.linears()]
    ce, quant = (torch.cat([grad.flatten() for grad in torch.autograd.grad(losses[name], weights, retain_graph=True)])
                 for name in ('ce', 'quant'))
    assert 0 < 0.2 * quant.norm() < 1e-4 * ce.norm()  # 0.2: the largest lambda_q of Table 7


def test_a8_is_zero_without_quantized_matrices():
    assert quantization_loss(nn.Linear(3, 3)) == 0


def test_a8_zero_is_on_the_models_device():
    """A full-precision model on a GPU: the losses are stacked for the log, which takes one device."""
    assert quantization_loss(nn.Linear(3, 3, device='meta')).device.type == 'meta'


# --------------------------------------------------------------------------------------------------------------------
# latent weights

def test_latent_weights_compute_with_w_and_leave_the_activations_quantized():
    layer, x = BitLinear(16, 8), torch.randn(3, 16)
    ternary = layer(x)
    with latent_weights(layer) as same:
        assert same is layer
        assert_close(layer(x), F.linear(activation_a2(x, 8), layer.weight))
        assert_close(project(x, [layer])[0], layer(x))
    assert torch.equal(layer(x), ternary) and not torch.allclose(F.linear(x, layer.weight), ternary, rtol=0.05)


def test_latent_weights_restore_after_an_exception():
    model = nn.Sequential(BitLinear(8, 8), HBitLinear(8, 8))
    with pytest.raises(ZeroDivisionError), latent_weights(model):
        assert all(layer.latent for layer in bit_linears(model))
        raise ZeroDivisionError
    assert not any(layer.latent for layer in bit_linears(model))


def test_latent_weights_refuse_a_frozen_layer():
    """It has none any more; computing with the ternary ones under that name would be a silent fallback."""
    layer = BitLinear(8, 8)
    layer.freeze()
    with pytest.raises(ValueError, match='latent'), latent_weights(layer):
        layer(torch.randn(2, 8))


@both_products
def test_a1_frozen_layers_compute_the_same(product, use_product):
    use_product(product)
    for layer in (BitLinear(48, 24, act_bits=4), HBitLinear(48, 24, linear_norm='layernorm')):
        x = torch.randn(2, 5, 48)
        expected = layer(x).detach()
        layer.freeze()
        assert_close(layer(x), expected)
        assert layer.frozen and not list(layer.parameters())


def test_latent_weights_nest():
    """The inner block ends with what it found, not with ternary weights in the middle of the outer one."""
    layer = BitLinear(8, 8)
    with latent_weights(layer):
        with latent_weights(layer):
            pass
        assert layer.latent
    assert not layer.latent


# --------------------------------------------------------------------------------------------------------------------
# storage

@pytest.mark.parametrize('k', range(1, 41))
def test_pack_round_trip(k):
    codes = torch.randint(-1, 2, (9, k), dtype=torch.int8)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (9, (k + 4) // 5)
    unpacked = unpack_ternary(packed, k)
    assert unpacked.dtype == torch.int8 and torch.equal(unpacked, codes)


def test_pack_layout():
    """byte = sum of 3^i (c_i + 1), the first column lowest, zeros (digit 1) behind the last one."""
    codes = torch.tensor([[1, 0, -1, 1, 1, 0, -1], [-1, -1, -1, -1, -1, 1, 1]], dtype=torch.int8)
    expected = [[2 + 3 * 1 + 9 * 0 + 27 * 2 + 81 * 2, 1 + 3 * 0 + 9 + 27 + 81], [0, 2 + 3 * 2 + 9 + 27 + 81]]
    assert pack_ternary(codes).tolist() == expected


def test_pack_uses_each_byte_up_to_242_once():
    every = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * 5)  # all 3^5 quintuples
    assert pack_ternary(every).flatten().sort().values.tolist() == list(range(243))


@pytest.mark.parametrize('k', [512, 2048])
def test_pack_takes_at_most_1_61_bits_a_weight(k):
    assert pack_ternary(torch.zeros(4, k, dtype=torch.int8)).numel() * 8 / (4 * k) <= 1.61


def test_pack_restores_a_layers_weight():
    codes, scale = weight_ternary(BitLinear(48, 24).weight)
    assert torch.equal(unpack_ternary(pack_ternary(codes), 48) * scale, codes * scale)


@pytest.mark.parametrize('code', [-128, -2, 2, 127])
def test_pack_refuses_other_codes(code):
    with pytest.raises(ValueError, match='-1, 0 and 1'):
        pack_ternary(torch.tensor([[0, code, 1]], dtype=torch.int8))


def test_unpack_refuses_what_was_not_packed():
    for k in (5, 11):
        with pytest.raises(ValueError, match=f'{k} columns take'):
            unpack_ternary(torch.zeros(2, 2, dtype=torch.uint8), k)
    with pytest.raises(ValueError, match='over 242'):
        unpack_ternary(torch.tensor([[0, 243]], dtype=torch.uint8), 10)


def test_int8_fits_only_where_supported(use_product):
    x, w = torch.zeros(3, 8), torch.zeros(4, 8)
    use_product('integer')
    assert quant.int8_fits(x, w)
    use_product('fake')
    assert not quant.int8_fits(x, w)


# --------------------------------------------------------------------------------------------------------------------
# the authors' order, for comparison

def test_hadamard_after_is_the_authors_order():
    """y = H' W^ H' Q(x) with H' = sqrt(n) H of gain sqrt(n), 6 features padded to 8, 3 outputs cut from 4."""
    scipy_linalg = pytest.importorskip('scipy.linalg')
    layer, x = HadamardAfter(6, 3), torch.randn(5, 6)
    H = [torch.tensor(scipy_linalg.hadamard(n), dtype=torch.float32) for n in (8, 4)]
    x_hat = F.pad(activation_quant_ste(x), (0, 2))
    codes, scale = layer.ternary()
    assert_close(layer(x), (x_hat @ H[0].T @ (codes * scale).T @ H[1].T)[:, :3])


def test_hadamard_after_cannot_be_packed():
    with pytest.raises(ValueError, match='cannot be packed'):
        HadamardAfter(4, 4).freeze()
