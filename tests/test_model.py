"""The model: sizes, losses (A7 and its parts), exits, skipping."""
import math
from dataclasses import fields
from typing import Literal, get_origin, get_type_hints

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import KINDS, all_exits
from torch.testing import assert_close

import decode
from decode import KVCache
from exits import sample_exits
from model import BitSkip, BitSkipConfig, rope_table, rotate
from quant import BitLinear, HBitLinear, bit_linears

PAPER_B = dict(n_layer=24, n_embd=2048, n_head=32, n_kv_head=8, ffn_dim=4096, ffn='swiglu', norm='rmsnorm',
               sub_norm=False, gate_dim=0)


# --------------------------------------------------------------------------------------------------------------------
# sizes

@pytest.mark.parametrize('settings, quantizable, total', [
    (dict(), 34_603_008, 86.3e6), (PAPER_B, 855_638_016, 1.061e9)], ids=['paper A', 'paper B'])
@pytest.mark.parametrize('kind', KINDS)
def test_parameter_counts_of_the_papers(settings, quantizable, total, kind):
    """Table 1 and the appendix of Paper A, Table 2 of Paper B. Widths are powers of two, so Hadamard adds nothing."""
    with torch.device('meta'):
        model = BitSkip(BitSkipConfig(**settings, linear=kind))
    assert model.quantizable_parameters() == quantizable
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=1e-3)
    assert model.embedding.weight is not model.head.weight  # the head is not tied
    assert all(isinstance(layer, BitLinear) == (kind != 'fp') for layer in model.linears())
    assert not any('bias' in name for name, _ in model.named_parameters())


def test_norms_and_gates_are_the_0_2m_of_paper_a():
    with torch.device('meta'):
        model = BitSkip(BitSkipConfig())
    rest = sum(p.numel() for p in model.parameters()) - model.quantizable_parameters() - 2 * 50257 * 512
    assert round(rest / 1e6, 1) == 0.2


@pytest.mark.parametrize('where, transformed', [('all', {'q', 'k', 'v', 'o', 'gate', 'up', 'down'}),
                                                ('o,down', {'o', 'down'})])
def test_a3_hadamard_layers(make_model, where, transformed):
    """Everywhere (the papers), or on the inputs of o and down alone, where the outliers are (BitNet v2)."""
    model = make_model(linear='hbitlinear', hadamard_layers=where, ffn='swiglu')
    for block in model.blocks:
        layers = {**dict(block.attn.named_children()), **dict(block.ffn.named_children())}
        assert {name for name, layer in layers.items() if isinstance(layer, HBitLinear)} == transformed
        assert {name for name, layer in layers.items() if isinstance(layer, BitLinear)} \
            == {'q', 'k', 'v', 'o', 'gate', 'up', 'down'}


@pytest.mark.parametrize('wrong', [
    dict(vocab_size=0), dict(block_size=0), dict(n_layer=0), dict(n_head=0), dict(n_kv_head=0), dict(n_embd=0),
    dict(ffn_dim=0), dict(n_embd=36, n_head=8), dict(n_embd=8, n_head=8), dict(n_head=8, n_kv_head=3),
    dict(act_bits=6), dict(p_max=-0.1), dict(p_max=1.1), dict(p_max=math.nan), dict(dropout=1.0), dict(gate_dim=-1),
    dict(gate_dim=2 ** 62), dict(ee_adapter=-1), dict(ee_adapter=2 ** 62), dict(lambda_ee=-1.0), dict(lambda_q=-1.0),
    dict(lambda_r=math.nan)], ids=str)
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match=list(wrong)[0]):
        BitSkipConfig(**wrong)


CHOICES = [name for name, hint in get_type_hints(BitSkipConfig).items() if get_origin(hint) is Literal]


@pytest.mark.parametrize('name', CHOICES)
def test_config_refuses_what_is_not_a_choice(name):
    """BitSkipConfig(ffn='swigul') must not be a relu2 model: no silent fallback."""
    with pytest.raises(ValueError, match=name):
        BitSkipConfig(**{name: 'typo'})


def test_config_of_larger_settings():
    config = BitSkipConfig.of({'n_layer': 3, 'linear': 'fp', 'learning_rate': 1.0, 'dataset': 'pydocs'})
    assert config == BitSkipConfig(n_layer=3, linear='fp')
    assert BitSkipConfig.of(BitSkip(BitSkipConfig(n_layer=1, vocab_size=8)).settings()).vocab_size == 8
    assert len(CHOICES) > 5 and set(CHOICES) < {field.name for field in fields(BitSkipConfig)}


def test_target_exit_is_half_of_the_layers_unless_given():
    """It was 6 at any depth, which gates of six layers or less cannot reach; what was trained so still loads."""
    assert [BitSkipConfig(n_layer=n).target_exit for n in (1, 3, 12, 24)] == [0, 1, 6, 12]
    assert BitSkipConfig.of({'n_layer': 3, 'target_exit': 6}).target_exit == 6


# --------------------------------------------------------------------------------------------------------------------
# parts

def test_rope_depends_on_relative_positions_only():
    """The product of q at position m and k at n is one function of m - n."""
    rope = rope_table(8, 16, 10000.0)
    q, k = (rotate(torch.randn(8).expand(1, 1, 16, 8), rope)[0, 0] for _ in range(2))
    products = q @ k.T  # (m, n)
    for offset in range(-15, 16):
        diagonal = products.diagonal(offset)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    assert products[0].std() > 0.1  # and not of nothing


def test_rope_of_a_model_has_the_base_of_its_settings(make_model):
    rope = make_model(rope_theta=50.0).rope(3, 5)
    for ours, whole in zip(rope, rope_table(8, 16, 50.0)):
        assert torch.equal(ours, whole[3:8])


def test_rope_is_the_rotation_of_complex_numbers():
    """(x_i + i x_{i + D/2}) exp(i t theta^(-2i/D))"""
    x = torch.randn(2, 3, 5, 8)
    z = torch.complex(x[..., :4], x[..., 4:])
    turn = torch.exp(1j * torch.arange(5)[:, None] * 100.0 ** (-torch.arange(4) / 4))
    assert_close(rotate(x, rope_table(8, 5, 100.0)), torch.cat(((z * turn).real, (z * turn).imag), dim=-1))


@pytest.mark.parametrize('sub_norm', [True, False])
@pytest.mark.parametrize('n_kv_head', [1, 2, 4])
def test_gqa_is_attention_with_repeated_heads(make_model, n_kv_head, sub_norm):
    """Query head i attends with key and value head i // (n_head / n_kv_head), causally; SubLN sits before o."""
    attention = make_model(linear='fp', n_kv_head=n_kv_head, sub_norm=sub_norm).blocks[0].attn
    x, rope, heads = torch.randn(2, 6, 32), rope_table(8, 6, 10000.0), []
    q, k, v = (x @ layer.weight.T for layer in (attention.q, attention.k, attention.v))
    for i in range(4):
        j = i // (4 // n_kv_head)
        q_i, k_j, v_j = q[..., 8 * i:8 * i + 8], k[..., 8 * j:8 * j + 8], v[..., 8 * j:8 * j + 8]
        scores = rotate(q_i, rope) @ rotate(k_j, rope).mT / 8 ** 0.5
        heads.append(scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf).softmax(-1) @ v_j)
    y = torch.cat(heads, dim=-1)
    if sub_norm:
        y = F.layer_norm(y, (32,), attention.sub_norm.weight)
    assert_close(attention(x, rope), y @ attention.o.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
@pytest.mark.parametrize('sub_norm', [True, False])
@pytest.mark.parametrize('ffn', ['relu2', 'swiglu'])
def test_ffn_is_the_formula(make_model, ffn, sub_norm, norm):
    """down(SubLN(relu(up x)^2)) (A3's squared ReLU) or down(SubLN(silu(gate x) up x))."""
    layer, x = make_model(linear='fp', ffn=ffn, norm=norm, sub_norm=sub_norm).blocks[0].ffn, torch.randn(2, 5, 32)
    up = x @ layer.up.weight.T
    if ffn == 'relu2':
        y = up.clamp(min=0) ** 2
    else:
        gate = x @ layer.gate.weight.T
        y = gate * torch.sigmoid(gate) * up
    if sub_norm:
        y = y - y.mean(-1, keepdim=True) if norm == 'layernorm' else y
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.sub_norm.weight
    assert_close(layer(x), y @ layer.down.weight.T, rtol=1e-4, atol=1e-5)


def test_subln_and_gates_are_optional(make_model):
    for sub_norm, count in ((True, 2 * 3), (False, 0)):
        names = [name for name, _ in make_model(sub_norm=sub_norm).named_parameters()]
        assert sum('sub_norm' in name for name in names) == count
    assert len(make_model(gate_dim=8).gates) == 2 and len(make_model(gate_dim=0).gates) == 0


def test_init_scales_down_what_writes_to_the_residual_stream():
    model = BitSkip(BitSkipConfig(vocab_size=500, n_layer=8, n_embd=128, ffn_dim=256, gate_dim=0))
    for name, p in model.named_parameters():
        expected = 0.02 / 4 if name.endswith(('attn.o.weight', 'ffn.down.weight')) else 0.02  # 4 = sqrt(2 L)
        assert (p == 1).all() if p.dim() == 1 else p.std().item() == pytest.approx(expected, rel=0.1)


def test_both_products_make_the_same_model(make_model, tokens, use_product):
    logits = {}
    for how in ('integer', 'fake'):
        use_product(how)
        logits[how] = make_model(linear='hbitlinear')(tokens())[0]
    assert (logits['integer'] - logits['fake']).norm() < 0.01 * logits['fake'].norm()


# --------------------------------------------------------------------------------------------------------------------
# the forward contract and the losses

@pytest.mark.parametrize('training', [True, False])
def test_forward_contract(make_model, tokens, training):
    model = make_model(lambda_ee=0.3, p_max=0.5).train(training)
    idx, targets = tokens(2, 8), tokens(2, 8, seed=1)
    logits, nothing = model(idx)
    assert logits.shape == (2, 8, 31) and nothing is None
    logits, losses = model(idx, targets)
    assert logits.shape == (2, 8, 31) and list(losses) == ['total', 'ce', 'ee', 'quant', 'route']
    assert all(loss.shape == () and loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert losses['total'].requires_grad
    assert model(idx, targets, return_logits=False)[0] is None


def test_targets_are_shifted_already(make_model, tokens):
    """targets[:, t] is what logits[:, t] predict: the model shifts nothing."""
    idx = tokens(3, 9)
    logits, losses = make_model()(idx[:, :-1], idx[:, 1:])
    assert_close(losses['ce'], F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()))


def reference_losses(model, idx, targets):
    """A4, A6-A9 and B6 as they are printed, on the states h_l of the model."""
    c, L = model.config, model.config.n_layer
    states = list(model.hidden_states(idx))

    def ce(layer):
        h, is_exit = states[layer], layer < L - 1
        if is_exit and c.ee_adapter:
            adapter = model.adapters[layer]
            h = h + F.layer_norm(h, (c.n_embd,)) @ adapter.a.weight.T @ adapter.b.weight.T
        h = h if is_exit and c.exit_norm == 'none' else model.norm(h)
        return F.cross_entropy(model.head(h).flatten(0, 1), targets.flatten())

    w = [{'early': L - layer, 'late': layer + 1, 'uniform': 1}[c.ee_weighting] for layer in range(L - 1)]
    ee = sum(w_l / sum(w) * ce(layer) for layer, w_l in enumerate(w))  # A4, B6

    matrices = [layer.weight for layer in model.linears() if isinstance(layer, BitLinear)]
    quant = 0
    for W in matrices:  # A8
        alpha = W.detach().abs().mean()
        quant = quant + (W - alpha * (W.detach() / alpha).round().clip(-1, 1)).square().mean() / len(matrices)

    E, stay = 0, 1
    for layer, gate in enumerate(model.gates):  # A6, A9
        norm = F.layer_norm(states[layer], (c.n_embd,))
        p = torch.sigmoid((norm @ gate.w1.weight.T).relu() @ gate.w2.weight.T)[..., 0]
        E, stay = E + layer * p * stay, stay * (1 - p)
    route = ((E + (L - 1) * stay).mean() - c.target_exit) ** 2

    total = ce(L - 1) + c.lambda_ee * ee + c.lambda_q * quant + c.lambda_r * route  # A7
    return dict(total=total, ce=ce(L - 1), ee=ee, quant=quant, route=route)


@pytest.mark.parametrize('kind', ['bitlinear', 'hbitlinear'])
@pytest.mark.parametrize('settings', [{}, dict(ee_weighting='late'), dict(exit_norm='none'), dict(ee_adapter=3),
                                      dict(ee_weighting='uniform', exit_norm='none', ee_adapter=3, n_layer=4),
                                      dict(final_norm=False)], ids=str)
def test_a7_losses_and_gradients_are_the_formulas(make_model, tokens, kind, settings):
    model = make_model(linear=kind, lambda_ee=0.3, lambda_q=0.7, lambda_r=0.2, **settings)
    idx, targets, parameters = tokens(), tokens(seed=1), list(model.parameters())
    losses, reference = model(idx, targets)[1], reference_losses(model, idx, targets)
    for name, loss in losses.items():
        assert_close(loss, reference[name], msg=lambda m, name=name: f'{name}: {m}')
    for name, loss in losses.items():
        for a, b in zip(torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True),
                        torch.autograd.grad(reference[name], parameters, retain_graph=True, materialize_grads=True)):
            assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('share, distill', [(1.0, 0.0), (0.3, 0.0), (1.0, 0.7)])
def test_a4_sampled_exits_are_unbiased_in_loss_and_gradient(make_model, tokens, share, distill):
    """Each exit learns from its own random share of the tokens; the mean over many draws is A4 on all of them, to
    four standard errors, and no draw is."""
    exact = make_model(lambda_ee=1.0, ee_distill=distill)
    sampled = make_model(lambda_ee=1.0, ee_positions='sampled', ee_share=share, ee_distill=distill).train()
    idx, targets = tokens(4, 8), tokens(4, 8, seed=1)

    def loss_and_gradient(model):
        loss = model(idx, targets)[1]['ee']
        return torch.cat((loss[None], torch.autograd.grad(loss, model.blocks[0].attn.v.weight)[0].flatten())).detach()
    expected, draws = loss_and_gradient(exact), torch.stack([loss_and_gradient(sampled) for _ in range(400)])
    error = (draws.mean(dim=0) - expected) / (draws.std(dim=0) / 20 + 1e-9)
    assert error[0].abs() < 4 and error.square().mean() < 1.5
    assert (draws[:, 0] != expected[0]).all()


@pytest.mark.parametrize('share, dealt', [(1.0, 100), (0.3, 30), (0.01, 3)])
def test_a4_tokens_are_dealt_out_once(make_model, share, dealt):
    """As many as ee_share says, but one to each exit at least."""
    shares = make_model(ee_positions='sampled', ee_share=share).deal(torch.zeros(4, 25), 3)
    assert len(torch.cat(shares).unique()) == sum(map(len, shares)) == dealt
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a4_exits_of_weight_zero_are_off(make_model, tokens):
    model = make_model(lambda_ee=0.3)
    logits = all_exits(model, tokens())[1].flatten(0, 1)
    ee = model(tokens(), tokens(seed=1), ee_weights=torch.tensor([0.0, 1.0]))[1]['ee']
    assert_close(ee, F.cross_entropy(logits, tokens(seed=1).flatten()))


def test_a4_all_exits_off_is_no_exit_loss(make_model, tokens):
    assert make_model(lambda_ee=0.3)(tokens(), tokens(seed=1), ee_weights=torch.zeros(2))[1]['ee'] == 0


@pytest.mark.parametrize('weight, loss', [('lambda_ee', 'ee'), ('lambda_q', 'quant'), ('lambda_r', 'route')])
def test_a7_a_weight_of_zero_switches_its_loss_off(make_model, tokens, weight, loss):
    on, off = (make_model(**dict(lambda_ee=0.3, lambda_q=0.05, lambda_r=0.2) | change)(tokens(), tokens(seed=1))[1]
               for change in ({}, {weight: 0.0}))
    assert off[loss] == 0 and on[loss] > 0
    assert_close(on['total'] - off['total'], dict(lambda_ee=0.3, lambda_q=0.05, lambda_r=0.2)[weight] * on[loss],
                 rtol=1e-4, atol=1e-5)


def test_a9_training_uses_sampled_exits(make_model, tokens, monkeypatch):
    """In training z ~ Bernoulli(p) takes the place of p (A6): each token leaves at its first open gate, or at L-1."""
    model, idx, samples = make_model(lambda_q=0.0).train(), tokens(), []
    monkeypatch.setattr('model.sample_exits', lambda p: samples.append(sample_exits(p)) or samples[-1])
    route = model(idx, idx)[1]['route']
    z, = samples
    left_at = torch.where(z[..., 0] == 1, 0, torch.where(z[..., 1] == 1, 1, 2)).float()
    assert left_at.unique().tolist() == [0, 1, 2]
    assert_close(route, (left_at.mean() - 1) ** 2)
    route.backward()
    assert all(p.grad.any() for p in model.gates.parameters())


@pytest.mark.parametrize('detach', [False, True])
def test_a9_reaches_the_blocks_through_the_gates_unless_they_are_detached(make_model, tokens, detach):
    model = make_model(gate_detach=detach).train()
    model(tokens(), tokens())[1]['route'].backward()
    assert all(p.grad.any() for p in model.gates.parameters())
    assert any(p.grad is not None and p.grad.any() for p in model.blocks.parameters()) != detach


def test_a8_counts_in_a_model_of_one_layer(make_model, tokens):
    """One layer has no early exits, but its weights are quantized all the same."""
    losses = make_model(n_layer=1, lambda_q=0.7, target_exit=0)(tokens(), tokens(seed=1))[1]
    assert losses['quant'] > 0 and losses['ee'] == losses['route'] == 0
    assert_close(losses['total'], losses['ce'] + 0.7 * losses['quant'])


def test_a7_a_model_of_frozen_codes_still_has_its_losses(make_model, tokens):
    """Inference keeps no latent weights, so nothing is left for A8 to measure; the other losses are as before."""
    model, idx, targets = make_model(lambda_ee=0.3), tokens(), tokens(seed=1)
    expected = model(idx, targets)[1]
    for layer in bit_linears(model):
        layer.freeze()
    losses = model(idx, targets)[1]
    assert losses['quant'] == 0
    for name in ('ce', 'ee', 'route'):
        assert_close(losses[name], expected[name], rtol=1e-3, atol=1e-5)


def test_a_diverged_model_has_nan_losses(make_model, tokens):
    """Not a RuntimeError from the sampling of its gates: train.py can tell the user about a loss that is nan."""
    model = make_model().train()
    nn.init.constant_(model.embedding.weight, math.nan)
    assert model(tokens(), tokens())[1]['total'].isnan()


# --------------------------------------------------------------------------------------------------------------------
# exits

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('exit_norm', ['final', 'none'])
@pytest.mark.parametrize('k', [0, 1, 2])
def test_a4_exit_at_k_is_the_model_cut_after_block_k(make_model, tokens, kind, exit_norm, k):
    """With the final norm before the head, or without one; at the last layer there is one in any case."""
    model, idx, targets = make_model(linear=kind, exit_norm=exit_norm), tokens(), tokens(seed=1)
    logits, losses = model(idx, targets, exit_layer=k)
    assert torch.equal(logits, all_exits(model, idx)[k])
    assert_close(losses['ce'], F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert losses['total'] == losses['ce'] and losses['ee'] == losses['quant'] == losses['route'] == 0
    cut = make_model(linear=kind, n_layer=k + 1)
    cut.load_state_dict({name: p for name, p in model.state_dict().items() if name in cut.state_dict()})
    if exit_norm == 'none' and k < 2:
        cut.norm = nn.Identity()
    assert torch.equal(logits, cut(idx)[0])


def test_without_final_norm_the_head_reads_the_states(make_model, tokens):
    model, idx = make_model(linear='hbitlinear', final_norm=False), tokens()
    assert torch.equal(all_exits(model, idx), torch.stack([model.head(h) for h in model.hidden_states(idx)]))
    assert len(model.state_dict()) == len(make_model(linear='hbitlinear').state_dict()) - 1


def test_exit_at_the_last_layer_is_full_depth(make_model, tokens):
    model, idx = make_model(), tokens()
    assert torch.equal(model(idx, exit_layer=2)[0], model(idx)[0])


@pytest.mark.parametrize('layer', [-1, 3, 100])
def test_exit_outside_the_model(make_model, tokens, layer):
    with pytest.raises(ValueError, match=f'exit_layer={layer} is outside the model: its 3 layers are 0 to 2'):
        make_model()(tokens(), exit_layer=layer)


def test_more_tokens_than_block_size(make_model, tokens):
    model = make_model()
    assert model(tokens(1, 16))[0].shape == (1, 16, 31)
    with pytest.raises(ValueError, match='17 tokens do not fit into block_size=16'):
        model(tokens(1, 17))


# --------------------------------------------------------------------------------------------------------------------
# skipping

def rows_run(model):
    """A list per block that grows by the number of samples the block runs on."""
    rows = [[] for _ in model.blocks]
    for block, seen in zip(model.blocks, rows):
        block.register_forward_hook(lambda block, args, out, seen=seen: seen.append(len(args[0])))
    return rows


@pytest.mark.parametrize('layer', [0, 1])
def test_a5_skipping_a_layer_is_removing_it(make_model, tokens, layer):
    model, idx = make_model(linear='fp').train(), tokens()
    model.skip_probabilities = [float(i == layer) for i in range(3)]
    skipped = model(idx)[0]
    del model.blocks[layer]
    model.config.n_layer, model.skip_probabilities = 2, [0.0, 0.0]
    assert torch.equal(skipped, model(idx)[0])


def test_a5_each_sample_skips_alone_unchanged_and_for_free(make_model, tokens):
    """A block runs on the samples that do not skip it; the others keep their very bits, and are about p_l of all."""
    model, idx = make_model(linear='fp', n_layer=4, p_max=0.9, skip_schedule='linear').train(), tokens(400, 2)
    rope, rows = model.rope(0, 2), rows_run(model)
    before = model.embedding(idx)
    for layer, h in enumerate(model.hidden_states(idx)):
        skipped = (h == before).flatten(1).all(dim=1)
        kept = before[~skipped]
        assert rows[layer] == [len(kept)]
        assert_close(h[~skipped], model.blocks[layer](kept, rope))
        p = 0.9 * layer / 3 if layer < 3 else 0.0
        assert abs(skipped.sum() - 400 * p) <= 5 * (400 * p * (1 - p)) ** 0.5  # five standard deviations
        before = h


def test_a5_the_last_layer_is_never_skipped(make_model, tokens):
    model = make_model(p_max=1.0, skip_schedule='uniform').train()
    rows = rows_run(model)
    model(tokens(4, 3))
    assert rows == [[], [], [4]]


@pytest.mark.parametrize('normalize', [False, True])
def test_a5_eval_never_skips(make_model, tokens, normalize):
    model = make_model(p_max=1.0, skip_schedule='uniform', skip_normalize=normalize)
    assert torch.equal(model(tokens())[0], make_model()(tokens())[0])


def test_a5_a_layer_that_all_samples_skip_gets_no_gradient(make_model, tokens):
    model = make_model(lambda_ee=0.3, lambda_q=0.0).train()
    model.skip_probabilities = [0.0, 1.0, 0.0]
    model(tokens(), tokens(seed=1))[1]['total'].backward()
    assert all(p.grad is None for p in model.blocks[1].parameters())
    assert all(p.grad is not None for layer in (0, 2) for p in model.blocks[layer].parameters())


def test_a5_gradient_reaches_only_the_samples_that_ran(make_model, tokens):
    """The gradient of a half-skipped block is that of the other half."""
    model, h = make_model(linear='fp').train(), torch.randn(8, 4, 32)
    model.skip_probabilities = [0.5, 0.0, 0.0]
    out = model.run_block(0, h, model.rope(0, 4))
    kept = h[(out != h).flatten(1).any(dim=1)]
    assert 0 < len(kept) < 8
    parameters, g = list(model.blocks[0].parameters()), torch.randn(32)
    for a, b in zip(torch.autograd.grad((out @ g).sum(), parameters),
                    torch.autograd.grad((model.blocks[0](kept, model.rope(0, 4)) @ g).sum(), parameters)):
        assert_close(a, b)


@pytest.mark.parametrize('p', [1e-9, 0.5])
def test_a5_a_cache_in_training_mode_gets_no_holes(make_model, tokens, p):
    """Decoding with a model left in training mode may skip nothing: a skipped sample would leave no keys behind."""
    model, idx = make_model(linear='fp').train(), tokens(4, 8)
    expected = model(idx)[0]
    model.skip_probabilities = [p, p, 0.0]
    cache = KVCache(model, 4)
    with torch.no_grad():
        assert_close(torch.cat((model(idx[:, :5], cache=cache)[0], model(idx[:, 5:], cache=cache)[0]), 1), expected)


def test_a5_the_last_layer_is_skipped_if_asked_for(make_model, tokens):
    model = make_model(p_max=1.0, skip_schedule='uniform', skip_last=True).train()
    assert torch.equal(model(tokens())[0], model.head(model.norm(model.embedding(tokens()))))


def test_dropout_reaches_the_attention_weights(make_model, tokens):
    x = torch.randn(2, 8, 32)
    for dropout in (0.0, 0.3):
        model = make_model(dropout=dropout, linear='fp').train()
        a, b = (model.blocks[0].attn(x, model.rope(0, 8)) for _ in range(2))
        assert torch.equal(a, b) == (dropout == 0)


def test_dropout_is_off_in_eval(make_model, tokens):
    model, idx = make_model(dropout=0.5), tokens()
    assert torch.equal(model(idx)[0], make_model()(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


# --------------------------------------------------------------------------------------------------------------------
# experiments, and exits with something of their own

def losses_of(model, idx, targets):
    return model(idx, targets, return_logits=False)[1]


def test_unshifted_labels_are_the_current_tokens(make_model, tokens):
    """'exits': the exits are trained on idx, the last layer on targets. 'all': everything on idx."""
    idx, targets = tokens(2, 8), tokens(2, 8, seed=1)
    settings = dict(lambda_ee=0.3, linear='fp')
    right, current = (losses_of(make_model(**settings), idx, labels) for labels in (targets, idx))
    exits = losses_of(make_model(unshifted='exits', **settings), idx, targets)
    everything = losses_of(make_model(unshifted='all', **settings), idx, targets)
    assert exits['ce'] == right['ce'] and exits['ee'] == current['ee'] != right['ee']
    assert everything['ce'] == current['ce'] and everything['ee'] == current['ee']


def test_a_model_that_sees_the_future(make_model, tokens):
    """causal=False breaks what test_causality guards, and refuses to decode."""
    model, idx = make_model(causal=False), tokens()
    changed = idx.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 31
    assert not torch.equal(model(idx)[0][:, 0], model(changed)[0][:, 0])
    with pytest.raises(ValueError, match='cannot decode'):
        model.generate(idx, 2)


def test_init_scale_is_that_of_the_projections():
    models = []
    for scale in (1.0, 0.1):
        torch.manual_seed(0)
        models.append(BitSkip(BitSkipConfig(n_embd=64, n_head=4, ffn_dim=64, init_scale=scale)))
    projections = tuple(f'{name}.weight' for name in ('q', 'k', 'v', 'o', 'up', 'down'))
    for (name, plain), small in zip(models[0].named_parameters(), models[1].parameters()):
        assert_close(small, plain * (0.1 if name.endswith(projections) else 1), msg=name)


def test_detached_head_learns_from_the_last_layer_only(make_model, tokens):
    idx, targets = tokens(2, 8), tokens(2, 8, seed=1)
    def head_gradient(**settings):
        model = make_model(lambda_q=0.0, lambda_r=0.0, **settings)
        losses_of(model, idx, targets)['total'].backward()
        return model.head.weight.grad
    alone = head_gradient(lambda_ee=0.0)
    assert torch.equal(head_gradient(lambda_ee=0.3, ee_detach_head=True), alone)
    assert not torch.allclose(head_gradient(lambda_ee=0.3), alone)


def test_distilled_exits_agree_with_the_last_layer_or_pay(make_model, tokens):
    """ee_distill=1: the labels do not matter to the exits, and the last layer does not learn from them."""
    model = make_model(lambda_ee=1.0, ee_distill=1.0, ee_detach_head=True, lambda_q=0.0, lambda_r=0.0)
    idx = tokens(2, 8)
    a, b = (losses_of(model, idx, tokens(2, 8, seed)) for seed in (1, 2))
    assert a['ee'] == b['ee'] and a['ce'] != b['ce']
    a['ee'].backward()
    assert all(p.grad is None for p in model.blocks[-1].parameters()) and model.head.weight.grad is None
    assert model.blocks[-2].attn.q.weight.grad.any()


def test_adapters_change_only_the_exits_and_start_as_nothing(make_model, tokens):
    idx = tokens()
    plain, adapted = make_model(), make_model(ee_adapter=4)
    adapted.init_weights()
    adapted.load_state_dict(plain.state_dict(), strict=False)
    for layer in range(3):
        assert torch.equal(adapted(idx, exit_layer=layer)[0], plain(idx, exit_layer=layer)[0])
    for adapter in adapted.adapters:
        adapter.b.weight.data.normal_()
    for layer in range(3):
        assert torch.equal(adapted(idx, exit_layer=layer)[0], plain(idx, exit_layer=layer)[0]) == (layer == 2)


@pytest.mark.parametrize('kind', ['agreement', 'overlap', 'divergence'])
def test_foresight_loss_is_the_formula(make_model, tokens, kind):
    """With every token dealt to the one gate of two layers it is BCE(p, exit's argmax == last argmax), or with the
    probability that both exits share, or D - KL log D; it trains the gates and nothing else."""
    model = make_model(n_layer=2, gate_loss=kind, lambda_r=1.0, target_exit=0)
    idx = tokens(4, 16)
    first, last = model.hidden_states(idx)
    here, there = model(idx, exit_layer=0)[0].detach(), model(idx)[0].detach()
    asked = {'agreement': (here.argmax(-1) == there.argmax(-1)).float(),
             'overlap': 1 - (here.softmax(-1) - there.softmax(-1)).abs().sum(-1) / 2,
             'divergence': F.kl_div(here.log_softmax(-1), there.log_softmax(-1), reduction='none',
                                    log_target=True).sum(-1)}[kind]
    assert 0.1 < asked.mean() < 0.9
    p = model.gates[0](first)
    expected = (F.binary_cross_entropy(p, asked) if kind != 'divergence' else
                (-p.log() - asked * (-p.log()).log()).mean())
    loss = losses_of(model, idx, idx)['route']
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert {name.split('.')[0] for name, p in model.named_parameters() if p.grad is not None} == {'gates'}


def test_foresight_gates_ask_about_their_own_exits(make_model, tokens, monkeypatch):
    """Each gate, given all tokens, learns how far the prediction of its own exit is from the last."""
    model, idx = make_model(n_layer=4, ee_adapter=3, gate_loss='divergence', lambda_r=1.0), tokens(4, 16)
    monkeypatch.setattr(model, 'deal', lambda tokens, n: [torch.arange(tokens.numel())] * n)
    states, logits, expected = list(model.hidden_states(idx)), all_exits(model, idx).log_softmax(-1), []
    for layer in range(3):
        D = -model.gates[layer](states[layer]).log()
        asked = F.kl_div(logits[layer], logits[3], reduction='none', log_target=True).sum(-1)
        expected.append((D - asked * D.log()).mean())
    assert_close(losses_of(model, idx, idx)['route'], torch.stack(expected).mean())


@pytest.mark.parametrize('exits', [{}, {'exit_norm': 'none'}, {'ee_adapter': 4}], ids=str)
def test_tokens_that_leave_in_training_are_those_of_decoding(make_model, tokens, monkeypatch, exits):
    """Their states above are frozen, later tokens attend to these, and they are read off as at their exit, all as
    decode.exit_states has it; evaluation knows nothing of it, and about the share asked for leaves."""
    model, idx = make_model(linear='fp', n_layer=4, ee_leave=0.5, **exits), tokens(4, 16)
    plain = list(model.hidden_states(idx))
    monkeypatch.setattr(model, 'leave_at_random', lambda idx: layers[..., None])
    layers = decode.exit_states(model, idx, 'confidence', 0.2)[1]
    assert len(layers.unique()) > 2
    model.train()
    logits = model(idx)[0]
    torch.testing.assert_close(logits, model.head(decode.exit_states(model, idx, 'confidence', 0.2)[0]))
    monkeypatch.undo()
    model.eval()
    assert all(map(torch.equal, model.hidden_states(idx), plain))
    leaves = model.leave_at_random(torch.zeros(100, 100))
    assert leaves.unique().tolist() == [0, 1, 2, 3] and (leaves < 3).float().mean() == pytest.approx(0.375, abs=0.03)


def test_projections_have_the_settings_of_the_config(make_model):
    model = make_model(linear='hbitlinear', act_bits=4, linear_norm='rmsnorm')
    assert all(layer.act_bits == 4 and layer.linear_norm == 'rmsnorm' for layer in model.linears())


def test_tokens_leave_in_training_passes_alone(make_model, tokens):
    """An exit that was asked for, and a cache, get what they ask for in training mode, too."""
    model, idx = make_model(linear='fp', n_layer=4, exit_norm='none', ee_leave=1.0).train(), tokens(2, 8)

    def look():
        return model(idx, exit_layer=1)[0], model(idx, cache=decode.KVCache(model, batch_size=2))[0]
    in_training = look()
    model.eval()
    assert all(map(torch.equal, in_training, look()))


@pytest.mark.parametrize('settings', [dict(gate_loss='divergence'), dict(ee_distill=0.5)], ids=str)
def test_tokens_that_leave_have_no_full_depth_to_learn_from(make_model, settings):
    with pytest.raises(ValueError, match='have no full depth'):
        make_model(ee_leave=0.3, **settings)
