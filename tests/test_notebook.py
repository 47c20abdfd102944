"""notebook.ipynb runs from top to bottom, with few steps, and is kept without what it printed."""
import json

import pytest
from conftest import ROOT

PATH = ROOT / 'notebook.ipynb'
CELLS = json.loads(PATH.read_text(encoding='utf-8'))['cells']
QUICK = {'STEPS = minimal.STEPS': 'STEPS = 5', 'TEXT = 2_000_000': 'TEXT = 20_000'}

def test_it_is_kept_without_outputs_and_its_lines_are_short():
    for cell in CELLS:
        assert not cell.get('outputs') and cell.get('execution_count') is None
        assert max(map(len, ''.join(cell['source']).splitlines())) <= 100

def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """In another folder, so that it leaves nothing here."""
    nbformat, nbclient, _ = (
        pytest.importorskip(name, reason='nbclient and ipykernel run the notebook')
        for name in ('nbformat', 'nbclient', 'ipykernel'))
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    book = nbformat.read(PATH, as_version=4)
    first = next(cell for cell in book.cells if cell.cell_type == 'code')
    for slow, quick in QUICK.items():
        assert slow in first.source
        first.source = first.source.replace(slow, quick)
    kernel = {'metadata': {'path': str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=300, resources=kernel, kernel_name='python3').execute()
    outputs = [output for cell in book.cells for output in cell.get('outputs', [])]
    printed = ''.join(output.get('text', '') for output in outputs)
    shown = [kind for output in outputs for kind in output.get('data', ())]
    assert shown.count('image/png') == 4 and 'text/html' in shown
    for told in ('gradient that W gets: [1.0]', 'x again: True', 'exit 1 writes: Return ',
                 'drafts accepted', 'lens.html'):
        assert told in printed, told
