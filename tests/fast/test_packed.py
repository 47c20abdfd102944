"""Packed models: the same numbers by every way to compute them, small files, and a reason where a
model cannot be packed."""
import math

import pytest
import torch
from torch.testing import assert_close

import fast
import quant
from fast import native, triton_ternary
from fast.packed import Int8Embedding, Int8Head, PackedLinear, load_packed, packed_state, to_ternary
from model import BitSkip, BitSkipConfig
from quant import BitLinear, activation_quant, weight_ternary

HERE = 'tests.fast.test_packed'

class Rows(BitLinear):  # one scale a row
    def ternary(self):
        w = self.weight.detach()
        scale = w.abs().mean(dim=1, keepdim=True)
        return (w / scale).round().clamp(-1, 1).to(torch.int8), scale

class Groups(BitLinear):  # one scale for each half of a row
    def ternary(self):
        codes, scale = weight_ternary(self.weight)
        return codes, scale.expand(len(codes), 2)

class Shifted(BitLinear):  # an own way to prepare the input
    def prepare(self, x):
        return super().prepare(x).roll(1, dims=-1)

class TwoNorms(BitSkip):
    def exit_state(self, h, layer):
        return self.norm(self.norm(h))

KINDS = [dict(linear='bitlinear'), dict(linear='hbitlinear', hadamard_layers='o,down'),
         dict(linear='hbitlinear', vocab_size=32), dict(linear=f'{HERE}:Rows', vocab_size=32),
         dict(linear=f'{HERE}:Shifted', exit_norm='raw'),
         dict(linear='bitlinear', act_bits=4, linear_norm='rmsnorm', ffn='swiglu', norm='rmsnorm',
              sub_norm=False, exit_norm='none')]
kinds = pytest.mark.parametrize('kind', KINDS, ids=lambda kind: '-'.join(map(str, kind.values())))
heads = pytest.mark.parametrize('head', ['int8', 'fp32'])

@pytest.fixture(params=['int8 products', 'float products', '2-bit products'])
def path(request, monkeypatch):
    """Each way to compute a ternary product, whatever this machine prefers."""
    int8 = request.param != 'float products'
    monkeypatch.setattr(quant, 'int8_support', lambda device_type: (int8, 'forced'))
    if request.param == '2-bit products':
        def plain(x_codes, two_bit, k, x_scale, w_scale):
            codes = triton_ternary.unpack_2bit(two_bit, k)
            return (x_codes.int() @ codes.int().t()) * (x_scale * w_scale.reshape(-1))
        monkeypatch.setattr(triton_ternary, 'available', lambda device_type: (True, 'forced'))
        monkeypatch.setattr(triton_ternary, 'ternary_matmul', plain)
    return request.param

@pytest.mark.parametrize('rows, columns', [(24, 24), (40, 24), (1, 24), (24, 1)])
@pytest.mark.parametrize('n', [0, 1, 20])
def test_every_part_by_its_formula(path, rows, columns, n):
    """Where torch._int_mm did not serve, the head's scales met its columns instead of its rows: an
    error, and silently wrong logits for as many words as columns (V = C)."""
    x, w = torch.randn(2, n, columns), torch.randn(rows, columns) * torch.rand(rows, 1)
    codes, scale = activation_quant(x)
    x_hat = (codes * scale).double()

    def w_hat(part):
        return part.codes.double() * part.scale.double().view(rows, 1)
    head, embedding, idx = Int8Head(w), Int8Embedding(w), torch.randint(rows, (2, 5))
    assert_close(head(x).double(), x_hat @ w_hat(head).t(), rtol=1e-5, atol=1e-5)
    assert (w_hat(head) - w).abs().amax() <= head.scale.max() * 0.501
    assert_close(embedding(idx).double(), w_hat(embedding)[idx])
    for kind in (BitLinear, Rows):
        layer = kind(columns, rows)
        layer.weight.data.copy_(w)
        small = PackedLinear(layer, *layer.ternary())
        codes, scale = layer.ternary()
        expected = x_hat @ (codes * scale).double().t()
        assert_close(small(x).double(), expected, rtol=1e-5, atol=1e-5)

@kinds
def test_projections_are_those_that_were_trained(make_model, tokens, path, kind):
    """With a float32 head nothing is rounded: the same logits at every exit, the same text."""
    model = make_model(**kind)
    small = to_ternary(model, head='fp32')
    for layer in range(3):
        assert_close(small(tokens(), exit_layer=layer)[0], model(tokens(), exit_layer=layer)[0],
                     rtol=1e-5, atol=1e-5)
    options = dict(temperature=0, exit_mode='confidence', exit_threshold=0.2)
    assert torch.equal(small.generate(tokens(), 12, **options),
                       model.generate(tokens(), 12, **options))

@heads
def test_causality_of_the_packed_model(make_model, tokens, path, head):
    """A changed token leaves every earlier logit as it was, bit for bit."""
    small, idx = to_ternary(make_model(linear='hbitlinear'), head), tokens(2, 12)
    for t in (1, 6, 11):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 31
        for layer in range(3):
            a, b = small(idx, exit_layer=layer)[0], small(changed, exit_layer=layer)[0]
            assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t], b[:, t])

@kinds
@heads
def test_storage_round_trip(make_model, tokens, kind, head):
    """Old files hold one scale a row of the head as (V,)."""
    small = to_ternary(make_model(**kind), head)
    state = packed_state(small)
    old = {name: t.flatten() if name in ('head.scale', 'embedding.scale') else t
           for name, t in state.items()}
    for contents in (state, old):
        restored = load_packed({'settings': vars(small.config), 'model': contents})
        assert torch.equal(restored(tokens())[0], small(tokens())[0])
        assert not restored.training and not any(p.requires_grad for p in restored.parameters())

def test_storage_takes_1_61_bits_a_weight_and_62_mb_for_paper_a():
    small = to_ternary(BitSkip(BitSkipConfig()))
    state = packed_state(small)
    codes = sum(state[f'{name}.codes'].numel() for name, layer in small.named_modules()
                if isinstance(layer, PackedLinear))
    assert codes * 8 / small.quantizable_parameters() <= 1.61
    assert sum(t.nbytes for t in state.values()) <= 62e6

def test_the_int8_head_costs_little_and_the_original_stays(make_model, tokens):
    model = make_model()
    before, codes = model(tokens())[0], model.blocks[0].attn.q.ternary()[0]
    small = to_ternary(model)
    error = (small(tokens())[0] - before).norm() / before.norm()
    assert 0 < error < 0.05 and to_ternary(small) is small
    assert not [name for name, _ in small.named_parameters() if '.q.' in name]
    assert small.blocks[0].attn.q.codes.dtype == torch.int8
    assert torch.equal(small.blocks[0].attn.q.ternary()[0], codes)
    assert small.quantizable_parameters() == model.quantizable_parameters()
    assert torch.equal(model(tokens())[0], before)

def test_codes_follow_the_device(make_model, tokens, monkeypatch):
    """2-bit codes come with the first product on a device that has these, and go without them."""
    small = to_ternary(make_model())
    layer, state = small.blocks[0].attn.q, packed_state(small)
    for two_bit in (True, False):
        monkeypatch.setattr(triton_ternary, 'available', lambda _, two_bit=two_bit: (two_bit, ''))
        monkeypatch.setattr(triton_ternary, 'ternary_matmul', lambda x, *_: torch.zeros(len(x), 32))
        layer(torch.zeros(1, 32))
        assert layer.codes.numel() == (32 * 32 // 4 if two_bit else 32 * 32)
        assert all(torch.equal(t, state[name]) for name, t in packed_state(small).items())

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_weights_of_any_kind_of_float(make_model, tokens, dtype):
    """A bfloat16 model is packed in float32, and decodes as its weights say."""
    model = make_model().to(dtype)
    ours = to_ternary(model)(tokens())[0]
    assert_close(ours, to_ternary(model.float())(tokens())[0])
    if native.available()[0]:
        logits = native.Decoder(model.to(dtype), margin=math.inf).step(tokens(1), n_logits=8)[0]
        assert_close(logits, ours[:1].flatten(0, 1), rtol=0, atol=1e-4)

def test_refusals(make_model):
    model = make_model()
    with quant.latent_weights(model), pytest.raises(ValueError, match='latent'):
        to_ternary(model)
    state, settings = packed_state(to_ternary(model)), vars(model.config)
    for wrong in ({'blocks.0.attn.q.codes': state['blocks.0.attn.k.codes']},
                  {'blocks.0.attn.q.scale': torch.ones(32)}):
        with pytest.raises((ValueError, RuntimeError)):
            load_packed({'settings': settings, 'model': state | wrong})

@pytest.mark.parametrize('settings, why', [
    (dict(linear='fp'), 'FullPrecision has no ternary weights'),
    (dict(linear=f'{HERE}:Groups'), r'a scale of shape \(32, 2\)'),
    (dict(Model=TwoNorms), 'TwoNorms has its own exit_state')], ids=str)
def test_what_cannot_be_packed_is_decoded_as_it_is(make_model, settings, why):
    model = make_model(**settings)
    same, decoder, how = fast.quick_decoder(model)
    assert same is model and decoder is None and how.startswith('PyTorch, weights as trained')
    for layer in quant.bit_linears(same):  # W^ is found once
        assert layer.ternary()[0] is layer.ternary()[0]
    with pytest.raises(ValueError, match=why):
        to_ternary(model)

def test_without_c_packed_weights_decode_in_pytorch(make_model, monkeypatch):
    small, decoder, how = fast.quick_decoder(make_model(linear=f'{HERE}:Shifted'))
    assert decoder is None and isinstance(small.blocks[0].attn.q, PackedLinear)
    assert how.startswith('PyTorch, packed weights, int8 head; not in C: ')
    monkeypatch.setattr(native, 'library', lambda: (None, 'there is no compiler'))
    small, decoder, how = fast.quick_decoder(make_model())
    assert decoder is None and isinstance(small.head, Int8Head)
    assert how == 'PyTorch, packed weights, int8 head; not in C: there is no compiler'
