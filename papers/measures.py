"""
What the authors measured, computed as they did, and why the FFNs of their cells without Hadamard
likely did not learn.

    report(model, tokens)           Tables 2 to 5 of Paper A, each loss in two means
    gradient_rms(model, idx, y)     which projections get a gradient at all, in float32 or float16
    decay_ratio(model, s, steps)    alpha of each projection, over what weight decay alone leaves

Table 3: both columns are ternary. "FP" is the model as trained; "1.58-bit" is ternarized twice.
Table 5: exits learned the current token, likely from raw h_l, and are scored on the next one from
LN(h_l).
`report` gives both, and what the latent weights say as well.
"""
import contextlib
import functools
import math
from unittest import mock

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from eval_exits import exit_cross_entropy, weight_statistics, windows
from quant import bit_linears, dequantize, latent_weights, weight_ternary
from train import get_lr

LADDER = {  # settings of papers/as_run.py, from as run to BitSkip; a rung keeps those above it
    'as run': {}, 'inner LayerNorm in both cells': {'inner_norm': 'all'},
    'phi in the FFN only': {'phi': 'ffn'}, 'usual initial weights': {'initial': 'usual'},
    'pre-norm': {'block_norm': 'pre', 'inner_norm': 'none', 'sub_norm': True},
    'RoPE alone': {'positions': 'rope'}, 'exits learn the next token': {'exit_labels': 'next'},
    'exits learn under the final norm': {'exit_norm': 'final'},
    'exit weights of A4': {'ee_weighting': 'early'}, 'no routing loss': {'lambda_r': 0.0}}

def report(model, tokens, batch_size=16):
    """Nats of Tables 2, 3 and 5 on `tokens` (uint16): {name: (means over tokens, means of batch
    means)}, each a list by exit, the last at full depth; and Table 4 under 'weights'."""
    losses = functools.partial(exit_losses, model.eval(), tokens, batch_size=batch_size)
    found = {'ternary': losses(), 'current token': losses(current=True)}
    with latent_weights(model):
        found['latent'] = losses()
    with ternarized_twice(model):
        found['ternarized twice'] = losses()
    return found | {'weights': weight_statistics(model)}

@torch.no_grad()
def exit_losses(model, tokens, current=False, batch_size=16):
    """Nats at all exits: their means over tokens, and their means of batch means, where the last
    batch counts like the others (two lists). current: how well an exit knows the current token,
    read from the state that it learned from."""
    raw = current and model.config.exit_norm == 'none'
    sums, means = torch.zeros(2, model.config.n_layer, dtype=torch.float64)
    batches = list(windows(tokens, model.config.block_size, batch_size))
    for idx, targets in batches:
        targets = (idx if current else targets).flatten().to(model.device)
        for layer, h in enumerate(model.hidden_states(idx.to(model.device))):
            states = h if raw else model.exit_state(h, layer)
            loss = exit_cross_entropy(model, states, targets)
            sums[layer] += loss
            means[layer] += loss / len(targets) / len(batches)
    return (sums / (len(tokens) - 1)).tolist(), means.tolist()

@contextlib.contextmanager
def ternarized_twice(model):
    """Inside this block A1 has been applied to W^: the same signs, with the scale alpha (1 - s),
    s the share of zeros. (A ternary checkpoint was loaded into a layer that ternarizes.)"""
    layers = bit_linears(model)
    try:
        for layer in layers:
            layer.ternary = functools.partial(weight_ternary, dequantize(*layer.ternary()))
        yield model
    finally:
        for layer in layers:
            del layer.ternary  # back to the class's

# --------------------------------------------------------------------------------------------------
# the dead FFN

class HalfProducts(TorchFunctionMode):
    """fp16 autocast on any machine: products take, give and send back float16 numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in (F.linear, F.scaled_dot_product_attention):
            return function(*args, **kwargs or {})
        args = [a.half().float() if torch.is_tensor(a) else a for a in args]  # gradients, too
        return function(*args, **kwargs or {}).half().float()

def gradient_rms(model, idx, targets, half=False, scale=2.0 ** 16):
    """Root mean square of the loss gradient of each matrix: {'q': [by layer], ...}. half: products
    in float16 and a loss scale, so that it underflows where it does in fp16 training."""
    model.eval().zero_grad()
    floats = mock.patch('quant.integers_serve', lambda *_: False)  # no products of integers
    with floats, HalfProducts() if half else contextlib.nullcontext():
        losses = model(idx, targets, return_logits=False)[1]
    (losses['total'] * scale).backward()
    return by_name(model, lambda w: (w.grad.double() / scale).square().mean().sqrt().item())

def decay_ratio(model, s, steps):
    """alpha after so many steps of the settings `s`, over what weight decay alone leaves of the
    alpha that training began with: {'q': [by layer], ...}. 1 is a matrix that learned nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(s.seed)
        first = type(model)(model.config)  # as train.py made it
    left = math.prod(1 - s.weight_decay * get_lr(step, s) for step in range(steps))
    now, then = (by_name(m, lambda w: w.abs().mean().item()) for m in (model, first))
    return {name: [a / (left * b) for a, b in zip(now[name], then[name])] for name in now}

def by_name(model, f):
    rows = zip(*([f(layer.weight) for layer in block.linears()] for block in model.blocks))
    return dict(zip(('q', 'k', 'v', 'o', 'up', 'down'), map(list, rows)))
