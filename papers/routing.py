"""
Why the routing loss (A9) costs what it costs: keep its gradient from the blocks, or make it small.

    python -m papers.routing Detached config/bitskip_h.py config/cpu.py --lambda_r=0.2
    python -m papers.routing Clipped config/bitskip_h.py config/cpu.py --lambda_r=0.2
    python -m papers.routing gradients config/bitskip_h.py config/cpu.py --lambda_r=0.2

A9 trains the gates, and through them the blocks: a block can make its gate's work easier by
changing what all later blocks read. `Detached` trains the gates alone. In `Clipped` the blocks
learn from A9, too, but what comes back to a state is no longer than CLIP. `gradients` compares, in
the first steps, what blocks get of A9 and of the cross-entropy (papers/results/gradients.json).
"""
import json
import time
from pathlib import Path

from common import atomic_write
import torch

from configurator import UserError, configure, run
from fast.machine import commit, machine
from model import BitSkip
from prepare import load_meta, load_tokens, prepare
from train import TrainSettings, get_batch, get_lr, main, make_optimizer, seed_microbatch

CLIP = 1e-4  # what comes back to h_0 begins at 8e-3, and is 1e-3 while E finds its target

class Detached(BitSkip):
    def route_loss(self, states, last):
        return super().route_loss([h.detach() for h in states], last.detach())

class ClipGradient(torch.autograd.Function):
    """h, any shape; on the way back its gradient, scaled down to the norm CLIP if it is longer."""

    @staticmethod
    def forward(ctx, h):
        return h.view_as(h)

    @staticmethod
    def backward(ctx, grad):
        return grad * (CLIP / grad.norm().clamp(min=CLIP))

class Clipped(BitSkip):
    def route_loss(self, states, last):
        return super().route_loss([ClipGradient.apply(h) for h in states], last)

VARIANTS = {'Detached': Detached, 'Clipped': Clipped}

def gradients(s, tokens, steps=200, every=5):
    """The first steps of a run: [step, A9, norm of the blocks' gradient from A9, from CE]."""
    torch.manual_seed(s.seed)
    model = BitSkip(s).train()
    optimizer, blocks, found = make_optimizer(model, s), list(model.blocks.parameters()), []

    def norm(loss):
        parts = torch.autograd.grad(loss, blocks, retain_graph=True, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None]).norm().item()

    for step in range(steps):
        seed_microbatch(s.seed, step, 0)
        _, losses = model(*get_batch(tokens, s.batch_size, s.block_size, 'cpu'))
        if step % every == 0:
            found.append([step, losses['route'].item(), norm(s.lambda_r * losses['route']),
                          norm(losses['ce'])])
        optimizer.zero_grad()
        losses['total'].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip)
        optimizer.param_groups[0]['lr'] = optimizer.param_groups[1]['lr'] = get_lr(step, s)
        optimizer.step()
    return found

def report_gradients(argv):
    s = configure(TrainSettings, argv)
    torch.set_num_threads(s.threads or torch.get_num_threads())
    folder = prepare(s.dataset, s.tokenizer)
    s.vocab_size = load_meta(folder)['vocab_size']
    found = gradients(s, load_tokens(folder, 'train'))
    for step, loss, route, ce in found:
        print(f'step {step:3}: A9 {loss:8.4f}, blocks get {route:.1e} of it, {ce:.1e} of CE')
    result = {'command': f'python -m papers.routing gradients {" ".join(argv)}', 'seed': s.seed,
              'commit': commit(), 'machine': machine('cpu'), 'date': time.strftime('%Y-%m-%d'),
              'step, A9, norm from A9, from CE': found}
    with atomic_write(str(Path(__file__).with_name('results') / 'gradients.json'), 'w') as file:
        json.dump(result, file)

def start(argv):
    if not argv or argv[0] not in {*VARIANTS, 'gradients'}:
        raise UserError(f'name one of {", ".join(VARIANTS)} and gradients first')
    if argv[0] == 'gradients':
        return report_gradients(argv[1:])
    main(argv[1:], TrainSettings, VARIANTS[argv[0]])

if __name__ == '__main__':
    run(start)
