"""Runs on disk: files that are whole or not there, and what is said about files that are something else."""
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint import atomic_write, build_model, exclusive, find_run, load, load_checkpoint, save
from configurator import UserError


@pytest.fixture
def checkpoint(make_model):
    model = make_model(linear='hbitlinear', lambda_ee=0.3)
    return {'model': model.state_dict(), 'settings': model.settings() | {'learning_rate': 1e-3},
            'meta': {'tokenizer': 'bytes', 'vocab_size': 31}, 'progress': {'iter': 5, 'val_loss': 2.0}}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'run' / 'ckpt.pt')


def read(path):
    with open(path, 'rb') as file:
        return file.read()


# --------------------------------------------------------------------------------------------------------------------
# exclusive

def test_one_living_process_at_a_time(tmp_path):
    """Two processes took over the claim of a dead one at once, and trained into one folder."""
    path = str(tmp_path / 'out/run')
    hold = ('import checkpoint, sys, time; lock = checkpoint.exclusive(sys.argv[1]); '
            'print(lock.__enter__(), flush=True); time.sleep(99)')
    with subprocess.Popen([sys.executable, '-c', hold, path], stdout=subprocess.PIPE, text=True,
                          env=os.environ | {'PYTHONPATH': str(Path(__file__).parent.parent)}) as other:
        assert other.stdout.readline() == 'True\n'
        with exclusive(path, wait=False) as mine:
            assert not mine
        other.kill()
    for _ in range(2):
        with exclusive(path, wait=False) as mine:
            assert mine
    assert os.listdir(tmp_path / 'out') == []


# --------------------------------------------------------------------------------------------------------------------
# atomic_write

def test_atomic_write_makes_the_folder_and_leaves_one_file(path):
    for content in (b'old', b'new'):
        with atomic_write(path) as file:
            file.write(content)
        assert read(path) == content
        assert os.listdir(os.path.dirname(path)) == ['ckpt.pt']


def test_atomic_write_of_text(tmp_path):
    with atomic_write(tmp_path / 'log', 'w') as file:
        file.write('é\n')
    assert (tmp_path / 'log').read_bytes() == 'é\n'.encode()


@pytest.mark.parametrize('error', [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize('before', [None, b'old'])
def test_atomic_write_interrupted_leaves_what_was_there(path, error, before):
    os.makedirs(os.path.dirname(path))
    if before:
        with open(path, 'wb') as file:
            file.write(before)
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b'half of the new')
        raise error
    assert os.listdir(os.path.dirname(path)) == (['ckpt.pt'] if before else [])
    assert not before or read(path) == before


def test_atomic_write_shows_nothing_before_its_end(path):
    with atomic_write(path) as file:
        file.write(b'new')
        file.flush()
        assert not os.path.exists(path)


# --------------------------------------------------------------------------------------------------------------------
# round trips

def test_load_checkpoint_gives_the_same_model(checkpoint, path, make_model, tokens):
    """Bitwise the same logits, in eval mode, and the settings with all that is known about data and progress."""
    save(path, checkpoint)
    model, settings = load_checkpoint(path)
    assert torch.equal(model(tokens())[0], make_model(linear='hbitlinear', lambda_ee=0.3)(tokens())[0])
    assert not model.training and model.config.linear == 'hbitlinear'
    assert settings == checkpoint['settings'] | {'meta': checkpoint['meta'], 'progress': checkpoint['progress']}


def test_load_returns_what_save_wrote(checkpoint, path):
    save(path, checkpoint)
    loaded = load(path)
    assert loaded.keys() == checkpoint.keys() and loaded['settings'] == checkpoint['settings']
    assert all(torch.equal(loaded['model'][name], p) for name, p in checkpoint['model'].items())


# --------------------------------------------------------------------------------------------------------------------
# files that are something else

def test_missing_file(path):
    with pytest.raises(UserError, match='there is no checkpoint .*last.pt; without --init_from=resume'):
        load('nowhere/last.pt')
    with pytest.raises(UserError, match='there is no checkpoint .*train.py'):
        load(path)


@pytest.mark.parametrize('share', [0, 0.001, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.9999])
def test_truncated_file(checkpoint, path, share):
    """A copy that stopped half way, at any point, the empty file included."""
    save(path, checkpoint)
    os.truncate(path, int(os.path.getsize(path) * share))
    with pytest.raises(UserError, match=f'{path} is damaged or not a checkpoint'):
        load(path)


def test_file_with_a_flipped_bit(checkpoint, path):
    """In the middle of a weight, where nothing but a checksum can notice it."""
    save(path, checkpoint)
    content = bytearray(read(path))
    weight = checkpoint['model']['head.weight'].numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 64
    with atomic_write(path) as file:
        file.write(content)
    with pytest.raises(UserError, match=f'{path} is damaged'):
        load(path)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('content', [b'hello world\n', b'\x89PNG\r\n\x1a\n', b'{"a": 1}', b'\n', b'...', b'\x80\x02.',
                                     pickle.dumps([1, 2]), pickle.dumps('text')], ids=repr)
def test_file_that_is_not_a_checkpoint(path, content):
    with atomic_write(path) as file:
        file.write(content)
    with pytest.raises(UserError, match=path):
        load(path)


@pytest.mark.parametrize('missing', ['model', 'settings', 'meta', 'progress'])
def test_file_of_another_program(checkpoint, path, missing):
    del checkpoint[missing]
    save(path, checkpoint)
    with pytest.raises(UserError, match='not a BitSkip checkpoint: it should hold meta, model, progress, settings'):
        load(path)


@pytest.mark.parametrize('change', [torch.Tensor.to_sparse, lambda t: t.to('meta'), lambda t: t.to(torch.complex64)])
@pytest.mark.parametrize('part', ['model', 'optimizer'])
def test_tensors_of_kinds_that_no_run_has(checkpoint, path, part, change):
    """Sparse moments of the optimizer once got as far as a step."""
    odd = change(torch.ones(2, 3))
    checkpoint[part] = {'embedding.weight': odd} if part == 'model' else {'state': {0: {'exp_avg': odd}}}
    save(path, checkpoint)
    with pytest.raises(UserError, match='sparse, complex or empty'):
        load(path)


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('write', [torch.save, pickle.dump], ids=['torch', 'pickle'])
def test_file_that_would_run_code_is_refused_unrun(checkpoint, path, tmp_path, write):
    mark = tmp_path / 'mark'
    with atomic_write(path) as file:
        write(checkpoint | {'progress': Bomb(str(mark))}, file)
    with pytest.raises(UserError, match='damaged or not a checkpoint'):
        load(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(str(mark))))  # the bomb is a real one
    assert mark.exists()


@pytest.mark.parametrize('settings', [dict(n_layer=4), dict(n_embd=64), dict(ffn='swiglu'), dict(n_head=5),
                                      dict(n_layer='3'), dict(linear='ternary'), dict(norm='batchnorm'),
                                      dict(skip_schedule='cubic')], ids=str)
def test_checkpoint_of_another_model(checkpoint, path, settings):
    checkpoint['settings'] |= settings
    with pytest.raises(UserError, match=f'{path} is a checkpoint of another model'):
        build_model(checkpoint, path)


@pytest.mark.parametrize('part, value', [
    ('model', {}), ('model', []), ('model', {'head.weight': 1}), ('settings', None),
    ('settings', {'vocab_size': 'many'})], ids=str)
def test_checkpoint_with_broken_parts(checkpoint, path, part, value):
    save(path, checkpoint | {part: value})
    with pytest.raises(UserError, match='is a checkpoint of another model'):
        load_checkpoint(path)


# --------------------------------------------------------------------------------------------------------------------
# find_run

def test_find_run(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='no run in out/'):
        find_run()
    for age, name in enumerate(('newest', 'older', 'oldest')):
        save(f'out/{name}/ckpt.pt', checkpoint)
        os.utime(f'out/{name}/ckpt.pt', (1000 - age, 1000 - age))
    assert find_run() == os.path.join('out', 'newest') and 'newest' in capsys.readouterr().out
    assert find_run('elsewhere') == 'elsewhere'
