"""
Quality against compute: what it saves to run fewer blocks, and what it costs.

    python tradeoff.py                                                    the newest run
    python tradeoff.py --out_dir=out/... --json=results/tradeoff.json     ...and plots.py draws it

Four ways to leave early, each with a knob, are set beside full depth:

    fixed         every token leaves after block k
    confidence    a token leaves where the likeliest next token has a probability over the threshold (CALM)
    saturation    a token leaves where the last block has changed its state little, cos(h_l, h_(l-1)) over the threshold
    gate          a token leaves where its gate says so (A6); gates that learned to foresee how far the exit is from the
                  last layer (gate_loss='agreement', 'overlap', 'divergence') can know, those that learned a mean depth
                  (A9) cannot

one that shows how well any rule could do that does not know the next token:

    oracle        a token is read off at the exit l with the least KL(p_full || p_l) + knob * (l + 1), which is the loss
                  that leaving there is expected to add and the price of its blocks; all blocks above see its full
                  state. Knob 'argmax': at the first exit whose likeliest token is that of full depth

and one that changes nothing but the time:

    drafts        block k drafts, all blocks check (speculate.py)

For each setting of the knob: blocks run per token (the mean), PPL, and in how many places the likeliest token is the
one of full depth. Every token is predicted once, from the true text before it, whose tokens left by the same rule and
are seen by the blocks above with the state that they left with (decode.exit_states), as in decoding. Deciding costs
something, too, which blocks do not show: confidence reads the head at each exit, with the multiplications of 9 blocks,
a gate takes those of 1/176 of a block (Paper A's shape).
With drafts more blocks are run than without, but several tokens go through a block at once; they are counted as often
as one waits for them, (n (k + 1) + L) / (tokens a pass) with n drafts a pass.
"""
import json
import math
import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

import checkpoint
from configurator import configure, run
from decode import EXIT_MODES, exit_score, exit_states
from eval_exits import load_run, measure_speculation, perplexity, table, windows
from native import fast_decoder
from runtime import commit, machine

ROWS = 512  # logits of so many tokens at a time
SHARES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # of the blocks: what the knobs are set to


@torch.no_grad()
def measure(model, tokens, shares=SHARES, batch_size=16):
    """Every way at about these shares of the blocks, over all of `tokens` (uint16): a list of dicts with way, knob,
    blocks (the mean), loss (nats per token) and agreement (a share). First the fixed exits, in their order."""
    model.eval()
    n_layer = model.config.n_layer
    ways = [way for way in EXIT_MODES if way != 'gate' or model.gates]
    batches = [(idx.to(model.device), targets.to(model.device))
               for idx, targets in windows(tokens, model.config.block_size, batch_size)]
    seen = [look_at_exits(model, idx, targets, ways) for idx, targets in batches]
    loss, divergence, choice = (torch.cat([batch[name] for batch in seen]) for name in ('loss', 'divergence', 'choice'))

    def read_off(way, knob, layers):
        """A point whose tokens are read off at `layers` (N,), all blocks having run."""
        at = layers[:, None]
        return {'way': way, 'knob': knob, 'blocks': (layers + 1).double().mean().item(),
                'loss': loss.gather(1, at).double().mean().item(),
                'agreement': (choice.gather(1, at).squeeze(1) == choice[:, -1]).double().mean().item()}
    points = [read_off('fixed', layer, torch.full((len(loss),), layer)) for layer in range(n_layer)]
    cheapest = partial(cheapest_exit, divergence)
    for share in shares:
        price = knob_for(cheapest, share * n_layer, sign=-1)
        points.append(read_off('oracle', price, cheapest(price)))
    points.append(read_off('oracle', 'argmax', first(choice == choice[:, -1:])))
    for way in ways:
        ready = partial(first_over, torch.cat([batch[way] for batch in seen]))
        for threshold in dict.fromkeys(knob_for(ready, share * n_layer) for share in shares):
            points.append(follow(model, batches, way, threshold, choice[:, -1]))
    return points


def look_at_exits(model, idx, targets, ways):
    """What every exit says of every token of idx and targets (B, T), all blocks having run: dict of (N, L) tensors on
    the CPU, N = B T: loss in nats, divergence KL(p_full || p_l), choice (the likeliest token), and for each of `ways`
    the score that decides (infinite at the last layer, where all leave)."""
    states = list(model.hidden_states(idx))
    seen = {name: [] for name in ('loss', 'divergence', 'choice', *ways)}
    for rows in torch.arange(idx.numel(), device=idx.device).split(ROWS):
        flat = [h.flatten(0, 1)[rows] for h in (model.embedding(idx), *states)]
        log_p = torch.stack([model.head(model.exit_state(h, layer)).float().log_softmax(dim=-1)
                             for layer, h in enumerate(flat[1:])], dim=1)  # (rows, L, V)
        target = targets.flatten()[rows]
        seen['loss'].append(-log_p[torch.arange(len(rows)), :, target])
        seen['divergence'].append((log_p[:, -1:].exp() * (log_p[:, -1:] - log_p)).sum(dim=-1))
        seen['choice'].append(log_p.argmax(dim=-1))
        for way in ways:
            scores = [exit_score(model, h, before, layer, way)
                      for layer, (before, h) in enumerate(zip(flat[:-2], flat[1:-1]))]
            seen[way].append(torch.stack([*scores, torch.full(target.shape, math.inf, device=idx.device)], dim=1))
    return {name: torch.cat(parts).cpu() for name, parts in seen.items()}


def first(ready):
    """The first layer that is ready, or the last layer: (N, L) bool -> (N,) int64."""
    return torch.cat((ready[:, :-1], torch.ones(len(ready), 1, dtype=torch.bool)), dim=1).int().argmax(dim=1)


def first_over(scores, threshold):
    """Where tokens leave by their scores (N, L): (N,) int64."""
    return first(scores > threshold)


def cheapest_exit(divergence, price):
    """The exit at which divergence (N, L), in nats, and the price of the blocks before it are least: (N,) int64."""
    return (divergence + price * torch.arange(1, divergence.shape[1] + 1)).argmin(dim=1)


def knob_for(layers_at, blocks, sign=1):
    """The knob in 0 ... 1 at which the layers that it leads to, layers_at(knob) (N,), come nearest to so many blocks in
    the mean; with it blocks grow (sign 1) or shrink (sign -1)."""
    low, high = 0.0, 1.0
    for _ in range(30):
        knob = (low + high) / 2
        too_deep = (layers_at(knob) + 1).double().mean().item() > blocks
        low, high = (low, knob) if too_deep == (sign > 0) else (knob, high)
    return knob


def follow(model, batches, way, threshold, full):
    """The point of tokens that leave by a rule, as in decoding: those behind them meet the states that they left with.
    full (N,): the choice of full depth."""
    sums, start = torch.zeros(3, dtype=torch.float64), 0
    for idx, targets in batches:
        states, layers = exit_states(model, idx, way, threshold)
        sums[0] += (layers + 1).sum().item()
        for h, target in zip(states.flatten(0, 1).split(ROWS), targets.flatten().split(ROWS)):
            logits = model.head(h).float()
            sums[1] += F.cross_entropy(logits, target, reduction='sum').item()
            sums[2] += (logits.argmax(dim=-1).cpu() == full[start:start + len(h)]).sum().item()
            start += len(h)
    blocks, loss, agreement = (sums / len(full)).tolist()
    return {'way': way, 'knob': threshold, 'blocks': blocks, 'loss': loss, 'agreement': agreement}


def measure_drafts(model, tokens):
    """The draft length that waits for the fewest blocks, greedy, for every draft layer: points as those of `measure`,
    but for the loss, which is full depth's."""
    fast, decoder, _ = fast_decoder(model)
    n_layer, best = model.config.n_layer, {}
    for result in measure_speculation(fast, tokens, decoder, rounds=1):
        k, n = result['draft_layer'], result['draft_len']
        blocks = (n * (k + 1) + n_layer) / result['tokens_per_pass']
        if k not in best or blocks < best[k]['blocks']:
            best[k] = {'way': 'drafts', 'knob': f'{k}, {n}', 'blocks': blocks, 'loss': None, 'agreement': 1.0}
    return list(best.values())


def at_compute(points, way, blocks, what='loss'):
    """The loss (or agreement) of `way` at so many blocks a token, between the two measured points that enclose them;
    None outside. (The oracle's knob 'argmax' is another rule, and apart.)"""
    points = [p for p in points if p.get('knob') != 'argmax']
    full = max((p for p in points if p['way'] == 'fixed'), key=lambda p: p['blocks'])  # where every threshold ends
    curve = sorted((p['blocks'], p[what]) for p in [*points, full | {'way': way}] if p['way'] == way)
    for (x0, y0), (x1, y1) in zip(curve, curve[1:]):
        if x0 <= blocks <= x1:
            return y0 + (y1 - y0) * (blocks - x0) / max(x1 - x0, 1e-9)
    return None


def print_points(points, n_layer):
    full = next(p['loss'] for p in points if p['way'] == 'fixed' and p['knob'] == n_layer - 1)
    table('Quality against compute', ['way', 'layer or knob', 'blocks', 'PPL', 'of full depth', 'same choice'],
          [[p['way'], p['knob'], p['blocks'], perplexity(p['loss']), perplexity(p['loss'] - full), p['agreement']]
           for p in points])
    for way in dict.fromkeys(p['way'] for p in points):
        loss = at_compute(points, way, 0.7 * n_layer)
        if loss is not None:
            print(f'{way}, 30% fewer blocks: PPL {perplexity(loss - full):.3f} x full depth')


@dataclass
class TradeoffSettings:
    """Measures quality against compute for every way of leaving early."""
    out_dir: str = ''  # the run; empty: the newest
    checkpoint: str = 'ckpt.pt'  # the file in its folder: the best model, or packed.pt
    split: Literal['val', 'test', 'train'] = 'val'  # of the run's own data set
    max_tokens: int = 100_000  # of the split, from its beginning; 0: all
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    json: str = ''  # where to write the figures; empty: tradeoff.json in the run's folder

    def __post_init__(self):
        if self.max_tokens < 0 or self.max_tokens == 1:
            raise ValueError(f'max_tokens is 0 (all) or at least 2, got {self.max_tokens}')


def main(argv):
    s = configure(TradeoffSettings, argv)
    out_dir, model, _, tokens = load_run(s)
    tokens = tokens[:s.max_tokens or None]
    points = measure(model, tokens)
    points += [point | {'loss': points[model.config.n_layer - 1]['loss']} for point in measure_drafts(model, tokens)]
    print_points(points, model.config.n_layer)
    path = s.json or os.path.join(out_dir, 'tradeoff.json')
    report = {'run': os.path.basename(os.path.normpath(out_dir)), 'commit': commit(), 'machine': machine(),
              'split': s.split, 'tokens': len(tokens), 'n_layer': model.config.n_layer, 'points': points}
    with checkpoint.atomic_write(path, 'w') as file:
        json.dump(report, file, indent=1)
    print(f'\nwritten: {path}')


if __name__ == '__main__':
    run(main)
