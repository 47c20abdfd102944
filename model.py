"""
BitSkip: a decoder-only transformer with ternary weights, whose every block can be the last.

         idx (B, T)
          |  embedding
          v
    +-> h_l (B, T, C) -- block l: h += o(SubLN(attention(q, k, v of norm(h))))
    |     |                       h += down(SubLN(relu(up(norm(h)))^2))
    +-----+  l = 0 ... L-1
          |  final norm, and one head that all exits share (exits.py)
          v
        logits (B, T, V)

A block's projections are BitLinear or HBitLinear (quant.py), all else is full precision. Nothing
has a bias. Paper A (86M) has LayerNorm, SubLN and squared ReLU, Paper B (1.06B) RMSNorm and SwiGLU.
"""
import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import decode
from configurator import check
from exits import (Gate, deal, divergence_loss, exit_loss, exit_weights, routing_loss,
                   sample_exits, skip_probabilities)
from quant import linear_class, project, quantization_loss

def rotate(x, rope):
    """RoPE: turn the pair (x_i, x_{i + D/2}) of a token at position t by t * frequency_i."""
    cos, sin = rope  # (T, D/2)
    a, b = x.chunk(2, dim=-1)  # x (B, H, T, D)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)

class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions: (B, T, C) -> (B, T, C)."""

    causal = True  # papers/mistakes.py asks what happens without

    def __init__(self, config):
        super().__init__()
        C, self.dropout = config.n_embd, config.dropout
        self.head_dim = C // config.n_head
        self.q = projection(config, C, C, 'q')
        self.k = projection(config, C, config.n_kv_head * self.head_dim, 'k')
        self.v = projection(config, C, config.n_kv_head * self.head_dim, 'v')
        self.sub_norm = make_norm(config, C) if config.sub_norm else nn.Identity()
        self.o = projection(config, C, C, 'o')

    def forward(self, x, rope, past=None):
        q, k, v = project(x, self.q, self.k, self.v)  # q(x), k(x), v(x), but x is quantized once
        q, k, v = map(self.split_heads, (q, k, v))  # (B, H, T, D); k and v have fewer H
        q, k = rotate(q, rope), rotate(k, rope)
        if past is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=True,
                                               dropout_p=self.dropout if self.training else 0.0)
        else:
            y = past.attend(q, k, v)  # the same to all tokens so far (decode.py)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.o(self.sub_norm(y))

    def split_heads(self, x):  # (B, T, H D) -> (B, H, T, D)
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def remember(self, x, rope, past):  # keys and values only, for a token that has left before
        k, v = map(self.split_heads, project(x, self.k, self.v))
        past.write(rotate(k, rope), v)

class FFN(nn.Module):
    """down(SubLN(relu(up(x))^2)), or SwiGLU, down(SubLN(silu(gate(x)) up(x))): (B, T, C), too."""

    def __init__(self, config):
        super().__init__()
        C, inner = config.n_embd, config.ffn_dim
        swiglu = config.ffn == 'swiglu'  # its gate is no exit's gate
        self.gate = projection(config, C, inner, 'gate') if swiglu else None
        self.up = projection(config, C, inner, 'up')
        self.sub_norm = make_norm(config, inner) if config.sub_norm else nn.Identity()
        self.down = projection(config, inner, C, 'down')

    def forward(self, x):
        if self.gate is None:
            y = F.relu(self.up(x)).square()  # the squared ReLU of A3
        else:
            gate, up = project(x, self.gate, self.up)
            y = F.silu(gate) * up
        return self.down(self.sub_norm(y))

class Block(nn.Module):
    """One layer: (B, T, C) -> (B, T, C). `past` is its part of a key-value cache (decode.py)."""

    def __init__(self, config):
        super().__init__()
        self.attn_norm, self.attn = make_norm(config, config.n_embd), Attention(config)
        self.ffn_norm, self.ffn = make_norm(config, config.n_embd), FFN(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, h, rope, past=None):
        h = h + self.dropout(self.attn(self.attn_norm(h), rope, past))
        return h + self.dropout(self.ffn(self.ffn_norm(h)))

    def remember(self, h, rope, past):
        self.attn.remember(self.attn_norm(h), rope, past)

    def linears(self):
        """The quantizable projections of this block, whatever kind they are."""
        a, f = self.attn, self.ffn
        return [p for p in (a.q, a.k, a.v, a.o, f.gate, f.up, f.down) if p is not None]

@dataclass
class BitSkipConfig:
    """The model. Defaults: Paper A's baseline, that is BitLinear without early exit."""
    vocab_size: int = 50257  # V; train.py takes it from the data set
    block_size: int = 512  # T, the longest context, in tokens
    n_layer: int = 12  # L
    n_head: int = 8  # query heads
    n_kv_head: int = 4  # key and value heads, each shared by n_head / n_kv_head query heads (GQA)
    n_embd: int = 512  # C, the width
    ffn_dim: int = 2048  # inner width of the FFN
    ffn: Literal['relu2', 'swiglu'] = 'relu2'  # squared ReLU (Paper A) or SwiGLU (Paper B)
    norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'  # LayerNorm (Paper A) or RMSNorm (Paper B)
    sub_norm: bool = True  # SubLN: one more norm, before the projections o and down (Paper A)
    linear: str = 'bitlinear'  # projections: fp, bitlinear, hbitlinear, or your own as module:Class
    act_bits: int = 8  # bits of an activation: 8, or 4 (Paper B's V2)
    linear_norm: Literal['none', 'layernorm', 'rmsnorm'] = 'none'  # one more norm inside BitLinear
    hadamard_layers: Literal['all', 'o,down'] = 'all'  # 'o,down': only there, as in BitNet v2
    rope_theta: float = 10000.0  # base of the rotary frequencies
    dropout: float = 0.0  # on attention weights and residual branches
    lambda_ee: float = 0.0  # weight of the early-exit loss (A7); 0.3 where exits are trained
    ee_weighting: Literal['early', 'late', 'uniform'] = 'early'  # A4, B6, or all the same
    ee_positions: Literal['all', 'sampled'] = 'all'  # sampled: each has 1/(L-1) of the tokens
    exit_norm: Literal['final', 'none', 'raw'] = 'final'  # a norm at every exit, the last, or none
    p_max: float = 0.0  # layer skipping (A5): the largest probability; Paper A 0.7, Paper B 0.5
    skip_normalize: bool = False  # scale them to sum 1, whatever p_max is (Paper B, section 3.3)
    lambda_q: float = 0.0  # weight of the quantization loss (A8); 0.05 where exits are trained
    lambda_r: float = 0.0  # weight of the routing loss (A9); 0.2 where exits are trained
    gate_loss: Literal['cost', 'divergence'] = 'cost'  # cost: A9; divergence: KL to full depth
    target_exit: int | None = None  # l*, the mean exit that A9 asks for; none: L / 2, Paper A's 6
    gate_dim: int = 32  # inner width of the gates (A6); 0: no gates

    def __post_init__(self):
        check(self, LIMITS)
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f'n_embd={self.n_embd} is no even multiple of n_head={self.n_head}')
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}')
        linear_class(self.linear)
        skip_probabilities(self.n_layer, self.p_max, self.skip_normalize)
        if self.target_exit is None:
            self.target_exit = self.n_layer // 2

    @classmethod
    def of(cls, settings):  # the model's part of a larger dict
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})

class BitSkip(nn.Module):
    """Embedding, L blocks, final norm, head, and a gate at every exit but the last. A variant is a
    subclass (papers/)."""

    Config, Block = BitSkipConfig, Block  # a variant may have its own

    def __init__(self, config):
        super().__init__()
        self.config, C, L = config, config.n_embd, config.n_layer
        self.embedding = nn.Embedding(config.vocab_size, C)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.Block(config) for _ in range(L))
        self.norm = nn.Identity() if config.exit_norm == 'raw' else make_norm(config, C)
        self.head = nn.Linear(C, config.vocab_size, bias=False)
        n_gates = L - 1 if config.gate_dim else 0  # who comes to the last layer leaves there
        self.gates = nn.ModuleList(Gate(C, config.gate_dim) for _ in range(n_gates))
        self.skip_probabilities = skip_probabilities(L, config.p_max, config.skip_normalize)  # A5
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal(0, 0.02). What writes to the residual stream is divided by the square root of the
        number of such writes (GPT-2), so that the stream keeps its scale at any depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                adds = name.endswith(('attn.o.weight', 'ffn.down.weight'))
                parameter.normal_(std=0.02 / math.sqrt(2 * self.config.n_layer if adds else 1))

    def forward(self, idx, targets=None, exit_layer=None, cache=None, return_logits=True):
        """Next-token logits (B, T, V) at an exit and, given targets, the losses of A7, else None.

        idx (B, T) int64; targets (B, T) int64, shifted already: targets[:, t] follows idx[:, t].
        exit_layer: run blocks 0 ... exit_layer only (default: all L). cache: a decode.KVCache.
        losses: a dict of scalars, total, ce, ee, quant, route; with an exit_layer of its ce alone.
        return_logits=False returns None for the logits, which saves their memory.
        ValueError if there is no such layer, or the tokens do not fit into block_size."""
        last = self.require_layer(exit_layer)
        *earlier, h = self.hidden_states(idx, last, cache)
        h, losses = self.exit_state(h, last), None  # what the head reads
        if targets is not None:
            losses = self.losses(idx, targets, [*earlier, h] if exit_layer is None else [h])
        return (self.head(h) if return_logits else None), losses

    def hidden_states(self, idx, last=None, cache=None):
        """Yield h_0 ... h_last, each (B, T, C): what each block leaves, before any norm."""
        last, T = self.require_layer(last), idx.shape[1]
        start = cache.length if cache is not None else 0
        rope, h = self.rope(start, T), self.embed(idx, start)
        for layer in range(last + 1):
            h = self.run_block(layer, h, rope, cache.layer(layer) if cache is not None else None)
            yield h
        if cache is not None:
            cache.advance(T, depth=last + 1)

    def embed(self, idx, start=0):
        """What block 0 reads of tokens (B, T) at positions from `start` on: (B, T, C)."""
        return self.dropout(self.embedding(idx))

    def run_block(self, layer, h, rope, past=None):
        """h_{l-1} -> h_l. In training each sample skips the block with probability p_l (A5, B1): it
        passes unchanged, and costs nothing, for the block runs on the others alone."""
        block, p = self.blocks[layer], self.skip_probabilities[layer]
        if not self.training or p == 0 or past is not None:
            return block(h, rope, past)
        keep = (torch.rand(len(h)) >= p).nonzero().squeeze(1).to(h.device, non_blocking=True)
        if len(keep) in (0, len(h)):
            return block(h, rope) if len(keep) else h
        return h.index_copy(0, keep, block(h[keep], rope).to(h.dtype))

    def rope(self, start, length):
        """RoPE's angles from `start` on: cos and sin, (T, D/2) each. ValueError past block_size."""
        if start + length > (most := self.config.block_size):
            raise ValueError(f'{start + length} tokens do not fit into block_size={most}')
        D, device = self.config.n_embd // self.config.n_head, self.device
        frequencies = self.config.rope_theta ** (-torch.arange(0, D, 2, device=device) / D)
        angles = torch.outer(torch.arange(start, start + length, device=device), frequencies)
        return angles.cos(), angles.sin()

    def exit_state(self, h, layer):
        """What the head reads at this exit: h_l under the final norm, or as it is (exit_norm)."""
        early = layer < self.config.n_layer - 1
        return h if early and self.config.exit_norm == 'none' else self.norm(h)

    def losses(self, idx, targets, states):
        """A7: L = CE + lambda_ee L_ee + lambda_q L_quant + lambda_r L_route, a dict of scalars.

        states: h_0 ... h_{L-2} (B, T, C), and what the head reads at the last layer."""
        config, h, earlier = self.config, states[-1], states[:-1]
        # F.cross_entropy(self.head(h), targets), but without all logits in memory (exits.py)
        ce = exit_loss([h.flatten(0, 1)], [targets.flatten()], [1.0], self.head.weight)
        ee = quant = route = torch.zeros((), device=h.device)
        if earlier and config.lambda_ee:
            ee = self.early_exit_loss(earlier, idx, targets)  # A4
        if config.lambda_q and len(states) >= config.n_layer:
            quant = quantization_loss(self)  # A8
        if earlier and config.lambda_r and self.gates:
            route = self.route_loss(earlier, h)  # A9
        total = ce + config.lambda_ee * ee + config.lambda_q * quant + config.lambda_r * route  # A7
        return {'total': total, 'ce': ce, 'ee': ee, 'quant': quant, 'route': route}

    def early_exit_loss(self, states, idx, targets):
        """A4, B6 of the exits' L-1 states (B, T, C), tokens and targets (B, T). (idx is for
        variants that learn the current token.) With ee_positions='sampled' each exit has its own
        share of the tokens in training: all exits together then cost what one costs."""
        rows, targets = [h.flatten(0, 1) for h in states], [targets.flatten()] * len(states)
        if self.training and self.config.ee_positions == 'sampled':
            shares = deal(len(rows[0]), len(rows), rows[0].device)
            rows = [h[share] for h, share in zip(rows, shares)]
            targets = [target[share] for target, share in zip(targets, shares)]
        rows = [self.exit_state(h, layer) for layer, h in enumerate(rows)]
        weights = exit_weights(self.config.n_layer, self.config.ee_weighting).tolist()
        return exit_loss(rows, targets, weights, self.head.weight)

    def route_loss(self, states, last):
        """What the gates learn: A9 or, with gate_loss='divergence', the KL to full depth."""
        if self.config.gate_loss == 'divergence':
            return divergence_loss(self.gates, states, last, self.exit_state, self.head)
        p = self.gate_probabilities(states)  # A6, (B, T, L-1)
        return routing_loss(sample_exits(p) if self.training else p, self.config.target_exit)  # A9

    def gate_probabilities(self, states):
        """A6 at every exit: list of (B, T, C) -> (B, T, L-1)."""
        return torch.stack([gate(h) for gate, h in zip(self.gates, states)], dim=-1)

    @property
    def device(self):
        return next(self.parameters()).device

    def require_layer(self, layer):
        """`layer`, or the last one for None. ValueError if the model has no such layer."""
        last = self.config.n_layer - 1
        if layer is not None and not 0 <= layer <= last:
            raise ValueError(f'exit_layer={layer} is outside the model: its layers are 0 to {last}')
        return last if layer is None else layer

    def linears(self):
        """All quantizable projections, of whatever kind, in order."""
        return [layer for block in self.blocks for layer in block.linears()]

    def quantizable_parameters(self):
        """How many weights the projections hold."""
        return sum(layer.in_features * layer.out_features for layer in self.linears())

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, **options):
        """Continue idx (B, T) int64: (B, T + max_new_tokens). Options: see decode.stream."""
        steps = decode.stream(self, idx, max_new_tokens, **options)
        return torch.cat([idx] + [token for token, _ in steps], dim=1)

    # what train.py asks of a variant
    decay_all = False  # weight decay on matrices only
    new_parts = ('gates.',)  # what --init_from=out/... may lack: it starts anew

    def adopt(self, state):
        """The weights of a finished model, by the names that this one has for them."""
        return state

def make_norm(config, size):
    rms = config.norm == 'rmsnorm'
    return nn.RMSNorm(size, eps=1e-5) if rms else nn.LayerNorm(size, eps=1e-5, bias=False)

def projection(config, in_features, out_features, name):
    """The projection `name` of a block, of the kind that the config asks for."""
    kind = config.linear
    if kind == 'hbitlinear' and config.hadamard_layers == 'o,down' and name not in ('o', 'down'):
        kind = 'bitlinear'
    return linear_class(kind)(in_features, out_features, config.act_bits, config.linear_norm)

LIMITS = {name: (1, 2 ** 20) for name in (  # least and most
    'vocab_size', 'block_size', 'n_head', 'n_kv_head', 'n_embd', 'ffn_dim')}
LIMITS |= {name: (0, math.inf) for name in ('lambda_ee', 'lambda_q', 'lambda_r')}
LIMITS |= {'n_layer': (1, 2 ** 10), 'rope_theta': (1, math.inf), 'dropout': (0, 0.99),
           'p_max': (0, 1), 'gate_dim': (0, 2 ** 20), 'act_bits': (2, 8)}
