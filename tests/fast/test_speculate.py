"""Self-speculative decoding: the text of plain decoding, in distribution and, where it is greedy,
token for token."""
import itertools

import pytest
import torch

from decode import sample, stream
from fast import native
from fast.speculate import TorchDecoder, accept, distribution, speculate

KINDS = {
    'fp': dict(linear='fp'), 'bitlinear': dict(), 'tiny context': dict(block_size=3),
    'hadamard, paper B': dict(linear='hbitlinear', norm='rmsnorm', ffn='swiglu', sub_norm=False),
    'raw exits, odd widths': dict(exit_norm='none', n_head=3, n_kv_head=3, n_embd=66, ffn_dim=37),
}
kinds = pytest.mark.parametrize('kind', KINDS)
both = pytest.mark.parametrize('how', ['PyTorch', 'native'])

@pytest.fixture(autouse=True)
def sure(monkeypatch):
    """Drafts do not end where their exit is unsure, unless a test says so."""
    monkeypatch.setattr('fast.speculate.CONFIDENCE', 0.0)

def decoder_of(model, how):
    if how == 'PyTorch':
        return TorchDecoder(model)
    available, why = native.available()
    if not available or model.config.linear == 'fp':
        pytest.skip(why)
    return native.Decoder(model)

@kinds
@both
@pytest.mark.parametrize('n_prompt', [5, 30])
def test_greedy_text_is_plain_greedy_text(make_model, tokens, monkeypatch, kind, how, n_prompt):
    """Beyond block_size, too, whatever drafts and how many. In C to the bit. In PyTorch a pass of
    several tokens may round otherwise, which shows where two candidates are that close. (Nor do
    refused drafts leave a trace: there are many.)"""
    model, idx = make_model(**dict(n_layer=4) | KINDS[kind]), tokens(1, n_prompt, seed=n_prompt)
    decoder, size = decoder_of(model, how), model.config.block_size
    own = decoder if how == 'native' else None
    steps = stream(model, idx, 24, temperature=0, decoder=own)
    expected = torch.cat([token for token, _ in steps], dim=1)
    for k, draft_len, confidence in ((0, 40, 0.0), (1, 2, 0.3), (2, 5, 0.2)):
        monkeypatch.setattr('fast.speculate.CONFIDENCE', confidence)
        steps = list(speculate(model, idx, 24, k, draft_len, temperature=0, decoder=decoder))
        assert all(1 <= new.shape[1] <= d + 1 <= draft_len + 1 for new, d in steps)
        assert confidence or sum(d + 1 - new.shape[1] for new, d in steps) > 10
        new = torch.cat([new for new, _ in steps], dim=1)
        if torch.equal(new, expected):
            continue
        assert how == 'PyTorch'
        at = (new != expected)[0].nonzero()[0].item()  # there, the two are as good as equal
        context, begin = torch.cat((idx, expected[:, :at]), dim=1), 0
        for end in range(min(n_prompt, size), context.shape[1] + 1):  # what the cache held then
            begin = end - size // 2 if end - begin > size else begin
        logits = model(context[:, begin:])[0][0, -1]
        assert logits[expected[0, at]] - logits[new[0, at]] <= 0.01 * logits.norm(), at

@both
def test_drafts_of_a_model_that_agrees_with_itself_all_stand(make_model, tokens, how):
    """A pass is draft_len + 1 tokens, and at a full cache or the end what there is room for."""
    model = make_model(block_size=32, n_layer=4)
    for block in model.blocks[2:]:
        block.attn.o.weight.data.zero_()
        block.ffn.down.weight.data.zero_()
    decoder = decoder_of(model, how)
    for n_prompt, n, expected in ((5, 12, [4, 4, 4]), (5, 11, [4, 4, 3]), (5, 0, []),
                                  (26, 30, [4, 3, 4, 4, 4, 4, 1, 4, 2])):
        steps = speculate(model, tokens(1, n_prompt), n, 1, 3, temperature=0, decoder=decoder)
        assert [(new.shape[1], d) for new, d in steps] == [(n, n - 1) for n in expected]

def chi_square(counts, p):
    """In standard deviations above its mean: about N(0, 1) if counts were drawn with p."""
    expected, possible = counts.sum() * p, p > 0
    assert counts[~possible].sum() == 0
    x = ((counts - expected)[possible].square() / expected[possible]).sum()
    return ((x - possible.sum() + 1) / (2 * (possible.sum() - 1)) ** 0.5).item()

@kinds
@both
def test_verification_is_causal(make_model, tokens, kind, how):
    """A changed draft leaves everything before it as it was, to the last bit."""
    model, drafts, results = make_model(**KINDS[kind] | dict(block_size=16)), tokens(1, 6), []
    decoder = decoder_of(model, how)
    decoder.step(tokens(1, 8))
    for t in (6, 1, 3, 5):  # 6: none
        changed = drafts.clone()
        changed[:, t:t + 1] = (changed[:, t:t + 1] + 1) % 31
        decoder.length = 8
        decoder.step(changed, n_logits=0, exit_layer=0)
        results.append(decoder.logits(decoder.blocks(decoder.states, 1, 2, start=8))[0])
        assert torch.equal(results[-1][:t], results[0][:t])
        assert t == 6 or not torch.equal(results[-1][t], results[0][t])

def test_a_cache_with_holes_is_refused_in_pytorch_too(make_model, tokens):
    """The check of decode.KVCache was gone around: layers 1 and 2 read keys of nobody."""
    decoder = TorchDecoder(make_model())
    decoder.step(tokens(1, 3), exit_layer=0)
    with pytest.raises(ValueError, match='the cache of layer 1 holds 0 tokens, not the 3 before'):
        decoder.step(tokens(1, 1))

def test_accepted_and_replaced_drafts_are_distributed_as_p():
    """And a replacement drawn from p, instead of what q leaves of it, would be noticed."""
    P = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0], [0.1, 0.2, 0.3, 0.4, 0],
                      [0.2, 0.2, 0.2, 0.2, 0.2]])
    Q = torch.tensor([[0.1, 0.45, 0.0, 0.25, 0.2], [0.3, 0.4, 0.2, 0.1, 0.0]])
    firsts, wrong, pairs = torch.zeros(5), torch.zeros(5), torch.zeros(5, 5)
    for _ in range(3000):
        drafts = sample(Q.log())
        count, token = accept(P, Q, drafts)
        text = drafts[:count].flatten().tolist() + [token.item()]
        firsts[text[0]] += 1
        wrong[text[0] if count else sample(P[:1].log()).item()] += 1
        if count:
            pairs[text[0], text[1]] += 1
    assert chi_square(firsts, P[0]) < 5 < chi_square(wrong, P[0])
    assert chi_square(pairs.sum(0), P[1]) < 5  # given that the first stood, whatever it was
    stood = torch.minimum(P[0], Q[0])
    assert chi_square(pairs.sum(1), stood / stood.sum()) < 5
    assert abs(pairs.sum() / 3000 - stood.sum()) < 0.04

@pytest.mark.parametrize('options', [dict(), dict(temperature=0.7, top_k=2)], ids=str)
@both
def test_sampled_texts_are_distributed_as_plain_ones(make_model, how, options):
    """All 27 texts of three tokens over a vocabulary of three, against their exact probabilities.
    A quarter and more of the drafts are refused, so they must be replaced rightly."""
    model = make_model(vocab_size=3, linear='fp' if how == 'PyTorch' else 'bitlinear')
    idx, decoder = torch.tensor([[1, 2]]), decoder_of(model, how)
    texts = torch.tensor(list(itertools.product(range(3), repeat=3)))  # (27, 3)

    def probabilities(exit_layer):
        logits = model(torch.cat((idx.expand(27, 2), texts), dim=1), exit_layer=exit_layer)[0]
        p = distribution(logits.detach()[:, 1:4].flatten(0, 1), **options)  # (81, 3)
        return p.gather(1, texts.reshape(-1, 1)).view(27, 3).prod(1)
    counts, accepted, drafted = torch.zeros(27), 0, 0
    for _ in range(400):
        new, n = zip(*speculate(model, idx, 3, 0, 2, decoder=decoder, **options))
        counts[(torch.cat(new, dim=1)[0] * torch.tensor([9, 3, 1])).sum()] += 1
        accepted, drafted = accepted + 3 - len(new), drafted + sum(n)
    assert accepted < 0.75 * drafted and chi_square(counts, probabilities(None)) < 5
    with pytest.raises(AssertionError):
        assert chi_square(counts, probabilities(0)) < 5  # that is how the drafts are distributed

@pytest.mark.parametrize('temperature, top_k', [(1.0, None), (0.5, 2), (2.0, 100), (1.0, 1)])
def test_distribution_is_what_sample_draws_from(temperature, top_k):
    logits = torch.tensor([0.5, -1.0, 2.0, 0.1, -0.3, 1.2])
    p = distribution(logits[None], temperature, top_k)[0]
    drawn = sample(logits.expand(5000, 6), temperature, top_k).flatten()
    assert p.sum() == pytest.approx(1) and (p[drawn] > 0).all()
    assert (p > 0).sum() == 1 or chi_square(drawn.bincount(minlength=6), p) < 5

def test_a_refusal_by_rounding_leaves_something_to_draw(monkeypatch):
    """p = q but for one unit in the last place: with odds just below 1, (p - q)+ was all zeros."""
    q = torch.tensor([[0.5, 0.5]])
    monkeypatch.setattr(torch, 'rand', lambda *_, **__: torch.tensor([[1 - 2 ** -24]]))
    n, token = accept(torch.cat((q - 2 ** -25, q)), q, torch.tensor([[1]]))
    assert n == 0 and token.item() in (0, 1)

def test_refusals(make_model, tokens):
    """At once, not at the first pass."""
    model, good = make_model(), dict(idx=tokens(1, 4), max_new_tokens=5, draft_layer=0)
    for options, message in [
            (dict(draft_layer=2), 'draft_layer=2 leaves no block to check its drafts: of 3 layers'),
            (dict(draft_layer=-1), 'draft_layer=-1'), (dict(draft_len=0), 'draft_len is at least'),
            (dict(temperature=-1), 'temperature'),
            (dict(idx=tokens(2, 4)), 'one text at a time, got 2'),
            (dict(model=make_model(n_layer=1)), 'one layer has no earlier exit')]:
        with pytest.raises(ValueError, match=message):
            speculate(**dict(model=model) | good | options)
