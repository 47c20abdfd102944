"""
The plan: every experiment as cells, each a command line. The most informative come first.

    ladder    from as run to fixed, one change a rung: what is Hadamard, what made the cliff
    fixed     the 2 x 2 of Paper A, {BitLinear, H-BitLinear} x {no exits, exits}, and our exits
              against the best model without exits, at equal tokens and at equal time
    rates     three rates for three of the cells, to choose one for all
    twin      config/compose.py beside its twin in the shape that llama.cpp takes
    length    joint exits against none at a quarter of the length, and at four times
    width     and at widths 32 and 128, with equal tokens per parameter
    half_rate some of these at half the rate
    heads     Paper A's recommendation: own heads, adapters, distillation
    decay     an exit loss that decays to zero
    routing   the routing loss through the blocks, and cut off from them
    B         Paper B's variants, narrow
    scale     Paper A's own scale, as run and fixed: 86M parameters, for a GPU

papers/ablate.py trains them, papers/tables.py prints what was measured. To add an experiment, add a
table here. A command that two tables have is trained once, for the first of them.
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

from papers.measures import LADDER

RESULTS = Path(__file__).with_name('results')
SEEDS = (7, 8, 9, 10, 11)
TUNING_SEED = 6  # chooses rates, and is reported nowhere
RATE = 8e-3  # of all below but the ladder and Paper B: table "rates"

@dataclass
class Table:
    """An experiment: {label: command line}, how many seeds, and the rates to choose from (on the
    validation text, by a run with TUNING_SEED); none: the command's own."""
    title: str
    cells: dict
    seeds: int = 3
    rates: tuple = ()

# Paper A's regime in miniature: four epochs of 290 steps on a short text (papers/ablate.py), at the
# rate of a long cosine's beginning. 12 blocks of width 64, 512 bytes a step.
EPOCH_STEPS = 290
AS_RUN = ('config/cpu.py --n_embd=64 --ffn_dim=256 --n_head=2 --n_kv_head=1 --block_size=64 '
          '--data_dir=data/short --max_iters=1160 --eval_interval=145 --learning_rate=6e-4 '
          '--schedule=wsd --decay_frac=0 --warmup_iters=100')
OF_BASELINE = 'inner LayerNorm in both cells'  # the columns with H have it from the start
EXITS = '--lambda_ee=0.3 --p_max=0.7 --lambda_q=0.05 --lambda_r=0.2'

def ladder():
    """{'rung, column': command}: rungs pile up; a column climbs the rungs that touch it."""
    cells, flags = {}, {}
    for rung, change in LADDER.items():
        flags |= change
        words = [f'--{name}={value}' for name, value in flags.items()]
        of_exits = any(name.startswith(('exit_', 'ee_', 'lambda_')) for name in change)
        of_baseline = rung == OF_BASELINE
        for column, exits, climbs in (
                ('Baseline', '', not of_exits), ('H-only', '', not of_exits and not of_baseline),
                ('EE-only', EXITS, not change), ('H + EE', EXITS, not of_baseline)):
            if climbs:
                linear = 'hbitlinear' if column.startswith('H') else 'bitlinear'
                cells[f'{rung}, {column}'] = ' '.join(
                    ['-m papers.as_run', AS_RUN, f'--linear={linear}', *exits.split(), *words])
    return cells

CPU = 'train.py config/{}.py config/cpu.py'
JOINT, JOINT_B = CPU.format('compose'), CPU.format('compose') + ' --linear=bitlinear'
# A step with joint exits takes 1.17 times as long as one without (papers/results/steps.json)
EQUAL_TIME = ' --max_iters=860 --eval_interval=430'
# Paper A's four cells; the two without exits once more without a final norm; and our recipe
FIXED = {
    'Baseline': CPU.format('baseline'), 'H-only': CPU.format('bitskip_h'),
    'EE-only': CPU.format('bitskip_ee'), 'H + EE': CPU.format('bitskip_h_ee'),
    'Baseline, no final norm': CPU.format('baseline') + ' --exit_norm=raw',
    'H-only, no final norm': CPU.format('bitskip_h') + ' --exit_norm=raw',
    'joint exits': JOINT_B, 'H + joint exits': JOINT,
    'joint exits, equal time': JOINT_B + EQUAL_TIME,
    'H + joint exits, equal time': JOINT + EQUAL_TIME}
# without exits, and with
RIVALS = {label: FIXED[label] for label in ('Baseline, no final norm', 'joint exits')}
QUARTER = ' --max_iters=250 --eval_interval=250'

def wider(cells, width, steps):
    flags = f'--n_embd={width} --ffn_dim={4 * width} --max_iters={steps} --eval_interval={steps}'
    return {f'{label}, width {width}': f'{command} {flags}' for label, command in cells.items()}

HEADS = '-m papers.heads config/compose.py config/cpu.py'
# pydocs in GPT-2's tokens is as long as WikiText-2; an epoch has some 300 steps
SCALE = '--dataset=pydocs --tokenizer=gpt2 --batch_size=16 --gradient_accumulation_steps=1'
SCALE += ' --max_iters=1800 --eval_interval=300 --patience=0'
NARROW = '--n_layer=24 --ffn_dim=128'

TABLES = {
    'ladder': Table('from as run to fixed, one change a rung', ladder()),
    'fixed': Table('Paper A, fixed, and our exits', FIXED, 5, (RATE,)),
    'rates': Table('which rate: validation text, and a seed that is reported nowhere else', {
        label: FIXED[label] for label in ('Baseline', 'H-only', 'EE-only')}, 0,
        (RATE / 2, RATE, 2 * RATE)),
    'twin': Table('config/compose.py, and its twin that llama.cpp takes', {
        'H + joint exits': JOINT,
        'the twin': JOINT_B + ' --norm=rmsnorm --sub_norm=False --exit_norm=final'}, 3, (RATE,)),
    'length': Table('a quarter of the length, and four times it', {
        f'{label}, {length}': command + more for length, more in (
            ('a quarter', QUARTER), ('the length', ''), ('four times', ' config/cpu_long.py'))
        for label, command in RIVALS.items()}, 3, (RATE,)),
    'width': Table('widths 32 and 128, equal tokens per parameter',
                   wider(RIVALS, 32, 250)
                   | {f'{label}, width 64': command for label, command in RIVALS.items()}
                   | wider(RIVALS, 128, 4000), 3, (RATE,)),
    'half_rate': Table('widths 64 and 128 at half the rate', {
        f'{label}, width 64': command for label, command in RIVALS.items()} | {
        f'{label}, width 64 with H': FIXED[label]
        for label in ('H-only, no final norm', 'H + joint exits')}
        | wider(RIVALS, 128, 4000), 3, (RATE / 2,)),
    'heads': Table("Paper A's recommendation", {
        'shared head': JOINT, 'own heads': f'{HEADS} --exit_head=own',
        'adapters': f'{HEADS} --exit_head=adapter',
        'adapters, distilled': f'{HEADS} --exit_head=adapter --distill=0.5'}, 3, (RATE,)),
    'decay': Table('an exit loss that decays to zero', {
        'joint exits': JOINT_B, 'decaying': '-m papers.decay config/compose.py config/cpu.py '
                                            '--linear=bitlinear'}, 3, (RATE,)),
    'routing': Table('the routing loss', {'without': CPU.format('bitskip_h')} | {
        label: f'{module} config/bitskip_h.py config/cpu.py --lambda_r=0.2'
        for label, module in (('through the blocks', 'train.py'),
                              ('to the gates alone', '-m papers.routing Detached'),
                              ('clipped apart', '-m papers.routing Clipped'))}, 3, (RATE,)),
    'B': Table("Paper B's variants, 24 narrow blocks, bytes", {
        name: f'{CPU.format(config)} {NARROW} {flags}'.strip() for name, config, flags in (
            ('V1', 'tinystories_v1', ''), ('V2', 'tinystories_v2', ''),
            ('V3', 'tinystories_v3', ''), ('LayerSkip', 'layerskip', ''), ('Llama3', 'llama3', ''),
            ('V1, phase 1', 'tinystories_v1', '--lambda_ee=0 --p_max=0'))}, 1, (4e-3,)),
    'scale': Table("Paper A's own scale", {
        f'as run, {cell}': f'-m papers.as_run {SCALE} --schedule=wsd --decay_frac=0 {flags}'
        for cell, flags in (('Baseline', '--linear=bitlinear'), ('H-only', '--linear=hbitlinear'),
                            ('EE-only', f'--linear=bitlinear {EXITS}'),
                            ('H + EE', f'--linear=hbitlinear {EXITS}'))} | {
        f'fixed, {cell}': f'train.py config/{config}.py {SCALE}' for cell, config in (
            ('Baseline', 'baseline'), ('H-only', 'bitskip_h'), ('EE-only', 'bitskip_ee'),
            ('H + EE', 'bitskip_h_ee'))}, 1)}

FIRST = {}  # {command: the first table and label that have it}
for _table in TABLES:
    for _label, _command in TABLES[_table].cells.items():
        FIRST.setdefault(_command, (_table, _label))

@dataclass(frozen=True)
class Run:
    """One training: a cell of a table, a seed, and a rate (None: the command's own)."""
    table: str
    label: str
    seed: int
    rate: float | None = None

    @property
    def name(self):
        rate = f'-lr{self.rate:g}' if self.rate else ''
        return re.sub(r'[^\w.-]+', '_', self.label) + f'{rate}-s{self.seed}'

    @property
    def path(self):
        return RESULTS / self.table / f'{self.name}.json'

    @property
    def out_dir(self):
        return Path('out', 'papers', self.table, self.name)

    def command(self):
        words = TABLES[self.table].cells[self.label].split()
        rate = [f'--learning_rate={self.rate:g}'] if self.rate else []
        return words + rate + [f'--seed={self.seed}']

    def result(self):
        return json.loads(self.path.read_text(encoding='utf-8')) if self.path.exists() else None

def the_run(table, label, seed, rate):
    return Run(*FIRST[TABLES[table].cells[label]], seed, rate)

def tuning_runs(table, label):
    rates = TABLES[table].rates
    return [the_run(table, label, TUNING_SEED, r) for r in rates] if len(rates) > 1 else []

def best_rate(table, label):
    """The rate with the lowest validation loss; None while that is not known, or not asked."""
    done = {r.rate: r.result() for r in tuning_runs(table, label)}
    if not done:
        return (*TABLES[table].rates, None)[0]
    return None if None in done.values() else min(done, key=lambda rate: done[rate]['val'])

def reported_runs(table, label, seeds):
    """The runs of a cell that its table reports; none while its rate is not known."""
    rate = best_rate(table, label)
    if TABLES[table].rates and rate is None:
        return []
    return [the_run(table, label, seed, rate) for seed in SEEDS[:min(seeds, TABLES[table].seeds)]]

def all_runs(table, seeds):
    """Seed by seed, so that a table is whole early."""
    runs = [r for label in TABLES[table].cells for r in tuning_runs(table, label)]
    found = [reported_runs(table, label, seeds) for label in TABLES[table].cells]
    runs += [cell[i] for i in range(max(map(len, found))) for cell in found if i < len(cell)]
    return list(dict.fromkeys(runs))
