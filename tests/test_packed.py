"""The packed model: smaller, quicker, and the same."""
import pytest
import torch
from torch.testing import assert_close

import quant
from eval_exits import evaluate
from model import BitSkip, BitSkipConfig
from packed import int8_rows, load_packed, packed_state, to_ternary
from quant import bit_linears

KINDS = [dict(linear='bitlinear'), dict(linear='hbitlinear'), dict(linear='hbitlinear', hadamard_layers='o,down'),
         dict(linear='bitlinear', act_bits=4, linear_norm='rmsnorm', ffn='swiglu', norm='rmsnorm', sub_norm=False)]
kinds = pytest.mark.parametrize('kind', KINDS, ids=lambda kind: '-'.join(map(str, kind.values())))


@kinds
@pytest.mark.parametrize('product', ['integer', 'fake'])
def test_projections_are_those_that_were_trained(make_model, tokens, use_product, kind, product):
    """With a float32 head nothing is rounded: same logits at every exit, same greedy text."""
    use_product(product)
    model = make_model(**kind)
    packed = to_ternary(model, head='fp32')
    for layer in range(3):
        assert_close(packed(tokens(), exit_layer=layer)[0], model(tokens(), exit_layer=layer)[0], rtol=1e-5, atol=1e-5)
    for options in ({}, {'exit_layer': 1}, {'exit_mode': 'confidence', 'exit_threshold': 0.2}):
        assert torch.equal(packed.generate(tokens(), 12, temperature=0, **options),
                           model.generate(tokens(), 12, temperature=0, **options))


def test_latent_weights_are_gone_and_the_original_is_untouched(make_model, tokens):
    model = make_model()
    before = model(tokens())[0]
    packed = to_ternary(model)
    assert not [name for name, _ in packed.named_parameters() if 'attn.' in name and 'norm' not in name]
    assert all(layer.codes.dtype == torch.int8 for layer in bit_linears(packed))
    assert torch.equal(model(tokens())[0], before)
    assert packed.quantizable_parameters() == model.quantizable_parameters()


def test_int8_rows_are_within_half_a_step():
    w = torch.randn(50, 16) * torch.logspace(-3, 3, 50)[:, None]
    codes, scale = int8_rows(w)
    assert codes.dtype == torch.int8 and codes.abs().amax(dim=1).tolist() == [127] * 50
    assert ((codes * scale[:, None] - w).abs() <= scale[:, None] * 0.5001).all()


@kinds
def test_int8_head_costs_little(make_model, tokens, kind):
    """Its loss is within 1% of the float32 head's on a model that has something to lose."""
    model = make_model(**kind)
    text = torch.randint(31, (400,)).numpy().astype('uint16')
    for exact, rounded in zip(evaluate(model, text, [0, 1, 2]), evaluate(to_ternary(model), text, [0, 1, 2])):
        assert exact != rounded and rounded == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize('head', ['int8', 'fp32'])
@kinds
def test_storage_round_trip(make_model, tokens, kind, head):
    packed = to_ternary(make_model(**kind), head)
    restored = load_packed(packed.config, packed_state(packed))
    assert torch.equal(restored(tokens())[0], packed(tokens())[0])


def test_storage_takes_1_61_bits_a_weight_and_62_mb_for_paper_a():
    packed = to_ternary(BitSkip(BitSkipConfig()))
    state = packed_state(packed)
    codes = sum(state[f'{name}.codes'].numel() for name, _ in packed.blocks.named_modules(prefix='blocks')
                if f'{name}.codes' in state)
    assert codes * 8 / packed.quantizable_parameters() <= 1.61
    assert sum(t.numel() * t.element_size() for t in state.values()) <= 62e6


@kinds
@pytest.mark.parametrize('head', ['int8', 'fp32'])
def test_causality_of_the_packed_model(make_model, tokens, kind, head):
    """The gate: a changed token leaves every earlier logit as it was, bit for bit."""
    model, idx = to_ternary(make_model(ee_adapter=3, **kind), head), tokens(2, 12)
    for t in range(1, 12):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 31
        for layer in range(3):
            a, b = model(idx, exit_layer=layer)[0], model(changed, exit_layer=layer)[0]
            assert torch.equal(a[:, :t], b[:, :t]) and not torch.equal(a[:, t], b[:, t])


def test_refusals(make_model):
    with pytest.raises(ValueError, match='full-precision'):
        to_ternary(make_model(linear='fp'))
    with pytest.raises(ValueError, match="'int8' or 'fp32'"):
        to_ternary(make_model(), head='int4')
    packed = to_ternary(make_model())
    state = packed_state(packed) | {'blocks.0.attn.q.codes': torch.full((32, 7), 255, dtype=torch.uint8)}
    with pytest.raises(ValueError, match='over 242'):
        load_packed(packed.config, state)


def test_codes_follow_the_device(make_model, tokens, monkeypatch):
    """Where 2-bit products are available frozen codes become 2-bit ones at the first product, and int8 again where they
    are not: same logits, same file. (The kernel itself is tested in test_triton.py.)"""
    packed = to_ternary(make_model())
    layer, logits = packed.blocks[0].attn.q, packed(tokens())[0]

    def plain(x_codes, codes, k, x_scale, w_scale):
        assert codes.dtype == torch.uint8
        return (x_codes.float() @ quant.unpack_2bit(codes, k).float().t()) * (x_scale * w_scale)
    with monkeypatch.context() as patch:
        patch.setattr(quant.triton_ternary, 'available', lambda device_type: (True, 'as if on a GPU'))
        patch.setattr(quant, 'ternary_matmul', plain)
        assert_close(packed(tokens())[0], logits)
        assert layer.two_bit and layer.codes.numel() == 32 * 32 // 4
        assert torch.equal(load_packed(packed.config, packed_state(packed))(tokens())[0], packed(tokens())[0])
    assert torch.equal(packed(tokens())[0], logits) and not layer.two_bit
