import torch

from exercises.hints import Work, same
from quant import activation_quant

ROUND = 'a code is the *nearest* integer: is there a rounding, and of the right kind?'


def test_is_a2(student):
    for bits in (8, 4, 2):
        x = torch.randn(2, 5, 64) * torch.tensor([1e-3, 1.0, 10.0, 1e3, 1.0])[:, None]
        codes, step = student.activation_quant(x, bits)
        right, right_step = activation_quant(x, bits)
        largest, q = x.abs().amax(-1, keepdim=True), 2 ** (bits - 1) - 1
        same(step, right_step, 'the step of a token is its own max|x| / q',
             (largest / (q + 1), 'q is 2^(b-1) - 1: there are more codes below 0 than above'),
             (x.amax(-1, keepdim=True) / q, 'a negative number may be the largest, too'),
             rtol=1e-4, atol=0)
        assert codes.dtype == torch.int8, f'the codes are {codes.dtype}, they should be int8'
        off = (codes.int() - right.int()).abs()  # x q / s and x / (s / q) may round differently
        assert off.max() <= 1 and (off == 0).float().mean() > 0.99, ROUND


def test_the_largest_takes_the_last_level(student):
    for bits in (8, 4):
        codes, _ = student.activation_quant(torch.tensor([[3.0, -1.0], [0.5, -9.0]]), bits)
        q = 2 ** (bits - 1) - 1
        assert (codes[0, 0], codes[1, 1]) == (q, -q), f'max|x| has the code {q}, or -{q} if x < 0'


def test_a_loud_token_does_not_disturb_the_others(student):
    x = torch.randn(2, 64)
    alone = student.activation_quant(x[:1], 8)[0]
    x[1] *= 1000
    assert torch.equal(student.activation_quant(x, 8)[0][:1], alone), (
        'a loud token has silenced its neighbour: each token has its own scale')


def test_a_silent_token_stays_silent(student):
    x = torch.zeros(2, 8)
    x[1] = 1
    with Work() as work:
        codes, step = student.activation_quant(x, 8)
    assert not work.nan and (codes[0] * step[0] == 0).all() and step.isfinite().all(), (
        'a token of zeros has x^ = 0: 0 / 0 is NaN, so s needs a least value')
