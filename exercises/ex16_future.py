"""16. Break the causal mask: what would PPL 1.13 take?"""
import math
import sys
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from model import BitSkip, BitSkipConfig


def attention(q, k, v, causal):
    """softmax(q k^T / sqrt(D)) v, q, k, v and the result (B, H, T, D), in plain operations.

    causal: position t sees positions 0 ... t only. Without it, all: that is the broken mask."""
    raise NotImplementedError


def sees_the_future(model, idx):
    """The gate: whether a later token changes an earlier logit, by any amount, anywhere: a bool.

    model: idx (B, T) int64 of tokens below 16 -> logits (B, T, V). For each t, change token t (to
    another one), and compare all logits before t, bit by bit."""
    raise NotImplementedError


def train_on_noise(causal, steps, V=16, T=16):
    """A small model on fresh random tokens at every step: its loss on more of them, and whether it
    sees the future."""
    def attend(q, k, v, **options):
        return attention(q, k, v, causal)
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig(vocab_size=V, block_size=T, n_layer=2, n_head=2, n_kv_head=2,
                                  n_embd=64, ffn_dim=128, linear='fp', gate_dim=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with patch.object(F, 'scaled_dot_product_attention', attend):
        for _ in range(steps):
            text = torch.randint(V, (64, T + 1))
            model(text[:, :-1], text[:, 1:], return_logits=False)[1]['ce'].backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        text = torch.randint(V, (4096, T + 1))
        with torch.no_grad():
            loss = model(text[:, :-1], text[:, 1:], return_logits=False)[1]['ce']
            return loss.item(), sees_the_future(lambda idx: model(idx)[0], text[:8, :-1])


def observe(steps=600):
    for causal in (True, False):
        loss, leaks = train_on_noise(causal, steps)
        name = 'causal mask' if causal else 'no mask'
        print(f'{name}: {loss:.3f} nats, PPL {math.exp(loss):.2f} on noise, where ln V = '
              f'{math.log(16):.3f}; sees the future: {leaks}')


if __name__ == '__main__':
    torch.set_num_threads(1)
    observe()
