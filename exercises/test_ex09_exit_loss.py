import torch
import torch.nn.functional as F
from torch.testing import assert_close

from exits import exit_weights


def data(L=5, B=3, T=7, V=11):
    return torch.randn(L, B, T, V), torch.randint(V, (B, T))


def test_is_a4_and_b6(student):
    for weighting in ('early', 'late'):
        for L in (2, 5, 12):
            logits, tokens = data(L)
            losses = torch.stack([F.cross_entropy(exit[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
                                  for exit in logits[:-1]])
            assert_close(student.exit_loss(logits, tokens, weighting), exit_weights(L, weighting) @ losses)


def test_labels_are_the_next_tokens(student):
    """Exits that know the next token have no loss, whatever they say of the current one and at the last position."""
    logits, tokens = data()
    following = tokens.roll(-1, dims=1)
    following[:, -1] = (tokens[:, 0] + 1) % 11  # wrong, and nobody's business
    logits = 100.0 * F.one_hot(following, 11).expand(5, -1, -1, -1)
    assert student.exit_loss(logits, tokens, 'early') < 1e-3


def test_the_last_layer_is_not_an_exit(student):
    logits, tokens = data()
    before = student.exit_loss(logits, tokens, 'late')
    logits[-1] = 0
    assert torch.equal(student.exit_loss(logits, tokens, 'late'), before)


def test_does_not_depend_on_the_number_of_exits(student):
    """Exits that all say the same have that loss: the weights sum to 1."""
    logits, tokens = data(2)
    one = student.exit_loss(logits[:1].expand(2, -1, -1, -1), tokens, 'early')
    assert_close(student.exit_loss(logits[:1].expand(24, -1, -1, -1), tokens, 'early'), one)
