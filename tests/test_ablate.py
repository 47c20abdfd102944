"""The experiments: their plan is made of valid command lines, runs are done once, and tables say what was measured."""
import contextlib
import json
import re
import statistics
from pathlib import Path

import pytest

import ablate
import measured
import tables
import train
from ablate import Run
from claims import CLAIMS, MEASUREMENT, Claim
from configurator import UserError, configure
from experiments import RATES, SHORT, TABLES, Table
from test_train import TINY, text  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize('name', TABLES)
@pytest.mark.parametrize('scale', ['cpu', 'paper'])
def test_every_cell_is_a_command_line_of_train(name, scale, monkeypatch):
    monkeypatch.chdir(ROOT)
    table = TABLES[name]
    for label in table.cells:
        for run in [Run(table.arguments(label, scale), 1e-3, 7, 650, scale), *ablate.swept_runs(table, label, scale)]:
            settings = configure(train.TrainSettings, run.command())
            assert (settings.dataset == 'pydocs' and settings.max_iters == 650) == (scale == 'cpu')


def test_runs_of_different_commands_have_different_files():
    for scale in ('cpu', 'paper'):
        runs = {Run(table.arguments(label, scale), rate, 7, 650, scale) for table in TABLES.values()
                for label in table.cells for rate in table.rates}
        assert len({tuple(run.command()) for run in runs}) == len({run.path for run in runs}) == len(runs)


def test_scales_differ_in_size_not_in_kind(tmp_path, monkeypatch):
    """At Paper B's own scale its variants were as narrow as on a CPU, and Paper A's sweeps twenty times as long."""
    monkeypatch.chdir(ROOT)
    for name, widths in (('V1, phase 1', (64, 2048)), ('V2, phase 2', (64, 2048))):
        for scale, width in zip(('cpu', 'paper'), widths):
            (run,) = ablate.compared_runs(TABLES['B'], name, scale, 1)
            assert configure(train.TrainSettings, run.command()).n_embd == width
    (run,) = ablate.compared_runs(TABLES['A7'], '0.2', 'paper', 1)
    assert configure(train.TrainSettings, run.command()).max_iters == 500
    with pytest.raises(UserError, match="there is no table 'share' at the paper scale"):
        ablate.main(['--table=share', '--scale=paper'])


def fake_result(run, loss):
    """As if the run had been done."""
    run.path.parent.mkdir(parents=True, exist_ok=True)
    run.path.write_text(json.dumps({'exits': [5.0, loss] if loss else [], 'bits_per_byte': loss and loss / 0.7,
                                    'command': f'python train.py {" ".join(run.command())}'}))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of two cells, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    table = Table('two cells', {'a': 'config/baseline.py', 'b': 'config/bitskip_h.py'}, seeds=3, steps=1300)
    monkeypatch.setitem(TABLES, 'two', table)
    return table


def test_rates_are_compared_before_seeds(table):
    """First every rate briefly, then every seed at the best of them; a rate that diverged is never the best."""
    assert [run.rate for run in ablate.swept_runs(table, 'a', 'cpu')] == list(RATES)
    table.rates = (4e-3, 1e-3, 2e-3)
    sweep = ablate.swept_runs(table, 'a', 'cpu')
    assert [run.rate for run in sweep] == list(table.rates) and {run.steps for run in sweep} == {SHORT}
    for run, loss in zip(sweep, (1.7, None, 1.5)):
        assert ablate.compared_runs(table, 'a', 'cpu', 3) == []
        fake_result(run, loss)
    compared = ablate.compared_runs(table, 'a', 'cpu', 2)
    assert [(run.rate, run.seed, run.steps) for run in compared] == [(sweep[2].rate, 7, 1300), (sweep[2].rate, 8, 1300)]
    assert len(ablate.compared_runs(table, 'a', 'cpu', 5)) == 3  # as many as the table is worth


def test_one_rate_needs_no_sweep(table):
    table.rates = RATES[1:2]
    assert ablate.swept_runs(table, 'a', 'cpu') == []
    assert [run.rate for run in ablate.compared_runs(table, 'a', 'cpu', 2)] == [RATES[1]] * 2


def test_paper_scale_takes_the_configs_own_rate(table):
    assert [run.command() for run in ablate.compared_runs(table, 'a', 'paper', 2)] == [
        ['config/baseline.py', '--seed=7'], ['config/baseline.py', '--seed=8']]


def test_a_cell_on_a_finished_model_waits_for_it(table):
    """It starts from the model of the same seed, at its config's own rate, once that is there."""
    table.on['b'] = 'a'
    assert ablate.swept_runs(table, 'b', 'cpu') == []
    for run in ablate.swept_runs(table, 'a', 'cpu'):
        assert ablate.compared_runs(table, 'b', 'cpu', 3) == []
        fake_result(run, 2.0)
    base = ablate.compared_runs(table, 'a', 'cpu', 3)[1]
    fake_result(base, 1.5)
    (run,) = ablate.compared_runs(table, 'b', 'cpu', 3)
    assert (run.seed, run.steps) == (8, SHORT) and run.name.endswith(f'-on-{base.name}')
    assert f'--init_from={base.out_dir}' in run.command()
    assert not any(word.startswith('--learning_rate') for word in run.command())


def test_table_says_what_was_measured(table, monkeypatch):
    """Mean and standard deviation of the PPL of the seeds, and of its ratios, seed by seed."""
    monkeypatch.setitem(tables.MAKE, 'two', tables.plain('two'))
    assert tables.markdown('two') == ''
    losses = {'a': (1.0, 1.1, 1.3), 'b': (0.9,)}
    for label in table.cells:
        for run in ablate.swept_runs(table, label, 'cpu'):
            fake_result(run, 2.0)
        for run, loss in zip(ablate.compared_runs(table, label, 'cpu', 3), losses[label]):
            fake_result(run, loss)
    ppl = [measured.math.exp(loss) for loss in losses['a']]
    assert tables.markdown('two').splitlines()[2:] == [
        f'| a | 0.004 | 3 | {statistics.mean(ppl):.4g} ± {statistics.stdev(ppl):.2g} | 1 |',
        f'| b | 0.004 | 1 | {measured.math.exp(0.9):.4g} | {measured.math.exp(0.9 - 1.0):.3f} |']


@pytest.mark.parametrize('claim', CLAIMS, ids=lambda claim: claim.claim[:20])
def test_claims_are_about_cells_that_exist(claim):
    measurements = MEASUREMENT.findall(claim.here)
    assert measurements and '{' not in MEASUREMENT.sub('', claim.here)
    for table, what in measurements:
        for label in re.split(' / ', re.sub(r' (@ \d+|\| (latent|unshifted))$', '', what)):
            assert label in TABLES[table].cells, label


def test_claims_say_what_was_measured(table):
    """Ratios go seed by seed, each to its partner."""
    for label, losses in (('a', (1.0, 1.2)), ('b', (0.9, 1.0))):
        for run in ablate.swept_runs(table, label, 'cpu'):
            fake_result(run, 2.0)
        for run, loss in zip(ablate.compared_runs(table, label, 'cpu', 2), losses):
            fake_result(run, loss)
    exp = measured.math.exp
    assert Claim('', '', '{two: b / a}').measured('cpu') == (
        f'{(exp(-0.1) + exp(-0.2)) / 2:.3f} ± {statistics.stdev((exp(-0.1), exp(-0.2))):.2g}')
    assert Claim('', '', '{two: b @ 0}').measured('cpu') == (
        f'{measured.number((exp(4.1) + exp(4.0)) / 2)} ± {statistics.stdev((exp(4.1), exp(4.0))):.2g}')
    assert Claim('', '', '{two: a}').measured('cpu') == measured.number((exp(1.0) + exp(1.2)) / 2)
    with pytest.raises(KeyError):
        Claim('', '', '{two: c}').measured('cpu')


def test_every_table_outlives_runs_that_diverge(tmp_path, monkeypatch, capsys):
    """One diverged run ended tables and claims in tracebacks, after hours of training, or dropped rows in silence."""
    monkeypatch.chdir(tmp_path)
    for table in TABLES.values():
        for label in table.cells:
            for run in ablate.swept_runs(table, label, 'cpu') + ablate.compared_runs(table, label, 'cpu', 1):
                fake_result(run, None)
            for run in ablate.compared_runs(table, label, 'cpu', 1):
                fake_result(run, None)
    for name in TABLES:
        table = tables.markdown(name)
        assert all(f'| {label}: 1 of 1 diverged |' in table for label in TABLES[name].cells), table
    assert tables.markdown('claims') == ''
    tables.main([])
    assert 'nan' not in capsys.readouterr().out
    with pytest.raises(UserError, match='there are no results at the paper scale'):
        tables.main(['--scale=paper'])
    with pytest.raises(UserError, match='the pages tell of the CPU scale'):
        tables.main(['--scale=paper', '--readme=True'])
    page = '<!-- table: A6 -->\nas it was\n<!-- end -->'
    assert tables.update(page, 'paper') == page  # nothing has been measured there


def test_runs_are_done_once_resumed_and_shared(text, monkeypatch):  # noqa: F811
    """A real run of a few steps: interrupted, taken up, done, and not done again; not while another process has it."""
    settings = TINY | dict(dataset='text.txt', tokenizer='bytes', max_iters=6)
    Path('tiny.py').write_text('\n'.join(f'{key} = {value!r}' for key, value in settings.items()))
    tiny = Table('tiny', {'cell': 'tiny.py'})
    (run,) = ablate.compared_runs(tiny, 'cell', 'paper', 1)

    step, stopped = train.Run.step, []

    def interrupted_step(training):
        if training.progress['iter'] == 3 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        step(training)
    monkeypatch.setattr(train.Run, 'step', interrupted_step)
    assert not ablate.train_all([tiny], 'paper', 1, compile=False)
    assert run.result() is None and (run.out_dir / 'last.pt').exists()
    assert ablate.train_all([tiny], 'paper', 1, compile=False)
    result = run.result()
    assert result['steps'] == 6 and len(result['exits']) == 3 and result['train'][-1][0] == 6
    before = run.path.stat().st_mtime_ns
    assert ablate.train_all([tiny], 'paper', 1, compile=False)
    assert run.path.stat().st_mtime_ns == before


def test_diverged_runs_are_results(table, monkeypatch):
    def diverge(argv):
        raise train.Diverged('step 3: the loss is nan')
    monkeypatch.setattr(train, 'main', diverge)
    run = ablate.swept_runs(table, 'a', 'cpu')[0]
    assert ablate.do(run, compile=False)
    assert run.result()['exits'] == [] and ablate.loss_of(run.result()) == float('inf')


def test_a_finished_model_that_was_not_kept_is_trained_again(table, monkeypatch):
    """In a clone there are results without their models; recipes on a finished model came to a stop there."""
    base = ablate.swept_runs(table, 'a', 'cpu')[0]
    run = ablate.Run('--freeze=True', None, base.seed, 3, 'cpu', base)
    lines = []
    monkeypatch.setattr(train, 'main', lambda argv: lines.append(argv) or True)
    assert ablate.fit(run, compile=False)
    assert [f'--out_dir={each.out_dir}' in line for each, line in zip((base, run), lines)] == [True, True]
    base.out_dir.mkdir(parents=True)

    @contextlib.contextmanager
    def trained_elsewhere(path, wait=True):
        assert path == f'{base.out_dir}.run' and wait
        (base.out_dir / 'ckpt.pt').touch()
        yield True
    monkeypatch.setattr(ablate.checkpoint, 'exclusive', trained_elsewhere)
    assert ablate.fit(run, compile=False) and len(lines) == 3


@pytest.mark.parametrize('page', tables.PAGES, ids=str)
def test_readme_tables_are_the_results(monkeypatch, page):
    """Every number in the tables of the pages is the one in results/."""
    monkeypatch.chdir(ROOT)
    written = page.read_text()
    assert '<!-- table: ' in written
    assert tables.update(written) == written, 'python tables.py --readme=True writes them anew'
