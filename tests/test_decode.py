"""Decoding: the key-value cache, sampling, and tokens that leave the model at different layers."""
import pytest
import torch
from conftest import KINDS
from torch.testing import assert_close

import decode
import native
from decode import EXIT_MODES, KVCache, sample, stream

MODES = [('gate', 0.45), ('confidence', 0.2), ('saturation', 0.72)]  # thresholds that some tokens of random models pass
GREEDY = dict(temperature=0.0)


@pytest.fixture
def run(monkeypatch):
    """run(model, idx, n, **options): tokens (B, n), layers (B, n) and logits (B, n, V) of a stream."""
    def run(model, idx, n, **options):
        seen, original = [], decode.sample
        with monkeypatch.context() as patch:
            patch.setattr(decode, 'sample', lambda logits, **how: seen.append(logits) or original(logits, **how))
            new, layers = zip(*stream(model, idx, n, **options))
        return torch.cat(new, dim=1), torch.stack(layers, dim=1), torch.stack(seen, dim=1)
    return run


def assert_near(a, b, tolerance=0.01):
    """Equal up to what a rounding error of 1e-7 becomes when it tips a quantizer over the edge between two codes."""
    assert a.shape == b.shape and (a - b).norm() <= tolerance * b.norm(), (a - b).norm() / b.norm()


# --------------------------------------------------------------------------------------------------------------------
# the cache

@pytest.mark.parametrize('linear', KINDS)
@pytest.mark.parametrize('exit_layer', [None, 0, 1])
def test_cached_generation_equals_uncached(make_model, tokens, run, linear, exit_layer):
    """Token by token, each the argmax of a pass over everything before it."""
    model, idx = make_model(linear=linear), tokens(3, 5)
    new, layers, logits = run(model, idx, 11, exit_layer=exit_layer, **GREEDY)
    assert (layers == (2 if exit_layer is None else exit_layer)).all()
    text = torch.cat((idx, new), dim=1)
    for step in range(11):
        expected = model(text[:, :5 + step], exit_layer=exit_layer)[0][:, -1]
        assert_near(logits[:, step], expected, 1e-5 if linear == 'fp' else 0.01)
        assert torch.equal(new[:, step], expected.argmax(dim=-1))


@pytest.mark.parametrize('linear', KINDS)
@pytest.mark.parametrize('chunks', [[12], [1] * 12, [5, 7], [3, 1, 6, 2]], ids=str)
@pytest.mark.parametrize('exit_layer', [None, 0])
def test_a_prompt_in_chunks_equals_one_pass(make_model, tokens, linear, chunks, exit_layer):
    model, idx = make_model(linear=linear), tokens(2, 12)
    cache = KVCache(model, 2)
    logits = torch.cat([model(chunk, exit_layer=exit_layer, cache=cache)[0] for chunk in idx.split(chunks, 1)], dim=1)
    assert cache.length == 12
    assert_near(logits, model(idx, exit_layer=exit_layer)[0], 1e-5 if linear == 'fp' else 0.01)


def test_a_model_in_bfloat16_decodes(make_model, tokens, run):
    """Its cache was in float32, and attention refused."""
    model, idx = make_model(linear='fp').bfloat16(), tokens(2, 5)
    assert KVCache(model, 2).k.dtype == torch.bfloat16
    _, _, logits = run(model, idx, 6, **GREEDY)
    assert_near(logits[:, 0], model(idx)[0][:, -1], 0.02)


def test_a_cache_set_back_forgets(make_model, tokens):
    """What was taken back leaves no trace: the next tokens are written over it."""
    model, idx = make_model(linear='fp'), tokens(2, 10)
    cache = KVCache(model, 2)
    model(idx[:, :6], cache=cache)
    model(tokens(2, 4, seed=9), cache=cache)
    cache.length = 6
    assert_near(model(idx[:, 6:], cache=cache)[0], model(idx)[0][:, 6:], 1e-5)


def test_a_cache_cut_at_an_exit_refuses_deeper_use(make_model, tokens):
    model = make_model()
    cache = KVCache(model, 2)
    model(tokens(2, 4), exit_layer=1, cache=cache)
    with pytest.raises(ValueError, match='the cache of layer 2 holds 0 tokens, not the 4 before'):
        model(tokens(2, 1), cache=cache)
    model(tokens(2, 1), exit_layer=1, cache=cache)  # as deep as before is fine, and so is less deep
    model(tokens(2, 1), exit_layer=0, cache=cache)
    with pytest.raises(ValueError, match='the cache of layer 1 holds 5 tokens, not the 6 before'):
        model(tokens(2, 1), exit_layer=1, cache=cache)


def test_a_cache_that_starts_anew_is_empty_at_every_layer(make_model, tokens):
    model = make_model()
    cache = KVCache(model, 2)
    model(tokens(2, 5), cache=cache)
    cache.length = 0
    model(tokens(2, 3), cache=cache, exit_layer=0)
    with pytest.raises(ValueError, match='layer 1 holds 0 tokens, not the 3 before'):
        model(tokens(2, 1), cache=cache)


def test_a_cache_is_not_larger_than_block_size(make_model, tokens):
    model = make_model()
    cache = KVCache(model, 2)
    model(tokens(2, 16), cache=cache)
    with pytest.raises(ValueError, match='17 tokens do not fit into block_size=16'):
        model(tokens(2, 1), cache=cache)


@pytest.mark.parametrize('exit_mode', [None, *EXIT_MODES])
def test_generation_runs_under_autocast(make_model, tokens, run, exit_mode):
    model, idx = make_model(linear='hbitlinear'), tokens(3, 4)
    with torch.autocast('cpu', torch.bfloat16):
        new, _, logits = run(model, idx, 9, exit_mode=exit_mode, **GREEDY)
        expected = model(torch.cat((idx, new[:, :-1]), dim=1))[0][:, -1]
    assert logits.isfinite().all()
    if exit_mode is None:
        assert_near(logits[:, -1].float(), expected.float(), 0.1)


# --------------------------------------------------------------------------------------------------------------------
# tokens that leave early

def slow_exits(model, text, n_prompt, mode, threshold, last):
    """The definition, for one text (T,) and without a cache: after the prompt, which runs in full, each token goes
    through the blocks until its score exceeds the threshold, and the state that it then has is what later tokens
    attend to at every block above. Returns the logits (T, V) and exit layers (T,)."""
    inputs = [[] for _ in model.blocks]  # what each token shows to each block: (C,) each
    all_logits, all_layers = [], []
    for t, token in enumerate(text):
        h, left_at = model.embedding(token), None
        for layer, block in enumerate(model.blocks[:last + 1]):
            inputs[layer].append(h)
            if left_at is not None:
                continue
            before, rope = h, model.rope(0, t + 1)
            h = block(torch.stack(inputs[layer])[None], rope)[0, -1]  # attends to inputs[layer]
            is_exit = layer < model.config.n_layer - 1
            logits = model.head(h if is_exit and model.config.exit_norm == 'none' else model.norm(h))
            if layer == last:
                left_at = last
            elif t >= n_prompt:
                score = {'gate': model.gates[layer](h), 'confidence': logits.softmax(-1).max(),
                         'saturation': h @ before / (h.norm() * before.norm())}[mode]
                left_at = layer if score > threshold else None
        all_logits.append(logits)
        all_layers.append(left_at)
    return torch.stack(all_logits), torch.tensor(all_layers)


@pytest.mark.parametrize('linear', KINDS)
@pytest.mark.parametrize('mode, threshold', MODES)
@pytest.mark.parametrize('last', [2, 3])
@pytest.mark.parametrize('exit_norm', ['final', 'none'])
def test_a6_exits_leave_no_holes_in_the_cache(make_model, tokens, run, linear, mode, threshold, last, exit_norm):
    """Each sample of a batch leaves by itself, and attends to exactly what the slow definition says."""
    model, idx = make_model(linear=linear, n_layer=4, exit_norm=exit_norm), tokens(6, 3)
    new, layers, logits = run(model, idx, 12, exit_layer=last, exit_mode=mode, exit_threshold=threshold, **GREEDY)
    assert len(layers.unique()) > 1  # exits at several layers...
    assert (layers.diff(dim=0) != 0).any()  # ...and not by all samples at once
    with torch.no_grad():
        for row in range(6):
            text = torch.cat((idx[row], new[row, :-1]))
            slow_logits, slow_layers = slow_exits(model, text, 3, mode, threshold, last)
            assert torch.equal(layers[row], slow_layers[2:])
            assert_near(logits[row], slow_logits[2:], 1e-5 if linear == 'fp' else 0.01)


@pytest.mark.parametrize('linear', KINDS)
@pytest.mark.parametrize('mode, threshold', MODES)
@pytest.mark.parametrize('settings', [{}, {'exit_norm': 'none'}, {'ee_adapter': 3}], ids=str)
def test_a6_whole_texts_leave_as_their_tokens_do(make_model, tokens, linear, mode, threshold, settings):
    """Counting exits in one pass over a text gives the layers and logits that decoding it step by step gives."""
    model, idx = make_model(linear=linear, n_layer=4, **settings), tokens(6, 16)
    states, layers = decode.exit_states(model, idx, mode, threshold)
    assert len(layers.unique()) > 1
    decoder = decode.Decoder(model, len(idx))
    for t in range(16):
        logits, left_at = decoder.step(idx[:, t:t + 1], exit_mode=mode, exit_threshold=threshold)
        assert torch.equal(left_at, layers[:, t])
        assert_near(model.head(states[:, t]), logits, 1e-5 if linear == 'fp' else 0.01)


@pytest.mark.parametrize('mode, threshold', MODES)
@pytest.mark.parametrize('settings', [{}, {'exit_norm': 'none'}, {'ee_adapter': 3}, {'final_norm': False}], ids=str)
def test_a6_whole_texts_leave_causally(make_model, tokens, mode, threshold, settings):
    """Changing a token changes neither the exits nor the logits of those before it, to the last bit; also where the
    number of later tokens that leave at an exit with them becomes another."""
    model, idx = make_model(linear='hbitlinear', n_layer=4, **settings), tokens(3, 16)
    states, layers = decode.exit_states(model, idx, mode, threshold)
    assert len(layers.unique()) > 1
    for t in range(16):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 31
        others, their_layers = decode.exit_states(model, changed, mode, threshold)
        assert torch.equal(layers[:, :t], their_layers[:, :t])
        assert torch.equal(states[:, :t], others[:, :t]) and not torch.equal(states, others)


@pytest.mark.parametrize('mode', EXIT_MODES)
def test_a6_a_threshold_of_one_is_full_depth(make_model, tokens, run, mode):
    model, idx = make_model(), tokens(3, 5)
    full = run(model, idx, 20, **GREEDY)
    never = run(model, idx, 20, exit_mode=mode, exit_threshold=1.0, **GREEDY)
    assert torch.equal(full[0], never[0]) and (never[1] == 2).all()
    assert_close(full[2], never[2])


@pytest.mark.parametrize('in_c', [False, True])
def test_a6_a_score_of_exactly_the_threshold_stays(make_model, tokens, in_c):
    """A gate that has saturated at p = 1 does not exceed a threshold of 1."""
    model, idx = make_model(linear='bitlinear', norm='rmsnorm'), tokens(1, 5)
    with torch.no_grad():
        for gate in model.gates:
            gate.w1.weight.mul_(100)
            gate.w2.weight.fill_(100)
    if in_c and not native.available()[0]:
        pytest.skip(native.available()[1])
    decoder = native.Decoder(model) if in_c else None
    assert (decode.exit_states(model, idx, 'gate', 0.9999)[1] == 0).all()
    assert (decode.exit_states(model, idx, 'gate', 1.0)[1] == 2).all()
    for threshold, layer in ((0.9999, 0), (1.0, 2)):
        steps = decode.stream(model, idx, 4, 0.0, exit_mode='gate', exit_threshold=threshold, decoder=decoder)
        assert [left_at.item() for _, left_at in steps] == [2] + [layer] * 3


def test_a6_saturation_is_at_most_one(make_model):
    """Rounding took the cosine of a state with itself above 1, and a threshold of 1 was not full depth."""
    h = torch.randn(1000, 128, generator=torch.Generator().manual_seed(0))
    assert decode.exit_score(make_model(), h, h, 0, 'saturation').max() <= 1


@pytest.mark.parametrize('mode', EXIT_MODES)
def test_a6_a_negative_threshold_leaves_at_once(make_model, tokens, run, mode):
    """All but the prompt, which runs in full."""
    layers = run(make_model(), tokens(3, 5), 8, exit_mode=mode, exit_threshold=-1.0)[1]
    assert (layers[:, 0] == 2).all() and not layers[:, 1:].any()


@pytest.mark.parametrize('mode, threshold', MODES)
def test_a6_the_states_are_those_that_the_logits_are_of(make_model, tokens, mode, threshold):
    """With an exit mode they were left over from the step before."""
    decoder = decode.Decoder(make_model(n_layer=4), batch_size=1)
    decoder.step(tokens(1, 3))
    for token in tokens(1, 4)[0]:
        logits, layer = decoder.step(token.reshape(1, 1), exit_mode=mode, exit_threshold=threshold)
        assert torch.equal(decoder.logits(decoder.states[:, 0], layer.item()), logits)


@pytest.mark.parametrize('n_prompt', [1, 2, 5])
def test_a6_the_prompt_runs_in_full(make_model, tokens, run, n_prompt):
    """Also a prompt of one token."""
    layers = run(make_model(), tokens(2, n_prompt), 2, exit_mode='gate', exit_threshold=-1.0)[1]
    assert layers.tolist() == [[2, 0]] * 2


def test_exit_at_the_last_layer_is_full_depth(make_model, tokens, run):
    model, idx = make_model(), tokens(3, 5)
    for a, b in zip(run(model, idx, 8, exit_layer=2, **GREEDY), run(model, idx, 8, **GREEDY)):
        assert torch.equal(a, b)


def test_a6_samples_of_a_batch_do_not_touch_each_other(make_model, tokens, run):
    model, idx = make_model(linear='fp', n_layer=4), tokens(4, 3)
    options = dict(exit_mode='gate', exit_threshold=0.45, **GREEDY)
    new, layers, logits = run(model, idx, 10, **options)
    for row in range(4):
        new_1, layers_1, logits_1 = run(model, idx[row:row + 1], 10, **options)
        assert torch.equal(new_1[0], new[row]) and torch.equal(layers_1[0], layers[row])
        assert_near(logits_1[0], logits[row], 1e-5)


# --------------------------------------------------------------------------------------------------------------------
# sampling

def test_sample_with_temperature_zero_is_argmax():
    logits = torch.randn(50, 9)
    assert torch.equal(sample(logits, temperature=0), logits.argmax(dim=-1, keepdim=True))
    assert torch.equal(sample(logits, temperature=1.0, top_k=1), logits.argmax(dim=-1, keepdim=True))


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('top_k', [None, 2, 5, 100])
def test_sample_follows_the_softmax(temperature, top_k):
    """Frequencies of 20,000 draws are within five standard errors of softmax(logits / temperature) over the top k."""
    logits, n = torch.tensor([0.5, -1.0, 2.0, 0.1, -0.3, 1.2]), 20_000
    p = torch.zeros(6)
    top = logits.argsort(descending=True)[:top_k]
    p[top] = (logits[top] / temperature).softmax(-1)
    drawn = sample(logits.expand(n, 6), temperature, top_k)
    frequency = torch.bincount(drawn.flatten(), minlength=6) / n
    assert drawn.shape == (n, 1) and ((frequency - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_generated_tokens_obey_top_k(make_model, tokens, run):
    new, _, logits = run(make_model(), tokens(20, 4), 10, top_k=3, temperature=5.0)
    top3 = logits.topk(3, dim=-1).indices
    assert (new[..., None] == top3).any(dim=-1).all()
    assert (new != top3[..., 0]).any()


def test_seeds(make_model, tokens):
    model = make_model()
    runs = [model.generate(tokens(), 12, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# --------------------------------------------------------------------------------------------------------------------
# the stream

@pytest.mark.parametrize('exit_mode', [None, 'gate'])
@pytest.mark.parametrize('n_prompt', [1, 7, 16, 40])
def test_more_tokens_than_block_size(make_model, tokens, n_prompt, exit_mode):
    idx = tokens(2, n_prompt)
    out = make_model().generate(idx, 50, exit_mode=exit_mode)
    assert out.shape == (2, n_prompt + 50) and torch.equal(out[:, :n_prompt], idx)


def test_a_full_cache_starts_again_from_the_newer_half(make_model, tokens, run):
    model, idx = make_model(linear='fp'), tokens(2, 10)
    new, _, logits = run(model, idx, 20, **GREEDY)
    text = torch.cat((idx, new), dim=1)
    begin = 0
    for step in range(20):
        end = 10 + step  # logits[:, step] come from text[:, begin:end]
        if end - begin > 16:
            begin = end - 8
        assert_near(logits[:, step], model(text[:, begin:end])[0][:, -1], 1e-5)
    assert begin == 18  # after 9


def test_block_size_of_one(make_model, tokens):
    assert make_model(block_size=1).generate(tokens(2, 3), 4).shape == (2, 7)


@pytest.mark.parametrize('options, message', [
    (dict(temperature=-0.5), 'temperature'), (dict(top_k=0), 'top_k'), (dict(exit_layer=3), 'exit_layer=3'),
    (dict(exit_layer=-1), 'exit_layer=-1'), (dict(exit_mode='entropy'), 'entropy')], ids=str)
def test_stream_refuses(make_model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        stream(make_model(), tokens(), 3, **options)  # at once, not at the first token


def test_stream_refuses_an_empty_prompt_and_gates_that_are_not_there(make_model, tokens):
    with pytest.raises(ValueError, match='prompt is empty'):
        stream(make_model(), tokens(2, 0), 3)
    with pytest.raises(ValueError, match="no gates.*exit_mode='saturation'"):
        stream(make_model(gate_dim=0), tokens(), 3, exit_mode='gate')
    assert make_model(gate_dim=0).generate(tokens(2, 4), 3, exit_mode='confidence').shape == (2, 7)
    with pytest.raises(ValueError, match='sees the future'):
        stream(make_model(causal=False), tokens(), 3)


@pytest.mark.parametrize('n, options, message', [
    (3, dict(n_logits=5), 'n_logits is 0 to 3'), (3, dict(n_logits=-1), 'n_logits'),
    (3, dict(exit_mode='often'), 'exit_mode'),
    (17, {}, 'block_size=16'), (3, dict(exit_layer=3), 'layers are 0 to 2')], ids=str)
def test_impossible_steps(make_model, tokens, n, options, message):
    decoder = decode.Decoder(make_model())
    with pytest.raises(ValueError, match=message):
        decoder.step(tokens(1, n), **options)
    assert decoder.length == 0
    decoder.step(tokens(1, 16))
    with pytest.raises(ValueError, match='17 tokens do not fit'):
        decoder.step(tokens(1, 1), exit_mode='gate')


def test_generate_no_tokens(make_model, tokens):
    assert torch.equal(make_model().generate(tokens(), 0), tokens())


@pytest.mark.parametrize('training', [True, False])
def test_stream_restores_training_mode(make_model, tokens, training):
    """After the last token, and when the reader goes away before it. In between nothing is skipped or dropped."""
    model = make_model(p_max=1.0, skip_schedule='uniform', dropout=0.5).train(training)
    greedy = model.generate(tokens(), 6, **GREEDY)
    assert model.training == training and torch.equal(greedy, make_model().generate(tokens(), 6, **GREEDY))
    steps = stream(model, tokens(), 6)
    next(steps)
    steps.close()
    assert model.training == training


def test_stream_leaves_gradients_on_between_tokens(make_model, tokens):
    for token, _ in stream(make_model(), tokens(), 3):
        assert torch.is_grad_enabled() and not token.requires_grad
