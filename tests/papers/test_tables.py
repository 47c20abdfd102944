"""The plan's commands are possible, tables say what results hold, and the page is of today."""
import json
import math
import random
import re

import pytest

from configurator import configure
from papers import plan, tables
from papers.as_run import AsRunSettings
from papers.heads import HeadsSettings
from papers.plan import SEEDS, TABLES, TUNING_SEED
from train import TrainSettings

CELLS = [(name, label) for name, table in TABLES.items() for label in table.cells]
CLASSES = {'papers.as_run': AsRunSettings, 'papers.heads': HeadsSettings}

@pytest.mark.parametrize('name, label', CELLS)
def test_every_command_of_the_plan_is_possible(name, label):
    words = TABLES[name].cells[label].split()
    module, rest = (words[1], words[2:]) if words[0] == '-m' else ('train', words[1:])
    rest = rest[1:] if module == 'papers.routing' else rest  # its variant
    settings = configure(CLASSES.get(module, TrainSettings), rest)
    assert settings.dataset in ('pydocs', 'tinystories')

def test_runs_have_names_of_their_own_and_the_tuning_seed_reports_nothing():
    names = [plan.Run(name, label, 7).path for name, label in CELLS]
    assert len({*names}) == len(names) and TUNING_SEED not in SEEDS

def made_up(seed, shift):
    draw = random.Random(f'{seed} {shift}')
    documents = [[1000 * (1.5 + shift + draw.gauss(0, 0.05)), 1000] for _ in range(40)]
    full = sum(nats for nats, _ in documents) / 40000
    return {'seed': seed, 'rate': 0.004, 'val': full, 'exits': [full + 1] * 6 + [full] * 6,
            'bits_per_byte': full / math.log(2), 'documents': documents, 'date': '2026-01-01'}

@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Results of the table fixed: H-only is exp(-0.1) of Baseline, EE-only has diverged."""
    monkeypatch.setattr(plan, 'RESULTS', tmp_path)
    monkeypatch.setattr(TABLES['fixed'], 'rates', (4e-3, 8e-3))
    for label, shift in (('Baseline', 0.0), ('H-only', -0.1), ('EE-only', None)):
        for rate in (4e-3, 8e-3):
            run = plan.Run('fixed', label, TUNING_SEED, rate)
            run.path.parent.mkdir(exist_ok=True)
            run.path.write_text(json.dumps(made_up(1, rate == 8e-3)), encoding='utf-8')
        for seed in SEEDS[:3]:
            result = {'diverged': 'yes', 'rate': 4e-3, 'seed': seed} if shift is None else (
                made_up(seed, shift))
            path = plan.Run('fixed', label, seed, 4e-3).path
            path.write_text(json.dumps(result), encoding='utf-8')

def test_a_table_has_the_best_rate_the_ratio_and_its_interval(folder):
    header, rows = tables.make('fixed')
    base, h, ee = rows
    assert [row[0] for row in rows] == ['Baseline', 'H-only', 'EE-only']
    assert base[1] == 0.004 and base[5] == '1' and ee[3] == 'diverged'
    ratio, low, high = map(float, re.findall(r'[\d.]+', h[5]))
    assert low < ratio < high and abs(ratio - math.exp(-0.1)) < 0.02
    assert high - low < 0.05 and high < 1
    assert h[7].startswith('2.718')  # half of the blocks: one nat more

def test_exits_are_measured_against_the_best_without_on_validation_text(folder):
    """H-only has the lower loss there; joint exits are not there yet."""
    header, rows = tables.make('exits')
    assert header[-1] == 'PPL × that of "H-only"' and {row[2] for row in rows} == {'-'}
    path = plan.Run('fixed', 'joint exits', SEEDS[0], 4e-3).path
    path.write_text(json.dumps(made_up(SEEDS[0], -0.3)), encoding='utf-8')
    for rate in (4e-3, 8e-3):
        run = plan.Run('fixed', 'joint exits', TUNING_SEED, rate)
        run.path.write_text(json.dumps(made_up(1, rate == 8e-3)), encoding='utf-8')
    label, seeds, ratio = tables.make('exits')[1][0]
    assert (label, seeds) == ('joint exits', 1)
    assert abs(float(ratio.split()[0]) - math.exp(-0.2)) < 0.05

def test_the_page_is_of_today():
    """Every number between the marks is recomputed from the results."""
    page = tables.PAGE.read_text(encoding='utf-8')
    assert tables.filled(page) == page and page.count('<!-- table: ') >= 5
