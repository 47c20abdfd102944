"""Settings from configs and flags: what is accepted, in which order, and what is said otherwise."""
import ast
import io
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
from conftest import ROOT

from configurator import UserError, check, class_name, configs_of, configure, find_class, run
from model import BitSkip

@dataclass
class Settings:
    """One of each type."""
    n_embd: int = 8  # width
    ffn_dim: int = 32  # inner width
    rate: float = 0.5  # learning rate, per step
    compile: bool = False  # torch.compile
    name: str = ''  # of the run
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of matrix products
    top_k: int | None = None  # candidates

    def __post_init__(self):
        check(self, {'n_embd': (1, 64)})

@pytest.fixture
def config(tmp_path):
    """config('a = 1', ...): the path of a config file with these lines."""
    def write(*lines, name='config.py'):
        (tmp_path / name).write_text('\n'.join(lines) + '\n')
        return str(tmp_path / name)
    return write

def error_of(*argv, base=None):
    with pytest.raises(UserError) as error:
        configure(Settings, argv, base)
    return str(error.value)

@pytest.mark.parametrize('argv, name, value', [
    (['--n_embd=16'], 'n_embd', 16), (['--n_embd', '16'], 'n_embd', 16),
    (['--n-embd=16'], 'n_embd', 16), (['--rate=1e-3'], 'rate', 1e-3), (['--rate=2'], 'rate', 2.0),
    (['--rate', '-.5'], 'rate', -0.5), (['--name=a=b'], 'name', 'a=b'), (['--name='], 'name', ''),
    (['--name', 'two words'], 'name', 'two words'), (['--name=12'], 'name', '12'),
    (['--dtype', 'bfloat16'], 'dtype', 'bfloat16'), (['--top_k=5'], 'top_k', 5),
    (['--top_k=5', '--top_k=none'], 'top_k', None), (['--compile'], 'compile', True),
    (['--compile', '--n_embd=16'], 'compile', True), (['--compile=false'], 'compile', False)])
def test_flags(argv, name, value):
    result = getattr(configure(Settings, argv), name)
    assert result == value and type(result) is type(value)

def test_files_run_in_order_and_see_the_settings_so_far(config):
    first = config('n_embd = 16', 'name = "first"')
    second = config('import math', '_width = n_embd', 'ffn_dim = 4 * n_embd',
                    'rate = 1 / math.sqrt(_width)', 'name += " and second"', name='second.py')
    s = configure(Settings, [first, second])
    assert s == Settings(n_embd=16, ffn_dim=64, rate=0.25, name='first and second')
    assert configure(Settings, [second, first]).ffn_dim == 32  # 4 * 8, before n_embd is set
    assert configure(Settings, [second], {'n_embd': 4, 'top_k': 3}) == Settings(
        n_embd=4, ffn_dim=16, rate=0.5, name=' and second', top_k=3)

def test_flags_come_on_top_of_files_wherever_they_stand(config):
    """The docstring's promise: `train.py --seed=3 config/cpu.py` is seed 3, whatever it says. And
    `--dataset code.py` was run as a config, and named the folder of the run."""
    path = config('n_embd = 16', 'rate = 1')
    for argv in ([path, '--n_embd=4'], ['--n_embd', '4', path], ['--n_embd=4', path]):
        assert configure(Settings, argv) == Settings(n_embd=4, rate=1.0)
    assert configure(Settings, ['--compile', path]) == Settings(n_embd=16, rate=1.0, compile=True)
    for argv in ([path, '--name', 'code.py'], ['--name=code.py', path]):
        assert configs_of(Settings, argv) == [path]
        assert configure(Settings, argv) == Settings(n_embd=16, rate=1.0, name='code.py')

@pytest.mark.parametrize('argv, expected', [
    (['--n_emb=4'], '--n_emb: there is no such setting; did you mean n_embd'),
    (['--xyzzy=4'], 'did you mean --help?'), (['--n_embd=1.5'], 'expected int, got 1.5'),
    (['--rate=fast'], "expected float, got 'fast'"), (['--rate=nan'], '--rate: expected float'),
    (['--dtype=float16'], "expected Literal['float32', 'bfloat16'], got 'float16'"),
    (['--top_k=many'], "--top_k: expected int | None, got 'many'"),
    (['--n_embd=99999999999999999999'], '--n_embd: expected int'),
    (['--n_embd=65'], 'n_embd is 1 to 64, got 65'), (['--n_embd'], '--n_embd needs a value'),
    (['--name', '--compile'], '--name needs a value'),
    (['n_embd=4'], "config 'n_embd=4': FileNotFoundError")], ids=str)
def test_wrong_flags(argv, expected):
    assert expected in error_of(*argv)

@pytest.mark.parametrize('line, expected', [
    ('n_emb = 4', 'n_emb: there is no such setting'), ('n_embd = "4"', "expected int, got '4'"),
    ('n_embd = (4', 'SyntaxError'), ('n_embd = width', "name 'width' is not defined")])
def test_wrong_config_files(config, line, expected):
    path = config('rate = 0.1', line)
    assert path in error_of(path) and expected in error_of(path)

@pytest.mark.parametrize('key, value', [
    ('n_embd', 8.0), ('n_embd', True), ('rate', float('nan')), ('name', 'a\0b'), ('name', None),
    ('dtype', 1), ('top_k', '5'), ('compile', 0), ('n_layers', 1), ('n_embd', [4])], ids=str)
def test_the_settings_of_a_checkpoint_are_checked_like_all_others(key, value):
    """They were trusted: a width of 8.0 ended in a traceback far away."""
    assert f'saved {key}: ' in error_of(base={key: value})
    if key != 'n_layers':
        with pytest.raises(UserError, match=f'^{key}: expected'):
            Settings(**{key: value})

@pytest.mark.parametrize('name', ['model', 'model:', 'model:Nothing', 'model:BitSkipConfig',
                                  'antigravity:x', '/tmp/model:BitSkip', '..model:BitSkip'])
def test_classes_by_name(name):
    """Of other modules, which a stranger's checkpoint may name, nothing is even imported."""
    assert find_class(class_name(BitSkip), BitSkip) is BitSkip
    with pytest.raises(ValueError, match=f"'{name}' is no module:Class of this folder: "):
        find_class(name, BitSkip)
    assert 'antigravity' not in sys.modules
    with pytest.raises(ValueError, match='there is no .*median.py'):  # not: issubclass() arg 1 ...
        find_class('median:Median', BitSkip)

# ---- a script's end ----

SCRIPT = """
import errno
from dataclasses import dataclass
from configurator import class_name, configure, run

@dataclass
class Settings:
    case: str = ''  # what happens

def main(argv):
    case = configure(Settings, argv).case
    if case == 'full': raise OSError(errno.ENOSPC, 'No space left on device', 'ckpt.pt')
    if case == 'interrupt': raise KeyboardInterrupt
    if case == 'memory': bytearray(2 ** 60)
    if case == 'bug': raise ValueError('a bug')
    if case == 'name': print(class_name(Settings).endswith('script:Settings'))
    for _ in range(100_000 if case == 'print' else 1):
        print('text')
    open('done', 'w')

run(main)
"""

@pytest.mark.parametrize('case, shell, code, out, err', [
    ('', '', 0, 'text\n', ''), ('name', '', 0, 'True\ntext\n', ''), ('interrupt', '', 130, '', ''),
    ('full', '', 2, '', "error: [Errno 28] No space left on device: 'ckpt.pt'\n"),
    ('memory', '', 2, '', 'error: out of memory: this machine has too little; try a smaller batch '
     'or model\n'), ('', '>&-', 0, '', ''), ('', '2>&-', 0, 'text\n', ''),
    ('print', '| head -1', 141, 'text\n', '')])
def test_run_ends_in_one_sentence_and_no_traceback(tmp_path, case, shell, code, out, err):
    """A reader that has gone (head) ends a script."""
    (tmp_path / 'script.py').write_text(SCRIPT)
    line = f'set -o pipefail; {sys.executable} script.py --case={case} {shell}'
    done = subprocess.run(['bash', '-c', line], cwd=tmp_path, text=True, capture_output=True,
                          env={'PYTHONPATH': str(ROOT), 'PATH': '/bin:/usr/bin'})
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)
    assert (tmp_path / 'done').exists() == (code == 0)

def test_run_where_stdout_is_replaced(monkeypatch):
    """A notebook's cannot be reconfigured. (And bugs are not hidden.)"""
    for replaced in (io.StringIO(), None):
        monkeypatch.setattr(sys, 'stdout', replaced)
        run(lambda argv: print('text'))
        with pytest.raises(ZeroDivisionError):
            run(lambda argv: 1 / 0)

def test_python_310_can_read_all_files():
    for path in [*ROOT.glob('*.py'), *ROOT.glob('[a-z]*/**/*.py')]:
        ast.parse(path.read_text(encoding='utf-8'), feature_version=(3, 10))
