import pytest
import torch

from exits import skip_probabilities

N, P = 4000, 0.3


class Block:
    """h -> h + 1, that remembers how many samples it has seen."""
    seen = calls = 0

    def __call__(self, h):
        assert h.dim() == 3 and len(h), 'the block takes (B, T, C) of at least one sample'
        self.seen, self.calls = self.seen + len(h), self.calls + 1
        return h + 1


def run(student, p=P):
    block, h = Block(), torch.randn(N, 2, 3)
    change = student.run_block(block, h, p) - h
    return block, change


def test_probabilities_are_a5(student):
    for L in (1, 2, 5, 12, 24):
        for p_max in (0, 0.5, 0.7, 1):
            assert student.skip_probabilities(L, p_max) == pytest.approx(skip_probabilities(L, p_max))


def test_saved_share_is_the_mean(student):
    for L in (2, 12, 24):
        assert student.saved_share(L, 0.7) == pytest.approx(sum(skip_probabilities(L, 0.7)) / L)


def test_each_sample_skips_as_a_whole_or_not_at_all(student):
    _, change = run(student)
    for sample in change.flatten(1).round(decimals=4):
        assert sample.unique().tolist() in ([0], [1])


def test_as_often_as_p_says(student):
    _, change = run(student)
    skipped = (change[:, 0, 0].abs() < 0.5).float().mean().item()
    assert abs(skipped - P) < 5 * (P * (1 - P) / N) ** 0.5  # five standard errors


def test_what_is_skipped_costs_nothing(student):
    block, change = run(student)
    assert block.seen == (change[:, 0, 0].abs() > 0.5).sum()


def test_probabilities_of_zero_and_one(student):
    block, change = run(student, p=0.0)
    assert block.seen == N and (change > 0.5).all()
    block, change = run(student, p=1.0)
    assert block.calls == 0 and not change.any()
