"""The loop: a step is a pure function, so runs can be stopped, resumed and distributed without changing a bit."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import text_folder

import checkpoint
import train
from configurator import UserError, configure
from prepare import data_of
from quant import latent_weights
from train import TrainSettings, get_lr

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(n_layer=3, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=64, block_size=32, batch_size=2, target_exit=1,
            gradient_accumulation_steps=2, max_iters=12, eval_interval=4, log_interval=1, warmup_iters=2, patience=0,
            learning_rate=1e-2, linear='hbitlinear', lambda_ee=0.3, p_max=0.7, device='cpu', dtype='float32')


@pytest.fixture
def text(tmp_path):
    """A working folder with a text of 12,000 bytes."""
    with text_folder(tmp_path, 12000):
        yield tmp_path


def flags(**changes):
    settings = TINY | {'dataset': 'text.txt', 'tokenizer': 'bytes', 'out_dir': 'out/run'} | changes
    return [f'--{key}={value}' for key, value in settings.items()]


def command(*launcher, **changes):
    launcher = launcher or (sys.executable,)
    return [*launcher, str(ROOT / 'train.py'), *flags(**changes)]


def wait_for_checkpoint():
    deadline = time.time() + 300
    while not os.path.exists('out/run/last.pt') and time.time() < deadline:
        time.sleep(0.01)


# sums in another order give other bits: a run is compared with one of as many threads
ENV = os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())}


def log(out_dir='out/run'):
    return [json.loads(line) for line in Path(out_dir, 'log.jsonl').read_text().splitlines()]


def assert_same_run(a, b):
    """Weights, optimizer, progress and metrics of two runs are equal, bit for bit, but for the time they took."""
    a_state, b_state = (checkpoint.load(f'{run}/last.pt') for run in (a, b))
    torch.testing.assert_close(a_state['model'], b_state['model'], rtol=0, atol=0)
    torch.testing.assert_close(a_state['optimizer'], b_state['optimizer'], rtol=0, atol=0)
    timeless = [{key: value for key, value in entry.items() if key not in ('seconds', 'tok_per_s', 'settings')}
                for entry in (*log(a), a_state['progress'])]
    assert timeless == [{key: value for key, value in entry.items() if key not in ('seconds', 'tok_per_s', 'settings')}
                        for entry in (*log(b), b_state['progress'])]


# ---- the learning rate

@pytest.mark.parametrize('schedule, expected', [
    ('wsd', {0: 0.1, 9: 1.0, 50: 1.0, 80: 1.0, 90: 0.5, 99: 0.05}),
    ('linear', {0: 0.1, 9: 1.0, 54: (100 - 54) / 91, 99: 1 / 91}),
    ('cosine', {0: 0.1, 9: 1.0, 99: 0.5 - 0.5 * math.cos(math.pi / 91)}),
])
def test_learning_rate_schedules(schedule, expected):
    s = TrainSettings(max_iters=100, warmup_iters=9, learning_rate=1.0, schedule=schedule, decay_frac=0.2)
    for step, lr in expected.items():
        assert get_lr(step, s) == pytest.approx(lr), step


def test_learning_rate_never_jumps():
    for schedule in ('wsd', 'linear', 'cosine'):
        s = TrainSettings(max_iters=1000, warmup_iters=100, learning_rate=1.0, min_lr=0.1, schedule=schedule)
        rates = [get_lr(step, s) for step in range(1000)]
        assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.011
        assert 0.1 <= rates[-1] < 0.11 and max(rates) == 1.0


def test_weight_decay_is_on_matrices_only():
    from model import BitSkip, BitSkipConfig
    model = BitSkip(BitSkipConfig.of(TINY | {'vocab_size': 7}))
    decayed, others = train.make_optimizer(model, TrainSettings()).param_groups
    assert decayed['weight_decay'] == 0.1 and all(p.dim() == 2 for p in decayed['params'])
    assert others['weight_decay'] == 0 and all(p.dim() == 1 for p in others['params'])
    assert len(decayed['params']) + len(others['params']) == len(list(model.parameters()))


# ---- a run

def test_a_run_learns_and_leaves_what_it_promises(text, capsys):
    train.main(flags(max_iters=60, eval_interval=30))
    out = capsys.readouterr().out
    assert 'python sample.py --exit_layer 1' in out and 'python eval_exits.py\n' in out and 'ternary weights' in out
    first, *entries = log()
    assert first['settings']['lambda_ee'] == 0.3
    steps = [entry for entry in entries if 'ce' in entry]
    assert [entry['iter'] for entry in steps] == list(range(1, 61))
    assert steps[0]['ce'] == pytest.approx(math.log(256), abs=0.3)  # before learning: uniform
    best = min(entry['val_loss'] for entry in entries if 'val_loss' in entry)
    assert best < 4.0
    model, settings = checkpoint.load_checkpoint('out/run/ckpt.pt')
    assert settings['progress']['val_loss'] == best and settings['meta']['tokenizer'] == 'bytes'
    from eval_exits import evaluate
    from prepare import load_tokens
    assert evaluate(model, load_tokens('data/text-bytes', 'val'), batch_size=2)[-1] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_resume_equals_uninterrupted_bit_for_bit(text, monkeypatch, dtype):
    """Stopped in the middle of step 7's second micro-batch, then resumed: nothing tells the two runs apart."""
    train.main(flags(out_dir='out/whole', dtype=dtype))
    calls, get_batch = [], train.get_batch

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2 * 6 + 2:
            os.kill(os.getpid(), signal.SIGINT)
        return get_batch(*args)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'get_batch', interrupted)
        train.main(flags(dtype=dtype))
    assert checkpoint.load('out/run/last.pt')['progress']['iter'] == 6
    train.main(['--out_dir=out/run', '--init_from=resume'])
    assert_same_run('out/whole', 'out/run')


def test_killed_run_leaves_a_loadable_checkpoint_and_resumes_exactly(text):
    train.main(flags(out_dir='out/whole', max_iters=40))
    process = subprocess.Popen(command(max_iters=40), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=ENV)
    wait_for_checkpoint()
    process.kill()
    process.wait()
    assert checkpoint.load('out/run/last.pt')['progress']['iter'] % 4 == 0
    train.main(flags(max_iters=40, init_from='resume'))
    assert_same_run('out/whole', 'out/run')


def test_sigint_exits_cleanly(text):
    process = subprocess.Popen(command(max_iters=100000), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_checkpoint()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and 'Traceback' not in err and '--init_from=resume' in out
    assert checkpoint.load('out/run/last.pt')['progress']['iter'] >= 4


def test_targets_are_the_next_token():
    """The model is never asked for the token that it sees, nor for the one after the next."""
    idx, targets = train.get_batch(torch.arange(1000).numpy(), 4, 16, 'cpu')
    assert idx.shape == targets.shape == (4, 16) and torch.equal(targets, idx + 1)


def test_micro_batches_follow_from_seed_step_and_number_alone(text):
    """What resuming and distribution rest on: the generator's earlier use leaves no trace in a micro-batch."""
    def draw(step, micro, before, seed=7):
        torch.rand(before)
        train.seed_microbatch(seed, step, micro)
        return torch.rand(4)
    assert torch.equal(draw(3, 1, before=0), draw(3, 1, before=5))
    assert not torch.equal(draw(3, 1, before=0), draw(3, 1, before=0, seed=8))
    others = [draw(step, micro, before=0) for step in range(20) for micro in range(4)]
    assert len({tuple(other.tolist()) for other in others}) == 80


def test_a_step_has_the_exit_weights_of_its_settings(text, monkeypatch):
    """Weighting (A4, B6), curriculum and ramp: what the model gets in step 6 of 12."""
    given, losses = [], train.BitSkip.losses
    monkeypatch.setattr(train.BitSkip, 'losses', lambda self, *args: given.append(args[-1]) or losses(self, *args))
    for settings, expected in (({}, [3 / 5, 2 / 5]), (dict(ee_weighting='late'), [1 / 3, 2 / 3]),
                               (dict(ee_weighting='uniform', ee_ramp='up'), [1 / 4, 1 / 4]),
                               (dict(ee_weighting='late', ee_ramp='down'), [1 / 6, 1 / 3]),
                               (dict(ee_curriculum='rotational'), [1, 0])):
        training = train.Run(configure(TrainSettings, flags(**settings)))
        training.module = training.model
        training.forward_backward(6)
        assert given.pop().tolist() == pytest.approx(expected), settings


def test_the_optimizer_gets_the_settings_and_clipped_gradients(text, monkeypatch):
    norms = []
    monkeypatch.setattr(torch.optim.AdamW, 'step', lambda self, *_: norms.append(torch.cat(
        [p.grad.flatten() for group in self.param_groups for p in group['params'] if p.grad is not None]).norm()))
    for clip in (1e-3, 0):
        training = train.Run(configure(TrainSettings, flags(grad_clip=clip, beta1=0.8, beta2=0.7)))
        training.start()
        training.train()
    assert {group['betas'] for group in training.optimizer.param_groups} == {(0.8, 0.7)}
    assert norms[:12] == pytest.approx([1e-3] * 12, rel=1e-3) and min(norms[12:]) > 0.01


class Board:
    """In the place of a package: what train.py showed it."""

    def __init__(self, **options):
        self.options, self.shown = options, []

    def log(self, metrics, step):
        self.shown.append((step, metrics))


def test_log_to_shows_the_lines_of_the_log(text, monkeypatch):
    boards = []
    monkeypatch.setattr(train, 'find_spec', lambda name: name == 'wandb')
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(
        init=lambda **options: boards.append(Board(**options)) or boards[-1]))
    train.main(flags(max_iters=4, log_to='wandb'))
    assert boards[0].options['config']['log_to'] == 'wandb' and boards[0].options['name'] == 'run'
    assert boards[0].shown == [(entry['iter'], entry) for entry in log()[1:]]


def test_log_to_wandb_without_an_account(text, monkeypatch):
    """wandb's traceback was the answer."""
    def init(**options):
        raise OSError('No API key configured.')
    monkeypatch.setattr(train, 'find_spec', lambda name: True)
    monkeypatch.setitem(sys.modules, 'wandb', SimpleNamespace(init=init, Error=OSError))
    with pytest.raises(UserError, match=r'wandb does not start \(No API key configured\); .*WANDB_MODE=offline'):
        train.main(flags(log_to='wandb'))


def test_log_to_tensorboard_shows_each_step_once_after_a_resume(text):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train.main(flags(max_iters=8, log_to='tensorboard'))
    saved = checkpoint.load('out/run/last.pt')
    saved['progress'] |= {'iter': 4, 'last_eval': 4}  # as if the run had been killed after step 8
    checkpoint.save('out/run/last.pt', saved)
    train.main(flags(max_iters=8, log_to='tensorboard', init_from='resume'))
    board = EventAccumulator('out/run').Reload()
    for name in ('ce', 'val_loss'):
        logged = [(entry['iter'], entry[name]) for entry in log() if name in entry]
        assert [(event.step, event.value) for event in board.Scalars(name)] == [
            (step, pytest.approx(value)) for step, value in logged]


def test_log_to_a_package_that_is_not_there(text, monkeypatch):
    monkeypatch.setattr(train, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match='--log_to=wandb needs a package: pip install wandb; without it log.jsonl'):
        train.main(flags(log_to='wandb'))
    assert not os.path.exists('out/run')


def test_patience_stops_a_run_that_does_not_improve(text):
    train.main(flags(learning_rate=0, patience=2, max_iters=40))
    evaluations = [entry for entry in log() if 'val_loss' in entry]
    assert [entry['iter'] for entry in evaluations] == [4, 8, 12]  # the first one is the best, two are no better


def test_patience_and_the_best_loss_outlast_an_interruption(text):
    """A resumed run does not take the first model that it evaluates for its best, nor count from the start."""
    train.main(flags(max_iters=4, patience=2))
    state = checkpoint.load('out/run/last.pt')
    state['progress'].update(val_loss=0.5, bad_evals=1)  # as if it had been better before
    checkpoint.save('out/run/last.pt', state)
    best = Path('out/run/ckpt.pt').read_bytes()
    train.main(['--out_dir=out/run', '--init_from=resume', '--max_iters=40'])
    assert [entry['iter'] for entry in log() if 'val_loss' in entry] == [4, 8]  # one more was too many
    assert Path('out/run/ckpt.pt').read_bytes() == best and log()[-1]['best'] == 0.5


def test_divergence_stops_with_step_checkpoint_and_advice(text):
    with pytest.raises(UserError, match=r'step \d+: the loss is .*lower --learning_rate'):
        train.main(flags(learning_rate=1e38, warmup_iters=0))
    train.main(flags(out_dir='out/good', max_iters=4))
    for interval, found in ((9, 'step 5: the loss is'), (1, 'step 5: the validation loss is')):  # who finds it first
        with pytest.raises(UserError, match=f'{found} .*out/good/last.pt, is unharmed'):
            train.main(['--out_dir=out/good', '--init_from=resume', '--max_iters=9', '--learning_rate=1e38',
                        f'--eval_interval={interval}'])
        assert checkpoint.load('out/good/last.pt')['progress']['iter'] == 4
    with pytest.raises(UserError, match='step 1: the validation loss is .*nothing was saved yet'):
        train.main(flags(out_dir='out/bad', learning_rate=1e38, warmup_iters=0, max_iters=1))
    assert os.listdir('out/bad') == ['log.jsonl'] and len(log('out/bad')) == 2  # no NaN, which is not JSON


def test_the_end_names_the_weights_and_the_folder(text, capsys):
    """Full precision was called ternary, and the next commands were those for the newest run in out/."""
    train.main(flags(max_iters=1, linear='fp', out_dir='elsewhere/run'))
    out = capsys.readouterr().out
    assert '(bytes, full precision)' in out and 'ternary' not in out
    assert 'sample.py --out_dir=elsewhere/run --exit_layer 1' in out and 'eval_exits.py --out_dir=elsewhere/run' in out


def test_an_earlier_run_is_moved_aside_not_overwritten(text):
    for seed in (1, 2, 3):
        train.main(flags(seed=seed, max_iters=4))
    seeds = {run: checkpoint.load(f'out/{run}/ckpt.pt')['settings']['seed'] for run in ('run.1', 'run.2', 'run')}
    assert seeds == {'run.1': 1, 'run.2': 2, 'run': 3}


def test_a_folder_is_for_one_run_at_a_time(text):
    """The second run moved the first one's folder aside, and both went on to write into the new one."""
    with subprocess.Popen(command(max_iters=10 ** 6), env=ENV, stderr=subprocess.DEVNULL) as first:
        wait_for_checkpoint()
        with pytest.raises(UserError, match='out/run is being trained by another process'):
            train.main(flags(seed=2))
        first.kill()
    train.main(flags(max_iters=4, seed=2))
    assert sorted(os.listdir('out')) == ['run', 'run.1']


# ---- a user's mistakes

@pytest.mark.parametrize('changes, message', [
    ({'init_from': 'resume'}, 'there is no checkpoint out/run/last.pt'),
    ({'dataset': 'wikitxt2'}, 'wikitext2'),
    ({'block_size': 100000}, 'too few for one window'),
    ({'n_head': 5}, 'n_embd=32 must be n_head=5 times'),
    ({'p_max': 1.5}, 'p_max is a probability'),
    ({'batch_size': 0}, 'batch_size is 1 to 1048576'),
    ({'batch_size': 2 ** 62}, 'batch_size is 1 to 1048576'),
    ({'decay_frac': 2}, 'decay_frac is a share'),
    ({'target_exit': 3}, 'target_exit=3 is outside the model: its 3 layers are 0 to 2'),
    ({'freeze': True}, 'trains exits on a finished model'),
    ({'device': 'cuda:77'}, "device 'cuda:77' is not available"),
])
def test_mistakes_are_told_in_one_sentence(text, changes, message):
    with pytest.raises(UserError, match=message):
        train.main(flags(**changes))
    assert not os.path.exists('out/run')


def test_resume_refuses_other_models_and_changed_data(text):
    train.main(flags(max_iters=4))
    with pytest.raises(UserError, match='does not fit these settings'):
        train.main(['--out_dir=out/run', '--init_from=resume', '--n_embd=64'])
    (text / 'text.txt').write_text('another text\n' * 1000)
    with pytest.raises(UserError, match='the data have changed'):
        train.main(['--out_dir=out/run', '--init_from=resume'])


def test_evaluation_says_that_its_text_is_another(text, capsys):
    """It measured a PPL as if nothing had happened, on what may have been training text."""
    train.main(flags(max_iters=4))
    _, settings = checkpoint.load_checkpoint('out/run/ckpt.pt')
    before = data_of(settings)[1].tolist()
    assert 'note' not in capsys.readouterr().out
    (text / 'text.txt').write_text((text / 'text.txt').read_text() + 'more\n' * 1000)
    assert data_of(settings)[1].tolist() != before
    assert 'note: data/text-bytes is not the text that this model was trained on' in capsys.readouterr().out


def test_command_line_mistake_exits_with_2_and_no_traceback(text):
    done = subprocess.run(command(learning_rat=1), capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.startswith("error: unknown setting 'learning_rat'; did you mean learning_rate")


def test_estimate_names_the_overlay(text, monkeypatch, capsys):
    monkeypatch.setattr(train, 'estimate_hours', lambda s: 250.0)
    train.main(flags(max_iters=4))
    assert 'takes about 250 hours' in capsys.readouterr().out.split('preparing')[0]


@pytest.mark.parametrize('names, weights', [
    (['baseline'], 34_603_008 + 512 * 50257), (['bitskip_h_ee'], 34_603_008 + 12 * 512 * 50257),
    (['compose'], 34_603_008 + 2 * 512 * 50257),
    (['bitskip_h_ee', 'cpu'], 12 * (2 * 128 * 128 + 2 * 128 * 64 + 2 * 128 * 512) + 12 * 128 * 256)])
def test_estimate_counts_the_products_before_any_data_are_there(names, weights):
    s, _ = train.read_settings([str(ROOT / 'config' / f'{name}.py') for name in names])
    tokens = s.max_iters * s.gradient_accumulation_steps * s.batch_size * s.block_size
    assert train.training_flops(s) == 6 * weights * tokens
    assert train.estimate_hours(s) > 0


# ---- the configs

@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('[!_]*.py')), ids=lambda path: path.stem)
def test_every_config_is_short_and_valid(path):
    """At most ten settings, an opening comment with its command, and a model that can be built."""
    lines = path.read_text().splitlines()
    settings = [line for line in lines if line and not line.startswith('#')]
    assert 1 <= len(settings) <= 10
    assert lines[0].startswith('# ') and f'config/{path.name}' in path.read_text()
    s, _ = train.read_settings([str(path)])
    with torch.device('meta'):
        train.BitSkip(train.BitSkipConfig.of(vars(s)))


def test_paper_configs_have_the_papers_parameter_counts():
    counts = {}
    for name in ('baseline', 'bitskip_h', 'bitskip_ee', 'bitskip_h_ee', 'tinystories_v1', 'tinystories_v2',
                 'tinystories_v3', 'layerskip', 'llama3'):
        s, _ = train.read_settings([str(ROOT / 'config' / f'{name}.py')])
        with torch.device('meta'):
            counts[name] = train.BitSkip(train.BitSkipConfig.of(vars(s))).quantizable_parameters()
    assert set(list(counts.values())[:4]) == {34_603_008}
    assert set(list(counts.values())[4:]) == {855_638_016}


# --------------------------------------------------------------------------------------------------------------------
# exits on a finished model, and experiments

def test_frozen_model_keeps_its_last_layer(text, capsys):
    """--init_from=RUN --freeze: adapters and gates learn, everything else stays, bit for bit; the exits improve."""
    train.main(flags(lambda_ee=0.0, p_max=0.0))
    exits = dict(out_dir='out/exits', init_from='out/run', freeze=True, ee_adapter=4, lambda_ee=1.0, ee_distill=0.9,
                 gate_loss='agreement', p_max=0.0, max_iters=24)
    assert train.main(flags(**exits))
    before, after = (checkpoint.load(f'out/{run}/ckpt.pt') for run in ('run', 'exits'))
    assert after['settings']['linear'] == 'hbitlinear' and after['settings']['ee_adapter'] == 4
    changed = {name for name, weight in after['model'].items()
               if name not in before['model'] or not torch.equal(weight, before['model'][name])}
    assert changed and all(name.startswith(('adapters.', 'gates.')) for name in changed)
    assert any(after['model'][f'adapters.{layer}.b.weight'].any() for layer in range(2))
    losses = [entry['val_loss'] for entry in log('out/exits') if 'val_loss' in entry]
    assert losses[-1] < losses[0]


def test_a_folder_is_one_however_it_is_written(text):
    """Completion of a shell ends it with a slash, and the lock of the run was another then."""
    with checkpoint.exclusive('out/run', wait=False):
        with pytest.raises(UserError, match='out/run is being trained by another process'):
            train.main(flags(out_dir='out/run/'))


def test_a_model_whose_tokens_left_can_be_frozen():
    s = TrainSettings(ee_leave=0.3, freeze=True, gate_loss='divergence')
    assert s.ee_leave == 0 and TrainSettings(ee_leave=0.3).ee_leave == 0.3


def test_a_frozen_model_is_as_it_is_used(text):
    """Layer skipping and dropout went on, so that adapters and gates learned from a model that nobody runs."""
    s = TrainSettings(**TINY | dict(freeze=True, dropout=0.5, ee_leave=0.5, init_from='out/run'))
    assert s.p_max == s.dropout == s.ee_leave == 0


@pytest.mark.parametrize('changes, message', [
    (dict(init_from='out/nothing'), 'no checkpoint out/nothing/ckpt.pt'),
    (dict(init_from='out/run', n_embd=64), 'does not fit these settings'),
    (dict(init_from='out/run', freeze=True, gate_dim=0), 'this run has neither pair'),
    (dict(init_from='out/run', freeze=True, lambda_r=0), 'this run has neither pair')])
def test_init_from_a_model_that_does_not_fit(text, changes, message):
    train.main(flags(max_iters=1))
    with pytest.raises(UserError, match=message):
        train.main(flags(**{'out_dir': 'out/new'} | changes))


def test_gates_of_a_frozen_model_are_the_newest_and_go_on_learning(text):
    """No exit's loss shows what gates learn: patience kept those of the first evaluation. A run that starts from them
    takes them over, unless they shall learn something else."""
    train.main(flags(max_iters=1))
    gates = flags(out_dir='out/gates', init_from='out/run', freeze=True, gate_loss='overlap', lambda_ee=0.0, patience=1)
    train.main(gates)
    before = checkpoint.load('out/gates/ckpt.pt')
    assert before['progress']['iter'] == 12
    for gate_loss in ('overlap', 'agreement'):
        train.main([*gates, '--out_dir=out/next', '--init_from=out/gates', f'--gate_loss={gate_loss}',
                    '--learning_rate=0', '--max_iters=1'])
        after = checkpoint.load('out/next/ckpt.pt')['model']
        same = [torch.equal(weight, after[name]) for name, weight in before['model'].items() if 'gates' in name]
        assert same == [gate_loss == 'overlap'] * 4


def test_adapters_of_a_frozen_model_wait_at_the_foot_of_a_ramp(text):
    """lambda_ee is 0 in the first step: backward() of a loss without gradient was a RuntimeError."""
    train.main(flags(max_iters=1))
    train.main(flags(out_dir='out/exits', init_from='out/run', freeze=True, ee_adapter=4, lambda_r=0.0, ee_ramp='up'))
    steps = [entry for entry in log('out/exits') if 'ce' in entry]
    assert [entry['grad_norm'] > 0 for entry in steps] == [entry['ee'] > 0 for entry in steps] == [False] + [True] * 11


def test_flags_are_checked_with_the_settings_of_the_run_that_they_build_on(text):
    """ee_share=0.5 was refused for the default ee_positions='all', which the run does not have."""
    train.main(flags(max_iters=1, ee_positions='sampled'))
    for init_from in ('resume', 'out/run'):
        s, _ = train.read_settings(['--out_dir=out/run', f'--init_from={init_from}', '--ee_share=0.5'])
        assert (s.init_from, s.ee_positions, s.ee_share) == (init_from, 'sampled', 0.5)


def test_train_latent_ternarizes_afterwards(text):
    """The training loss is that of the latent weights; validation is on ternary ones, as always."""
    settings = dict(max_iters=1, gradient_accumulation_steps=1, p_max=0.0)
    train.main(flags(train_latent=True, **settings))
    training = train.Run(train.read_settings(flags(**settings))[0])
    train.seed_microbatch(7, 0, 0)
    idx, targets = train.get_batch(training.train_tokens, 2, 32, 'cpu')
    with latent_weights(training.model):
        latent = training.model(idx, targets)[1]['ce'].item()
    assert log()[1]['ce'] == pytest.approx(latent, abs=1e-5)
    assert log()[1]['ce'] != pytest.approx(training.model(idx, targets)[1]['ce'].item(), abs=1e-4)
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    assert log()[-1]['val_loss'] == pytest.approx(train.evaluate(model, training.val_tokens, batch_size=2)[-1])


@pytest.mark.skipif(shutil.which('c++') is None, reason='torch.compile on a CPU needs a C++ compiler')
def test_compile_trains_to_the_same_losses(text):
    """Samples that skip change the batch size from block to block: compiled once for one size, once for any."""
    settings = dict(n_layer=2, batch_size=4, max_iters=3, eval_interval=3, gradient_accumulation_steps=1)
    train.main(flags(**settings))
    train.main(flags(compile=True, out_dir='out/compiled', **settings))
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] <= 6  # not one graph for each batch size
    assert not torch._dynamo.utils.counters['graph_break']
    for plain, compiled in zip(log()[1:], log('out/compiled')[1:], strict=True):
        for name in {'total', 'ce', 'ee', 'quant', 'route', 'val_loss'} & plain.keys():
            assert compiled[name] == pytest.approx(plain[name], rel=1e-3), (name, plain)
