import torch
import torch.nn.functional as F

from exercises.hints import same
from exits import exit_weights


def data(L=5, B=3, T=7, V=11):
    return torch.randn(L, B, T, V), torch.randint(V, (B, T))


def mean_loss(logits, labels, weights):
    return sum(w * F.cross_entropy(exit.flatten(0, 1), labels.flatten())
               for exit, w in zip(logits, weights))


def test_is_a4_and_b6(student):
    for weighting, other in (('early', 'late'), ('late', 'early')):
        for L in (2, 5, 12):
            logits, tokens = data(L)
            w, cut, following = exit_weights(L, weighting), logits[:, :, :-1], tokens[:, 1:]
            same(student.exit_loss(logits, tokens, weighting), mean_loss(cut, following, w),
                 f"'{weighting}' with {L} layers has another sum: see its weights, and the labels",
                 (mean_loss(logits, tokens, w), 'this is the loss of the *current* token: which '
                  'token do the logits at t speak of?'),
                 (mean_loss(logits[:, :, 1:], tokens[:, :-1], w), 'shifted the wrong way: these '
                  'exits say what came before'),
                 (mean_loss(cut, following, exit_weights(L, other)), 'the two weightings have '
                  'changed places'),
                 (mean_loss(cut, following, w * sum(range(1, L)) if weighting == 'late' else w *
                            sum(range(2, L + 1))), 'the weights do not sum to 1'))


def test_labels_are_the_next_tokens(student):
    """Exits that know the next token have no loss, whatever they say at the last position."""
    logits, tokens = data()
    following = tokens.roll(-1, dims=1)
    following[:, -1] = (tokens[:, 0] + 1) % 11  # wrong, and nobody's business
    logits = 100.0 * F.one_hot(following, 11).expand(5, -1, -1, -1)
    assert student.exit_loss(logits, tokens, 'early') < 1e-3, (
        'exits that know every next token still have a loss: the last position has no next token')


def test_the_last_layer_is_not_an_exit(student):
    logits, tokens = data()
    before = student.exit_loss(logits, tokens, 'late')
    logits[-1] = 0
    same(student.exit_loss(logits, tokens, 'late'), before, 'the last layer changes the sum: it '
         'is not an exit, its loss is CE', rtol=0, atol=0)


def test_does_not_depend_on_the_number_of_exits(student):
    """Exits that all say the same have that loss."""
    logits, tokens = data(2)
    one, many = (student.exit_loss(logits[:1].expand(L, -1, -1, -1), tokens, 'early')
                 for L in (2, 24))
    same(many, one, 'more exits that say the same make more loss: do the weights sum to 1?')
