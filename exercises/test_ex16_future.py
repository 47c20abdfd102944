from unittest.mock import patch

import torch
import torch.nn.functional as F

from exercises.hints import same
from model import BitSkip, BitSkipConfig


def test_attention_is_the_formula(student):
    for shape in ((2, 3, 8, 4), (1, 1, 1, 16)):
        q, k, v = torch.randn(3, *shape) * 3
        right, free = (F.scaled_dot_product_attention(q, k, v, is_causal=c) for c in (True, False))
        wide = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        y = student.attention(q, k, v, True)
        assert not torch.isnan(y).any(), 'NaN: a position that sees nothing, not even itself'
        same(y, right, 'with the mask: position t should see 0 ... t, and nothing else, not even '
             'with a score of 0', (free, 'the mask has no effect'))
        same(student.attention(q, k, v, False), free, 'without the mask: every position should see '
             'all of them', (right, 'without causal there should be no mask'),
             (wide, 'the scores are not divided by sqrt(D)'))


def bitskip(idx):
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig(vocab_size=16, block_size=8, n_layer=2, n_head=2, n_kv_head=1,
                                  n_embd=32, ffn_dim=64, gate_dim=0)).eval()
    return model(idx)[0].detach()


def leaky(amount, target, source, sample=slice(None)):
    """A causal model (it adds up what it has seen), but for its logits at `target`: they know the
    token at `source`."""
    table = torch.randn(16, 16)

    def model(idx):
        logits = table[idx].cumsum(1)
        logits[sample, target] *= 1 + amount * idx[sample, source, None].float()
        return logits
    return model


def tokens():
    return torch.randint(16, (2, 6))


def test_a_causal_model_passes(student):
    for model in (bitskip, leaky(1.0, 2, 2), leaky(1.0, 5, 0)):
        assert not student.sees_the_future(model, tokens()), (
            'a causal model is accused: a token may change its own logits, and later ones')


def test_a_model_without_mask_is_caught(student):
    with patch.object(F, 'scaled_dot_product_attention', lambda q, k, v, **_: v.mean(
            -2, keepdim=True).repeat(1, q.shape[1] // v.shape[1], q.shape[2], 1)):
        assert student.sees_the_future(bitskip, tokens()), 'a model without a mask gets away'


def test_every_single_leak_is_caught(student):
    for target in range(5):
        for source in range(target + 1, 6):
            assert student.sees_the_future(leaky(1.0, target, source), tokens()), (
                f'token {source} leaks into the logits at {target}, unseen: each t, and all before')


def test_a_faint_leak_is_caught(student):
    idx = torch.zeros(2, 6, dtype=torch.int64)
    assert student.sees_the_future(leaky(1e-6, 3, 4), idx), 'a leak of 1e-6 goes unseen: bit by bit'


def test_a_leak_in_one_sample_is_caught(student):
    for sample in (0, 1):
        assert student.sees_the_future(leaky(1.0, 3, 4, sample), tokens()), (
            f'a leak in sample {sample} alone goes unseen')


def test_idx_stays_as_it_was(student):
    idx = tokens()
    before = idx.clone()
    student.sees_the_future(bitskip, idx)
    assert torch.equal(idx, before), 'idx has changed: it belongs to the caller'
