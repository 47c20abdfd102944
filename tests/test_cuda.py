"""The same on a GPU: python -m pytest -m cuda. Without one, the tests try themselves on the CPU."""
import contextlib

import pytest
import torch
from conftest import TINY, all_exits, flags, text_folder
from torch.nn.utils import clip_grad_norm_
from torch.testing import assert_close

import train
from checkpoint import load_checkpoint
from common import Processes
from decode import EXIT_MODES, KVCache
from fast.packed import to_ternary
from fast.speculate import speculate
from model import BitSkip, BitSkipConfig
from quant import activation_quant, ternary_linear, weight_ternary

RECIPE = dict(linear='hbitlinear', lambda_ee=0.3, lambda_q=0.05, lambda_r=0.2)
GATES = dict(linear='hbitlinear', lambda_ee=2.0, ee_positions='sampled', exit_norm='none',
             gate_loss='divergence', lambda_r=0.1)

@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def device(request):
    if request.param == 'cuda' and not torch.cuda.is_available():
        pytest.skip('there is no GPU')
    return request.param

@pytest.mark.parametrize('rows, columns', [(512, 512), (2048, 512), (4096, 2048), (1024, 2048)])
@pytest.mark.parametrize('n', [1, 40])
def test_products_of_both_papers_shapes_are_those_of_int64(device, rows, columns, n):
    x, w = torch.randn(n, columns, device=device), torch.randn(rows, columns, device=device)
    (x_codes, s), (codes, alpha) = activation_quant(x), weight_ternary(w)
    exact = (x_codes.cpu().long() @ codes.cpu().long().T).double() * (s * alpha).cpu().double()
    assert_close(ternary_linear(x, w, codes, alpha, 8).cpu().double(), exact, rtol=1e-5, atol=1e-4)

@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.cuda)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('settings', [RECIPE, GATES], ids=['recipe', 'gates'])
def test_losses_and_gradients_are_those_of_a_cpu(device, dtype, compiled, settings, tokens):
    """In float32 and eval mode: what is random is drawn on the CPU, or not at all."""
    found = []
    for where, kind in (('cpu', torch.float32), (device, dtype)):
        torch.manual_seed(0)
        model = BitSkip(BitSkipConfig(**TINY | settings)).to(where).eval()
        for block in model.blocks if compiled and where == 'cuda' else ():
            block.compile()
        torch.manual_seed(1)
        with torch.autocast(where, torch.bfloat16, enabled=kind == torch.bfloat16):
            losses = model(tokens(4, 16).to(where), tokens(4, 16, 1).to(where))[1]
        losses['total'].backward()
        found.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    close = 1e-4 if dtype == torch.float32 else 0.05
    for name, loss in found[0][0].items():
        assert_close(found[1][0][name].float().cpu(), loss, rtol=close, atol=1e-5)
    for name, grad in found[0][1].items():
        other = found[1][1][name].cpu()
        assert (other - grad).norm() <= (0.02 if close < 0.01 else 0.5) * grad.norm(), name

@pytest.mark.parametrize('settings', [RECIPE, GATES, dict(linear='fp')], ids=str)
def test_no_step_waits_for_the_gpu(device, settings, monkeypatch):
    """Forward and backward launch, and ask for no number; what the CPU has drawn is sent without
    waiting. Without a GPU: on the meta device, where there are no numbers to ask for."""
    s = train.TrainSettings(**TINY | settings | dict(p_max=0.5, batch_size=4))
    text, model = torch.arange(500).numpy().astype('uint16') % s.vocab_size, BitSkip(s)
    if device == 'cuda':
        processes = Processes(torch.device('cuda'))
        train.gradient(model.cuda(), text, s, 0, processes)  # what is made once
        torch.cuda.set_sync_debug_mode('error')
    else:
        processes, to = Processes(torch.device('meta')), torch.Tensor.to

        def sent(x, *args, **options):
            y = to(x, *args, **options)
            assert y.device == x.device or options['non_blocking']
            return y
        monkeypatch.setattr(torch.Tensor, 'to', sent)
        monkeypatch.setattr(torch, 'is_autocast_enabled', lambda kind: False)  # knows no meta
        monkeypatch.setattr(train, 'autocast', lambda *_: contextlib.nullcontext())
        model = model.to_empty(device='meta')
    try:
        losses = train.gradient(model, text, s, 1, processes)
        clip_grad_norm_(model.parameters(), 1.0)
    finally:
        if device == 'cuda':
            torch.cuda.set_sync_debug_mode('default')
    assert losses['total'].shape == () and all(p.grad is not None for p in model.head.parameters())

@pytest.mark.parametrize('packed', [False, True])
def test_a_cache_changes_nothing_and_nothing_sees_the_future(device, make_model, tokens, packed):
    model, idx = make_model(linear='hbitlinear').to(device), tokens(2, 12).to(device)
    model = to_ternary(model) if packed else model
    with torch.no_grad():
        logits, changed = all_exits(model, idx), idx.clone()
        changed[:, 7] = (changed[:, 7] + 1) % 31
        assert torch.equal(all_exits(model, changed)[:, :, :7], logits[:, :, :7])
        cache = KVCache(model, 2)
        parts = [all_exits(model, part, cache) for part in idx.split((5, 1, 6), dim=1)]
    assert (torch.cat(parts, dim=2) - logits).norm() < 0.02 * logits.norm()

def test_text_by_exits_and_by_drafts(device, make_model, tokens):
    """A threshold of 1 is full depth; drafts change nothing but what rounding does."""
    model, idx = make_model(linear='bitlinear').to(device), tokens(1, 6).to(device)
    plain = model.generate(idx, 8, temperature=0)
    for mode in EXIT_MODES:
        same = model.generate(idx, 8, temperature=0, exit_mode=mode, exit_threshold=1.0)
        assert torch.equal(same, plain)
    drafted = torch.cat([t for t, _ in speculate(model, idx, 8, 1, 3, temperature=0)], dim=1)
    assert drafted.shape == (1, 8) and drafted[0, 0] == plain[0, 6]

def test_a_run_that_is_resumed_ends_as_one_that_was_not(device, tmp_path):
    with text_folder(tmp_path, 8000):
        for out, steps in (('whole', (8,)), ('parts', (4, 8))):
            for n in steps:
                init = 'scratch' if n == steps[0] else 'resume'
                assert train.main(flags(out_dir=f'out/{out}', device=device, init_from=init,
                                        max_iters=n, schedule='wsd', decay_frac=0.0))
        a, b = (load_checkpoint(f'out/{out}/last.pt')['model'] for out in ('whole', 'parts'))
    for name, w in a.items():
        assert_close(b[name], w, rtol=0, atol=0 if device == 'cpu' else 1e-3)
