"""README's map from equations to code leads somewhere."""
import ast
import re

import pytest
from conftest import ROOT

README = (ROOT / 'README.md').read_text()
# [exit_loss](exits.py#L40) or [exit_loss](exits.py), and `exits.py:exit_loss`
LINKS = [(path, name, line) for name, path, line in re.findall(
    r'\[`?([\w.]+)`?\]\(([\w/]+\.py)(?:#L(\d+))?\)', README)]
LINKS += [(path, name, '') for path, name in re.findall(r'`([\w/]+\.py):([\w.]+)`', README)]


def names_in(path):
    """{name: first line} of the functions and classes of a file, also as Class.method."""
    found = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
            found |= {f'{node.name}.{inner.name}': inner.lineno for inner in ast.walk(node)
                      if isinstance(inner, ast.FunctionDef) and inner is not node}
    return found


def find(path):
    """A path as README writes it; tests may go without their folder."""
    return path if (ROOT / path).exists() else f'tests/{path}'


@pytest.mark.parametrize('path, name, line', LINKS, ids=str)
def test_every_link_to_a_function_resolves(path, name, line):
    """It names a function or class that is there, at the line that it says."""
    assert (ROOT / find(path)).exists(), path
    if not name.endswith('.py') and '.' not in name.replace('.', '', 1):
        found = names_in(find(path))
        assert name in found and line in ('', str(found[name])), (path, name, line)
