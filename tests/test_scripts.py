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
from model import BitSkipConfig, open_model
from prepare import load_tokens
from quant import activation_quant, dequantize, weight_ternary

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


def call(script, *options, stdin=''):
    return subprocess.run([sys.executable, str(ROOT / script), *options], input=stdin, text=True,
                          capture_output=True)


def test_data():
    return load_tokens('data/text-bytes', 'test')


test_data.__test__ = False


# --------------------------------------------------------------------------------------------------
# sample.py

@pytest.fixture
def say(capsys):
    """say(*flags) -> what sample.py prints."""
    def say(*options):
        sample.main(['--max_new_tokens=20', '--packed=False', *options])
        return capsys.readouterr().out
    return say


def test_sample_continues_stdin_and_tells_speed_and_depth():
    """From the outside, with what fast/ has, where it is."""
    done = call('sample.py', '--prompt_file=-', '--max_new_tokens=9', '--exit_layer', '2', '--seed=3',
                '--temperature=0.5', '--top_k=5', '--show_exits', stdin='class Popen')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('run: out/run (the newest') and '\nclass Popen' in done.stdout
    assert re.search(r'left after block: 2:9\n\n9 tokens, [\d,]+ tokens/s, '
                     r'mean exit layer 2\.00 of 0 to 3 \(3\.00 blocks\)', done.stdout)


def test_sample_greedy_text_is_the_models(say):
    """What is printed is argmax after argmax of the uncached model."""
    model, ids = open_model('out/run/ckpt.pt')[0], list(b'def ')
    for _ in range(12):
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    out = say('--prompt=def ', '--temperature=0', '--max_new_tokens=12', '--checkpoint=last.pt')
    assert bytes(ids).decode(errors='replace') in out and 'decoding: PyTorch' in out


def test_sample_seeds_and_numbers_of_texts(say):
    a, b, c = (say('--prompt=x', f'--seed={seed}').split('\n\n20 tokens')[0] for seed in (1, 1, 2))
    assert a == b != c
    first, second = say('--prompt=x', '--seed=1', '--num_samples=2').split('-' * 80)
    assert first.startswith(a) and second.split('\n\n20')[0].strip() not in a


def test_sample_stops_where_the_text_ends(say, monkeypatch):
    """What came after the end, a NUL and another text, was printed. A character may take several
    tokens."""
    steps = [([97, 195], 1), ([164, 98], 1), ([99, 0, 100], 2), ([101], 0)]
    monkeypatch.setattr(sample, 'stream', lambda *args, **options: (
        (torch.tensor([new]), torch.tensor([layer])) for new, layer in steps))
    out = say('--prompt=x')
    assert '\nxa\u00e4bc\n' in out and '7 tokens, ' in out


@pytest.mark.parametrize('mode', ['gate', 'confidence', 'saturation'])
def test_sample_token_by_token_exits(say, mode):
    """The prompt runs in full, the others leave at once or never."""
    options = ['--prompt=x', f'--exit_mode={mode}', '--show_exits', '--exit_threshold']
    assert 'left after block: 0:19 3:1' in say(*options, '-1.0')
    assert 'left after block: 3:20' in say(*options, '1.0')


def test_sample_colours_tokens_on_a_terminal(say, monkeypatch):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    out = say('--prompt=x', '--exit_layer=0', '--show_exits')
    assert out.count(f'\x1b[38;5;{sample.RAMP[0]}m') == 20 + 1  # and the legend
    assert f'\x1b[38;5;{sample.RAMP[-1]}m3\x1b[0m' in out


def test_sample_drafts_by_the_room_next_door(capsys):
    """Greedy text with drafts is the text without them."""
    pytest.importorskip('fast')
    texts = []
    for options in ([], ['--draft_layer=1', '--draft_len=3']):
        sample.main(['--prompt=def ', '--temperature=0', '--max_new_tokens=20', *options])
        texts.append(capsys.readouterr().out)
    assert texts[0].split('\ndef ')[1].split('\n\n')[0] == texts[1].split('\ndef ')[1].split('\n\n')[0]
    assert re.search(r'[\d.]+% of \d+ drafts accepted', texts[1])


@pytest.mark.parametrize('options, changes, note', [
    ({'exit_layer': 1}, {}, 'exits of this model were not trained'),
    ({'exit_mode': 'confidence'}, {}, 'exits of this model were not trained'),
    ({'draft_layer': 0}, {}, 'exits of this model were not trained'),
    ({'exit_layer': 2}, {}, ''),  # the last one
    ({'exit_layer': 1}, {'lambda_ee': 0.3}, ''),
    ({'exit_mode': 'gate'}, {'lambda_ee': 0.3}, 'gates of this model were not trained'),
    ({'exit_mode': 'gate'}, {'lambda_ee': 0.3, 'lambda_r': 0.2}, '')], ids=str)
def test_sample_says_what_was_not_trained(capsys, options, changes, note):
    config = BitSkipConfig(n_layer=3, **changes)
    sample.note_untrained(sample.SampleSettings(**options), config)
    out = capsys.readouterr().out
    assert note in out and bool(out) == bool(note)


def test_sample_says_that_it_crops(say):
    assert 'the prompt has 40 tokens, the model sees 32' in say(f'--prompt={"a" * 40}')


# --------------------------------------------------------------------------------------------------
# eval_exits.py

@pytest.fixture(scope='module')
def report(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run)
        done = call('eval_exits.py', '--json=report.json')
    assert done.returncode == 0, done.stderr
    for told in ('Exits, test text (Tables A5, B3-B5)', 'gates at 0.5: mean exit layer', 'latent'):
        assert told in done.stdout
    return json.loads((run / 'report.json').read_text())


def test_report_has_what_others_read(report):
    assert set(report) == {'run', 'split', 'tokens', 'tokenizer', 'exits', 'decoding', 'weights',
                           'stats'}
    assert set(report['stats']) == {'weights', 'parameters', 'activation_std', 'gates'}
    assert [(e['layer'], e['blocks']) for e in report['exits']] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    for e in report['exits']:
        assert e['ppl'] == pytest.approx(math.exp(e['loss'])) and e['tok_per_s'] > 0
        # of bytes there is one token more than the text has, its end
        assert e['bits_per_byte'] == pytest.approx(e['loss'] / math.log(2), rel=1e-2)
    assert report['weights']['ternary']['loss'] == report['exits'][-1]['loss']
    assert report['split'] == 'test' and report['tokens'] == len(test_data())
    assert Path('report.png').read_bytes().startswith(b'\x89PNG')


def test_a5_losses_are_those_of_the_whole_split(report):
    """Every token but the first is predicted once, in windows; PPL is exp of the mean over tokens,
    not of the mean of batches."""
    model, _ = open_model('out/run/ckpt.pt')
    tokens = torch.from_numpy(test_data().astype('int64'))
    assert (len(tokens) - 1) % 32 != 0  # so that there is a last, shorter window
    for e in report['exits']:
        losses = [F.cross_entropy(model(tokens[None, i:i + 32][:, :len(tokens) - 1 - i],
                                        exit_layer=e['layer'])[0][0],
                                  tokens[i + 1:i + 33], reduction='none')
                  for i in range(0, len(tokens) - 1, 32)]
        assert e['loss'] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
        assert len(torch.cat(losses)) == len(tokens) - 1
    batchings = [eval_exits.evaluate(model, test_data(), batch_size=b)[-1] for b in (1, 3, 64)]
    assert batchings == pytest.approx([report['exits'][-1]['loss']] * 3, rel=1e-5)


def test_a3_latent_weights_are_those_of_the_optimizer(report, monkeypatch):
    """Computed with W, by hand; activations are quantized as ever."""
    model, _ = open_model('out/run/ckpt.pt')
    for layer in model.linears():
        monkeypatch.setattr(layer, 'forward', lambda x, layer=layer: F.linear(
            dequantize(*activation_quant(layer.prepare(x))), layer.weight))
        layer.latent = True  # no shared product
    loss = eval_exits.evaluate(model, test_data())[-1]
    assert report['weights']['latent']['loss'] == pytest.approx(loss, rel=1e-5)
    assert loss != pytest.approx(report['weights']['ternary']['loss'], rel=1e-3)


def test_a4_weight_statistics(report):
    model, _ = open_model('out/run/ckpt.pt')
    codes, scales = zip(*(weight_ternary(layer.weight) for layer in model.linears()))
    every, ours = torch.cat([c.flatten() for c in codes]), report['stats']['weights']
    assert ours['mean_scale'] == pytest.approx(torch.stack(scales).mean().item())
    assert [ours[key] for key in ('minus', 'sparsity', 'plus')] == pytest.approx(
        [(every == code).float().mean().item() for code in (-1, 0, 1)])
    assert ours['high_sparsity_matrices'] == sum((c == 0).sum().item() * 2 > c.numel() for c in codes)


def test_parameter_breakdown_adds_up(report):
    model, _ = open_model('out/run/ckpt.pt')
    counts = dict(report['stats']['parameters'])
    assert counts.pop('total') == sum(counts.values()) == sum(p.numel() for p in model.parameters())
    projections = sum(n for name, n in counts.items() if 'quantizable' in name)
    assert projections == model.quantizable_parameters()


def test_b_figure_1_and_a6_statistics_by_depth(report):
    """Spread of h, and where tokens leave: at the first open gate, or at the last layer."""
    model, _ = open_model('out/run/ckpt.pt')
    batches = [idx for idx, _ in eval_exits.windows(test_data(), 32, 8)][:8]
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


def test_a_model_of_full_precision_without_gates_is_evaluated(capsys):
    """No table of ternary weights, no second kind of weights, no gates: and no division by them."""
    train.main(flags(linear='fp', gate_dim=0, max_iters=1, out_dir='elsewhere/fp'))
    eval_exits.main(['--out_dir=elsewhere/fp', '--split=val', '--packed=False'])
    report = json.loads(Path('elsewhere/fp/eval.json').read_text())
    assert list(report['weights']) == ['full precision'] and report['split'] == 'val'
    assert report['stats']['weights'] is report['stats']['gates'] is None


# --------------------------------------------------------------------------------------------------
# command lines

@pytest.mark.parametrize('script', SETTINGS, ids=lambda script: script.__name__)
def test_help_lists_every_setting_with_its_comment(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(['--help'])
    out = capsys.readouterr().out
    assert not stop.value.code and len(fields(SETTINGS[script])) >= 4
    for field in fields(SETTINGS[script]):
        assert re.search(rf'^  --{field.name}=.*\s\S', out, re.M), field.name


@pytest.mark.parametrize('script, options, message', [
    (sample, '--draft_layer=1 --exit_layer=2', 'leave out --exit_layer and --exit_mode'),
    (sample, '--exit_layer=4', 'its layers are 0 to 3'),
    (sample, '--out_dir=out/nothing', 'there is no checkpoint out/nothing/ckpt.pt'),
    (sample, '--out_dir=cut', 'cut/ckpt.pt is damaged'),
    (sample, '--prompt_file=nothing.txt', 'nothing.txt'),
    (sample, '--prompt=a --prompt_file=b', 'choose one'),
    (sample, '--temperature=-1', 'temperature is 0'), (sample, '--top_k=0', 'top_k is at least 1'),
    (sample, '--exit_mode=often', 'exit_mode'), (sample, '--device=tpu', "device 'tpu' is not here"),
    (eval_exits, '--json=a.pt', 'should end in .json'),
    (eval_exits, '--batch_size=0', 'batch_size is 1 to'), (eval_exits, '--split=all', 'split'),
    (train, '--learning_rat=1', 'did you mean learning_rate'),
    (train, 'config/nothing.py', 'config/nothing.py'),
    (prepare, '--dataset=nothing', "no data set 'nothing'")], ids=str)
def test_mistakes_end_in_one_line_and_exit_code_2(script, options, message, monkeypatch, capsys):
    Path('cut').mkdir(exist_ok=True)  # the first half of a checkpoint
    Path('cut/ckpt.pt').write_bytes(Path('out/run/ckpt.pt').read_bytes()[:20000])
    monkeypatch.setattr(sys, 'argv', ['script.py', *options.split()])
    with pytest.raises(SystemExit) as stop:
        configurator.run(script.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith('error: ') and error.count('\n') == 1
