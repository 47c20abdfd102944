"""What the authors measured, as they did, and the FFN that gets no gradient."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, initial

from eval_exits import evaluate, windows
from papers.as_run import AsRun, AsRunSettings
from papers.measures import decay_ratio, exit_losses, gradient_rms, report, ternarized_twice
from quant import weight_ternary
from train import get_lr, make_optimizer

@pytest.fixture
def text():
    return np.random.default_rng(0).integers(31, size=16 * 7 + 6).astype(np.uint16)

def test_two_means(text):
    """Over tokens as eval_exits.py has it; over batches as theirs: the last one counts like all."""
    model = initial()
    tokens, batches = exit_losses(model, text, batch_size=4)
    assert tokens == pytest.approx(evaluate(model, text, range(3)))
    by_hand = [F.cross_entropy(model(idx)[0].flatten(0, 1), targets.flatten()).item()
               for idx, targets in windows(text, 16, 4)]
    assert batches[-1] == pytest.approx(np.mean(by_hand)) and len(by_hand) == 3

@pytest.mark.parametrize('exit_norm', ['none', 'final'])
def test_exits_are_asked_for_what_they_learned(text, exit_norm):
    model = initial(AsRun, exit_norm=exit_norm)
    idx = torch.from_numpy(text[:-6].astype(np.int64)).view(7, 16)
    h = next(model.hidden_states(idx))
    learned = model.head(h if exit_norm == 'none' else model.norm(h))
    expected = F.cross_entropy(learned.flatten(0, 1), idx.flatten()).item()
    assert exit_losses(model, text[:-5], current=True)[0][0] == pytest.approx(expected)

def test_ternarized_twice():
    """Table 3's "1.58-bit": the signs stay, alpha shrinks by the share of zeros."""
    model = initial(AsRun, linear='hbitlinear')
    before = [layer.ternary() for layer in model.linears()]
    with ternarized_twice(model):
        after = [layer.ternary() for layer in model.linears()]
    for (codes, scale), (codes2, scale2) in zip(before, after):
        assert torch.equal(codes, codes2)
        assert scale2.item() == pytest.approx(scale.item() * codes.abs().float().mean().item())
    layer = model.linears()[0]
    assert torch.equal(layer.ternary()[1], weight_ternary(layer.weight)[1])

def test_report(text):
    found = report(initial(AsRun, linear='hbitlinear', initial='usual'), text)
    columns = [found.pop(name)[0][-1] for name in ('ternary', 'latent', 'ternarized twice')]
    assert len(set(columns)) == 3 and set(found) == {'current token', 'weights'}
    assert found['weights']['sparsity'] == pytest.approx(0.31, abs=0.02)  # of a normal W

def test_dead_ffn():
    """AS_RUN 2: without a norm inside, float16 has no gradient at all for q, k, up and down, and in
    float32 it is far below Adam's eps. The LayerNorm inside brings it back, Hadamard or not."""
    shape = dict(n_layer=4, n_embd=128, ffn_dim=512, block_size=32, vocab_size=256)
    idx, targets = torch.randint(256, (2, 2, 32))
    for inner_norm, linear in [('hadamard', 'bitlinear'), ('all', 'bitlinear'),
                               ('hadamard', 'hbitlinear')]:
        model = initial(AsRun, inner_norm=inner_norm, linear=linear, **shape)
        full, half = (gradient_rms(model, idx, targets, half) for half in (False, True))
        if (inner_norm, linear) == ('hadamard', 'bitlinear'):
            assert not any(map(any, (half['q'], half['k'], half['up'], half['down'])))
            assert 0 < max(full['up'] + full['down'] + full['q'] + full['k']) < 1e-12
            assert max(half['v']) > 1e-12
        else:
            assert min(half['up'] + half['down'] + full['up'] + full['down']) > 1e-11

def test_gradients_are_the_models(tokens):
    """In float32 they are what backward gives; float16 only rounds them."""
    model = initial(AsRun, linear='hbitlinear', initial='usual')
    idx, targets = tokens(), tokens(seed=1)
    full, half = (gradient_rms(model, idx, targets, half) for half in (False, True))
    model.zero_grad()
    model(idx, targets)[1]['total'].backward()
    expected = model.blocks[1].ffn.up.weight.grad.square().mean().sqrt().item()
    assert full['up'][1] == pytest.approx(expected, rel=1e-3)
    assert half['up'][1] == pytest.approx(expected, rel=0.1) and half != full

@pytest.mark.parametrize('inner_norm', ['hadamard', 'all'])
def test_decay_ratio(inner_norm):
    """Real steps: an FFN without a norm inside keeps alpha_0 prod(1 - decay lr_t), to the digit."""
    s = AsRunSettings(**TINY | dict(n_embd=128, ffn_dim=512, inner_norm=inner_norm))
    torch.manual_seed(s.seed)
    model = AsRun(s).train()
    optimizer = make_optimizer(model, s)
    for step in range(8):
        idx, targets = torch.randint(31, (2, 2, 16))
        model(idx, targets)[1]['total'].backward()
        optimizer.param_groups[0]['lr'] = get_lr(step, s)
        optimizer.step()
    ratios = decay_ratio(model, s, 8)
    off = [abs(r - 1) for r in ratios['up'] + ratios['down']]
    assert (max(off) < 1e-5) == (inner_norm == 'hadamard')
    assert abs(ratios['v'][0] - 1) > 2e-5
