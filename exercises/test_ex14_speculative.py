import torch

from exercises.hints import same


def distributions():
    p, q = torch.rand(2, 100, 7, dtype=torch.float64).pow(4)
    p[:50, 0], q[:50, 1] = 0, 0  # words that one of them excludes
    return p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)


def test_both_are_probabilities(student):
    p, q = distributions()
    a, r = student.accept_probability(p, q)[q > 0], student.residual(p, q)
    assert a.min() >= 0 and a.max() <= 1, f'chances from {a.min():.2f} to {a.max():.2f}: 0 to 1'
    assert r.min() >= 0, 'the residual has negative chances: what p has less than q counts as 0'
    same(r.sum(-1), torch.ones(100).double(), 'the residual does not sum to 1')


def test_the_token_is_exactly_from_p(student):
    p, q = distributions()
    accepted = q * student.accept_probability(p, q).nan_to_num(0)  # q never drafts the others
    rejected = 1 - accepted.sum(-1, keepdim=True)
    same(accepted + rejected * student.residual(p, q), p, 'the tokens are not distributed as p: '
         'what do drafts that stand leave of p for the residual?',
         (accepted + rejected * p, 'drawn from p again after a rejection: then what q likes comes '
          'too often'))


def test_accepts_as_often_as_can_be(student):
    """q a <= q and, for exactness, q a <= p: so no rule accepts more often than sum min(p, q)."""
    p, q = distributions()
    accepted = q * student.accept_probability(p, q).nan_to_num(0)
    same(accepted.sum(-1), torch.minimum(p, q).sum(-1), 'drafts are accepted too seldom, or too '
         'often: a token that p likes better than q always stands',
         (torch.zeros(100), 'nothing is accepted: that is exact, and of no use'))


def test_a_good_draft_is_always_accepted(student):
    p, _ = distributions()
    assert (student.accept_probability(p, p)[p > 0] == 1).all(), 'where p = q every draft stands'


def test_greedy_drafts_stand_up_to_the_first_mistake(student):
    for draft, target, n in (([5, 6, 7], [5, 6, 7], 3), ([5, 6, 7], [5, 0, 7], 1),
                             ([5, 6, 7], [0, 6, 7], 0), ([5, 6, 7], [5, 6, 0], 2)):
        found = student.n_accepted(torch.tensor(draft), torch.tensor(target))
        assert found == n, (f'of the draft {draft}, where the model says {target}, {n} stand, not '
                            f'{found}: after a mistake the rest had the wrong text before it')
