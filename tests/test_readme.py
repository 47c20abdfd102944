"""
README's map from equations to code leads somewhere, its counts are right, and its snippets run.

    python tests/test_readme.py      writes today's line numbers and counts into README.md
"""
import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
LINK = r'\[([\w.]+)\]\(([\w/]+\.py)#L(\d+)\)'  # [exit_loss](exits.py#L40)
COUNT = r'\| \[(\w+\.py)\]\(\w+\.py\) \| (\d+) \|'  # | [exits.py](exits.py) | 162 |

def line_of(name, path):
    """Where a function or class, or Class.method, is defined."""
    found = {}
    for node in ast.parse((ROOT / path).read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.lineno
            found |= {f'{node.name}.{inner.name}': inner.lineno for inner in ast.walk(node)
                      if isinstance(inner, ast.FunctionDef)}
    return found[name]

def length(path):
    return len((ROOT / path).read_text(encoding='utf-8').splitlines())

def core_lines():
    return sum(length(path.name) for path in ROOT.glob('*.py'))

def of_today(page):
    page = re.sub(LINK, lambda m: f'[{m[1]}]({m[2]}#L{line_of(m[1], m[2])})', page)
    page = re.sub(COUNT, lambda m: m[0].replace(f'| {m[2]} |', f'| {length(m[1])} |'), page)
    return re.sub(r'the core is [\d,]+ lines', f'the core is {core_lines():,} lines', page)

def test_links_and_counts_are_of_today():
    assert of_today(README) == README
    assert len(re.findall(LINK, README)) > 12 and len(re.findall(COUNT, README)) > 10
    assert len(README.splitlines()) <= 230

@pytest.mark.parametrize('path', re.findall(r'\]\(([\w/.-]+)\)', README))
def test_files_that_are_linked_are_there(path):
    assert (ROOT / path).exists()

def test_the_python_snippets_run(monkeypatch, tmp_path):
    snippets = re.findall(r'```python\n(.*?)```', README, re.S)
    assert len(snippets) == 2
    for snippet in snippets:
        exec(compile(snippet, 'README.md', 'exec'), {'__name__': 'readme'})

if __name__ == '__main__':
    (ROOT / 'README.md').write_text(of_today(README), encoding='utf-8')
