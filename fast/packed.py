"""
A trained model made small: what inference needs, and nothing else.

    projections      PackedLinear: int8 codes {-1, 0, 1} and their scale; the latent weights go
    head, embedding  int8 rows: w_v ~ codes_v * scale_v, with scale_v = max|w_v| / 127

`to_ternary(model)` returns such a copy. Packing replaces modules, so the model does not know:
exits, cache and generate work as before. The projections are exactly those that the model computed
with all along. Only head and embedding are rounded; with head='fp32' nothing is.

On disk (`packed_state`) five ternary codes share a byte. Paper A's shape takes 34.6M x 1.6 bits and
2 x 25.7M x 8 bits: 7 + 51 MB instead of 345 MB.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import find_class
from fast import triton_ternary
from model import BitSkip
from quant import (BitLinear, activation_quant, dequantize, integers_serve, pack_ternary,
                   unpack_ternary)

INFERENCE = ('forward', 'hidden_states', 'embed', 'run_block', 'rope', 'exit_state', 'Block')

def product(x_codes, x_scale, codes, scale):
    """x^ W^: (..., in) int8, (..., 1), (out, in) int8, () or (out, 1) -> (..., out) float32."""
    if not integers_serve(x_codes, codes, scale):
        return F.linear(x_codes * x_scale, dequantize(codes, scale.float()))
    y = torch._int_mm(x_codes.reshape(-1, x_codes.shape[-1]), codes.t()).float()  # (N, out)
    return y.view(*x_codes.shape[:-1], len(codes)).mul_(x_scale * scale.reshape(-1))

class PackedLinear(nn.Module):
    """What a BitLinear computes (A3), from stored codes (out, in) int8 and a scale () or (out, 1).

    It prepares its input as the layer that it replaces does: that layer, without its weight, stays
    behind `prepare`. On a GPU with Triton the codes take 2 bits each (triton_ternary.py)."""

    def __init__(self, layer, codes, scale):
        super().__init__()
        if codes.shape != (layer.out_features, layer.in_features):
            raise ValueError(f'codes {tuple(codes.shape)} do not fit this layer')
        if scale.shape not in ((), (1, 1), (len(codes), 1)):
            raise ValueError(f'a scale of shape {tuple(scale.shape)}, several to a row, cannot be '
                             'packed')
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.act_bits, self.linear_norm = layer.act_bits, layer.linear_norm
        layer = copy.copy(layer)
        layer._parameters = {}  # of the copy
        self.prepare = layer.prepare
        self.register_buffer('codes', codes)
        self.register_buffer('scale', scale)

    def ternary(self):
        """codes (out, in) int8 and scale of W^, as BitLinear.ternary."""
        two_bit = self.codes.dtype == torch.uint8
        codes = triton_ternary.unpack_2bit(self.codes, self.in_features) if two_bit else self.codes
        return codes, self.scale

    def forward(self, x):
        x = self.prepare(x)
        x_codes, x_scale = activation_quant(x, self.act_bits)  # A2
        two_bit, _ = triton_ternary.available(x.device.type)
        if two_bit != (self.codes.dtype == torch.uint8):  # the model has come to another device
            codes = self.ternary()[0]
            self.codes = triton_ternary.pack_2bit(codes) if two_bit else codes
        if not two_bit:
            return product(x_codes, x_scale, self.codes, self.scale).to(x.dtype)
        y = triton_ternary.ternary_matmul(x_codes.flatten(0, -2), self.codes, self.in_features,
                                          x_scale.flatten(0, -2), self.scale)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)

class Int8Rows(nn.Module):
    """A matrix (V, C) as int8 codes (V, C), and the scale of each row, (V, 1): A2, by rows."""

    def __init__(self, w):
        super().__init__()
        codes, scale = activation_quant(w)
        self.register_buffer('codes', codes)
        self.register_buffer('scale', scale)

class Int8Head(Int8Rows):
    """A head of int8 rows on 8-bit activations: (..., C) -> (..., V) float32."""

    def forward(self, h):
        return product(*activation_quant(h), self.codes, self.scale)

class Int8Embedding(Int8Rows):
    """An embedding of int8 rows: idx (...) int64 -> (..., C) float32."""

    def forward(self, idx):
        return self.codes[idx] * self.scale[idx]

def require_packable(model):
    """ValueError, in one sentence, if a packed copy would not compute what the model does."""
    name = type(model).__name__
    for part in INFERENCE:
        if getattr(type(model), part) is not getattr(BitSkip, part):
            raise ValueError(f'{name} has its own {part}')
    for layer in model.linears():
        kind = type(layer).__name__
        if not isinstance(layer, BitLinear):
            raise ValueError(f'{kind} has no ternary weights')
        if type(layer).forward is not BitLinear.forward or list(layer.state_dict()) != ['weight']:
            raise ValueError(f'{kind} computes more than A3 with one weight')
        if layer.latent:
            raise ValueError('this model computes with its latent weights')

@torch.no_grad()
def to_ternary(model, head='int8'):
    """A packed copy of `model` for inference, in eval mode and float32; a packed model comes back
    itself. head: 'int8' or 'fp32', for head and embedding. ValueError, in one sentence, if the
    model cannot be packed."""
    if head not in ('int8', 'fp32'):
        raise ValueError(f"head is 'int8' or 'fp32', got {head!r}")
    if isinstance(model.linears()[0], PackedLinear):
        return model
    require_packable(model)
    latent = {id(layer.weight): layer.weight for layer in model.linears()}
    packed = copy.deepcopy(model, latent)  # these are not copied
    replace_linears(packed, lambda name, layer: PackedLinear(layer, *layer.ternary()))
    if head == 'int8':
        round_rows(packed)
    return packed.float().eval().requires_grad_(False)

def replace_linears(model, make):
    """Put make(name, layer) in the place of each BitLinear of a model."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BitLinear):
            model.set_submodule(name, make(name, layer))

def round_rows(model):
    model.head = Int8Head(model.head.weight)
    model.embedding = Int8Embedding(model.embedding.weight)

def packed_state(packed):
    """The state_dict of a packed model for storage: ternary codes at 1.6 bits each."""
    state = packed.state_dict()
    for name, layer in packed.named_modules():
        if isinstance(layer, PackedLinear):
            state[f'{name}.codes'] = pack_ternary(layer.ternary()[0])
    return state

def load_packed(checkpoint):
    """The model of a checkpoint whose 'model' is a packed_state, in eval mode. ValueError,
    RuntimeError or KeyError if its parts do not fit together.

    It is built of empty shells, which take the tensors as they are: full precision, 20 times as
    large, is never there."""
    state = {name: tensor.float() if tensor.is_floating_point() else tensor
             for name, tensor in checkpoint['model'].items()}
    Model = find_class(checkpoint.get('model_class', 'model:BitSkip'), BitSkip)
    with torch.device('meta'):
        model = Model(Model.Config.of(checkpoint['settings']))
    require_packable(model)

    def make(name, layer):
        state[f'{name}.codes'] = unpack_ternary(state[f'{name}.codes'], layer.in_features)
        return PackedLinear(layer, state[f'{name}.codes'], state[f'{name}.scale'])
    replace_linears(model, make)
    if 'head.codes' in state:
        round_rows(model)
        for name in ('head.scale', 'embedding.scale'):
            state[name] = state[name].view(-1, 1)  # (in old files it is (V,))
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
