"""
BitSkip: a decoder-only transformer with ternary weights whose every block can be the last.

         idx (B, T)
          |  embedding
          v
    +-> h_l (B, T, C) -- block l: h += o(SubLN(attention(q, k, v of norm(h))))   q, k, v, o, up, down are BitLinear or
    |     |                       h += down(SubLN(relu(up(norm(h)))^2))          HBitLinear (quant.py); all else is fp
    +-----+  l = 0 ... L-1
          |  final norm, one head shared by all exits (exits.py)
          v
        logits (B, T, V)

The two papers' architectures are settings of one class: Paper A (86M) has LayerNorm, SubLN and a squared-ReLU FFN,
Paper B (1.06B) RMSNorm and SwiGLU. Norms and linears have no biases, which gives Paper A's parameter count exactly.
Decoding, with its key-value cache, is in decode.py.
"""
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import torch.nn as nn
import torch.nn.functional as F

import decode
from exits import (Adapter, Gate, exit_weights, expected_exit_layer, linear_cross_entropy, sample_exits,
                   skip_probabilities)
from quant import make_linear, project, quantization_loss


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
    norm: Literal['layernorm', 'rmsnorm'] = 'layernorm'  # layernorm (Paper A) or rmsnorm (Paper B)
    sub_norm: bool = True  # SubLN: one more norm, before the projections o and down (Paper A)
    linear: Literal['fp', 'bitlinear', 'hbitlinear', 'hadamard_after'] = 'bitlinear'  # projections (quant.py)
    act_bits: int = 8  # bits of an activation: 8, or 4 (Paper B's V2)
    linear_norm: Literal['none', 'layernorm', 'rmsnorm'] = 'none'  # one more norm inside every ternary linear
    hadamard_layers: Literal['all', 'o,down'] = 'all'  # where hbitlinear transforms: everywhere, or as BitNet v2
    rope_theta: float = 10000.0  # base of the rotary frequencies
    dropout: float = 0.0  # on attention weights and residual branches
    lambda_ee: float = 0.0  # weight of the early-exit loss (A7); 0.3 where exits are trained
    ee_weighting: Literal['early', 'late', 'uniform'] = 'early'  # early exits count more (A4), late ones (B6), or none
    ee_positions: Literal['all', 'sampled'] = 'all'  # sampled: each exit learns from its own 1/(L-1) of the tokens
    ee_share: float = 1.0  # sampled: the share of a step's tokens that all exits together learn from; gates as well
    ee_curriculum: Literal['none', 'rotational', 'gradual'] = 'none'  # LayerSkip: exits in turn, or more and more
    ee_detach_head: bool = False  # exits do not train the shared head
    ee_distill: float = 0.0  # share of an exit's target that is the last layer's prediction instead of the next token
    ee_leave: float = 0.0  # share of tokens that leave at a random layer in training, too, as some do in decoding
    ee_adapter: int = 0  # rank of each exit's own map in front of the head; 0: none
    exit_norm: Literal['final', 'none'] = 'final'  # exits read h_l under the final norm, if there is one, or raw
    final_norm: bool = True  # False: there is none, and the head reads raw h_l at every depth
    p_max: float = 0.0  # layer skipping (stochastic depth): the largest probability (A5); Paper A 0.7, Paper B 0.5
    skip_schedule: Literal['quadratic', 'linear', 'exp', 'uniform'] = 'quadratic'  # growth over depth (A5)
    skip_normalize: bool = False  # scale the probabilities to sum 1, whatever p_max (Paper B, section 3.3)
    skip_last: bool = False  # the last block is skipped, too: then full depth's own loss trains the exits before it
    lambda_q: float = 0.05  # weight of the quantization loss (A8)
    lambda_r: float = 0.2  # weight of the routing loss (A9)
    gate_loss: Literal['cost', 'agreement', 'overlap', 'divergence'] = 'cost'  # what gates learn: A9, or foresight
    gate_detach: bool = False  # gates learn a mean exit, too, without sending a gradient into the blocks
    target_exit: int | None = None  # l*, the mean exit layer that gates learn (A9); none: L / 2, as Paper A's 6 of 12
    gate_dim: int = 32  # inner width of the gates (A6); 0: no gates
    init_scale: float = 1.0  # experiment: of the projections' initial weights (the authors' BitLinear: 0.1)
    unshifted: Literal['none', 'exits', 'all'] = 'none'  # experiment: train these on the current token, as the authors
    causal: bool = True  # experiment: False lets every token see the future

    def __post_init__(self):
        def require(ok, message):
            if not ok:
                raise ValueError(message)
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                require(getattr(self, name) in get_args(hint),
                        f"{name} is one of {', '.join(map(repr, get_args(hint)))}, got {getattr(self, name)!r}")
        for name in ('vocab_size', 'block_size', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'ffn_dim'):
            most = 2 ** 10 if name == 'n_layer' else 2 ** 20
            require(1 <= getattr(self, name) <= most, f'{name} is 1 to {most}, got {getattr(self, name)}')
        require(self.n_embd % (2 * self.n_head) == 0,
                f'n_embd={self.n_embd} must be n_head={self.n_head} times an even head size')
        require(self.n_head % self.n_kv_head == 0,
                f'n_head={self.n_head} must be a multiple of n_kv_head={self.n_kv_head}')
        require(self.rope_theta > 0, f'rope_theta is above 0, got {self.rope_theta}')
        require(self.act_bits in (4, 8), f'act_bits is 4 or 8, got {self.act_bits}')
        require(0 <= self.p_max <= 1, f'p_max is a probability, got {self.p_max}')
        skip_probabilities(self.n_layer, self.p_max, self.skip_schedule, self.skip_normalize, self.skip_last)
        require(0 <= self.dropout < 1, f'dropout is a probability below 1, got {self.dropout}')
        for name in ('gate_dim', 'ee_adapter'):
            require(0 <= getattr(self, name) <= 2 ** 20, f'{name} is 0 to {2 ** 20}, got {getattr(self, name)}')
        require(0 <= self.ee_distill <= 1, f'ee_distill is a share, 0 to 1, got {self.ee_distill}')
        require(0 < self.ee_share <= 1, f'ee_share is a share, above 0 and up to 1, got {self.ee_share}')
        require(self.ee_share == 1 or self.ee_positions == 'sampled',
                f"ee_share={self.ee_share} needs ee_positions='sampled'")
        require(0 <= self.ee_leave <= 1, f'ee_leave is a share, 0 to 1, got {self.ee_leave}')
        require(self.ee_leave == 0 or self.gate_loss == 'cost' and self.ee_distill == 0,
                "ee_leave needs gate_loss='cost' and ee_distill=0: tokens that left have no full depth to learn from")
        require(self.init_scale > 0, f'init_scale is above 0, got {self.init_scale}')
        for name in ('lambda_ee', 'lambda_q', 'lambda_r'):
            require(getattr(self, name) >= 0, f'{name} is at least 0, got {getattr(self, name)}')
        if self.target_exit is None:
            self.target_exit = self.n_layer // 2

    @classmethod
    def of(cls, settings):
        """The model's part of a larger dict of settings."""
        return cls(**{field.name: settings[field.name] for field in fields(cls) if field.name in settings})


# ----------------------------------------------------------------------------------------------------------------------
# parts

def make_norm(config, size):
    kind = {'layernorm': nn.LayerNorm, 'rmsnorm': nn.RMSNorm}[config.norm]
    return kind(size, eps=1e-5, **({'bias': False} if kind is nn.LayerNorm else {}))


def linear(config, in_features, out_features, name):
    """The projection `name` of a block, of the kind that the config asks for."""
    kind = config.linear
    if kind == 'hbitlinear' and config.hadamard_layers == 'o,down' and name not in ('o', 'down'):
        kind = 'bitlinear'
    return make_linear(kind, in_features, out_features, config.act_bits, config.linear_norm)


def rope_table(head_dim, length, theta):
    """Rotation angles of RoPE: cos and sin, each (length, head_dim / 2)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x, rope):
    """RoPE: turn the pair (x_i, x_{i + D/2}) of a token at position t by the angle t * frequency_i. x (B, H, T, D)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions: (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        C, self.n_head, self.n_kv_head = config.n_embd, config.n_head, config.n_kv_head
        self.head_dim = C // self.n_head
        self.dropout, self.causal = config.dropout, config.causal
        self.q = linear(config, C, C, 'q')
        self.k = linear(config, C, self.n_kv_head * self.head_dim, 'k')
        self.v = linear(config, C, self.n_kv_head * self.head_dim, 'v')
        self.sub_norm = make_norm(config, C) if config.sub_norm else nn.Identity()
        self.o = linear(config, C, C, 'o')

    def heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, H D) -> (B, H, T, D)

    def forward(self, x, rope, past=None):
        q, k, v = map(self.heads, project(x, (self.q, self.k, self.v)))
        q, k = rotate(q, rope), rotate(k, rope)
        T, mask = x.shape[1], None
        if past is not None:
            if not self.causal:
                raise ValueError('a model that sees the future (causal=False) cannot decode')
            k, v = past.append(k, v)  # (B, n_kv_head, S, D): all keys and values so far, S >= T
            mask = past.mask
            if mask is None and 1 < T < k.shape[2]:  # new token i sees all old ones and the new ones up to itself
                mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - T)
        is_causal = self.causal and mask is None and (past is None or k.shape[2] == T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)
        return self.o(self.sub_norm(y))

    def remember(self, x, rope, past):
        """Leave x's keys and values in the cache and compute nothing else (a token that has already exited)."""
        k, v = map(self.heads, project(x, (self.k, self.v)))
        past.write(rotate(k, rope), v)


class FFN(nn.Module):
    """down(SubLN(relu(up(x))^2)) or, as SwiGLU, down(SubLN(silu(gate(x)) * up(x))): (B, T, C) -> (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.gate = linear(config, config.n_embd, config.ffn_dim, 'gate') if config.ffn == 'swiglu' else None
        self.up = linear(config, config.n_embd, config.ffn_dim, 'up')
        self.sub_norm = make_norm(config, config.ffn_dim) if config.sub_norm else nn.Identity()
        self.down = linear(config, config.ffn_dim, config.n_embd, 'down')

    def forward(self, x):
        if self.gate is None:
            y = F.relu(self.up(x)).square()  # the squared ReLU of A3
        else:
            gate, up = project(x, (self.gate, self.up))
            y = F.silu(gate) * up
        return self.down(self.sub_norm(y))


class Block(nn.Module):
    """One layer: (B, T, C) -> (B, T, C). `past` is this layer's part of a key-value cache (decode.py)."""

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
        layers = (self.attn.q, self.attn.k, self.attn.v, self.attn.o, self.ffn.gate, self.ffn.up, self.ffn.down)
        return [layer for layer in layers if layer is not None]


# ----------------------------------------------------------------------------------------------------------------------
# the model

class BitSkip(nn.Module):
    """Embedding, n_layer blocks, final norm, head; a gate, and an adapter if asked for, at every exit but the last.

    `forward` maps tokens to logits at one exit and, given targets, computes the losses of A7; `hidden_states` yields
    what each block leaves; `generate` continues a text. The weights are float32, those of the blocks' projections
    latent: what the blocks compute with is their ternary image (quant.py)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config, config.n_embd) if config.final_norm else nn.Identity()
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # every layer but the last may be left, so every layer but the last has a gate
        n_gates = config.n_layer - 1 if config.gate_dim else 0
        self.gates = nn.ModuleList(Gate(config.n_embd, config.gate_dim) for _ in range(n_gates))
        n_adapters = config.n_layer - 1 if config.ee_adapter else 0
        self.adapters = nn.ModuleList(Adapter(config.n_embd, config.ee_adapter) for _ in range(n_adapters))
        self.skip_probabilities = skip_probabilities(
            config.n_layer, config.p_max, config.skip_schedule, config.skip_normalize, config.skip_last)
        self.is_sharded = False  # among processes, by FSDP (parallel.py)
        self.make_rope()
        self.init_weights()

    def make_rope(self, device=None):
        """The tables of rotary angles: buffers that no checkpoint holds."""
        config = self.config
        cos, sin = rope_table(config.n_embd // config.n_head, config.block_size, config.rope_theta)
        self.register_buffer('rope_cos', cos.to(device), persistent=False)
        self.register_buffer('rope_sin', sin.to(device), persistent=False)

    @torch.no_grad()
    def init_weights(self):
        """Normal(0, 0.02) everywhere, but the projections that write to the residual stream are scaled down by the
        square root of their number (GPT-2), so that the stream keeps its scale at any depth. Norms start at one, the
        adapters as the identity."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(('attn.o.weight', 'ffn.down.weight'))
                parameter.normal_(std=0.02 * ((2 * self.config.n_layer) ** -0.5 if into_residual else 1))
        for layer in self.linears():
            layer.weight.mul_(self.config.init_scale)
        for adapter in self.adapters:
            adapter.b.weight.zero_()

    def forward(self, idx, targets=None, exit_layer=None, cache=None, return_logits=True, ee_weights=None):
        """Next-token logits at an exit and, given targets, the losses of A7.

        idx (B, T) int64; targets (B, T) int64, already shifted: targets[:, t] is the token after idx[:, t].
        exit_layer: run blocks 0 ... exit_layer only (default: all L). cache: a decode.KVCache to continue.
        Returns logits (B, T, V), and None or a dict of scalars: total, ce, ee, quant, route. With an exit_layer the
        losses are that exit's ce alone. `return_logits=False` returns None for them, which saves their memory.
        ee_weights (L-1,) float32: the w_l of A4 in this step (default: those of ee_weighting; 0 turns an exit off).
        ValueError if exit_layer is not a layer, or the tokens do not fit into block_size."""
        last = self.require_layer(exit_layer)
        leaving = self.training and self.config.ee_leave and exit_layer is None and cache is None
        leaves = self.leave_at_random(idx) if leaving else None
        states = []
        for h in self.hidden_states(idx, last, cache, leaves):
            states = [h] if targets is None else states + [h]  # only the losses need them all
        h = states.pop()
        h = self.exit_state(h, last) if leaves is None else decode.read_off(self, h, leaves.squeeze(-1))
        losses = None
        if targets is not None:
            exit_targets = targets if self.config.unshifted == 'none' else idx
            targets = idx if self.config.unshifted == 'all' else targets
            losses = self.losses(h, targets, exit_targets, states if exit_layer is None else None, ee_weights)
        return self.head(h) if return_logits else None, losses

    def hidden_states(self, idx, last=None, cache=None, leaves=None):
        """Yield h_0 ... h_last, each (B, T, C): the states after each block, before any final norm. Tokens keep the
        state that they leave with, if it is told at which layer they do: leaves (B, T, 1) int64."""
        last = self.require_layer(last)
        start = cache.length if cache is not None else 0
        T = idx.shape[1]
        rope = self.rope(start, T)
        h = self.dropout(self.embedding(idx))
        for layer in range(last + 1):
            past = cache.layer(layer) if cache is not None else None
            before, h = h, self.run_block(layer, h, rope, past)
            if leaves is not None:
                h = torch.where(layer > leaves, before, h)
            yield h
        if cache is not None:
            cache.advance(T, depth=last + 1)

    def run_block(self, layer, h, rope, past=None):
        """h_{l-1} -> h_l. In training each sample skips the block with probability p_l: it passes through unchanged
        (A5, B1), and costs nothing, because the block runs on the other samples alone. With a cache nothing skips."""
        block, p = self.blocks[layer], self.skip_probabilities[layer]
        if not self.training or p == 0 or past is not None:
            return block(h, rope, past)
        keep = (torch.rand(len(h)) >= p).nonzero().squeeze(1).to(h.device)  # the samples that do not skip
        if len(keep) == 0 and self.is_sharded:  # other processes may need the part of the weights that this one has
            block.eval()  # so run the block on one sample, without dropout's random numbers, and drop the result
            nothing = block(h[:1], rope)[:0]
            block.train()
            return h.index_copy(0, keep, nothing.to(h.dtype))
        if len(keep) == 0:
            return h
        if len(keep) == len(h):
            return block(h, rope)
        return h.index_copy(0, keep, block(h[keep], rope).to(h.dtype))

    def leave_at_random(self, idx):
        """The layer that each token leaves at in training, any with the same chance for a share ee_leave of them, the
        last one for the others: (B, T, 1). What left keeps its state, which the blocks above then learn to meet (the
        state propagation of decode.py), and is asked for the next token there."""
        last = self.config.n_layer - 1
        early = torch.rand(*idx.shape, 1) < self.config.ee_leave
        return torch.where(early, torch.randint(last + 1, early.shape), last).to(idx.device)

    def rope(self, start, length):
        """The rotary angles of so many positions from `start` on. ValueError if they do not fit into block_size."""
        if start + length > self.config.block_size:
            raise ValueError(f'{start + length} tokens do not fit into block_size={self.config.block_size}')
        return self.rope_cos[start:start + length], self.rope_sin[start:start + length]

    def exit_state(self, h, layer):
        """What the head reads at this exit: the state, adapted if exits have adapters, under the final norm or as it
        is (exit_norm='none')."""
        is_exit = layer < self.config.n_layer - 1
        if is_exit and self.adapters:
            h = self.adapters[layer](h)
        return h if is_exit and self.config.exit_norm == 'none' else self.norm(h)

    def exit_cross_entropy(self, idx, targets, layers, rows=512):
        """Cross-entropy in nats at each of the exits `layers`, summed over all tokens: (len(layers),) float64, on the
        CPU. idx and targets (B, T) int64; logits are made of so many `rows` at a time. For evaluation: no gradient."""
        sums, targets = torch.zeros(len(layers), dtype=torch.float64), targets.flatten()
        for layer, h in enumerate(self.hidden_states(idx, max(layers))):
            if layer in layers:
                states = self.exit_state(h, layer).flatten(0, 1)
                for chunk, target in zip(states.split(rows), targets.split(rows)):
                    loss = F.cross_entropy(self.head(chunk).float(), target, reduction='sum')
                    sums[layers.index(layer)] += loss.item()
        return sums

    def losses(self, h, targets, exit_targets, earlier=None, ee_weights=None):
        """A7: L = CE + lambda_ee L_ee + lambda_q L_quant + lambda_r L_route, as a dict of scalars.

        h (B, T, C): what the head reads at the exit in use; targets and exit_targets (B, T): the labels there and at
        the exits; earlier: the L-1 states h_l before it, for A4 and A9. Without them CE is all."""
        config, W = self.config, self.head.weight
        zero = torch.zeros((), device=h.device)
        losses = {'ce': linear_cross_entropy(h.flatten(0, 1), W, targets.flatten()),
                  'ee': zero, 'quant': zero, 'route': zero}
        if earlier and config.lambda_ee:  # A4
            if ee_weights is None:
                ee_weights = exit_weights(config.n_layer, config.ee_weighting)
            losses['ee'] = self.exit_loss(earlier, exit_targets.flatten(), ee_weights.tolist(), h)
        if earlier is not None and config.lambda_q:  # A8
            losses['quant'] = quantization_loss(self)
        if earlier and config.lambda_r and self.gates:  # A9
            losses['route'] = (self.routing_loss(earlier) if config.gate_loss == 'cost' else
                               self.foresight_loss(earlier, h))
        # A7
        total = (losses['ce'] + config.lambda_ee * losses['ee'] + config.lambda_q * losses['quant']
                 + config.lambda_r * losses['route'])
        return {'total': total, **losses}

    def exit_loss(self, states, targets, weights, last):
        """A4, B6: sum_l w_l CE of exit l, of all exits as one batch of rows. states: L-1 of (B, T, C); targets (B T,);
        last (B, T, C): what the head reads at the last layer, the teacher where exits are to agree with it.

        In training, ee_positions='sampled' deals the tokens out to the exits at random, so that each learns from its
        own share. The mean over a random share is an unbiased estimate of the mean over all, and all exits together
        cost what one costs, or the share `ee_share` of that."""
        exits = [layer for layer, weight in enumerate(weights) if weight]
        if not exits:
            return torch.zeros((), device=targets.device)
        if self.training and self.config.ee_positions == 'sampled':
            shares = self.deal(targets, len(exits))
            rows = [states[layer].flatten(0, 1)[share] for layer, share in zip(exits, shares)]
        else:
            shares = [torch.arange(len(targets), device=targets.device)] * len(exits)
            rows = [states[layer].flatten(0, 1) for layer in exits]
        rows = torch.cat([self.exit_state(row, layer) for row, layer in zip(rows, exits)])
        row_weights = torch.cat([torch.full((len(share),), weights[layer] / max(1, len(share)), device=rows.device)
                                 for layer, share in zip(exits, shares)])
        picked, distill = torch.cat(shares), self.config.ee_distill
        W = self.head.weight.detach() if self.config.ee_detach_head else self.head.weight
        teacher = last.detach().flatten(0, 1)[picked] if distill else None
        return linear_cross_entropy(rows, W, targets[picked], row_weights, teacher, distill)

    def deal(self, tokens, n):
        """Indices of `tokens`, a share ee_share of them, dealt out at random to n exits: n tensors (about B T / n,)."""
        n_dealt = max(n, round(self.config.ee_share * tokens.numel()))
        return torch.randperm(tokens.numel())[:n_dealt].to(tokens.device).tensor_split(n)

    def routing_loss(self, states):
        """A9: (E - l*)^2, a scalar. "On average": the mean over tokens comes before the square. states: L-1 of
        (B, T, C), the h_l of the layers that a token can leave at."""
        if self.config.gate_detach:
            states = [h.detach() for h in states]
        p = self.gate_probabilities(states)  # (B, T, L-1)
        E = expected_exit_layer(sample_exits(p) if self.training else p).mean()
        return (E - self.config.target_exit).square()

    def foresight_loss(self, states, last):
        """What a gate can know and A9 does not ask: how far its exit is from what full depth will say, by gate_loss
        (see `distance`). states: L-1 of (B, T, C); last (B, T, C): what the head reads at the last layer. Scalar.

        'agreement' and 'overlap' are binary cross-entropy, -a log p - (1 - a) log(1 - p), least for p = E a. For
        'divergence' p stands for e^-D, so that a token leaves where D < -log(threshold), and the loss D - KL log D is
        least for D = E KL. Each gate has its own random share of the tokens, and nothing but gates is trained."""
        shares = self.deal(last[..., 0], len(states))
        losses = []
        for layer, (h, share) in enumerate(zip(states, shares)):
            h, there = h.detach().flatten(0, 1)[share], last.detach().flatten(0, 1)[share]
            chunks = zip(h.split(512), there.split(512))  # rows whose logits are there at a time
            a = torch.cat([self.distance(self.exit_state(rows, layer), full) for rows, full in chunks])
            p = self.gates[layer](h).clamp(1e-6, 1 - 1e-6)
            D = -p.log()
            loss = D - a * D.log() if self.config.gate_loss == 'divergence' else a * D - (1 - a) * (1 - p).log()
            losses.append(loss.sum() / max(1, len(share)))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def distance(self, here, there):
        """What a gate is asked about two states that the head reads, (N, C) each, at its exit and at full depth: (N,)
        float32. 'agreement': 1 if their likeliest tokens are the same, else 0. 'overlap': sum_x min(p_exit(x),
        p_full(x)), the chance that full depth accepts a token drawn at the exit (speculate.py). 'divergence':
        KL(p_full || p_exit), the loss that leaving here is expected to add, in nats."""
        here, there = (self.head(h).float().log_softmax(dim=-1) for h in (here, there))  # (N, V)
        if self.config.gate_loss == 'agreement':
            return (here.argmax(dim=-1) == there.argmax(dim=-1)).float()
        if self.config.gate_loss == 'overlap':
            return torch.minimum(here, there).exp().sum(dim=-1)
        return (there.exp() * (there - here)).sum(dim=-1).clamp(min=0)

    def gate_probabilities(self, states):
        """A6 at every exit: list of (B, T, C) -> (B, T, L-1)."""
        return torch.stack([gate(h) for gate, h in zip(self.gates, states)], dim=-1)

    @property
    def device(self):
        return self.rope_cos.device

    def require_layer(self, layer):
        """`layer`, or the last one for None. ValueError if the model has no such layer."""
        L = self.config.n_layer
        if layer is None:
            return L - 1
        if not 0 <= layer < L:
            raise ValueError(f'exit_layer={layer} is outside the model: its {L} layers are 0 to {L - 1}')
        return layer

    def linears(self):
        """All quantizable projections, of whatever kind, in order."""
        return [layer for block in self.blocks for layer in block.linears()]

    def quantizable_parameters(self):
        """How many weights the blocks' projections hold: those that a ternary model stores in 1.58 bits."""
        return sum(layer.in_features * layer.out_features for layer in self.linears())

    def settings(self):
        return asdict(self.config)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, exit_layer=None, exit_mode=None,
                 exit_threshold=0.5, generator=None):
        """Continue idx (B, T) int64 by max_new_tokens tokens: (B, T + max_new_tokens) int64. See decode.stream."""
        steps = decode.stream(self, idx, max_new_tokens, temperature, top_k, exit_layer, exit_mode, exit_threshold,
                              generator)
        return torch.cat([idx] + [token for token, _ in steps], dim=1)
