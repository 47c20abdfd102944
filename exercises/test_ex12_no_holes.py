import functools

import torch
from torch.testing import assert_close

from decode import KVCache, step_with_exits
from model import BitSkip, BitSkipConfig

THRESHOLDS = (0.0, 0.3, 0.5, 1.0)


@functools.cache
def make_model(exit_norm):
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig(vocab_size=31, block_size=16, n_layer=4, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=64,
                                  linear='fp', exit_norm=exit_norm)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    return model


def run(step, threshold, exit_norm='final'):
    """Logits (T, V), layers (T,) and the cache after T = 12 tokens."""
    model = make_model(exit_norm)
    cache, tokens = KVCache(model, 1), torch.randint(31, (12, 1, 1), generator=torch.Generator().manual_seed(1))
    logits, layers = zip(*(step(model, token, cache, threshold) for token in tokens))
    return torch.cat([row.reshape(1, -1) for row in logits]), [int(layer) for layer in layers], cache


@functools.cache
def expected(threshold, exit_norm='final'):
    @torch.no_grad()
    def step(model, token, cache, threshold):
        return step_with_exits(model, token, cache, 3, 'confidence', threshold)[1:]
    return run(step, threshold, exit_norm)


def test_tokens_leave_where_they_should(student):
    seen = set()
    for exit_norm in ('final', 'none'):
        for threshold in THRESHOLDS:
            _, layers, _ = run(student.step, threshold, exit_norm)
            assert layers == expected(threshold, exit_norm)[1]
            seen |= set(layers)
    assert seen == {0, 1, 2, 3}


def test_logits_are_those_of_the_exit(student):
    for threshold in THRESHOLDS:
        assert_close(run(student.step, threshold)[0], expected(threshold)[0], rtol=1e-3, atol=1e-4)


def test_the_cache_has_no_holes(student):
    for threshold in THRESHOLDS:
        cache, whole = run(student.step, threshold)[2], expected(threshold)[2]
        assert cache.length == 12 and cache.filled == [12] * 4
        for name in ('k', 'v'):
            kept = getattr(cache, name)[:, 0, :, :12].transpose(1, 2).flatten(2)  # (L, T, all heads)
            assert kept.any(-1).all(), f'a hole: layer and token {(~kept.any(-1)).nonzero()[0].tolist()} has no {name}'
            assert_close(getattr(cache, name), getattr(whole, name), rtol=1e-3, atol=1e-4)
