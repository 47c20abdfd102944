"""Two gates that guard the science: no logit depends on a later token (causality), and what cannot be predicted is not
predicted (entropy). Decoding, speculation, packed, native and exported models pass the first in their own files."""
import contextlib
import itertools
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, all_exits

import train
from checkpoint import load_checkpoint
from decode import Decoder, KVCache
from eval_exits import windows
from model import BitSkip, BitSkipConfig
from prepare import data_of


def precision(dtype):
    return contextlib.nullcontext() if dtype == 'float32' else torch.autocast('cpu', getattr(torch, dtype))


# --------------------------------------------------------------------------------------------------------------------
# causality

def assert_causal(look, idx, positions):
    """look(idx (B, T)) -> tensors of which the last dimensions but one are (B, T): what a token at one of `positions`
    changes lies at or after it, down to the last bit, and is something in each of them."""
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


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('exit_norm', ['final', 'none'])
@pytest.mark.parametrize('ffn', ['relu2', 'swiglu'])
@pytest.mark.parametrize('norm', ['layernorm', 'rmsnorm'])
@pytest.mark.parametrize('linear, product', [('fp', ''), *itertools.product(KINDS[1:], ['integer', 'fake'])])
def test_causality(make_model, tokens, use_product, linear, product, norm, ffn, exit_norm, dtype):
    """THE CAUSALITY GATE: token t changes no logit and no gate before t, not by a bit, at any exit. (The authors'
    attention sees the future, and a perplexity near 1 on anything is what comes of it.)"""
    use_product(product)
    model = make_model(linear=linear, norm=norm, ffn=ffn, exit_norm=exit_norm)
    with precision(dtype):
        assert_causal(lambda idx: exits_and_gates(model, idx), tokens(2, 8), (1, 4, 7))


@pytest.mark.parametrize('product', ['integer', 'fake'])
@pytest.mark.parametrize('settings', [
    dict(linear='hadamard_after'), dict(linear='hbitlinear', hadamard_layers='o,down'), dict(linear_norm='rmsnorm'),
    dict(linear='hbitlinear', linear_norm='layernorm'), dict(act_bits=4), dict(sub_norm=False), dict(final_norm=False),
    dict(ee_adapter=4), dict(ee_adapter=4, exit_norm='none'), dict(n_kv_head=1), dict(n_kv_head=4), dict(gate_dim=0),
    dict(block_size=80), dict(n_layer=1)], ids=str)
def test_causality_of_every_option(make_model, tokens, use_product, settings, product):
    use_product(product)
    model = make_model(**settings)
    T = model.config.block_size
    assert_causal(lambda idx: exits_and_gates(model, idx), tokens(2, T), (1, T // 2, T - 1))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('linear', KINDS)
@pytest.mark.parametrize('settings', [{}, dict(ee_adapter=4, n_kv_head=1), dict(final_norm=False, n_kv_head=4)],
                         ids=str)
def test_causality_with_a_cache(make_model, tokens, settings, linear, dtype):
    """The same inside a chunk of several tokens that continues a cache, where the mask is another one."""
    model, idx = make_model(linear=linear, **settings), tokens(2, 12)

    def second_chunk(chunk):
        cache = KVCache(model, 2)
        model(idx[:, :5], cache=cache)
        return [all_exits(model, chunk, cache=cache)]

    with precision(dtype):
        assert_causal(second_chunk, idx[:, 5:], (1, 3, 6))


@pytest.mark.parametrize('mode, threshold', [('gate', 0.5), ('confidence', 0.3), ('saturation', 0.7)])
def test_causality_after_tokens_that_left(make_model, tokens, mode, threshold):
    """The same where some of the tokens before the chunk have left early; and what these left in the cache is all that
    the chunk has of them."""
    model, idx = make_model(n_layer=4, linear='hbitlinear'), tokens(1, 14)

    def left(text):
        decoder = Decoder(model)
        steps = [decoder.step(token, exit_mode=mode, exit_threshold=threshold) for token in text.split(1, dim=1)]
        return decoder, [layer.item() for _, layer in steps]

    def chunk_after(chunk):
        logits = left(idx[:, :8])[0].step(chunk, n_logits=chunk.shape[1])[0]
        return [logits[None]]

    assert len(set(left(idx[:, :8])[1])) > 1
    assert_causal(chunk_after, idx[:, 8:], (1, 3, 5))
    one_by_one, _ = left(idx[:, :8])
    whole = chunk_after(idx[:, 8:])[0][0]
    for token, logits in zip(idx[:, 8:].split(1, dim=1), whole):
        torch.testing.assert_close(one_by_one.step(token)[0][0], logits, rtol=0, atol=0.02)


@pytest.mark.parametrize('options', [dict(dropout=0.2), dict(ee_leave=0.5, lambda_ee=0.3), dict(p_max=0.5)], ids=str)
def test_causality_in_training(make_model, tokens, options):
    """The same with what only training has: nothing drawn at random makes the past depend on the future."""
    model = make_model(linear='fp', **options).train()

    def look(idx):
        torch.manual_seed(0)
        return [model(idx)[0]]
    assert_causal(look, tokens(2, 8), (5,))


def test_causality_holds_for_gradients(make_model, tokens):
    """No gradient flows from the logits at t to the embeddings after t."""
    model, idx = make_model(linear='fp'), tokens(1, 8)
    h = model.embedding(idx).detach().requires_grad_()
    out, rope = h, model.rope(0, 8)
    for block in model.blocks:
        out = block(out, rope)
    grad, = torch.autograd.grad(out[0, 3].sum(), h)
    assert grad[0, :4].any(dim=-1).all() and not grad[0, 4:].any()


# --------------------------------------------------------------------------------------------------------------------
# entropy

def train_on(stream, linear, V=16, B=16, T=16):
    """Train all exits of a small model on fresh text at every step; return its token losses on more of it, (L, N)."""
    model = BitSkip(BitSkipConfig(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=64,
                                  linear=linear, lambda_ee=0.3, p_max=0.5, gate_dim=4, target_exit=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        text = stream(B, T + 1, V)
        model(text[:, :-1], text[:, 1:], return_logits=False)[1]['total'].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    text = stream(256, T + 1, V)
    with torch.no_grad():
        return torch.stack([F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten(), reduction='none')
                            for logits in all_exits(model, text[:, :-1])])


def noise(B, T, V):
    return torch.randint(V, (B, T))


def counting(B, T, V):
    return (torch.randint(V, (B, 1)) + torch.arange(T)) % V


@pytest.mark.parametrize('linear', KINDS)
def test_entropy(linear):
    """THE ENTROPY GATE: fresh i.i.d. uniform tokens cannot be predicted, so no exit ever gets below ln V.

    The tolerance: whatever the model predicts, it does so without knowing the target, so its expected loss is at
    least ln V (Gibbs). The mean over N tokens has the standard error std / sqrt(N); five of these are allowed."""
    losses = train_on(noise, linear)
    allowed = 5 * losses.std(dim=1) / losses.shape[1] ** 0.5
    assert (losses.mean(dim=1) >= math.log(16) - allowed).all()
    assert (allowed < 0.02).all()


@pytest.mark.parametrize('linear', KINDS)
def test_entropy_gate_can_fail(linear):
    """The same training does learn what can be predicted, at every exit."""
    assert (train_on(counting, linear).mean(dim=1) < 0.2 * math.log(16)).all()


def test_entropy_gate_notices_a_model_that_sees_the_future(monkeypatch):
    """With attention to all tokens, as in the authors' code, the next token is simply copied, be it noise or not."""
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention',
                        lambda *args, **options: attention(*args, **options | {'is_causal': False}))
    assert (train_on(noise, 'fp').mean(dim=1) < 0.4 * math.log(16)).all()


COMPOSE = dict(linear='hbitlinear', exit_norm='none', ee_weighting='uniform', lambda_ee=2.0, gate_loss='divergence',
               lambda_r=0.1, ee_positions='sampled')
RECIPES = {
    'Paper A': dict(linear='hbitlinear', lambda_ee=0.3, p_max=0.7, lambda_r=0.2),
    'compose': COMPOSE,
    'compose, all positions, ramped': COMPOSE | dict(ee_positions='all', ee_ramp='up'),
    'a share, distilled, head detached': COMPOSE | dict(ee_share=0.5, ee_distill=0.5, ee_detach_head=True),
    'adapters, exits in turn, swiglu': COMPOSE | dict(ee_adapter=4, ee_curriculum='rotational', ffn='swiglu',
                                                      norm='rmsnorm', gate_loss='overlap'),
    'more and more exits, 4 bits': COMPOSE | dict(ee_curriculum='gradual', act_bits=4, final_norm=False,
                                                  gate_loss='agreement'),
    'tokens leave, dropout': dict(lambda_ee=0.3, ee_leave=0.3, dropout=0.1, gate_detach=True, linear_norm='rmsnorm',
                                  sub_norm=False),
}


def exits_after_training_on(text, recipe, steps=70):
    """The losses of all tokens of the validation split of `text` at every exit, (L, N), after train.py."""
    Path('text.txt').write_text(text)
    settings = dict(n_layer=3, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=64, block_size=32, batch_size=8, gate_dim=4,
                    gradient_accumulation_steps=1, max_iters=steps, eval_interval=steps, learning_rate=1e-2,
                    dataset='text.txt', tokenizer='bytes', out_dir='out/run', device='cpu', dtype='float32') | recipe
    assert train.main([f'--{key}={value}' for key, value in settings.items()])
    model, saved = load_checkpoint('out/run/ckpt.pt', torch.device('cpu'))
    _, tokens = data_of(saved)
    with torch.no_grad():
        losses = [F.cross_entropy(all_exits(model, idx).flatten(1, 2).mT, targets.flatten().expand(3, -1),
                                  reduction='none') for idx, targets in windows(tokens, 32, 64)]
    losses = torch.cat(losses, dim=1)
    assert losses[-1].mean().item() == pytest.approx(saved['progress']['val_loss'], rel=1e-3)
    return losses


LETTERS = 'abcdefghijklmnop'


@pytest.mark.parametrize('recipe', RECIPES.values(), ids=RECIPES)
def test_entropy_of_whole_runs(tmp_path, monkeypatch, recipe):
    """THE ENTROPY GATE, through train.py, for what recipes combine: letters drawn at random are not predicted at any
    exit, be they trained on it for long; an alphabet said again and again is."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    noise = exits_after_training_on(''.join(draw.choices(LETTERS, k=60000)), recipe)
    assert (noise.mean(dim=1) >= math.log(16) - 5 * noise.std(dim=1) / noise.shape[1] ** 0.5).all()
    alphabet = exits_after_training_on(LETTERS * 3750, recipe)
    assert (alphabet.mean(dim=1) < 0.2 * math.log(16)).all()
