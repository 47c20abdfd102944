"""The model: losses from first principles (A7 and its parts), exits, skipping, old files."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import KINDS, all_exits
from formulas import norm, projection_a3
from torch.testing import assert_close

from checkpoint import REMOVED, open_model, save_checkpoint
from configurator import UserError
from decode import KVCache
from exits import exit_weights
from model import BitSkip, BitSkipConfig

# ---- settings

@pytest.mark.parametrize('wrong', [
    dict(vocab_size=0), dict(block_size=0), dict(n_layer=0), dict(n_head=0), dict(n_kv_head=0),
    dict(n_embd=0), dict(ffn_dim=2 ** 62), dict(n_embd=36, n_head=8), dict(n_embd=8, n_head=8),
    dict(n_kv_head=3), dict(act_bits=1), dict(act_bits=9), dict(p_max=-0.1), dict(p_max=1.1),
    dict(dropout=1.0), dict(gate_dim=-1), dict(lambda_ee=-1.0), dict(lambda_q=-1.0),
    dict(lambda_r=math.nan), dict(linear='bitlinaer'), dict(ffn='swigul')], ids=str)
def test_config_refuses_in_one_sentence(wrong):
    """BitSkipConfig(ffn='swigul') was a relu2 model. No silent fallback."""
    with pytest.raises((ValueError, UserError), match=list(wrong)[0]) as error:
        BitSkipConfig(**wrong)
    assert '\n' not in str(error.value)

# ---- the whole model from first principles

def turn(x, theta):
    """RoPE: (x_i + i x_{i + D/2}) exp(i t theta^(-2i/D)), of x (B, T, D)."""
    T, half = x.shape[1], x.shape[2] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    z = z * torch.exp(1j * torch.arange(T)[:, None] * theta ** (-torch.arange(half) / half))
    return torch.cat((z.real, z.imag), dim=-1)

def states_of(c, p, idx):
    """h_0 ... h_{L-1}, attention one head at a time; p: the parameters by name."""
    def project(x, name):
        if c.linear == 'fp':
            return x @ p[f'{name}.weight'].T
        here = c.hadamard_layers == 'all' or name.endswith(('.o', '.down'))
        return projection_a3(x, p[f'{name}.weight'], c.linear == 'hbitlinear' and here, c.act_bits,
                             c.linear_norm)

    def sub_norm(x, name):
        return norm(x, c.norm, p[f'{name}.sub_norm.weight']) if c.sub_norm else x
    D, T = c.n_embd // c.n_head, idx.shape[1]
    h, states = p['embedding.weight'][idx], []
    for block in (f'blocks.{l}' for l in range(c.n_layer)):
        x, heads = norm(h, c.norm, p[f'{block}.attn_norm.weight']), []
        q, k, v = (project(x, f'{block}.attn.{name}') for name in 'qkv')
        for i in range(c.n_head):
            j = i * c.n_kv_head // c.n_head  # the key and value head of query head i
            q_i, (k_j, v_j) = q[..., i * D:i * D + D], (x[..., j * D:j * D + D] for x in (k, v))
            scores = turn(q_i, c.rope_theta) @ turn(k_j, c.rope_theta).mT / D ** 0.5
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v_j)
        h = h + project(sub_norm(torch.cat(heads, dim=-1), f'{block}.attn'), f'{block}.attn.o')
        x = norm(h, c.norm, p[f'{block}.ffn_norm.weight'])
        y = project(x, f'{block}.ffn.up')
        if c.ffn == 'swiglu':
            gate = project(x, f'{block}.ffn.gate')
            y = gate * torch.sigmoid(gate) * y
        else:
            y = y.clamp(min=0) ** 2
        h = h + project(sub_norm(y, f'{block}.ffn'), f'{block}.ffn.down')
        states.append(h)
    return states

@pytest.mark.parametrize('settings', [
    dict(linear='bitlinear', ffn='swiglu', norm='rmsnorm', sub_norm=False, ee_weighting='late'),
    dict(linear='hbitlinear', exit_norm='none', ee_weighting='uniform', hadamard_layers='o,down'),
    dict(linear='hbitlinear', act_bits=4, exit_norm='raw', linear_norm='layernorm', norm='rmsnorm'),
    dict(linear='bitlinear', ffn='swiglu', linear_norm='rmsnorm', n_layer=4, rope_theta=50.0),
    dict(linear='fp', n_kv_head=1), dict(linear='fp', n_kv_head=4, exit_norm='raw')], ids=str)
@pytest.mark.parametrize('product', ['integer', 'definition'])
def test_every_exit_and_its_gradients(make_model, tokens, use_product, settings, product):
    """Paper B's shape and every other setting that minimal.py has not. Where rounding takes one
    activation to the neighbouring code, sums move by a little: norms are compared."""
    use_product(product)
    model, idx, targets = make_model(lambda_ee=0.3, **settings), tokens(2, 6), tokens(2, 6, seed=1)
    c, p, L = model.config, dict(model.named_parameters()), model.config.n_layer
    raw = [c.exit_norm == 'raw' or c.exit_norm == 'none' and l < L - 1 for l in range(L)]
    read = [h if raw_l else norm(h, c.norm, p['norm.weight'])
            for h, raw_l in zip(states_of(c, p, idx), raw)]
    reference, logits = torch.stack(read) @ p['head.weight'].T, all_exits(model, idx)
    g = torch.randn_like(logits)
    for a, b in [(logits, reference), *zip(*(torch.autograd.grad(
            (x * g).sum(), [*p.values()], materialize_grads=True) for x in (logits, reference)))]:
        assert (a - b).norm() <= 0.005 * b.norm()
    w = exit_weights(L, c.ee_weighting)  # B6
    ee = sum(w[l] * F.cross_entropy(logits[l].flatten(0, 1), targets.flatten())
             for l in range(L - 1))
    assert_close(model(idx, targets)[1]['ee'], ee)

# ---- the losses

def test_a8_counts_in_a_model_of_one_layer(make_model, tokens):
    """One layer has no early exits, but its weights are quantized all the same."""
    model = make_model(n_layer=1, lambda_q=0.7, lambda_ee=0.3, lambda_r=0.2, target_exit=0)
    logits, losses = model(tokens(), tokens(seed=1), return_logits=False)
    assert logits is None and losses['quant'] > 0 and losses['ee'] == losses['route'] == 0
    assert_close(losses['total'], losses['ce'] + 0.7 * losses['quant'])

def test_a4_sampled_exits_are_unbiased_in_loss_and_gradient(make_model, tokens, monkeypatch):
    """Over all 24 ways to deal four tokens to two exits, loss and gradient are those of A4 on all
    tokens; no single way is. In evaluation nothing is dealt."""
    exact, sampled = (make_model(lambda_ee=1.0, ee_positions=p) for p in ('all', 'sampled'))
    idx, targets = tokens(1, 4), tokens(1, 4, seed=1)

    def look(model):
        loss = model(idx, targets)[1]['ee']
        grad, = torch.autograd.grad(loss, model.blocks[0].attn.v.weight)
        return torch.cat((loss[None], grad.flatten())).detach()
    expected, draws = look(exact), []
    assert torch.equal(look(sampled), expected)
    sampled.train()
    for order in itertools.permutations(range(4)):
        monkeypatch.setattr(torch, 'randperm', lambda n, order=order: torch.tensor(order))
        draws.append(look(sampled))
    assert_close(torch.stack(draws).mean(dim=0), expected, rtol=1e-4, atol=1e-5)
    assert all((draw[0] - expected[0]).abs() > 1e-3 for draw in draws)

@pytest.mark.parametrize('exit_norm', ['final', 'none', 'raw'])
def test_gates_foresee_the_divergence_of_their_exits(make_model, tokens, exit_norm, monkeypatch):
    """gate_loss='divergence': mean(D - KL log D), D = -log p, with KL between what the model says
    there and at full depth. Only the gates learn from it."""
    monkeypatch.setattr('exits.deal', lambda n, exits, device: [torch.arange(n)] * exits)
    model, idx = make_model(gate_loss='divergence', lambda_r=1.0, exit_norm=exit_norm), tokens()
    states, logits = list(model.hidden_states(idx)), all_exits(model, idx).log_softmax(-1)
    D = -model.gate_probabilities(states[:-1]).log()  # (B, T, L-1)
    KL = (logits[2].exp() * (logits[2] - logits[:2])).sum(-1).permute(1, 2, 0)
    route = model(idx, idx)[1]['route']
    assert_close(route, (D - KL * D.log()).mean(), rtol=1e-4, atol=1e-5)
    route.backward()
    learned = {name.split('.')[0] for name, p in model.named_parameters() if p.grad is not None}
    assert learned == {'gates'}

# ---- exits

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('exit_norm', ['final', 'none', 'raw'])
@pytest.mark.parametrize('k', [0, 1, 2])
def test_a4_a_pass_to_exit_k_is_that_exit_of_all(make_model, tokens, kind, exit_norm, k):
    """Its logits to the bit, under the norm that this exit has, and their cross-entropy."""
    model, idx, targets = make_model(linear=kind, exit_norm=exit_norm), tokens(), tokens(seed=1)
    logits, losses = model(idx, targets, exit_layer=k)
    assert torch.equal(logits, all_exits(model, idx)[k])
    assert_close(losses['total'], F.cross_entropy(logits.flatten(0, 1), targets.flatten()))

# ---- skipping and dropout

def test_a5_each_sample_skips_alone_unchanged_and_for_free(make_model, tokens):
    """A block runs on the samples that do not skip it; the others keep their very bits, and are
    about p_l of all. The last block is never skipped, and nothing is in evaluation."""
    model, idx, rows = make_model(linear='fp', n_layer=4, p_max=0.9), tokens(400, 2), []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: rows.append(len(args[0])))
    before, rope = model.embedding(idx), model.rope(0, 2)
    for layer, h in enumerate(model.train().hidden_states(idx)):
        skipped = (h == before).flatten(1).all(dim=1)
        assert rows.pop() == (~skipped).sum()
        assert_close(h[~skipped], model.blocks[layer](before[~skipped], rope))
        p = 0.9 * (layer / 3) ** 2 if layer < 3 else 0.0
        assert abs(skipped.sum() - 400 * p) <= 5 * (400 * p * (1 - p)) ** 0.5
        before = h
    assert torch.equal(model.eval()(idx)[0], make_model(linear='fp', n_layer=4)(idx)[0])

def test_a5_a_block_that_all_samples_skip_is_not_there(make_model, tokens):
    """It gets no gradient, rather than one of zeros, and costs nothing."""
    model = make_model(lambda_ee=0.3).train()
    model.skip_probabilities = [0.0, 1.0, 0.0]
    logits, losses = model(tokens(), tokens(seed=1))
    losses['total'].backward()
    assert all(p.grad is None for p in model.blocks[1].parameters())
    assert all(p.grad is not None for layer in (0, 2) for p in model.blocks[layer].parameters())
    del model.blocks[1]
    model.config.n_layer, model.skip_probabilities = 2, [0.0, 0.0]
    assert torch.equal(logits, model(tokens())[0])

def test_a5_a_cache_in_training_mode_gets_no_holes(make_model, tokens):
    """A sample that skipped a block would leave no keys there."""
    model, idx = make_model(linear='fp').train(), tokens(4, 8)
    expected = model(idx)[0]
    model.skip_probabilities, cache = [0.5, 0.5, 0.0], KVCache(model, 4)
    with torch.no_grad():
        chunks = [model(idx[:, part], cache=cache)[0] for part in (slice(5), slice(5, 8))]
    assert_close(torch.cat(chunks, dim=1), expected)

def test_dropout_reaches_attention_branches_and_embedding_in_training_only(make_model, tokens):
    idx, x = tokens(), torch.randn(2, 8, 32)
    model, plain = (make_model(dropout=p, linear='fp') for p in (0.3, 0.0))
    assert torch.equal(model(idx)[0], plain.train()(idx)[0])
    rope, block = model.rope(0, 8), model.train().blocks[0]
    for look in (lambda: block.attn(x, rope), lambda: block.dropout(x), lambda: model.embed(idx)):
        assert not torch.equal(look(), look())

# ---- checkpoints, those of the old layout among them

META = dict(dataset='text.txt', tokenizer='bytes', vocab_size=31, splits={'val': {}})

@pytest.fixture
def reopen(make_model, tmp_path):
    """reopen(model, **change): open_model of its checkpoint, written before today, so changed."""
    def reopen(model=None, **change):
        model, path = model or make_model(linear='fp'), str(tmp_path / 'ckpt.pt')
        settings = vars(model.config) | REMOVED | dict(fsdp=True, log_to='') | change
        checkpoint = dict(model=model.state_dict(), settings=settings,
                          meta=META, progress=dict(iter=1, val_loss=1.0))
        if 'model_class' in change:
            checkpoint['model_class'] = change['model_class']
        save_checkpoint(path, checkpoint)
        return open_model(path)
    return reopen

@pytest.mark.parametrize('final_norm, exit_norm, today', [
    (True, 'final', 'final'), (True, 'none', 'none'), (False, 'final', 'raw'),
    (False, 'none', 'raw')])
def test_an_old_checkpoint_at_the_defaults_loads(make_model, tokens, reopen, final_norm, exit_norm,
                                                 today):
    written = make_model(linear='hbitlinear', exit_norm=today)
    model, settings = reopen(written, final_norm=final_norm, exit_norm=exit_norm)
    assert type(model) is BitSkip and not model.training and model.config == written.config
    assert settings['meta'] == META and settings['exit_norm'] == written.config.exit_norm
    assert torch.equal(all_exits(model, tokens()), all_exits(written, tokens()))

@pytest.mark.parametrize('change', [
    *({name: 'another'} for name in REMOVED), dict(gate_loss='agreement'),
    dict(gate_loss='overlap'), dict(linear='hadamard_after')], ids=str)
def test_an_old_checkpoint_that_needs_what_is_gone_is_refused(reopen, change):
    """One sentence names the setting. Its weights fit: it would be used as another model."""
    with pytest.raises(UserError, match=list(change)[0]) as error:
        reopen(**change)
    assert '\n' not in str(error.value)

@pytest.mark.parametrize('change', [
    dict(n_embd=64), dict(n_layer=2), dict(linear='hbitlinear'), dict(exit_norm='raw'),
    dict(model_class='model:Block'), dict(model_class='os:system')], ids=str)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused(reopen, change):
    with pytest.raises(UserError, match='ckpt.pt cannot be opened as a model') as error:
        reopen(**change)
    assert '\n' not in str(error.value) and len(str(error.value)) < 400
