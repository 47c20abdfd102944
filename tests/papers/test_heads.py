"""Heads and adapters of the exits' own, and exits that learn from full depth."""
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, all_exits, flags, initial, text_folder

import sample
from checkpoint import load_checkpoint, open_model
from decode import Decoder
from eval_exits import evaluate
from exits import exit_weights
from papers.heads import Heads, HeadsSettings
from train import main, make_optimizer

kinds = pytest.mark.parametrize('exit_head', ['adapter', 'own', 'shared'])
EXITS = dict(lambda_ee=0.3, lambda_r=0.2, rank=4)

@pytest.fixture
def make(make_model):
    return lambda **settings: make_model(Heads, **EXITS | settings)

@kinds
def test_logits_by_definition(make, tokens, exit_head):
    model, idx = make(exit_head=exit_head), tokens()
    states, logits = list(model.hidden_states(idx)), all_exits(model, idx)
    for layer, h in enumerate(states):
        head, early = model.head, layer < 2
        if exit_head == 'adapter' and early:
            a, b = model.adapters[layer].a.weight, model.adapters[layer].b.weight
            h = h + F.layer_norm(h, (32,)) @ a.T @ b.T
        if exit_head == 'own':
            head = model.head[layer]
        expected = model.norm(h) @ head.weight.T
        torch.testing.assert_close(logits[layer], expected)
        torch.testing.assert_close(model(idx, exit_layer=layer)[0], expected)

@pytest.mark.parametrize('distill', [0.0, 0.3, 1.0])
@kinds
def test_loss_by_definition(make, tokens, exit_head, distill):
    """sum_l w_l CE(logits_l, (1 - d) onehot + d softmax(logits_{L-1})), the teacher a constant."""
    model, idx, targets = make(exit_head=exit_head, distill=distill), tokens(), tokens(seed=1)
    logits = all_exits(model, idx).flatten(1, 2)  # (L, B T, V)
    soft = logits[-1].detach().softmax(dim=-1)
    target = (1 - distill) * F.one_hot(targets.flatten(), 31) + distill * soft
    ee = sum(w * F.cross_entropy(x, target) for w, x in zip(exit_weights(3, 'early'), logits))
    ce, losses = F.cross_entropy(logits[-1], targets.flatten()), model(idx, targets)[1]
    torch.testing.assert_close(losses['ee'], ee)
    torch.testing.assert_close(losses['ce'], ce)
    torch.testing.assert_close(losses['total'], ce + 0.3 * ee + 0.2 * losses['route'])
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if 'gates' not in n))
    grads = torch.autograd.grad(losses['ce'] + losses['ee'], parameters)
    for name, ours, expected in zip(names, grads, torch.autograd.grad(ce + ee, parameters)):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5, msg=name)

@kinds
@pytest.mark.parametrize('mode, threshold', [('confidence', 0.2), ('gate', 0.5)])
def test_each_sample_leaves_at_its_own_exit(make, tokens, exit_head, mode, threshold):
    model, idx = make(exit_head=exit_head), tokens()
    logits, decoder = all_exits(model, idx), Decoder(model, 2)
    decoder.step(idx[:, :7])
    got, layers = decoder.step(idx[:, 7:], exit_mode=mode, exit_threshold=threshold)
    for b, layer in enumerate(layers.tolist()):
        torch.testing.assert_close(got[b], logits[layer, b, 7], rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize('exit_head', ['adapter', 'own'])
def test_frozen_starts_as_the_finished_model_and_trains_the_exits_alone(tokens, exit_head):
    """Only what exits have of their own moves; the rest stays what it is, bit for bit."""
    ours = initial(dropout=0.1, p_max=0.7)
    s = HeadsSettings(**TINY | EXITS | dict(exit_head=exit_head, frozen=True, init_from='out/x',
                                            distill=0.5, dropout=0.1, p_max=0.7))
    model = Heads(s).eval()
    model.load_state_dict(model.adopt(ours.state_dict()), strict=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    finished, optimizer = all_exits(ours, tokens()), make_optimizer(model, s)
    torch.testing.assert_close(all_exits(model, tokens()), finished)
    for _ in range(3):
        model.train()(tokens(), tokens(seed=1))[1]['total'].backward()
        optimizer.step()
    learns = ('gates.', 'adapters.', 'head.0.', 'head.1.')
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith(learns), name
    now = all_exits(model.eval(), tokens())
    assert torch.equal(now[-1], finished[-1]) and not torch.equal(now[0], finished[0])

def test_settings_that_cannot_be():
    nothing = dict(frozen=True, init_from='out/x', lambda_r=0.0)
    for settings in (dict(frozen=True), nothing | dict(lambda_ee=0.0),
                     nothing | dict(exit_head='shared'), dict(distill=1.5), dict(rank=0)):
        with pytest.raises(ValueError):
            HeadsSettings(**TINY | EXITS | settings)

def test_command_line(tmp_path, capsys):
    """A finished model gets exits; full depth is what it was, and sample.py reads the new heads."""
    with text_folder(tmp_path, 6000):
        main(flags())
        main(['--init_from=out/run', '--out_dir=out/heads', '--frozen=True', '--exit_head=own',
              '--distill=0.5', '--eval_interval=3'], HeadsSettings, Heads)
        old, new = (open_model(f'out/{name}/ckpt.pt')[0] for name in ('run', 'heads'))
        assert load_checkpoint('out/heads/ckpt.pt')['progress']['iter'] == 12  # the last is best
        text = torch.arange(100).numpy().astype('uint16')
        (first, last), (first_old, last_old) = (evaluate(m, text, [0, 2]) for m in (new, old))
        assert last == last_old and first != first_old
        sample.main(['--out_dir=out/heads', '--max_new_tokens=5', '--exit_layer=1'])
    assert 'mean exit layer 1.00' in capsys.readouterr().out
