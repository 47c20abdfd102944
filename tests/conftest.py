"""What the tests share: a model that is tiny but not trivial, and both ways to compute a ternary product."""
import inspect
import subprocess
from contextlib import contextmanager

import pytest
import torch

import quant
from model import BitSkip, BitSkipConfig

torch.set_num_threads(1)  # at these sizes a second thread costs more than it brings

# ffn_dim and n_embd / n_head are no accidents: 48 needs padding before a Hadamard transform, and 2 kv heads serve 4
TINY = dict(vocab_size=31, block_size=16, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=48, gate_dim=8,
            target_exit=1)
KINDS = ['fp', 'bitlinear', 'hbitlinear']


def all_exits(model, idx, cache=None):
    """Logits at every exit, (L, B, T, V)."""
    states = enumerate(model.hidden_states(idx, cache=cache))
    return torch.stack([model.head(model.exit_state(h, layer)) for layer, h in states])


@contextmanager
def text_folder(folder, length):
    """Work in `folder`, beside text.txt, a text of so many bytes; yields the MonkeyPatch that lasts as long."""
    (folder / 'text.txt').write_text(inspect.getsource(subprocess)[:length])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield patch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def make_model():
    """make_model(**settings): a tiny model in eval mode. Its weights are larger than at initialisation and its norms
    not all ones, so that leaving anything out changes what it predicts."""
    def make(**settings):
        torch.manual_seed(0)
        model = BitSkip(BitSkipConfig(**TINY | settings)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.2) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
        return model
    return make


@pytest.fixture
def tokens():
    """tokens(B, T): the same random tokens each time, int64."""
    def make(B=2, T=8, seed=0):
        return torch.randint(TINY['vocab_size'], (B, T), generator=torch.Generator().manual_seed(seed))
    return make


@pytest.fixture
def use_product(monkeypatch):
    """use_product('integer' or 'fake'): compute ternary products in that way, whatever this machine prefers."""
    def use(how):
        monkeypatch.setattr(quant, 'int8_support', lambda device_type: (how == 'integer', how))
    return use
