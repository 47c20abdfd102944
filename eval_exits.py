import math

import torch

from exits import linear_cross_entropy


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
def evaluate(model, tokens, layers=None, batch_size=16, processes=None):
    """Mean cross-entropy per token over all of `tokens` (uint16), in nats, at each of the exits `layers` (default: the
    last): list of floats. Deterministic, token-weighted; with `processes`, each does its share and all get the result.
    """
    model.eval()
    layers = [model.config.n_layer - 1] if layers is None else layers
    rank, world = (processes.rank, processes.world) if processes else (0, 1)
    device = model.head.weight.device
    sums = torch.zeros(len(layers) + 1, dtype=torch.float64)
    for i, (idx, targets) in enumerate(windows(tokens, model.config.block_size, batch_size)):
        if i % world != rank:
            continue
        targets = targets.flatten().to(device)
        ones = torch.ones(len(targets), device=device)
        for layer, h in enumerate(model.hidden_states(idx.to(device), max(layers))):
            if layer in layers:
                rows = model.exit_state(h, layer).flatten(0, 1)
                sums[layers.index(layer)] += linear_cross_entropy(rows, model.head.weight, targets, ones).item()
        sums[-1] += len(targets)
    if processes:
        sums = processes.sum(sums.float().to(device) if device.type == 'mps' else sums.to(device)).cpu()
    return (sums[:-1] / sums[-1]).tolist()


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss, meta):
    """Nats per token -> bits per byte of text, by the validation split's own tokens and bytes."""
    counts = meta['splits']['val']
    return loss / math.log(2) * counts['tokens'] / counts['bytes']
