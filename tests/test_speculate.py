"""Self-speculative decoding: the same text as without, in distribution and, where it is greedy, token for token."""
import itertools

import pytest
import torch

import native
from decode import Decoder, distribution, sample, stream
from packed import to_ternary
from speculate import accept, speculate

KINDS = {
    'fp': dict(linear='fp'),
    'bitlinear': dict(),
    'hadamard': dict(linear='hbitlinear'),
    'hadamard, paper B': dict(linear='hbitlinear', norm='rmsnorm', ffn='swiglu', sub_norm=False, act_bits=4),
    'raw exits, odd widths': dict(exit_norm='none', n_head=3, n_kv_head=3, n_embd=66, ffn_dim=37),
}
kinds = pytest.mark.parametrize('kind', KINDS)
both = pytest.mark.parametrize('how', ['PyTorch', 'native'])


def decoder_of(model, how):
    if how == 'PyTorch':
        return Decoder(model)
    available, why = native.available()
    if not available or model.config.linear == 'fp':
        pytest.skip(why if not available else 'native decoding is for ternary weights')
    return native.Decoder(model, head='fp32')


def agreeing(model, layer):
    """The model, with blocks above `layer` that add nothing: all exits from there on say the same."""
    with torch.no_grad():
        for block in model.blocks[layer + 1:]:
            block.attn.o.weight.zero_()
            block.ffn.down.weight.zero_()
    return model


def plain(model, idx, n, **options):
    """n greedy tokens, (1, n)."""
    return torch.cat([token for token, _ in stream(model, idx, n, temperature=0, **options)], dim=1)


def speculated(*args, **options):
    tokens, n_drafts = zip(*speculate(*args, **options))
    return torch.cat(tokens, dim=1), [t.shape[1] for t in tokens], n_drafts


# --------------------------------------------------------------------------------------------------------------------
# greedy

@kinds
@both
@pytest.mark.parametrize('n_prompt', [5, 30])
def test_greedy_text_is_plain_greedy_text(make_model, tokens, kind, how, n_prompt):
    """Token for token, beyond block_size (16), where the cache starts anew, whatever drafts and how many. In C to the
    bit. In PyTorch a pass of several tokens may round otherwise; that shows where two candidates are that close."""
    model, idx = make_model(n_layer=4, **KINDS[kind]), tokens(1, n_prompt, seed=n_prompt)
    decoder = decoder_of(model, how)
    expected = plain(model, idx, 24, decoder=decoder)
    for k, draft_len in ((0, 40), (1, 2), (2, 5)):
        new, counts, n_drafts = speculated(model, idx, 24, k, draft_len, temperature=0, decoder=decoder)
        assert new.shape == (1, 24) and all(1 <= n <= d + 1 <= draft_len + 1 for n, d in zip(counts, n_drafts))
        if how == 'native':
            assert torch.equal(new, expected)
        if not torch.equal(new, expected):
            assert_first_difference_is_a_tie(model, idx, new[0], expected[0])


def assert_first_difference_is_a_tie(model, idx, ours, theirs):
    at = (ours != theirs).nonzero()[0].item()
    context = torch.cat((idx[0], theirs[:at]))
    begin = 0
    for end in range(min(len(idx[0]), 16), len(context) + 1):  # what the cache held then
        begin = end - 8 if end - begin > 16 else begin
    logits = model(context[None, begin:])[0][0, -1]
    assert logits[theirs[at]] - logits[ours[at]] <= 0.01 * logits.norm(), at


@both
def test_drafts_of_a_model_that_agrees_with_itself_all_stand(make_model, tokens, how):
    """Then a pass is draft_len + 1 tokens, and a pass at a full cache or at the end as many as there is room for."""
    model = agreeing(make_model(block_size=32, n_layer=4), 1)
    options = dict(temperature=0, decoder=decoder_of(model, how))
    _, counts, n_drafts = speculated(model, tokens(1, 5), 12, 1, 3, **options)
    assert counts == [4, 4, 4] and n_drafts == (3, 3, 3)
    _, counts, n_drafts = speculated(model, tokens(1, 5), 11, 1, 3, **options)
    assert counts == [4, 4, 3] and n_drafts == (3, 3, 2)
    _, counts, n_drafts = speculated(model, tokens(1, 26), 30, 1, 3, **options)
    assert counts == [4, 3, 4, 4, 4, 4, 1, 4, 2] and n_drafts == (3, 2, 3, 3, 3, 3, 0, 3, 1)


@both
def test_a_draft_is_what_its_exit_says(make_model, tokens, how):
    """The text of exit k, until full depth disagrees."""
    model, idx = make_model(n_layer=4), tokens(1, 4)
    decoder = decoder_of(model, how)
    drafts = plain(model, idx, 8, exit_layer=2, decoder=decoder)[0]
    checked = plain(model, idx, 8, decoder=decoder)[0]
    agree = (drafts == checked).int().cumprod(0).sum().item()
    first, _ = next(speculate(model, idx, 9, 2, 8, temperature=0, decoder=decoder))
    assert first.shape[1] == agree + 1 and 0 < agree < 8


# --------------------------------------------------------------------------------------------------------------------
# the cache

@kinds
@both
def test_refused_drafts_leave_no_trace(make_model, tokens, kind, how):
    """After each pass the cache is that of a decoder that has read the text, and nothing else."""
    model, idx = make_model(block_size=48, **KINDS[kind]), tokens(1, 6)
    ours, refused, text = decoder_of(model, how), 0, idx
    for new, n_drafts in speculate(model, idx, 40, 1, 3, temperature=0, decoder=ours):
        text, refused = torch.cat((text, new), dim=1), refused + n_drafts + 1 - new.shape[1]
        fresh = decoder_of(model, how)
        fresh.step(text[:, :-1])  # the newest token is still to be read
        length = fresh.length
        assert ours.length == length == text.shape[1] - 1
        if how == 'native':
            assert ours.filled == fresh.filled
            logits, expected = (d.step(text[:, -1:])[0] for d in (ours, fresh))
            assert torch.equal(logits, expected)
            ours.length = length
        else:
            assert ours.cache.filled == fresh.cache.filled
            for a, b in ((ours.cache.k, fresh.cache.k), (ours.cache.v, fresh.cache.v)):
                a, b = a[..., :length, :], b[..., :length, :]
                assert (a - b).norm() <= 0.01 * b.norm()
    assert refused > 10


@kinds
def test_parts_of_a_step_in_pytorch(make_model, tokens, kind):
    """Drafted with some blocks and verified with the others, in one pass: what a whole step computes."""
    model, drafts = make_model(**KINDS[kind]), torch.tensor([[3, 1, 4, 1]])
    whole, ours, states = Decoder(model), Decoder(model), []
    for decoder in (whole, ours):
        decoder.step(tokens(1, 6))
    for token in drafts.split(1, dim=1):
        ours.step(token, n_logits=0, exit_layer=0)
        states.append(ours.states)
    with pytest.raises(ValueError, match='the cache of layer 1 holds 6 tokens, not the 10 before these'):
        ours.step(drafts)
    h = ours.blocks(torch.cat(states, dim=1), 1, 2, start=6)
    expected, _ = whole.step(drafts, n_logits=4)
    logits = ours.logits(h)[0]
    assert logits.shape == (4, 31) and (logits - expected).norm() <= 0.01 * expected.norm()
    with pytest.raises(ValueError, match='17 tokens do not fit into block_size=16'):
        ours.step(tokens(1, 7))


@kinds
@both
def test_verification_is_causal(make_model, tokens, kind, how):
    """A changed draft leaves everything before it as it was, to the last bit."""
    model = make_model(**KINDS[kind])
    decoder, drafts = decoder_of(model, how), tokens(1, 6, seed=3)
    decoder.step(tokens(1, 8))
    results = []
    for t in (6, 1, 3, 5):  # 6: none
        changed = drafts.clone()
        changed[:, t:t + 1] = (changed[:, t:t + 1] + 1) % 31
        decoder.length = 8
        decoder.step(changed, n_logits=0, exit_layer=0)
        logits = decoder.logits(decoder.blocks(decoder.states, 1, 2, start=8)).flatten(0, -2)
        results.append(logits)
        assert torch.equal(logits[:t], results[0][:t]) and (t == 6 or not torch.equal(logits[t], results[0][t]))


# --------------------------------------------------------------------------------------------------------------------
# sampling: P(out = x) is p(x), not nearly but exactly

def chi_square(counts, p):
    """In standard deviations above its mean: about N(0, 1) if `counts` were drawn with p, many if not."""
    expected, possible = counts.sum() * p, p > 0
    assert counts[~possible].sum() == 0
    x = ((counts - expected)[possible].square() / expected[possible]).sum()
    freedom = possible.sum() - 1
    return ((x - freedom) / (2 * freedom) ** 0.5).item()


P = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0], [0.1, 0.2, 0.3, 0.4, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]])
Q = torch.tensor([[0.1, 0.45, 0.0, 0.25, 0.2], [0.3, 0.4, 0.2, 0.1, 0.0]])


def outcomes(rule, n):
    """How often which first and second token comes, (5,) and (5, 5), where two tokens of the text are drawn by `rule`
    from P given drafts from Q (their places are independent here)."""
    generator, firsts, pairs = torch.Generator().manual_seed(0), torch.zeros(5), torch.zeros(5, 5)
    for _ in range(n):
        drafts = sample(Q.log(), generator=generator)
        count, token = rule(P, Q, drafts, generator=generator)
        text = drafts[:count].flatten().tolist() + [token.item()]
        firsts[text[0]] += 1
        if len(text) > 1:
            pairs[text[0], text[1]] += 1
    return firsts, pairs


def test_accepted_and_replaced_drafts_are_distributed_as_p():
    n = 3000
    firsts, pairs = outcomes(accept, n)
    assert chi_square(firsts, P[0]) < 5
    assert chi_square(pairs.sum(0), P[1]) < 5  # given that the first stood, the second is from P[1], whatever it was
    stood = torch.minimum(P[0], Q[0])
    assert chi_square(pairs.sum(1), stood / stood.sum()) < 5 and abs(pairs.sum() / n - stood.sum()) < 0.04


def by(odds, rest):
    """A rule of acceptance like speculate.accept, of other formulas."""
    def rule(p, q, drafts, generator):
        for n, (d, p_n, q_n) in enumerate(zip(drafts.split(1), p.split(1), q.split(1))):
            if torch.rand(1, generator=generator) >= odds(p_n, q_n, d):
                return n, sample(rest(p_n, q_n).log(), generator=generator)
        return len(drafts), sample(p[-1:].log(), generator=generator)
    return rule


def ratio(p, q, d):
    return p.gather(1, d) / q.gather(1, d)


def residual(p, q):
    return (p - q).clamp(min=0)


RULES = {'the right one': by(ratio, residual),
         'a refused draft is replaced from p': by(ratio, lambda p, q: p),
         'drafts stand with p(d)': by(lambda p, q, d: p.gather(1, d), residual),
         'drafts stand if they are what p would choose': by(lambda p, q, d: p.argmax() == d, residual),
         'the ratio is upside down': by(lambda p, q, d: 1 / ratio(p, q, d), residual),
         'all drafts stand': by(lambda p, q, d: 1, residual)}


@pytest.mark.parametrize('rule', RULES)
def test_the_usual_wrong_rules_would_be_noticed(rule):
    if rule == 'the right one':
        assert chi_square(outcomes(RULES[rule], 1000)[0], P[0]) < 5
    else:
        with pytest.raises(AssertionError):
            assert chi_square(outcomes(RULES[rule], 1000)[0], P[0]) < 5


@pytest.mark.parametrize('options', [dict(), dict(temperature=0.7, top_k=2)], ids=str)
@both
def test_sampled_texts_are_distributed_as_plain_ones(make_model, how, options):
    """All 27 texts of three tokens over a vocabulary of three, against their exact probabilities. A quarter and
    more of the drafts are refused, so they must be replaced rightly."""
    model = make_model(vocab_size=3, linear='fp' if how == 'PyTorch' else 'bitlinear')
    idx, decoder = torch.tensor([[1, 2]]), decoder_of(model, how)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))  # (27, 3)

    def probabilities(exit_layer):
        logits = model(torch.cat((idx.expand(27, 2), texts), dim=1), exit_layer=exit_layer)[0].detach()
        p = distribution(logits[:, 1:4].flatten(0, 1), **options)  # (81, 3)
        return p.gather(1, texts.reshape(-1, 1)).view(27, 3).prod(1)
    counts, generator, accepted, drafted = torch.zeros(27), torch.Generator().manual_seed(0), 0, 0
    for _ in range(400):
        new, n, n_drafts = speculated(model, idx, 3, 0, 2, generator=generator, decoder=decoder, **options)
        counts[(new[0] * torch.tensor([9, 3, 1])).sum()] += 1
        accepted, drafted = accepted + sum(n) - len(n), drafted + sum(n_drafts)
    assert accepted < 0.75 * drafted
    assert probabilities(None).sum() == pytest.approx(1, abs=1e-5) and chi_square(counts, probabilities(None)) < 5
    with pytest.raises(AssertionError):
        assert chi_square(counts, probabilities(0)) < 5  # that is how the drafts are distributed


@pytest.mark.parametrize('temperature, top_k', [(1.0, None), (0.5, 2), (2.0, 100), (1.0, 1)])
def test_distribution_is_what_sample_draws_from(temperature, top_k):
    logits, generator = torch.tensor([0.5, -1.0, 2.0, 0.1, -0.3, 1.2]), torch.Generator().manual_seed(0)
    p = distribution(logits[None], temperature, top_k)[0]
    drawn = sample(logits.expand(5000, 6), temperature, top_k, generator).flatten()
    assert p.sum() == pytest.approx(1) and ((p > 0).sum() == 1 or chi_square(drawn.bincount(minlength=6), p) < 5)
    assert (p[drawn] > 0).all()


def test_a_refusal_by_rounding_leaves_something_to_draw(monkeypatch):
    """p = q but for one unit in the last place: where the odds are just below 1, nothing is left of (p - q)+."""
    q = torch.tensor([[0.5, 0.5]])
    p = torch.cat((q - 2 ** -25, q))
    monkeypatch.setattr(torch, 'rand', lambda *_, **__: torch.tensor([[1 - 2 ** -24]]))
    n, token = accept(p, q, torch.tensor([[1]]))
    assert n == 0 and token.item() in (0, 1)


# --------------------------------------------------------------------------------------------------------------------
# edges

@both
@pytest.mark.parametrize('n', [0, 1, 2, 3])
def test_as_many_tokens_as_were_asked_for(make_model, tokens, how, n):
    model = make_model()
    out = list(speculate(model, tokens(1, 4), n, 0, 8, decoder=decoder_of(model, how)))
    assert sum(new.shape[1] for new, _ in out) == n


@both
@pytest.mark.parametrize('block_size', [1, 2, 3])
def test_tiny_contexts(make_model, tokens, how, block_size):
    model = make_model(block_size=block_size, n_layer=2)
    decoder = decoder_of(model, how)
    new, _, _ = speculated(model, tokens(1, 5), 9, 0, 4, temperature=0, decoder=decoder)
    assert torch.equal(new, plain(model, tokens(1, 5), 9, decoder=decoder))


@pytest.mark.parametrize('training', [True, False])
def test_training_mode_is_restored(make_model, tokens, training):
    model = make_model(p_max=1.0, skip_schedule='uniform', dropout=0.5).train(training)
    new, _, _ = speculated(model, tokens(1, 4), 6, 0, 2, temperature=0)
    assert model.training == training and torch.equal(new, plain(make_model(), tokens(1, 4), 6))
    steps = speculate(model, tokens(1, 4), 6, 0)
    next(steps)
    steps.close()
    assert model.training == training


@pytest.mark.parametrize('options, message', [
    (dict(draft_layer=2), 'draft_layer=2 leaves no block to check its drafts: of 3 layers, it is 0 to 1'),
    (dict(draft_layer=-1), 'draft_layer=-1'), (dict(draft_len=0), 'draft_len is at least 1'),
    (dict(temperature=-1), 'temperature'), (dict(top_k=0), 'top_k')], ids=str)
def test_refusals(make_model, tokens, options, message):
    with pytest.raises(ValueError, match=message):
        speculate(make_model(), tokens(1, 4), 5, **dict(draft_layer=0) | options)  # at once, not at the first pass


def test_packed_models_with_an_int8_head(make_model, tokens):
    """What sample.py runs where there is no compiler."""
    packed = to_ternary(make_model(linear='hbitlinear'))
    new, _, _ = speculated(packed, tokens(1, 4), 30, 0, 3, temperature=0)
    expected = plain(packed, tokens(1, 4), 30)
    if not torch.equal(new, expected):
        assert_first_difference_is_a_tie(packed, tokens(1, 4), new[0], expected[0])


def test_more_refusals(make_model, tokens):
    with pytest.raises(ValueError, match='one text at a time, got 2'):
        speculate(make_model(), tokens(2, 4), 5, 0)
    with pytest.raises(ValueError, match='the prompt is empty'):
        speculate(make_model(), tokens(1, 0), 5, 0)
    with pytest.raises(ValueError, match='one layer has no earlier exit'):
        speculate(make_model(n_layer=1), tokens(1, 4), 5, 0)
