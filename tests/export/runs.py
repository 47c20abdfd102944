"""Runs of tiny models with random weights, in a folder that holds nothing else."""
import os
import tempfile
from functools import partial

import pytest
import torch
from conftest import painted, text_folder

from checkpoint import save_checkpoint
from eval_exits import measure_speed
from model import BitSkip, BitSkipConfig
from prepare import load_meta, prepare
from train import TrainSettings

MODULES = tempfile.TemporaryDirectory()  # where transformers copies the code of our folders
os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_MODULES_CACHE': MODULES.name}  # before it is imported
EXTRA = 'is not installed: pip install -r requirements-extra.txt'
L, EOT, PROMPT = 4, 0, 'Once upon a time'
SETTINGS = vars(TrainSettings()) | dict(
    n_layer=L, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48, block_size=128, gate_dim=8,
    linear='hbitlinear', hadamard_layers='o,down', exit_norm='none', lambda_ee=0.3, p_max=0.5,
    dataset='text.txt', tokenizer='bytes', vocab_size=256)
ARCEE = dict(linear='bitlinear', norm='rmsnorm', sub_norm=False, gate_dim=0, exit_norm='final')

def save_run(out_dir, **changes):
    """A run as train.py leaves it, of a model with random weights."""
    settings = SETTINGS | changes
    torch.manual_seed(0)
    model = painted(BitSkip(BitSkipConfig.of(settings)))
    save_checkpoint(f'{out_dir}/ckpt.pt', {
        'model': model.state_dict(), 'settings': settings, 'progress': {'iter': 60},
        'meta': load_meta(prepare('text.txt', 'bytes'))})

@pytest.fixture(scope='module', autouse=True)
def folder(tmp_path_factory):
    """Work in an empty folder. Exports time one token only."""
    from export import hf
    with text_folder(tmp_path_factory.mktemp('export'), 16000) as patch:
        patch.setattr(hf, 'measure_speed', partial(measure_speed, n_tokens=1, rounds=1))
        yield

def load(folder, **options):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)

def text(B=2, T=20):
    return torch.randint(1, 256, (B, T), generator=torch.Generator().manual_seed(1))

def greedy(ours, idx, max_length, blocks=L, **options):
    """Our own greedy continuation of idx (1, T) up to max_length, or to the end of the text."""
    ids = ours.generate(idx, max_length - idx.shape[1], temperature=0, exit_layer=blocks - 1,
                        **options)[0].tolist()
    return ids[:ids.index(EOT, idx.shape[1]) + 1] if EOT in ids[idx.shape[1]:] else ids
