import functools

import torch

from decode import KVCache, step_with_exits
from exercises.hints import same
from model import BitSkip, BitSkipConfig

THRESHOLDS = (0.0, 0.3, 0.5, 1.0)


@functools.cache
def make_model(exit_norm):
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig(vocab_size=31, block_size=16, n_layer=4, n_head=4, n_kv_head=2,
                                  n_embd=32, ffn_dim=64, linear='fp', exit_norm=exit_norm)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    return model


def run(step, threshold, exit_norm='final'):
    """Logits (T, V), layers (T,) and the cache after T = 12 tokens."""
    model, generator = make_model(exit_norm), torch.Generator().manual_seed(1)
    cache, tokens = KVCache(model, 1), torch.randint(31, (12, 1, 1), generator=generator)
    logits, layers = zip(*(step(model, token, cache, threshold) for token in tokens))
    return torch.cat([row.reshape(1, -1) for row in logits]), [int(l) for l in layers], cache


@functools.cache
def expected(threshold, exit_norm='final'):
    @torch.no_grad()
    def step(model, token, cache, threshold):
        return step_with_exits(model, token, cache, 3, 'confidence', threshold)
    return run(step, threshold, exit_norm)


def test_tokens_leave_where_they_should(student):
    for exit_norm in ('final', 'none'):
        for threshold in THRESHOLDS:
            layers, right = (f(threshold, exit_norm)[1] for f in
                             (functools.partial(run, student.step), expected))
            assert layers == right, (
                f'with exit_norm={exit_norm!r} and a threshold of {threshold} tokens left at '
                f'{layers}, not at {right}: what the head reads is model.exit_state, and the rule '
                'asks for a softmax probability')


def test_logits_are_those_of_the_exit(student):
    for threshold in THRESHOLDS:
        same(run(student.step, threshold)[0], expected(threshold)[0], 'the logits are not those of '
             'the exit that the token left at', rtol=1e-3, atol=1e-4)


def test_no_block_runs_above_the_exit(student):
    """Counted: blocks that run, and readings of the head."""
    model, ran = make_model('final'), []
    counted = [('head', model.head), *(('block', block.ffn) for block in model.blocks)]
    hooks = [module.register_forward_hook(lambda *_, name=name: ran.append(name))
             for name, module in counted]
    try:
        for threshold in THRESHOLDS:
            ran.clear()
            layers = run(student.step, threshold)[1]
            needed = sum(layers) + len(layers)
            assert ran.count('block') <= needed, (
                f'{ran.count("block")} blocks have run, {needed} were needed: a token that has '
                'left owes keys and values, and no more')
            assert ran.count('head') <= needed, (
                f'the head was read {ran.count("head")} times, {needed} would do')
    finally:
        for hook in hooks:
            hook.remove()


def test_the_cache_has_no_holes(student):
    for threshold in THRESHOLDS:
        cache, whole = run(student.step, threshold)[2], expected(threshold)[2]
        assert cache.length == 12 and cache.filled == [12] * 4, (
            'the cache does not know of all tokens in all layers: cache.advance ends a step')
        for name in ('k', 'v'):
            kept = getattr(cache, name)[:, 0, :, :12].transpose(1, 2).flatten(2)  # (L, T, heads D)
            holes = (~kept.any(-1)).nonzero().tolist()
            assert not holes, f'a hole: layer and token {holes[0]} have no {name}'
            same(getattr(cache, name), getattr(whole, name), f'wrong {name} in the cache: above '
                 'the exit they come from the state that the token left with', rtol=1e-3, atol=1e-4)
