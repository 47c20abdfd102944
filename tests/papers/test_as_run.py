"""Paper A's model as run: its parts in their plainest form, and the ladder that ends at BitSkip."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import all_exits, flags, initial, text_folder

import sample
from configurator import run
from hadamard import fwht, pad_to_pow2
from model import rotate
from papers.as_run import AsRun, AsRunSettings
from papers.measures import LADDER
from quant import activation_quant_ste, dequantize
from train import main

cells = pytest.mark.parametrize('linear', ['bitlinear', 'hbitlinear'])
EXITS = dict(lambda_ee=0.3, lambda_q=0.05, lambda_r=0.2)

@pytest.fixture
def make(make_model):
    return lambda **settings: make_model(AsRun, **EXITS | settings)

@pytest.mark.parametrize('linear, total', [('bitlinear', 87_155_724), ('hbitlinear', 87_266_316)])
def test_parameters_are_the_authors(linear, total):
    """AS_RUN 2, to the last parameter: learned positions, gains, biases, and twelve gates."""
    with torch.device('meta'):
        model = AsRun(AsRunSettings(linear=linear))
    assert sum(p.numel() for p in model.parameters()) == total
    assert sum(p.numel() for p in model.gates.parameters()) == 801_804
    assert model.quantizable_parameters() == 34_603_008

@cells
def test_initial_weights(linear):
    model = initial(AsRun, linear=linear)
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
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)

@cells
def test_block_by_definition(make, tokens, linear):
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
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        y = y.transpose(1, 2).flatten(2)
        h = layer_norm(h + projection(a.o, y), block.after_attn)
        h = layer_norm(h + projection(f.down, phi(projection(f.up, h))), block.after_ffn)
        torch.testing.assert_close(state, h, rtol=1e-4, atol=1e-4)
        h = state  # no rounding decides the next block's codes
    torch.testing.assert_close(model(idx)[0], layer_norm(h, model.norm) @ model.head.weight.T)

@pytest.mark.parametrize('weighting, weights', [('all_late', [1 / 6, 2 / 6, 3 / 6]),
                                                ('all_front', [6 / 11, 3 / 11, 2 / 11])])
def test_losses_by_definition(make, tokens, weighting, weights):
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

@cells
def test_the_ladder_ends_at_bitskip(make, make_model, tokens, linear):
    """With every switch at 'fixed' the model is BitSkip: logits at all exits, and losses."""
    settings = {key: value for rung in LADDER.values() for key, value in rung.items()}
    assert settings['initial'] == 'usual'  # which `make` paints over
    model = make(linear=linear, gate_dim=0, **settings)
    ours = make_model(linear=linear, gate_dim=0, **EXITS | dict(lambda_r=0.0))
    ours.load_state_dict(model.state_dict())  # strict: the same parameters
    idx, targets = tokens(), tokens(seed=1)
    torch.testing.assert_close(all_exits(model, idx), all_exits(ours, idx))
    torch.testing.assert_close(model(idx, targets), ours(idx, targets))

def test_trains_and_samples(tmp_path, capsys):
    with text_folder(tmp_path, 6000):
        assert main(flags(dropout=0.1, max_iters=4), AsRunSettings, AsRun)
        run(lambda _: sample.main(['--out_dir=out/run', '--max_new_tokens=5', '--exit_layer=1']))
    assert 'tokens' in capsys.readouterr().out
