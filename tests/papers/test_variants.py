"""Of every variant: no bit of a logit depends on a later token, and a cache changes nothing."""
import pytest
import torch
from conftest import all_exits, initial

from decode import KVCache
from model import BitSkip
from papers.as_run import AsRun
from papers.heads import Heads
from papers.mistakes import MISTAKES, NonCausal

SOUND = [(AsRun, dict(linear='bitlinear')), (AsRun, dict(linear='hbitlinear')),
         *((Heads, dict(exit_head=kind, rank=4)) for kind in ('adapter', 'own', 'shared'))]

def changes(model, idx):
    """At which positions the logits of some exit change with the token at position 5."""
    changed = idx.clone()
    changed[:, 5] = (idx[:, 5] + 1) % 31
    differ = all_exits(model, changed) != all_exits(model, idx)  # (L, B, T, V)
    return [t for t in range(8) if differ[:, :, t].any()]

@pytest.mark.parametrize('Model, settings', SOUND)
def test_causality_and_cache(make_model, tokens, Model, settings):
    model, idx = make_model(Model, **settings), tokens()
    assert changes(model, idx) == [5, 6, 7]
    cache = KVCache(model, 2)
    parts = [all_exits(model, part, cache) for part in idx.split((3, 1, 4), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=2), all_exits(model, idx), rtol=1e-3, atol=1e-3)

@pytest.mark.parametrize('Model, linear', [
    (BitSkip, 'papers.mistakes:HadamardAfter'), *((m, 'bitlinear') for m in MISTAKES.values())])
def test_one_mistake_breaks_causality(tokens, Model, linear):
    first = changes(initial(Model, linear=linear), tokens())[0]
    assert (first < 5) == (Model is NonCausal) and first <= 5
