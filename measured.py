"""What ablate.py measured (results/SCALE/*.json), read back: by table and cell, and as numbers to print."""
import math
import re
import statistics

from ablate import compared_runs, loss_of
from experiments import SEEDS, TABLES


class NotMeasured(LookupError):
    """No run of a cell has been done, or has come to its end."""


def results(name, scale):
    """What the runs that table `name` compares have measured, as far as they have been done: {label: list of results,
    one a seed}. Those that diverged have measured nothing: they are counted by `diverged`."""
    found = {label: [result for result in done if result['exits']] for label, done in runs_done(name, scale).items()}
    return {label: several for label, several in found.items() if several}


def diverged(name, scale):
    """{label: (runs that diverged, runs that were done)} of the cells in which there are any."""
    counts = {label: (sum(not result['exits'] for result in done), len(done))
              for label, done in runs_done(name, scale).items()}
    return {label: count for label, count in counts.items() if count[0]}


def runs_done(name, scale):
    table = TABLES[name]
    return {label: [result for run in compared_runs(table, label, scale, len(SEEDS)) if (result := run.result())]
            for label in table.cells}


def cell(name, label, scale):
    """The results of one cell. NotMeasured if there are none, KeyError if there is no such cell."""
    TABLES[name].cells[label]
    try:
        return results(name, scale)[label]
    except KeyError:
        raise NotMeasured(f'{name}: {label}') from None


def rate_of(several):
    """The learning rate of results, from their command."""
    return flag(several[0], 'learning_rate') or "config's"


def flag(result, name):
    """What the result's command gave for a setting, or None."""
    match = re.search(rf'--{name}=(\S+)', result['command'])
    return match and match.group(1)


def paired(several, others):
    """(result, result of the others) for each seed that both have."""
    partner = {flag(result, 'seed'): result for result in others}
    return [(result, partner[flag(result, 'seed')]) for result in several if flag(result, 'seed') in partner]


def ppl(loss):
    """exp(loss), at most e^700; nan for None."""
    return math.exp(min(loss, 700)) if loss is not None else math.nan


def number(x):
    """Four figures, all before the decimal point, or two and a power of ten."""
    if x is None or x != x:
        return '-'
    return f'{x:.1e}'.replace('e+0', 'e').replace('e+', 'e') if x >= 1e7 else f'{x:,.0f}' if x >= 1e4 else f'{x:.4g}'


def factor(x):
    """Three decimals, or four figures where x is large."""
    return f'{x:.3f}' if x < 10 else number(x)


def mean(several, value):
    """'mean ± s.d.' of value(result) over the seeds, four figures."""
    return over_seeds([value(result) for result in several])


def over_seeds(values, write=number):
    """'mean ± s.d.' of one value a seed, the mean as `write` has it."""
    text = write(statistics.mean(values))
    return text + (f' ± {statistics.stdev(values):.2g}' if len(values) > 1 else '')


def final(result):
    return ppl(loss_of(result))


def relative_exits(result):
    """PPL at each exit in units of full depth's."""
    return [ppl(loss - result['exits'][-1]) for loss in result['exits']]


def relative(several, base):
    """PPL over that of `base`, seed by seed: 'mean ± s.d.' of the ratios, '1' for the base itself, '-' where no seed is
    in both."""
    ratios = [final(one) / final(other) for one, other in paired(several, base)] if base else []
    return '1' if several is base else over_seeds(ratios, factor) if ratios else '-'
