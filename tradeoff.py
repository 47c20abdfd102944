"""
Quality against compute: what it saves to run fewer blocks, and what it costs.

    python tradeoff.py                                                    the newest run
    python tradeoff.py --out_dir=out/... --json=results/tradeoff.json     ...and plots.py draws it

Four ways to leave early, each with a knob, are set beside full depth:

    fixed         every token leaves after block k
    confidence    a token leaves where the likeliest next token has a probability over the threshold (CALM)
    saturation    a token leaves where the last block has changed its state little, cos(h_l, h_(l-1)) over the threshold
    gate          a token leaves where its gate says so (A6); gates that learned to foresee how far the exit agrees with
                  the last layer (gate_loss='agreement', 'overlap') can know, those trained for a mean depth (A9) cannot

one that shows how well a gate could do:

    oracle        a token is read off at the first exit whose distribution overlaps that of full depth by more than the
                  threshold, or (knob 'argmax') whose likeliest token is the same; all blocks above see its full state

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
import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

import checkpoint
from configurator import configure, run
from decode import EXIT_MODES, exit_states
from eval_exits import load_run, measure_speculation, perplexity, table, windows
from native import fast_decoder
from runtime import commit, machine

ROWS = 512  # logits of so many tokens at a time
THRESHOLDS = {'gate': (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
              'confidence': (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
              'saturation': (0.96, 0.97, 0.975, 0.98, 0.985, 0.99, 0.9925, 0.995)}


@torch.no_grad()
def measure(model, tokens, thresholds=THRESHOLDS, batch_size=16):
    """Every knob's every setting over all of `tokens` (uint16): a list of dicts with way, knob, blocks, loss (nats per
    token) and agreement (a share)."""
    model.eval()
    n_layer = model.config.n_layer
    ways = [('fixed', layer) for layer in range(n_layer)]
    ways += [(way, t) for way in EXIT_MODES if way != 'gate' or model.gates for t in thresholds[way]]
    knobs = ('argmax', *thresholds['gate'])
    decided = len(ways)
    ways += [('oracle', knob) for knob in knobs]
    sums = torch.zeros(len(ways), 3, dtype=torch.float64)  # of blocks, loss, agreements
    for idx, targets in windows(tokens, model.config.block_size, batch_size):
        idx, targets = idx.to(model.device), targets.to(model.device)
        all_states = list(model.hidden_states(idx))
        full = torch.cat([model.head(h).argmax(dim=-1) for h in model.norm(all_states[-1]).flatten(0, 1).split(ROWS)])
        for row, (way, knob) in zip(sums, ways[:decided]):
            if way == 'fixed':
                states, layers = model.exit_state(all_states[knob], knob), torch.full_like(idx, knob)
            else:
                states, layers = exit_states(model, idx, way, knob)
            row[0] += (layers + 1).sum().item()
            for h, target, choice in zip(*(x.split(ROWS) for x in (states.flatten(0, 1), targets.flatten(), full))):
                logits = model.head(h).float()
                row[1] += F.cross_entropy(logits, target, reduction='sum').item()
                row[2] += (logits.argmax(dim=-1) == choice).sum().item()
        for row, knob in zip(sums[decided:], knobs):
            oracle(model, all_states, targets.flatten(), knob, row)
    sums /= len(tokens) - 1
    return [{'way': way, 'knob': knob, 'blocks': blocks, 'loss': loss, 'agreement': agreement}
            for (way, knob), (blocks, loss, agreement) in zip(ways, sums.tolist())]


def oracle(model, states, targets, knob, row):
    """Add to `row` the blocks, loss and agreements of exits that know what full depth will say."""
    flat = [h.flatten(0, 1) for h in states]
    for start in range(0, len(targets), ROWS):
        chunk = slice(start, start + ROWS)
        full = model.head(model.norm(flat[-1][chunk])).float()
        inside = torch.ones_like(targets[chunk], dtype=torch.bool)
        for layer, h in enumerate(flat):
            logits = model.head(model.exit_state(h[chunk], layer)).float()
            if knob == 'argmax':
                ready = logits.argmax(dim=-1) == full.argmax(dim=-1)
            else:
                ready = torch.minimum(logits.softmax(dim=-1), full.softmax(dim=-1)).sum(dim=-1) > knob
            leaving = inside & (ready | (layer == len(flat) - 1))
            row[0] += (layer + 1) * leaving.sum().item()
            row[1] += F.cross_entropy(logits[leaving], targets[chunk][leaving], reduction='sum').item()
            row[2] += (logits.argmax(dim=-1) == full.argmax(dim=-1))[leaving].sum().item()
            inside &= ~leaving


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
    table('Quality against compute', ['way', 'layer, threshold', 'blocks', 'PPL', 'of full depth', 'same choice'],
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
