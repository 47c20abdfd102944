"""12. Leaving early without holes in the cache (CALM)."""
import sys

import torch
import torch.nn.functional as F

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from decode import KVCache
from model import BitSkip, BitSkipConfig


@torch.no_grad()
def step(model, token, cache, threshold):
    """One token (1, 1) int64 through as many blocks as it needs -> logits (1, V), and the layer
    that it left at.

    It leaves at the first layer l < L-1 whose largest softmax probability is above the threshold,
    or else at the last. Above its exit no block runs. But its keys and values there are still owed
    to later tokens: compute them from the state that it left with.

    What you need:    rope = model.rope(cache.length, 1), model.embedding(token) (1, 1, C)
                      block(h, rope, cache.layer(l)) runs a block; the cache keeps keys and values
                      block.remember(h, rope, cache.layer(l)) gives the cache those, and no more
                      model.head(model.exit_state(h, l)) are the logits of exit l: (1, 1, V)
                      cache.advance(1, depth=L) ends a step: all L layers now hold this token"""
    raise NotImplementedError


@torch.no_grad()
def observe():
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig(vocab_size=64, block_size=64, n_layer=6, n_embd=64,
                                  ffn_dim=256)).eval()
    for parameter in model.parameters():
        parameter.normal_(std=0.2) if parameter.dim() == 2 else None  # untrained, but with opinions
    caches, logits, layers = [KVCache(model, 1), KVCache(model, 1)], [], []
    for t, token in enumerate(torch.randint(64, (32, 1, 1))):
        for cache in caches:
            _, layer = step(model, token, cache, threshold=0.3)
        caches[1].k[layer + 1:, :, :, t] = caches[1].v[layer + 1:, :, :, t] = 0  # a hole
        layers.append(int(layer))
    logits = [step(model, token, cache, threshold=1.0)[0] for cache in caches]
    off = (logits[1] - logits[0]).norm() / logits[0].norm()
    print(f'left at layer {sum(layers) / 32:.2f} of 0 to 5 on average')
    print(f'with holes the next logits are off by {off:.0%}')


if __name__ == '__main__':
    observe()
