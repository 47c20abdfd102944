"""
Nothing lost: a training run that meets one accident after another ends, bit for bit, as if nothing had happened.

    python tests/campaign_kill.py                     200 accidents, some minutes on one core
    python tests/campaign_kill.py --accidents=20 --seed=3
    python tests/campaign_kill.py --folder=/mnt/small       a file system below 64 MB there is really filled up

A run is started, meets an accident, is resumed, meets the next one, and so on until it reaches its end. Then weights,
optimizer state, progress and log must equal those of a run that nobody disturbed, and the next run begins. Accidents:

    kill       kill -9 at a random moment
    write      the kernel kills the process inside a write, at a random byte of a checkpoint (RLIMIT_FSIZE, SIGXFSZ)
    rename     kill -9 just before or just after a file is renamed to its final name
    stop       Ctrl-C or SIGTERM at a random moment: the run has to save and to end by itself
    full disk  writing fails at a random byte: exit code 2, one sentence. Without a small file system of its own it is
               the limit on file sizes that makes it fail

After each of them every checkpoint that stands under its name must load. All runs are children of this process, forked
after the imports: a run of 40 steps takes half a second.
"""
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
import train
from configurator import configure, run

TRAIN = dict(dataset='text.txt', tokenizer='bytes', n_layer=3, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=64,
             block_size=32, batch_size=2, target_exit=1, gradient_accumulation_steps=2, max_iters=40, eval_interval=4,
             log_interval=1, patience=0, learning_rate=1e-2, linear='hbitlinear', lambda_ee=0.3, p_max=0.7,
             device='cpu', dtype='float32')
SMALL_DISK = 64 * 2 ** 20
UNSAVED = {'seconds', 'tok_per_s', 'settings'}  # these may differ: time, and the name of the folder


@dataclass
class KillSettings:
    """Disturbs training runs and compares them with one that is left alone."""
    accidents: int = 200  # how many
    seed: int = 1  # of the accidents
    folder: str = ''  # where to work; empty: a temporary folder


def forked(call, output):
    """Call `call()` in a child process whose stdout and stderr go to the file `output`: the child's id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = (os.fdopen(fd, 'w', buffering=1, errors=errors)  # as Python opens them
                                  for fd, errors in ((1, 'strict'), (2, 'backslashreplace')))
        call()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def ended(pid):
    """Wait for a child: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def script(main, *argv):
    """`main` as a script is called, with everything that is between it and the shell."""
    sys.argv = ['script', *argv]
    torch.set_num_threads(1)
    run(main)


def training(out_dir):
    """The call that starts a run, or resumes it if it has saved anything."""
    flags = [f'--{key}={value}' for key, value in TRAIN.items()] + [f'--out_dir={out_dir}']
    resume = ['--init_from=resume'] if os.path.exists(f'{out_dir}/last.pt') else []
    return partial(script, train.main, *flags, *resume)


# ----------------------------------------------------------------------------------------------------------------------
# accidents: each takes the call of a run and lets it happen

def at_a_moment(rng, call, duration, signals):
    pid = forked(call, 'output')
    time.sleep(rng.uniform(0, duration))
    os.kill(pid, rng.choice(signals))
    return ended(pid)


def in_a_write(rng, call, action):
    """No file may grow over a random size: the write that would do it is cut short there, and then the process is
    killed, or the write fails, as SIGXFSZ is or is not ignored."""
    limit = rng.randrange(os.path.getsize('out/whole/last.pt'))

    def limited():
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        call()
    return ended(forked(limited, 'output'))


def at_a_rename(rng, call):
    countdown, before = rng.randrange(1, 12), rng.random() < 0.5
    replace = os.replace

    def deadly(*paths):
        nonlocal countdown
        countdown -= 1
        if countdown or not before:
            replace(*paths)
        if not countdown:
            os.kill(os.getpid(), signal.SIGKILL)

    def patched():
        os.replace = deadly
        call()
    return ended(forked(patched, 'output'))


def on_a_full_disk(rng, call):
    """Fill the disk but for a few bytes, if it is small enough to be ours, else limit the size of files."""
    disk = os.statvfs('.')
    if disk.f_blocks * disk.f_frsize > SMALL_DISK:
        return in_a_write(rng, call, signal.SIG_IGN)
    left = rng.randrange(2 * os.path.getsize('out/whole/last.pt'))
    with open('ballast', 'wb') as file:
        file.write(bytes(max(0, disk.f_bavail * disk.f_frsize - left)))
    try:
        return ended(forked(call, 'output'))
    finally:
        os.unlink('ballast')


def accident(rng, call, duration):
    """One of them: its name, and how the run ended."""
    name = rng.choice(['kill', 'kill', 'kill', 'write', 'rename', 'stop', 'full disk'])
    code = {'kill': lambda: at_a_moment(rng, call, duration, [signal.SIGKILL]),
            'stop': lambda: at_a_moment(rng, call, duration, [signal.SIGINT, signal.SIGTERM]),
            'write': lambda: in_a_write(rng, call, signal.SIG_DFL),
            'rename': lambda: at_a_rename(rng, call),
            'full disk': lambda: on_a_full_disk(rng, call)}[name]()
    expected = {'kill': (-signal.SIGKILL,), 'write': (-signal.SIGXFSZ,), 'rename': (-signal.SIGKILL,),
                'stop': (130, -signal.SIGTERM), 'full disk': (2,)}[name]  # before training: as any program
    output = Path('output').read_text()
    assert code in (0, *expected), f'{name}: exit code {code}\n{output}'
    assert 'Traceback' not in output, f'{name}:\n{output}'
    assert code != 2 or output.splitlines()[-1].startswith('error: '), f'{name}:\n{output}'
    return name, code


# ----------------------------------------------------------------------------------------------------------------------
# comparing

def contents(out_dir):
    """All that a finished run leaves, but for time and names: tensors, and everything else."""
    last, best = (checkpoint.load(f'{out_dir}/{name}.pt') for name in ('last', 'ckpt'))
    lines = [json.loads(line) for line in Path(out_dir, 'log.jsonl').read_text().splitlines()]
    told = [{key: value for key, value in entry.items() if key not in UNSAVED}
            for entry in (*lines, last['progress'], best['progress'])]
    return (last['model'], last['optimizer'], best['model']), told


def require_same(a, b):
    (tensors_a, told_a), (tensors_b, told_b) = contents(a), contents(b)
    torch.testing.assert_close(tensors_a, tensors_b, rtol=0, atol=0)
    assert told_a == told_b, next(f'{x} is not {y}' for x, y in zip(told_a, told_b) if x != y)


def campaign(s):
    os.makedirs('out', exist_ok=True)
    Path('text.txt').write_text(Path(tempfile.__file__).read_text()[:12000])
    started = time.perf_counter()
    assert ended(forked(training('out/whole'), 'output')) == 0, Path('output').read_text()
    duration = time.perf_counter() - started
    rng, counts, inside, runs = random.Random(s.seed), Counter(), 0, 0
    while counts.total() < s.accidents:
        shutil.rmtree('out/run', ignore_errors=True)
        code = None
        while code != 0 or checkpoint.load('out/run/last.pt')['progress']['iter'] < TRAIN['max_iters']:
            if counts.total() < s.accidents:
                name, code = accident(rng, training('out/run'), duration)
                counts[name if code else f'{name} (saved, or came too late)'] += 1
            else:
                code = ended(forked(training('out/run'), 'output'))
            inside += any(Path('out/run').glob('*.tmp'))
            for path in Path('out/run').glob('*.pt'):
                checkpoint.load(path)
        require_same('out/whole', 'out/run')
        runs += 1
        for aside in Path('out').glob('run.*'):
            shutil.rmtree(aside)
    for name, count in sorted(counts.items()):
        print(f'{count:5} {name}')
    print(f'{counts.total()} accidents, {inside} of them inside the writing of a file; seed {s.seed}: all {runs} runs '
          f'ended bit-identical to the undisturbed one, {time.perf_counter() - started:.0f} s')


def main(argv):
    s = configure(KillSettings, argv)
    with tempfile.TemporaryDirectory(dir=s.folder or None) as folder:
        os.chdir(folder)
        try:
            campaign(s)
        finally:
            os.chdir('/')


if __name__ == '__main__':
    run(main)
