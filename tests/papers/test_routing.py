"""The routing loss reaches the gates always, the blocks as far as the variant lets it."""
import numpy as np
import pytest
import torch
from conftest import flags, initial, text_folder

from checkpoint import open_model
from configurator import UserError, configure
from model import BitSkip
from papers import routing
from train import TrainSettings, get_batch, seed_microbatch

def gradients(Model, tokens):
    """Norms of A9's gradient for the gates and for the embedding, and the loss."""
    model = initial(Model, lambda_r=0.2)
    states = list(model.hidden_states(tokens(4, 12)))
    loss = 1e4 * model.route_loss(states[:-1], states[-1])
    loss.backward()
    gates = torch.cat([p.grad.flatten() for p in model.gates.parameters()]).norm()
    return gates, model.embedding.weight.grad, loss.detach()

def test_who_learns_from_the_routing_loss(tokens):
    (gates, ours, loss), detached, clipped = (
        gradients(Model, tokens) for Model in (BitSkip, routing.Detached, routing.Clipped))
    assert ours.norm() > 10 * routing.CLIP and detached[1] is None
    assert 0 < clipped[1].norm() < 0.1 * ours.norm()
    for other in (detached, clipped):
        assert other[0] == gates > 0 and other[2] == loss

def test_a_clipped_gradient_keeps_its_direction():
    h = torch.randn(3, 4, requires_grad=True)
    for scale, norm in ((1e-6, None), (5.0, routing.CLIP)):
        grad, = torch.autograd.grad((routing.ClipGradient.apply(h) * scale).sum(), h)
        assert torch.allclose(grad, grad[0, 0].expand(3, 4))
        assert torch.allclose(grad.norm(), torch.tensor(norm or scale * 12 ** 0.5))

def test_gradients_of_the_first_steps():
    """They begin as those of one backward pass of a run; then the model moves."""
    s = configure(TrainSettings, flags(lambda_r=0.2, learning_rate=0.01, vocab_size=31))
    tokens = np.random.default_rng(0).integers(31, size=3000).astype(np.uint16)
    found = routing.gradients(s, tokens, steps=5, every=2)
    assert [step for step, *_ in found] == [0, 2, 4]
    torch.manual_seed(s.seed)
    model = BitSkip(s).train()
    seed_microbatch(s.seed, 0, 0)
    losses = model(*get_batch(tokens, s.batch_size, s.block_size, 'cpu'))[1]
    (s.lambda_r * losses['route']).backward()
    grads = [p.grad.flatten() for p in model.blocks.parameters() if p.grad is not None]
    assert found[0][2] == pytest.approx(torch.cat(grads).norm().item(), rel=1e-5)
    assert found[0][1] == losses['route'] and found[2][3] not in (0, found[0][3])

def test_it_trains_by_name(tmp_path):
    with text_folder(tmp_path, 3000):
        routing.start(['Clipped', *flags(max_iters=2, lambda_r=0.2)])
        assert isinstance(open_model('out/run/ckpt.pt')[0], routing.Clipped)
    with pytest.raises(UserError, match='name one of Detached, Clipped and gradients first'):
        routing.start(['--max_iters=2'])
