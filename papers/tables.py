"""
Print what was measured (papers/results), one table by name:

    python -m papers.tables                    which tables there are, and how much of each is done
    python -m papers.tables --table=ladder
    python -m papers.tables --write=True       all of them into papers/README.md, at their marks

Losses are of test text, ternary weights. "±" is the standard deviation over seeds. Brackets hold
95% of 2,000 resamplings of documents and seeds (a paired bootstrap).
"""
import functools
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import atomic_write
from configurator import UserError, configure, run
from eval_exits import perplexity as ppl
from papers.measures import LADDER
from papers.plan import FIXED, OF_BASELINE, SEEDS, TABLES, reported_runs, tuning_runs

PAGE = Path(__file__).with_name('README.md')

def results(table, label):
    """What the reported runs of a cell have measured, as far as they are done: a list."""
    done = [r.result() for r in reported_runs(table, label, len(SEEDS))]
    return [result for result in done if result]

def kept(name):
    """The dict in papers/results/NAME.json."""
    return json.loads((PAGE.parent / 'results' / f'{name}.json').read_text(encoding='utf-8'))

def learned(several):
    """Those that did not diverge."""
    return [r for r in several if 'exits' in r]

def number(x):
    """Four figures, or a power of ten where they do not tell."""
    return f'{x:.1e}' if x >= 1e6 else f'{x:,.0f}' if x >= 1e4 else f'{x:.4g}'

def spread(values):
    """'mean +- s.d.' over the seeds."""
    more = f' ± {statistics.stdev(values):.2g}' if len(values) > 1 else ''
    return number(statistics.mean(values)) + more if values else '-'

def ratio(several, base):
    """PPL over that of `base` (at full depth), seed by seed, with an interval over documents and
    seeds: 'x.xxx [low, high]'."""
    partner = {r['seed']: r for r in base}
    pairs = [(r, partner[r['seed']]) for r in several if r['seed'] in partner]
    if not pairs or several is base:
        return '1' if pairs else '-'
    middle = statistics.mean(ppl(a['exits'][-1] - b['exits'][-1]) for a, b in pairs)
    low, high = interval(pairs)
    return f'{middle:.3f} [{low:.3f}, {high:.3f}]'

def interval(pairs, resamplings=2000):
    """95% of exp(mean loss of one - mean loss of the other), documents and seeds drawn anew."""
    random = np.random.default_rng(0)
    a, b = (np.array([r['documents'] for r in side]) for side in zip(*pairs))  # (seeds, docs, 2)
    drawn = []
    for _ in range(resamplings):
        seeds = random.integers(len(pairs), size=len(pairs))
        documents = random.integers(a.shape[1], size=a.shape[1])
        (la, n), (lb, _) = (x[seeds][:, documents].sum(axis=(0, 1)) for x in (a, b))
        drawn.append(math.exp((la - lb) / n))
    return np.quantile(drawn, (0.025, 0.975))

def exit_ratio(several, blocks):
    """PPL after so many blocks over that of full depth: 'mean +- s.d.'."""
    return spread([ppl(r['exits'][blocks - 1] - r['exits'][-1]) for r in several])

# ---- the tables: (header, rows of cells) ----

def cells_table(table):
    """A row a cell; ratios to the first."""
    header = ['cell', 'rate', 'seeds', 'PPL', 'bits/byte', '× the first', 'one block less ×',
              'half the blocks ×']
    rows, base = [], None
    for label in TABLES[table].cells:
        several = results(table, label)
        good = learned(several)
        if not several:
            continue
        base = base or good
        L = len(good[0]['exits']) if good else 0
        figures = [spread([ppl(r['exits'][-1]) for r in good]),
                   spread([r['bits_per_byte'] for r in good]), ratio(good, base),
                   exit_ratio(good, L - 1), exit_ratio(good, L // 2)] if good else ['diverged']
        rows.append([label, several[0]['rate'], f'{len(good)} of {len(several)}', *figures])
    return header, rows

def on_rung(rung, column):
    """What the ladder's runs of a column measured on a rung; [] where they do not climb it."""
    if rung == OF_BASELINE and column.startswith('H'):
        rung = 'as run'
    label = f'{rung}, {column}'
    return learned(results('ladder', label)) if label in TABLES['ladder'].cells else []

def ladder_table():
    """A row a rung: PPL of the columns, what Hadamard is worth, and the step at the last layer."""
    header = ['from here on', 'Baseline', 'H-only', 'H-only / Baseline', 'EE-only', 'H + EE',
              'last step of H + EE ×']
    rows = []
    for rung in LADDER:
        cells = {c: on_rung(rung, c) for c in ('Baseline', 'H-only', 'EE-only', 'H + EE')}
        if any(cells.values()):
            final = {c: spread([ppl(r['exits'][-1]) for r in cells[c]]) for c in cells}
            rows.append([rung, final['Baseline'], final['H-only'],
                         ratio(cells['H-only'], cells['Baseline']), final['EE-only'],
                         final['H + EE'],
                         exit_ratio(cells['H + EE'], 11) if cells['H + EE'] else '-'])
    return header, rows

def as_run_table():
    """Tables 2 and 3 as the authors compute them: means of batch means, three kinds of weights."""
    header = ['cell, as run', 'seeds', 'steps', 'ternary ("FP")', 'ternarized twice ("1.58-bit")',
              '%', 'latent', 'zeros']
    rows = []
    for cell in ('Baseline', 'H-only', 'EE-only', 'H + EE'):
        several = on_rung('as run', cell)
        if several:
            kinds = {kind: [ppl(r['as_run'][kind][1][-1]) for r in several]
                     for kind in ('ternary', 'ternarized twice', 'latent')}
            worse = [100 * (b / a - 1) for a, b in zip(kinds['ternary'], kinds['ternarized twice'])]
            rows.append([cell, len(several), spread([r['steps'] for r in several]),
                         spread(kinds['ternary']), spread(kinds['ternarized twice']),
                         spread(worse), spread(kinds['latent']),
                         spread([r['weights']['sparsity'] for r in several])])
    return header, rows

def as_run_exits_table():
    """Table 5: every exit on the next token, and on the task that it was trained for."""
    several = on_rung('as run', 'H + EE')
    header = ['layer', 'PPL of the next token (Table 5)', 'PPL of the current token']
    return header, [[layer] + [spread([ppl(r['as_run'][task][0][layer]) for r in several])
                               for task in ('ternary', 'current token')]
                    for layer in range(12 if several else 0)]

def alpha_table():
    """alpha over what weight decay alone leaves: 1.00 is a projection that learned nothing."""
    header, rows = ['cell, as run', 'q', 'k', 'v', 'o', 'up', 'down'], []
    for cell in ('Baseline', 'H-only', 'EE-only', 'H + EE'):
        several = on_rung('as run', cell)
        if several:
            rows.append([cell] + [number(statistics.mean(
                statistics.mean(r['alpha'][name]) for r in several)) for name in header[1:]])
    return header, rows

def dead_table():
    """RMS of the gradient in the last layer, before any training (papers/dead.py)."""
    names = ('q', 'k', 'v', 'o', 'up', 'down')
    return ['cell', *names], [[cell] + [f'{rms[name][-1]:.1e}' for name in names]
                              for cell, rms in kept('dead')['gradients'].items()]

def yardsticks_table():
    """Bits per byte of the test text by others than our models (papers/yardsticks.py)."""
    return ['yardstick', 'bits per byte'], [
        [name, f'{value:.3f}'] for name, value in kept('yardsticks').items()
        if type(value) is float]

def exits_table():
    """Joint exits over the best model without exits, which is chosen on validation text."""
    runs = {label: learned(results('fixed', label)) for label in FIXED}
    val = {label: {r['seed']: r['val'] for r in several} for label, several in runs.items()
           if several and 'exits' not in label and 'EE' not in label}
    shared = set.intersection(*map(set, val.values())) if val else ()
    best = min(val, key=lambda label: sum(val[label][seed] for seed in shared), default=None)
    base = runs.get(best, [])
    rows = [[label, len(several), ratio(several, base)] for label, several in runs.items()
            if 'joint' in label]
    return ['cell', 'seeds', f'PPL × that of "{best}"'], rows if base else []

def rates_table():
    """PPL of the validation text, by rate."""
    cells = {label: [run.result() for run in tuning_runs('rates', label)]
             for label in TABLES['rates'].cells}
    return ['cell', *[f'rate {rate:g}' for rate in TABLES['rates'].rates]], [
        [label, *[number(ppl(r['val'])) for r in several]] for label, several in cells.items()
        if all(several)]

def pairs_table(table):
    """A row a length or width: joint exits beside none, without a final norm."""
    rows, labels = [], list(TABLES[table].cells)
    for rival, exits in zip(labels[::2], labels[1::2]):
        base, several = (learned(results(table, label)) for label in (rival, exits))
        if base and several:
            pairs = len({r['seed'] for r in base} & {r['seed'] for r in several})
            rows.append([exits.split(', ')[-1], several[0]['steps'], pairs,
                         *[spread([ppl(r['exits'][-1]) for r in runs]) for runs in (base, several)],
                         ratio(several, base), exit_ratio(several, 11)])
    return ['', 'steps', 'seeds', 'PPL without exits and final norm', 'joint exits', 'joint ×',
            'one block less ×'], rows

def paper_b_table():
    """Paper B's Tables 3 to 5, in blocks: what leaving after 18 of 24 blocks costs and saves."""
    header = ['cell', 'PPL', 'after 18 blocks', 'PPL +%', 'ratio to 33% speed', 'best exit',
              'std of h, first and last block']
    rows = []
    for label in TABLES['B'].cells:
        for r in learned(results('B', label)):
            full, early = ppl(r['exits'][-1]), ppl(r['exits'][17])
            worse = 100 * (early / full - 1)
            rows.append([label, number(full), number(early), number(worse),
                         number(worse / (100 * (24 / 18 - 1))), 1 + int(np.argmin(r['exits'])),
                         f"{number(r['std'][0])}, {number(r['std'][-1])}"])
    return header, rows

MAKE = {'dead': dead_table, 'yardsticks': yardsticks_table, 'ladder': ladder_table,
        'as_run': as_run_table, 'as_run_exits': as_run_exits_table, 'alpha': alpha_table,
        'exits': exits_table, 'rates': rates_table, 'B': paper_b_table,
        **{name: functools.partial(pairs_table, name) for name in ('length', 'width', 'half_rate')}}
NAMES = (*MAKE, *[table for table in TABLES if table not in MAKE])

def make(name):
    return MAKE[name]() if name in MAKE else cells_table(name)

def show(name, seeds=None):
    """Print a table, aligned."""
    header, rows = make(name)
    text = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*text)]
    print(f'\n{name}: {TABLES[name].title if name in TABLES else MAKE[name].__doc__}')
    for row in text if rows else []:
        print('  ' + '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    if not rows:
        print('  nothing is measured yet')

def markdown(name):
    header, rows = make(name)
    lines = [header, ['---'] * len(header), *rows] if rows else [['nothing is measured yet']]
    return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in lines)

def filled(page):
    """The page, with the tables between their marks as they are now."""
    return re.sub(r'(?s)(<!-- table: (\w+) -->\n).*?(<!-- end -->)',
                  lambda m: f'{m[1]}{markdown(m[2])}\n{m[3]}', page)

@dataclass
class TableSettings:
    """Prints what was measured."""
    table: str = ''  # which one; empty: what there is
    write: bool = False  # write all tables into papers/README.md

def main(argv):
    s = configure(TableSettings, argv)
    if s.write:
        with atomic_write(str(PAGE), 'w') as file:
            file.write(filled(PAGE.read_text(encoding='utf-8')))
    elif s.table and s.table not in NAMES:
        raise UserError(f"there is no table '{s.table}'; there are {', '.join(NAMES)}")
    elif s.table:
        show(s.table)
    else:
        for name in TABLES:
            cells = TABLES[name].cells
            done = sum(len(results(name, label)) for label in cells)
            print(f'{name:9} {done:3} of {len(cells) * TABLES[name].seeds:3} runs  '
                  f'{TABLES[name].title}')

if __name__ == '__main__':
    run(main)
