"""15. The cliff at the last layer (A4, A7)."""
import math
import sys

import torch
import torch.nn.functional as F

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from eval_exits import evaluate
from exits import exit_weights
from model import BitSkip, BitSkipConfig
from prepare import load_tokens, prepare
from train import get_batch


def total_loss(model, idx, targets, shifted):
    """A7 without its last two terms: CE of the last layer + 0.3 L_ee, w_l ~ L - l (A4): a scalar.

    idx (B, T), targets (B, T): targets[:, t] is the token after idx[:, t]. The last layer always
    learns targets. With shifted=True so do the exits. With False they learn the *current* token,
    idx, as in the authors' code.

    What you need:    model.hidden_states(idx) yields h_0 ... h_{L-1}, each (B, T, C)
                      model.head(model.exit_state(h, l)) are the logits of exit l
                      `exit_weights(L, 'early')` are w_0 ... w_{L-2}"""
    raise NotImplementedError


def train(shifted, steps, seed):
    torch.manual_seed(seed)
    model = BitSkip(BitSkipConfig(vocab_size=256, block_size=64, n_layer=6, n_head=4, n_kv_head=2,
                                  n_embd=64, ffn_dim=256, gate_dim=0))
    tokens = load_tokens(prepare('pydocs'), 'train')
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group['lr'] = 3e-3 * min(1, (step + 1) / 50, 4 * (1 - step / steps))
        total_loss(model, *get_batch(tokens, 16, 64, 'cpu'), shifted).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def observe(steps=300, seeds=(7, 8, 9)):
    """PPL at each layer, the geometric mean of the seeds; and the last step, at its least and most:
    PPL at layer 4 over PPL at layer 5."""
    tokens = load_tokens(prepare('pydocs'), 'val')[:20_000]
    for shifted in (True, False):
        losses = torch.tensor([evaluate(train(shifted, steps, seed), tokens, layers=range(6))
                               for seed in seeds])  # (seeds, 6)
        ppl = ', '.join(f'{float(f"{math.exp(x):.2g}"):,g}' for x in losses.mean(0))
        last = (losses[:, 4] - losses[:, 5]).exp()
        print(f'exits learn the {"next" if shifted else "current"} token: PPL {ppl}; the last step '
              f'is x{last.min():.2f} to x{last.max():.2f}')


if __name__ == '__main__':
    torch.set_num_threads(1)
    observe()
