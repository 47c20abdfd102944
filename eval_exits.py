"""
What a trained model can do at each of its exits, and what its ternary weights look like.

    python eval_exits.py                            the newest run, on its test text
    python eval_exits.py --out_dir=out/... --json=exits.json --split=val

Prints, and writes as JSON:

    A5, B3-B5, Card    loss, PPL, bits per byte and tokens/s at every exit
    A3                 ternary weights W^ and latent weights W
    A4, A appendix     scale and sparsity of the ternary weights; where the parameters are
    B Fig. 1, A6, A9   by depth: the spread of the activations, and where the gates let tokens go

PPL is exp(mean cross-entropy per token) over the whole split, in consecutive windows. "layer"
counts from 0, as Paper A and --exit_layer do; "blocks" is how many have run, as the Card counts.
"""
import json
import math
import os
import statistics
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from checkpoint import find_run, open_model, run_file
from common import atomic_write, keep_freed_memory, pick_device, require_suffix, synchronize
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import check, configure, run, side_room
from decode import stream
from exits import expected_exit_layer
from prepare import data_of
from quant import bit_linears, latent_weights

def windows(tokens, block_size, batch_size):
    """The whole split, each token but the first predicted once: idx, targets (b, t) int64 of
    consecutive windows. All have t = block_size, but for the last one, which holds what is left."""
    n, rest = divmod(len(tokens) - 1, block_size)
    whole = [(i * block_size, min(batch_size, n - i), block_size) for i in range(0, n, batch_size)]
    for start, b, t in whole + ([(n * block_size, 1, rest)] if rest else []):
        chunk = torch.from_numpy(tokens[start:start + b * t + 1].astype('int64'))
        yield chunk[:-1].view(b, t), chunk[1:].view(b, t)

@torch.no_grad()
def evaluate(model, tokens, layers=None, batch_size=16, processes=None):
    """Mean cross-entropy per token over all of `tokens` (uint16), in nats, at each of the exits
    `layers` (default: the last): list of floats. With `processes` each does its share, and all get
    the result. ValueError if there are fewer than two tokens."""
    if len(tokens) < 2:
        raise ValueError(f'{len(tokens)} tokens have no next token to predict: it takes two')
    model.eval()
    layers = [model.config.n_layer - 1] if layers is None else list(layers)
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    sums = torch.zeros(len(layers), dtype=torch.float64)
    batches = list(windows(tokens, model.config.block_size, batch_size))[rank::world]
    for idx, targets in tqdm(batches, 'evaluating', leave=False, ncols=79, disable=None if
                             rank == 0 and len(layers) > 1 else True):
        idx, targets = idx.to(model.device), targets.to(model.device)
        for layer, h in enumerate(model.hidden_states(idx, max(layers))):
            if layer in layers:
                states = model.exit_state(h, layer)
                sums[layers.index(layer)] += exit_cross_entropy(model, states, targets)
    if world > 1:
        sums = processes.sum(sums.to(model.device)).cpu()
    return (sums / (len(tokens) - 1)).tolist()

def exit_cross_entropy(model, states, targets, rows=512):
    """CE in nats, summed over the tokens, of what the head reads, (B, T, C) or (N, C); logits are
    made of `rows` at a time."""
    return sum(F.cross_entropy(model.head(state).float(), target, reduction='sum').item()
               for state, target in zip(states.flatten(0, -2).split(rows),
                                        targets.flatten().split(rows)))

def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf

def bits_per_byte(loss, meta, split='val'):
    """Nats per token -> bits per byte of text, by the tokens and bytes that the split has."""
    counts = meta['splits'][split]
    return loss / math.log(2) * counts['tokens'] / counts['bytes']

def measure_speed(model, layers, tokens, decoder=None, n_tokens=32, rounds=3):
    """Greedy decoding, batch 1, at each of `layers`: list of tokens/s, medians of rounds in turns
    (a machine's speed drifts)."""
    prompt = torch.from_numpy(tokens[:8].astype('int64'))[None].to(model.device)
    seconds = {layer: [] for layer in layers}
    for layer in list(layers) * rounds:
        steps = stream(model, prompt, n_tokens + 1, 0, exit_layer=layer, decoder=decoder)
        next(steps)  # the prompt
        synchronize(model.device)
        started = time.perf_counter()
        for _ in steps:
            pass
        synchronize(model.device)
        seconds[layer].append(time.perf_counter() - started)
    return [n_tokens / statistics.median(seconds[layer]) for layer in layers]

def weight_statistics(model):
    """Table A4: mean alpha, share of zeros, matrices of mostly zeros, shares of +1 and -1."""
    ternary = [layer.ternary() for layer in model.linears() if hasattr(layer, 'ternary')]
    if not ternary:
        return None
    shares = {c: [(codes == c).float().mean().item() for codes, _ in ternary] for c in (0, 1, -1)}
    sizes = [codes.numel() for codes, _ in ternary]
    zero, plus, minus = (np.average(shares[c], weights=sizes).item() for c in (0, 1, -1))
    return {'mean_scale': statistics.mean(scale.mean().item() for _, scale in ternary),
            'sparsity': zero, 'high_sparsity_matrices': sum(share > 0.5 for share in shares[0]),
            'plus': plus, 'minus': minus}

def parameter_breakdown(model):
    """Paper A's appendix: parameters by component, {name: count}."""
    with torch.device('meta'):
        model = type(model)(model.config)  # a packed model has buffers in their place
    parts = {'embedding': 'token embedding', 'head': 'LM head', 'gates': 'gates',
             'attn': 'attention', 'ffn': 'FFN'}
    quantizable, counts = {id(layer.weight) for layer in model.linears()}, Counter()
    for name, p in model.named_parameters():
        words = name.split('.')  # as in blocks.0.attn.q.weight
        counts[f'{parts[words[2]]} {words[3]} (quantizable)' if id(p) in quantizable else
               parts.get(words[0], 'norms and the rest')] += p.numel()
    return {**counts, 'total': counts.total()}

@torch.no_grad()
def depth_statistics(model, tokens, threshold=0.5, batches=8):
    """Standard deviation of h_l (B Fig. 1), and what the gates decide at `threshold` (A6, A9), or
    None, over the first batches of windows."""
    spreads, gates, L = [], [], model.config.n_layer
    for _, (idx, _) in zip(range(batches), windows(tokens, model.config.block_size, 8)):
        states = list(model.hidden_states(idx.to(model.device)))
        spreads.append([h.float().var(correction=0).item() for h in states])
        if model.gates:
            gates.append(model.gate_probabilities(states[:L - 1]).flatten(0, 1).cpu())  # (B T, L-1)
    std = np.mean(spreads, axis=0) ** 0.5
    if not gates:
        return std.tolist(), None
    p = torch.cat(gates)
    leaves = torch.cat((p > threshold, torch.ones(len(p), 1, dtype=torch.bool)), dim=1)
    layer = leaves.int().argmax(dim=1)  # the first that is true; the last layer takes all
    return std.tolist(), {
        'threshold': threshold, 'mean_exit_layer': layer.float().mean().item(),
        'expected_exit_layer': expected_exit_layer(p).mean().item(),
        'target_exit': model.config.target_exit, 'mean_probability': p.mean(dim=0).tolist(),
        'leaving_share': (torch.bincount(layer, minlength=L) / len(p)).tolist()}

# --------------------------------------------------------------------------------------------------
# the report

def table(title, header, rows):
    """Print rows of cells under a header, right-aligned; floats to four figures."""
    def show(cell):
        if isinstance(cell, float):
            return f'{cell:,.0f}' if abs(cell) >= 1000 else f'{cell:.4g}'
        return '' if cell is None else str(cell)
    text = [[show(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*text)]
    print(f'\n{title}')
    for row in text:
        print('  ' + '  '.join(cell.rjust(width) for cell, width in zip(row, widths)))

def print_report(report, gate_loss):
    exits, weights, stats = report['exits'], report['weights'], report['stats']
    full, gates = exits[-1], stats['gates']

    def trade(e):  # B4, B5: PPL increase, speed gain, their quotient
        worse = 100 * (e['ppl'] / full['ppl'] - 1)
        faster = 100 * (e['tok_per_s'] / full['tok_per_s'] - 1)
        return [worse, faster, worse / faster if e is not full and faster > 0 else None]
    table(f'Exits, {report["split"]} text (Tables A5, B3-B5)',
          ['layer', 'blocks', 'loss', 'PPL', 'bits/B', 'tok/s', 'PPL +%', 'speed +%', 'ratio'],
          [[e['layer'], e['blocks'], e['loss'], e['ppl'], e['bits_per_byte'], e['tok_per_s'],
            *trade(e)] for e in exits])
    print(f'  speeds: {report["decoding"]}')
    table('Full depth by its weights (Table A3)', ['weights', 'loss', 'PPL'],
          [[name, w['loss'], w['ppl']] for name, w in weights.items()])
    if stats['weights']:
        table('Ternary weights (Table A4)',
              ['mean alpha', 'zeros', 'matrices > 50% zeros', '+1', '-1'],
              [list(stats['weights'].values())])
    table('Parameters (Paper A, appendix)', ['component', 'parameters'],
          [[name, f'{count:,}'] for name, count in stats['parameters'].items()])
    share = gates['leaving_share'] if gates else [None] * len(exits)
    mean_p = gates['mean_probability'] + [None] if gates else share
    table('By depth (B Fig. 1; A6)', ['layer', 'std of h', 'mean p', 'share leaving'],
          list(zip(range(len(exits)), stats['activation_std'], mean_p, share)))
    if gates:
        target = f', its target {gates["target_exit"]}' * (gate_loss == 'cost')
        print(f'  gates at {gates["threshold"]}: mean exit layer {gates["mean_exit_layer"]:.2f}; '
              f'E (A9) {gates["expected_exit_layer"]:.2f}{target}')

@dataclass
class EvalSettings:
    """Evaluates every exit of a trained model, and its weights."""
    out_dir: str = ''  # the run to evaluate; empty: the newest
    checkpoint: str = ''  # the file in its folder; empty: ckpt.pt, or else packed.pt
    split: Literal['', 'test', 'val', 'train'] = ''  # of the run's data; empty: test, or else val
    batch_size: int = 16  # sequences at a time
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    packed: bool = True  # time decoding by fast/, and measure what its packed weights cost
    json: str = ''  # where to write the figures; empty: eval.json in the run's folder

    def __post_init__(self):
        check(self, {'batch_size': (1, 2 ** 20)})

def main(argv):
    s = configure(EvalSettings, argv)
    keep_freed_memory()
    out_dir = find_run(s.out_dir)
    path = require_suffix('--json', s.json or os.path.join(out_dir, 'eval.json'), '.json')
    model, settings = open_model(run_file(out_dir, s.checkpoint), pick_device(s.device))
    split = s.split or ('test' if 'test' in settings['meta']['splits'] else 'val')
    meta, tokens = data_of(settings, split)
    layers = list(range(model.config.n_layer))
    print(f'evaluating {len(layers)} exits on {len(tokens):,} tokens')
    losses = evaluate(model, tokens, layers, s.batch_size)
    ternary = weight_statistics(model)
    weights = {'ternary' if ternary else 'full precision': losses[-1]}
    fast, decoder, how = model, None, 'PyTorch'
    if s.packed and (room := side_room('fast')):
        fast, decoder, how = room.quick_decoder(model)
    if fast is not model:
        weights['packed'] = evaluate(fast, tokens, None, s.batch_size)[-1]
    if bit_linears(model):
        with latent_weights(model):
            weights['latent'] = evaluate(model, tokens, None, s.batch_size)[-1]
    speeds = measure_speed(fast, layers, tokens, decoder)
    std, gates = depth_statistics(model, tokens)
    report = {
        'run': out_dir, 'split': split, 'tokens': len(tokens), 'tokenizer': meta['tokenizer'],
        'exits': [{'layer': layer, 'blocks': layer + 1, 'loss': loss, 'ppl': perplexity(loss),
                   'bits_per_byte': bits_per_byte(loss, meta, split), 'tok_per_s': speed}
                  for layer, loss, speed in zip(layers, losses, speeds)],
        'decoding': how,
        'weights': {name: {'loss': x, 'ppl': perplexity(x)} for name, x in weights.items()},
        'stats': {'weights': ternary, 'parameters': parameter_breakdown(model),
                  'activation_std': std, 'gates': gates}}
    print_report(report, model.config.gate_loss)
    with atomic_write(path, 'w') as file:
        json.dump(report, file, indent=1)
    print(f'\nwritten: {path}; python -m papers.plots --runs={out_dir} draws it')

if __name__ == '__main__':
    run(main)
