"""The house keeps its promises: files of a size to read, arrows that point inward, and a core that
works alone."""
import ast
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import CORE, ROOT, flags

from model import BitSkipConfig

ROOMS = {'fast', 'export', 'papers', 'exercises', 'tests'}
BELOW = {'fast': set(), 'export': {'fast'}, 'papers': {'fast'}}  # which rooms a room may use
TREES = {name: ast.parse((ROOT / f'{name}.py').read_text()) for name in CORE}

def imports(tree, function=''):
    """(module, the function that imports it or '') for each import of a file."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Import):
            yield from ((alias.name.split('.')[0], function) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield (child.module or '').split('.')[0], function
        yield from imports(child, child.name if isinstance(child, ast.FunctionDef) else function)

def test_the_core_is_as_small_as_the_readme_says():
    counts = {name: len((ROOT / f'{name}.py').read_text().splitlines()) for name in CORE}
    assert sum(counts.values()) <= 2561, (sum(counts.values()), counts)
    assert max(counts.values()) <= 340 and counts['minimal'] <= 200, counts
    tests = (ROOT / 'tests').glob('**/*.py')
    assert sum(len(path.read_text().splitlines()) for path in tests) <= 5000

@pytest.mark.parametrize('name', CORE)
def test_functions_are_short_and_modules_teach(name):
    assert ast.get_docstring(TREES[name])
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name

def test_the_model_has_at_most_27_settings():
    assert len(fields(BitSkipConfig)) <= 27

def test_the_core_imports_no_side_room_but_in_one_place():
    """configurator.side_room, which says None where the folder is gone."""
    assert not [(name, *found) for name in CORE for found in imports(TREES[name])
                if found[0] in ROOMS]
    asks = [(name, node.name) for name in CORE for node in ast.walk(TREES[name])
            if isinstance(node, ast.FunctionDef) and 'import_module' in ast.unparse(node)]
    assert asks == [('configurator', 'side_room')]

@pytest.mark.parametrize('room', BELOW)
def test_side_rooms_import_downward_only(room):
    files = list((ROOT / room).glob('*.py'))
    for path in files:
        found = {module for module, _ in imports(ast.parse(path.read_text()))}
        assert found & ROOMS <= {room} | BELOW[room], path.name
    assert files

def test_no_import_runs_in_a_circle():
    """There is an order in which each core file imports only files before it."""
    needs = {name: {module for module, _ in imports(TREES[name])} & set(CORE) for name in CORE}
    read = set()
    while ready := {name for name in CORE if needs[name] <= read} - read:
        read |= ready
    assert read == set(CORE), {name: needs[name] - read for name in set(CORE) - read}

ALONE = """
import sys
import prepare, train, sample, eval_exits
prepare.main(['--dataset=text.txt', '--tokenizer=bytes'])
train.main(['config/bitskip_h_ee.py', *sys.argv[1:]])
sample.main(['--prompt=def ', '--max_new_tokens=5', '--exit_layer=1'])
eval_exits.main(['--json=eval.json'])
sample.main(['--draft_layer=1'])
"""

def test_the_core_alone_prepares_trains_samples_and_evaluates(core_alone):
    """Copied with config/ into an empty folder. fast/ is not there: it says so, and goes on, but
    for drafts, which are made there."""
    own = [flag for flag in flags(max_iters=3) if '--linear' not in flag and '--lambda' not in flag]
    done = subprocess.run([sys.executable, '-c', ALONE, *own], cwd=core_alone, text=True,
                          capture_output=True)
    for told in ('prepared data/text-bytes', 'hbitlinear', 'step 3: val loss', 'run: out/run',
                 'decoding: PyTorch', '5 tokens', 'speeds: PyTorch'):
        assert told in done.stdout, (told, done.stderr)
    assert (core_alone / 'eval.json').exists() and 'is not here' in done.stderr
