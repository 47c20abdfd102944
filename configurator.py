"""
Settings from Python files and flags, in the spirit of nanoGPT's configurator.

    python train.py config/bitskip_h_ee.py config/cpu.py --seed=7 --compile

Settings are a dataclass, each a commented line: `n_layer: int = 12  # blocks`. --help shows them.
Configs are Python files, run in order. Each sees the settings so far: `ffn_dim = 4 * n_embd` works.
Its own names start with an underscore. Flags come on top, wherever they stand.
"""
import ast
import contextlib
import difflib
import importlib
import inspect
import os
import pkgutil
import re
import runpy
import sys
import textwrap
import typing

class UserError(Exception):
    """A user's mistake, told in one sentence: what is wrong, and what to do about it."""

def run(main):
    """Call main(argv) as a script. A user's mistake ends in one sentence and exit code 2."""
    sys.stdout = sys.stdout or open(os.devnull, 'w')  # it is None after >&-
    if hasattr(sys.stdout, 'reconfigure'):  # a notebook's has not
        sys.stdout.reconfigure(errors='replace')  # characters that this terminal cannot show
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output (head, less) has gone
        os._exit(141)  # at once: sys.exit would try to write the rest
    except Exception as error:
        if is_out_of_memory(error):
            error = 'out of memory: this machine has too little; try a smaller batch or model'
        elif not isinstance(error, (UserError, OSError)):  # OSError: a full disk, say
            raise
        print('error:', ' '.join(str(error).split())[:500], file=sys.stderr)
        sys.exit(2)

def is_out_of_memory(error):  # (torch has no error class for a CPU's memory)
    return bool(re.search('MemoryError|allocate memory|out of memory|ALLOC_FAILED', repr(error)))

def configure(cls, argv, base=None):
    """The dataclass `cls`: its defaults, then `base` (a dict), then configs, then flags."""
    return build(cls, collect(cls, argv, base))

def build(cls, values):
    try:
        return cls(**values)
    except ValueError as error:  # of the right types, but not possible
        raise UserError(str(error)) from None

def collect(cls, argv, base=None):
    """The values for `build`: a dict. Prints --help."""
    if '--help' in argv or '-h' in argv:
        sys.exit(print_help(cls))
    hints, flags = typing.get_type_hints(cls), []
    values = {key: getattr(cls, key) for key in hints}  # the defaults
    values |= {key: convert(key, value, hints, 'saved ') for key, value in (base or {}).items()}
    for path in configs_of(cls, argv, flags):
        try:
            names = runpy.run_path(path, values)
        except Exception as error:
            raise UserError(f"config '{path}': {type(error).__name__}: {error}") from error
        for key, value in names.items():
            if not (key[0] == '_' or inspect.ismodule(value) or value is values.get(key, names)):
                values[key] = convert(key, value, hints, f'{path}: ')
    return values | {key: convert(key, text, hints, '--', True) for key, text in flags}

def configs_of(cls, argv, flags=None):
    """The configs in `argv`. Flags (--key=text, --key text, --key for a bool) go to the list."""
    configs, flags, rest = [], [] if flags is None else flags, iter(argv)
    for arg in rest:
        if not arg.startswith('--'):
            configs.append(arg)
            continue
        key, equals, text = arg.partition('=')
        key = key[2:].replace('-', '_')
        if not equals:
            text = 'true' if typing.get_type_hints(cls).get(key) is bool else next(rest, '--')
            if text.startswith('--'):
                raise UserError(f'{arg} needs a value: {arg}=...')
        flags.append((key, text))
    return configs

def convert(key, value, hints, where='', from_text=False):
    """`value` of setting `key`, in its type. For flags, configs and checkpoints alike."""
    if key not in hints:
        near = ' or '.join(difflib.get_close_matches(str(key), hints) or ['--help'])
        raise UserError(f'{where}{key}: there is no such setting; did you mean {near}?')
    kinds = typing.get_args(hints[key]) or (hints[key],)  # (int, None), or the words of a Literal
    if from_text and kinds[0] in (int, float, bool):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value.capitalize())  # true, none, -1, 1e-3
    small = type(value) is not int or abs(value) < 2 ** 63
    if float in kinds and type(value) is int and small:
        value = float(value)  # 1 is a fine way to write 1.0
    good = type(value) in kinds or type(value) is str and value in kinds
    if not (small and good and value == value and '\0' not in str(value)):
        hint = inspect.formatannotation(hints[key])
        raise UserError(f'{where}{key}: expected {hint}, got {value!r:.80}')
    return value

def check(settings, limits):
    """Give all values of a dataclass their types; hold numbers to limits {key: (least, most)}."""
    for key, value in vars(settings).items():
        setattr(settings, key, convert(key, value, typing.get_type_hints(type(settings))))
    for key, (least, most) in limits.items():
        if not least <= getattr(settings, key) <= most:
            raise ValueError(f'{key} is {least} to {most}, got {getattr(settings, key)}')

def print_help(cls):
    """Each setting as `--name=default  comment`, below the docstring of its class."""
    print(f'usage: python {os.path.basename(sys.argv[0])} [config.py ...] [--setting=value ...]')
    for owner in reversed(cls.__mro__[:-1]):
        print(f'\n{inspect.getdoc(owner)}')
        for name, words, default, comment in re.findall(
                r'^    (\w+): (?:Literal)?(.+?) = (.+?)\s+# (.+)$', inspect.getsource(owner), re.M):
            flag, text = f'  --{name}={default}', f"{comment} {words * (words[0] == '[')}"
            print(textwrap.fill(text, 80, initial_indent=f'{flag:34} ', subsequent_indent=' ' * 35))

def class_name(cls):
    """'module:Class', for find_class. (A script's own class calls its module only __main__.)"""
    path = os.path.relpath(inspect.getsourcefile(cls), os.path.dirname(__file__))
    return f"{path.removesuffix('.py').replace(os.sep, '.')}:{cls.__qualname__}"

def find_class(name, base):
    """The class 'module:Class', a kind of `base`, in a file of this folder; else ValueError."""
    path = os.path.join(os.path.dirname(__file__), *name.partition(':')[0].split('.')) + '.py'
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError(f'there is no {path}')
        found = pkgutil.resolve_name(name)
        if not issubclass(found, base):
            raise TypeError(f'it is not a {base.__name__}')
    except Exception as error:
        raise ValueError(f"'{name}' is no module:Class of this folder: {error}") from error
    return found

def side_room(name, required=False):
    """The module `name` of a side room, fast say, or None where its folder is gone (UserError if it
    is required). This is the one way from the core to a side room."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        if required:
            raise UserError(f'this needs {name}, whose folder is not here') from None
