"""minimal.py, Paper A in one file, is the oracle: model.py gives its logits, losses and gradients.

Both names every parameter alike, so that a state_dict goes from one to the other."""
import ast
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, all_exits
from torch.testing import assert_close

import minimal
import quant
from model import BitSkip, BitSkipConfig

# 3 of minimal's sizes are no accidents: 48 needs padding (A3), 4 layers let p_l differ (A5), and an
# l* of 1 is not in the middle (A9)
SIZES = dict(L=4, C=32, FFN=48, HEADS=4, KV_HEADS=2, T=8, V=31, GATE=8, TARGET=1)
LOSSES = ['total', 'ce', 'ee', 'quant', 'route']

@pytest.fixture
def float64(monkeypatch):
    """Both models in float64, where 1e-15 more or less tips no rounding: in float32 one tipped code
    moves a logit by 1e-3. What asks for float32 gets float64, and products follow the definition,
    because int8 ones end in float32."""
    monkeypatch.setattr(torch.Tensor, 'float', torch.Tensor.double)
    monkeypatch.setattr(quant, 'int8_support', lambda device_type: (False, 'not in this test'))
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

def set_sizes(monkeypatch, **changes):
    for name, value in (SIZES | changes).items():
        monkeypatch.setattr(minimal, name, value)

def make_pair(monkeypatch, hadamard=True, exits=True, skipping=True):
    """minimal's model, and model.py's of the same settings and weights. Weights are larger than at
    initialisation, and norms are not one: leaving anything out changes the numbers."""
    set_sizes(monkeypatch)
    if not hadamard:  # without a transform nothing is padded
        set_sizes(monkeypatch, FFN=64)
        monkeypatch.setattr(minimal, 'fwht', lambda x: x)
    if not exits:
        for name in ('LAMBDA_EE', 'LAMBDA_Q', 'LAMBDA_R'):
            monkeypatch.setattr(minimal, name, 0.0)
    if not skipping:
        monkeypatch.setattr(minimal, 'P_MAX', 0.0)
    oracle = minimal.BitSkip()
    with torch.no_grad():
        for w in oracle.parameters():
            w.normal_(std=0.2) if w.dim() == 2 else w.uniform_(0.5, 1.5)
    model = BitSkip(BitSkipConfig(
        vocab_size=minimal.V, block_size=minimal.T, n_layer=minimal.L, n_head=minimal.HEADS,
        n_kv_head=minimal.KV_HEADS, n_embd=minimal.C, ffn_dim=minimal.FFN, act_bits=minimal.BITS,
        linear='hbitlinear' if hadamard else 'bitlinear', gate_dim=minimal.GATE,
        lambda_ee=minimal.LAMBDA_EE, lambda_q=minimal.LAMBDA_Q, lambda_r=minimal.LAMBDA_R,
        p_max=minimal.P_MAX, target_exit=minimal.TARGET))
    model.load_state_dict(oracle.state_dict())
    return oracle, model

def make_tokens(B=6):
    """idx and targets, (B, T) each."""
    return torch.randint(minimal.V, (B, minimal.T + 1)).unfold(1, minimal.T, 1).unbind(1)

@pytest.mark.parametrize('hadamard', [True, False])
def test_logits_at_every_exit(monkeypatch, float64, hadamard):
    oracle, model = make_pair(monkeypatch, hadamard)
    idx, _ = make_tokens()
    logits = torch.stack([oracle.logits(h) for h in oracle.eval()(idx)])  # (L, B T, V)
    assert_close(all_exits(model.eval(), idx).flatten(1, 2), logits, rtol=1e-9, atol=1e-9)
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.pairwise(logits))

@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('hadamard, exits, skipping',
                         list(itertools.product([True, False], repeat=3)))
def test_losses_and_gradients(monkeypatch, float64, hadamard, exits, skipping, training):
    """Each part of A7, and what the total sends to each weight, with the same random numbers."""
    oracle, model = make_pair(monkeypatch, hadamard, exits, skipping)
    idx, targets = make_tokens()
    torch.manual_seed(1)
    wanted = minimal.losses(oracle.train(training), idx, targets)
    torch.manual_seed(1)
    _, losses = model.train(training)(idx, targets)
    for name in LOSSES if exits else ['total', 'ce']:
        assert_close(losses[name], wanted[name], rtol=1e-6, atol=0, msg=name)  # w_l are float32
    wanted['total'].backward()
    losses['total'].backward()
    theirs = dict(model.named_parameters())
    for name, w in oracle.named_parameters():
        if 'gates' in name and not exits:
            continue  # they learn nothing, here a zero and there None
        assert w.grad.abs().max() > 0, name
        assert_close(theirs[name].grad, w.grad, rtol=1e-6, atol=1e-9, msg=name)

def test_both_start_alike(monkeypatch):
    """The spread of every matrix at initialisation: 0.02, and less for o and down."""
    set_sizes(monkeypatch, C=128, FFN=128)
    oracle = minimal.BitSkip()
    model = BitSkip(BitSkipConfig(vocab_size=minimal.V, n_layer=minimal.L, n_embd=128, ffn_dim=128,
                                  n_head=4, n_kv_head=2, gate_dim=minimal.GATE))
    theirs = dict(model.named_parameters())
    for name, w in oracle.named_parameters():
        if w.numel() > 1000:
            assert w.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name

def test_no_token_sees_the_future(monkeypatch):
    """Changing token t leaves every logit before t unchanged, bit for bit, at every exit."""
    set_sizes(monkeypatch)
    model = minimal.BitSkip().eval()
    idx, _ = make_tokens()
    before = torch.stack([model.logits(h) for h in model(idx)]).unflatten(1, idx.shape)
    idx[:, 5] = (idx[:, 5] + 1) % minimal.V
    after = torch.stack([model.logits(h) for h in model(idx)]).unflatten(1, idx.shape)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert (before[:, :, 5:] != after[:, :, 5:]).any(-1).all()

def run_minimal(*arguments):
    return subprocess.run([sys.executable, 'minimal.py', *arguments], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {'OMP_NUM_THREADS': '1'})

def test_three_steps_end_to_end():
    """It trains, reads off every exit, each better than a uniform guess, and writes at two."""
    done = run_minimal('3')
    assert done.returncode == 0, done.stderr
    exits = re.findall(r'^exit (\d): PPL ([\d.]+)$', done.stdout, re.M)
    assert [int(l) for l, _ in exits] == list(range(minimal.L))
    assert all(1 < float(ppl) < minimal.V for _, ppl in exits)
    assert re.findall(r'^exit (\d) writes: Return ', done.stdout, re.M) == ['1', f'{minimal.L - 1}']

@pytest.mark.parametrize('wrong', ['0', '1.5', '3 4'])
def test_a_wrong_argument_is_one_sentence(wrong):
    done = run_minimal(*wrong.split())
    assert (done.returncode, done.stdout, done.stderr.count('\n')) == (2, '', 1)
    assert wrong in done.stderr

def test_it_is_plain_pytorch_in_the_papers_order():
    source = (ROOT / 'minimal.py').read_text()
    nodes = list(ast.walk(ast.parse(source)))
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert {name.split('.')[0] for name in names} <= {'torch', 'math', 'sys', 'time', 'prepare'}
    equations = re.findall(r'"""(A\d):', source)  # each at its function, in the paper's order
    assert equations == [f'A{n}' for n in range(1, 10)]
