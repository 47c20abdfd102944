"""
Self-speculative decoding: the first blocks draft what all blocks then check at once (LayerSkip).

    python -m fast.speculate                         which exit should draft, and how much: a table
    python -m fast.speculate --temperature=0.8 --out_dir=out/...
    python sample.py --draft_layer=2 --draft_len=4   use it

    draft     n tokens one by one, each through blocks 0 ... k and the head, drawn from exit k's q
    verify    blocks k+1 ... L-1 take the states of all drafts in one pass; full depth says p
    accept    the drafts up to the first that p refuses; there, or behind them all, a token from p

The draft is the beginning of the model itself. Verification goes on from its states, its keys and
values are the first layers of the one cache, and nothing is computed twice. A refused draft is
forgotten by setting the cache's length back.

The text is distributed as without drafts, exactly (Leviathan et al., 2023; Chen et al., 2023).
Accept a draft d with probability min(1, p(d) / q(d)), else draw from (p - q)+ / sum (p - q)+:

    P(x) = q(x) min(1, p(x) / q(x)) + P(refused) (p(x) - q(x))+ / sum (p - q)+
         = min(p(x), q(x))          + (p(x) - q(x))+                               = p(x)

as P(refused) = 1 - sum min(p, q) = sum (p - q)+. At temperature 0 the rule says: accept while the
argmax is the same (`agree`). With native.c the text is then plain greedy decoding's, token for
token. In PyTorch a pass of several tokens rounds its sums in another order. That can tip a
quantizer to its next code, some 0.01 in a logit, and candidates so close may swap.

If a draft is accepted with probability a, a pass of n drafts brings, in the mean,
E = 1 + a + ... + a^n tokens, for the time of (n + 1) D + V(n + 1). Here D is one token through
blocks 0 ... k, and V(T) is T tokens through the others. Plain decoding takes D + V(1) for each. So
a pass pays as far as V grows slower than T: where time goes into reading the weights.
"""
import json
import os
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from checkpoint import find_run, open_model, run_file
from common import atomic_write, pick_device, require_suffix, synchronize
from configurator import UserError, check, configure, run
from decode import Decoder, require_sampling, sample, stream
from eval_exits import table
from fast import quick_decoder
from prepare import data_of

LENGTHS = (2, 3, 4, 6, 8)  # how many drafts a pass of the sweep has, at most
CONFIDENCE = 0.2  # a greedy draft whose probability is less is not worth checking

def speculate(model, idx, max_new_tokens, draft_layer, draft_len=4, temperature=1.0, top_k=None,
              generator=None, decoder=None):
    """Continue idx (1, T) int64 as decode.stream does at full depth. Yield, for each pass, the
    tokens (1, n) int64 that it brought, and how many it had drafted: n - 1 of them were accepted.

    draft_layer: the exit k that drafts. draft_len: how many tokens a pass drafts, at most; at
    temperature 0 it stops where exit k is not sure (CONFIDENCE). decoder: what runs the model, if
    not PyTorch. ValueError on settings that the model cannot follow."""
    L = model.config.n_layer
    if not 0 <= draft_layer < L - 1:
        raise ValueError(f'draft_layer={draft_layer} leaves no block to check its drafts: of {L} '
                         f'layers, it is 0 to {L - 2}' if L > 1 else
                         'a model of one layer has no earlier exit to draft with')
    if draft_len < 1:
        raise ValueError(f'draft_len is at least 1, got {draft_len}')
    if len(idx) != 1:
        raise ValueError(f'speculative decoding is for one text at a time, got {len(idx)}')
    require_sampling(idx, temperature, top_k)
    decoder = decoder or TorchDecoder(model)
    in_c = hasattr(decoder, 'draft') and top_k is None
    confidence = CONFIDENCE if temperature == 0 else 0.0
    how = dict(temperature=temperature, top_k=top_k)

    def draft(new, most):
        if in_c:
            return decoder.draft(new, draft_layer, most, temperature, confidence, generator)
        return draft_in_steps(decoder, new, draft_layer, L - 1, most, how, confidence, generator)
    return passes(model, idx, max_new_tokens, draft_len, draft, how, generator, decoder)

class TorchDecoder(Decoder):
    """decode.Decoder in two halves, as native.Decoder has them.

    states (1, T, C): what the newest tokens left the blocks with, before any norm."""

    @torch.no_grad()
    def step(self, tokens, n_logits=1, exit_layer=None):
        last, T = self.model.require_layer(exit_layer), tokens.shape[1]
        self.states = self.blocks(self.model.embed(tokens, self.length), 0, last)
        self.length += T
        return self.logits(self.states[0, T - n_logits:], last), last

    @torch.no_grad()
    def blocks(self, h, first, last, start=None):
        """The states before block `first` (1, T, C), of tokens from position `start` (default:
        length) on -> those after block `last`. The cache keeps keys and values; `length` stays."""
        start = self.length if start is None else start
        rope, cache = self.model.rope(start, h.shape[1]), self.cache
        for layer in range(first, last + 1):
            h = self.model.blocks[layer](h, rope, cache.layer(layer, start=start))
            cache.filled[layer] = start + h.shape[1]
        return h

    def logits(self, h, layer=None):
        """h (..., C) after block `layer` (default: the last) -> logits (..., V) of that exit."""
        return self.model.head(self.model.exit_state(h, self.model.require_layer(layer)))

@torch.no_grad()
def passes(model, idx, max_new_tokens, draft_len, draft, how, generator, decoder):
    """The generator behind `speculate`. draft(new, most): as draft_in_steps; how: temperature and
    top_k."""
    block_size, was_training = model.config.block_size, model.training
    model.eval()
    try:
        context = new = idx[:, -block_size:]  # new: what the decoder has not seen yet
        decoder.length = 0
        while max_new_tokens > 0:
            if decoder.length + new.shape[1] > block_size:  # full: again from the newer half
                decoder.length, new = 0, context[:, -max(1, block_size // 2):]
            read = decoder.length + new.shape[1]
            drafts, q, p = draft(new, min(draft_len, max_new_tokens - 1, block_size - read))
            if how['temperature'] == 0:
                n, token = agree(p, drafts)
            else:
                n, token = accept(distribution(p, **how), distribution(q, **how), drafts, generator)
            decoder.length = read + n  # forget the drafts from the refused one on
            new, accepted = token, torch.cat((drafts[:n], token)).t()
            context = torch.cat((context, accepted), dim=1)[:, -block_size:]
            max_new_tokens -= n + 1
            yield accepted, len(drafts)
    finally:
        model.train(was_training)

def draft_in_steps(decoder, new, k, last, most, how, confidence, generator):
    """A pass, up to its verdict: what native.Decoder.draft does in one call. new (1, T): the tokens
    to read first. Returns the drafts (n, 1), the logits (n, V) that they were drawn from, and full
    depth's, (n + 1, V), in place of each draft and after the last."""
    start, tokens, states, logits = decoder.length, [new], [], []
    while True:
        q, _ = decoder.step(tokens[-1], n_logits=int(len(logits) < most), exit_layer=k)
        states.append(decoder.states)
        if len(logits) == most or F.softmax(q.float(), dim=-1).max() < confidence:
            break
        logits.append(q)
        tokens.append(sample(q, **how, generator=generator))
    h = decoder.blocks(torch.cat(states, dim=1), k + 1, last, start)  # verify
    p = decoder.logits(h[:, -len(tokens):])[0]
    drafts = torch.cat([new[:, :0], *tokens[1:]], dim=1).t()
    return drafts, torch.cat(logits) if logits else p[:0], p

def agree(logits, drafts):
    """How many drafts (n, 1) full depth would choose, and its choice after them, (1, 1).
    logits (n + 1, V)."""
    choices = logits.argmax(dim=-1, keepdim=True)
    n = first(choices[:-1] != drafts)
    return n, choices[n:n + 1]

def accept(p, q, drafts, generator=None):
    """How many drafts (n, 1) stand, and the token after them, (1, 1) int64. They were drawn from
    q (n, V); p (n + 1, V) is full depth's distribution in place of each and after the last."""
    odds = p[:-1].gather(1, drafts) / q.gather(1, drafts)
    stands = torch.rand(odds.shape, generator=generator, device=p.device) < odds
    n = first(~stands)
    rest = (p[n] - q[n]).clamp(min=0) if n < len(drafts) else p[n]
    if not rest.any():
        rest = p[n]  # p = q, but for the rounding that made the odds less than 1
    candidates = rest.nonzero()  # (m, 1)
    return n, candidates[torch.multinomial(rest[candidates[:, 0]], 1, generator=generator)]

def first(refused):
    """The index of the first True, or else their number: (n, 1) bool -> int."""
    return [*refused.flatten().tolist(), True].index(True)

def distribution(logits, temperature=1.0, top_k=None):
    """The probabilities that decode.sample draws with: logits (B, V) -> (B, V) float32."""
    if top_k is None:
        return F.softmax(logits.float() / temperature, dim=-1)
    values, ids = logits.topk(min(top_k, logits.shape[-1]))
    p = distribution(values, temperature)
    return torch.zeros(logits.shape, device=logits.device).scatter(-1, ids, p)

# --------------------------------------------------------------------------------------------------
# which exit should draft, and how much

def measure(model, tokens, decoder=None, temperature=0.0, lengths=LENGTHS, n_tokens=48, rounds=3):
    """Speculative decoding by draft layer and length: a list of dicts. Four texts of the split are
    continued, in turns with plain decoding; the median of the ratios of their times counts."""
    room = max(1, min(model.config.block_size // 4, len(tokens) // 2))  # for a prompt
    prompts = [torch.from_numpy(tokens[start:start + room].astype('int64'))[None].to(model.device)
               for start in range(0, len(tokens) - room, (len(tokens) - room) // 4 + 1)]

    def timed(decode, prompt, seed, *settings):
        """Seconds per token, and the passes: how many tokens each brought, and had drafted."""
        steps = decode(model, prompt, n_tokens + max(lengths), *settings, temperature=temperature,
                       generator=torch.Generator(model.device).manual_seed(seed), decoder=decoder)
        next(steps)  # the prompt
        synchronize(model.device)
        started = time.perf_counter()
        done = [(new.shape[1], what) for new, what in steps]
        synchronize(model.device)
        return (time.perf_counter() - started) / sum(n for n, _ in done), done

    results = []
    for layer in range(model.config.n_layer - 1):
        for length in lengths:
            plain, ours, done = [], [], []
            for seed, prompt in enumerate(prompts * rounds):
                plain.append(timed(stream, prompt, seed)[0])
                seconds, new = timed(speculate, prompt, seed, layer, length)
                ours.append(seconds)
                done += new
            brought, drafted = map(sum, zip(*done))
            results.append({
                'draft_layer': layer, 'draft_len': length,
                'acceptance': (brought - len(done)) / max(1, drafted),
                'tokens_per_pass': brought / len(done), 'tok_per_s': 1 / statistics.median(ours),
                'speedup': statistics.median(a / b for a, b in zip(plain, ours))})
    return results

@dataclass
class SpeculateSettings:
    """Measures speculative decoding with every draft layer and several draft lengths."""
    out_dir: str = ''  # the run to measure; empty: the newest
    checkpoint: str = ''  # the file in its folder; empty: ckpt.pt, or else packed.pt
    split: Literal['test', 'val', 'train'] = 'test'  # of the run's own data set
    temperature: float = 0.0  # 0 is greedy
    rounds: int = 3  # how often each is timed
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    packed: bool = True  # by packed weights; False: the model as trained, in PyTorch
    json: str = ''  # where to write the figures; empty: speculate.json in the run's folder

    def __post_init__(self):
        check(self, {'rounds': (1, 1000)})
        require_sampling(torch.zeros(1, 1), self.temperature, None)

def main(argv):
    s = configure(SpeculateSettings, argv)
    out_dir = find_run(s.out_dir)
    path = s.json or os.path.join(out_dir, 'speculate.json')
    require_suffix('json', path, '.json')
    model, settings = open_model(run_file(out_dir, s.checkpoint), pick_device(s.device))
    if model.config.n_layer < 2:
        raise UserError('a model of one layer has no earlier exit to draft with')
    _, tokens = data_of(settings, s.split)
    decoder, how = None, 'PyTorch'
    if s.packed:
        model, decoder, how = quick_decoder(model)
    sweep = measure(model, tokens, decoder, s.temperature, rounds=s.rounds)
    best = max(sweep, key=lambda r: r['speedup'])
    table(f'Speculative decoding, temperature {s.temperature}; speed-up over plain full depth',
          ['draft layer', 'draft length', 'accepted', 'tokens/pass', 'tok/s', 'speed-up'],
          [list(row.values()) for row in sweep])
    print(f'  speeds: {how}\n  best: --draft_layer={best["draft_layer"]} '
          f'--draft_len={best["draft_len"]}')
    with atomic_write(path, 'w') as file:
        json.dump({'run': out_dir, 'decoding': how, 'temperature': s.temperature, 'sweep': sweep,
                   'best': best}, file, indent=1)
    print(f'\nwritten: {path}')

if __name__ == '__main__':
    run(main)
