"""Several processes take the step that one would: DDP and FSDP, two processes on this machine, with gloo.

What they do is done once, by `worker` at the end of this file, which torchrun starts; the tests compare it with what
one process did. Samples skip layers and are alone in their micro-batch, so that a block is often left without any, in
one process or in all; the FFN's width is odd, so that shards are uneven.
"""
import faulthandler
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import text_folder
from test_train import ENV, ROOT, command, flags, log, text, wait_for_checkpoint  # noqa: F401 (a fixture)

import checkpoint
import train
from configurator import configure
from eval_exits import evaluate
from parallel import Processes, gathered, replicate

TORCHRUN = (sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2')
# a learning rate that does not depend on max_iters, so that 8 steps are 4 steps and 4 more
SETTINGS = dict(batch_size=1, gradient_accumulation_steps=4, skip_schedule='uniform', ffn_dim=49, ee_adapter=3,
                max_iters=8, warmup_iters=0, decay_frac=0)


def run_of(**changes):
    """A Run that is ready for forward_backward."""
    training = train.Run(configure(train.TrainSettings, flags(**SETTINGS | changes)))
    training.module = replicate(training.model) if training.world > 1 and not training.s.fsdp else training.model
    return training


def observe(training):
    """What one process sees of six steps that are not taken: their losses, whole gradients by parameter, and
    micro-batches; and the loss at every exit."""
    batches, get_batch = [], train.get_batch

    def recorded(*args):
        batches.append(get_batch(*args))
        return batches[-1]
    train.get_batch = recorded
    steps = []
    for step in range(6):
        losses = training.forward_backward(step)
        steps.append((losses, {name: None if p.grad is None else gathered(p.grad).clone()
                               for name, p in training.model.named_parameters()}))
    train.get_batch = get_batch
    val = training.val_tokens[:36 * 32 + 10]  # 36 windows and a rest: 37 batches, 19 of them the first process's
    return {'steps': steps, 'batches': [idx for idx, _ in batches],
            'eval': evaluate(training.model, val, range(3), 1, training.processes)}


def count_all_reduces(training, micro_batches):
    """How often gradients or losses are summed over the processes in a step of so many micro-batches."""
    training.s.gradient_accumulation_steps = micro_batches
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        training.forward_backward(0)
    return sum(event.count for event in profile.key_averages() if event.key == 'gloo:all_reduce')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The folder where one process and two have done the same."""
    path = tmp_path_factory.mktemp('parallel')
    with text_folder(path, 12000):
        train.main(flags(**SETTINGS))
        train.main(flags(**SETTINGS | dict(max_iters=4, out_dir='out/one')))
        shutil.copytree('out/one', 'out/one_fsdp')
        torch.save(observe(run_of()), 'one.pt')
        done = subprocess.run([*TORCHRUN, __file__], capture_output=True, text=True, timeout=700,
                              env=ENV | {'PYTHONPATH': str(ROOT)})
        assert done.returncode == 0, done.stderr[-3000:]
    return path


# ---- a step

@pytest.mark.parametrize('kind', ['ddp', 'fsdp'])
def test_losses_and_gradients_are_those_of_one_process(folder, kind):
    """The gradient of a block that all samples skip is not there, in either case."""
    one, two = torch.load(folder / 'one.pt'), torch.load(folder / f'{kind}0.pt')
    missing = 0
    for (losses, grads), (their_losses, their_grads) in zip(one['steps'], two['steps'], strict=True):
        assert all(losses[name] for name in ('ce', 'ee', 'quant', 'route'))
        assert their_losses == pytest.approx(losses, rel=1e-5)
        largest = max(grad.abs().max() for grad in grads.values() if grad is not None)
        for name, grad in grads.items():
            if grad is None:
                missing += 1
                assert their_grads[name] is None, name
            else:
                torch.testing.assert_close(their_grads[name] / largest, grad / largest, rtol=1e-4, atol=1e-6)
    assert missing


@pytest.mark.parametrize('kind', ['ddp', 'fsdp'])
def test_a_step_without_gradient_does_not_confuse_the_next(folder, kind):
    """At the foot of a ramp a frozen model learns nothing; DDP waits for the backward pass of any forward pass."""
    assert [loss > 0 for loss in torch.load(folder / f'{kind}0.pt')['ramp']] == [False, True, True]


def test_every_process_sees_other_data(folder):
    """The micro-batches of two processes are those of one, each once."""
    one, first, second = (torch.load(folder / f'{name}.pt')['batches'] for name in ('one', 'ddp0', 'ddp1'))
    keys = [tuple(idx.flatten().tolist()) for idx in one]
    assert len(set(keys)) == len(keys) == 6 * 4
    theirs = [{tuple(idx.flatten().tolist()) for idx in share} for share in (first, second)]
    assert not theirs[0] & theirs[1] and len(theirs[0]) == len(theirs[1]) and theirs[0] | theirs[1] == set(keys)


def test_ddp_exchanges_gradients_once_a_step(folder):
    """no_sync: four micro-batches in each process cause as many all-reduces as one does."""
    with_one, with_four = torch.load(folder / 'ddp0.pt')['all_reduces']
    assert with_one == with_four > 1


def test_fsdp_deals_out_weights_gradients_and_moments(folder):
    """Each process has about half of everything, and together they have all."""
    shares = [torch.load(folder / f'fsdp{rank}.pt')['share'] for rank in (0, 1)]
    for name, copies in (('weights', 1), ('gradients', 1), ('moments', 2)):
        first, second = (share[name] for share in shares)
        assert first + second == copies * shares[0]['total'], name
        assert 0.45 < second / (first + second) <= 0.5, name


# ---- evaluation

@pytest.mark.parametrize('kind', ['ddp', 'fsdp'])
def test_evaluation_is_exact(folder, kind):
    one, *two = (torch.load(folder / f'{name}.pt')['eval'] for name in ('one', f'{kind}0', f'{kind}1'))
    assert len(one) == 3 and two[0] == two[1] == pytest.approx(one, rel=1e-6)


def test_evaluation_is_sharded(make_model):
    """Each of three processes sums over its own windows; sums and counts add up to those of one."""
    model, tokens = make_model(), torch.randint(31, (7 * 16 + 6,)).numpy().astype('uint16')

    def sums(rank, world):
        taken = []
        evaluate(model, tokens, [0, 2], 1, SimpleNamespace(rank=rank, world=world,
                                                           sum=lambda s: taken.append(s.clone()) or s))
        return taken[0]
    shares = [sums(rank, 3) for rank in range(3)]
    assert [share[-1].item() for share in shares] == [3 * 16, 2 * 16 + 5, 2 * 16]  # windows 0 3 6, 1 4 7, 2 5
    torch.testing.assert_close(sum(shares), sums(0, 1))


@pytest.mark.parametrize('n', [0, 1, 2])
def test_evaluation_needs_a_token_to_predict(make_model, n):
    model, tokens = make_model(), torch.zeros(n, dtype=torch.int64).numpy().astype('uint16')
    if n < 2:
        with pytest.raises(ValueError, match=f'{n} tokens have no next token'):
            evaluate(model, tokens)
    else:
        logits = model(torch.zeros(1, 1).long())[0][0, 0]
        assert evaluate(model, tokens) == pytest.approx([-logits.log_softmax(-1)[0].item()])


# ---- a run

def distance(a, b):
    """Of two checkpoints: how far apart weights, moments or numbers of steps are, relative to their size."""
    def parts(saved):
        states = saved['optimizer']['state']
        return [torch.cat([weight.flatten() for weight in saved['model'].values()]),
                *(torch.cat([states[i][name].flatten() for i in states]) for name in ('exp_avg', 'exp_avg_sq', 'step'))]
    a, b = checkpoint.load(a), checkpoint.load(b)
    assert [*a['model']] == [*b['model']] and a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    return max(((x - y).norm() / x.norm()).item() for x, y in zip(parts(a), parts(b), strict=True))


def test_checkpoints_are_exchanged(folder, monkeypatch):
    """Begun by one process and continued under FSDP, or the other way round, a run goes as in one process."""
    monkeypatch.chdir(folder)
    assert distance('out/run/last.pt', 'out/one_fsdp/last.pt') < 1e-2
    assert checkpoint.load('out/fsdp/last.pt')['progress']['iter'] == 4
    train.main(['--out_dir=out/fsdp', '--init_from=resume', '--max_iters=8'])
    assert distance('out/run/last.pt', 'out/fsdp/last.pt') < 1e-2
    assert distance('out/run/last.pt', 'out/one/last.pt') > 0.05  # four steps less are another matter


def launch(nodes, **changes):
    """Train by the README's command lines: one torchrun of two processes, or two (two machines) of one process each.
    Their errors."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    rendezvous = ('--standalone',) if nodes == 1 else (
        f'--nnodes={nodes}', '--rdzv_backend=c10d', f'--rdzv_endpoint=localhost:{port}')
    launcher = (sys.executable, '-m', 'torch.distributed.run', *rendezvous, f'--nproc_per_node={2 // nodes}')
    machines = [subprocess.Popen(command(*launcher, **changes), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                 text=True, env=ENV) for _ in range(nodes)]
    errors = [machine.communicate(timeout=600)[1] for machine in machines]
    assert not any(machine.returncode for machine in machines), errors
    return ''.join(errors)


@pytest.mark.parametrize('nodes, fsdp', [(1, False), (2, True)])
def test_two_processes_equal_one(text, nodes, fsdp):  # noqa: F811
    """To the end, also when a process skips a whole layer: none waits for the other."""
    changes = dict(batch_size=1, max_iters=8, skip_schedule='uniform')
    train.main(flags(out_dir='out/one', **changes))
    assert 'Warning' not in launch(nodes, fsdp=fsdp, **changes)
    assert distance('out/one/last.pt', 'out/run/last.pt') < 1e-2
    for a, b in zip(log('out/one')[1:], log('out/run')[1:], strict=True):
        assert a.keys() == b.keys()
        assert a.get('total', a.get('val_loss')) == pytest.approx(b.get('total', b.get('val_loss')), rel=1e-3)


def test_interrupted_processes_stop_together_and_save(text):  # noqa: F811
    """Ctrl-C under FSDP, where a state is whole only if all processes are between the same two steps."""
    process = subprocess.Popen(command(*TORCHRUN, fsdp=True, max_iters=100000), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=ENV)
    wait_for_checkpoint()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert 'nothing lost' in out, err[-2000:]
    done = checkpoint.load('out/run/last.pt')['progress']['iter']
    assert done >= 4
    train.main(['--out_dir=out/run', '--init_from=resume', f'--max_iters={done + 1}'])  # in one process
    assert [entry['iter'] for entry in log()[1:] if 'ce' in entry] == [*range(1, done + 2)]


@pytest.mark.skipif(not os.path.exists('/proc/self/task'), reason='the names of threads are in /proc')
def test_no_thread_outlives_the_processes():
    """A thread of gloo's that drops a tensor while Python shuts down aborts its process."""
    done = subprocess.run([*TORCHRUN, __file__, 'close'], capture_output=True, text=True, timeout=300,
                          env=ENV | {'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0 and 'open pt_gloo' in done.stdout, done.stdout + done.stderr[-3000:]
    assert 'closed pt_gloo' not in done.stdout


def test_a_mistake_is_told_once_by_all_processes(text):  # noqa: F811
    done = subprocess.run(command(*TORCHRUN, dataset='nowhere.txt'), capture_output=True, text=True, env=ENV)
    assert done.returncode and done.stderr.count('error: ') == 1 and 'nowhere.txt' in done.stderr
    assert 'Connection closed' not in done.stderr and 'barrier' not in done.stderr


def test_fsdp_needs_torchrun(text):  # noqa: F811
    done = subprocess.run(command(fsdp=True), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith('error: --fsdp=True lets several processes share a model')
    assert done.stderr.count('\n') == 1
    assert not os.path.exists('out/run')


# ---- what the two processes do

def worker():
    faulthandler.dump_traceback_later(600, exit=True)  # rather than to wait forever, and in silence
    torch.set_num_threads(1)
    processes = Processes(torch.device('cpu'))  # gloo starts once in a process
    train.Processes, processes.close = lambda device: processes, lambda: None
    for kind in ('ddp', 'fsdp'):
        training = run_of(fsdp=kind == 'fsdp')
        seen = observe(training)
        if kind == 'ddp':
            seen['all_reduces'] = [count_all_reduces(training, micro_batches) for micro_batches in (2, 8)]
        else:
            parameters = [p for p in training.model.parameters() if p.grad is not None]
            training.optimizer.step()
            moments = [m for p in parameters for name, m in training.optimizer.state[p].items() if name != 'step']
            seen['share'] = {'total': sum(p.numel() for p in parameters)} | {
                name: sum(tensor.to_local().numel() for tensor in tensors) for name, tensors in
                {'weights': parameters, 'gradients': [p.grad for p in parameters], 'moments': moments}.items()}
        frozen = run_of(fsdp=kind == 'fsdp', freeze=True, init_from='out/one', lambda_r=0.0, ee_ramp='up')
        seen['ramp'] = [frozen.forward_backward(step)['ee'] for step in range(3)]
        torch.save(seen, f'{kind}{processes.rank}.pt')
        training.module = None
    train.main(['--out_dir=out/one_fsdp', '--init_from=resume', '--max_iters=8', '--fsdp=True'])
    train.main(flags(**SETTINGS | dict(max_iters=4, out_dir='out/fsdp', fsdp=True)))


def opens_and_closes():
    def threads(when):
        print(''.join(f'{when} {Path(task, "comm").read_text()}' for task in Path('/proc/self/task').iterdir()))
    processes = Processes(torch.device('cpu'))
    module = replicate(torch.nn.Linear(3, 3))
    module(torch.ones(2, 3)).sum().backward()
    threads('open')
    del module
    processes.close()
    threads('closed')


if __name__ == '__main__':
    opens_and_closes() if 'close' in sys.argv else worker()
