"""
The exercises: every check passes for a right answer, and none is there in vain.

ANSWERS holds a right answer to each exercise, and typical wrong ones: the same text with a piece replaced. A wrong
answer must be caught by a check, and every check must catch a wrong answer. (If you are here to solve them: this page
spoils the fun.)
"""
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import exits
import hadamard
import quant

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / 'EXERCISES.md').read_text()
FILES = sorted(path.stem for path in (ROOT / 'exercises').glob('ex*.py'))
TRAINING = ('ex15_cliff', 'ex16_future')  # whose figures take a minute

# {exercise: (right answer, [(piece, wrong piece), ...])}
ANSWERS = {
    'ex01_butterfly': ("""
def fwht(x):
    n, half = x.shape[-1], 1
    y = x * n ** -0.5
    while half < n:
        pairs = y.reshape(*x.shape[:-1], -1, 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        half *= 2
    return y
""", [('x * n ** -0.5', 'x'),  # the authors': unnormalised
      ('n ** -0.5', '(1 / n)'),
      ('a - b', 'b - a'),
      ('dim=-2', 'dim=-1'),  # right numbers in another order
      ('half < n', 'half < n // 2'),  # a round too few
      ('y = x * n ** -0.5', 'y = x.mul_(n ** -0.5)'),  # x is the caller's
      ('    n, half = x', '    from hadamard import fwht\n    return fwht(x)\n    n, half = x')]),  # exercise 7

    'ex02_ternary': ("""
def ternary(w):
    alpha = w.abs().mean().clamp(min=1e-20)
    return (w / alpha).round().clamp(-1, 1).to(torch.int8), alpha

def ternary_by_thresholds(w):
    half = w.abs().mean() / 2
    return (w > half).int() - (w < -half).int()
""", [('w.abs().mean().clamp', 'w.abs().max().clamp'),
      ('w.abs().mean().clamp', 'w.abs().median().clamp'),
      ('w.abs().mean().clamp', 'w.abs().mean(dim=1, keepdim=True).clamp'),  # one alpha per row
      ('(w / alpha).round()', '(w / alpha + 0.5).floor()'),  # ties go up
      ('(w / alpha).round()', '(w / alpha)'),  # truncates
      ('(w / alpha).round().clamp(-1, 1)', 'w.sign()'),  # BitNet's first version: no zeros
      ('w.abs().mean() / 2', 'w.abs().mean()'),
      ('w > half', 'w >= half'),
      ('w.abs().mean() / 2', '0.7 * w.abs().mean()')]),  # the threshold of Ternary Weight Networks

    'ex03_activations': ("""
def activation_quant(x, bits):
    q = 2 ** (bits - 1) - 1
    step = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20) / q
    return (x / step).round().clamp(-q - 1, q).to(torch.int8), step
""", [('amax(dim=-1, keepdim=True)', 'amax()'),  # one scale for all tokens
      ('amax(dim=-1, keepdim=True)', 'mean(dim=-1, keepdim=True)'),
      ('- 1) - 1', '- 1)'),  # q = 128 does not fit
      ('x.abs()', 'x'),
      ('.round()', ''),
      ('.round()', '.floor()')]),

    'ex04_straight_through': ("""
def ternary_ste(w):
    codes, alpha = weight_ternary(w)
    return w + (codes * alpha - w).detach()
""", [('w + (codes * alpha - w).detach()', 'ternary_plain(w)'),
      ('w + (codes * alpha - w).detach()', 'codes * alpha'),  # no gradient at all
      ('(codes * alpha - w).detach()', '(codes * alpha - w)'),
      ('w + (codes * alpha - w).detach()', '(w + (codes - w).detach()) * alpha'),  # the gradient comes out times alpha
      ('w + (codes', 'w.clamp(-alpha, alpha) + (codes'),  # clipped
      ('alpha - w).detach()', 'alpha).detach()')]),

    'ex05_pack': ("""
def pack(codes):
    k = codes.shape[-1]
    digits = torch.nn.functional.pad(codes.int() + 1, (0, -k % 5), value=1).unflatten(-1, (-1, 5))
    return (digits * torch.tensor([1, 3, 9, 27, 81])).sum(-1).to(torch.uint8)

def unpack(packed, k):
    digits = packed[..., None].int() // torch.tensor([1, 3, 9, 27, 81]) % 3
    return (digits.flatten(-2)[..., :k] - 1).to(torch.int8)
""", [('(digits * torch.tensor([1, 3, 9, 27, 81]))', '(digits * torch.tensor([81, 27, 9, 3, 1]))'),
      ('(digits * torch.tensor([1, 3, 9, 27, 81]))', '(digits * torch.tensor([1, 4, 16, 64, 256]))'),
      ('codes.int() + 1', 'codes.int()'),
      ('value=1', 'value=0'),  # filled up with digit 0, which is code -1
      ('% 3', '% 4'),
      ('[..., :k]', ''),
      (' - 1).to(torch.int8)', ').to(torch.int8)')]),

    'ex06_integers': ("""
def integer_linear(x, w, bits=8):
    x_codes, x_scale = activation_quant(x, bits)
    w_codes, w_scale = weight_ternary(w)
    return (x_codes.int() @ w_codes.int().T).float() * x_scale * w_scale
""", [('x_codes.int() @ w_codes.int().T', 'x_codes @ w_codes.T'),  # int8 sums
      ('x_codes.int() @ w_codes.int().T', 'x_codes.short() @ w_codes.short().T'),
      ('x_codes.int() @ w_codes.int().T', 'x_codes.bfloat16() @ w_codes.bfloat16().T'),
      (' * x_scale', ''),
      (' * w_scale', ' / w_scale'),
      ('activation_quant(x, bits)', 'activation_quant(x)'),
      ('* x_scale', '* x_scale.max()'),
      ('.float() * x_scale * w_scale', ' * x_scale.int() * w_scale')]),

    'ex07_kronecker': ("""
def fwht_kronecker(x):
    m = x.shape[-1].bit_length() - 1
    a, b = 2 ** (m // 2), 2 ** (m - m // 2)
    X = x.reshape(-1, a, b)
    Y = signs(a, x.dtype, x.device) @ X @ signs(b, x.dtype, x.device)
    return Y.reshape(x.shape) * (a * b) ** -0.5
""", [('2 ** (m // 2), 2 ** (m - m // 2)', '1, 2 ** m'),  # one large matrix
      (' * (a * b) ** -0.5', ''),
      (' @ signs(b, x.dtype, x.device)', ''),
      ('reshape(-1, a, b)', 'reshape(-1, b, a).transpose(1, 2)'),
      ('x.reshape(-1, a, b)', 'x.flatten(0, -2).T.reshape(-1, a, b)')]),

    'ex08_outliers': ("""
def quantization_error(x, bits, order):
    before = order == 'before'
    codes, step = activation_quant(fwht(x) if before else x, bits)
    x_hat = fwht(codes * step) if before else codes * step
    return ((x_hat - x).norm() / x.norm()).item()
""", [("order == 'before'", "order != 'none'"),
      ('fwht(codes * step) if before else codes * step', 'codes * step'),  # compared in another space
      ('fwht(x) if before else x', 'x'),
      (' / x.norm()', ''),
      ('.norm() / x.norm()', '.norm() ** 2 / x.norm() ** 2'),
      ('activation_quant(fwht(x) if before else x, bits)', 'activation_quant(fwht(x) if before else x)')]),

    'ex09_exit_loss': ("""
def exit_loss(logits, tokens, weighting):
    L, exits = len(logits), logits[:-1]
    l = torch.arange(float(len(exits)))
    w = L - l if weighting == 'early' else l + 1
    losses = [F.cross_entropy(exit[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) for exit in exits]
    return w / w.sum() @ torch.stack(losses)
""", [('exit[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()', 'exit.flatten(0, 1), tokens.flatten()'),  # the authors'
      ('exit[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()', 'exit[:, 1:].flatten(0, 1), tokens[:, :-1].flatten()'),
      ('exit[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()', 'exit.flatten(0, 1), tokens.roll(-1, 1).flatten()'),
      ('w / w.sum()', 'w'),
      ('L - l if', 'L - 1 - l if'),
      ("'early'", "'late'"),
      ('logits[:-1]', 'logits')]),  # the last layer as well

    'ex10_skipping': ("""
def skip_probabilities(n_layer, p_max):
    return [p_max * (l / (n_layer - 1)) ** 2 for l in range(n_layer - 1)] + [0.0]

def saved_share(n_layer, p_max):
    return sum(skip_probabilities(n_layer, p_max)) / n_layer

def run_block(block, h, p):
    keep = torch.rand(len(h)) >= p
    if not keep.any():
        return h
    y = h.clone()
    y[keep] = block(h[keep])
    return y
""", [('l / (n_layer - 1)', 'l / n_layer'),  # B2
      (' for l in range(n_layer - 1)] + [0.0]', ' for l in range(n_layer)]'),  # the last layer as well
      (') ** 2', ')'),
      ('/ n_layer\n', '/ (n_layer - 1)\n'),
      ('>= p', '< p'),  # keeps what it should skip
      ('torch.rand(len(h))', 'torch.rand(1).expand(len(h))'),  # all samples together
      ('    if not keep.any():', '    return torch.where(keep[:, None, None], block(h), h)\n    if not keep.any():'),
      ('    if not keep.any():\n        return h\n', ''),
      ('y[keep] = block(h[keep])', 'y[keep] = h[keep] + (block(h[keep]) - h[keep]) / (1 - p)'),  # as dropout does
      ('torch.rand(len(h))', 'torch.rand(h.shape[:2])')]),  # each position by itself

    'ex11_exit_layer': ("""
def expected_exit_layer(p):
    reach = torch.cumprod(1 - p, dim=-1)
    before = torch.cat((torch.ones_like(reach[..., :1]), reach[..., :-1]), dim=-1)
    l = torch.arange(p.shape[-1])
    return (l * p * before).sum(-1) + p.shape[-1] * reach[..., -1]
""", [(' + p.shape[-1] * reach[..., -1]', ''),  # the authors'
      ('l * p * before', 'l * p * reach'),
      ('l * p * before', 'l * p'),
      ('torch.arange(p.shape[-1])', 'torch.arange(p.shape[-1]) + 1'),
      ('+ p.shape[-1] *', '+ (p.shape[-1] + 1) *'),
      ('1 - p,', '1 - p.detach(),'),
      ('dim=-1)\n    before', 'dim=0)\n    before')]),

    'ex12_no_holes': ("""
@torch.no_grad()
def step(model, token, cache, threshold):
    L, rope = model.config.n_layer, model.rope(cache.length, 1)
    h, left = model.embedding(token), None
    for l, block in enumerate(model.blocks):
        if left is not None:
            block.remember(h, rope, cache.layer(l))
            continue
        h = block(h, rope, cache.layer(l))
        logits = model.head(model.exit_state(h, l))
        if l == L - 1 or F.softmax(logits, dim=-1).max() > threshold:
            left = l
    cache.advance(1, depth=L)
    return logits[:, 0], left
""", [('            block.remember(h, rope, cache.layer(l))\n', ''),  # holes
      ('block.remember(h,', 'block.remember(model.embedding(token),'),
      ('            block.remember(h, rope, cache.layer(l))\n', '            h = block(h, rope, cache.layer(l))\n'),
      ('    cache.advance(1, depth=L)\n', ''),
      ('model.exit_state(h, l)', 'h'),
      ('model.exit_state(h, l)', 'model.norm(h)'),
      ('F.softmax(logits, dim=-1).max()', 'logits.max()'),
      ('return logits[:, 0]', 'return model.head(h)[:, 0]')]),

    'ex13_cross_entropy': ("""
def linear_cross_entropy(h, w, targets, rows):
    def chunk_sum(h, targets):
        return F.cross_entropy(h @ w.T, targets, reduction='sum')
    total = 0
    for h_chunk, target in zip(h.split(rows), targets.split(rows)):
        total = total + torch.utils.checkpoint.checkpoint(chunk_sum, h_chunk, target, use_reentrant=False)
    return total / len(h)
""", [('torch.utils.checkpoint.checkpoint(chunk_sum, h_chunk, target, use_reentrant=False)',
       'chunk_sum(h_chunk, target)'),  # every chunk's logits wait for the backward pass
      ("F.cross_entropy(h @ w.T, targets, reduction='sum')",
       '((h @ w.T).exp().sum(-1).log() - (h * w[targets]).sum(-1)).sum()'),  # overflows
      ('    total = 0', '    return F.cross_entropy(h @ w.T, targets)\n    total = 0'),
      ("reduction='sum'", "reduction='mean'"),
      ('total / len(h)', 'total')]),

    'ex14_speculative': ("""
def accept_probability(p, q):
    return (p / q).clamp(max=1)

def residual(p, q):
    r = (p - q).clamp(min=0)
    return r / r.sum(-1, keepdim=True)

def n_accepted(draft, target):
    return int((draft == target).int().cumprod(0).sum())
""", [('(p / q)', '(q / p)'),
      ('(p / q).clamp(max=1)', 'p'),
      ('(p / q).clamp(max=1)', '0 * p'),
      ('(p / q).clamp(max=1)', '(p >= q).double()'),
      ('.clamp(max=1)', ''),
      ('(p - q).clamp(min=0)', 'p'),  # draw from the model again
      ('(p - q).clamp(min=0)', '(p - q)'),
      ('(p - q).clamp(min=0)', '(p - q).abs()'),
      ('r / r.sum(-1, keepdim=True)', 'r'),
      ('.int().cumprod(0)', '')]),  # counts what happens to agree after a mistake

    'ex15_cliff': ("""
def total_loss(model, idx, targets, shifted):
    def ce(h, layer, labels):
        return F.cross_entropy(model.head(model.exit_state(h, layer)).flatten(0, 1), labels.flatten())
    *exits, h = model.hidden_states(idx)
    weights = exit_weights(len(exits) + 1, 'early')
    ee = sum(w * ce(h_l, l, targets if shifted else idx) for l, (w, h_l) in enumerate(zip(weights, exits)))
    return ce(h, len(exits), targets) + 0.3 * ee
""", [('targets if shifted else idx', 'targets'),
      ('targets if shifted else idx', 'idx'),
      ('targets if shifted else idx', 'idx if shifted else targets'),
      ('len(exits), targets)', 'len(exits), targets if shifted else idx)'),  # no cliff: the last layer has it as well
      ('model.exit_state(h, layer)', 'h'),
      ('model.exit_state(h, layer)', 'model.norm(h)'),
      ("'early'", "'late'"),
      ('0.3 * ee', 'ee'),
      ('0.3 * ee', '0.3 * ee.detach()')]),

    'ex16_future': ("""
def attention(q, k, v, causal):
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return F.softmax(scores, dim=-1) @ v

@torch.no_grad()
def sees_the_future(model, idx):
    logits = model(idx)
    for t in range(1, idx.shape[1]):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % 16
        if not torch.equal(model(changed)[:, :t], logits[:, :t]):
            return True
    return False
""", [('triu(1)', 'triu()'),  # a token does not see itself
      ('triu(1)', 'triu(2)'),  # sees one ahead
      ('-math.inf', '0'),
      (' * q.shape[-1] ** -0.5', ''),
      ('if causal', 'if not causal'),
      ('torch.equal(model(changed)[:, :t], logits[:, :t])', 'torch.allclose(model(changed)[:, :t], logits[:, :t])'),
      ('[:, :t], logits[:, :t]', '[:, :t + 1], logits[:, :t + 1]'),  # a token may change its own logits
      ('[:, :t], logits[:, :t]', '[:, t - 1], logits[:, t - 1]'),  # only the neighbour
      ('[:, :t], logits[:, :t]', '[:, 0], logits[:, 0]'),
      ('[:, :t], logits[:, :t]', '[0, :t], logits[0, :t]'),  # one sample
      ('range(1, idx.shape[1])', '[idx.shape[1] - 1]'),
      ('changed = idx.clone()', 'changed = idx'),
      ('return False', 'return True'),
      ('return True\n    return', 'pass\n    return')]),

    'ex17_quantization_loss': ("""
def quantization_loss(matrices):
    losses = []
    for W in matrices:
        codes, alpha = weight_ternary(W)
        losses.append((W - alpha * codes).square().mean())
    return torch.stack(losses).mean()

def gradient_ratio(a, b, matrices):
    norms = [torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, matrices, retain_graph=True)]).norm()
             for loss in (a, b)]
    return (norms[0] / norms[1]).item()
""", [('torch.stack(losses).mean()', 'torch.stack(losses).sum()'),
      ('.square().mean())', '.square().sum())'),  # larger matrices count more
      ('.square().mean())', '.abs().mean())'),
      ('(W - alpha * codes)', '(W - codes)'),
      ('(W - alpha * codes)', '(W - (alpha * codes + W - W.detach()))'),  # straight through: nothing is left
      (', retain_graph=True', ''),
      ('norms[0] / norms[1]', 'norms[1] / norms[0]'),
      ('.item()', ''),
      ('.norm()\n', '.abs().mean()\n')]),
}

# the project's own functions are right answers, too
PROJECT = {
    'ex01_butterfly': dict(fwht=hadamard.fwht_butterfly),
    'ex02_ternary': dict(ternary=quant.weight_ternary),
    'ex03_activations': dict(activation_quant=quant.activation_quant),
    'ex04_straight_through': dict(ternary_ste=quant.weight_ternary_ste),
    'ex05_pack': dict(pack=quant.pack_ternary, unpack=quant.unpack_ternary),
    'ex07_kronecker': dict(fwht_kronecker=hadamard.fwht),
    'ex10_skipping': dict(skip_probabilities=exits.skip_probabilities),
    'ex11_exit_layer': dict(expected_exit_layer=exits.expected_exit_layer),
}


def student(name, answer=''):
    """The file of an exercise as a module, with an answer written below it."""
    module = ModuleType(name)
    exec((ROOT / 'exercises' / f'{name}.py').read_text() + answer, vars(module))
    return module


def checks(name):
    module = importlib.import_module(f'exercises.test_{name}')
    return {name: check for name, check in vars(module).items() if name.startswith('test_')}


def outcomes(name, module):
    """{check: what it raised, or None}"""
    def outcome(check):
        torch.manual_seed(0)
        try:
            check(module)
        except Exception as error:
            return error
    return {check_name: outcome(check) for check_name, check in checks(name).items()}


# --------------------------------------------------------------------------------------------------------------------
# the checks

@pytest.mark.parametrize('name', FILES)
def test_right_answer_passes(name):
    errors = outcomes(name, student(name, ANSWERS[name][0]))
    assert len(errors) > 1 and not any(errors.values()), errors


@pytest.mark.parametrize('name', PROJECT)
def test_the_projects_own_function_passes(name):
    module = student(name, ANSWERS[name][0])
    vars(module).update(PROJECT[name])
    assert not any(outcomes(name, module).values())


@pytest.mark.parametrize('name', FILES)
def test_template_passes_no_check(name):
    text, right = (ROOT / 'exercises' / f'{name}.py').read_text(), ANSWERS[name][0]
    if text.count('raise NotImplementedError') < len(re.findall(r'^def ', right, re.M)):
        pytest.skip('somebody is solving it here')
    assert {type(error) for error in outcomes(name, student(name)).values()} == {NotImplementedError}


@pytest.mark.parametrize('name', FILES)
def test_wrong_answers_are_caught_and_every_check_catches_one(name):
    right, wrong = ANSWERS[name]
    idle = set(checks(name))
    for old, new in wrong:
        assert old in right, old
        errors = outcomes(name, student(name, right.replace(old, new, 1)))
        caught = {check for check, error in errors.items() if isinstance(error, AssertionError)}
        assert caught, f'nobody noticed {new!r} for {old!r}'
        idle -= caught
    assert len(wrong) > 1 and not idle


# --------------------------------------------------------------------------------------------------------------------
# the text

SECTIONS = {name: section for section in re.split(r'^## ', TEXT, flags=re.M)
            for name in re.findall(r'^python -m exercises\.(\w+)', section, re.M)}


def test_the_text_has_every_exercise_in_order():
    assert list(SECTIONS) == FILES == list(ANSWERS)
    for number, (name, section) in enumerate(SECTIONS.items(), 1):
        assert section.startswith(f'{number}. ') and name.startswith(f'ex{number:02}_')
        assert f'python -m pytest exercises/test_{name}.py\n' in section
        for function in re.findall(r'^def (\w+)', ANSWERS[name][0], re.M):
            assert f'`{function}`' in section, function


@pytest.mark.parametrize('name', [name for name in FILES if name not in TRAINING])
def test_the_figures_in_the_text_are_those_that_are_printed(name, capsys):
    student(name, ANSWERS[name][0]).observe()
    lines = capsys.readouterr().out.splitlines()
    assert lines
    for line in lines:
        assert f'\n{line}\n' in SECTIONS[name]


@pytest.mark.parametrize('name', TRAINING)
def test_the_trainings_run_and_their_figures_are_in_the_text(name, capsys, monkeypatch):
    """One step each; what the text says in front of its figures is what is printed there."""
    module = student(name, ANSWERS[name][0])
    monkeypatch.setattr(module, 'prepare', lambda dataset: dataset, raising=False)
    text = np.arange(2000, dtype=np.uint16) % 256
    monkeypatch.setattr(module, 'load_tokens', lambda folder, split: text, raising=False)
    module.observe(steps=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        label = line.split(':')[0]
        assert re.search(rf'^{label}: .*\d', SECTIONS[name], re.M), label


# --------------------------------------------------------------------------------------------------------------------
# what a class sees

def test_a_class_sees_one_line_for_what_is_not_solved_and_a_failure_for_what_is_wrong(tmp_path):
    """A project of two exercises, the first not solved, the second solved but for its thresholds."""
    (tmp_path / 'exercises').mkdir()
    (tmp_path / 'pytest.ini').write_text(f'[pytest]\npythonpath = . {ROOT}\n')
    right, _ = ANSWERS['ex02_ternary']
    unsolved = '\n\ndef fwht(x):\n    raise NotImplementedError\n'
    for name, answer in (('ex01_butterfly', unsolved), ('ex02_ternary', right.replace('w > half', 'w >= half'))):
        for file, more in ((f'test_{name}.py', ''), (f'{name}.py', answer), ('conftest.py', '')):
            (tmp_path / 'exercises' / file).write_text((ROOT / 'exercises' / file).read_text() + more)
    result = subprocess.run([sys.executable, '-m', 'pytest', '-q', '--tb=line', '-p', 'no:cacheprovider', 'exercises'],
                            cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1
    assert 'not solved yet: fwht in ex01_butterfly.py\n' in result.stdout
    assert result.stdout.endswith('s\n') and '2 failed, 2 passed, 4 unsolved in ' in result.stdout
    assert result.stdout.count('test_ex01_butterfly') == 0  # no traceback of it
    assert result.stdout.count('FAILED exercises/test_ex02_ternary.py') == 2


def test_the_projects_own_run_leaves_the_exercises_alone(pytestconfig):
    assert pytestconfig.getini('testpaths') == ['tests']
