"""
An exit loss that decays to zero (Al-Rfou et al., 2019): exits help early, full depth has the end.

    python -m papers.decay config/compose.py config/cpu.py

lambda_ee falls straight from its value to 0 over the run.
"""
import torch

from configurator import run
from model import BitSkip
from train import TrainSettings, main

class Decaying(BitSkip):
    Config = TrainSettings

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('seen', torch.zeros(()))  # micro-batches: it is saved and resumed

    def early_exit_loss(self, states, idx, targets):
        c = self.config
        ahead = 1 - self.seen / (c.max_iters * c.gradient_accumulation_steps)
        if self.training:
            self.seen += 1
        return ahead.clamp(min=0) * super().early_exit_loss(states, idx, targets)

if __name__ == '__main__':
    run(lambda argv: main(argv, TrainSettings, Decaying))
