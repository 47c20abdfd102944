"""Files that are whole or not there, what is said of files that are something else, interrupts."""
import contextlib
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from checkpoint import find_run, load_checkpoint, run_file, save_checkpoint
from common import Processes, atomic_write, interrupts, move_aside
from configurator import UserError

@pytest.fixture
def checkpoint():
    weight = torch.randn(4, 6)
    return {'model': {'head.weight': weight}, 'settings': {'n_layer': 3, 'dataset': 'x'},
            'meta': {'tokenizer': 'bytes', 'splits': {'train': {'tokens': 9}}},
            'progress': {'iter': 5, 'val_loss': float('inf')},
            'optimizer': {'state': {0: {'step': torch.tensor(5.0), 'exp_avg': weight * 2}},
                          'param_groups': [{'betas': (0.9, 0.95), 'params': [0]}]}}

@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'run' / 'ckpt.pt')

# ---- files ----

@pytest.mark.parametrize('error', [None, ZeroDivisionError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize('before', [None, 'old'])
def test_atomic_write_leaves_the_old_or_the_new(path, error, before):
    os.makedirs(os.path.dirname(path))
    if before:
        Path(path).write_text(before)
    with contextlib.suppress(error or ()), atomic_write(path, 'w') as file:
        file.write('é')
        file.flush()
        assert os.path.exists(path) == bool(before)
        if error:
            raise error
    after = before if error else 'é'
    assert os.listdir(os.path.dirname(path)) == (['ckpt.pt'] if after else [])
    assert not after or Path(path).read_text(encoding='utf-8') == after

def test_two_writers_of_one_path(path):
    """Both wrote to path.tmp: the first to end took away the other's file, half written."""
    with atomic_write(path, 'w') as a:
        with atomic_write(path, 'w') as b:
            b.write('b')
            a.write('a')
        assert Path(path).read_text() == 'b'
    assert Path(path).read_text() == 'a' and os.listdir(Path(path).parent) == ['ckpt.pt']

def test_a_full_disk_is_told_with_the_path(path, checkpoint):
    """torch.save hides it behind a RuntimeError of its own."""
    os.makedirs(os.path.dirname(path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match='File too large.*ckpt.pt'):
            save_checkpoint(path, checkpoint | {'more': torch.ones(25_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(os.path.dirname(path)) == []

# ---- checkpoints ----

@pytest.mark.parametrize('share', [0, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_file(checkpoint, path, share):
    with pytest.raises(UserError, match='there is no checkpoint .*ckpt.pt'):
        load_checkpoint(path)
    save_checkpoint(path, checkpoint)
    os.truncate(path, int(os.path.getsize(path) * share))
    with pytest.raises(UserError, match='is damaged'):
        load_checkpoint(path)

def test_file_with_a_flipped_bit(checkpoint, path):
    """In the middle of a weight, where nothing but a checksum can notice it."""
    save_checkpoint(path, checkpoint)
    content = bytearray(Path(path).read_bytes())
    content[content.index(checkpoint['model']['head.weight'].numpy().tobytes()) + 40] ^= 64
    Path(path).write_bytes(content)
    with pytest.raises(UserError, match='a checksum is wrong'):
        load_checkpoint(path)

@pytest.mark.parametrize('part', ['model', 'settings', 'meta', 'progress'])
def test_another_file_of_torch(checkpoint, path, part):
    del checkpoint[part]
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError, match=f'not a checkpoint of .*it has no {part}') as error:
        load_checkpoint(path)
    assert '\n' not in str(error.value)

class Bomb:
    def __reduce__(self):
        return os.mkdir, ('mark',)

def test_file_that_would_run_code_is_refused_unrun(checkpoint, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(path, checkpoint | {'progress': Bomb()})
    with pytest.raises(UserError, match='is damaged'):
        load_checkpoint(path)
    assert not os.path.exists('mark')
    pickle.loads(pickle.dumps(Bomb()))  # the bomb is a real one
    assert os.path.exists('mark')

def test_find_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='no run in out/'):
        find_run()
    for age, name in enumerate(('newest/packed.pt', 'older/ckpt.pt')):
        with atomic_write(f'out/{name}'):
            pass
        os.utime(f'out/{name}', (1000 - age, 1000 - age))
    assert find_run() == os.path.join('out', 'newest') and 'newest' in capsys.readouterr().out
    assert find_run('elsewhere') == 'elsewhere'
    assert run_file('out/newest') == 'out/newest/packed.pt'
    assert run_file('out/none') == 'out/none/ckpt.pt'
    assert [move_aside('out/older') for _ in range(2) if os.makedirs('out/older', exist_ok=True)
            is None] == ['out/older.1', 'out/older.2']

# ---- the machine ----

def test_interrupts(capfd):
    """Once, the step under way is finished and saved; twice, at once."""
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as wanted:
        assert not wanted
        os.kill(os.getpid(), signal.SIGTERM)
        assert wanted and 'stops after this step' in capfd.readouterr().err
        assert Processes(torch.device('cpu')).any(wanted)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before

PROCESSES = """
import os, sys, torch
from common import Processes, say
p = Processes(torch.device('cpu'))
say(p.world, p.sum(torch.tensor(1.0 + p.rank)).item(), p.any(p.rank == 1), p.any(False))
p.close()
"""

def test_processes(tmp_path):
    (tmp_path / 'script.py').write_text(PROCESSES)
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
                           '--master_port=29511', 'script.py'], cwd=tmp_path, text=True,
                          capture_output=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert done.stdout == '2 3.0 True False\n'
