"""
Paper A ends with a recommendation: exits should have heads of their own, or learn from full depth.

    --exit_head=own       logits_l = W_l norm(h_l)                    a whole head W_l for each exit
    --exit_head=adapter   logits_l = W norm(h_l + B_l A_l norm(h_l))  W shared, a map of low rank
    --distill=0.5         this share of an exit's target is what full depth predicts, the rest is
                          the next token: CE(logits_l, (1 - d) onehot + d softmax(logits_{L-1}))

Either on a new model, with all trained together, or on a finished one:

    python -m papers.heads config/bitskip_h_ee.py config/cpu.py --exit_head=own
    python -m papers.heads --init_from=out/bitskip_h-cpu --frozen=True --lambda_ee=1

--frozen trains what the exits have of their own: heads or adapters, and gates. The rest stays what
it is, bit for bit. An adapter starts as the identity (B = 0), an own head as a copy of the model's.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configurator import check, run
from exits import deal, exit_weights
from model import BitSkip
from train import TrainSettings, main

@dataclass
class HeadsSettings(TrainSettings):
    """What exits have of their own, and what they learn."""
    exit_head: Literal['adapter', 'own', 'shared'] = 'adapter'  # what reads an exit
    rank: int = 16  # of an adapter
    distill: float = 0.0  # share of an exit's target that is full depth's prediction
    frozen: bool = False  # train only what exits have of their own, on a finished model

    def __post_init__(self):
        super().__post_init__()
        check(self, {'rank': (1, 2 ** 20), 'distill': (0, 1)})
        if self.frozen:  # exits learn from the model as it is used, and full depth stays as good
            self.p_max, self.dropout, self.eval_interval = 0.0, 0.0, self.max_iters
            learns = self.lambda_ee and self.exit_head != 'shared' or self.lambda_r
            if self.init_from == 'scratch' or not learns:
                raise ValueError('--frozen=True trains heads and adapters by --lambda_ee, or gates '
                                 'by --lambda_r, on a finished model: --init_from=out/...')

class Adapter(nn.Module):
    """h + B A norm(h): (..., C) -> (..., C). B is 0 at first."""

    def __init__(self, C, rank):
        super().__init__()
        self.a, self.b = nn.Linear(C, rank, bias=False), nn.Linear(rank, C, bias=False)

    def forward(self, h):
        return h + self.b(self.a(F.layer_norm(h, h.shape[-1:])))

class OwnHeads(nn.ModuleList):
    """L heads as one. What it reads, (..., C + 1), ends in the number of the exit."""

    @property
    def weight(self):
        return F.pad(self[-1].weight, (0, 1))  # of full depth, where the number does not count

    def forward(self, x):
        x, exits = x[..., :-1], x[..., -1]
        logits = x.new_empty(*exits.shape, self[-1].out_features)
        for l in exits.unique().int().tolist():  # several where tokens have left at several
            logits[exits == l] = self[l](x[exits == l]).to(x.dtype)
        return logits

class Heads(BitSkip):
    """BitSkip whose exits have heads or adapters, and may learn from full depth."""

    Config = HeadsSettings
    new_parts = ('gates.', 'adapters.')

    def __init__(self, config):
        super().__init__(config)
        C, V, L = config.n_embd, config.vocab_size, config.n_layer
        adapters = L - 1 if config.exit_head == 'adapter' else 0
        self.adapters = nn.ModuleList(Adapter(C, config.rank) for _ in range(adapters))
        if config.exit_head == 'own':
            self.head = OwnHeads(nn.Linear(C, V, bias=False) for _ in range(L))
        self.init_weights()
        for adapter in self.adapters:
            nn.init.zeros_(adapter.b.weight)
        if config.frozen:
            own = self.head[:-1] if config.exit_head == 'own' else self.adapters
            self.requires_grad_(False)
            nn.ModuleList([own, self.gates]).requires_grad_(True)

    def adopt(self, state):
        shared = state.get('head.weight')
        if shared is None or self.config.exit_head != 'own':
            return state
        own = {f'head.{l}.weight': shared for l in range(self.config.n_layer)}
        return {name: w for name, w in state.items() if name != 'head.weight'} | own

    def exit_state(self, h, layer):
        if self.adapters and layer < self.config.n_layer - 1:
            h = self.adapters[layer](h)
        h = super().exit_state(h, layer)
        return F.pad(h, (0, 1), value=layer) if self.config.exit_head == 'own' else h

    def losses(self, idx, targets, states):
        self.full_depth = states[-1].detach()  # the teacher
        return super().losses(idx, targets, states)

    def early_exit_loss(self, states, idx, targets):
        """A4, exit by exit, with soft targets."""
        n, targets, teacher = targets.numel(), targets.flatten(), self.full_depth.flatten(0, 1)
        shares = [torch.arange(n, device=targets.device)] * len(states)
        if self.training and self.config.ee_positions == 'sampled':
            shares = deal(n, len(states), targets.device)
        weights, total = exit_weights(self.config.n_layer, self.config.ee_weighting).tolist(), 0
        for layer, (h, share, w) in enumerate(zip(states, shares, weights)):
            for rows in share.split(1024):  # their logits are made again for the gradient
                ce = checkpoint(self.soft_cross_entropy, h.flatten(0, 1)[rows], layer,
                                targets[rows], teacher[rows], use_reentrant=False)
                total = total + w * ce / len(share)
        return total

    def soft_cross_entropy(self, h, layer, targets, teacher):
        """The sum over tokens of CE(logits_l, (1 - d) onehot + d softmax(full depth))."""
        d, logits = self.config.distill, self.head(self.exit_state(h, layer)).float()
        loss = F.cross_entropy(logits, targets, reduction='sum') * (1 - d)
        if d:
            with torch.no_grad():
                soft = self.head(teacher).float().softmax(dim=-1)
            loss = loss + F.cross_entropy(logits, soft, reduction='sum') * d
        return loss

if __name__ == '__main__':
    run(lambda argv: main(argv, HeadsSettings, Heads))
