"""17. What the quantization loss can do (A8)."""
import sys

import torch

sys.path.append(__file__.rpartition('exercises')[0])  # this file runs by itself, too
from model import BitSkip, BitSkipConfig
from quant import weight_ternary


def quantization_loss(matrices):
    """A8: the mean over matrices of mean((W - W^)^2): a list of W (out, in) -> a scalar. W^ is a
    constant.

    `codes, alpha = weight_ternary(W)` makes W^ = alpha * codes, without a gradient."""
    raise NotImplementedError


def gradient_ratio(a, b, matrices):
    """|da/dW| / |db/dW|, the norms taken over all matrices at once: two scalar losses -> float. The
    losses may share a graph; no .grad is touched."""
    raise NotImplementedError


def observe():
    torch.manual_seed(7)
    model = BitSkip(BitSkipConfig(vocab_size=256, block_size=64, n_layer=6, n_head=4, n_kv_head=2,
                                  n_embd=128, ffn_dim=512))
    idx, targets = torch.randint(256, (2, 8, 64))
    matrices = [layer.weight for layer in model.linears()]
    for alpha in (0.016, 0.07):  # the mean |W| at first, and after a long training
        with torch.no_grad():
            for W in matrices:
                W.mul_(alpha / W.abs().mean())
        _, losses = model(idx, targets)
        ratio = gradient_ratio(quantization_loss(matrices), losses['ce'], matrices)
        print(f'mean |W| {alpha}: lambda_q = 0.2 adds {0.2 * ratio:.0e} of its size to the '
              f'gradient of CE; to add a tenth, lambda_q would be {0.1 / ratio:.0e}')


if __name__ == '__main__':
    observe()
