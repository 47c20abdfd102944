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

import common
from checkpoint import find_run, load_checkpoint, run_file, save_checkpoint
from common import Processes, atomic_write, exclusive, interrupts, move_aside, read_text_strict
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

def test_one_living_process_at_a_time(tmp_path):
    """Two processes took over the claim of a dead one at once, and trained into one folder."""
    path = str(tmp_path / 'out/run')
    hold = ('import common, sys, time; lock = common.exclusive(sys.argv[1]); '
            'print(lock.__enter__(), flush=True); time.sleep(99)')
    with subprocess.Popen([sys.executable, '-c', hold, path], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {'PYTHONPATH': str(ROOT)}) as other:
        assert other.stdout.readline() == 'True\n'
        with exclusive(path, wait=False) as mine:
            assert not mine
        other.kill()
    for _ in range(2):
        with exclusive(path, wait=False) as mine:
            assert mine
    assert os.listdir(tmp_path / 'out') == []

def test_text_is_utf8_or_refused(tmp_path):
    """Prompts: invalid bytes went to the model as something else. `<(...)` is no regular file."""
    (tmp_path / 'good').write_bytes('é\r\n'.encode())
    (tmp_path / 'bad').write_bytes(b'ab\xff')
    assert read_text_strict(tmp_path / 'good') == 'é\r\n'
    with pytest.raises(UserError, match='bad is not UTF-8 text: see byte 2'):
        read_text_strict(tmp_path / 'bad')
    code = ('from common import read_text_strict; from configurator import run\n'
            'run(lambda argv: print(ascii(read_text_strict(argv[0]))))')
    for source, out in (('- < good', "'\\xe9\\r\\n'\n"), ('<(cat good)', "'\\xe9\\r\\n'\n"),
                        ('- < bad', ''), ('- <&-', ''), ('none', '')):
        done = subprocess.run(['bash', '-c', f'{sys.executable} -c "$0" {source}', code],
                              cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {'PYTHONPATH': str(ROOT)})
        assert done.stdout == out and 'Traceback' not in done.stderr
        assert done.returncode == (0 if out else 2) and done.stderr.count('\n') == (not out)

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
    with pytest.raises(UserError, match='checksums or sizes are wrong'):
        load_checkpoint(path)

def test_load_returns_what_save_wrote_in_storages_of_its_own(checkpoint, path):
    """A last.pt held zeros(1).expand(shape): AdamW updated one number 24 times. Others held the
    weights themselves as their moments. And nothing that is loaded lives in the file."""
    weight = checkpoint['model']['head.weight']
    state = checkpoint['optimizer']['state'][0]
    state |= {'exp_avg': torch.zeros(1).expand(4, 6), 'exp_avg_sq': weight,
              'turned': weight.t(), 'part': torch.arange(100.0)[3:7]}
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    os.truncate(path, 10)
    for part in ('settings', 'meta', 'progress'):
        assert loaded[part] == checkpoint[part]
    assert loaded['optimizer']['param_groups'] == checkpoint['optimizer']['param_groups']
    found = {'weight': loaded['model']['head.weight'], **loaded['optimizer']['state'][0]}
    for name, tensor in {'weight': weight, **state}.items():
        assert torch.equal(found[name], tensor) and found[name].is_contiguous()
        assert found[name].untyped_storage().nbytes() == tensor.numel() * 4
    assert len({tensor.data_ptr() for tensor in found.values()}) == len(found)

@pytest.mark.parametrize('change', [
    torch.Tensor.to_sparse, lambda t: t.to('meta'), lambda t: t.to(torch.complex64),
    lambda t: t[:1, :1].expand(1000, 1000)], ids=['sparse', 'meta', 'complex', 'huge'])
@pytest.mark.parametrize('part', ['model', 'optimizer'])
def test_tensors_of_kinds_that_no_run_has(checkpoint, path, part, change):
    odd = change(torch.ones(2, 3))
    checkpoint[part] = {'w': odd} if part == 'model' else {'state': {0: {'exp_avg': odd}}}
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError, match='its tensors are sparse'):
        load_checkpoint(path)

@pytest.mark.parametrize('part, value', [
    *((part, None) for part in ('model', 'settings', 'meta', 'progress')),
    ('model', []), ('model', {'w': 1}), ('model', {1: torch.ones(1)}), ('settings', [1]),
    ('settings', {1: 2}), ('settings', {'n_layer': torch.ones(1)}), ('meta', {}),
    ('meta', {'tokenizer': 'bytes', 'splits': 3}), ('progress', {'iter': 2.0}),
    ('progress', {'val_loss': float('nan')}), ('progress', {'log_size': 'big'}),
    ('model_class', 1)], ids=str)
def test_checkpoint_with_broken_parts(checkpoint, path, part, value):
    checkpoint[part] = value
    if value is None:
        del checkpoint[part]
    save_checkpoint(path, checkpoint)
    with pytest.raises(UserError, match='is damaged, or not a checkpoint') as error:
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

def test_devices():
    assert common.pick_device('cpu') == torch.device('cpu')
    for name in ('tpu', 'meta', 'cuda:99', ''):
        with pytest.raises(UserError, match=f"device '{name}' is not here"):
            common.pick_device(name)

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
