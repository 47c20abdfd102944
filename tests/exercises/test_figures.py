"""exercises/figures.py: four slides, whose sentence fits on them."""
import io

import numpy as np
import pytest

import papers.tables
from exercises import figures
from papers.measures import LADDER

@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(figures, 'prepare', lambda dataset: dataset)
    monkeypatch.setattr(figures, 'load_tokens', lambda folder, split: np.arange(
        400, dtype=np.uint16) % 256)
    monkeypatch.setattr(papers.tables, 'results', lambda table, cell: [])

def test_the_command_writes_four_slides(tmp_path, capsys):
    figures.main([f'--to={tmp_path}', '--steps=1'])
    told = capsys.readouterr().out
    for name in ('ternary', 'outlier', 'exits', 'cliff'):
        data = (tmp_path / f'{name}.png').read_bytes()
        assert data[:4] == b'\x89PNG' and int.from_bytes(data[16:20], 'big') == 1280
        assert f'{name}.png: ' in told
    assert 'the ladder is not measured yet' in told

@pytest.mark.parametrize('name', ['ternary', 'outlier', 'exits'])
def test_a_sentence_fits_on_its_slide(name):
    figure = figures.FIGURES[name]()
    figure.savefig(io.BytesIO(), format='png')
    box = figure._suptitle.get_window_extent()
    assert box.x0 > 0 and box.x1 < figure.bbox.width and figure.get_suptitle().endswith('.')

def test_the_cliff_is_what_was_measured_where_it_was(monkeypatch):
    rungs = list(LADDER)
    at = rungs.index('exits learn the next token')
    exits = {f'{rungs[at]}, H + EE': [2.0, 1.0], f'{rungs[at - 1]}, H + EE': [9.0, 1.0]}
    monkeypatch.setattr(papers.tables, 'results', lambda table, cell: [
        {'exits': exits[cell]}] if cell in exits else [])
    lines = figures.cliff().axes[0].lines
    np.testing.assert_allclose(np.log(lines[0].get_ydata()), [2, 1])
    np.testing.assert_allclose(np.log(lines[1].get_ydata()), [9, 1], rtol=1e-6)
