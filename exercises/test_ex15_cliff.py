import torch
import torch.nn.functional as F

from exercises.hints import same
from exits import exit_weights
from model import BitSkip, BitSkipConfig


def tiny(L=4, **settings):
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig(vocab_size=31, block_size=16, n_layer=L, n_head=4, n_kv_head=2,
                                  n_embd=32, ffn_dim=64, gate_dim=0, lambda_ee=0.3, **settings))
    idx = torch.randint(31, (2, 9))
    return model, idx[:, :-1], idx[:, 1:]


def total(model, idx, targets, labels, weighting='early', factor=0.3):
    """CE of the last layer on targets, and of the exits on labels, by the definition."""
    L = model.config.n_layer
    loss = model(idx, targets, exit_layer=L - 1)[1]['ce']
    for layer, weight in enumerate(exit_weights(L, weighting)):
        logits, _ = model(idx, exit_layer=layer)
        loss = loss + factor * weight * F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return loss


def test_shifted_is_the_models_own_loss(student):
    for settings in ({}, dict(L=2), dict(exit_norm='none')):
        model, idx, targets = tiny(**settings)
        loss = student.total_loss(model, idx, targets, shifted=True)
        same(loss, model(idx, targets)[1]['total'],
             f'not the loss of the model with {settings or "its defaults"}: does the head read '
             'model.exit_state, and does 0.3 stand in front of the exits only?',
             (total(model, idx, targets, idx), 'with shifted=True exits learn targets, not idx'),
             (total(model, idx, targets, targets, 'late'), "these are the weights 'late'"),
             (total(model, idx, targets, targets, factor=1), 'the factor 0.3 is missing'))


def test_unshifted_exits_learn_the_current_token(student):
    model, idx, targets = tiny()
    same(student.total_loss(model, idx, targets, shifted=False), total(model, idx, targets, idx),
         'with shifted=False exits learn idx, and the last layer still learns targets',
         (total(model, idx, targets, targets), 'with shifted=False exits learn idx, not targets'),
         (total(model, idx, idx, idx), 'with shifted=False the last layer still learns targets'))


def test_gradients_reach_everything(student):
    model, idx, targets = tiny()
    loss = student.total_loss(model, idx, targets, shifted=True)
    assert loss.requires_grad, 'no gradient: nothing could learn'
    for got, right in zip(*(torch.autograd.grad(each, list(model.parameters()), allow_unused=True)
                            for each in (loss, model(idx, targets)[1]['total']))):
        assert got is not None, 'a parameter gets no gradient'
        same(got, right, 'a wrong gradient: is something detached?', rtol=1e-3, atol=1e-5)
