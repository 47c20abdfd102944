"""Decoding: the key-value cache, sampling, and tokens that leave the model at different layers."""
import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS

import decode
from decode import EXIT_MODES, Decoder, KVCache, sample, stream

# thresholds that some tokens of random models pass
MODES = [('gate', 0.45), ('confidence', 0.2)]
GREEDY = dict(temperature=0)

class Recorder(Decoder):
    """Remembers the logits of all its steps."""

    def step(self, *args, **options):
        logits, layers = super().step(*args, **options)
        self.seen = [*getattr(self, 'seen', []), logits]
        return logits, layers

def run(model, idx, n, **options):
    """Tokens (B, n), layers (B, n) and logits (B, n, V) of a stream."""
    decoder = Recorder(model, len(idx))
    new, layers = zip(*stream(model, idx, n, decoder=decoder, **options))
    return torch.cat(new, dim=1), torch.stack(layers, dim=1), torch.stack(decoder.seen, dim=1)

def assert_near(a, b, linear='fp'):
    """Equal up to rounding; a rounding error may take an activation to the neighbouring code."""
    assert a.shape == b.shape
    assert (a - b).norm() <= (1e-5 if linear == 'fp' else 0.01) * b.norm()

# ---- the cache

@pytest.mark.parametrize('linear', KINDS)
@pytest.mark.parametrize('chunks', [[1] * 12, [5, 7], [3, 1, 6, 2]], ids=str)
@pytest.mark.parametrize('k', [None, 0])
def test_a_text_in_chunks_equals_one_pass(make_model, tokens, linear, chunks, k):
    """By the model and by a Decoder, at full depth and at an exit."""
    model, idx = make_model(linear=linear), tokens(2, 12)
    cache, decoder = KVCache(model, 2), Decoder(model, 2)
    expected, parts = model(idx, exit_layer=k)[0], idx.split(chunks, dim=1)
    cached = [model(part, cache=cache, exit_layer=k)[0] for part in parts]
    assert_near(torch.cat(cached, dim=1), expected, linear)
    stepped, layers = zip(*(decoder.step(part, part.shape[1], exit_layer=k) for part in parts))
    assert_near(torch.cat([x.view(2, -1, 31) for x in stepped], dim=1), expected, linear)
    assert (torch.cat(layers) == (2 if k is None else k)).all()
    assert cache.length == decoder.length == 12

@pytest.mark.parametrize('exit_mode', [None, *EXIT_MODES])
def test_generation_in_bfloat16(make_model, tokens, exit_mode):
    """Under autocast, and of a model in bfloat16, whose cache was in float32: attention refused."""
    model, idx = make_model(linear='fp'), tokens(3, 5)
    expected = model(idx)[0][:, -1]
    with torch.autocast('cpu', torch.bfloat16):
        auto = run(model, idx, 6, exit_mode=exit_mode, **GREEDY)[2]
    for logits in (auto, run(model.bfloat16(), idx, 6, exit_mode=exit_mode, **GREEDY)[2]):
        assert logits.isfinite().all()
        assert (logits[:, 0] - expected).norm() < 0.03 * expected.norm()

def test_a_cache_with_holes_or_of_another_batch_is_refused(make_model, tokens):
    """A pass that ended at an exit left nothing above. Zeros would be attended to, in silence."""
    model = make_model()
    cache, decoder = KVCache(model, 2), Decoder(model)
    model(tokens(2, 4), exit_layer=1, cache=cache)
    with pytest.raises(ValueError, match='the cache of layer 2 holds 0 tokens, not the 4 before'):
        model(tokens(2, 1), cache=cache)
    model(tokens(2, 1), exit_layer=1, cache=cache)  # as deep as before is fine, and so is less
    model(tokens(2, 1), exit_layer=0, cache=cache)
    with pytest.raises(ValueError, match='the cache of layer 1 holds 5 tokens, not the 6 before'):
        model(tokens(2, 1), exit_layer=1, cache=cache)
    cache.length = 0  # and what was forgotten does not count as held
    model(tokens(2, 3), exit_layer=0, cache=cache)
    with pytest.raises(ValueError, match='layer 1 holds 0 tokens, not the 3 before'):
        model(tokens(2, 1), cache=cache)
    decoder.step(tokens(1, 4), exit_layer=0)
    for mode in (None, 'gate'):
        with pytest.raises(ValueError, match='the cache of layer 1 holds 0 tokens, not the 4'):
            decoder.step(tokens(1, 1), exit_mode=mode, exit_threshold=1.0)
    with pytest.raises(ValueError, match='1 samples do not fit a cache for 2'):  # to both rows
        model(tokens(1, 4), cache=KVCache(model, 2))

# ---- tokens that leave early

def all_at_once(model, idx, mode, threshold, last):
    """The definition, without a cache: a whole text (B, T) goes through the blocks, and a token
    that has left keeps its h, which later tokens attend to at every block above. Logits (B, T, V),
    layers (B, T)."""
    h, rope, layers = model.embedding(idx), model.rope(0, idx.shape[1]), torch.full(idx.shape, last)
    raw = model.config.exit_norm == 'none'
    for layer, block in enumerate(model.blocks[:last]):
        inside = layers == last
        h = torch.where(inside[..., None], block(h, rope), h)
        if mode == 'gate':
            w1, w2 = (w.weight for w in (model.gates[layer].w1, model.gates[layer].w2))
            score = torch.sigmoid(F.relu(F.layer_norm(h, h.shape[-1:]) @ w1.T) @ w2.T)[..., 0]
        else:
            score = model.head(h if raw else model.norm(h)).softmax(-1).amax(-1)
        layers[inside & (score > threshold)] = layer
    h = torch.where((layers == last)[..., None], model.blocks[last](h, rope), h)
    early = (layers < model.config.n_layer - 1)[..., None]
    return model.head(torch.where(early & raw, h, model.norm(h))), layers

@pytest.mark.parametrize('linear', KINDS)
@pytest.mark.parametrize('mode, threshold', MODES)
@pytest.mark.parametrize('last, exit_norm', [(3, 'final'), (3, 'none'), (2, 'none'), (3, 'raw')])
def test_a6_exits_token_by_token_are_those_of_the_definition(make_model, tokens, linear, mode,
                                                             threshold, last, exit_norm):
    """No hole in the cache, each sample of a batch by itself; and the states that are kept are
    those that the logits are of."""
    model, idx = make_model(linear=linear, n_layer=4, exit_norm=exit_norm), tokens(6, 12)
    with torch.no_grad():
        expected, layers = all_at_once(model, idx, mode, threshold, last)
    assert len(layers.unique()) > 1 and (layers.diff(dim=0) != 0).any()
    decoder = Decoder(model, len(idx))
    for t in range(12):
        logits, left_at = decoder.step(idx[:, t:t + 1], exit_layer=last, exit_mode=mode,
                                       exit_threshold=threshold)
        assert torch.equal(left_at, layers[:, t])
        assert_near(logits, expected[:, t], linear)

@pytest.mark.parametrize('mode', EXIT_MODES)
def test_a6_a_threshold_of_1_is_full_depth(make_model, tokens, mode, monkeypatch):
    """Also for a score of exactly 1. (Below 0 a token leaves at once: see test_scripts.py.)"""
    monkeypatch.setattr(decode, 'exit_score', lambda model, h, *_: torch.ones(len(h)))
    layers = run(make_model(), tokens(3, 1), 15, exit_mode=mode, exit_threshold=1.0)[1]
    assert (layers == 2).all()

# ---- sampling

@pytest.mark.parametrize('temperature', [0.5, 2.0])
@pytest.mark.parametrize('top_k', [None, 1, 2, 5, 100])
def test_sample_follows_the_softmax_over_exactly_the_top_k(temperature, top_k):
    """20,000 draws lie within five standard errors. Equal logits at the edge do not add a sixth.
    Temperature 0 takes the likeliest."""
    logits, n = torch.tensor([0.5, -1.0, 2.0, 0.1, -1.0, 1.2]), 20_000
    p, top = torch.zeros(6), logits.topk(min(6, top_k or 6)).indices
    p[top] = (logits[top] / temperature).softmax(-1)
    drawn = sample(logits.expand(n, 6), temperature, top_k)
    frequency = torch.bincount(drawn.flatten(), minlength=6) / n
    assert drawn.shape == (n, 1) and drawn.unique().tolist() == top.sort().values.tolist()
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()
    assert sample(logits[None], 0, top_k).tolist() == [[2]]

def test_a_stream_hands_on_top_k_and_temperature(make_model, tokens):
    model, idx = make_model(), tokens(20, 4)
    new, _, logits = run(model, idx, 10, top_k=3, temperature=5.0)
    top3 = logits.topk(3, dim=-1).indices
    assert (new[..., None] == top3).any(dim=-1).all() and (new != top3[..., 0]).any()

# ---- the stream

def test_a_full_cache_starts_again_from_the_newer_half(make_model, tokens):
    model, idx = make_model(linear='fp'), tokens(2, 10)
    new, _, logits = run(model, idx, 20, **GREEDY)
    text, begin = torch.cat((idx, new), dim=1), 0
    for step in range(20):
        end = 10 + step  # logits[:, step] come from text[:, begin:end]
        if end - begin > 16:
            begin = end - 8
        assert_near(logits[:, step], model(text[:, begin:end])[0][:, -1])
    assert begin == 18  # after 9
    assert make_model(block_size=1).generate(tokens(2, 3), 4).shape == (2, 7)

@pytest.mark.parametrize('options, message', [
    (dict(temperature=-0.5), 'temperature'), (dict(temperature=1e-5), 'at least 0.001'),
    (dict(top_k=0), 'top_k'), (dict(exit_layer=3), 'exit_layer=3 .* layers are 0 to 2'),
    (dict(exit_layer=-1), 'exit_layer=-1'),
    (dict(exit_mode='entropy'), 'entropy'), (dict(idx=torch.zeros(2, 0)), 'prompt is empty'),
    (dict(exit_mode='gate'), "no gates.*exit_mode='confidence'")], ids=str)
def test_stream_refuses_at_once(make_model, tokens, options, message):
    """Not at the first token."""
    model = make_model(gate_dim=0)
    with pytest.raises(ValueError, match=message):
        stream(model, **dict(idx=tokens(), max_new_tokens=3) | options)

def test_impossible_steps_leave_the_decoder_as_it_was(make_model, tokens):
    decoder = Decoder(make_model())
    for n, wrong in ((3, dict(n_logits=5)), (3, dict(n_logits=-1)), (1, dict(exit_mode='often')),
                     (3, dict(exit_layer=3)), (17, {})):
        with pytest.raises(ValueError, match=list(wrong)[0] if wrong else 'block_size'):
            decoder.step(tokens(1, n), **wrong)
    assert decoder.length == 0 and decoder.step(tokens(1, 16))[0].shape == (1, 31)
    with pytest.raises(ValueError, match='17 tokens do not fit'):
        decoder.step(tokens(1, 1), exit_mode='gate')

@pytest.mark.parametrize('training', [True, False])
def test_stream_restores_training_mode_and_leaves_gradients_on(make_model, tokens, training):
    """Also when the reader goes away. In between nothing is skipped or dropped."""
    model, plain = make_model(p_max=0.9, dropout=0.5).train(training), make_model()
    assert torch.equal(model.generate(tokens(), 6, **GREEDY), plain.generate(tokens(), 6, **GREEDY))
    steps = stream(model, tokens(), 6)
    token, _ = next(steps)
    assert torch.is_grad_enabled() and not token.requires_grad and not model.training
    steps.close()
    assert model.training == training
