"""Paper A's model as run: its parts in their plainest form, and the ladder that ends at BitSkip."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, all_exits, flags, text_folder

import sample
from configurator import run
from decode import KVCache
from hadamard import fwht, pad_to_pow2
from model import BitSkip, BitSkipConfig, rotate
from papers.as_run import AsRun, AsRunSettings
from papers.measures import LADDER
from quant import activation_quant_ste, dequantize
from train import main

CELLS = ['bitlinear', 'hbitlinear']
EXITS = dict(lambda_ee=0.3, lambda_q=0.05, lambda_r=0.2)


def make(**settings):
    """A tiny model in eval mode whose weights and norms are large enough to tell all parts."""
    torch.manual_seed(0)
    model = AsRun(AsRunSettings(**TINY | EXITS | settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2) if p.dim() == 2 else p.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize('linear, total', [('bitlinear', 87_155_724), ('hbitlinear', 87_266_316)])
def test_parameters_are_the_authors(linear, total):
    """AS_RUN 2, to the last parameter: learned positions, gains, biases, and twelve gates."""
    with torch.device('meta'):
        model = AsRun(AsRunSettings(linear=linear))
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.gates.parameters()) == 801_804
    assert model.quantizable_parameters() == 34_603_008


@pytest.mark.parametrize('linear', CELLS)
def test_initial_weights(linear):
    model = AsRun(AsRunSettings(**TINY | dict(linear=linear)))
    for layer in model.linears():
        bound = 0.1 * layer.in_features ** -0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert float(layer.ternary()[1]) == pytest.approx(bound / 2, rel=0.1)
    for matrix, std in [(model.embedding, 1e-3), (model.positions, 1e-3), (model.head, 2e-3),
                        (model.gates[0][1], 2e-3)]:
        assert matrix.weight.std().item() == pytest.approx(std, rel=0.2)
    assert not model.gates[0][1].bias.any()


def phi(z):
    return z.clamp(min=0) ** 2


def layer_norm(x, norm):
    deviation = (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return (x - x.mean(-1, keepdim=True)) / deviation * norm.weight + norm.bias


@pytest.mark.parametrize('linear', CELLS)
def test_block_by_definition(tokens, linear):
    """AS_RUN 1 and 2: phi(Q_b(x) W^T) or phi(Q_b(FWHT(LN(x))) W^T), in post-norm blocks."""
    model, idx = make(linear=linear), tokens(2, 8)
    h = model.embedding.weight[idx] + model.positions.weight[:8]

    def projection(layer, x):
        if linear == 'hbitlinear':
            x = fwht(pad_to_pow2(layer_norm(x, layer.inner_norm)))
        return phi(activation_quant_ste(x) @ dequantize(*layer.ternary()).T)

    for block, state in zip(model.blocks, model.hidden_states(idx), strict=True):
        a, f = block.attn, block.ffn
        x = h if linear == 'hbitlinear' else F.layer_norm(h, h.shape[-1:])
        q, k, v = (projection(p, x).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (a.q, a.k, a.v))
        assert min(q.min(), k.min(), v.min()) >= 0
        q, k = rotate(q, model.rope(0, 8)), rotate(k, model.rope(0, 8))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        future = torch.ones(8, 8, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-2, -1) / 8 ** 0.5).masked_fill(future, -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = layer_norm(h + projection(a.o, y), block.after_attn)
        h = layer_norm(h + projection(f.down, phi(projection(f.up, h))), block.after_ffn)
        torch.testing.assert_close(state, h, rtol=1e-4, atol=1e-4)
        h = state  # no rounding decides the next block's codes
    torch.testing.assert_close(model(idx)[0], layer_norm(h, model.norm) @ model.head.weight.T)


@pytest.mark.parametrize('weighting, weights', [('all_late', [1 / 6, 2 / 6, 3 / 6]),
                                                ('all_front', [6 / 11, 3 / 11, 2 / 11])])
def test_losses_by_definition(tokens, weighting, weights):
    """AS_RUN 3 and 4: all exits, raw states, the current token; and A9 without what is left."""
    model, idx, targets = make(ee_weighting=weighting), tokens(), tokens(seed=1)
    states, (logits, losses) = list(model.hidden_states(idx)), model(idx, targets)
    ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    ee = sum(w * F.cross_entropy(model.head(h).flatten(0, 1), idx.flatten())
             for w, h in zip(weights, states, strict=True))
    E = 0
    for path in itertools.product((0, 1), repeat=3):  # who leaves where, could it go on
        if any(path):
            p = [g(h) if z else 1 - g(h) for g, h, z in zip(model.gates, states, path)]
            E = E + path.index(1) * (p[0] * p[1] * p[2]).mean()
    torch.testing.assert_close(losses['ce'], ce)
    torch.testing.assert_close(losses['ee'], ee)
    torch.testing.assert_close(losses['route'], (E - model.config.target_exit) ** 2)


@pytest.mark.parametrize('linear', CELLS)
def test_the_ladder_ends_at_bitskip(tokens, linear):
    """With every switch at 'fixed' the model is BitSkip: logits at all exits, and losses."""
    settings = {key: value for rung in LADDER.values() for key, value in rung.items()}
    model = make(linear=linear, gate_dim=0, **settings)
    shared = TINY | EXITS | dict(linear=linear, gate_dim=0, lambda_r=0.0)
    ours = BitSkip(BitSkipConfig(**shared)).eval()
    ours.load_state_dict(model.state_dict())  # strict: the same parameters
    idx, targets = tokens(), tokens(seed=1)
    torch.testing.assert_close(all_exits(model, idx), all_exits(ours, idx))
    torch.testing.assert_close(model(idx, targets), ours(idx, targets))


def test_each_rung_changes_something(tokens):
    settings, before = {}, None
    for rung in LADDER.values():
        settings |= rung
        logits, losses = make(**settings)(tokens(), tokens(seed=1))
        now = torch.stack([logits.sum(), losses['total']])
        if 'initial' not in rung:  # (`make` paints over it)
            assert before is None or (now != before).any()
        before = now


@pytest.mark.parametrize('linear', CELLS)
def test_causality_and_cache(tokens, linear):
    """No logit depends on a later token, not by a bit; a cache changes nothing."""
    model, idx = make(linear=linear), tokens()
    changed, logits, cache = idx.clone(), all_exits(model, idx), KVCache(model, 2)
    changed[:, 5] = (idx[:, 5] + 1) % 31
    assert ((all_exits(model, changed) != logits).any(dim=-1).any(dim=(0, 1)).tolist()
            == [False] * 5 + [True] * 3)
    parts = [all_exits(model, part, cache) for part in idx.split((3, 1, 4), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=2), logits, rtol=1e-3, atol=1e-3)


def test_trains_and_samples(tmp_path, capsys):
    with text_folder(tmp_path, 6000):
        assert main(flags(dropout=0.1, max_iters=4), AsRunSettings, AsRun)
        run(lambda _: sample.main(['--out_dir=out/run', '--max_new_tokens=5', '--exit_layer=1']))
    assert 'tokens' in capsys.readouterr().out
