"""The loop. A step is a pure function of settings, state and number: runs can be stopped, killed,
resumed and distributed without changing a bit."""
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._dynamo.utils
from filelock import FileLock
from conftest import ROOT, RUN, flags, text_folder

import train
from checkpoint import load_checkpoint, open_model, save_checkpoint
from configurator import UserError
from eval_exits import evaluate
from model import BitSkip, BitSkipConfig
from prepare import load_tokens
from train import TrainSettings, get_lr

# sums in another order give other bits: a run is compared with one of as many threads
ENV = os.environ | {'OMP_NUM_THREADS': str(torch.get_num_threads())}
RESUME = ['--out_dir=out/run', '--init_from=resume']

@pytest.fixture
def text(tmp_path):
    """A working folder with a text of 12,000 bytes."""
    with text_folder(tmp_path, 12000):
        yield tmp_path

def start(env=ENV, **changes):
    """train.py, in a process of its own."""
    return subprocess.Popen([sys.executable, str(ROOT / 'train.py'), *flags(**changes)], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

def log(out_dir='out/run'):
    return [json.loads(line) for line in Path(out_dir, 'log.jsonl').read_text().splitlines()]

def assert_same_run(a, b, **tolerance):
    """Weights, optimizer, and what is told of two runs, but for the time that they took."""
    states = [load_checkpoint(f'{run}/last.pt') for run in (a, b)]
    for part in ('model', 'optimizer'):
        torch.testing.assert_close(*(state[part] for state in states),
                                   **tolerance or dict(rtol=0, atol=0))
    for entries in zip(*([*log(run)[1:], state['progress']] for run, state in zip((a, b), states)),
                       strict=True):
        ours, theirs = ({key: value for key, value in entry.items()
                         if key not in ('seconds', 'tok_per_s', 'log_size')} for entry in entries)
        assert ours == (pytest.approx(theirs, rel=1e-4) if tolerance else theirs)

# ---- pure functions of the step

@pytest.mark.parametrize('settings, expected', [
    (dict(schedule='wsd'), {0: 0.1, 8: 0.9, 9: 1, 80: 1, 90: 0.55, 99: 0.1 + 0.9 * 0.05}),
    (dict(schedule='linear'), {0: 0.1, 9: 1, 54: 0.1 + 0.9 * 46 / 91, 99: 0.1 + 0.9 / 91}),
    (dict(schedule='cosine'), {9: 1, 99: 0.1 + 0.45 * (1 - math.cos(math.pi / 91))}),
    (dict(max_iters=20), {0: 1 / 3, 1: 2 / 3, 2: 1})], ids=str)
def test_learning_rate_by_hand(settings, expected):
    """100 steps: 9 of warm-up, to 1; at the end 0.1. wsd decays over the last 20. Warm-up takes a
    tenth at most: it was the whole of a short run."""
    s = TrainSettings(**dict(max_iters=100, warmup_iters=9, learning_rate=1, min_lr=0.1) | settings)
    assert {step: get_lr(step, s) for step in expected} == pytest.approx(expected)

def test_targets_are_the_next_token():
    """Not the token that the model sees, nor the one after the next. The last one can be drawn."""
    idx, targets = train.get_batch(torch.arange(20).numpy().astype('uint16'), 100, 16, 'cpu')
    assert idx.shape == targets.shape == (100, 16) and torch.equal(targets, idx + 1)
    assert idx.min() == 0 and targets.max() == 19

def test_micro_batches_follow_from_seed_step_and_number_alone():
    """What resuming and distribution rest on: earlier use of the generator leaves no trace."""
    def draw(*key):
        train.seed_microbatch(*key)
        return tuple(torch.rand(4).tolist())
    assert draw(7, 3, 1) == draw(7, 3, 1) and len({draw(*key) for key in (
        (7, 3, 1), (8, 3, 1), (7, 1, 3), (7, 3, 2), (7, 4, 1), (7, 31, 0), (73, 1, 0))}) == 7

def test_weight_decay_is_on_matrices_only():
    model = BitSkip(BitSkipConfig.of(RUN | {'vocab_size': 7}))
    decayed, others = train.make_optimizer(model, TrainSettings(beta1=0.8)).param_groups
    assert decayed['weight_decay'] == 0.1 and all(p.dim() == 2 for p in decayed['params'])
    assert others['weight_decay'] == 0 and all(p.dim() == 1 for p in others['params'])
    assert len(decayed['params']) + len(others['params']) == len(list(model.parameters()))

# ---- a run

def test_a_run_learns_and_leaves_what_it_promises(text, capsys):
    assert train.main(flags(max_iters=30, eval_interval=15)) is True
    assert '  python sample.py --out_dir=out/run --exit_layer 1\n' in capsys.readouterr().out
    first, *entries = log()
    assert first['settings']['lambda_ee'] == 0.3 and first['meta']['tokenizer'] == 'bytes'
    steps = [entry for entry in entries if 'ce' in entry]
    assert [entry['iter'] for entry in steps] == list(range(1, 31))
    assert steps[0]['ce'] == pytest.approx(math.log(256), abs=0.3)  # before learning: uniform
    assert steps[7]['lr'] == get_lr(7, TrainSettings(**RUN | dict(max_iters=30)))
    best = min(entry['val_loss'] for entry in entries if 'val_loss' in entry)
    assert best < 4.5 and load_checkpoint('out/run/ckpt.pt')['progress']['val_loss'] == best
    loss = evaluate(open_model('out/run/ckpt.pt')[0], load_tokens('data/text-bytes', 'val'))[-1]
    assert loss == pytest.approx(best, abs=1e-5)
    assert 'Infinity' not in Path('out/run/log.jsonl').read_text()  # which is not JSON

@pytest.mark.parametrize('change', [{}, dict(dtype='bfloat16', dropout=0.1,
                                             ee_positions='sampled')], ids=str)
def test_resuming_after_any_step_is_bit_exact(text, monkeypatch, change):
    """A run of seven steps that gets a Ctrl-C in the middle of each of them and is resumed, and one
    that does not: the same weights, optimizer and log, whatever is drawn at random."""
    settings = dict(max_iters=7, eval_interval=3, schedule='cosine', **change)
    assert train.main(flags(out_dir='out/whole', **settings))
    calls, get_batch = [], train.get_batch

    def interrupted(*args):
        calls.append(get_batch(*args))
        if len(calls) % 2 == 0:  # in the second micro-batch
            os.kill(os.getpid(), signal.SIGINT)
        return calls[-1]
    monkeypatch.setattr(train, 'get_batch', interrupted)
    assert train.main(flags(**settings)) is False
    for step in range(1, 7):
        assert load_checkpoint('out/run/last.pt')['progress']['iter'] == step
        assert train.main(RESUME) is (step == 6)
    assert train.main(RESUME) and len(calls) == 14  # a finished run has nothing left to do
    assert len({tuple(idx.flatten().tolist()) for idx, _ in calls}) == 14  # nor reads a batch twice
    assert_same_run('out/whole', 'out/run')

def test_a_killed_run_is_whole_and_resumes_exactly(text):
    """kill -9, at any moment. What was logged after the last save is logged again, once."""
    settings = dict(max_iters=18, eval_interval=3, log_interval=2)
    with start(**settings) as process:
        while not os.path.exists('out/run/last.pt'):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        time.sleep(random.random() / 10)
        process.kill()
    assert load_checkpoint('out/run/last.pt')['progress']['iter'] % 3 == 0
    open_model('out/run/ckpt.pt')
    assert train.main(RESUME) and train.main(flags(out_dir='out/whole', **settings))
    assert_same_run('out/whole', 'out/run')

def test_two_processes_take_the_step_of_one(text):
    """DDP over gloo. A block that all samples skip in one process, or in both, has no gradient
    there. The micro-batches of both are those of one, and so are losses and gradients: means, not
    sums."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = dict(MASTER_ADDR='localhost', MASTER_PORT=str(free.getsockname()[1]))
    settings = dict(batch_size=1, p_max=0.9, max_iters=6, eval_interval=3)
    both = [start(ENV | address | dict(RANK=n, LOCAL_RANK=n, WORLD_SIZE='2'), out_dir='out/two',
                  **settings) for n in '01']
    train.main(flags(out_dir='out/one', **settings))
    (out, error), (silence, _) = (process.communicate(timeout=120) for process in both)
    assert [process.returncode for process in both] == [0, 0], error
    assert 'best: val loss' in out and not silence  # one of them speaks
    assert_same_run('out/one', 'out/two', rtol=1e-4, atol=1e-6)

def test_a_compiled_run_has_the_same_losses(text, monkeypatch):
    """No graph is broken, and few serve all shapes. (They run as they were traced: to compile C++
    from them takes minutes.)"""
    compile_, counters = torch.nn.Module.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda m: compile_(m, backend='aot_eager'))
    monkeypatch.setattr(train, 'can_compile', lambda device: True)
    settings = dict(n_layer=2, max_iters=2, eval_interval=2, gradient_accumulation_steps=1)
    train.main(flags(**settings))
    train.main(flags(compile=True, out_dir='out/compiled', **settings))
    if torch.__version__ > '2.6.9':  # (2.6 makes 22)
        assert 0 < counters['stats']['unique_graphs'] <= 6 and not counters['graph_break']
    for plain, compiled in zip(log()[1:], log('out/compiled')[1:], strict=True):
        for name in {'total', 'ce', 'ee', 'quant', 'route', 'val_loss'} & plain.keys():
            assert compiled[name] == pytest.approx(plain[name], rel=1e-3), name

def test_without_a_compiler_training_goes_on_uncompiled(text, monkeypatch, capsys):
    """It ended in a traceback of torch's, after the first batch."""
    def compile_(*_, **__):
        raise RuntimeError('InvalidCxxCompiler: no working C++ compiler\nmore lines')
    monkeypatch.setattr(torch, 'compile', compile_)
    assert train.main(flags(max_iters=1, eval_interval=1, compile=True))
    assert 'goes on without it: InvalidCxxCompiler' in capsys.readouterr().out

# ---- when to stop

def test_patience_counts_evaluations_and_outlasts_an_interruption(text):
    """A resumed run took the first model that it evaluated for its best."""
    train.main(flags(learning_rate=0, patience=2, max_iters=40))
    assert [entry['iter'] for entry in log() if 'val_loss' in entry] == [4, 8, 12]
    train.main(flags(max_iters=4, patience=2))
    state = load_checkpoint('out/run/last.pt')
    state['progress'].update(val_loss=0.5, bad_evals=1)  # as if it had been better before
    save_checkpoint('out/run/last.pt', state)
    best = Path('out/run/ckpt.pt').read_bytes()
    train.main([*RESUME, '--max_iters=40'])
    assert [entry['iter'] for entry in log() if 'val_loss' in entry] == [4, 8]  # one too many
    assert Path('out/run/ckpt.pt').read_bytes() == best and log()[-1]['best'] == 0.5

def test_divergence_stops_with_step_checkpoint_and_advice(text):
    with pytest.raises(UserError, match=r'step \d: loss, gradient = .* nothing is saved'):
        train.main(flags(learning_rate=1e38, warmup_iters=0))
    assert os.listdir('out/run') == ['log.jsonl']
    train.main(flags(max_iters=4))
    for interval, found in ((9, 'loss, gradient ='), (1, 'validation loss =')):  # who finds it
        with pytest.raises(UserError, match=f'step 5: {found} .*out/run/last.pt'):
            train.main([*RESUME, '--max_iters=9', '--learning_rate=1e38',
                        f'--eval_interval={interval}'])
        assert load_checkpoint('out/run/last.pt')['progress']['iter'] == 4
    assert 'NaN' not in Path('out/run/log.jsonl').read_text()  # which is not JSON

# ---- folders, and a user's mistakes

def test_an_earlier_run_is_moved_aside_and_one_at_work_is_left_alone(text):
    """A second run moved the first one's folder aside, and both wrote into the new one."""
    for seed in (1, 2, 3):
        train.main(flags(seed=seed, max_iters=1, eval_interval=1))
    seeds = {run: load_checkpoint(f'out/{run}/ckpt.pt')['settings']['seed']
             for run in os.listdir('out') if run != 'run.lock'}
    assert seeds == {'run.1': 1, 'run.2': 2, 'run': 3}
    with FileLock('out/run.lock'):
        for out_dir in ('out/run', 'out/run/', './out//run'):
            with pytest.raises(UserError, match='out/run is being trained by another process'):
                train.main(flags(out_dir=out_dir))

@pytest.mark.parametrize('changes, message', [
    ({'init_from': 'resume'}, 'there is no checkpoint out/run/last.pt'),
    ({'init_from': 'out/nothing'}, 'there is no checkpoint out/nothing/ckpt.pt'),
    ({'block_size': 100000}, 'too few for block_size=100000'), ({'batch_size': 0}, 'batch_size'),
    ({'decay_frac': 2}, 'decay_frac'), ({'linear': 'quant:No'}, 'quant:No'),
    ({'target_exit': 3}, 'target_exit is 0 to 2, got 3')], ids=str)
def test_mistakes_are_told_in_one_sentence_and_leave_nothing(text, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train.main(flags(**changes))
    assert '\n' not in str(error.value) and not os.path.exists('out/run')

def test_resume_refuses_another_model_and_another_text(text):
    """The text was its own, but from then on the run was told to be on the other one."""
    train.main(flags(max_iters=1, eval_interval=1))
    for flag in ('--n_embd=64', '--n_layer=2', '--exit_norm=raw'):
        with pytest.raises(UserError, match='a run that goes on keeps that'):
            train.main([*RESUME, flag, '--max_iters=2'])
    Path('other.txt').write_text('another text\n' * 1000)
    for flag in ('--dataset=other.txt', '--tokenizer=gpt2'):
        with pytest.raises(UserError, match='a run that goes on keeps that'):
            train.main([*RESUME, flag, '--max_iters=2'])

def test_init_from_starts_from_a_finished_model(text):
    """Its settings hold, its weights are taken over, but for gates that learned something else."""
    train.main(flags(max_iters=2, eval_interval=2, exit_norm='none'))
    before = load_checkpoint('out/run/ckpt.pt')['model']
    start_from = ['--init_from=out/run', '--out_dir=out/new', '--learning_rate=0', '--max_iters=1']
    for gate_loss in ('cost', 'divergence'):
        assert train.main([*start_from, f'--gate_loss={gate_loss}'])
        after = load_checkpoint('out/new/ckpt.pt')
        assert after['settings']['exit_norm'] == 'none' and after['progress']['iter'] == 1
        for name, weight in before.items():
            same = 'gates' not in name or gate_loss == 'cost'
            assert torch.equal(weight, after['model'][name]) == same, name
    for flag in ('--n_embd=64', '--n_layer=4', '--n_layer=2', '--sub_norm=False'):
        with pytest.raises(UserError, match='the model in out/run does not fit these settings'):
            train.main([*start_from, flag])

@pytest.mark.parametrize('spoil, why', [
    (lambda saved: saved['optimizer']['state'][0].update(exp_avg=torch.zeros(1)), 'its optimizer'),
    (lambda saved: saved.update(model_class='papers.mistakes:NonCausal'), 'it is a papers.mistakes')
    ], ids=['moments', 'variant'])
def test_a_run_is_resumed_with_what_is_its_own(text, spoil, why):
    """Fused AdamW would write beyond moments that are too small; and a variant would go on as
    another model."""
    train.main(flags(max_iters=2))
    saved = load_checkpoint('out/run/last.pt')
    spoil(saved)
    save_checkpoint('out/run/last.pt', saved)
    with pytest.raises(UserError, match=f'does not fit these settings .{why}'):
        train.main([*RESUME, '--max_iters=4'])

@pytest.mark.parametrize('path', sorted((ROOT / 'config').glob('[!_]*.py')), ids=lambda p: p.stem)
def test_every_config_is_short_and_valid(path):
    """At most ten settings, an opening comment with a command, the papers' parameter counts (A:
    Table 1 and appendix, B: Table 2). Widths are powers of two: padding adds nothing."""
    lines = path.read_text().splitlines()
    assert 1 <= len([line for line in lines if line and not line.startswith('#')]) <= 10
    assert lines[0].startswith('# ') and '#   python train.py config/' in path.read_text()
    s, _ = train.read_settings([str(path)], TrainSettings)
    with torch.device('meta'):
        model = BitSkip(BitSkipConfig.of(vars(s)))
    weights, every = model.quantizable_parameters(), sum(p.numel() for p in model.parameters())
    if path.stem.startswith(('baseline', 'bitskip', 'compose')):
        assert weights == 34_603_008 and every == pytest.approx(86.3e6, rel=1e-3)
        # "0.2M: LayerNorm, routing, biases", of which there are none here; the head is not tied
        assert round((every - weights - 2 * 50257 * 512) / 1e6, 1) == 0.2
    if path.stem.startswith(('tinystories', 'layerskip', 'llama3')):
        assert weights == 855_638_016 and every == pytest.approx(1.061e9, rel=1e-3)
