import torch
import torch.nn.functional as F

from exercises.hints import same
from papers.measures import LADDER

PLACES = {1: 'Block', 2: 'HBitLinear Block', 3: 'HBitLinear Block', 4: 'BitSkip', 5: 'BitSkip',
          6: 'losses exit_loss', 7: 'exit_loss losses BitSkip', 8: 'routing_loss',
          9: 'main Block BitSkip'}


def test_every_difference_has_its_place(student):
    places = student.places()
    assert sorted(places) == list(range(1, 10)), 'nine numbers, 1 to 9, each with a name'
    wrong = [number for number in PLACES if places[number] not in PLACES[number].split()]
    assert not wrong, f'minimal.py has number {wrong[0]} somewhere else: search as_run.py for its #'


def test_the_ffn_as_run(student):
    def phi(x, times):
        for _ in range(times):
            x = F.relu(x).square()
        return x

    def ffn(x, norms, first=2, second=1):
        y = phi(F.linear(F.layer_norm(x, (8,)) if norms else x, up), first)
        return phi(F.linear(F.layer_norm(y, (16,)) if norms > 1 else y, down), second)
    x, up, down = torch.randn(5, 8), torch.randn(16, 8), torch.randn(8, 16)
    for norm, right in ((False, ffn(x, 0)), (True, ffn(x, 2))):
        same(student.ffn_as_run(x, up, down, norm), right, f'not the FFN as run with norm={norm}',
             (ffn(x, 2 * norm, 1, 1), 'phi stands three times: at the end of up, in the FFN, and '
              'at the end of down'),
             (ffn(x, 2 * norm, 2, 0), 'phi ends the projection down as well'),
             (ffn(x, 1), 'the projection down has its norm inside, too'),
             (ffn(x, 2 - 2 * norm), 'a norm inside where there should be none, or the other way'))


def test_the_prediction_names_two_rungs(student):
    for name in student.predict():
        assert name in list(LADDER)[1:], f'{name!r} is no rung of the ladder: see RUNGS'
