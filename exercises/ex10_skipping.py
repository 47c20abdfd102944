"""10. Skipping blocks in training (A5, B1)."""
import torch


def skip_probabilities(n_layer, p_max):
    """A5: p_l = p_max (l / (L-1))^2 for each block, a list of L floats. The last block is never
    skipped."""
    raise NotImplementedError


def saved_share(n_layer, p_max):
    """The share of all block computations that skipping is expected to save: a float."""
    raise NotImplementedError


def run_block(block, h, p):
    """B1: h (B, T, C) through a block in training -> (B, T, C).

    Each sample by itself skips the block with probability p, passes through unchanged, and costs
    nothing: the block sees the other samples only (and is not called at all if there are none)."""
    raise NotImplementedError


def observe():
    print("Paper A's p_l: " + ' '.join(f'{p:.2f}' for p in skip_probabilities(12, 0.7)))
    print(f'expected to be saved: {saved_share(12, 0.7):.1%} of all blocks')
    torch.manual_seed(0)
    ran = []

    def block(h):
        ran.append(len(h))
        return h
    for p in skip_probabilities(12, 0.7):
        run_block(block, torch.zeros(10_000, 1, 1), p)
    print(f'saved with 10,000 samples: {1 - sum(ran) / 120_000:.1%}')


if __name__ == '__main__':
    observe()
