"""What a class sees: of the exercises, as files and as checks; and of the ladder."""
import subprocess
import sys

import papers.tables
from test_exercises import ANSWERS, FILES, ROOT, student

def test_the_ladder_is_read_beside_the_prediction(capsys, monkeypatch):
    runs = {'as run, H + EE': [4.0, 3.0], 'phi in the FFN only, H + EE': [3.0, 2.5],
            'usual initial weights, H + EE': [3.0, 2.4]}
    monkeypatch.setattr(papers.tables, 'results', lambda table, cell: [
        {'exits': runs[cell]}] if cell in runs else [])
    student('ex18_nine_differences', ANSWERS['ex18_nine_differences'][0]).climb()
    told = capsys.readouterr().out
    assert '4 of 10 rungs' in told and 'PPL    20.09   last step x2.72' in told
    assert 'the last step most: you said "exits learn the next token", measured is "phi' in told

def test_a_class_sees_one_line_for_what_is_not_solved_and_no_answer_for_what_is_wrong(tmp_path):
    """Two exercises: the first is not solved, in the second the labels are not shifted."""
    right, wrong = ANSWERS['ex09_exit_loss']
    more = {'ex01_butterfly.py': '\n\ndef fwht(x):\n    raise NotImplementedError\n',
            'ex09_exit_loss.py': right.replace(*wrong[0][:2])}
    (tmp_path / 'exercises').mkdir()
    (tmp_path / 'pytest.ini').write_text(f'[pytest]\npythonpath = . {ROOT}\n')
    for file in (*more, *(f'test_{name}' for name in more), '__init__.py', 'hints.py',
                 'conftest.py'):
        text = (ROOT / 'exercises' / file).read_text(encoding='utf-8') + more.get(file, '')
        (tmp_path / 'exercises' / file).write_text(text, encoding='utf-8')
    told = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider',
                           'exercises'], cwd=tmp_path, capture_output=True, text=True).stdout
    assert 'not solved yet: fwht in ex01_butterfly.py\n' in told
    assert '2 failed, 2 passed, 4 unsolved in ' in told
    assert '\nthis is the loss of the *current* token: which token do the logits' in told
    assert 'F.cross_entropy' not in told and 'tokens[:, 1:]' not in told

def test_each_file_runs_by_itself_from_anywhere(tmp_path):
    code = ('import runpy\n'
            f'for name in {FILES}: runpy.run_path(f"{ROOT}/exercises/{{name}}.py")')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
