"""sample.py and eval_exits.py on a trained run, and what all scripts promise on a command line."""
import json
import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, flags, text_folder

import configurator
import eval_exits
import prepare
import sample
import train
from checkpoint import open_model
from prepare import load_tokens
from quant import latent_weights, weight_ternary

SETTINGS = {train: train.TrainSettings, sample: sample.SampleSettings,
            eval_exits: eval_exits.EvalSettings, prepare: prepare.Settings}

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder in which out/run was trained, with exits and gates."""
    folder = tmp_path_factory.mktemp('run')
    with text_folder(folder, 12000):
        train.main(flags(n_layer=4, batch_size=4, max_iters=40, eval_interval=40))
    return folder

@pytest.fixture(autouse=True)
def in_the_run(run, monkeypatch):
    monkeypatch.chdir(run)

def call(script, *options):
    done = subprocess.run([sys.executable, str(ROOT / script), *options], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

# ---- sample.py

@pytest.fixture
def say(capsys):
    """say(*flags) -> what sample.py prints."""
    def say(*options):
        sample.main(['--max_new_tokens=20', '--packed=False', *options])
        return capsys.readouterr().out
    return say

def exits_of(out):
    """How many tokens left after each block, by what sample.py says."""
    told = out.split('left after block: ')[1].splitlines()[0]
    return {int(layer): int(count) for layer, count in re.findall(r'(\d+):(\d+)', told)}

def test_sample_continues_a_prompt_and_tells_speed_and_depth():
    """From the outside."""
    out = call('sample.py', '--prompt', 'class P', '--max_new_tokens=9', '--exit_layer', '2',
               '--seed=3', '--temperature=0.5', '--top_k=5', '--show_exits',
               '--packed=False')
    assert out.startswith('run: out/run (the newest') and '\nclass P' in out
    assert exits_of(out)[2] == 9
    assert re.search(r'9 tokens, [\d,]+ tokens/s, mean exit layer 2\.00', out)

def test_sample_greedy_text_is_the_models(say):
    """What is printed is argmax after argmax of the uncached model."""
    model, ids = open_model('out/run/ckpt.pt')[0], list(b'def ')
    for _ in range(12):
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    out = say('--prompt=def ', '--temperature=0', '--max_new_tokens=12', '--checkpoint=last.pt')
    assert bytes(ids).decode(errors='replace') in out and 'decoding: PyTorch' in out

def test_sample_seeds_texts_and_long_prompts(say):
    a, b, c = (say('--prompt=x', f'--seed={seed}').split('\n\n20 tokens')[0] for seed in (1, 1, 2))
    assert a == b != c
    first, second = re.split('-{70,}', say('--prompt=x', '--seed=1', '--num_samples=2'))
    assert first.startswith(a) and second.split('\n\n20')[0].strip() not in a
    assert 'the model sees' in say(f'--prompt={"a" * 33}') and 'the model sees' not in a

def test_sample_stops_where_the_text_ends(say, monkeypatch):
    """What came after the end, a NUL and another text, was printed. A character may take several
    tokens."""
    steps = [(97, 1), (195, 1), (164, 1), (98, 1), (99, 2), (0, 2), (100, 0)]
    monkeypatch.setattr(sample, 'stream', lambda *args, **options: (
        (torch.tensor([[new]]), torch.tensor([layer])) for new, layer in steps))
    out = say('--prompt=x', '--show_exits')
    assert '\nxa\u00e4bc\n' in out and '6 tokens, ' in out and sum(exits_of(out).values()) == 6

@pytest.mark.parametrize('mode', ['gate', 'confidence'])
def test_sample_token_by_token_exits(say, mode):
    """The prompt runs in full, the others leave at once or never."""
    options = ['--prompt=x', f'--exit_mode={mode}', '--show_exits', '--exit_threshold']
    shallow, deep = (exits_of(say(*options, threshold)) for threshold in ('-1.0', '1.0'))
    assert (shallow[0], shallow[3], deep[3]) == (19, 1, 20)

# ---- eval_exits.py

@pytest.fixture(scope='module')
def report(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run)
        out = call('eval_exits.py', '--json=report.json')
    for told in ('Exits, test text (Tables A5, B3-B5)', 'gates at 0.5: mean exit layer', 'latent'):
        assert told in out
    return json.loads((run / 'report.json').read_text())

@pytest.fixture
def tokens():
    return load_tokens('data/text-bytes', 'test')

@pytest.fixture
def model():
    return open_model('out/run/ckpt.pt')[0]

def test_report_has_what_others_read(report, tokens):
    assert set(report) == {'run', 'split', 'tokens', 'tokenizer', 'exits', 'decoding', 'weights',
                           'stats'}
    assert set(report['stats']) == {'weights', 'parameters', 'activation_std', 'gates'}
    assert [(e['layer'], e['blocks']) for e in report['exits']] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    for e in report['exits']:
        assert e['ppl'] == pytest.approx(math.exp(e['loss'])) and e['tok_per_s'] > 0
        # of bytes there is one token more than the text has, its end
        assert e['bits_per_byte'] == pytest.approx(e['loss'] / math.log(2), rel=1e-2)
    assert report['weights']['ternary']['loss'] == report['exits'][-1]['loss']
    assert report['split'] == 'test' and report['tokens'] == len(tokens)

def test_a5_losses_are_those_of_the_whole_split(report, model, tokens):
    """Every token but the first is predicted once, in windows of which the last is shorter; a mean
    over tokens, not over batches."""
    text = torch.from_numpy(tokens.astype('int64'))
    assert (len(text) - 1) % 32 != 0
    for e in report['exits']:
        losses = torch.cat([F.cross_entropy(
            model(text[None, i:i + 32][:, :len(text) - 1 - i], exit_layer=e['layer'])[0][0],
            text[i + 1:i + 33], reduction='none') for i in range(0, len(text) - 1, 32)])
        assert len(losses) == len(text) - 1
        assert e['loss'] == pytest.approx(losses.mean().item(), rel=1e-5)
    batchings = [eval_exits.evaluate(model, tokens, batch_size=b)[-1] for b in (1, 3, 64)]
    assert batchings == pytest.approx([report['exits'][-1]['loss']] * 3, rel=1e-5)
    with latent_weights(model):  # A3
        latent = eval_exits.evaluate(model, tokens)[-1]
    assert report['weights']['latent']['loss'] == pytest.approx(latent, rel=1e-5) != batchings[0]

def test_a4_weights_and_parameters_are_counted(report, model):
    codes, scales = zip(*(weight_ternary(layer.weight) for layer in model.linears()))
    every = torch.cat([c.flatten() for c in codes])
    shares = [(every == code).float().mean().item() for code in (0, 1, -1)]
    sparse = sum((c == 0).sum().item() * 2 > c.numel() for c in codes)
    assert report['stats']['weights'] == pytest.approx(dict(
        mean_scale=torch.stack(scales).mean().item(), sparsity=shares[0],
        high_sparsity_matrices=sparse, plus=shares[1], minus=shares[2]))
    counts = dict(report['stats']['parameters'])
    assert counts.pop('total') == sum(counts.values()) == sum(p.numel() for p in model.parameters())
    projections = sum(n for name, n in counts.items() if 'quantizable' in name)
    assert projections == model.quantizable_parameters()

def test_b_figure_1_and_a6_statistics_by_depth(report, model, tokens):
    """Spread of h, and where tokens leave: at the first open gate, or at the last layer."""
    batches = [idx for idx, _ in eval_exits.windows(tokens, 32, 8)][:8]
    with torch.no_grad():
        states = [list(model.hidden_states(idx)) for idx in batches]
        p = torch.cat([model.gate_probabilities(s[:-1]).flatten(0, 1) for s in states])
    for layer in range(4):
        std = torch.cat([s[layer].flatten() for s in states]).std(correction=0).item()
        assert report['stats']['activation_std'][layer] == pytest.approx(std, rel=0.02)
    left = [next((layer for layer in range(3) if row[layer] > 0.5), 3) for row in p]
    gates = report['stats']['gates']
    assert gates['mean_exit_layer'] == pytest.approx(sum(left) / len(left), rel=1e-5)
    assert gates['leaving_share'] == pytest.approx([left.count(n) / len(left) for n in range(4)])

def test_a_model_of_full_precision_without_exits_and_gates(say):
    """No table of ternary weights, no second kind of weights, no gates: and no division by them.
    Its exits were not trained, which is said where they are used."""
    train.main(flags(linear='fp', gate_dim=0, lambda_ee=0, max_iters=1, out_dir='elsewhere/fp'))
    early = '--exit_layer=1', '--exit_mode=confidence', '--prompt=x'
    for option in early:
        told = 'not trained' in say('--out_dir=elsewhere/fp', option)
        assert told == (option != '--prompt=x') and 'not trained' not in say(option)
    eval_exits.main(['--out_dir=elsewhere/fp', '--split=val', '--packed=False'])
    report = json.loads(Path('elsewhere/fp/eval.json').read_text())
    assert list(report['weights']) == ['full precision'] and report['split'] == 'val'
    assert report['stats']['weights'] is report['stats']['gates'] is None

# ---- command lines

@pytest.mark.parametrize('script', SETTINGS, ids=lambda script: script.__name__)
def test_help_lists_every_setting_with_default_and_comment(script, capsys):
    cls = SETTINGS[script]
    with pytest.raises(SystemExit) as stop:
        script.main(['--seed=4', '--help'])
    out = capsys.readouterr().out
    assert not stop.value.code and out.startswith('usage: python ') and cls.__doc__ in out
    entries = {line.split('=')[0].strip(): line for line in out.splitlines() if '  --' in line}
    assert set(entries) == {f'--{field.name}' for field in fields(cls)}
    for field in fields(cls):
        flag_and_default, comment = entries[f'--{field.name}'].split(None, 1)
        assert comment and eval(flag_and_default.split('=', 1)[1]) == field.default
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert script is not train or "'float32', 'bfloat16']" in ' '.join(out.split())  # the choices

@pytest.mark.parametrize('script, options, message', [
    (sample, '--draft_layer=1 --exit_layer=2', '--exit_layer and --exit_mode'),
    (sample, '--exit_layer=4', 'its layers are 0 to 3'),
    (sample, '--out_dir=out/nothing', 'there is no checkpoint out/nothing/ckpt.pt'),
    (sample, '--out_dir=cut', 'cut/ckpt.pt is damaged'), (sample, '--top_k=0', 'top_k is at least'),
    (sample, '--device=tpu', "'tpu' is not"), (eval_exits, '--split=all', 'split'),
    (eval_exits, '--json=a.pt', 'should end in .json'), (eval_exits, '--batch_size=0', 'is 1 to'),
    (train, '--learning_rat=1', 'did you mean learning_rate'), (prepare, '--dataset=no', "set 'no'")
    ], ids=str)
def test_mistakes_end_in_one_line_and_exit_code_2(script, options, message, monkeypatch, capsys):
    Path('cut').mkdir(exist_ok=True)  # the first half of a checkpoint
    Path('cut/ckpt.pt').write_bytes(Path('out/run/ckpt.pt').read_bytes()[:20000])
    monkeypatch.setattr(sys, 'argv', ['script.py', *options.split()])
    with pytest.raises(SystemExit) as stop:
        configurator.run(script.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith('error: ') and error.count('\n') == 1
