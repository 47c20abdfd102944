"""Short versions of two campaigns (tests/campaign_kill.py, tests/campaign_fuzz.py), which are commands of their own."""
import inspect
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from campaign_fuzz import TARGETS, Bomb, break_value, broken_bytes, verdict

import checkpoint
import prepare
from configurator import UserError, configure
from train import TrainSettings, is_logged_by

ROOT = Path(__file__).resolve().parent.parent


def campaign(script, *flags):
    return subprocess.run([sys.executable, str(ROOT / 'tests' / script), *flags], capture_output=True, text=True,
                          timeout=600, env=os.environ | {'OMP_NUM_THREADS': '1'})


def test_a_run_survives_accidents():
    done = campaign('campaign_kill.py', '--accidents=4', '--seed=2')
    assert done.returncode == 0, done.stdout + done.stderr
    assert '4 accidents, ' in done.stdout and 'ended bit-identical' in done.stdout


def test_every_kind_of_broken_input_is_answered():
    """One case of each kind, through the scripts."""
    done = campaign('campaign_fuzz.py', f'--cases={len(TARGETS)}')
    assert done.returncode == 0, done.stdout + done.stderr
    assert f'{len(TARGETS)} cases' in done.stdout


@pytest.mark.parametrize('code, errors, wrong', [
    (0, '', ''), (2, 'error: there is no such thing\n', ''), (0, 'Traceback (most recent call last):\n', 'a traceback'),
    (1, '', 'ended with 1'), (-signal.SIGSEGV, '', 'ended with SIGSEGV'), (2, '', 'not one clear sentence'),
    (2, 'error: one\nerror: two\n', 'not one clear sentence')])
def test_the_campaign_can_fail(code, errors, wrong):
    assert verdict(code, errors) == wrong


@pytest.fixture
def saved(make_model):
    data = {'dataset': 'text.txt', 'tokenizer': 'bytes'}
    model = make_model(linear='hbitlinear', lambda_ee=0.3)
    return {'model': model.state_dict(), 'settings': model.settings() | data | {'source': '', 'data_dir': 'data'},
            'meta': data | {'vocab_size': 31, 'splits': {}}, 'progress': {'iter': 5, 'val_loss': 2.0}}


def outcome(call, *args):
    """What a call that may be refused returns; None if it was. Anything but UserError is not caught."""
    try:
        return call(*args)
    except UserError as error:
        assert '\n' not in str(error) and len(str(error)) < 600
        return None


def test_damaged_checkpoints_load_whole_or_not_at_all(saved, tmp_path):
    """Bytes changed anywhere in the file: refused, or, where it makes no difference (zip has idle bytes), equal."""
    path, rng, refused = str(tmp_path / 'ckpt.pt'), random.Random(0), 0
    checkpoint.save(path, saved)
    whole = Path(path).read_bytes()
    for _ in range(150):
        Path(path).write_bytes(broken_bytes(rng, whole))
        found = outcome(checkpoint.load, path)
        refused += found is None
        assert found is None or all(torch.equal(found['model'][name], w) for name, w in saved['model'].items())
    assert refused > 100


def test_checkpoints_with_wrong_values_are_refused_or_finite(saved, tmp_path):
    path, rng, refused = str(tmp_path / 'ckpt.pt'), random.Random(0), 0
    for _ in range(100):
        broken = {part: dict(values) for part, values in saved.items()}
        break_value(rng, broken)
        torch.save(broken, path)
        found = outcome(checkpoint.load_checkpoint, path)
        refused += found is None
        assert found is None or all(w.isfinite().all() for w in found[0].parameters())
    assert 20 < refused < 100


@pytest.mark.filterwarnings('ignore')
def test_no_pickle_runs_code(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for _ in range(20):
        part = rng.choice(list(saved))
        torch.save(saved | {part: saved[part] | {'x': Bomb(rng)}}, 'ckpt.pt')
        assert outcome(checkpoint.load, 'ckpt.pt') is None and not os.path.exists('exploded')


def test_damaged_meta_is_refused_or_makes_sense(tmp_path):
    """What load_meta lets through can be computed with."""
    (tmp_path / 'text.txt').write_text(inspect.getsource(subprocess)[:12000])
    folder = prepare.prepare(str(tmp_path / 'text.txt'), 'bytes', data_dir=str(tmp_path))
    path, rng = Path(folder, 'meta.json'), random.Random(0)
    whole = path.read_text()
    for _ in range(100):
        meta = json.loads(whole)
        break_value(rng, meta)
        path.write_text(json.dumps(meta, default=str))
        found = outcome(prepare.load_meta, folder)
        assert found is None or (found['vocab_size'] == 256 and all(n['bytes'] > 0 for n in found['splits'].values()))


@pytest.mark.parametrize('flag', ['--seed=9' + '9' * 5000, '--n_layer=99999999', '--learning_rate=nan', '--beta1=1',
                                  '--lambda_q=-inf', '--device\ud800', '--out_dir=\0', '--=', '--' + 'x' * 9999])
def test_impossible_flags_are_refused(flag):
    assert outcome(configure, TrainSettings, [flag]) is None


@pytest.mark.parametrize('line', [b'{"iter": 3, "lo', b'\xff\xfe', b'5', b'{"iter": "x"}', b'[' * 99999, b''])
def test_lines_that_are_no_log_lines_are_forgotten(line):
    assert not is_logged_by(line, {'iter': 5, 'last_eval': 5})


def test_a_full_disk_is_told_as_such(saved, tmp_path):
    """torch.save hides the reason in an error of its own; what stood there before is whole."""

    path = str(tmp_path / 'ckpt.pt')
    checkpoint.save(path, saved)
    before = Path(path).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
        with pytest.raises(OSError, match='File too large') as caught:
            checkpoint.save(path, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.filename == path and Path(path).read_bytes() == before
    assert os.listdir(tmp_path) == ['ckpt.pt']
