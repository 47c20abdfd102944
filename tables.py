"""
The papers' tables, made from what ablate.py measured (results/SCALE/*.json), as Markdown. Their figures: plots.py.

    python tables.py                        print all that can be made from the results there are
    python tables.py --readme=True          write them into the pages, between their marks,
                                            <!-- table: NAME --> and <!-- end -->

PPL is per byte on pydocs at the CPU scale, per GPT-2 token in the papers: compare columns of ratios, not of PPL. Where
a cell has several seeds, "±" is their standard deviation.
"""
import json
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import checkpoint
import papers
import train
from ablate import Run
from claims import CLAIMS
from configurator import UserError, configure, run
from experiments import SEEDS, SHORT, TABLES
from measured import (NotMeasured, diverged, final, mean, number, ppl, rate_of, relative, relative_exits,
                      results)
from model import BitSkip, BitSkipConfig
from tradeoff import at_compute

PAGES = Path('README.md'), Path('RESULTS.md'), Path('PRACTICE.md')


# ----------------------------------------------------------------------------------------------------------------------
# functions of the scale that return (header, rows)

def rates(scale):
    """Validation PPL after the short runs, by learning rate (seed 7)."""
    tried, rows = (1e-3, 2e-3, 4e-3, 8e-3), []
    others = TABLES['A2'].cells | TABLES['compose'].cells | TABLES['norm'].cells
    cells = TABLES['routing'].cells | {label: others[label] for label in (
        'EE-only', 'joint training', 'BitLinear, no norm, init 0.1', 'H-BitLinear, no norm, init 0.1')}
    for label, cell in cells.items():
        swept = [Run(cell, rate, SEEDS[0], SHORT, scale).result() for rate in tried]
        if any(swept):
            rows.append([label, *(number(final(result)) if result else '-' for result in swept)])
    return ['cell', *(f'{rate:g}' for rate in tried)], rows


def a2(scale):
    cells = results('A2', scale)
    base = cells.get('Baseline')
    rows = [[label, rate_of(several), len(several), mean(several, final),
             mean(several, lambda r: r['bits_per_byte']), relative(several, base),
             number(papers.A2[label]), number(papers.A2[label] / papers.A2['Baseline'])]
            for label, several in cells.items()]
    return ['cell', 'learning rate', 'seeds', 'PPL', 'bits per byte', '× baseline', "Paper A's PPL", '× baseline'], rows


def a3(scale):
    rows = []
    for label, several in results('A2', scale).items():
        latent, ternary = papers.A3[label]
        change = 100 * (statistics.mean(final(r) / ppl(r['latent']) for r in several) - 1)
        rows.append([label, mean(several, lambda r: ppl(r['latent'])), mean(several, final), f'{change:+.0f}%',
                     number(latent), number(ternary), f'{100 * (ternary / latent - 1):+.0f}%'])
    return ['cell', 'latent PPL', 'ternary PPL', 'change', "Paper A's latent", 'ternary', 'change'], rows


def a4(scale):
    keys = 'mean_scale', 'sparsity', 'high_sparsity_matrices', 'plus', 'minus'
    rows = []
    for label, several in results('A2', scale).items():
        ours = [number(statistics.mean(r['weights'][key] for r in several)) for key in keys]
        rows += [[label, 'ours', *ours], ['', 'Paper A', *map(number, papers.A4[label])]]
    return ['cell', '', 'mean α', 'zeros', 'matrices over 50% zeros', '+1', '−1'], rows


def a5(scale):
    several = results('A2', scale).get('BitSkip (H+EE)')
    if not several:
        return [], []
    rows = []
    for layer, theirs in enumerate(papers.A5):
        worse = statistics.mean(r['exits'][layer] - r['exits'][-1] for r in several)
        rows.append([layer, layer + 1, mean(several, lambda r, layer=layer: ppl(r['exits'][layer])),
                     number(ppl(worse)), number(theirs), number(theirs / papers.A5[-1])])
    return ['layer', 'blocks', 'PPL', '× full depth', "Paper A's PPL", '× full depth'], rows


def plain(name, paper=None):
    """A table of one row a cell: PPL, and its ratio to the first cell's; with the paper's beside them, if given."""
    def table(scale):
        cells = results(name, scale)
        if not cells:
            return [], []
        first = next(iter(cells.values()))
        rows = [[label, rate_of(several), len(several), mean(several, final), relative(several, first)]
                + ([number(paper.get(label))] if paper else []) for label, several in cells.items()]
        return ['cell', 'learning rate', 'seeds', 'PPL', '× first'] + ["paper's PPL"] * bool(paper), rows
    return table


def at_exits(name, layers, paper=None):
    """A table of PPL after certain layers, one row a cell."""
    def table(scale):
        rows = []
        for label, several in results(name, scale).items():
            rows.append([label, len(several), *(mean(several, lambda r, layer=layer: ppl(r['exits'][layer]))
                                                for layer in layers)])
            if paper and label in paper:
                rows.append(['', 'paper', *map(number, paper[label])])
        return ['cell', 'seeds', *(f'layer {layer}' for layer in layers)], rows
    return table


def compose(scale):
    cells = results('compose', scale)
    without_exits = [several for label, several in cells.items() if label.startswith('H-only')]
    if not without_exits:
        return [], []
    best = min(without_exits, key=lambda several: statistics.mean(map(final, several)))
    half, last_but_one, a5 = len(papers.A5) // 2 - 1, len(papers.A5) - 2, papers.A5
    theirs = papers.A2['BitSkip (H+EE)']
    rows = [["Paper A's figures", '-', theirs, number(theirs / papers.A2['H-only']),
             number(a5[last_but_one] / a5[-1]), number(a5[half] / a5[-1]), '0%']]
    for label, several in cells.items():
        at = [mean(several, lambda r, layer=layer: relative_exits(r)[layer]) for layer in (last_but_one, half)]
        extra = parameters(TABLES['compose'].cells[label]) / parameters(TABLES['compose'].cells['H-only']) - 1
        rows.append([label, len(several), mean(several, final), relative(several, best), *at,
                     f'{round(100 * extra, 2) + 0:g}%'])
    return ['model', 'seeds', 'PPL', '× best H-only', f'exit {last_but_one} × own full depth', f'exit {half} ×',
            'extra parameters, 86M'], rows


def tradeoff(scale):
    report = json.loads(Path('results/tradeoff.json').read_text())
    points, n_layer = report['points'], report['n_layer']
    full = points[n_layer - 1]['loss']
    rows = []
    for way in ('fixed', 'confidence', 'saturation', 'gate', 'oracle', 'drafts'):
        row = [way]
        for share in (0.5, 0.7, 0.9):
            loss = at_compute(points, way, share * n_layer)
            agreement = at_compute(points, way, share * n_layer, 'agreement')
            row.append('-' if loss is None else f'{number(ppl(loss - full))} ×, {100 * agreement:.0f}%')
        rows.append(row)
    return ['way to leave early', *(f'{share}% of the blocks' for share in (50, 70, 90))], rows


def gates(scale):
    """What it costs to let gates decide, at a share of the blocks: PPL in units of full depth's."""
    shares, rows = (0.5, 0.7, 0.9), []
    for label, several in results('gates', scale).items():
        costs = [mean(several, lambda r, share=share: ppl(at_compute(r['ways'], 'gate', share * len(r['exits']))
                                                          - r['ways'][len(r['exits']) - 1]['loss']))
                 for share in shares]
        rows.append([label if label != 'joint training' else 'the divergence, in joint training', len(several), *costs])
    return ['gates learn', 'seeds', *(f'{100 * share:.0f}% of the blocks' for share in shares)], rows


def parameters(arguments):
    """Of the model that this command line trains at the paper's scale."""
    settings = configure(train.TrainSettings, arguments.split())
    with torch.device('meta'):
        return sum(p.numel() for p in BitSkip(BitSkipConfig.of(asdict(settings))).parameters())


def leak(scale):
    rows = [[label, number(final(several[0])), number(ppl(several[0].get('unshifted')))]
            for label, several in results('leak', scale).items()]
    return ['training', 'PPL of the next token', 'PPL of the current token'], rows


def latent(scale):
    rows = [[label, number(ppl(several[0]['latent'])), number(final(several[0]))]
            for label, several in results('latent', scale).items()]
    return ['training', 'latent PPL', 'ternary PPL'], rows


def claims(scale):
    rows = []
    for claim in CLAIMS:
        try:
            rows.append([claim.claim, claim.behind, claim.measured(scale), claim.tables()])
        except NotMeasured:
            pass
    return ['claim', 'what is behind it', 'here', '`--table`'], rows


def bench(scale):
    report = json.loads(Path('results/bench.json').read_text())
    rows = []
    for name, b in report['benchmarks'].items():
        cases = []
        for case, r in b['cases'].items():
            time = f'{number(r["tok_per_s"])} tok/s' if 'tok_per_s' in r else f'{number(1000 * r["seconds"])} ms'
            cases.append(f'{case} {time}, {number(r["peak_mib"])} MiB')
        rows.append([name, f'{b["figure"]:.2f}', b['target'], '; '.join(cases)])
    return ['what', 'ratio', 'target', 'cases: median, peak memory'], rows


FOUR = (0, 5, 10, 11)  # exits of a model of 12 layers
MAKE = {'bench': bench, 'claims': claims, 'rates': rates, 'A2': a2, 'A3': a3, 'A4': a4, 'A5': a5,
        'A6': plain('A6', papers.A6), 'A7': plain('A7', papers.A7), 'A8': plain('A8', papers.A8),
        'price': plain('price'), 'cliff': at_exits('cliff', FOUR), 'norm': plain('norm'), 'order': plain('order'),
        'latent': latent, 'leak': leak, 'routing': plain('routing'), 'unrouted': plain('unrouted'),
        'compose': compose, 'gates': gates, 'tradeoff': tradeoff, 'ingredients': at_exits('ingredients', FOUR),
        'around': at_exits('around', FOUR), 'longer': at_exits('longer', FOUR), 'share': at_exits('share', FOUR),
        'B': at_exits('B', (5, 11, 17, 23), paper=papers.B)}
TITLES = {'bench': 'speed and memory', 'claims': "the papers' claims",
          'tradeoff': 'PPL and agreement with full depth, at a share of its blocks',
          'rates': 'validation PPL after short runs, by learning rate', 'A3': 'latent and ternary weights',
          'A4': 'the ternary weights', 'A5': 'every exit of the model with Hadamard and exits'}

DERIVED = ('claims', 'rates', 'A3', 'A4', 'A5')  # from the runs of others


def markdown(name, scale='cpu'):
    """Table `name`, or '' if nothing has been measured for it."""
    own_file = Path('results', f'{name}.json')  # (of those that ablate.py has not measured)
    header, rows = MAKE[name](scale) if name in TABLES or name in DERIVED or own_file.exists() else ([], [])
    if name in TABLES:  # a run that diverged is a result, too
        counts = diverged(name, scale)
        header = header or ['cell', 'seeds'] if counts else header
        rows += [[f'{label}: {n} of {done} diverged', *['-'] * (len(header) - 1)]
                 for label, (n, done) in counts.items()]
    lines = [header, ['---'] * len(header), *rows] if rows else []
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def caption(name):
    return f'{name}: {TITLES.get(name) or TABLES[name].title}'


def update(text, scale='cpu'):
    """`text` with every table between its marks made anew; one of which nothing has been measured stays."""
    def replace(match):
        table = markdown(match[1], scale)
        return f'<!-- table: {match[1]} -->\n*{caption(match[1])}*\n\n{table}\n<!-- end -->' if table else match[0]
    return re.sub(r'<!-- table: (\S+) -->\n.*?<!-- end -->', replace, text, flags=re.DOTALL)


@dataclass
class TablesSettings:
    """Makes the papers' tables from what ablate.py measured."""
    scale: Literal['cpu', 'paper'] = 'cpu'  # whose results
    readme: bool = False  # write the tables into README.md, RESULTS.md and PRACTICE.md, too


def main(argv):
    s = configure(TablesSettings, argv)
    if s.readme and s.scale != 'cpu':
        raise UserError(f'the pages tell of the CPU scale; without --readme, tables of the {s.scale} scale are printed')
    if not list(Path('results', s.scale).glob('*.json')):
        raise UserError(f'there are no results at the {s.scale} scale: python ablate.py --table=A2 --scale={s.scale} '
                        'measures some')
    made = {name: text for name in MAKE if (text := markdown(name, s.scale))}
    for name, text in made.items():
        print(f'\n{caption(name)}\n{text}')
    for page in PAGES if s.readme else ():
        text = update(page.read_text(), s.scale)
        with checkpoint.atomic_write(page, 'w') as file:
            file.write(text)


if __name__ == '__main__':
    run(main)
