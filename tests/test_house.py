"""The house keeps its promises: files of a size to read, arrows that point inward, and a core that
works alone."""
import ast
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import CORE, ROOT, flags

from model import BitSkipConfig

SIDE_ROOMS = {'fast', 'export', 'papers', 'exercises', 'tests'}
BELOW = {'fast': set(), 'export': {'fast'}, 'papers': {'fast'}}  # what a room may use beside the core
LINES = {name: (ROOT / f'{name}.py').read_text().splitlines() for name in CORE}


def imports(path):
    """(module, the function that imports it or '') for each import of a file."""
    found = []

    def visit(node, function):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name.split('.')[0], function) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                found.append(((child.module or '').split('.')[0] if not child.level else '.', function))
            inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            visit(child, child.name if inner else function)
    visit(ast.parse(path.read_text()), '')
    return found


def test_the_core_is_as_small_as_the_readme_says():
    counts = {name: len(lines) for name, lines in LINES.items()}
    assert sum(counts.values()) <= 2400, counts
    assert max(counts.values()) <= 340, counts
    assert counts['minimal'] <= 200


def test_there_is_no_other_file_beside_the_core():
    """What is not the core has a room."""
    assert sorted(path.stem for path in ROOT.glob('*.py')) == sorted(CORE)


@pytest.mark.parametrize('name', CORE)
def test_functions_are_short_and_modules_teach(name):
    assert ast.get_docstring(ast.parse('\n'.join(LINES[name])))
    for node in ast.walk(ast.parse('\n'.join(LINES[name]))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_model_has_at_most_27_settings():
    assert len(fields(BitSkipConfig)) <= 27


def test_the_core_imports_no_side_room_but_in_one_place():
    """decode.fast_room, which says None where the folder is gone."""
    found = [(name, *imported) for name in CORE for imported in imports(ROOT / f'{name}.py')
             if imported[0] in SIDE_ROOMS]
    assert found == [('decode', 'fast', 'fast_room')]


@pytest.mark.parametrize('room', BELOW)
def test_side_rooms_import_downward_only(room):
    for path in (ROOT / room).glob('*.py'):
        found = {module for module, _ in imports(path)}
        assert found & SIDE_ROOMS <= {room} | BELOW[room], path.name


def test_no_import_runs_in_a_circle():
    """Each core file imports files that can be read before it."""
    needs = {name: {module for module, _ in imports(ROOT / f'{name}.py')} & set(CORE)
             for name in CORE}
    read = set()
    while ready := {name for name in CORE if needs[name] <= read} - read:
        read |= ready
    assert read == set(CORE), {name: needs[name] - read for name in set(CORE) - read}


ALONE = '''
import sys
import prepare, train, sample, eval_exits
prepare.main(['--dataset=text.txt', '--tokenizer=bytes'])
train.main(['config/bitskip_h_ee.py', *sys.argv[1:]])
sample.main(['--prompt=def ', '--max_new_tokens=5', '--exit_layer=1'])
eval_exits.main(['--json=eval.json'])
sample.main(['--draft_layer=1'])
'''


def test_the_core_alone_prepares_trains_samples_and_evaluates(core_alone):
    """Copied with config/ into an empty folder. fast/ is not there: it says so, and goes on, but
    for drafts, which are made there."""
    own = [flag for flag in flags(max_iters=3) if '--linear' not in flag and '--lambda' not in flag]
    done = subprocess.run([sys.executable, '-c', ALONE, *own], cwd=core_alone, text=True,
                          capture_output=True)
    for told in ('prepared data/text-bytes', 'hbitlinear, 3 layers', 'step 3: val loss',
                 'run: out/run', 'decoding: PyTorch', '5 tokens', 'speeds: PyTorch'):
        assert told in done.stdout, (told, done.stderr)
    assert (core_alone / 'eval.json').exists() and (core_alone / 'eval.png').exists()
    assert 'UserError: this needs the folder fast/, which is not here' in done.stderr
