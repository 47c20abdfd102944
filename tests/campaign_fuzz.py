"""
Whatever comes from outside may be broken, or made to break: thousands of damaged inputs, each in a process of its own.

    python tests/campaign_fuzz.py                                    3,000 cases
    python tests/campaign_fuzz.py --cases=1 --seed=1234 --verbose    case 1234 again, and what it prints
    python tests/campaign_fuzz.py --targets=pickle,flags

A small trained run is copied, one thing in it is broken, and a script is called on it. It has to end by itself with
exit code 0, or with 2 and one sentence on stderr, within a limit on time and memory, and no code out of a checkpoint
may have run. What is broken:

    meta, tokens, text, log, config      bytes: bits flipped, pieces cut out, doubled, overwritten, numbers made huge
    ckpt, last, packed                   the same in checkpoints
    values                               one value in a checkpoint replaced: another type, another shape, NaN, missing
    pickle                               a checkpoint that runs code when unpickled, or inflates to gigabytes
    flags, settings                      a value that a flag or a config file should not have
    prompt                               bytes of any kind, from a flag, a file or stdin
"""
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import typing
import warnings
import zipfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  (imported once, before the forks)
import torch

from campaign_kill import TRAIN, ended, forked, script

import eval_exits
import export_gguf
import pack
import prepare
import sample
import train
from configurator import configure, run

CPU_SECONDS, SECONDS, MEMORY = 60, 600, 1 << 30  # a case may take so long, and so much more memory than its parent has
TRAINING = [f'--{key}={value}' for key, value in (TRAIN | dict(max_iters=2, eval_interval=2)).items()]
NUMBERS = [-1, 0, 1, 2, 3, 7, 255, 256, 65537, 2 ** 31, 2 ** 63, 10 ** 30, -10 ** 30, 10 ** 4000, 0.5, -0.0, 1e-320,
           1e308, float('inf'), float('-inf'), float('nan')]
TEXTS = ['', ' ', 'x', '0', 'None', 'é😀', '\u202e\u0000', '\ud800', 'a' * 10000, '\n', '%s%n', '{}', '.', 'out',
         'bytes', 'meta', 'cuda:99', 'cpu:7', 'out/run', 'text.txt', 'data']


@dataclass
class FuzzSettings:
    """Calls the scripts with broken inputs."""
    cases: int = 3000  # how many
    seed: int = 1  # of the first case; case i has seed + i
    targets: str = ''  # what to break, separated by commas; empty: everything in turn
    verbose: bool = False  # show the output of every case


# ----------------------------------------------------------------------------------------------------------------------
# breaking things

def broken_bytes(rng, data):
    """`data` with one to three things done to it."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = damaged(rng, data)
    return data


def damaged(rng, data):
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    small = data[a:min(b, a + 40)]
    return rng.choice([
        lambda: data[:a],
        lambda: data[:a] + data[b:],
        lambda: data[:a] + small + data[a:],
        lambda: data[:a] + bytes(len(small)) + data[a + len(small):],
        lambda: data[:a] + rng.randbytes(len(small)) + data[a + len(small):],
        lambda: flipped(rng, data),
        lambda: flipped(rng, data),
        lambda: re.sub(rb'\d+', lambda _: str(rng.choice(NUMBERS)).encode(), data, count=rng.randint(1, 4)),
        lambda: rng.choice([b'', b'\0', b'\xff\xfe', b'[' * 100000, rng.randbytes(rng.randrange(5000))]),
    ])()


def flipped(rng, data):
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def any_value(rng):
    return rng.choice([
        lambda: rng.choice(NUMBERS), lambda: rng.choice(NUMBERS), lambda: rng.choice(TEXTS),
        lambda: rng.choice([None, True, False, (), [], {}, [1], {'a': 1}, (1, 2), b'x']),
        lambda: torch.full((rng.choice([0, 1, 5]), 3), rng.choice([0.0, 1e30, float('nan')])),
        lambda: torch.zeros(1).expand(1 << 40), lambda: torch.tensor(rng.randrange(200), dtype=torch.uint8)])()


def break_value(rng, tree):
    """Replace, rename or delete something at random in nested dicts and lists; a tensor may also get other numbers."""
    while True:
        keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        if not isinstance(tree[key], (dict, list)) or not tree[key] or rng.random() < 0.1:
            break
        tree = tree[key]
    old, what = tree[key], rng.choice(['replace', 'replace', 'replace', 'delete', 'rename'])
    if torch.is_tensor(old) and rng.random() < 0.5:
        tree[key] = rng.choice([
            lambda: old * float('nan'), lambda: old[..., :-1], lambda: old[None], lambda: old.to('meta'), lambda: -old,
            lambda: old.to(torch.complex64), lambda: old.to(torch.int8), lambda: old.float().to_sparse(),
            lambda: old.float() * 1e38])() if old.dim() else -old
    elif what == 'replace' or isinstance(tree, list):
        tree[key] = any_value(rng)
    else:
        del tree[key]
        if what == 'rename':
            tree[rng.choice([str(key) + 'x', 7, None])] = old


class Bomb:
    """Runs code when it is unpickled: it makes the folder 'exploded', in one of several ways."""

    def __init__(self, rng):
        self.reduced = rng.choice([
            (os.mkdir, ('exploded',)), (os.system, ('mkdir exploded',)), (torch.hub.os.mkdir, ('exploded',)),
            (eval, ('__import__("os").mkdir("exploded")',)), (exec, ('import os; os.mkdir("exploded")',)),
            (partial, (os.mkdir, 'exploded')), (map, (os.mkdir, ['exploded']))])

    def __reduce__(self):
        return self.reduced


def overwrite(path, change):
    Path(path).write_bytes(change(Path(path).read_bytes()))


# ----------------------------------------------------------------------------------------------------------------------
# targets: each breaks something in the current folder, a copy of the run's, and returns (main, arguments, stdin)

def reader(rng, name='ckpt.pt'):
    """A script that reads the checkpoint `name`, and the data."""
    if name == 'last.pt':
        return train.main, [*TRAINING, '--out_dir=out/run', '--init_from=resume', '--max_iters=6'], b''
    if name == 'packed.pt' or rng.random() < 0.5:
        options = ['--packed=False'], ['--exit_mode=gate'], ['--exit_layer=0'], ['--draft_layer=1'], []
        return sample.main, [f'--checkpoint={name}', '--max_new_tokens=9', '--prompt=def', *rng.choice(options)], b''
    return rng.choice([(pack.main, [], b''), (export_gguf.main, [], b''),
                       (train.main, [*TRAINING, '--out_dir=out/new', '--init_from=out/run'], b''),
                       (eval_exits.main, [], b'')])


def data_reader(rng):
    return rng.choice([(train.main, [*TRAINING, '--out_dir=out/new'], b''), reader(rng, 'last.pt'),
                       (pack.main, [], b''), (prepare.main, ['--dataset=text.txt', '--tokenizer=bytes'], b'')])


def break_meta(rng):
    path = 'data/text-bytes/meta.json'
    if rng.random() < 0.5:
        overwrite(path, partial(broken_bytes, rng))
    else:
        meta = json.loads(Path(path).read_text())
        break_value(rng, meta)
        Path(path).write_text(json.dumps(meta, default=str))
    return data_reader(rng)


def break_tokens(rng):
    overwrite(f'data/text-bytes/{rng.choice(["train", "val"])}.bin', partial(broken_bytes, rng))
    return data_reader(rng)


def break_text(rng):
    overwrite('text.txt', partial(broken_bytes, rng))
    return data_reader(rng)


def break_log(rng):
    overwrite('out/run/log.jsonl', partial(broken_bytes, rng))
    return reader(rng, 'last.pt')


def break_config(rng):
    overwrite('config.py', partial(broken_bytes, rng))
    return train.main, ['config.py', *TRAINING[:-4], '--out_dir=out/new'], b''


def break_file(name, rng):
    overwrite(f'out/run/{name}', partial(broken_bytes, rng))
    return reader(rng, name)


def break_values(rng):
    name = rng.choice(['ckpt.pt', 'last.pt', 'packed.pt'])
    saved = torch.load(f'out/run/{name}')
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        break_value(rng, saved)
    torch.save(saved, f'out/run/{name}')
    return reader(rng, name)


def break_pickle(rng):
    name = rng.choice(['ckpt.pt', 'last.pt', 'packed.pt'])
    path, saved = f'out/run/{name}', torch.load(f'out/run/{name}')
    if rng.random() < 0.2:  # as much as the memory may not hold, deflated
        with zipfile.ZipFile(path) as old, zipfile.ZipFile('bomb', 'w', zipfile.ZIP_DEFLATED) as new:
            record = rng.choice(old.namelist())
            for each in old.namelist():
                with new.open(each, 'w') as file:
                    file.write(old.read(each))
                    for _ in range(300 if each == record else 0):
                        file.write(bytes(1 << 22))
        os.replace('bomb', path)
        return reader(rng, name)
    tree = saved
    while rng.random() < 0.6 and isinstance(tree, dict) and any(isinstance(value, dict) for value in tree.values()):
        tree = rng.choice([value for value in tree.values() if isinstance(value, dict)])
    tree[rng.choice([*tree, 'new'])] = Bomb(rng)
    with open(path, 'wb') as file:
        if rng.random() < 0.7:
            torch.save(saved, file, _use_new_zipfile_serialization=rng.random() < 0.8)
        else:
            pickle.dump(saved, file, protocol=rng.randrange(6))
    return reader(rng, name)


def setting(rng):
    """A script with short work to do, and a setting of its."""
    main, kind, flags = rng.choice([
        (train.main, train.TrainSettings, [*TRAINING, '--out_dir=out/new']),
        (train.main, train.TrainSettings, [*TRAINING, '--out_dir=out/new']),
        (sample.main, sample.SampleSettings, ['--max_new_tokens=9', '--prompt=def']),
        (eval_exits.main, eval_exits.EvalSettings, []), (pack.main, pack.PackSettings, []),
        (export_gguf.main, export_gguf.ExportSettings, []),
        (prepare.main, prepare.Settings, ['--dataset=text.txt', '--tokenizer=bytes'])])
    long_work = {'max_iters', 'gradient_accumulation_steps', 'max_new_tokens', 'speculate', 'compile'}  # on purpose
    name = rng.choice([name for name in typing.get_type_hints(kind) if name not in long_work])
    return main, flags, name


def break_flags(rng):
    main, flags, name = setting(rng)
    value = rng.choice([str(rng.choice(NUMBERS)), rng.choice(TEXTS)]).replace('\0', '')  # (no argument has one)
    if rng.random() < 0.1:
        name = rng.choice(TEXTS).replace('\0', '')
    return main, flags + rng.choice([[f'--{name}={value}'], [f'--{name}', value], [f'--{name}'], [value]]), b''


def break_settings(rng):
    main, flags, name = setting(rng)
    flags = [flag for flag in flags if not flag.startswith(f'--{name}=')]
    value = rng.choice([any_value(rng), rng.choice(NUMBERS), rng.choice(TEXTS)])
    text = (f'float("{value}")' if isinstance(value, float) else
            '__import__("torch").ones(2, 3)' if torch.is_tensor(value) else repr(value))
    Path('broken.py').write_text(f'{name} = {text}\n')
    return main, ['broken.py', *flags], b''


def break_prompt(rng):
    data = rng.choice([rng.randbytes(rng.randrange(1, 200)), rng.choice(TEXTS).encode(errors='surrogatepass'),
                       'naïve 日本 😀 \u202e'.encode(), b'\0', bytes(rng.randrange(100000))])
    where = rng.choice(['flag', 'file', 'stdin'])
    flags = ['--max_new_tokens=9']
    if where == 'flag':
        return sample.main, [*flags, f'--prompt={os.fsdecode(data)}'.replace('\0', '')], b''
    Path('prompt').write_bytes(data)
    return sample.main, [*flags, f'--prompt_file={"-" if where == "stdin" else "prompt"}'], data


TARGETS = {'meta': break_meta, 'tokens': break_tokens, 'text': break_text, 'log': break_log, 'config': break_config,
           'ckpt': partial(break_file, 'ckpt.pt'), 'last': partial(break_file, 'last.pt'),
           'packed': partial(break_file, 'packed.pt'), 'values': break_values, 'pickle': break_pickle,
           'flags': break_flags, 'settings': break_settings, 'prompt': break_prompt}


# ----------------------------------------------------------------------------------------------------------------------
# one case

def case(target, seed):
    """Break and call: runs in a child process, in a copy of the run's folder."""
    rng = random.Random(seed)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        main, argv, stdin = TARGETS[target](rng)
    Path('stdin').write_bytes(stdin)
    os.dup2(os.open('stdin', os.O_RDONLY), 0)
    sys.stdin = open(0, encoding='utf-8')
    sys.stderr.flush()
    print('>', argv)
    os.dup2(os.open('errors', os.O_WRONLY | os.O_CREAT), 2)
    in_use = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    signal.alarm(SECONDS)
    script(main, *argv)


def verdict(code, errors):
    """What is wrong with how a case ended; '' if nothing is."""
    if code not in (0, 2):
        return f'ended with {code if code >= 0 else signal.Signals(-code).name}'
    if os.path.exists('exploded'):
        return 'ran code from a checkpoint'
    if 'Traceback' in errors:
        return 'a traceback'
    if code == 2 and not re.fullmatch(r'error: [^\n]{9,600}\n', errors):
        return 'not one clear sentence'
    return ''


def base(folder):
    """The run that all cases are copies of."""
    os.chdir(folder)
    Path('text.txt').write_text(Path(tempfile.__file__).read_text()[:12000])
    Path('config.py').write_text('# an é\nn_layer, p_max = 3, 0.5\nffn_dim = 4 * n_layer\n_x = "x"\nffn = "swiglu"\n')
    flags = [f'--{key}={value}' for key, value in (TRAIN | dict(max_iters=4)).items()]
    for main, argv in ((train.main, [*flags, '--out_dir=out/run']), (pack.main, []),
                       (sample.main, ['--max_new_tokens=3'])):  # the last compiles native.c
        code = ended(forked(partial(script, main, *argv), 'output'))
        assert code == 0, Path('output').read_text()


def campaign(s, folder):
    base(f'{folder}/base')
    names, counts, failures, started = s.targets.split(',') if s.targets else list(TARGETS), Counter(), [], time.time()
    for seed in range(s.seed, s.seed + s.cases):
        target = names[seed % len(names)]
        shutil.copytree(f'{folder}/base', f'{folder}/case')
        os.chdir(f'{folder}/case')
        code = ended(forked(partial(case, target, seed), 'output'))
        errors = Path('errors').read_text(errors='replace') if os.path.exists('errors') else ''
        output = Path('output').read_text(errors='replace')
        wrong = verdict(code, errors) if os.path.exists('errors') else f'the case itself failed: {output}'
        counts[target, 'answered' if code == 0 else 'refused' if code == 2 else 'failed'] += 1
        if wrong or s.verbose:
            errors = errors if len(errors) < 1500 else f'{errors[:200]}\n  ...{errors[-1300:]}'
            print(f'{target}, seed {seed}: {wrong or "fine"}\n  {output[:400]}\n  {errors}', flush=True)
        if wrong:
            failures.append(seed)
        os.chdir(folder)
        shutil.rmtree(f'{folder}/case')
    for name in names:
        print(f'{name:10} {counts[name, "answered"]:5} went well, {counts[name, "refused"]:5} refused in one sentence')
    print(f'{s.cases} cases from seed {s.seed} on, {time.time() - started:.0f} s, {len(failures)} failures',
          *failures)
    return not failures


def main(argv):
    s = configure(FuzzSettings, argv)
    os.environ |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_OFFLINE': '1'}  # a broken name downloads nothing
    with tempfile.TemporaryDirectory() as folder:
        os.mkdir(f'{folder}/base')
        fine = campaign(s, folder)
        os.chdir('/')
    if not fine:
        sys.exit(1)


if __name__ == '__main__':
    run(main)
