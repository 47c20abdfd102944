"""
The dead FFN: which projections of the as-run model get a gradient at all, before any training.

    python -m papers.dead      writes papers/results/dead.json: root mean square of the gradient

One batch of 2 x 512 random tokens at Paper A's width (12 x 512), loss scale 65,536. Adam divides by
sqrt(v) + 1e-8: a gradient far below 1e-8 moves nothing.
"""
import json
import time
from pathlib import Path

from common import atomic_write
import torch

from configurator import run
from fast.machine import commit, machine
from papers.as_run import AsRun, AsRunSettings
from papers.measures import gradient_rms

CELLS = {'Baseline, float16': ('bitlinear', True), 'Baseline, float32': ('bitlinear', False),
         'H-only, float16': ('hbitlinear', True), 'H-only, float32': ('hbitlinear', False)}

def measure(width, seed=7, vocab_size=50257):
    """{cell: {projection: [RMS at layers 0, 5 and 11]}}"""
    found = {}
    for cell, (linear, half) in CELLS.items():
        torch.manual_seed(seed)
        model = AsRun(AsRunSettings(
            linear=linear, n_embd=width, ffn_dim=4 * width, vocab_size=vocab_size))
        tokens = torch.randint(vocab_size, (2, 513))
        rms = gradient_rms(model, tokens[:, :-1], tokens[:, 1:], half)
        found[cell] = {name: [layers[i] for i in (0, 5, 11)] for name, layers in rms.items()}
    return found

def main(argv):
    result = {'command': 'python -m papers.dead', 'commit': commit(), 'machine': machine('cpu'),
              'seed': 7, 'date': time.strftime('%Y-%m-%d'), 'gradients': measure(512)}
    for cell, by_name in result['gradients'].items():
        print(cell)
        for name, layers in by_name.items():
            print(f'  {name:5}', '  '.join(f'{rms:8.1e}' for rms in layers))
    with atomic_write(str(Path(__file__).with_name('results') / 'dead.json'), 'w') as file:
        json.dump(result, file, indent=1)

if __name__ == '__main__':
    run(main)
