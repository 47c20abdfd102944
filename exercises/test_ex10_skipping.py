import torch

from exercises.hints import close, same
from exits import skip_probabilities

N, P = 4000, 0.3


class Block:
    """h -> h + 1, that remembers how many samples it has seen."""
    seen = calls = 0

    def __call__(self, h):
        assert h.dim() == 3 and len(h), 'a block takes (B, T, C) of at least one sample'
        self.seen, self.calls = self.seen + len(h), self.calls + 1
        return h + 1


def run(student, p=P):
    block, h = Block(), torch.randn(N, 2, 3)
    before = h.clone()
    out = student.run_block(block, h, p)
    assert torch.equal(h, before), 'h has changed: it belongs to the caller, so write into a copy'
    return block, out - h


def skipped(student):
    """Which samples pass unchanged: (N,) bool."""
    return run(student)[1][:, 0, 0].abs() < 0.5


def test_probabilities_are_a5(student):
    for L in (2, 5, 12, 24, 1):
        for p_max in (0, 0.5, 0.7, 1):
            p = student.skip_probabilities(L, p_max)
            assert len(p) == L and p[-1] == 0, 'the last block is never skipped'
            same(p, skip_probabilities(L, p_max), 'p_l is p_max (l / (L-1))^2: mind the square, '
                 'and what l is divided by')


def test_saved_share_is_the_mean(student):
    for L in (2, 12, 24):
        same(student.saved_share(L, 0.7), sum(skip_probabilities(L, 0.7)) / L,
             'the share is of all L blocks, the last one among them')


def test_each_sample_skips_as_a_whole_or_not_at_all(student):
    _, change = run(student)
    values = {tuple(sample.unique().tolist()) for sample in change.flatten(1).round(decimals=3)}
    assert all(len(v) == 1 for v in values), 'a sample is skipped in part: one draw a sample'
    assert values <= {(0.0,), (-0.0,), (1.0,)}, 'this is not dropout: nothing is divided by 1 - p'


def test_as_often_as_p_says(student):
    share = skipped(student).float().mean().item()
    assert not close(share, 1 - P, atol=0.05), 'p is the chance to *skip*'
    assert abs(share - P) < 5 * (P * (1 - P) / N) ** 0.5, (  # five standard errors
        f'a share of {share:.2f} has skipped, and p is {P}: each sample draws for itself')


def test_chance_decides_and_for_each_sample(student):
    """A fixed share of the samples is not a chance: their number varies, and so does who it is."""
    a, b, c = (skipped(student) for _ in range(3))
    assert not torch.equal(a, b), 'the same samples skip every time: nothing is drawn'
    assert len({int(x.sum()) for x in (a, b, c)}) > 1, (
        'exactly as many skip every time: each sample decides for itself')
    assert 0 < a[:N // 4].float().mean() < 1, 'the first samples all do the same'


def test_what_is_skipped_costs_nothing(student):
    block, change = run(student)
    assert block.seen == (change[:, 0, 0].abs() > 0.5).sum(), (
        f'the block has seen {block.seen:,} of {N:,} samples: a mask saves nothing, it should see '
        'only those that do not skip')


def test_probabilities_of_zero_and_one(student):
    block, change = run(student, p=0.0)
    assert block.seen == N and (change > 0.5).all(), 'with p = 0 nobody skips'
    block, change = run(student, p=1.0)
    assert block.calls == 0 and not change.any(), 'with p = 1 the block is not called at all'
