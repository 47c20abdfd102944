import torch
import torch.nn.functional as F
from torch.testing import assert_close

from exits import exit_weights
from model import BitSkip, BitSkipConfig


def tiny(L=4, **settings):
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig(vocab_size=31, block_size=16, n_layer=L, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=64,
                                  lambda_ee=0.3, lambda_q=0.0, lambda_r=0.0,
                                  gate_dim=0, **settings))
    idx = torch.randint(31, (2, 9))
    return model, idx[:, :-1], idx[:, 1:]


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_shifted_is_the_models_own_loss(student):
    for settings in ({}, dict(L=2), dict(exit_norm='none')):
        model, idx, targets = tiny(**settings)
        _, losses = model(idx, targets)
        assert_close(student.total_loss(model, idx, targets, shifted=True), losses['total'])


def test_unshifted_exits_learn_the_current_token(student):
    model, idx, targets = tiny()
    loss = model(idx, targets, exit_layer=3)[1]['ce']
    for layer, weight in enumerate(exit_weights(4, 'early')):
        logits, _ = model(idx, exit_layer=layer)
        loss = loss + 0.3 * weight * F.cross_entropy(logits.flatten(0, 1), idx.flatten())
    assert_close(student.total_loss(model, idx, targets, shifted=False), loss)


def test_gradients_reach_everything(student):
    model, idx, targets = tiny()
    loss = student.total_loss(model, idx, targets, shifted=True)
    assert loss.requires_grad
    assert_close(gradients(loss, model), gradients(model(idx, targets)[1]['total'], model), rtol=1e-3, atol=1e-5)
