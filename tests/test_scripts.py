"""sample.py and eval_exits.py on a trained run, from the outside."""
import json
import math
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import text_folder

import checkpoint
import eval_exits
import pack
import plots
import sample
import tradeoff
import train
from configurator import UserError
from decode import EXIT_MODES, Decoder
from model import BitSkipConfig
from quant import weight_ternary

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = dict(n_layer=4, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=64, block_size=32, batch_size=4, target_exit=1,
                gradient_accumulation_steps=1, max_iters=60, eval_interval=30, learning_rate=1e-2, linear='hbitlinear',
                lambda_ee=0.3, p_max=0.5, device='cpu', dataset='text.txt', tokenizer='bytes', out_dir='out/run')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The folder in which out/run was trained."""
    folder = tmp_path_factory.mktemp('run')
    with text_folder(folder, 20000):
        train.main([f'--{key}={value}' for key, value in SETTINGS.items()])
    return folder


@pytest.fixture(autouse=True)
def in_the_run(run, monkeypatch):
    monkeypatch.chdir(run)


def call(script, *flags, stdin=''):
    return subprocess.run([sys.executable, str(ROOT / script), *flags], input=stdin, capture_output=True, text=True,
                          timeout=300)


# ---- sample.py

def text_of(capsys, *flags):
    sample.main(['--max_new_tokens=20', *flags])
    return capsys.readouterr().out


def test_sample_names_the_run_and_tells_speed_and_depth(capsys):
    out = text_of(capsys, '--prompt=def ', '--exit_layer', '2')
    assert out.startswith('run: out/run') and '\ndef ' in out
    assert '20 tokens, ' in out and 'tokens/s, mean exit layer 2.00 of 0 to 3 (3.00 blocks)' in out


def test_sample_greedy_text_is_the_models(capsys):
    """What is printed is argmax after argmax of the uncached model."""
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    ids = list(b'def ')
    for _ in range(12):
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    out = text_of(capsys, '--prompt=def ', '--temperature=0', '--max_new_tokens=12', '--packed=False')
    assert bytes(ids).decode(errors='replace') in out


def test_sample_seeds(capsys):
    a, b, c = (text_of(capsys, '--prompt=x', f'--seed={seed}').split('tokens/s')[0].rsplit(',', 1)[0]
               for seed in (1, 1, 2))
    assert a == b != c


@pytest.mark.parametrize('flags', [['--draft_layer=1'], []], ids=['drafts', 'plain'])
def test_sample_stops_where_the_text_ends(capsys, monkeypatch, flags):
    """What came after the end of the text, a NUL and another text, was printed on the terminal."""
    passes = [(torch.tensor([[97, 98]]), torch.tensor(1)), (torch.tensor([[99, 0, 100]]), torch.tensor(2)),
              (torch.tensor([[101]]), torch.tensor(0))]
    for name in ('stream', 'speculate'):
        monkeypatch.setattr(sample, name, lambda *args, **options: iter(passes))
    out = text_of(capsys, '--prompt=x', *flags)
    assert '\nxabc\n' in out and '5 tokens, ' in out


def test_sample_writes_several_texts(capsys):
    """Each another one; with drafts, too."""
    for flags in ([], ['--draft_layer=1']):
        a, b = text_of(capsys, '--prompt=x', '--num_samples=2', *flags).split('-' * 80)
        assert a.count('tokens/s') == b.count('tokens/s') == 1
        assert a.split('\nx')[1].split('\n\n')[0] != b.split('\nx')[1].split('\n\n')[0]


@pytest.mark.parametrize('flags, changes, note', [
    ({'exit_layer': 1}, {}, 'what they say makes little sense'),
    ({'exit_mode': 'confidence'}, {}, 'what they say makes little sense'),
    ({'draft_layer': 0}, {}, 'few drafts will stand'),
    ({'exit_layer': 2}, {}, ''),  # the last one
    ({'exit_layer': 1}, {'lambda_ee': 0.3}, ''),
    ({'exit_layer': 1}, {'frozen': True}, ''),
    ({'exit_mode': 'gate'}, {'lambda_ee': 0.3, 'lambda_r': 0.0}, 'the gates of this model were not trained'),
    ({'exit_mode': 'gate'}, {'lambda_ee': 0.3}, '')])
def test_sample_says_what_was_not_trained(capsys, flags, changes, note):
    changes = dict(changes)
    frozen = changes.pop('frozen', False)
    sample.note_what_was_not_trained(sample.SampleSettings(**flags), BitSkipConfig(n_layer=3, **changes), frozen)
    out = capsys.readouterr().out
    assert note in out and bool(out) == bool(note)


def test_sample_prompt_from_file_and_stdin():
    Path('prompt.txt').write_text('class Popen')
    for flags, stdin in ((['--prompt_file=prompt.txt'], ''), (['--prompt_file=-'], 'class Popen')):
        done = call('sample.py', '--max_new_tokens=3', *flags, stdin=stdin)
        assert done.returncode == 0 and 'class Popen' in done.stdout


def test_sample_says_that_it_crops(capsys):
    out = text_of(capsys, f'--prompt={"a" * 40}')
    assert 'the prompt has 40 tokens, the model sees 32: the first 8 are cropped' in out


@pytest.mark.parametrize('mode', ['gate', 'confidence'])
def test_sample_token_by_token_exits(capsys, mode):
    shallow = text_of(capsys, f'--exit_mode={mode}', '--exit_threshold=0', '--prompt=x')
    deep = text_of(capsys, f'--exit_mode={mode}', '--exit_threshold=1', '--prompt=x')  # (the prompt runs in full)
    assert 'mean exit layer 0.15' in shallow and 'mean exit layer 3.00' in deep


@pytest.mark.parametrize('packed', ['--packed=True', '--packed=False'])
def test_sample_with_drafts_writes_the_same_text(capsys, packed):
    flags = ['--prompt=def ', '--temperature=0', packed]
    plain, drafted = text_of(capsys, *flags), text_of(capsys, *flags, '--draft_layer=1', '--draft_len=3')
    assert plain.split('\ndef ')[1].split('tokens')[0] == drafted.split('\ndef ')[1].split('tokens')[0]
    accepted, drafts, per_pass = re.search(r'([\d.]+)% of (\d+) drafts accepted, ([\d.]+) tokens per pass',
                                           drafted).groups()
    passes = 20 / float(per_pass)
    assert float(accepted) / 100 * int(drafts) == pytest.approx(20 - passes, abs=0.2)


@pytest.mark.parametrize('flags, message', [
    (['--draft_layer=3'], 'leaves no block to check its drafts: of 4 layers, it is 0 to 2'),
    (['--draft_layer=1', '--draft_len=0'], 'draft_len is at least 1'),
    (['--draft_layer=1', '--exit_layer=2'], 'leave out --exit_layer and --exit_mode'),
    (['--draft_layer=1', '--exit_mode=gate'], 'leave out --exit_layer and --exit_mode'),
    (['--exit_layer=4'], 'its 4 layers are 0 to 3'),
    (['--exit_layer=-1'], 'its 4 layers are 0 to 3'),
    (['--out_dir=out/nothing'], 'there is no checkpoint out/nothing/ckpt.pt'),
    (['--prompt_file=nothing.txt'], 'there is no prompt file nothing.txt'),
    (['--prompt=a', '--prompt_file=b'], 'choose one'),
    (['--temperature=-1'], 'temperature is 0, for the likeliest token, or at least 0.001, got -1'),
    (['--top_k=0'], 'top_k is at least 1'),
    (['--device=tpu'], "device 'tpu' is not available"),
])
def test_sample_mistakes_are_one_sentence(flags, message):
    with pytest.raises(UserError, match=message):
        sample.main(flags)


def test_truncated_checkpoint_exits_with_2(run):
    data = Path('out/run/ckpt.pt').read_bytes()
    Path('cut').mkdir(exist_ok=True)  # not in out/, where the other tests look for the newest run
    Path('cut/ckpt.pt').write_bytes(data[:len(data) // 2])
    done = call('sample.py', '--out_dir=cut')
    assert done.returncode == 2 and done.stderr.startswith('error: cut/ckpt.pt is damaged')
    assert 'Traceback' not in done.stderr


# ---- pack.py

def test_packed_file_is_small_and_speaks(capsys):
    """A tenth of the trained file; the same text with and without C, and all exits can be evaluated."""
    pack.main([])
    out = capsys.readouterr().out
    assert out.count('validation PPL') == 2
    assert Path('out/run/packed.pt').stat().st_size < Path('out/run/ckpt.pt').stat().st_size / 2
    texts = [text_of(capsys, '--checkpoint=packed.pt', '--prompt=def ', '--temperature=0', flag)
             for flag in ('--packed=True', '--packed=False')]
    assert texts[0].split('\ndef ')[1].split('tokens')[0] == texts[1].split('\ndef ')[1].split('tokens')[0]
    eval_exits.main(['--checkpoint=packed.pt', '--json=packed.json'])
    packed = json.loads(Path('packed.json').read_text())
    assert 'latent' not in packed['weights']
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')  # counted as parameters, though they are packed
    assert dict(packed['stats']['parameters']) == dict(eval_exits.parameter_breakdown(model))


# ---- models that cannot be packed, or cannot decode

@pytest.fixture(scope='module')
def odd(tmp_path_factory):
    """The folder in which models of every such kind were trained."""
    folder = tmp_path_factory.mktemp('odd')
    with text_folder(folder, 20000):
        for name, change in {'fp': {'linear': 'fp'}, 'after': {'linear': 'hadamard_after'}, 'sees': {'causal': False}
                             }.items():
            settings = SETTINGS | {'max_iters': 1, 'out_dir': f'out/{name}'} | change
            train.main([f'--{key}={value}' for key, value in settings.items()])
    return folder


@pytest.mark.parametrize('name, kind', [('fp', 'full precision'), ('after', 'ternary weights')])
def test_unpackable_models_decode_as_trained(odd, monkeypatch, capsys, name, kind):
    """Traceback after all measurements, for want of weights to pack."""
    monkeypatch.chdir(odd)
    monkeypatch.setattr(tradeoff, 'measure_speculation', partial(
        eval_exits.measure_speculation, lengths=(1,), n_tokens=3))
    flag, linear = f'--out_dir=out/{name}', {'fp': 'fp', 'after': 'hadamard_after'}[name]
    assert f"decoding: as trained, since linear='{linear}' cannot be packed\n" in text_of(capsys, flag, '--prompt=x')
    tradeoff.main([flag, '--max_tokens=64', '--json=tradeoff.json'])
    eval_exits.main([flag, '--json=odd.json'])
    assert f'val split, {kind};' in capsys.readouterr().out
    assert set(json.loads(Path('odd.json').read_text())['weights']) == {
        'fp': {'full precision'}, 'after': {'ternary', 'latent'}}[name]
    with pytest.raises(UserError, match=f'out/{name}/ckpt.pt: .*{linear}.* pack'):
        pack.main([flag])
    assert not Path(f'out/{name}/packed.pt').exists()


@pytest.mark.parametrize('script', [sample, eval_exits, tradeoff], ids=lambda script: script.__name__)
def test_a_model_that_sees_the_future_cannot_decode(odd, monkeypatch, script):
    monkeypatch.chdir(odd)
    for flags in [[], ['--packed=False']] if script is sample else [[]]:
        with pytest.raises(UserError, match=r'\(causal=False\).* cannot decode'):
            script.main(['--out_dir=out/sees', *flags])


# ---- eval_exits.py

@pytest.fixture(scope='module')
def report(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run)
        eval_exits.main(['--json=report.json'])
    return json.loads((run / 'report.json').read_text())


def test_report_has_what_others_read(report):
    assert [(e['layer'], e['blocks']) for e in report['exits']] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    for e in report['exits']:
        assert e['ppl'] == pytest.approx(math.exp(e['loss'])) and e['tok_per_s'] > 0
        assert e['bits_per_byte'] == pytest.approx(e['loss'] / math.log(2), rel=1e-2)  # bytes: one end-of-text more
    assert report['weights']['ternary']['loss'] == report['exits'][-1]['loss'] != report['weights']['latent']['loss']
    assert set(report['stats']) == {'weights', 'parameters', 'activation_std', 'gates'}
    assert Path('report.png').read_bytes().startswith(b'\x89PNG')


def test_a5_losses_are_those_of_the_whole_split(report):
    """Every token but the first is predicted once, and PPL is exp of the mean over tokens, not of batch means."""
    from prepare import load_tokens
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    tokens = torch.from_numpy(load_tokens('data/text-bytes', 'val').astype('int64'))
    assert (len(tokens) - 1) % 32 != 0  # so that there is a last, shorter window
    for e in report['exits']:
        losses = [F.cross_entropy(model(tokens[None, i:i + 32][:, :len(tokens) - 1 - i],
                                        exit_layer=e['layer'])[0][0], tokens[i + 1:i + 33], reduction='none')
                  for i in range(0, len(tokens) - 1, 32)]
        assert e['loss'] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)
        assert len(torch.cat(losses)) == len(tokens) - 1
    batchings = [eval_exits.evaluate(model, tokens.numpy().astype('uint16'), batch_size=b)[-1] for b in (1, 3, 64)]
    assert batchings == pytest.approx([report['exits'][-1]['loss']] * 3, rel=1e-5)


def test_a3_latent_weights_are_those_of_the_optimizer(report):
    """The latent loss is that of the same model whose projections compute with W (activations still quantized)."""
    from prepare import load_tokens
    from quant import activation_quant
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')

    class Latent(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            codes, scale = activation_quant(self.layer.prepare(x), 8)
            return F.linear(codes * scale, self.layer.weight)
    for block in model.blocks:
        for part, names in ((block.attn, 'qkvo'), (block.ffn, ('up', 'down'))):
            for name in names:
                setattr(part, name, Latent(getattr(part, name)))
    loss = eval_exits.evaluate(model, load_tokens('data/text-bytes', 'val'))[-1]
    assert report['weights']['latent']['loss'] == pytest.approx(loss, rel=1e-5)


def test_a4_weight_statistics(report):
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    codes, scales = zip(*(weight_ternary(layer.weight) for layer in model.linears()))
    every = torch.cat([c.flatten() for c in codes])
    ours = report['stats']['weights']
    assert ours['mean_scale'] == pytest.approx(torch.stack(scales).mean().item())
    assert [ours[key] for key in ('minus', 'sparsity', 'plus')] == pytest.approx(
        [(every == code).float().mean().item() for code in (-1, 0, 1)])
    assert ours['high_sparsity_matrices'] == sum((c == 0).sum().item() * 2 > c.numel() for c in codes)


@pytest.mark.parametrize('settings, cell', [
    ({}, 'Baseline'), ({'linear': 'hbitlinear'}, 'H-only'), ({'lambda_ee': 0.3}, 'EE-only'),
    ({'linear': 'hbitlinear', 'lambda_ee': 1.0, 'n_layer': 3}, 'BitSkip (H+EE)'), ({'linear': 'fp'}, None),
    ({'linear': 'hadamard_after'}, None), ({'norm': 'rmsnorm', 'ffn': 'swiglu', 'sub_norm': False}, None),
    ({'act_bits': 4}, None)])
def test_paper_a_stands_beside_its_own_cells_only(settings, cell):
    assert eval_exits.cell_of(BitSkipConfig(**settings)) == cell


def test_parameter_breakdown_adds_up(report):
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    counts = dict(report['stats']['parameters'])
    assert counts.pop('total') == sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert sum(n for name, n in counts.items() if 'quantizable' in name) == model.quantizable_parameters()


def test_activation_std_and_gates(report):
    """B Fig. 1 and A6: measured anew from hidden states, over the windows that the report used."""
    from prepare import load_tokens
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    tokens = load_tokens('data/text-bytes', 'val')
    batches = [idx for idx, _ in eval_exits.windows(tokens, 32, 8)][:8]
    with torch.no_grad():
        states = [list(model.hidden_states(idx)) for idx in batches]
        p = torch.cat([model.gate_probabilities(s[:-1]).flatten(0, 1) for s in states])
    for layer in range(4):
        std = torch.cat([s[layer].flatten() for s in states]).std(correction=0).item()
        assert report['stats']['activation_std'][layer] == pytest.approx(std, rel=1e-4)
    left = [next((layer for layer in range(3) if row[layer] > 0.5), 3) for row in p]
    gates = report['stats']['gates']
    assert gates['mean_exit_layer'] == pytest.approx(sum(left) / len(left), rel=1e-5)
    assert gates['leaving_share'] == pytest.approx([left.count(layer) / len(left) for layer in range(4)])


def test_speculation_is_swept_and_the_best_is_named(capsys, monkeypatch):
    monkeypatch.setattr(eval_exits, 'measure_speculation', partial(
        eval_exits.measure_speculation, lengths=(1, 4), n_tokens=9, rounds=1))
    eval_exits.main(['--speculate=True', '--json=drafts.json'])
    result = json.loads(Path('drafts.json').read_text())['speculation']
    assert [(r['draft_layer'], r['draft_len']) for r in result['sweep']] == [(k, n) for k in range(3) for n in (1, 4)]
    for r in result['sweep']:
        assert 0 <= r['acceptance'] <= 1 <= r['tokens_per_pass'] <= r['draft_len'] + 1 and r['speedup'] > 0
    best = max(result['sweep'], key=lambda r: r['speedup'])
    assert result['best'] == best
    assert f'best: --draft_layer={best["draft_layer"]} --draft_len={best["draft_len"]}, ' in capsys.readouterr().out


def test_eval_finds_the_newest_run_and_needs_a_split_that_exists():
    done = call('eval_exits.py', '--split=test')
    assert done.returncode == 2 and 'run: out/run' in done.stdout
    assert done.stderr.startswith('error: ') and 'no test split' in done.stderr


@pytest.mark.parametrize('n_tokens', [3, 7, 8, 9, 33])
def test_speculation_is_measured_on_the_shortest_text(n_tokens):
    """A quarter of block_size = 8 was the prompt at any length."""
    from prepare import load_tokens
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    tokens = load_tokens('data/text-bytes', 'val')[:n_tokens]
    assert len(eval_exits.measure_speculation(model, tokens, lengths=(1,), n_tokens=3, rounds=1)) == 3


@pytest.mark.parametrize('flag, message', [('--temperature=-1', 'temperature is 0'), ('--json=a.png', '.json'),
                                           ('--batch_size=0', 'batch_size is at least 1')])
def test_eval_settings_are_checked_before_anything_is_measured(flag, message):
    with pytest.raises(UserError, match=message):
        eval_exits.configure(eval_exits.EvalSettings, [flag])


# ---- tradeoff.py, plots.py

@pytest.fixture(scope='module')
def points(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run)
        patch.setattr(tradeoff, 'measure_speculation', partial(
            eval_exits.measure_speculation, lengths=(1, 3), n_tokens=9))
        tradeoff.main(['--max_tokens=0', '--json=tradeoff.json'])
    return json.loads((run / 'tradeoff.json').read_text())['points']


def test_tradeoff_of_fixed_exits_is_that_of_the_report(points, report):
    fixed = [p for p in points if p['way'] == 'fixed']
    assert [(p['knob'], p['blocks']) for p in fixed] == [(layer, layer + 1) for layer in range(4)]
    assert [p['loss'] for p in fixed] == pytest.approx([e['loss'] for e in report['exits']], rel=1e-6)
    assert fixed[-1]['agreement'] == 1 > fixed[0]['agreement']


def test_tradeoff_counts_what_decoding_does():
    """The same losses and depths, by teacher-forced decoding of every window, token by token."""
    from prepare import load_tokens
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    for weight in model.gates.parameters():  # as they were trained, they are of one opinion on all tokens
        torch.nn.init.normal_(weight)
    tokens = load_tokens('data/text-bytes', 'val')
    points = tradeoff.measure(model, tokens, shares=(0.6,))
    points = [p for p in points if p['way'] in EXIT_MODES]
    assert [p['way'] for p in points] == list(EXIT_MODES)
    for point in points:
        blocks, losses, way = 0, [], point['way']
        assert 1.9 < point['blocks'] < 2.9
        for idx, targets in eval_exits.windows(tokens, 32, 8):
            decoder = Decoder(model, len(idx))
            for token, target in zip(idx.split(1, dim=1), targets.t()):
                logits, layers = decoder.step(token, exit_mode=way, exit_threshold=point['knob'])
                blocks += (layers + 1).sum().item()
                losses.append(F.cross_entropy(logits, target, reduction='none'))
        assert blocks / (len(tokens) - 1) == pytest.approx(point['blocks'], rel=1e-3)
        assert torch.cat(losses).mean().item() == pytest.approx(point['loss'], rel=1e-3)


def test_the_oracle_knows_full_depth_and_no_more(monkeypatch):
    """By its definition, token by token: it weighs what leaving is expected to add against the price of the blocks."""
    model, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    tokens = torch.randint(256, (97,)).numpy().astype('uint16')
    points = [p for p in tradeoff.measure(model, tokens, shares=(0.4, 0.7)) if p['way'] == 'oracle']
    (idx, targets), = eval_exits.windows(tokens, 32, 16)
    with torch.no_grad():
        p = torch.stack([model(idx, exit_layer=layer)[0].flatten(0, 1).softmax(-1) for layer in range(4)])  # (L, N, V)
    for point in points:
        left = []
        for n in range(96):
            if point['knob'] == 'argmax':
                costs = [float(p[layer, n].argmax() != p[-1, n].argmax()) for layer in range(4)]
            else:
                costs = [(p[-1, n] * (p[-1, n] / p[layer, n]).log()).sum().item() + point['knob'] * (layer + 1)
                         for layer in range(4)]
            left.append(costs.index(min(costs)))
        losses = [-p[layer, n, targets.flatten()[n]].log().item() for n, layer in enumerate(left)]
        same = [(p[layer, n].argmax() == p[-1, n].argmax()).item() for n, layer in enumerate(left)]
        assert len(set(left)) > 1
        assert [point[name] for name in ('blocks', 'loss', 'agreement')] == pytest.approx(
            [sum(left) / 96 + 1, sum(losses) / 96, sum(same) / 96], rel=1e-4)
    assert [p['blocks'] for p in points[:2]] == pytest.approx([1.6, 2.8], abs=0.2)


def test_tradeoff_of_drafts_is_exact_and_counts_the_blocks_one_waits_for(points):
    drafts = [p for p in points if p['way'] == 'drafts']
    assert [p['knob'].split(', ')[0] for p in drafts] == ['0', '1', '2']
    full = next(p for p in points if p['way'] == 'fixed' and p['knob'] == 3)
    for p in drafts:
        k, n = map(int, p['knob'].split(', '))
        assert p['loss'] == full['loss'] and p['agreement'] == 1
        fewest, most = (n * (k + 1) + 4) / (n + 1), n * (k + 1) + 4  # all drafts accepted, none
        assert fewest - 1e-9 <= p['blocks'] <= most


def test_loss_at_a_compute_is_read_off_the_curve():
    points = [{'way': 'gate', 'blocks': b, 'loss': loss} for b, loss in ((10, 1.0), (6, 2.0), (8, 1.2))]
    points += [{'way': 'fixed', 'blocks': 12, 'loss': 0.8}]
    assert tradeoff.at_compute(points, 'gate', 9) == pytest.approx(1.1)
    assert tradeoff.at_compute(points, 'gate', 11) == pytest.approx(0.9)  # full depth is the end of every curve
    assert tradeoff.at_compute(points, 'gate', 5) is None is tradeoff.at_compute(points, 'fixed', 9)


def test_plots_are_drawn_from_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    plots.main([f'--folder={tmp_path}'])
    for name in ('experiments', 'tradeoff'):
        assert (tmp_path / f'{name}.png').read_bytes().startswith(b'\x89PNG')
