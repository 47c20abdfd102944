"""
What the papers claim, what we think is behind it, and what came of it here: rows for tables.py.

`here` holds measurements in braces, each a table of experiments.py and what to take from it:

    {A2: H-only / Baseline}     PPL of a cell over that of another, mean ± standard deviation over the seeds of both
    {leak: sees the future}     PPL of a cell; `{...: cell | latent}` with latent weights, or of another of its losses
    {cliff: cell @ 10}          PPL at exit 10 over that of full depth
"""
import re
import statistics
from dataclasses import dataclass

from measured import cell, factor, final, number, over_seeds, ppl, relative, relative_exits

MEASUREMENT = re.compile(r'\{(\w+): (.*?)\}')


@dataclass
class Claim:
    claim: str
    behind: str
    here: str

    def measured(self, scale):
        """`here` with its measurements. NotMeasured if one has not been made."""
        return MEASUREMENT.sub(lambda match: measurement(scale, *match.groups()), self.here)

    def tables(self):
        return ', '.join(dict.fromkeys(table for table, _ in MEASUREMENT.findall(self.here)))


def measurement(scale, table, what):
    if ' / ' in what:
        a, b = what.split(' / ')
        return relative(cell(table, a, scale), cell(table, b, scale))
    if ' @ ' in what:
        label, layer = what.split(' @ ')
        return over_seeds([relative_exits(r)[int(layer)] for r in cell(table, label, scale)], factor)
    label, _, key = what.partition(' | ')
    return number(statistics.mean(ppl(r[key]) if key else final(r) for r in cell(table, label, scale)))


CLAIMS = [
    Claim('Hadamard lowers PPL by 19%: × 0.81 (A, Table 2)',
          "A3 brings a norm along, and the authors' BitLinear starts from weights a tenth as large. Where both have "
          'the same norms and weights, only the transform differs',
          '× {A2: H-only / Baseline}; without the routing loss, in short runs, '
          '× {routing: H-only, λ_r 0 / Baseline, λ_r 0}'),
    Claim('the same', "what the authors' two layers differ in: the transform, a norm in the layer, and ten times "
          'its initial weights',
          'all three × {norm: H-BitLinear, LayerNorm, init 1 / BitLinear, no norm, init 0.1}, without the transform '
          '× {norm: BitLinear, LayerNorm, init 1 / BitLinear, no norm, init 0.1}'),
    Claim('exits cost 10%, with Hadamard 17% (A, Table 2)',
          "unknown; exits that learn the current token, as in the authors' code, do no harm to full depth here either "
          '(under the final norm)',
          "× {A2: EE-only / Baseline}, with Hadamard × {A2: BitSkip (H+EE) / H-only}; with the authors' labels "
          'at the exits × {cliff: unshifted labels, final norm / shifted labels, final norm} more'),
    Claim('the same', 'all four cells have the routing loss, which harms those without exits more',
          'without it, in short runs, with Hadamard × {routing: BitSkip (H+EE), λ_r 0 / H-only, λ_r 0}'),
    Claim('the same', 'it takes exits that read the state without a norm, and weigh twice as much as full depth '
          '(`config/compose.py`)',
          'against the best H-only × {compose: joint training / H-only, no routing loss, no final norm}'),
    Claim('leaving one layer early is 57 times worse (A, Table 5)',
          "in the authors' code the exits learn the current token, not the next one",
          'exits that learn the next token: × {cliff: shifted labels, final norm @ 10}, the current one: '
          '× {cliff: unshifted labels, final norm @ 10}'),
    Claim('ternary weights make PPL 1.9 to 3.5 times as large (A, Table 3)',
          'no straight-through: latent weights were trained, and ternarized afterwards',
          'latent {latent: BitLinear, latent | latent}, ternarized {latent: BitLinear, latent}; if trained through the '
          'quantizer, ternary {latent: BitLinear, straight-through}'),
    Claim('PPL 1.13 on TinyStories (B, Table 4)', 'attention without a causal mask',
          'PPL {leak: sees the future}, with the mask {leak: as it should be}'),
    Claim('the same', 'unshifted labels, in training and in evaluation',
          'PPL {leak: unshifted labels | unshifted}, of the next token {leak: unshifted labels}'),
    Claim('Hadamard ruins: PPL 428 instead of 1.13 (B, V3 against V1)',
          "the authors' code transforms after the quantizer, without normalization, and the output once more",
          "theirs × {order: after Q, twice (authors'), 8 bits / none, 8 bits}, before the quantizer (A3) "
          '× {order: before Q, all (A3), 8 bits / none, 8 bits}, so in V3 against V1, 24 narrow blocks, '
          '× {B: V3, phase 2 / V1, phase 2}'),
    Claim('behind a Hadamard transform 4 bits are enough for activations (B, V2; BitNet v2)',
          'it spreads outliers, so that few levels suffice',
          '4 bits against 8: × {order: none, 4 bits / none, 8 bits} without, '
          '× {order: before Q, all (A3), 4 bits / before Q, all (A3), 8 bits} with'),
    Claim('1.58 bits cost 4% (best published, 700M parameters)',
          'here 2.3M parameters and 650 steps, without the routing loss',
          '× {price: BitLinear / full precision}'),
    Claim('λ_r = 0.2 is best, by up to 3% (A, Table 6)', 'one seed each, 500 steps; the loss reaches every block '
          'through the gates',
          'λ_r = 0.2 against 0: × {A6: 0.2 / 0} after 200 steps, × {compose: H-only / H-only, no routing loss} for '
          'H-only in full'),
    Claim('λ_q = 0.05 is best, by up to 2% (A, Table 7)',
          'A8 is a mean over all weights, so with λ_q 0.2 its gradient is 2e-5 of the whole, 1e-6 at the start '
          '(`test_quant.py:test_a8_hardly_reaches_the_weights`): all rows are one experiment, but for rounding',
          'λ_q = 0.05 against 0: × {A7: 0.05 / 0}, 0.2 against 0: × {A7: 0.2 / 0}, which is how far chance goes in 200 '
          'steps'),
    Claim('the more layers are skipped the better, by up to 3% (A, Table 8)', 'the same',
          'p_max = 0.2 against 0.7, no routing: × {A8: off, 0.2 / off, 0.7}'),
]
