"""The exercises: every check passes for a right answer, and none is there in vain."""
import importlib
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from exercises.answers import ANSWERS

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.stem for path in (ROOT / 'exercises').glob('ex*.py'))
TRAINING = ('ex15_cliff', 'ex16_future')  # minutes
SECTIONS = {name: section for section in re.split(
    r'^## ', (ROOT / 'EXERCISES.md').read_text(encoding='utf-8'), flags=re.M)
    for name in re.findall(r'^python exercises/(ex\w+)\.py', section, re.M)}

def student(name, answer=''):
    """The file of an exercise as a module, with an answer written below it."""
    path, module = ROOT / 'exercises' / f'{name}.py', ModuleType(name)
    module.__file__ = str(path)
    exec('import torch.nn.functional as F\n' + path.read_text('utf-8') + answer, vars(module))
    return module

def checks(name):
    module = importlib.import_module(f'exercises.test_{name}')
    return {name: check for name, check in vars(module).items() if name.startswith('test_')}

def errors(name, module):
    """{check: what it raised}"""
    raised = {}
    for check_name, check in checks(name).items():
        torch.manual_seed(0)
        try:
            check(module)
        except Exception as error:
            raised[check_name] = error
    return raised

@pytest.mark.parametrize('name', FILES)
def test_right_answers_pass_and_the_template_passes_no_check(name):
    right = ANSWERS[name][0]
    for answer in {right, right.replace('use_reentrant=False', 'use_reentrant=True')}:
        assert not errors(name, student(name, answer))
    unsolved = re.sub('^def .*:$', r'\g<0>\n    raise NotImplementedError', right, flags=re.M)
    raised = errors(name, student(name, unsolved))
    assert raised.keys() == checks(name).keys()
    assert {type(error) for error in raised.values()} == {NotImplementedError}

@pytest.mark.parametrize('name', FILES)
def test_wrong_answers_are_named_and_every_check_catches_one(name):
    right, wrong = ANSWERS[name]
    idle = set(checks(name))
    for old, new, word in wrong:
        assert old in right, old
        caught = {check: str(error) for check, error in errors(
            name, student(name, right.replace(old, new, 1))).items()
            if isinstance(error, AssertionError)}
        assert any(word in said for said in caught.values()), (new, word, caught)
        idle -= set(caught)
    assert not idle

def test_the_text_and_the_teachers_page_have_every_exercise_in_order():
    page = (ROOT / 'exercises' / 'TEACHING.md').read_text(encoding='utf-8')
    assert len(page.splitlines()) <= 150
    assert re.findall(r'^\*\*(\d+)', page, re.M) == [str(n + 1) for n in range(len(FILES))]
    assert list(SECTIONS) == FILES == list(ANSWERS)
    for number, (name, section) in enumerate(SECTIONS.items(), 1):
        assert section.startswith(f'{number}. ') and name.startswith(f'ex{number:02}_')
        assert f'python -m pytest exercises/test_{name}.py\n' in section
        for function in re.findall(r'^def (\w+)', ANSWERS[name][0], re.M):
            assert f'`{function}`' in section, function

@pytest.mark.parametrize('name', FILES)
def test_the_figures_in_the_text_are_those_that_are_printed(name, capsys, monkeypatch):
    """Of the trainings, which take one step here, what stands in front of the figures."""
    module, text = student(name, ANSWERS[name][0]), np.arange(1000, dtype=np.uint16) % 256
    monkeypatch.setattr(module, 'prepare', lambda dataset: dataset, raising=False)
    monkeypatch.setattr(module, 'load_tokens', lambda folder, split: text, raising=False)
    module.observe(**{'steps': 1} if name in TRAINING else {})
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        assert f'\n{line.split(":")[0] if name in TRAINING else line}' in SECTIONS[name], line
