"""Settings from config files and flags: what is accepted, in which order, and what is said about everything else."""
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from configurator import UserError, configure

ROOT = Path(__file__).parent.parent


@dataclass
class Base:
    """The first group."""
    n_embd: int = 8  # width
    ffn_dim: int = 32  # inner width


@dataclass
class Settings(Base):
    """The second group."""
    rate: float = 0.5  # learning rate, per step
    compile: bool = False  # torch.compile
    name: str = ''  # of the run
    dtype: Literal['float32', 'bfloat16'] = 'float32'  # of matrix products
    top_k: int | None = None  # candidates


@pytest.fixture
def config(tmp_path):
    """config('a = 1', ...): the path of a config file with these lines."""
    def write(*lines, name='config.py'):
        (tmp_path / name).write_text('\n'.join(lines) + '\n')
        return str(tmp_path / name)
    return write


def error_of(*argv):
    with pytest.raises(UserError) as error:
        configure(Settings, argv)
    return str(error.value)


# --------------------------------------------------------------------------------------------------------------------
# what is accepted

def test_defaults():
    assert configure(Settings, []) == Settings()


@pytest.mark.parametrize('argv, name, value', [
    (['--n_embd=16'], 'n_embd', 16), (['--n_embd', '16'], 'n_embd', 16), (['--n-embd=16'], 'n_embd', 16),
    (['--rate=1e-3'], 'rate', 1e-3), (['--rate=2'], 'rate', 2.0), (['--rate', '-1'], 'rate', -1.0),
    (['--name=a=b'], 'name', 'a=b'), (['--name='], 'name', ''), (['--name', 'two words'], 'name', 'two words'),
    (['--name=12'], 'name', '12'), (['--dtype=bfloat16'], 'dtype', 'bfloat16'),
    (['--dtype', 'bfloat16'], 'dtype', 'bfloat16'), (['--top_k=5'], 'top_k', 5),
    (['--top_k=5', '--top_k=none'], 'top_k', None), (['--compile'], 'compile', True),
    (['--compile', '--n_embd=16'], 'compile', True), (['--n_embd=16', '--n_embd=4'], 'n_embd', 4)])
def test_flags(argv, name, value):
    result = getattr(configure(Settings, argv), name)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize('text, value', [
    ('true', True), ('True', True), ('yes', True), ('on', True), ('1', True),
    ('false', False), ('False', False), ('no', False), ('OFF', False), ('0', False)])
def test_bool_spellings(text, value):
    for argv in ([f'--compile={text}'], ['--compile', text]):
        assert configure(Settings, ['--compile', *argv]).compile is value


def test_files_run_in_order_and_see_the_settings_so_far(config):
    first = config('n_embd = 16', 'name = "first"')
    second = config('import math', '_width = n_embd', 'ffn_dim = 4 * n_embd', 'rate = 1 / math.sqrt(_width)',
                    'name += " and second"', name='second.py')
    s = configure(Settings, [first, second])
    assert s == Settings(n_embd=16, ffn_dim=64, rate=0.25, name='first and second')
    assert configure(Settings, [second, first]).ffn_dim == 32  # 4 * 8, before n_embd is set


def test_flags_come_on_top_of_files(config):
    path = config('n_embd = 16', 'rate = 0.1')
    assert configure(Settings, [path, '--n_embd=4']) == Settings(n_embd=4, rate=0.1)


def test_flags_come_on_top_of_files_wherever_they_stand(config):
    """The docstring's promise: `train.py --seed=3 config/cpu.py` is seed 3, whatever config/cpu.py says."""
    path = config('n_embd = 16', 'rate = 0.1')
    assert configure(Settings, ['--n_embd=4', path]) == Settings(n_embd=4, rate=0.1)


def test_a_bare_bool_may_stand_before_a_config_file(config):
    path = config('n_embd = 16')
    assert configure(Settings, ['--compile', path]) == Settings(n_embd=16, compile=True)


def test_base_takes_the_place_of_the_defaults(config):
    base, path = {'n_embd': 2, 'rate': 0.25}, config('ffn_dim = 3 * n_embd')
    assert configure(Settings, [path, '--rate=1'], base) == Settings(n_embd=2, ffn_dim=6, rate=1.0)
    assert base == {'n_embd': 2, 'rate': 0.25}


def test_int_is_a_fine_float_in_a_file(config):
    rate = configure(Settings, [config('rate = 1')]).rate
    assert rate == 1.0 and type(rate) is float
    assert configure(Settings, [config('top_k = None')]).top_k is None


def test_argv_is_left_alone():
    argv = ['--n_embd', '16']
    configure(Settings, argv)
    assert argv == ['--n_embd', '16']


# --------------------------------------------------------------------------------------------------------------------
# what is not

@pytest.mark.parametrize('argv, expected', [
    (['--n_emb=4'], "unknown setting 'n_emb'; did you mean n_embd"),
    (['--xyzzy=4'], "unknown setting 'xyzzy'; --help lists them all"),
    (['--n_embd=big'], "--n_embd: expected a whole number, got 'big'"),
    (['--n_embd=1.5'], "--n_embd: expected a whole number, got '1.5'"),
    (['--n_embd=true'], "--n_embd: expected a whole number, got 'true'"),
    (['--rate=fast'], "--rate: expected a number, got 'fast'"),
    (['--compile=maybe'], "--compile: expected True or False, got 'maybe'"),
    (['--dtype=float16'], "--dtype: expected one of 'float32', 'bfloat16', got 'float16'"),
    (['--top_k=many'], "--top_k: expected a whole number or None, got 'many'"),
    (['--n_embd=none'], "--n_embd: expected a whole number, got 'none'"),
    (['--n_embd'], '--n_embd needs a value'), (['--n_embd', '--compile'], '--n_embd needs a value'),
    (['n_embd=4'], "'n_embd=4' is neither a flag (--key=value) nor a config file (*.py)"),
    (['-n_embd=4'], "'-n_embd=4' is neither a flag")], ids=str)
def test_wrong_flags(argv, expected):
    assert expected in error_of(*argv)


@pytest.mark.parametrize('line, expected', [
    ('n_emb = 4', "unknown setting 'n_emb'; did you mean n_embd"),
    ('n_embd = "4"', "n_embd: expected a whole number, got '4'"),
    ('n_embd = 4.0', 'n_embd: expected a whole number, got 4.0'),
    ('n_embd = True', 'n_embd: expected a whole number, got True'),  # bool is not int...
    ('rate = True', 'rate: expected a number, got True'),  # ...nor float...
    ('compile = 1', 'compile: expected True or False, got 1'),  # ...and int is not bool
    ('n_embd = None', 'n_embd: expected a whole number, got None'),
    ('name = 5', 'name: expected a string, got 5'),
    ('dtype = "float16"', "dtype: expected one of 'float32', 'bfloat16', got 'float16'"),
    ('top_k = "5"', "top_k: expected a whole number or None, got '5'"),
    ('n_embd = [4]', 'n_embd: expected a whole number, got [4]'),
    ('n_embd = [10 ** 5000]', 'n_embd: expected a whole number, got a number of thousands of digits'),
    ('n_embd = 10 ** 5000', 'n_embd: a whole number has 63 bits here, this one 16610'),
    ('rate = 10 ** 5000', 'rate: a whole number has 63 bits here'),
    ('name = "a\\0"', "name: expected a string, got 'a\\x00'"),
    ('n_embd = (4', 'SyntaxError'), ('n_embd = 1 / 0', 'ZeroDivisionError'),
    ('n_embd = width', "name 'width' is not defined"), ('raise SystemError("no")', 'no')])
def test_wrong_config_files(config, line, expected):
    path = config('rate = 0.1', line)
    assert error_of(path).startswith(path) and expected in error_of(path)


def test_missing_config_file_names_the_nearest(tmp_path, monkeypatch):
    (tmp_path / 'config').mkdir()
    (tmp_path / 'config' / 'bitskip_h_ee.py').touch()
    monkeypatch.chdir(tmp_path)
    assert error_of('config/bitskip_hee.py') == \
        'no config file config/bitskip_hee.py; did you mean config/bitskip_h_ee.py?'
    assert error_of('config/unlike.py') == 'no config file config/unlike.py'
    monkeypatch.chdir(tmp_path / 'config')  # where there is no folder config
    assert error_of('bitskip_hee.py').startswith('no config file bitskip_hee.py')


def test_a_folder_is_not_a_config_file(tmp_path):
    (tmp_path / 'folder.py').mkdir()
    assert 'no config file' in error_of(str(tmp_path / 'folder.py'))


# --------------------------------------------------------------------------------------------------------------------
# --help, and a script's end

def train_settings():
    return pytest.importorskip('train').TrainSettings


@pytest.mark.parametrize('flag', ['--help', '-h'])
@pytest.mark.parametrize('get_class', [lambda: Settings, train_settings], ids=['small', 'train'])
def test_help_lists_every_field_with_default_and_comment(get_class, flag, capsys):
    cls = get_class()
    with pytest.raises(SystemExit) as end:
        configure(cls, ['--n_embd=4', flag])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith('usage: python ')
    entries = {line.split('=')[0].strip(): line for line in text.splitlines() if line.startswith('  --')}
    assert set(entries) == {f'--{field.name}' for field in fields(cls)}
    for field in fields(cls):
        flag_and_default, comment = entries[f'--{field.name}'].split(None, 1)
        assert comment and eval(flag_and_default.split('=', 1)[1]) == field.default


def test_help_shows_docstrings_in_order(capsys):
    with pytest.raises(SystemExit):
        configure(Settings, ['--help'])
    text = capsys.readouterr().out
    parts = ['The first group.', '--n_embd=8', 'width', 'The second group.', '--rate=0.5', 'learning rate, per step']
    assert [text.index(part) for part in parts] == sorted(text.index(part) for part in parts)


@pytest.mark.parametrize('columns, widest', [(80, 80), (300, 100)])
def test_help_fits_the_terminal_and_lists_choices(columns, widest, capsys, monkeypatch):
    """It was 100 columns wide on any terminal, and did not say what --dtype could be."""
    monkeypatch.setenv('COLUMNS', str(columns))
    with pytest.raises(SystemExit):
        configure(train_settings(), ['--help'])
    lines = capsys.readouterr().out.splitlines()
    assert widest - 3 <= max(map(len, lines)) <= widest
    assert '{fp | bitlinear | hbitlinear | hadamard_after}' in ' '.join(' '.join(lines).split())


SCRIPT = """
import sys
from dataclasses import dataclass
from configurator import configure, run

@dataclass
class Settings:
    n_embd: int = 8  # width

def main(argv):
    s = configure(Settings, argv)
    if s.n_embd == 1:
        open('/no/such/folder/file')
    if s.n_embd == 2:
        raise KeyboardInterrupt
    if s.n_embd == 3:
        raise ValueError('a bug')
    for _ in range(100_000 if s.n_embd == 4 else 1):
        print(s.n_embd)

run(main)
"""


@pytest.fixture
def script(tmp_path):
    """script(*argv): a finished process of a script that ends by run(main)."""
    (tmp_path / 'script.py').write_text(SCRIPT)

    def start(*argv):
        return subprocess.Popen([sys.executable, tmp_path / 'script.py', *argv], cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={'PYTHONPATH': str(ROOT)})

    def finish(*argv):
        process = start(*argv)
        out, err = process.communicate()
        return process.returncode, out, err
    finish.start = start
    return finish


@pytest.mark.parametrize('argv, code, out, err', [
    (['--n_embd=16'], 0, '16\n', ''),
    (['--n_emb=16'], 2, '', "error: unknown setting 'n_emb'; did you mean n_embd?\n"),
    (['--n_embd=x'], 2, '', "error: --n_embd: expected a whole number, got 'x'\n"),
    (['--n_embd=1'], 2, '', 'error: No such file or directory: /no/such/folder/file\n'),
    (['--n_embd=2'], 130, '', '')], ids=str)
def test_run_ends_in_one_sentence_and_no_traceback(script, argv, code, out, err):
    assert script(*argv) == (code, out, err)


def test_run_does_not_hide_bugs(script):
    code, _, err = script('--n_embd=3')
    assert code == 1 and 'Traceback' in err and 'a bug' in err


def test_run_is_quiet_when_its_reader_goes_away(script):
    """python eval.py | head"""
    process = script.start('--n_embd=4')
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == '' and process.wait() == 0
    process.stderr.close()
