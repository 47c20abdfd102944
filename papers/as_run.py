"""
Paper A as its authors ran it: BitSkip with nine differences. Read this file beside minimal.py. All
are read in their code, but for what is marked as likely.

    1  post-norm: h = LN(h + f(h)), with gain and bias
    2  phi, a squared ReLU, ends all six projections; the FFN has its own as well, so ReLU^4
    3  the LayerNorm of A3 is inside HBitLinear only; BitLinear has none
    4  learned positions are added to the embedding, besides RoPE
    5  tiny initial weights: a tenth of PyTorch's own, embeddings 0.001, head and gates 0.002
    6  exits learn the current token, not the next one
    7  all L exits learn; likely from raw states and with w_l ~ l + 1 (later: the final norm where
       Hadamard is, 1 / (l + 1))
    8  A9 forgets the tokens that never leave; z is drawn and thrown away
    9  dropout 0.1; decay on all parameters; early stopping leaves a 10,000-step cosine at its top

    python -m papers.as_run config/baseline.py config/cpu.py --phi=ffn      small, without 2
"""
import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import model
from configurator import run
from exits import exit_loss, exit_weights
from quant import BitLinear, HBitLinear
from train import TrainSettings, main

@dataclass
class AsRunSettings(TrainSettings):
    """Model and run, as run."""
    block_norm: Literal['post', 'pre'] = 'post'  # LN(h + f(h)), or h + f(LN(h))
    phi: Literal['all', 'ffn'] = 'all'  # a squared ReLU after each projection too, or in the FFN
    inner_norm: Literal['hadamard', 'all', 'none'] = 'hadamard'  # projections with a norm inside
    positions: Literal['both', 'rope'] = 'both'  # learned ones and RoPE, or RoPE alone
    initial: Literal['tenth', 'usual'] = 'tenth'  # initial weights
    exit_labels: Literal['current', 'next'] = 'current'  # the token that exits learn
    exit_norm: Literal['none', 'final'] = 'none'  # what exits learn from: raw h_l, or LN(h_l)
    ee_weighting: Literal['all_late', 'all_front', 'early', 'late', 'uniform'] = 'all_late'  # of L
    sub_norm: bool = False  # SubLN
    dropout: float = 0.1  # on attention weights and residual branches, in FFN and gates
    gate_dim: int = 128  # inner width of the gates
    batch_size: int = 16  # sequences (likely: their log)
    gradient_accumulation_steps: int = 1  # of these in a step
    patience: int = 5  # stop after so many evaluations without improvement
    schedule: Literal['wsd', 'linear', 'cosine'] = 'cosine'  # to min_lr at max_iters
    beta2: float = 0.999  # AdamW
    linear: Literal['bitlinear', 'hbitlinear'] = 'bitlinear'  # the cell
    hadamard_layers: Literal['all'] = 'all'  # (no choice as run)
    gate_loss: Literal['cost'] = 'cost'  # (no choice as run)

class Phi:
    """What their two layers share: y = phi(W^ Q_b(LN(x))). Block puts phi and inner_norm in."""

    def forward(self, x):
        y = super().forward(self.inner_norm(x))  # 3
        return F.relu(y).square() if self.phi else y  # 2

class PhiBitLinear(Phi, BitLinear): ...

class PhiHBitLinear(Phi, HBitLinear): ...

class Block(model.Block):
    def __init__(self, config):
        c, hadamard = copy.copy(config), config.linear == 'hbitlinear'
        c.linear = f'papers.as_run:Phi{"H" * hadamard}BitLinear'
        super().__init__(c)
        inner = c.inner_norm == 'all' or c.inner_norm == 'hadamard' and hadamard
        for layer in self.linears():
            layer.phi, width = c.phi == 'all', getattr(layer, 'width', layer.in_features)
            layer.inner_norm = nn.LayerNorm(width) if inner else nn.Identity()
        self.ffn.sub_norm = self.ffn.sub_norm if c.sub_norm else nn.Dropout(c.dropout)  # 9
        norm = nn.LayerNorm if c.block_norm == 'post' else nn.Identity
        self.after_attn, self.after_ffn = norm(c.n_embd), norm(c.n_embd)
        if c.block_norm == 'post':
            bare = nn.LayerNorm(c.n_embd, elementwise_affine=False)  # 3: before q, k and v
            self.attn_norm, self.ffn_norm = nn.Identity() if inner else bare, nn.Identity()

    def forward(self, h, rope, past=None):
        h = self.after_attn(h + self.dropout(self.attn(self.attn_norm(h), rope, past)))  # 1
        return self.after_ffn(h + self.dropout(self.ffn(self.ffn_norm(h))))

class AsRun(model.BitSkip):
    """Paper A's model as run."""

    Config, Block, decay_all = AsRunSettings, Block, True  # 9

    def __init__(self, config):
        super().__init__(config)
        C, D, both = config.n_embd, config.gate_dim, config.positions == 'both'
        self.positions = nn.Embedding(config.block_size, C) if both else None  # 4
        self.norm = nn.LayerNorm(C) if config.block_norm == 'post' else self.norm  # 1
        self.gates = nn.ModuleList(nn.Sequential(  # A6; the last layer has one, too
            nn.LayerNorm(C), nn.Linear(C, D), nn.ReLU(), nn.Dropout(config.dropout),
            nn.Linear(D, 1), nn.Flatten(-2), nn.Sigmoid()) for _ in self.blocks if D)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        super().init_weights()
        if self.config.initial == 'usual':
            return
        for name, p in self.named_parameters():  # 5
            if p.dim() == 2 and name.startswith('blocks'):
                p.uniform_(-0.1 * p.shape[1] ** -0.5, 0.1 * p.shape[1] ** -0.5)
            elif p.dim() == 2:
                p.normal_(std=0.001 if name.startswith(('embed', 'position')) else 0.002)
            elif name.endswith('bias'):
                p.zero_()

    def embed(self, idx, start=0):
        positions = self.positions.weight[start:start + idx.shape[1]] if self.positions else 0
        return self.embedding(idx) + positions

    def forward(self, idx, targets=None, exit_layer=None, cache=None, return_logits=True):
        if targets is None or exit_layer is not None:
            return super().forward(idx, targets, exit_layer, cache, return_logits)
        states = list(self.hidden_states(idx, cache=cache))
        h = self.norm(states[-1])
        losses = self.losses(idx, targets, [*states, h])  # 7, 8: the last layer is an exit, too
        return self.head(h) if return_logits else None, losses

    def exit_state(self, h, layer):
        return self.norm(h)  # Table 5 and decoding read this, whatever exits learned from

    def early_exit_loss(self, states, idx, targets):
        targets = idx if self.config.exit_labels == 'current' else targets  # 6
        w = torch.arange(1.0, len(states) + 1)  # (L,)
        w = {'all_late': w, 'all_front': 1 / w}.get(self.config.ee_weighting)
        w = exit_weights(len(states), self.config.ee_weighting) if w is None else w / w.sum()  # 7
        states = states if self.config.exit_norm == 'none' else map(self.norm, states)  # 7
        rows = [h.flatten(0, 1) for h in states][:len(w)]
        return exit_loss(rows, [targets.flatten()] * len(w), w.tolist(), self.head.weight)

    def route_loss(self, states, last):
        p = self.gate_probabilities(states).float()  # (B, T, L)
        reach = F.pad(torch.cumprod(1 - p, dim=-1)[..., :-1], (1, 0), value=1.0)
        E = (torch.arange(len(states), device=p.device) * p * reach).sum(dim=-1).mean()  # 8
        return (E - self.config.target_exit).square()

if __name__ == '__main__':
    run(lambda argv: main(argv, AsRunSettings, AsRun))
