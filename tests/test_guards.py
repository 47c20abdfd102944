"""Two gates that guard the science. Causality: no logit depends on a later token. Entropy: what
cannot be predicted is not predicted. (The authors found a missing mask by numbers too good.)"""
import contextlib
import math

import pytest
import torch
from conftest import KINDS, all_exits

import model as model_file
from decode import EXIT_MODES, Decoder, KVCache
from model import BitSkip, BitSkipConfig

# ---- causality

def assert_causal(look, idx, positions):
    """look(idx (B, T)) -> tensors (..., B, T, n). What a token at one of `positions` changes lies
    at or after it, down to the last bit, and is something at each of those places."""
    with torch.no_grad():
        before = look(idx)
        for t in positions:
            changed = idx.clone()
            changed[:, t] = (idx[:, t] + 1) % 31
            for old, new in zip(before, look(changed), strict=True):
                differs = (old != new).any(dim=-1)  # (..., B, T)
                assert not differs[..., :t].any()
                assert differs[..., t].all()

def exits_and_gates(model, idx):
    """Logits (L, B, T, V) and chances to leave (B, T, L-1)."""
    gates = [model.gate_probabilities(list(model.hidden_states(idx))[:-1])] if model.gates else []
    return [all_exits(model, idx), *gates]

@pytest.mark.parametrize('product', ['integer', 'definition'])
@pytest.mark.parametrize('settings', [
    {}, dict(linear='fp'), dict(linear='hbitlinear'), dict(linear='quant:HBitLinear'),
    dict(linear='hbitlinear', hadamard_layers='o,down'), dict(ffn='swiglu'), dict(norm='rmsnorm'),
    dict(sub_norm=False), dict(act_bits=4), dict(linear_norm='layernorm'), dict(n_kv_head=1),
    dict(linear='hbitlinear', linear_norm='rmsnorm'), dict(exit_norm='none'), dict(exit_norm='raw'),
    dict(n_kv_head=4), dict(gate_dim=0), dict(n_layer=1), dict(block_size=80)], ids=str)
def test_causality_of_every_option(make_model, tokens, use_product, settings, product):
    """THE CAUSALITY GATE: token t changes no logit and no gate before t, not by a bit, at any exit.
    (A scale over several tokens, for one, would tell of later ones.)"""
    use_product(product)
    model = make_model(**settings)
    T = model.config.block_size
    assert_causal(lambda idx: exits_and_gates(model, idx), tokens(2, T), (1, T // 2, T - 1))

@pytest.mark.parametrize('linear', KINDS)
@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('settings', [{}, dict(n_kv_head=1, exit_norm='raw'), dict(
    ffn='swiglu', norm='rmsnorm', exit_norm='none')], ids=str)
def test_causality_with_a_cache(make_model, tokens, settings, linear, autocast):
    """In a chunk that continues a cache another mask is used; and under autocast other products."""
    model, idx = make_model(linear=linear, **settings), tokens(2, 12)

    def second_chunk(chunk):
        cache = KVCache(model, 2)
        model(idx[:, :5], cache=cache)
        return [all_exits(model, chunk, cache=cache)]

    with torch.autocast('cpu', torch.bfloat16) if autocast else contextlib.nullcontext():
        assert_causal(second_chunk, idx[:, 5:], (1, 3, 6))
        assert_causal(lambda idx: exits_and_gates(model, idx), idx, (1, 6, 11))

@pytest.mark.parametrize('mode, threshold', [('gate', 0.5), ('confidence', 0.3)])
def test_causality_after_tokens_that_left(make_model, tokens, mode, threshold):
    """Some tokens before the chunk have left early, at several layers."""
    model, idx = make_model(n_layer=4, linear='hbitlinear'), tokens(1, 14)

    def left():
        decoder = Decoder(model)
        steps = [decoder.step(token, exit_mode=mode, exit_threshold=threshold)
                 for token in idx[:, :8].split(1, dim=1)]
        return decoder, {layer.item() for _, layer in steps}

    def chunk_after(chunk):
        return [left()[0].step(chunk, n_logits=chunk.shape[1])[0][None]]

    assert len(left()[1]) > 1
    assert_causal(chunk_after, idx[:, 8:], (1, 3, 5))

@pytest.mark.parametrize('exit_mode', [None, *EXIT_MODES])
def test_causality_of_generation(make_model, tokens, exit_mode):
    """What is written first does not depend on how much will be, past the cache's end, either."""
    model, idx = make_model(n_layer=4, linear='hbitlinear'), tokens(2, 5)
    short, long = (model.generate(idx, n, exit_mode=exit_mode, exit_threshold=0.4,
                                  generator=torch.Generator().manual_seed(1)) for n in (7, 25))
    assert torch.equal(short, long[:, :12])

# ---- entropy

RECIPES = {
    'Paper A': dict(linear='hbitlinear', lambda_ee=0.3, p_max=0.7, lambda_r=0.2, lambda_q=0.05),
    'compose': dict(linear='hbitlinear', exit_norm='none', ee_weighting='uniform', lambda_ee=2.0,
                    ee_positions='sampled', gate_loss='divergence', lambda_r=0.1),
    'mixed': dict(linear='bitlinear', lambda_ee=1.0, ee_weighting='late', ffn='swiglu', p_max=0.3,
                  norm='rmsnorm', act_bits=4, exit_norm='raw', linear_norm='rmsnorm', dropout=0.1)}
V = 16

def losses_on(stream, recipe):
    """Train on fresh text at every step. Cross-entropies of full depth and of the exits at each of
    the last 50 of 80 steps, in nats: (50, 2)."""
    model = BitSkip(BitSkipConfig(vocab_size=V, block_size=16, n_layer=3, n_head=2, n_kv_head=1,
                                  n_embd=32, ffn_dim=64, gate_dim=4, **recipe)).train()
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(80):
        text = stream(16, 17)
        losses = model(text[:, :-1], text[:, 1:], return_logits=False)[1]
        seen.append(torch.stack([losses['ce'], losses['ee']]).detach())
        optimizer.zero_grad()
        losses['total'].backward()
        optimizer.step()
    return torch.stack(seen[-50:])

def noise(B, T):
    return torch.randint(V, (B, T))

def counting(B, T):
    return (torch.randint(V, (B, 1)) + torch.arange(T)) % V

def below_entropy(losses):
    """Whether means over steps are under ln V by more than five standard errors, (2,). Nobody
    predicts fresh uniform tokens: each loss is ln V or more in expectation (Gibbs)."""
    error = losses.std(dim=0) / len(losses) ** 0.5
    assert (5 * error < 0.3).all()
    return losses.mean(dim=0) < math.log(V) - 5 * error

@pytest.mark.parametrize('recipe', RECIPES.values(), ids=RECIPES)
def test_entropy(recipe):
    """THE ENTROPY GATE: training on fresh i.i.d. tokens never gets below ln V, at any exit."""
    assert not below_entropy(losses_on(noise, recipe)).any()

def test_entropy_notices_what_can_be_predicted_and_a_model_that_sees_the_future(monkeypatch):
    """In as many steps counting is learned, at every exit. And attention to all tokens copies the
    next one, be it noise or not."""
    assert below_entropy(losses_on(counting, RECIPES['Paper A'])).all()
    monkeypatch.setattr(model_file.Attention, 'causal', False)
    assert below_entropy(losses_on(noise, dict(linear='fp', lambda_ee=0.3))).all()
