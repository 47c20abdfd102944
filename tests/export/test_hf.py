"""The exported folder, from where its users stand: transformers, offline."""
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import EOT, EXTRA, PROMPT, L, folder, greedy, load, save_run, text  # noqa: F401
from torch.testing import assert_close

transformers = pytest.importorskip('transformers', reason=f'transformers {EXTRA}')

import fast.packed  # noqa: E402
from configurator import UserError  # noqa: E402
from eval_exits import evaluate, perplexity  # noqa: E402
from export import hf  # noqa: E402
from export.modeling_bitskip import CACHE  # noqa: E402
from model import open_model  # noqa: E402
from prepare import get_tokenizer, load_tokens  # noqa: E402

# The model card of bitskip-v1-earlyexit, section "Usage", to the letter but for 24 blocks of ours 4
CARD = """
from transformers import AutoTokenizer, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("user/repo")
tokenizer = AutoTokenizer.from_pretrained("user/repo")
inputs = tokenizer("Once upon a time", return_tensors="pt")
outputs = model.generate(**inputs, max_length=100)
print(tokenizer.decode(outputs[0]))
model.set_exit_layer(2)
outputs = model.generate(**inputs, max_length=100)
for exit_layer in [1, 2, 3, 4]:
    model.set_exit_layer(exit_layer)
    outputs = model.generate(**inputs, max_length=100)
    print(f"Layer {exit_layer}: {tokenizer.decode(outputs[0])}")
"""


@pytest.fixture(scope='module')
def pairs(folder):
    """For 'latent' and 'packed': transformers' model, and ours."""
    save_run('out/run')
    hf.main(['--out_dir=out/run', '--name=user/repo'])
    hf.main(['--out_dir=out/run', '--weights=packed'])
    ours = open_model('out/run/ckpt.pt')[0]
    return {'latent': (load('out/run/hf-latent'), ours),
            'packed': (load('out/run/hf-packed'), fast.packed.to_ternary(ours))}


@pytest.fixture(params=['latent', 'packed'])
def pair(pairs, request):
    pairs[request.param][0].set_exit_layer(L)
    return pairs[request.param]


@pytest.fixture
def model(pairs):
    pairs['latent'][0].set_exit_layer(L)
    return pairs['latent'][0].eval()


@pytest.fixture(scope='module')
def plain(folder):
    """A full-precision model, theirs and ours. Where nothing is rounded to codes, what is summed in
    another order stays within rounding errors."""
    save_run('out/fp', linear='fp')
    hf.main(['--out_dir=out/fp'])
    return load('out/fp/hf-latent'), open_model('out/fp/ckpt.pt')[0]


@pytest.fixture(scope='module')
def tokenizer(pairs):
    return transformers.AutoTokenizer.from_pretrained('out/run/hf-latent', trust_remote_code=True)


# ---- the folder by itself

def test_the_cards_snippets_run_without_this_repository(folder, pairs):
    """In another process the text is that of our own decoding, and nobody is asked a question."""
    snippets = ''.join(re.findall(r'```python\n(.*?)```',
                                  Path('out/run/hf-latent/README.md').read_text(), re.S))
    lines = snippets.replace(', trust_remote_code=True', '').splitlines()
    assert lines[:-2] == CARD.split('\n')[1:-1]
    env = os.environ | {'HF_MODULES_CACHE': str(folder / 'a user'), 'PYTHONUTF8': '1',
                        'PYTHONPATH': transformers.__path__[0] + '/..', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', snippets.replace('user/repo', 'hf-packed')],
                          capture_output=True, stdin=subprocess.DEVNULL, env=env, cwd='out/run')
    assert done.returncode == 0, done.stderr.decode()
    tok, idx = get_tokenizer('bytes'), torch.tensor([list(PROMPT.encode())])
    texts = [tok.decode(greedy(pairs['packed'][1], idx, 100, blocks)) for blocks in (1, 2, 3, 4)]
    assert done.stdout.decode() == texts[-1] + '\n' + ''.join(
        f'Layer {n}: {text}\n' for n, text in enumerate(texts, 1))
    assert 'trust' not in done.stderr.decode()


def test_model_card_has_the_measured_exits(pairs):
    """For readers, and as the hub reads it."""
    from huggingface_hub import ModelCard
    tokens = load_tokens('data/text-bytes', 'test')
    for name, (_, ours) in pairs.items():
        card = ModelCard.load(f'out/run/hf-{name}/README.md')
        ppls = [perplexity(loss) for loss in evaluate(ours, tokens, range(L))][::-1]
        rows = re.findall(r'^\| (All layers|\d) \| ([\d.e+]+) \| [\d.]+ \| \d+ \|$', card.text, re.M)
        assert rows == [(n, f'{ppl:.4g}') for n, ppl in zip(('All layers', '3', '2', '1'), ppls)]
        measured = [r for r in card.data.eval_results if r.metric_type == 'perplexity']
        assert [r.metric_value for r in measured] == [round(ppl, 4) for ppl in ppls]
        assert measured[0].dataset_split == 'test' and card.data.license == 'mit'
        assert hf.TESTED in card.text and 'sample.py' in card.text and '<' not in card.text
        assert 'MIT License' in Path(f'out/run/hf-{name}/LICENSE').read_text()
    meta = hf.metadata('user/repo', 'bitskip', {'dataset': 'tinystories'},
                       [{'blocks': 1, 'ppl': 2.0, 'tok_per_s': 3.0}], 'test')
    assert 'datasets:\n- roneneldan/TinyStories' in meta and '- name: user/repo' in meta


def test_packed_weights_take_a_byte_for_five(pairs):
    from safetensors.torch import load_file
    up = load_file('out/run/hf-packed/model.safetensors')['model.blocks.0.ffn.up.codes']
    assert up.dtype == torch.uint8 and up.shape == (48, 7)  # 32 columns


def test_folder_b_after_folder_a_runs_bs_code(pairs, tmp_path):
    """Bug: who was loaded first had registered the name bitskip for all that came later."""
    import shutil
    shutil.copytree('out/run/hf-latent', tmp_path / 'other')
    code = tmp_path / 'other' / 'modeling_bitskip.py'
    code.write_text(code.read_text() + '\nBitSkipForCausalLM.is_new = True\n')
    assert load(tmp_path / 'other').is_new and not hasattr(pairs['latent'][0], 'is_new')


def test_saving_again_gives_the_same_model(pair, tmp_path):
    theirs, _ = pair
    theirs.set_exit_layer(3)
    theirs.save_pretrained(tmp_path / 'again')
    again = load(tmp_path / 'again')
    assert again.config.num_hidden_layers == 3
    assert torch.equal(again(text()).logits, theirs(text()).logits)
    old = Path(f'out/run/hf-{theirs.config.weights}')
    for file in (tmp_path / 'again').glob('*.py'):
        assert file.read_bytes() == (old / file.name).read_bytes()


# ---- the model computes what ours computes

def test_logits_are_ours_to_the_bit(pair):
    """At every exit: the head reads a raw state at exits, and a normed one at full depth."""
    theirs, ours = pair
    for blocks in range(1, L + 1):
        theirs.set_exit_layer(blocks)
        assert torch.equal(theirs(text()).logits, ours(text(), exit_layer=blocks - 1)[0])


@pytest.mark.parametrize('options', [
    dict(blocks=2), dict(exit_mode='gate', exit_threshold=0.5),
    dict(exit_mode='saturation', exit_threshold=0.8),
    dict(exit_mode='confidence', exit_threshold=0.4)], ids=str)
def test_generate_is_our_greedy_decoding(pair, options):
    theirs, ours = pair
    theirs.set_exit_layer(options.get('blocks', L))
    for idx in (text(1), text(1, 1)):
        modes = {key: value for key, value in options.items() if key != 'blocks'}
        out = theirs.generate(idx, max_length=44, **modes)
        assert out[0].tolist() == greedy(ours, idx, 44, **options)
    assert 'exit_mode' not in options or out[0].tolist() != greedy(ours, idx, 44)  # some have left


def test_a_batch_that_leaves_early_is_one_by_one(plain):
    model, _ = plain
    options = dict(max_new_tokens=16, eos_token_id=None, exit_mode='confidence', exit_threshold=0.3)
    batch = model.generate(text(3), **options)
    for row, prompt in zip(batch, text(3)):
        assert torch.equal(row, model.generate(prompt[None], **options)[0])


def test_self_speculation_gives_the_same_text_and_leaves_no_trace(plain, monkeypatch):
    """Bugs: after Ctrl-C in a draft, or a depth that there is not, the model stayed shallow."""
    model, ours = plain
    passes = []
    hook = model.model.blocks[2].register_forward_hook(lambda *_: passes.append(1))
    out = model.generate(text(1), max_length=60, do_sample=False, assistant_early_exit=2)
    hook.remove()
    assert out[0].tolist() == greedy(ours, text(1), 60) and len(passes) < 40
    for draft in (0, 5, '2'):
        with pytest.raises(ValueError, match='assistant_early_exit counts blocks, 1 to 4, got'):
            model.generate(text(1), max_length=30, do_sample=False, assistant_early_exit=draft)
    run = type(model).run

    def interrupted(self, *args):
        if self.config.num_hidden_layers == 2:
            raise KeyboardInterrupt
        return run(self, *args)
    monkeypatch.setattr(type(model), 'run', interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.generate(text(1), max_length=60, do_sample=False, assistant_early_exit=2)
    assert model.config.num_hidden_layers == L


def test_beams_and_samples(plain):
    """Beam search reorders the cache, and finds a text that is at least as likely."""
    model, _ = plain

    def log_likelihood(ids):
        logs = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])
        return logs[:, 19:].sum()
    greedy_text, beam = (model.generate(text(1), max_new_tokens=8, eos_token_id=None, num_beams=n)
                         for n in (1, 4))
    assert log_likelihood(beam) >= log_likelihood(greedy_text)
    assert len(model.generate(text(1), max_new_tokens=8, do_sample=True, num_return_sequences=3)) == 3


def test_a_text_stops_at_block_size(pairs, tokenizer):
    """Bug: pipeline asks for 256 new tokens, and got "257 tokens do not fit"."""
    model, _ = pairs['latent']
    model.set_exit_layer(L)
    write = transformers.pipeline('text-generation', model=model, tokenizer=tokenizer)
    out = write(PROMPT, do_sample=False, eos_token_id=None)[0]['generated_text']
    assert out.startswith(PROMPT)
    options = dict(max_length=300, eos_token_id=None)
    assert model.generate(text(1), **options).shape == (1, 128)
    assert model.generate(text(1), do_sample=False, assistant_early_exit=2, **options).shape[1] <= 128
    embeds = model.get_input_embeddings()(text(1))
    assert model.generate(inputs_embeds=embeds, **options).shape == (1, 108)


# ---- batches and caches

def test_padded_on_the_left_a_batch_continues_as_one_by_one(plain, tokenizer):
    model, _ = plain
    prompts = ['x = 3', PROMPT, 'def main(argv):\n']
    batch = tokenizer(prompts, return_tensors='pt', padding=True)
    assert batch.input_ids[0, 0] == EOT and batch.input_ids[0, -1] == ord('3')
    for cache in (None, 'static'):
        out = model.generate(**batch, max_new_tokens=16, eos_token_id=None, cache_implementation=cache)
        for row, prompt in zip(out, prompts):
            alone = model.generate(**tokenizer(prompt, return_tensors='pt'), max_new_tokens=16,
                                   eos_token_id=None)
            assert torch.equal(row[-16:], alone[0, -16:])


@pytest.mark.parametrize('side', ['left', 'right'])
def test_what_stands_in_the_padding_does_not_matter(model, side):
    real = torch.ones(3, 20, dtype=torch.int64)
    for row, n in enumerate((0, 3, 12)):
        real[row, slice(n) if side == 'left' else slice(20 - n, 20)] = 0
    idx, other = text(3), torch.where(real == 1, text(3), 7)
    a, b = (model(ids, attention_mask=real).logits for ids in (idx, other))
    assert torch.equal(a[real == 1], b[real == 1]) and not torch.equal(a, b)


def test_a_padded_batch_goes_on_in_chunks_and_causally(plain):
    """Several tokens continue a cache with padding in it: as in one pass, and none sees a later."""
    model, _ = plain
    idx, mask = text(3), torch.ones(3, 20, dtype=torch.int64)
    mask[0, :4] = mask[2, :9] = 0

    def second_chunk(chunk):
        past = model(idx[:, :12], attention_mask=mask[:, :12], use_cache=True)[CACHE]
        return model(chunk, attention_mask=mask, past_key_values=past).logits
    logits = second_chunk(idx[:, 12:])
    assert_close(logits, model(idx, attention_mask=mask).logits[:, 12:])
    changed = idx[:, 12:].clone()
    changed[:, 4] = (changed[:, 4] + 1) % 256
    new = second_chunk(changed)
    assert torch.equal(new[:, :4], logits[:, :4])
    assert (new[:, 4:] != logits[:, 4:]).any(dim=-1).all()


def test_a_cache_of_an_early_exit_is_not_continued_deeper(model):
    model.set_exit_layer(2)
    past = model(text()[:, :12], use_cache=True)[CACHE]
    model.set_exit_layer(L)
    with pytest.raises(ValueError, match='0 of 12 tokens in block 3'):
        model(text()[:, 12:], past_key_values=past)


# ---- what clients pass

def test_labels_hidden_states_and_tuples(model, pairs):
    _, ours = pairs['latent']
    labels = text().clone()
    labels[0, 5:9] = -100
    out = model(text(), labels=labels, output_hidden_states=True)
    kept = labels[:, 1:] != -100
    assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits[:, :-1][kept],
                                                             labels[:, 1:][kept]))
    states = list(ours.hidden_states(text()))
    assert len(out.hidden_states) == L + 1
    assert torch.equal(out.hidden_states[0], ours.embedding(text()))
    assert torch.equal(out.hidden_states[2], states[1])
    assert torch.equal(ours.head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(text(), return_dict=False)[0], out.logits)
    assert torch.equal(model(text(), logits_to_keep=2).logits, out.logits[:, -2:])
    assert torch.equal(model(text(), logits_to_keep=torch.tensor([3, 9])).logits,
                       out.logits[:, [3, 9]])
    embeds = model.get_input_embeddings()(text())
    assert torch.equal(model(inputs_embeds=embeds).logits, out.logits)
    assert torch.equal(model(text(), position_ids=torch.arange(20)[None]).logits, out.logits)
    assert not torch.equal(model(text(), position_ids=torch.arange(20)[None] * 2).logits, out.logits)


def test_stop_strings(model, tokenizer):
    out = model.generate(text(1), max_length=100, eos_token_id=None)[0]
    stop = tokenizer.decode(out[30:32])
    stopped = model.generate(text(1), max_length=100, eos_token_id=None, stop_strings=[stop],
                             tokenizer=tokenizer)[0]
    assert len(stopped) <= 32 and torch.equal(stopped, out[:len(stopped)])


@pytest.mark.parametrize('call, message', [
    (lambda m: m.set_exit_layer(0), 'counts blocks, 1 to 4'),
    (lambda m: m(text(1, 129)), 'do not fit into block_size=128'),
    (lambda m: m(text(1), position_ids=torch.full((1, 20), 128)), 'do not fit into block_size=128'),
    (lambda m: m(text(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]])), 'pad it on the left'),
    (lambda m: m(text(1, 4), attention_mask=torch.ones(1, 1, 4, 4)), r'attention_mask is \(batch, 4\)'),
    (lambda m: m(text(1), output_attentions=True), 'keeps no attention weights'),
    (lambda m: m(), 'either input_ids or inputs_embeds'),
    (lambda m: m(text(1), labels=text(1), logits_to_keep=1), 'a loss needs all logits'),
    (lambda m: m.generate(text(1), exit_mode='early'), 'exit_mode is one of'),
    (lambda m: m.generate(text(1), exit_mode='gate', use_cache=False), 'needs use_cache=True'),
    (lambda m: m.generate(text(1), exit_mode='gate', assistant_early_exit=2), 'leave out exit_mode')])
def test_what_the_model_refuses(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_unknown_arguments_are_not_swallowed(model):
    with pytest.raises(TypeError):
        model(text(1), token_type_ids=text(1))


def test_a_larger_vocabulary_is_saved_and_loaded(model, pairs, tmp_path):
    """Bug: the embedding grew and the head did not; what was saved did not load."""
    grown = load('out/run/hf-latent')
    grown.resize_token_embeddings(260)
    assert grown.get_output_embeddings().weight.shape == (260, 32) and grown.config.vocab_size == 260
    grown.save_pretrained(tmp_path / 'grown')
    again = load(tmp_path / 'grown')
    assert torch.equal(again(text() + 4).logits, grown(text() + 4).logits)
    assert torch.equal(again(text()).logits[..., :256], model(text()).logits)
    with pytest.raises(ValueError, match='int8 rows cannot be resized'):
        pairs['packed'][0].resize_token_embeddings(260)


@pytest.mark.parametrize('weights', ['latent', 'packed'])
def test_bfloat16(pairs, weights):
    """Bug: int8 rows come as float32, and LayerNorm in bfloat16 does not take them."""
    model = load(f'out/run/hf-{weights}', dtype=torch.bfloat16)
    logits, exact = model(text()).logits.float(), pairs[weights][0](text()).logits
    assert model.dtype == torch.bfloat16 and (logits - exact).std() < 0.2 * exact.std()
    assert model.generate(text(1), max_length=30).shape[1] <= 30


def test_gradient_checkpointing(plain):
    """The same gradients, with less kept for them; padding included."""
    model, _ = plain
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, :5] = 0
    grads = []
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        model.train().zero_grad()
        model(text(), attention_mask=mask, labels=text()).loss.backward()
        grads.append(model.model.blocks[0].attn.q.weight.grad.clone())
    with pytest.raises(ValueError, match='needs use_cache=False'):
        model(text(), use_cache=True)
    model.gradient_checkpointing_disable()
    model.eval().zero_grad()
    assert_close(grads[0], grads[1]), grads[0].abs().sum() > 0


# ---- the tokenizers

def random_texts(n=200):
    """Texts of all planes and kinds of characters, and pieces that tokenizers trip over."""
    rng = random.Random(0)
    ranges = [(0, 128), (0, 128), (128, 0x250), (0x370, 0x600), (0x900, 0xE00), (0x2000, 0x2BFF),
              (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF),
              (0x1F300, 0x1FAFF), (0xFFF0, 0xFFFF)]
    pieces = ['<|endoftext|>', 'Ā', 'Ġ', ' ', '  ', '\n', '\r\n', '\t', '\0', "'s", "'ll", "don't",
              '\u3000', '\xa0', ' 123', 'word', ' word', '\ufeff', '\u200d', 'e\u0301', '...', '\x85']
    for _ in range(n):
        yield ''.join(rng.choice(pieces) if rng.random() < 0.4 else
                      chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 30)))


@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_tokenizers_agree_on_any_text(name, tokenizer, tmp_path):
    """Ids and text are those of prepare.py, also of ids that no text has."""
    ours, theirs = get_tokenizer(name), tokenizer
    if name == 'gpt2':
        hf.hf_tokenizer(ours, 128).save_pretrained(tmp_path)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == ours.eot
    texts = ['', 'naïve café 你好 👩‍👩‍👧 🎉', 'a\r\n\tb\x00c', *random_texts()]
    ids = [ours.encode(text) for text in texts]
    assert theirs(texts).input_ids == ids
    rng = random.Random(1)
    for row in ids + [rng.choices(range(ours.vocab_size), k=20) for _ in range(200)]:
        assert theirs.decode(row) == ours.decode(row)


# ---- mistakes

@pytest.mark.parametrize('flags, changes, message', [
    (['--out_dir=out/nothing'], {}, 'there is no checkpoint out/nothing/ckpt.pt'),
    (['--weights=packed'], {}, 'cannot be packed .* leave out --weights'),
    (['--hf_dir=data'], {}, 'data is there already'),
    (['--as=arcee'], {}, "has no norm='layernorm', sub_norm=True; .* config/arcee.py"),
    (['--as=arcee', '--weights=packed'], {}, 'leave out --weights'),
    (['--exit_layer=1'], {}, '--exit_layer is for --as=arcee'),
    ([], dict(linear='my_layer:Own'), "linear='my_layer:Own' is a variant")])
def test_mistakes_are_one_sentence_and_leave_nothing(plain, monkeypatch, flags, changes, message):
    if changes:
        import quant
        monkeypatch.setattr(quant, 'find_class', lambda *_: quant.BitLinear)
        save_run('out/fp', **changes)
    before = sorted(Path('.').rglob('*'))
    with pytest.raises(UserError, match=message):
        hf.main(['--out_dir=out/fp', '--hf_dir=out/new', *flags])
    assert sorted(Path('.').rglob('*')) == before


def test_on_a_full_disk_nothing_remains(pairs):
    """Bug: a traceback of safetensors, and half a folder. And a foreign folder called *.tmp went."""
    Path('out/full.tmp').mkdir()
    Path('out/full.tmp/mine').write_text('')
    before, limits = sorted(Path('.').rglob('*')), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
        with pytest.raises(OSError, match='File too large'):
            hf.main(['--out_dir=out/run', '--hf_dir=out/full'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(Path('.').rglob('*')) == before


def test_without_transformers(pairs, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match='needs transformers: pip install'):
        hf.main(['--out_dir=out/run'])


def test_imports_become_relative():
    files = hf.flat_sources('export.modeling_bitskip')
    assert {'model.py', 'packed.py', 'quant.py'} <= files.keys() and 'train.py' not in files
    for source in files.values():
        found = re.findall(r'^(?:import|from) (\w+)', source, re.M)
        assert not {f'{name}.py' for name in found} & files.keys()
