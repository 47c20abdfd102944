"""
Self-speculative decoding: the first blocks draft what all blocks then check at once (LayerSkip).

    draft     n tokens one by one, each through blocks 0 ... k and the head: what exit k would say, drawn from its q
    verify    blocks k+1 ... L-1 take the states of all drafts in one pass; the head gives full depth's opinion p
    accept    the drafts up to the first one that p refuses, and in its place, or behind them all, a token from p

The draft is the beginning of the model itself. So its states are where verification goes on, its keys and values are
the first layers of the one cache, and nothing is computed twice. What a refused draft has left there is forgotten by
setting the cache's length back.

The text is distributed as without drafts, exactly (speculative sampling: Leviathan et al., 2023; Chen et al., 2023).
Accept a draft d with probability min(1, p(d) / q(d)), else draw from what q leaves of p, (p - q)+ / sum (p - q)+:

    P(x) = q(x) min(1, p(x) / q(x)) + P(refused) (p(x) - q(x))+ / sum (p - q)+
         = min(p(x), q(x))          + (p(x) - q(x))+                               = p(x)

as P(refused) = 1 - sum min(p, q) = sum (p - q)+. At temperature 0 both are one-hot and the rule says: accept while the
argmax is the same (`agree`). The text is then plain greedy decoding's, token for token, where a pass gives each of its
tokens the very bits that it would have alone. native.c does so. In PyTorch a pass of several tokens rounds its sums in
another order; that can tip a quantizer to its next code, some 0.01 in a logit, and candidates so close may swap.

What it brings: if a draft is accepted with probability a, a pass of n drafts yields

    E = 1 + a + ... + a^n = (1 - a^(n+1)) / (1 - a)          tokens, for the time of
    (n + 1) D + V(n + 1)                                     D: one token through blocks 0 ... k, V(T): T tokens through
                                                             the others; plain decoding takes D + V(1) for each token.

So a pass pays as far as V grows slower than T, that is where time goes into reading the weights.
"""
import torch

from decode import Decoder, distribution, require_sampling, sample


def speculate(model, idx, max_new_tokens, draft_layer, draft_len=4, temperature=1.0, top_k=None, generator=None,
              decoder=None):
    """Continue idx (1, T) int64 as decode.stream does at full depth, up to draft_len + 1 tokens at a time; yield, for
    each pass, the tokens (1, n) int64 that it brought, and how many it had drafted: n - 1 of them were accepted.

    draft_layer: the exit k that drafts. decoder: what runs the model, if not PyTorch (native.Decoder). ValueError on
    settings that the model cannot follow."""
    L = model.config.n_layer
    if not 0 <= draft_layer < L - 1:
        raise ValueError(f'draft_layer={draft_layer} leaves no block to check its drafts: of {L} layers, it is 0 to '
                         f'{L - 2}' if L > 1 else 'a model of one layer has no earlier exit to draft with')
    if draft_len < 1:
        raise ValueError(f'draft_len is at least 1, got {draft_len}')
    if len(idx) != 1:
        raise ValueError(f'speculative decoding is for one text at a time, got {len(idx)}')
    require_sampling(idx, temperature, top_k)
    how = dict(temperature=temperature, top_k=top_k)
    return passes(model, idx, max_new_tokens, draft_layer, draft_len, how, generator, decoder or Decoder(model))


@torch.no_grad()
def passes(model, idx, max_new_tokens, k, draft_len, how, generator, decoder):
    """The generator behind `speculate`, whose arguments are checked. how: temperature and top_k."""
    block_size, L, was_training = model.config.block_size, model.config.n_layer, model.training
    model.eval()
    try:
        context = new = idx[:, -block_size:]  # new: the tokens that the decoder has not seen yet
        decoder.length = 0
        while max_new_tokens > 0:
            if decoder.length + new.shape[1] > block_size:  # full: again from the newer half, as decode.stream
                decoder.length, new = 0, context[:, -max(1, block_size // 2):]
            start, T = decoder.length, new.shape[1]
            n_drafts = min(draft_len, max_new_tokens - 1, block_size - start - T)
            tokens, states, logits = [new], [], []
            for i in range(n_drafts + 1):  # draft; of the last token only the state is needed, for its verification
                logits.append(decoder.step(tokens[-1], n_logits=int(i < n_drafts), exit_layer=k)[0])
                states.append(decoder.states)
                if i < n_drafts:
                    tokens.append(sample(logits[-1], **how, generator=generator))
            h = decoder.blocks(torch.cat(states, dim=-2), k + 1, L - 1, start)  # verify: go on where the drafts ended
            checked = decoder.logits(h[..., -n_drafts - 1:, :]).flatten(0, -2)  # (n_drafts + 1, V)
            drafts = torch.cat([new[:, :0], *tokens[1:]], dim=1).t()  # (n_drafts, 1)
            if how['temperature'] == 0:
                n, token = agree(checked, drafts)
            else:
                p, q = distribution(checked, **how), distribution(torch.cat(logits), **how)
                n, token = accept(p, q, drafts, generator)
            decoder.length = start + T + n  # forget the drafts from the refused one on
            new, accepted = token, torch.cat(tokens[1:n + 1] + [token], dim=1)
            context = torch.cat((context, accepted), dim=1)[:, -block_size:]
            max_new_tokens -= n + 1
            yield accepted, n_drafts
    finally:
        model.train(was_training)


def agree(logits, drafts):
    """How many of the drafts (n, 1) full depth would choose, and its choice after them, (1, 1). logits (n + 1, V)."""
    choices = logits.argmax(dim=-1, keepdim=True)
    n = first(choices[:-1] != drafts)
    return n, choices[n:n + 1]


def accept(p, q, drafts, generator=None):
    """How many of the drafts stand, and the token after them, (1, 1) int64.

    drafts (n, 1) int64, drawn from q (n, V); p (n + 1, V): full depth's distribution in place of each and after the
    last."""
    odds = p[:-1].gather(1, drafts) / q.gather(1, drafts)
    stands = torch.rand(odds.shape, generator=generator, device=p.device) < odds
    n = first(~stands)
    rest = (p[n] - q[n]).clamp(min=0) if n < len(drafts) else p[n]
    if not rest.any():
        rest = p[n]  # p = q, but for the rounding that made the odds less than 1
    candidates = rest.nonzero()  # (m, 1)
    return n, candidates[torch.multinomial(rest[candidates[:, 0]], 1, generator=generator)]


def first(refused):
    """The index of the first of them, or else their number. (n, 1) bool -> int."""
    return [*refused.flatten().tolist(), True].index(True)
