"""
What a trained model can do at each of its exits, and what its ternary weights look like.

    python eval_exits.py                            the newest run
    python eval_exits.py --out_dir=out/... --json=exits.json --split=train
    python eval_exits.py --speculate=True           also: which exit should draft, and how much (speculate.py)

Prints, with the papers' own figures beside ours, and writes as JSON and PNG:

    A5, B3-B5, Card    loss, PPL, bits per byte and tokens/s at every exit
    A3                 ternary weights W^ against latent weights W
    A4, A appendix     scale and sparsity of the ternary weights; where the parameters are
    B Fig. 1           standard deviation of the activations by depth
    A6, A9             where the gates let tokens go

PPL is exp(mean cross-entropy per token) over the whole split in consecutive windows, ternary weights unless it says
otherwise. "layer" counts from 0, as Paper A and --exit_layer do; "blocks" is how many have run, as the Card counts.
"""
import json
import math
import os
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch

import checkpoint
import papers
from configurator import UserError, configure, run
from decode import require_temperature, stream
from exits import expected_exit_layer
from model import BitSkip
from native import fast_decoder
from prepare import data_of
from quant import bit_linears, latent_weights
from runtime import keep_freed_memory, pick_device, synchronize
from speculate import speculate


# ----------------------------------------------------------------------------------------------------------------------
# loss

def windows(tokens, block_size, batch_size):
    """The whole split, each token but the first predicted once: yields idx, targets (b, t) int64 of consecutive,
    non-overlapping windows. All have t = block_size, but for the last one, which holds what is left."""
    n = (len(tokens) - 1) // block_size
    rest = (len(tokens) - 1) % block_size
    batches = [(i * block_size, min(batch_size, n - i), block_size) for i in range(0, n, batch_size)]
    for start, b, t in batches + ([(n * block_size, 1, rest)] if rest else []):
        chunk = torch.from_numpy(tokens[start:start + b * t + 1].astype('int64'))
        yield chunk[:-1].view(b, t), chunk[1:].view(b, t)


@torch.no_grad()
def evaluate(model, tokens, layers=None, batch_size=16, processes=None, unshifted=False):
    """Mean cross-entropy per token over all of `tokens` (uint16), in nats, at each of the exits `layers` (default: the
    last): list of floats. Deterministic, token-weighted; with `processes`, each does its share and all get the result.
    unshifted=True asks for the current token instead of the next, which is a mistake to be seen, not to be made.
    ValueError if there are fewer than two tokens."""
    if len(tokens) < 2:
        raise ValueError(f'{len(tokens)} tokens have no next token to predict: an evaluation needs two or more')
    model.eval()
    layers = [model.config.n_layer - 1] if layers is None else layers
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    device = model.device
    sums = torch.zeros(len(layers) + 1, dtype=torch.float64)
    for i, (idx, targets) in enumerate(windows(tokens, model.config.block_size, batch_size)):
        idx, targets = idx.to(device), (idx if unshifted else targets).to(device)
        if i % world == rank:
            sums[:-1] += model.exit_cross_entropy(idx, targets, layers)
            sums[-1] += targets.numel()
    if i % world < rank:  # the last round was without this process, and yet: under FSDP a block runs in all or in none
        model.exit_cross_entropy(idx, targets, layers)
    if processes:
        sums = processes.sum(sums.float().to(device) if device.type == 'mps' else sums.to(device)).cpu()
    return (sums[:-1] / sums[-1]).tolist()


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss, meta, split='val'):
    """Nats per token -> bits per byte of text, by the tokens and bytes that the split has."""
    counts = meta['splits'][split]
    return loss / math.log(2) * counts['tokens'] / counts['bytes']


# ----------------------------------------------------------------------------------------------------------------------
# the other measurements

def measure_speed(model, layers, tokens, decoder=None, n_tokens=32, rounds=3):
    """Greedy decoding speed, batch 1, at each of `layers`: list of tokens/s. The exits take turns, and the median of
    their rounds counts, because a machine's speed drifts."""
    prompt = torch.from_numpy(tokens[:8].astype('int64'))[None].to(model.device)
    seconds = {layer: [] for layer in layers}
    for _ in range(rounds):
        for layer in layers:
            steps = stream(model, prompt, n_tokens + 1, temperature=0, exit_layer=layer, decoder=decoder)
            next(steps)  # the prompt
            synchronize(model.device)
            started = time.perf_counter()
            for _ in steps:
                pass
            synchronize(model.device)
            seconds[layer].append(time.perf_counter() - started)
    return [n_tokens / statistics.median(seconds[layer]) for layer in layers]


def measure_speculation(model, tokens, decoder=None, temperature=0.0, lengths=(1, 2, 3, 4, 6), n_tokens=48, rounds=3):
    """Speculative decoding (speculate.py), batch 1, by draft layer and draft length: a list of dicts. It continues four
    windows of the split (fewer, if it is tiny), in turn with plain decoding; the median of the ratios of their times
    counts."""
    n_prompt = max(1, min(model.config.block_size // 4, len(tokens) // 2))
    prompts = [torch.from_numpy(tokens[start:start + n_prompt].astype('int64'))[None].to(model.device)
               for start in range(0, len(tokens) - n_prompt, (len(tokens) - n_prompt) // 4 + 1)]

    def timed(decode, prompt, seed, *options):
        """Seconds per token of a decoding, and its passes: how many tokens each brought, and what comes with them."""
        steps = decode(model, prompt, n_tokens + max(lengths), *options, temperature=temperature, decoder=decoder,
                       generator=torch.Generator(model.device).manual_seed(seed))
        next(steps)  # the prompt
        synchronize(model.device)
        started = time.perf_counter()
        passes = [(new.shape[1], what) for new, what in steps]
        synchronize(model.device)
        return (time.perf_counter() - started) / sum(n for n, _ in passes), passes

    results = []
    for layer in range(model.config.n_layer - 1):
        for length in lengths:
            plain, ours, passes = [], [], []
            for seed, prompt in enumerate(prompts * rounds):
                plain.append(timed(stream, prompt, seed)[0])
                seconds, done = timed(speculate, prompt, seed, layer, length)
                ours.append(seconds)
                passes += done
            n_new, n_drafted = map(sum, zip(*passes))
            results.append({'draft_layer': layer, 'draft_len': length,
                            'acceptance': (n_new - len(passes)) / max(1, n_drafted),
                            'tokens_per_pass': n_new / len(passes), 'tok_per_s': 1 / statistics.median(ours),
                            'speedup': statistics.median(a / b for a, b in zip(plain, ours))})
    return results


def weight_statistics(model):
    """Table A4: mean alpha, share of zeros, matrices with more than half zeros, shares of +1 and -1 (over weights)."""
    layers = bit_linears(model)
    if not layers:
        return None
    codes, scales = zip(*(layer.ternary() for layer in layers))
    total = sum(c.numel() for c in codes)
    return {'mean_scale': statistics.mean(scale.item() for scale in scales),
            'sparsity': sum((c == 0).sum().item() for c in codes) / total,
            'high_sparsity_matrices': sum((c == 0).float().mean().item() > 0.5 for c in codes),
            'plus': sum((c == 1).sum().item() for c in codes) / total,
            'minus': sum((c == -1).sum().item() for c in codes) / total}


def parameter_breakdown(model):
    """Paper A's appendix: parameters by component, {name: count}."""
    def size(module):
        return sum(p.numel() for p in module.parameters())
    with torch.device('meta'):
        model = BitSkip(model.config)  # a packed model has buffers in their place
    counts = {'token embedding': size(model.embedding)}
    for block in model.blocks:
        for part in (block.attn, block.ffn):
            for name, child in part.named_children():
                if any(child is layer for layer in block.linears()):
                    key = f'{"attention" if part is block.attn else "FFN"} {name} (quantizable)'
                    counts[key] = counts.get(key, 0) + size(child)
    counts['LM head'] = size(model.head)
    counts |= {'gates': size(model.gates), 'adapters': size(model.adapters)}
    counts['norms'] = size(model) - sum(counts.values())
    return counts | {'total': size(model)}


@torch.no_grad()
def activation_and_gate_statistics(model, tokens, threshold=0.5, batches=8, batch_size=8):
    """Standard deviation of h_l (B Fig. 1) and, if the model has gates, what they decide at `threshold` (A6, A9), over
    the first `batches` batches of windows."""
    n_layer, device = model.config.n_layer, model.device
    sums, squares, count, gates = torch.zeros(n_layer), torch.zeros(n_layer), 0, []
    for i, (idx, _) in enumerate(windows(tokens, model.config.block_size, batch_size)):
        if i == batches:
            break
        states = list(model.hidden_states(idx.to(device)))
        sums += torch.stack([h.float().sum().cpu() for h in states])
        squares += torch.stack([h.float().square().sum().cpu() for h in states])
        count += states[0].numel()
        if model.gates:
            gates.append(model.gate_probabilities(states[:-1]).flatten(0, 1).cpu())  # (B T, L-1)
    std = (squares / count - (sums / count) ** 2).clamp(min=0).sqrt().tolist()
    if not gates:
        return std, None
    p = torch.cat(gates)
    leaves = torch.cat((p > threshold, torch.ones(len(p), 1, dtype=torch.bool)), dim=1)  # the last layer takes all
    layer = leaves.int().argmax(dim=1)  # the first that is true
    share = torch.bincount(layer, minlength=n_layer) / len(p)
    return std, {'threshold': threshold, 'mean_exit_layer': layer.float().mean().item(),
                 'expected_exit_layer': expected_exit_layer(p).mean().item(),
                 'target_exit': model.config.target_exit, 'leaving_share': share.tolist(),
                 'mean_probability': p.mean(dim=0).tolist()}


# ----------------------------------------------------------------------------------------------------------------------
# the report

def table(title, header, rows):
    """Print rows of cells under a header, right-aligned; floats to four figures."""
    text = [[f'{cell:.4g}' if isinstance(cell, float) else '' if cell is None else str(cell) for cell in row]
            for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*text)]
    print(f'\n{title}')
    for row in text:
        print('  ' + '  '.join(cell.rjust(width) for cell, width in zip(row, widths)))


def cell_of(config):
    """Which of Paper A's four cells a model is, at whatever scale: its label in papers.py; None for other models."""
    is_theirs = (config.linear in ('bitlinear', 'hbitlinear') and config.norm == 'layernorm' and config.sub_norm
                 and config.ffn == 'relu2' and config.act_bits == 8 and config.hadamard_layers == 'all')
    return papers.CELLS[config.linear == 'hbitlinear', config.lambda_ee > 0] if is_theirs else None


def print_report(report, cell):
    """The tables of a report; beside them Paper A's figures for its `cell`, if it is one."""
    exits, full, weights, stats = report['exits'], report['exits'][-1], report['weights'], report['stats']
    kind = 'ternary weights' if stats['weights'] else 'full precision'
    paper = papers.A5 if len(exits) == len(papers.A5) and cell == 'BitSkip (H+EE)' else [None] * len(exits)

    def trade(e):  # B4, B5: PPL increase, speed gain, their quotient
        worse, faster = 100 * (e['ppl'] / full['ppl'] - 1), 100 * (e['tok_per_s'] / full['tok_per_s'] - 1)
        return [worse, faster, worse / faster if e is not full and faster > 0 else None]
    table(f'Exits ({report["split"]} split, {kind}; Tables A5, B3-B5)',
          ['layer', 'blocks', 'loss', 'PPL', 'bits/B', 'tok/s', 'PPL +%', 'speed +%', 'ratio', 'Paper A'],
          [[e['layer'], e['blocks'], e['loss'], e['ppl'], e['bits_per_byte'], e['tok_per_s'], *trade(e), p]
           for e, p in zip(exits, paper)])
    best = report.get('speculation', {}).get('best')
    if best:
        table(f'Speculative decoding, temperature {report["speculation"]["temperature"]}; speed in full depth\'s',
              ['draft layer', 'draft length', 'accepted', 'tokens/pass', 'tok/s', 'speed'],
              [list(r.values()) for r in report['speculation']['sweep']])
        print(f'\nbest: --draft_layer={best["draft_layer"]} --draft_len={best["draft_len"]}, {best["speedup"]:.2f} '
              'times the speed of plain decoding at full depth')
    print(f'\nspeeds: {report["decoding"]}')
    if 'packed' in weights:
        packed, ternary = weights['packed']['ppl'], weights['ternary']['ppl']
        print(f'PPL with an int8 head: {packed:.4f}, {100 * (packed / ternary - 1):+.3f}% of {ternary:.4f}')
    if 'latent' in weights:
        latent, ternary = weights['latent']['ppl'], weights['ternary']['ppl']
        pairs = {'ours': (latent, ternary)} | ({'Paper A': papers.A3[cell]} if cell else {})
        table('Latent and ternary weights (Table A3)', ['', 'latent PPL', 'ternary PPL', 'ternary +%'],
              [[whose, *pair, 100 * (pair[1] / pair[0] - 1)] for whose, pair in pairs.items()])
    if stats['weights']:
        table('Ternary weights (Table A4)', ['', 'mean alpha', 'zeros', 'matrices > 50% zeros', '+1', '-1'],
              [['ours', *stats['weights'].values()]] + ([['Paper A', *papers.A4[cell]]] if cell else []))
    table('Parameters (Paper A, appendix)', ['component', 'parameters'],
          [[name, f'{count:,}'] for name, count in stats['parameters'].items()])
    gates = stats['gates']
    table('By depth (B Fig. 1; gates: A6)',
          ['layer', 'std of h'] + (['mean p', 'share leaving'] if gates else []),
          [[layer, std] + ([gates['mean_probability'][layer] if layer < len(exits) - 1 else None,
                            gates['leaving_share'][layer]] if gates else [])
           for layer, std in enumerate(stats['activation_std'])])
    if gates:
        print(f'\nGates at threshold {gates["threshold"]}: mean exit layer {gates["mean_exit_layer"]:.2f}; '
              f'E (A9) = {gates["expected_exit_layer"]:.2f} for a target of {gates["target_exit"]}')


def plot(report, cell, path):
    """Exit curve and activation spread side by side, as PNG; Paper A's curve, if this is its `cell`."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    layers = [e['layer'] for e in report['exits']]
    left.semilogy(layers, [e['ppl'] for e in report['exits']], 'o-', color='#0072B2', label='this model')
    if len(layers) == len(papers.A5) and cell == 'BitSkip (H+EE)':
        left.semilogy(layers, papers.A5, 's--', color='#D55E00', label='Paper A, Table 5 (BPE)')
    left.set(title='Perplexity at each exit', xlabel='exit layer', ylabel='PPL')
    left.legend()
    right.plot(layers, report['stats']['activation_std'], 'o-', color='#009E73')
    right.set(title='Spread of the activations (B Fig. 1)', xlabel='layer', ylabel='standard deviation of h')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with checkpoint.atomic_write(path) as file:
        figure.savefig(file, format='png', dpi=110)
    plt.close(figure)


@dataclass
class EvalSettings:
    """Evaluates every exit of a trained model, and its weights."""
    out_dir: str = ''  # the run to evaluate; empty: the newest
    checkpoint: str = 'ckpt.pt'  # the file in its folder: the best model, or packed.pt, which pack.py writes
    split: Literal['val', 'test', 'train'] = 'val'  # of the run's own data set
    batch_size: int = 16  # sequences at a time
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    packed: bool = True  # time decoding with packed weights, and measure what their int8 head costs
    speculate: bool = False  # try speculative decoding with every draft layer and several draft lengths
    temperature: float = 0.0  # of speculative decoding; 0 is greedy
    json: str = ''  # where to write the figures; empty: eval.json in the run's folder

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f'batch_size is at least 1, got {self.batch_size}')
        require_temperature(self.temperature)
        if self.json.endswith('.png'):
            raise ValueError(f'json={self.json} is the name of a picture, which is drawn beside the figures: end it in '
                             '.json')


def load_run(s):
    """What the settings `s` name: the run's folder, its model, the meta of its data and the tokens of the split.
    UserError if there is no such thing, or the model cannot decode."""
    keep_freed_memory()
    device = pick_device(s.device)
    out_dir = checkpoint.find_run(s.out_dir)
    model, settings = checkpoint.load_checkpoint(os.path.join(out_dir, s.checkpoint), device)
    if not model.config.causal:
        raise UserError(f'{out_dir} sees the future (causal=False) and cannot decode; its log.jsonl has its losses')
    return out_dir, model, *data_of(settings, s.split)


def main(argv):
    s = configure(EvalSettings, argv)
    out_dir, model, meta, tokens = load_run(s)
    layers = list(range(model.config.n_layer))
    print(f'evaluating {len(layers)} exits on {len(tokens):,} tokens')
    losses = evaluate(model, tokens, layers, s.batch_size)
    weights = {'ternary' if bit_linears(model) else 'full precision': losses[-1]}
    fast, decoder, how = model, None, 'PyTorch'
    if s.packed:
        fast, decoder, how = fast_decoder(model)
    if fast is not model:
        weights['packed'] = evaluate(fast, tokens, batch_size=s.batch_size)[-1]
    if any(not layer.frozen for layer in bit_linears(model)):  # neither packed nor in full precision
        with latent_weights(model):
            weights['latent'] = evaluate(model, tokens, batch_size=s.batch_size)[-1]
    speeds = measure_speed(fast, layers, tokens, decoder)
    std, gates = activation_and_gate_statistics(model, tokens)
    report = {
        'run': out_dir, 'split': s.split, 'tokens': len(tokens), 'tokenizer': meta['tokenizer'],
        'exits': [{'layer': layer, 'blocks': layer + 1, 'loss': loss, 'ppl': perplexity(loss),
                   'bits_per_byte': bits_per_byte(loss, meta, s.split), 'tok_per_s': speed}
                  for layer, loss, speed in zip(layers, losses, speeds)],
        'decoding': how,
        'weights': {name: {'loss': loss, 'ppl': perplexity(loss)} for name, loss in weights.items()},
        'stats': {'weights': weight_statistics(model), 'parameters': parameter_breakdown(model),
                  'activation_std': std, 'gates': gates}}
    if s.speculate:
        sweep = measure_speculation(fast, tokens, decoder, s.temperature) if len(layers) > 1 else []
        report['speculation'] = {'temperature': s.temperature, 'sweep': sweep,
                                 'best': max(sweep, key=lambda r: r['speedup'], default=None)}
    cell = cell_of(model.config)
    print_report(report, cell)
    path = s.json or os.path.join(out_dir, 'eval.json')
    with checkpoint.atomic_write(path, 'w') as file:
        json.dump(report, file, indent=1)
    picture = os.path.splitext(path)[0] + '.png'
    plot(report, cell, picture)
    print(f'\nwritten: {path}, {picture}')


if __name__ == '__main__':
    run(main)
