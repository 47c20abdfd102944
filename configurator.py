"""
Settings from Python files and flags, in the spirit of nanoGPT's configurator.

A script's settings are a dataclass, one commented line each:

    @dataclass
    class Settings:
        n_layer: int = 12      # number of blocks
        dtype: Literal['float32', 'bfloat16'] = 'float32'  # of matrix products

and `configure(Settings, sys.argv[1:])` fills one in from the command line:

    python train.py config/bitskip_h_ee.py config/cpu.py --seed=7 --compile

Config files are plain Python, run in order, each seeing the settings so far (`ffn_dim = 4 * n_embd` works; a name
of its own starts with an underscore). Flags come on top, wherever they stand. What differs from nanoGPT: a dataclass
instead of globals, so that the type of every value is checked against its annotation, and `--help` is generated from
the comments.
"""
import dataclasses
import difflib
import inspect
import os
import re
import reprlib
import shutil
import sys
import textwrap
import traceback
import types
import typing


BOOLS = {'true': True, 'yes': True, 'on': True, '1': True, 'false': False, 'no': False, 'off': False, '0': False}


class UserError(Exception):
    """A user's mistake, told in one sentence: what is wrong, and what to do about it."""


def run(main):
    """Call `main(argv)` as a script: a user's mistake ends in one sentence and exit code 2, never a traceback."""
    sys.stdout.reconfigure(errors='replace')  # text may hold what this terminal cannot show
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
    except BrokenPipeError:  # the reader of our output (head, less) has gone: not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # disk full, no permission: the system's own words are the clearest
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        fail('out of memory: this takes more than the machine has; a smaller batch or model may fit')
    except KeyboardInterrupt:
        sys.exit(130)


def is_out_of_memory(error):
    """Whether Python or torch, which has no class of its own for a CPU's memory, could not get what it asked for."""
    return isinstance(error, MemoryError) or bool(re.search('allocate memory|out of memory', str(error)))


def fail(message):
    text = ' '.join(str(message).split())
    print('error:', text if len(text) < 500 else f'{text[:300]} ... {text[-150:]}', file=sys.stderr)
    sys.exit(2)


def configure(cls, argv, base=None):
    """Settings of dataclass `cls` (starting from the dict `base`, if given), after the config files and flags in
    `argv`. Raises UserError on anything unknown, of the wrong type or not possible."""
    return build(cls, collect(cls, argv, base))


def collect(cls, argv, base=None):
    """The values for `configure` by name, each of its type, not yet checked together: dict. UserError on what is
    unknown or of the wrong type. `--help` prints all settings and exits."""
    if '--help' in argv or '-h' in argv:
        print(help_text(cls))
        sys.exit(0)
    hints = typing.get_type_hints(cls)
    values = {field.name: field.default for field in dataclasses.fields(cls)}
    for key, value in dict(base or {}).items():
        values[key] = convert(key, value, hints, where='saved settings: ')
    files, flags = split_arguments(argv, hints)
    for file in files:
        for key, value in read_config(file, values).items():
            values[key] = convert(key, value, hints, where=f'{file}: ')
    for key, text in flags:
        values[key] = convert(key, text, hints, where='--', from_text=True)
    return values


def build(cls, values):
    """The dataclass `cls` with these values. UserError if they are not possible."""
    try:
        return cls(**values)
    except ValueError as error:  # a value of the right type that is not possible
        raise UserError(str(error)) from None


def split_arguments(argv, hints):
    """Config files, and (key, text) of the flags --key=value, --key value, and --key alone for a bool."""
    files, flags, rest = [], [], list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith('--'):
            files.append(arg)
            continue
        key, equals, text = arg[2:].partition('=')
        key = key.replace('-', '_')
        require_known(key, hints)
        if not equals:
            follows = rest and not rest[0].startswith('--')
            if hints[key] is bool:
                text = rest.pop(0) if follows and rest[0].lower() in BOOLS else 'true'
            elif follows:
                text = rest.pop(0)
            else:
                raise UserError(f'--{key} needs a value: --{key}=...')
        flags.append((key, text))
    return files, flags


def read_config(path, values):
    """Run the config file at `path` with `values` as its globals; return the settings that it assigned."""
    if not path.endswith('.py'):
        raise UserError(f"'{path}' is neither a flag (--key=value) nor a config file (*.py)")
    if not os.path.isfile(path):
        here = os.listdir('config') if os.path.isdir('config') else []
        near = difflib.get_close_matches(os.path.basename(path), here, n=1)
        raise UserError(f'no config file {path}' + (f'; did you mean config/{near[0]}?' if near else ''))
    namespace = dict(values)
    try:
        with open(path, encoding='utf-8') as file:
            exec(compile(file.read(), path, 'exec'), namespace)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f'{path}, line {lines[-1]}' if lines else path
        raise UserError(f'{where}: not valid Python: {type(error).__name__}: {error}') from error
    assigned = {key: value for key, value in namespace.items()
                if not key.startswith('_') and not isinstance(value, types.ModuleType)
                and (key not in values or value is not values[key])}
    for key in assigned:
        require_known(key, values, where=f'{path}: ')
    return assigned


def require_known(key, values, where=''):
    if key not in values:
        near = difflib.get_close_matches(key, values, n=3, cutoff=0.5)
        raise UserError(f'{where}unknown setting {shown(key)}'
                        + (f"; did you mean {' or '.join(near)}?" if near else '; --help lists them all'))


def convert(key, value, hints, where='', from_text=False):
    """`value` of setting `key` in its annotated type, or a UserError that says what was expected."""
    hint = hints[key]
    choices = typing.get_args(hint)
    optional = type(None) in choices
    if typing.get_origin(hint) is typing.Literal:
        if value in choices:
            return value
        raise UserError(f"{where}{key}: expected one of {', '.join(map(repr, choices))}, got {shown(value)}")
    if optional:
        hint = next(choice for choice in choices if choice is not type(None))
        if value is None or (from_text and hint is not str and value.lower() in ('none', '')):
            return None
    if from_text and hint is bool:
        value = BOOLS.get(value.lower(), value)
    elif from_text and hint is not str:
        try:
            value = hint(value)
        except ValueError:
            pass
    if type(value) is int and abs(value) >= 2 ** 63:
        raise UserError(f'{where}{key}: a whole number has 63 bits here, this one {value.bit_length()}')
    if hint is float and type(value) is int:  # 1 is a fine way to write 1.0
        value = float(value)
    if type(value) is not hint or (hint is str and '\0' in value):
        kinds = {int: 'a whole number', float: 'a number', bool: 'True or False', str: 'a string'}
        raise UserError(f"{where}{key}: expected {kinds[hint]}{' or None' if optional else ''}, "
                        f'got {shown(value)}')
    return value


def shown(value):
    """A value as a message quotes it: not at any length."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not print numbers of more than 4,300 digits
        return 'a number of thousands of digits'


def help_text(cls):
    """Every setting of `cls` as `--name=default  comment {choice | choice}`, under the docstrings of the classes that
    define them. As wide as the terminal, but at most 100 columns."""
    width, hints = min(100, max(60, shutil.get_terminal_size().columns)), typing.get_type_hints(cls)
    lines = [f'usage: python {os.path.basename(sys.argv[0])} [config.py ...] [--setting=value ...]']
    for owner in reversed(cls.__mro__[:-1]):
        lines += ['', *textwrap.wrap(inspect.getdoc(owner), width)]
        for line in inspect.getsource(owner).splitlines():
            match = re.match(r'    (\w+): .+? = (.+?)\s+# (.+)', line)
            if match:
                name, default, comment = match.groups()
                if typing.get_origin(hints[name]) is typing.Literal:
                    comment += f' {{{" | ".join(map(str, typing.get_args(hints[name])))}}}'
                lines += textwrap.wrap(f'{f"  --{name}={default}":34} {comment}', width, subsequent_indent=' ' * 35)
    return '\n'.join(lines)
