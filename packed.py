"""
A trained model made small and quick: what inference needs, and nothing else.

    projections      int8 codes {-1, 0, 1} and one scale each; the latent weights are gone
    head, embedding  int8 rows q_v with one scale each: w_v ~ q_v s_v, s_v = max|w_v| / 127

`to_ternary(model)` returns such a copy. Its projections are exactly those that the model computed with all along (their
integer codes were recomputed from the latent weights at each call; now they are stored), so only head and embedding
are rounded; with head='fp32' nothing is, and greedy text is the same. The copy is a BitSkip like any other: exits,
cache and generate work as they are.

On disk (`packed_state`) five ternary codes share a byte. Paper A's shape takes 34.6M x 1.6 bits + 2 x 25.7M x 8 bits,
7 + 51 MB, instead of 345 MB in float32.
"""
import copy

import torch
import torch.nn as nn

from model import BitSkip
from quant import BitLinear, activation_quant, bit_linears, pack_ternary, product, unpack_ternary


def int8_rows(w):
    """w (V, C) -> codes (V, C) int8 in -127 ... 127, and the scale of each row, (V,) float32 = max|w_v| / 127."""
    codes, scale = activation_quant(w)  # A2, per row
    return codes, scale.squeeze(-1)


class Int8Rows(nn.Module):
    """A matrix (V, C) as `int8_rows` has it: `codes` and `scale`."""

    def __init__(self, w):
        super().__init__()
        codes, scale = int8_rows(w)
        self.register_buffer('codes', codes)
        self.register_buffer('scale', scale)


class Int8Head(Int8Rows):
    """A head of int8 rows on 8-bit activations, in exact integers like a projection: (..., C) -> (..., V) float32."""

    def forward(self, h):
        return product(*activation_quant(h), self.codes, self.scale)


class Int8Embedding(Int8Rows):
    """An embedding of int8 rows: idx (...) int64 -> (..., C) float32."""

    def forward(self, idx):
        return self.codes[idx] * self.scale[idx][..., None]


@torch.no_grad()
def to_ternary(model, head='int8'):
    """A copy of `model` for inference, in eval mode, with frozen ternary projections; head: 'int8' or 'fp32' for both
    head and embedding. A model that is packed already comes back itself, with the head that it has. ValueError on
    another head, or on a model without ternary layers."""
    if head not in ('int8', 'fp32'):
        raise ValueError(f"head is 'int8' or 'fp32', got {head!r}")
    if not bit_linears(model):
        raise ValueError("a full-precision model (linear='fp') has no ternary weights to pack")
    if bit_linears(model)[0].frozen:
        return model
    packed = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in bit_linears(packed):
        layer.freeze()
    if head == 'int8':
        packed.head, packed.embedding = Int8Head(model.head.weight), Int8Embedding(model.embedding.weight)
    return packed


def packed_state(packed):
    """The state_dict of a packed model for storage: ternary codes at 1.6 bits each (quant.pack_ternary)."""
    state = packed.state_dict()
    for name, layer in packed.named_modules():
        if isinstance(layer, BitLinear):
            state[f'{name}.codes'] = pack_ternary(layer.ternary()[0])
    return state


def load_packed(config, state):
    """The packed model that `packed_state` described, for a BitSkipConfig. RuntimeError or ValueError if it is not.

    It is built of empty shells, into which the state's own tensors go: full precision, 20 times as large, is never
    there."""
    with torch.device('meta'):
        packed = to_ternary(BitSkip(config), 'int8' if 'head.codes' in state else 'fp32')
    state = dict(state)
    for name, layer in packed.named_modules():
        if isinstance(layer, BitLinear) and f'{name}.codes' in state:
            state[f'{name}.codes'] = unpack_ternary(state[f'{name}.codes'], layer.in_features)
    for name, shell in packed.state_dict().items():
        if name in state:
            state[name] = state[name].to(shell.dtype)
    packed.load_state_dict(state, assign=True)
    packed.make_rope(next(iter(state.values())).device)  # which no state holds
    return packed
