"""What ablate.py measured (results/SCALE/*.json), read back: by table and cell, and as numbers to print."""
import math
import re
import statistics

from ablate import compared_runs, loss_of
from experiments import SEEDS, TABLES


def results(name, scale):
    """What the runs of table `name` measured that it compares: {label: list of results, one a seed}; none is left out
    that is there."""
    found = {}
    for label in TABLES[name].cells:
        done = [run.result() for run in compared_runs(TABLES[name], label, scale, len(SEEDS))]
        found[label] = [result for result in done if result is not None]
    return {label: several for label, several in found.items() if several}


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
    return math.exp(min(loss, 700)) if loss is not None else math.nan


def number(x):
    """Four figures, all before the decimal point, or two and a power of ten."""
    if x is None or x != x:
        return '-'
    return f'{x:.1e}'.replace('e+0', 'e').replace('e+', 'e') if x >= 1e7 else f'{x:,.0f}' if x >= 1e4 else f'{x:.4g}'


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
    return statistics.mean(map(final, several)) / statistics.mean(map(final, base))
