"""
The plan: every table of the papers, and those that they should have had, as command lines of train.py.

A table has cells, {label: what follows `python train.py`}; ablate.py trains them, tables.py prints what they measured.
To add an experiment, add a table here and its way to be printed to tables.py:MAKE.
"""
from dataclasses import dataclass, field

RATES = (4e-3, 2e-3)  # learning rates of the CPU scale (1e-3 and 8e-3 lost wherever they were tried)
SEEDS = (7, 8, 9, 10, 11)
BRIEF, SHORT, FULL = 200, 650, 1400  # steps of the CPU scale
FIVE_HUNDRED = {'paper': '--max_iters=500'}  # steps of Paper A's sweeps


@dataclass
class Table:
    """The cells of an experiment, and how they are trained."""
    title: str
    cells: dict
    seeds: int = 1  # at most: how many the question is worth
    steps: int = SHORT  # of the runs that are compared; rates are always compared at SHORT
    rates: tuple = RATES  # one: that of all cells
    on: dict = field(default_factory=dict)  # {label: label of the cell whose finished model it starts from}
    flags: dict = field(default_factory=dict)  # {scale: flags of all cells at this scale}
    scales: tuple = ('cpu', 'paper')  # at which the cells differ

    def arguments(self, label, scale):
        """What follows `python train.py` in a cell."""
        return f'{self.cells[label]} {self.flags.get(scale, "")}'.strip()


AROUND = {label: f'config/compose.py {flags}'.strip() for label, flags in {
    'joint training': '',
    'exits under the final norm': '--exit_norm=final',
    'late exits weigh more (B6)': '--ee_weighting=late',
    'early exits weigh more (A4)': '--ee_weighting=early',
    'λ 1': '--lambda_ee=1',
    'λ 0.3': '--lambda_ee=0.3',
    'each exit learns from its own share of the tokens': '--ee_positions=sampled',
    'exits do not train the head': '--ee_detach_head=True',
    "half of an exit's target is full depth": '--ee_distill=0.5',
    'blocks skipped (A5, p_max 0.2)': '--p_max=0.2',
    "Paper A's routing loss": '--gate_loss=cost --lambda_r=0.2',
    'no final norm at full depth, either': '--final_norm=False',
    'no Hadamard': '--linear=bitlinear',
    'λ from 0 to 4': '--lambda_ee=4 --ee_ramp=up',
    'λ from 4 to 0': '--lambda_ee=4 --ee_ramp=down',
    'adapters of rank 16': '--ee_adapter=16',
    'exits in turn': '--ee_curriculum=rotational',
    'λ 4': '--lambda_ee=4'}.items()}

TABLES = {
    # -- Paper A

    'A2': Table('the four cells of Paper A', {
        'Baseline': 'config/baseline.py',
        'H-only': 'config/bitskip_h.py',
        'EE-only': 'config/bitskip_ee.py',
        'BitSkip (H+EE)': 'config/bitskip_h_ee.py'}, seeds=5, steps=FULL),
    'A6': Table('λ_r, weight of the routing loss (λ_q 0, p_max 0.5)', {
        value: f'config/bitskip_ee.py --p_max=0.5 --lambda_q=0 --lambda_r={value}'
        for value in ('0', '0.01', '0.05', '0.1', '0.2')}, steps=BRIEF, rates=RATES[:1],
        flags=FIVE_HUNDRED),
    'A7': Table('λ_q, weight of the quantization loss (λ_r 0.05, p_max 0.5)', {
        value: f'config/bitskip_ee.py --p_max=0.5 --lambda_q={value} --lambda_r=0.05'
        for value in ('0', '0.01', '0.05', '0.1', '0.2')}, steps=BRIEF, rates=RATES[:1],
        flags=FIVE_HUNDRED),
    'A8': Table('routing on (λ_r 0.2, λ_q 0.05) or off, and p_max of layer skipping', {
        'off, 0.7': 'config/bitskip_ee.py --p_max=0.7 --lambda_q=0 --lambda_r=0',
        'off, 0.5': 'config/bitskip_ee.py --p_max=0.5 --lambda_q=0 --lambda_r=0',
        'off, 0.2': 'config/bitskip_ee.py --p_max=0.2 --lambda_q=0 --lambda_r=0',
        'on, 0.7': 'config/bitskip_ee.py --p_max=0.7 --lambda_q=0.05 --lambda_r=0.2',
        'on, 0.5': 'config/bitskip_ee.py --p_max=0.5 --lambda_q=0.05 --lambda_r=0.2',
        'on, 0.2': 'config/bitskip_ee.py --p_max=0.2 --lambda_q=0.05 --lambda_r=0.2'}, steps=BRIEF, rates=RATES[:1],
        flags=FIVE_HUNDRED),

    # -- what may be behind the papers' figures

    'price': Table('ternary against full precision, without the routing loss', {
        f'{name}{ending}': f'{arguments} --lambda_r=0{flag}'
        for ending, flag in (('', ''), (', no final norm', ' --final_norm=False'))
        for name, arguments in (('full precision', 'config/baseline.py --linear=fp'),
                                ('BitLinear', 'config/baseline.py'), ('H-BitLinear', 'config/bitskip_h.py'))}),
    'cliff': Table('what makes the cliff of Table A5', {
        'shifted labels, final norm': 'config/bitskip_h_ee.py',
        'shifted labels, no norm': 'config/bitskip_h_ee.py --exit_norm=none',
        'unshifted labels, final norm': 'config/bitskip_h_ee.py --unshifted=exits',
        'unshifted labels, no norm': 'config/bitskip_h_ee.py --unshifted=exits --exit_norm=none'},
        seeds=3, steps=FULL, rates=RATES[:1]),
    'norm': Table('what of "Hadamard" is Hadamard', {
        f'{name}, {norm}, init {scale}': f'{arguments}{norm_flag}{scale_flag}'
        for norm, norm_flag in (('no norm', ''), ('LayerNorm', ' --linear_norm=layernorm'),
                                ('RMSNorm', ' --linear_norm=rmsnorm'))
        for scale, scale_flag in ((1, ''), (0.1, ' --init_scale=0.1'))
        for name, arguments in (('BitLinear', 'config/baseline.py'), ('H-BitLinear', 'config/bitskip_h.py'))},
        rates=RATES[:1]),
    'order': Table('Hadamard: where, when, and before how many bits', {
        'none, 8 bits': 'config/baseline.py',
        'before Q, all (A3), 8 bits': 'config/bitskip_h.py',
        'before Q, o and down, 8 bits': 'config/bitskip_h.py --hadamard_layers=o,down',
        "after Q, twice (authors'), 8 bits": 'config/bitskip_h.py --linear=hadamard_after',
        'none, 4 bits': 'config/baseline.py --act_bits=4',
        'before Q, all (A3), 4 bits': 'config/bitskip_h.py --act_bits=4',
        'before Q, o and down, 4 bits': 'config/bitskip_h.py --hadamard_layers=o,down --act_bits=4',
        "after Q, twice (authors'), 4 bits": 'config/bitskip_h.py --linear=hadamard_after --act_bits=4'},
        seeds=3, rates=RATES[:1]),
    'latent': Table('no straight-through: ternarize afterwards (Table A3)', {
        'BitLinear, straight-through': 'config/baseline.py',
        'BitLinear, latent': 'config/baseline.py --train_latent=True',
        'H-BitLinear, straight-through': 'config/bitskip_h.py',
        'H-BitLinear, latent': 'config/bitskip_h.py --train_latent=True'}, rates=RATES[:1]),
    'leak': Table('how PPL 1.13 comes about (Paper B)', {
        'as it should be': 'config/baseline.py',
        'sees the future': 'config/baseline.py --causal=False',
        'unshifted labels': 'config/baseline.py --unshifted=all'}, rates=RATES[:1]),

    # -- Hadamard and exits, composed

    'compose': Table('Hadamard and exits, composed', {
        'H-only': 'config/bitskip_h.py',
        'H-only, no routing loss': 'config/bitskip_h.py --lambda_r=0',
        'H-only, no routing loss, no final norm': 'config/bitskip_h.py --lambda_r=0 --final_norm=False',
        'joint training': 'config/compose.py',
        'exits on a finished model': 'config/compose_frozen.py',
        "Paper A's recipe": 'config/bitskip_h_ee.py'},
        seeds=5, steps=FULL, on={'exits on a finished model': 'H-only, no routing loss, no final norm'}),
    'gates': Table('what gates should learn: trained on the finished model of joint training', {
        'joint training': 'config/compose.py'} | {
        label: f'--freeze=True --lambda_ee=0 --lambda_r=1 --learning_rate=0.002 {flags}' for label, flags in {
            'a mean exit (A9)': '--gate_loss=cost --target_exit=7',
            'the same choice': '--gate_loss=agreement',
            'the overlap': '--gate_loss=overlap',
            'the divergence': '--gate_loss=divergence'}.items()},
        seeds=3, steps=FULL, on=dict.fromkeys(('a mean exit (A9)', 'the same choice', 'the overlap', 'the divergence'),
                                              'joint training')),
    'routing': Table('what the routing loss (A9) costs', {
        f'{name}, λ_r {value}': f'{arguments}{flag}'
        for name, arguments in (('Baseline', 'config/baseline.py'), ('H-only', 'config/bitskip_h.py'),
                                ('Baseline, init 0.1', 'config/baseline.py --init_scale=0.1'),
                                ('BitSkip (H+EE)', 'config/bitskip_h_ee.py'),
                                ('full precision', 'config/baseline.py --linear=fp'))
        for value, flag in ((0.2, ''), (0, ' --lambda_r=0'))} | {
        'H-only, λ_r 0.2, gates alone': 'config/bitskip_h.py --gate_detach=True'}),
    'unrouted': Table('the four cells of Paper A without the routing loss', {
        'Baseline': 'config/baseline.py --lambda_r=0',
        'H-only': 'config/bitskip_h.py --lambda_r=0',
        'EE-only': 'config/bitskip_ee.py --lambda_r=0',
        'BitSkip (H+EE)': 'config/bitskip_h_ee.py --lambda_r=0'}, seeds=5, steps=FULL),
    'ingredients': Table('what exits do to the model that they are trained with, one change at a time', {
        'H-only': 'config/bitskip_h.py',
        "Paper A's recipe": 'config/bitskip_h_ee.py',
        'no layer skipping': 'config/bitskip_h_ee.py --p_max=0',
        'late exits weigh more': 'config/bitskip_h_ee.py --p_max=0 --ee_weighting=late',
        'exits in turn': 'config/bitskip_h_ee.py --p_max=0 --ee_curriculum=rotational'} | {
        label: f'config/bitskip_h_ee.py --p_max=0 --ee_positions=sampled {flags}'.strip() for label, flags in {
            'sampled positions': '',
            'sampled, λ 0.1': '--lambda_ee=0.1',
            'sampled, λ 1': '--lambda_ee=1',
            'sampled, λ 3': '--lambda_ee=3',
            'sampled, λ from 0.6 to 0': '--lambda_ee=0.6 --ee_ramp=down',
            'sampled, λ from 0 to 0.6': '--lambda_ee=0.6 --ee_ramp=up',
            'sampled, head detached': '--ee_detach_head=True',
            'sampled, half distilled': '--ee_distill=0.5',
            'sampled, adapters': '--ee_adapter=16',
            'sampled, λ 1, adapters': '--lambda_ee=1 --ee_adapter=16'}.items()} | {
        'sampled, gentle skipping': 'config/bitskip_h_ee.py --ee_positions=sampled --p_max=0.2',
        'sampled, gentle skipping, of the last block too':
            'config/bitskip_h_ee.py --ee_positions=sampled --p_max=0.2 --skip_last=True'}, rates=RATES[:1]),
    'around': Table('joint training, one ingredient changed', AROUND, rates=RATES[:1]),
    'longer': Table('joint training, one ingredient changed, in full', AROUND, steps=FULL, rates=RATES[:1]),
    'share': Table('how many tokens an exit needs in a step', {
        f'{8 * 256 * more:,} tokens a step, each exit learns from {share}': f'config/compose.py{batch}{flag}'
        for more, batch in ((1, ''), (4, ' --batch_size=32'))
        for share, flag in (('all', ''), ('a share of its own', ' --ee_positions=sampled'))},
        steps=300, rates=RATES[:1], scales=('cpu',)),

    # -- Paper B, on two CPU cores narrow: 24 layers stay 24

    'B': Table("Paper B's variants in both phases", {
        f'{name}, phase {phase}': f'config/{config}.py{overlay}'
        for name, config in (('V1', 'tinystories_v1'), ('V2', 'tinystories_v2'), ('V3', 'tinystories_v3'),
                             ('Llama3', 'layerskip'))
        for phase, overlay in ((1, ' config/phase1.py'), (2, ''))}, steps=250, rates=RATES[:1],
        flags={'cpu': '--n_embd=64 --n_head=4 --n_kv_head=2 --ffn_dim=128'}),
}
