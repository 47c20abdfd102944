"""
Mistakes, to see what they do: each explains something in the papers, or would.

    NonCausal        attention sees the future: the authors' first runs; PPL falls towards 1
    Unshifted        all depths learn the current token: another way to Paper B's PPL of 1.13
    UnshiftedExits   the exits do, full depth does not: Paper A's cliff (as run; papers/as_run.py)
    SmallInit        initial weights of a tenth (as run; there without a norm inside)
    TrainLatent      trains W itself, and is ternarized afterwards: why one trains with W^
    HadamardAfter    a layer: quantizes first, transforms then (the authors' older order)

    python -m papers.mistakes NonCausal config/baseline.py config/cpu.py
    python train.py config/bitskip_h.py config/cpu.py --linear=papers.mistakes:HadamardAfter

Training evaluates all of them on the next token. papers/measures.py:exit_losses(current=True) asks
for the current one.
"""
import contextlib

import torch
import torch.nn.functional as F

import model
from configurator import UserError, run
from hadamard import fwht, next_pow2, pad_to_pow2
from quant import BitLinear, activation_quant_ste, dequantize, latent_weights, straight_through

class NonCausal(model.BitSkip):
    """Every token sees all others, the one that it has to predict among them."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.blocks:
            block.attn.causal = False

    def run_block(self, layer, h, rope, past=None):
        if past is not None:
            raise UserError('this model sees the future, so it cannot write: the tokens that it '
                            'looks at are not there yet')
        return super().run_block(layer, h, rope)

class UnshiftedExits(model.BitSkip):
    """Exits learn to say the token that they have just read."""

    def early_exit_loss(self, states, idx, targets):
        return super().early_exit_loss(states, idx, idx)

class Unshifted(model.BitSkip):
    """Exits and full depth do."""

    def losses(self, idx, targets, states):
        return super().losses(idx, idx, states)

class SmallInit(model.BitSkip):
    """Projections start at a tenth."""

    init_scale = 0.1

    @torch.no_grad()
    def init_weights(self):
        super().init_weights()
        for layer in self.linears():
            layer.weight.mul_(self.init_scale)

class TrainLatent(model.BitSkip):
    """The forward pass of training computes with W; evaluation and sampling with W^."""

    def forward(self, *args, **options):
        with latent_weights(self) if self.training else contextlib.nullcontext():
            return super().forward(*args, **options)

class HadamardAfter(BitLinear):
    """y = H' W^ H' Q_b(Pad(norm(x))), H' = sqrt(n) H: the outliers meet the quantizer as ever, and
    each transform has a gain of sqrt(n)."""

    def __init__(self, in_features, out_features, act_bits=8, linear_norm='none'):
        super().__init__(next_pow2(in_features), next_pow2(out_features), act_bits, linear_norm)
        self.width = out_features

    def forward(self, x):
        x_hat = activation_quant_ste(pad_to_pow2(self.prepare(x)), self.act_bits)
        w_hat = straight_through(self.weight, dequantize(*self.ternary()))
        y = F.linear(fwht(x_hat) * self.in_features ** 0.5, self.weight if self.latent else w_hat)
        return (fwht(y) * self.out_features ** 0.5)[..., :self.width]

MISTAKES = {m.__name__: m for m in (NonCausal, Unshifted, UnshiftedExits, SmallInit, TrainLatent)}

def main(argv):
    from train import TrainSettings, main  # here: train.py itself may ask this file for a layer
    if not argv or argv[0] not in MISTAKES:
        raise UserError(f'name one of {", ".join(MISTAKES)} first, and configs and flags after it')
    main(argv[1:], TrainSettings, MISTAKES[argv[0]])

if __name__ == '__main__':
    run(main)
