"""The exported folder, from where its users stand: transformers, offline, and none of this repository in reach."""
import json
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import text_folder
from torch.testing import assert_close

import checkpoint
import export_hf
from configurator import UserError
from eval_exits import evaluate, measure_speed, perplexity
from model import BitSkip, BitSkipConfig
from packed import to_ternary
from prepare import load_tokens, prepare
from tokenizer import get_tokenizer
from train import TrainSettings

os.environ['HF_HUB_OFFLINE'] = '1'
transformers = pytest.importorskip(
    'transformers', reason='transformers is not installed: pip install -r requirements-extra.txt')

L, EOT = 24, 0
SETTINGS = vars(TrainSettings()) | dict(
    n_layer=L, n_head=2, n_kv_head=1, n_embd=32, ffn_dim=48, block_size=128, gate_dim=8, linear='hbitlinear',
    hadamard_layers='o,down', exit_norm='none', lambda_ee=0.3, p_max=0.5, dataset='text.txt', tokenizer='bytes',
    vocab_size=256)
PROMPT = 'Once upon a time'

# The model card of bitskip-v1-earlyexit, section "Usage", to the letter
CARD = """
from transformers import AutoTokenizer, AutoModelForCausalLM
# Load model
model = AutoModelForCausalLM.from_pretrained("your-username/bitskip-v1-earlyexit")
tokenizer = AutoTokenizer.from_pretrained("your-username/bitskip-v1-earlyexit")
# Generate text
inputs = tokenizer("Once upon a time", return_tensors="pt")
outputs = model.generate(**inputs, max_length=100)
print(tokenizer.decode(outputs[0]))
# Exit at layer 12 for faster inference
model.set_exit_layer(12)
outputs = model.generate(**inputs, max_length=100)
# 1.5-2x faster with minimal quality loss
for exit_layer in [6, 12, 18, 24]:
    model.set_exit_layer(exit_layer)
    outputs = model.generate(**inputs, max_length=100)
    print(f"Layer {exit_layer}: {tokenizer.decode(outputs[0])}")
"""


def save_run(out_dir, **changes):
    """A run as train.py leaves it, of a model whose weights are random, but large enough to be opinionated."""
    settings = SETTINGS | changes
    torch.manual_seed(0)
    model = BitSkip(BitSkipConfig.of(settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.dim() == 2 else parameter.uniform_(0.5, 1.5)
    meta = json.loads(Path(prepare('text.txt', 'bytes'), 'meta.json').read_text())
    checkpoint.save(f'{out_dir}/ckpt.pt', {'model': model.state_dict(), 'settings': settings, 'meta': meta,
                                           'progress': {'iter': 60}})


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A folder with out/run, exported to out/run/hf-latent and out/run/hf-packed."""
    folder = tmp_path_factory.mktemp('export')
    with text_folder(folder, 16000) as patch:
        patch.setattr(export_hf, 'measure_speed', partial(measure_speed, n_tokens=1, rounds=1))
        patch.setattr('transformers.dynamic_module_utils.HF_MODULES_CACHE', str(folder / 'modules'))
        save_run('out/run')
        export_hf.main(['--out_dir=out/run'])
        export_hf.main(['--out_dir=out/run', '--weights=packed'])
        yield folder


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope='module')
def pairs(run):
    """For 'latent' and 'packed': transformers' model and ours."""
    ours, _ = checkpoint.load_checkpoint('out/run/ckpt.pt')
    return {'latent': (load('out/run/hf-latent'), ours), 'packed': (load('out/run/hf-packed'), to_ternary(ours))}


@pytest.fixture(params=['latent', 'packed'])
def pair(pairs, request):
    theirs, ours = pairs[request.param]
    theirs.set_exit_layer(L)
    return theirs, ours


@pytest.fixture
def model(pairs):
    pairs['latent'][0].set_exit_layer(L)
    return pairs['latent'][0]


@pytest.fixture(scope='module')
def shallow(run):
    """A full-precision model of 4 blocks, theirs and ours: where nothing is rounded to codes, what computes the same in
    another order stays within rounding errors."""
    save_run('out/fp', linear='fp', n_layer=4)
    export_hf.main(['--out_dir=out/fp', '--hf_dir=out/shallow'])
    return load('out/shallow'), checkpoint.load_checkpoint('out/fp/ckpt.pt')[0]


@pytest.fixture(scope='module')
def tokenizer(pairs):
    return transformers.AutoTokenizer.from_pretrained('out/run/hf-latent')


def text(B=2, T=20):
    return torch.randint(1, 256, (B, T), generator=torch.Generator().manual_seed(1))


def greedy(ours, idx, max_length, blocks=L):
    """Our own greedy continuation of idx (1, T) up to max_length, or to the end of text: a list of ids."""
    ids = ours.generate(idx, max_length - idx.shape[1], temperature=0, exit_layer=blocks - 1)[0].tolist()
    return ids[:ids.index(EOT, idx.shape[1]) + 1] if EOT in ids[idx.shape[1]:] else ids


# ---- the folder by itself

def test_the_cards_snippets_run_unchanged(run, pairs):
    """The folder's own card repeats them, apart from the name, and the consent that transformers asks for where a model
    brings its code; and drafts once. In a process that cannot import this repository the text is that of our own
    decoding."""
    script = ''.join(re.findall(r'```python\n(.*?)```', (run / 'out/run/hf-packed/README.md').read_text(), re.S))
    theirs = re.sub('^# .*\n', '', CARD, flags=re.M).replace('your-username/bitskip-v1-earlyexit', 'hf-packed')
    lines = script.replace(', trust_remote_code=True', '').splitlines()
    assert lines[:-1] == theirs.split('\n')[1:-1] and 'assistant_early_exit=6' in lines[-1]
    env = os.environ | {'HF_MODULES_CACHE': str(run / 'modules of a user'), 'PYTHONUTF8': '1', 'PYTHONPATH': '',
                        'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, stdin=subprocess.DEVNULL, env=env,
                          cwd=run / 'out/run')
    assert done.returncode == 0, done.stderr.decode()
    tok, idx = get_tokenizer('bytes'), torch.tensor([list(PROMPT.encode())])
    texts = {blocks: tok.decode(greedy(pairs['packed'][1], idx, 100, blocks)) for blocks in (6, 12, 18, 24)}
    assert len(set(texts.values())) == 4
    assert done.stdout.decode() == texts[24] + '\n' + ''.join(f'Layer {n}: {text}\n' for n, text in texts.items())
    assert 'trust' not in done.stderr.decode()  # nor was there a question


def test_model_card_has_the_measured_exits(run, pairs):
    tokens = load_tokens('data/text-bytes', 'val')
    for name, (_, ours) in pairs.items():
        card = (run / f'out/run/hf-{name}/README.md').read_text()
        rows = re.findall(r'^\| (All layers|\d+) \| ([\d.e+]+) \| ([\d.]+) \| (\d+) \|$', card, re.M)
        assert [row[0] for row in rows] == ['All layers', *map(str, range(L - 1, 0, -1))]
        for row, loss in zip(reversed(rows), evaluate(ours, tokens, list(range(L)))):
            assert row[1] == f'{perplexity(loss):.4g}'
        assert f'({len(tokens):,} tokens)' in card and 'hbitlinear' in card


def test_packed_weights_take_a_byte_for_five(run):
    from safetensors.torch import load_file
    state = load_file('out/run/hf-packed/model.safetensors')
    up = state['model.blocks.0.ffn.up.codes']
    assert up.dtype == torch.uint8 and up.shape == (48, 7)  # 32 columns
    latent, packed = (os.path.getsize(f'out/run/hf-{name}/model.safetensors') for name in ('latent', 'packed'))
    assert packed < latent / 3


# ---- the model

def test_logits_are_ours_to_the_bit(pair):
    """At every exit, whose last state is raw here and normed at full depth (exit_norm='none')."""
    theirs, ours = pair
    for blocks in (1, 12, 23, L):
        theirs.set_exit_layer(blocks)
        assert torch.equal(theirs(text()).logits, ours(text(), exit_layer=blocks - 1)[0])


def test_packed_logits_are_the_latent_models_up_to_its_head(pairs):
    """The codes are the same, head and embedding are rounded: the likeliest token is mostly the same."""
    latent, packed = (theirs(text(4, 64)).logits.argmax(-1) for theirs, _ in pairs.values())
    assert (latent == packed).float().mean() > 0.7


@pytest.mark.parametrize('blocks', [6, L])
def test_generate_is_our_greedy_decoding(pair, blocks):
    theirs, ours = pair
    theirs.set_exit_layer(blocks)
    out = theirs.generate(text(1), max_length=44)
    assert out[0].tolist() == greedy(ours, text(1), 44, blocks) and out.shape[1] > 30


def count_calls(module, counts, key):
    counts[key] = 0
    return module.register_forward_hook(lambda *_: counts.update({key: counts[key] + 1}))


def test_full_precision_models_and_folders_of_any_name(shallow):
    theirs, ours = shallow
    assert torch.equal(theirs(text()).logits, ours(text())[0])
    assert '# shallow\n' in Path('out/shallow/README.md').read_text()


def test_self_speculation_gives_the_same_text(shallow):
    """assistant_early_exit: many passes of 2 blocks, fewer of all 4, the same tokens; then the depth is as before."""
    theirs, ours = shallow
    passes = {}
    hooks = [count_calls(theirs.model.blocks[layer], passes, layer) for layer in (1, 2)]
    out = theirs.generate(text(1), max_length=60, do_sample=False, assistant_early_exit=2)
    for hook in hooks:
        hook.remove()
    assert out[0].tolist() == greedy(ours, text(1), 60, 4) and out.shape[1] == 60
    assert passes[2] < 40 < passes[1]
    assert theirs.config.num_hidden_layers == 4


def test_self_speculation_of_ternary_models(pair):
    """Several tokens in one pass are summed in another order than one by one, and where a sum of 1e-7 more tips an
    activation into the next of its 255 codes, logits change a little: every token is the likeliest up to that."""
    theirs, ours = pair
    out = theirs.generate(text(1), max_length=40, do_sample=False, eos_token_id=None, assistant_early_exit=6)
    with torch.no_grad():
        logits = ours(out[:, :-1])[0][0, 19:]  # (20, V)
    chosen = logits.gather(1, out[0, 20:, None]).squeeze(1)
    assert out.shape[1] == 40 and (logits.amax(1) - chosen).max() < 0.25 * logits.std()  # others: 2 or 3 below


def test_beams_and_samples(shallow):
    """Beam search reorders the cache, and finds a text that is at least as likely as the greedy one."""
    model, _ = shallow

    def log_likelihood(ids):
        return model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[:, 19:].sum()
    plain, beams = (model.generate(text(1), max_new_tokens=8, eos_token_id=None, num_beams=n) for n in (1, 4))
    assert log_likelihood(beams) >= log_likelihood(plain)
    assert model.generate(text(1), max_new_tokens=8, do_sample=True, num_return_sequences=3).shape[0] == 3


def test_padded_on_the_left_a_batch_continues_as_one_by_one(shallow, tokenizer):
    model, _ = shallow
    prompts = ['x = 3', PROMPT, 'def main(argv):\n']
    batch = tokenizer(prompts, return_tensors='pt', padding=True)
    assert batch.input_ids[0, 0] == EOT and batch.input_ids[0, -1] == ord('3')
    out = model.generate(**batch, max_new_tokens=16, eos_token_id=None)
    alone = [model.generate(**tokenizer(prompt, return_tensors='pt'), max_new_tokens=16, eos_token_id=None)[0, -16:]
             for prompt in prompts]
    assert out[:, -16:].tolist() == [ids.tolist() for ids in alone]


@pytest.mark.parametrize('side', ['left', 'right'])
def test_what_stands_in_the_padding_does_not_matter(model, side):
    real = torch.ones(3, 20, dtype=torch.int64)
    for row, n in enumerate((0, 3, 12)):
        real[row, slice(n) if side == 'left' else slice(20 - n, 20)] = 0
    idx, other = text(3), torch.where(real == 1, text(3), 7)
    a, b = (model(ids, attention_mask=real).logits for ids in (idx, other))
    assert torch.equal(a[real == 1], b[real == 1]) and not torch.equal(a, b)
    assert not torch.equal(model(other).logits[real == 1], a[real == 1]) or side == 'right'


def test_log_likelihoods_of_a_right_padded_batch(shallow):
    """As evaluation harnesses ask: rows of several lengths in one batch, with a mask or without."""
    model, _ = shallow
    rows = [text(1, n)[0] for n in (20, 8, 13)]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=EOT)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    for logits in (model(batch).logits, model(batch, attention_mask=mask).logits):
        for row, got in zip(rows, logits):
            assert_close(got[:len(row)], model(row[None]).logits[0])


def test_labels_hidden_states_and_tuples(model, pairs):
    _, ours = pairs['latent']
    labels = text().clone()
    labels[0, 5:9] = -100
    out = model(text(), labels=labels, output_hidden_states=True)
    with torch.no_grad():
        logits, losses = ours(text(1)[:, :-1], text(1)[:, 1:])
    assert_close(model(text(1), labels=text(1)).loss, losses['ce'])
    kept = labels[:, 1:] != -100
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, :-1][kept], labels[:, 1:][kept]))
    states = list(ours.hidden_states(text()))
    assert len(out.hidden_states) == L + 1
    assert torch.equal(out.hidden_states[0], ours.embedding(text())) and torch.equal(out.hidden_states[3], states[2])
    assert torch.equal(ours.head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(text(), return_dict=False)[0], out.logits)
    assert torch.equal(model(text(), logits_to_keep=2).logits, out.logits[:, -2:])
    out.loss.backward()
    assert model.model.blocks[0].attn.q.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_a_cache_goes_on_where_it_stopped(shallow):
    model, _ = shallow
    past = model(text()[:, :12], use_cache=True).past_key_values
    assert_close(model(text()[:, 12:], past_key_values=past).logits, model(text()).logits[:, 12:])


def test_a_padded_batch_goes_on_in_chunks_and_causally(shallow):
    """Several tokens of each row continue a cache that has padding in it: as in one pass, and none sees a later one."""
    model, _ = shallow
    idx, mask = text(3), torch.ones(3, 20, dtype=torch.int64)
    mask[0, :4] = mask[2, :9] = 0

    def second_chunk(chunk):
        past = model(idx[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
        return model(chunk, attention_mask=mask, past_key_values=past).logits

    logits = second_chunk(idx[:, 12:])
    assert_close(logits, model(idx, attention_mask=mask).logits[:, 12:])
    for t in (1, 4, 7):
        changed = idx[:, 12:].clone()
        changed[:, t] = (changed[:, t] + 1) % 256
        new = second_chunk(changed)
        assert torch.equal(new[:, :t], logits[:, :t]) and (new[:, t:] != logits[:, t:]).any(dim=-1).all()


def test_a_cache_of_an_early_exit_is_not_continued_deeper(model):
    model.set_exit_layer(6)
    past = model(text()[:, :12], use_cache=True).past_key_values
    model.set_exit_layer(L)
    with pytest.raises(ValueError, match='0 of 12 tokens in block 7'):
        model(text()[:, 12:], past_key_values=past)


def test_saving_again_gives_the_same_model(pair, tmp_path):
    theirs, _ = pair
    theirs.set_exit_layer(18)
    theirs.save_pretrained(tmp_path / 'again')
    again = load(tmp_path / 'again')
    assert again.config.num_hidden_layers == 18 and torch.equal(again(text()).logits, theirs(text()).logits)
    files = [{file.name: file.read_bytes() for file in folder.glob('*.py')}
             for folder in (tmp_path / 'again', Path(f'out/run/hf-{theirs.config.weights}'))]
    assert files[0] == files[1]


@pytest.mark.parametrize('call, message', [
    (lambda model: model.set_exit_layer(0), 'counts blocks, 1 to 24'),
    (lambda model: model.set_exit_layer(25), 'counts blocks, 1 to 24'),
    (lambda model: model.generate(text(1, 120), max_length=140, eos_token_id=None), 'do not fit into block_size=128'),
    (lambda model: model.generate(text(1), max_length=30, cache_implementation='static'), 'the default, dynamic one'),
    (lambda model: model(text(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]])), 'pad it on the left'),
])
def test_what_the_model_refuses(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


# ---- the tokenizers

def random_texts(n=300, seed=0):
    """Texts of all planes and kinds of characters, and pieces that tokenizers are known to trip over."""
    rng = random.Random(seed)
    ranges = [(0, 128), (0, 128), (128, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x2000, 0x2BFF), (0x3000, 0x30FF),
              (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0x1F300, 0x1FAFF), (0xFFF0, 0xFFFF)]
    pieces = ['<|endoftext|>', 'Ā', 'Ġ', ' ', '  ', '\n', '\r\n', '\t', '\0', "'s", "'ll", "don't", '\u3000', '\xa0',
              ' 123', 'word', ' word', '\ufeff', '\u200d', 'e\u0301', '...', '\x85']
    for _ in range(n):
        yield ''.join(rng.choice(pieces) if rng.random() < 0.4 else chr(rng.randint(*rng.choice(ranges)))
                      for _ in range(rng.randint(0, 30)))


@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_tokenizers_agree_on_any_text(name, tokenizer, tmp_path):
    """Ids and text, also of ids that no text has, are those of tokenizer.py; by AutoTokenizer, from files."""
    ours, theirs = get_tokenizer(name), tokenizer
    if name == 'gpt2':
        export_hf.hf_tokenizer(ours, 128).save_pretrained(tmp_path)
        (tmp_path / 'config.json').write_text(Path('out/run/hf-latent/config.json').read_text())
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == ours.eot
    texts = ['', 'Hello world', 'naïve café 你好 👩‍👩‍👧 🎉', 'a\r\n\tb\x00c', *random_texts()]
    assert theirs(texts).input_ids == [ours.encode(text) for text in texts]
    rng = random.Random(1)
    for ids in [ours.encode(text) for text in texts] + [rng.choices(range(ours.vocab_size), k=20) for _ in range(200)]:
        assert theirs.decode(ids) == ours.decode(ids)


# ---- mistakes

@pytest.fixture
def in_a_run(run, tmp_path, monkeypatch):
    """Another working folder, with out/fp, and the same text."""
    monkeypatch.chdir(tmp_path)
    Path('text.txt').write_text((run / 'text.txt').read_text())
    save_run('out/fp', linear='fp', n_layer=2)


@pytest.mark.parametrize('flags, message', [
    (['--out_dir=out/nothing'], 'there is no checkpoint out/nothing/ckpt.pt'),
    (['--weights=packed'], 'has no ternary weights to pack'),
    (['--hf_dir=data'], 'data is there already'),
    (['--weights=int4'], "'latent', 'packed'"),
])
def test_mistakes_are_one_sentence_and_leave_nothing(in_a_run, flags, message):
    before = sorted(Path('.').rglob('*'))
    with pytest.raises(UserError, match=message):
        export_hf.main(['--out_dir=out/fp', *flags])
    assert sorted(Path('.').rglob('*')) == before


def test_an_export_that_fails_leaves_nothing(in_a_run, monkeypatch):
    def fail(*_):
        assert Path('out/fp/hf-latent.tmp/model.safetensors').exists()
        raise OSError('no space left')
    monkeypatch.setattr(export_hf, 'model_card', fail)
    monkeypatch.setattr(export_hf, 'measure_speed', partial(measure_speed, n_tokens=1, rounds=1))
    with pytest.raises(OSError, match='no space left'):
        export_hf.main(['--out_dir=out/fp'])
    assert sorted(path.name for path in Path('out/fp').iterdir()) == ['ckpt.pt']


def test_without_transformers(in_a_run, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match='needs transformers: pip install -r requirements-extra.txt'):
        export_hf.main(['--out_dir=out/fp'])


def test_imports_become_relative():
    source = 'import os\nimport decode\nfrom quant import bits\nfrom decode import a, b\n'
    assert export_hf.relative_imports(source) == (
        'import os\nfrom .decode import __name__ as _; from . import decode\nfrom .quant import bits\n'
        'from .decode import a, b\n')
    assert {'modeling_bitskip', 'model', 'quant', 'decode', 'exits', 'hadamard', 'packed'} <= set(
        export_hf.needed_modules('modeling_bitskip'))
    assert 'train' not in export_hf.needed_modules('modeling_bitskip')
