"""README's map from equations to code leads somewhere."""
import ast
import re

import pytest
from conftest import ROOT

README = (ROOT / 'README.md').read_text()
# [exit_loss](exits.py#L40), its line being optional, and `exits.py:exit_loss`
LINKS = [(path, name, line) for name, path, line in re.findall(
    r'\[`?(\w+(?:\.\w+)?)`?\]\(([\w/]+\.py)(?:#L(\d+))?\)', README) if not name.endswith('.py')]
LINKS += [(path, name, '') for path, name in re.findall(r'`([\w/]+\.py):([\w.]+)`', README)]


@pytest.mark.parametrize('path, name, line', LINKS, ids=str)
def test_every_link_to_a_function_resolves(path, name, line):
    """It names a function or class that is there, at the line that it says. (Tests are named
    without their folder.)"""
    path, found = next(p for p in (ROOT / path, ROOT / 'tests' / path) if p.exists()), {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
            found |= {f'{node.name}.{inner.name}': inner.lineno for inner in ast.walk(node)
                      if isinstance(inner, ast.FunctionDef)}
    assert name in found and line in ('', str(found[name])), found
