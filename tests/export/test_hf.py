"""The exported folder, from where its users stand: transformers, offline."""
import os
import random
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import EOT, EXTRA, PROMPT, L, folder, greedy, load, save_run, text  # noqa: F401
from torch.testing import assert_close

from checkpoint import open_model
from configurator import UserError
from eval_exits import evaluate, perplexity
from export import hf, pack
from fast.packed import to_ternary
from prepare import get_tokenizer, load_tokens
from quant import BitLinear

transformers = pytest.importorskip('transformers', reason=f'transformers {EXTRA}')
from export.modeling_bitskip import CACHE  # noqa: E402

SHORT = dict(max_new_tokens=16, eos_token_id=None)

@pytest.fixture(scope='module')
def pairs():
    """For 'latent' and 'packed': transformers' model, and ours."""
    save_run('out/run')
    hf.main(['--out_dir=out/run', '--name=user/repo'])
    hf.main(['--out_dir=out/run', '--weights=packed'])
    ours = open_model('out/run/ckpt.pt')[0]
    return {'latent': (load('out/run/hf-latent'), ours),
            'packed': (load('out/run/hf-packed'), to_ternary(ours))}

@pytest.fixture(params=['latent', 'packed'])
def pair(pairs, request):
    pairs[request.param][0].set_exit_layer(L)
    return pairs[request.param]

@pytest.fixture
def model(pairs):
    pairs['latent'][0].set_exit_layer(L)
    return pairs['latent'][0]

@pytest.fixture(scope='module')
def plain():
    """A full-precision model: where nothing is rounded to codes, what is summed in another order
    stays within rounding errors."""
    save_run('out/fp', linear='fp')
    hf.main(['--out_dir=out/fp'])
    return load('out/fp/hf-latent')

@pytest.fixture(scope='module')
def tokenizer(pairs):
    return transformers.AutoTokenizer.from_pretrained('out/run/hf-latent', trust_remote_code=True)

# ---- the folder by itself

def test_the_cards_snippets_run_without_this_repository(pairs):
    """In another process the text is that of our own decoding, and nobody is asked a question."""
    card = Path('out/run/hf-latent/README.md').read_text()
    snippets = ''.join(re.findall(r'```python\n(.*?)```', card, re.S))
    env = os.environ | {'HF_MODULES_CACHE': str(Path('a user').resolve()), 'PYTHONUTF8': '1',
                        'PYTHONPATH': transformers.__path__[0] + '/..', 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', snippets.replace('user/repo', 'hf-packed')],
                          capture_output=True, stdin=subprocess.DEVNULL, env=env, cwd='out/run')
    assert done.returncode == 0 and b'trust' not in done.stderr, done.stderr.decode()
    idx, decode = torch.tensor([list(PROMPT.encode())]), get_tokenizer('bytes').decode
    texts = [decode(greedy(pairs['packed'][1], idx, 100, blocks)) for blocks in (1, 2, 3, 4)]
    assert done.stdout.decode() == texts[-1] + '\n' + ''.join(
        f'Layer {n}: {text}\n' for n, text in enumerate(texts, 1))

def test_model_card_has_the_measured_exits(pairs):
    """For readers, and as the hub reads it."""
    from huggingface_hub import ModelCard
    tokens = load_tokens('data/text-bytes', 'test')
    for name, (_, ours) in pairs.items():
        card = ModelCard.load(f'out/run/hf-{name}/README.md')
        ppls = [perplexity(loss) for loss in evaluate(ours, tokens, range(L))][::-1]
        rows = re.findall(r'^\| (All layers|\d) \| ([\d.e+]+) \| .* \|$', card.text, re.M)
        assert rows == [(n, f'{p:.4g}') for n, p in zip(('All layers', '3', '2', '1'), ppls)]
        results = card.data.eval_results
        assert [r.metric_value for r in results[::2]] == [round(ppl, 4) for ppl in ppls]
        assert results[0].dataset_split == 'test' and card.data.license == 'mit'
        assert hf.TESTED in card.text and 'sample.py' in card.text and '<' not in card.text
        assert 'MIT License' in Path(f'out/run/hf-{name}/LICENSE').read_text()
    facts = {'split': 'test', 'exits': [{'blocks': 1, 'ppl': 2.0, 'tok_per_s': 3.0}]}
    assert 'datasets:\n- roneneldan/TinyStories' in hf.hub_data('a/b', '', 'tinystories', facts)[1]
    assert hf.hub_data('a/b', '', '/home/me/my texts', facts)[0] == 'my texts'

def test_folder_b_after_folder_a_runs_bs_code(pairs, tmp_path):
    """Bug: who was loaded first had registered the name bitskip for all that came later."""
    shutil.copytree('out/run/hf-latent', tmp_path / 'other')
    code = tmp_path / 'other' / 'modeling_bitskip.py'
    code.write_text(code.read_text() + '\nBitSkipForCausalLM.is_new = True\n')
    assert load(tmp_path / 'other').is_new and not hasattr(pairs['latent'][0], 'is_new')

def test_saving_again_gives_the_same_model(pair, tmp_path):
    """And the same code; packed, five codes to a byte."""
    theirs, _ = pair
    theirs.set_exit_layer(3)
    theirs.save_pretrained(tmp_path / 'again')
    again, old = load(tmp_path / 'again'), Path(f'out/run/hf-{theirs.config.weights}')
    assert again.config.num_hidden_layers == 3
    assert torch.equal(again(text()).logits, theirs(text()).logits)
    for file in (tmp_path / 'again').glob('*.py'):
        assert file.read_bytes() == (old / file.name).read_bytes()
    if theirs.config.weights == 'packed':
        from safetensors.torch import load_file
        up = load_file(tmp_path / 'again/model.safetensors')['model.blocks.0.ffn.up.codes']
        assert up.dtype == torch.uint8 and up.shape == (48, 7)  # 32 columns

# ---- the model computes what ours computes

def test_logits_are_ours_to_the_bit(pair):
    """At every exit: the head reads a raw state at exits, and a normed one at full depth."""
    theirs, ours = pair
    for blocks in range(1, L + 1):
        theirs.set_exit_layer(blocks)
        assert torch.equal(theirs(text()).logits, ours(text(), exit_layer=blocks - 1)[0])

@pytest.mark.parametrize('options', [
    dict(blocks=2), dict(exit_mode='gate', exit_threshold=0.5),
    dict(exit_mode='confidence', exit_threshold=0.2)], ids=str)
def test_generate_is_our_greedy_decoding(pair, options):
    theirs, ours = pair
    theirs.set_exit_layer(options.get('blocks', L))
    modes = {key: value for key, value in options.items() if key != 'blocks'}
    for idx in (text(1, 1), text(1)):
        out = theirs.generate(idx, max_length=44, **modes)[0].tolist()
        assert out == greedy(ours, idx, 44, **options)
    assert out != greedy(ours, idx, 44)  # some have left

def test_a_batch_that_leaves_early_is_one_by_one(plain):
    options = SHORT | dict(exit_mode='confidence', exit_threshold=0.3)
    for row, prompt in zip(plain.generate(text(3), **options), text(3)):
        assert torch.equal(row, plain.generate(prompt[None], **options)[0])

def test_self_speculation_gives_the_same_text_and_leaves_no_trace(plain):
    """Bugs: after Ctrl-C in a draft, or a depth that there is not, the model stayed shallow."""
    options, calls = dict(max_length=60, do_sample=False), []
    expected = plain.generate(text(1), **options)
    hook = plain.model.blocks[2].register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(plain.generate(text(1), assistant_early_exit=2, **options), expected)
    assert len(calls) < 40
    hook.remove()
    for draft in (0, 5, '2'):
        with pytest.raises(ValueError, match='assistant_early_exit counts blocks, 1 to 4, got'):
            plain.generate(text(1), assistant_early_exit=draft, **options)

    def interrupt(*_):
        if plain.config.num_hidden_layers == 2:
            raise KeyboardInterrupt
    hook = plain.model.blocks[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        plain.generate(text(1), assistant_early_exit=2, **options)
    hook.remove()
    assert torch.equal(plain.generate(text(1), **options), expected)

def test_a_text_stops_at_block_size_or_at_a_string(model, tokenizer):
    """Bug: pipeline asks for 256 new tokens, and got "257 tokens do not fit"."""
    write = transformers.pipeline('text-generation', model=model, tokenizer=tokenizer)
    assert write(PROMPT)[0]['generated_text'].startswith(PROMPT)
    options = dict(max_length=300, eos_token_id=None, do_sample=False)
    out = model.generate(text(1), **options)
    assert out.shape == (1, 128)
    assert model.generate(text(1), assistant_early_exit=2, **options).shape[1] <= 128
    embeds = model.get_input_embeddings()(text(1))
    assert model.generate(inputs_embeds=embeds, **options).shape == (1, 108)
    stop = dict(stop_strings=[tokenizer.decode(out[0, 30:32])], tokenizer=tokenizer)
    stopped = model.generate(text(1), **stop, **options)[0]
    assert len(stopped) <= 32 and torch.equal(stopped, out[0, :len(stopped)])

# ---- batches and caches

@pytest.mark.parametrize('cache', [None, 'static'])
def test_padded_on_the_left_a_batch_continues_as_one_by_one(plain, tokenizer, cache):
    prompts = ['x = 3', PROMPT, 'def main(argv):\n']
    batch = tokenizer(prompts, return_tensors='pt', padding=True)
    assert batch.input_ids[0, 0] == EOT and batch.input_ids[0, -1] == ord('3')
    for row, prompt in zip(plain.generate(**batch, cache_implementation=cache, **SHORT), prompts):
        alone = plain.generate(**tokenizer(prompt, return_tensors='pt'), **SHORT)
        assert torch.equal(row[-16:], alone[0, -16:])

def test_beam_search_reorders_the_cache(plain):
    """And finds a text that is at least as likely as the greedy one."""
    found = [plain.generate(text(1), num_beams=n, do_sample=False, **SHORT) for n in (1, 4)]
    losses = [plain(ids, labels=ids).loss for ids in found]
    assert losses[1] <= losses[0]

def test_padding_is_not_seen_and_chunks_are_causal(plain):
    """Several tokens continue a cache with padding in it: as in one pass, and none sees a later."""
    idx, real = text(3), torch.ones(3, 20, dtype=torch.int64)
    real[0, :4] = real[2, :9] = real[1, 15:] = 0

    def in_chunks(ids):
        past = plain(ids[:, :12], attention_mask=real[:, :12], use_cache=True)[CACHE]
        return plain(ids[:, 12:], attention_mask=real, past_key_values=past).logits
    logits = plain(idx, attention_mask=real).logits
    assert_close(in_chunks(idx), logits[:, 12:])
    other = torch.where(real == 1, idx, 7)
    assert torch.equal(plain(other, attention_mask=real).logits[real == 1], logits[real == 1])
    other[:, 16] = 8
    assert_close(in_chunks(other)[:, :3], logits[:, 12:15])

def test_a_cache_of_an_early_exit_is_not_continued_deeper(model):
    model.set_exit_layer(2)
    past = model(text()[:, :12], use_cache=True)[CACHE]
    model.set_exit_layer(L)
    with pytest.raises(ValueError, match='0 of 12 tokens in block 3'):
        model(text()[:, 12:], past_key_values=past)

# ---- what clients pass

def test_labels_hidden_states_and_tuples(model, pairs):
    ours, labels = pairs['latent'][1], text().clone()
    labels[0, 5:9] = -100
    out, kept = model(text(), labels=labels, output_hidden_states=True), labels[:, 1:] != -100
    assert_close(out.loss, F.cross_entropy(out.logits[:, :-1][kept], labels[:, 1:][kept]))
    states = [ours.embedding(text()), *ours.hidden_states(text())]
    assert len(out.hidden_states) == L + 1
    assert all(map(torch.equal, out.hidden_states[:-1], states))
    assert torch.equal(ours.head(out.hidden_states[-1]), out.logits)
    assert torch.equal(model(text(), return_dict=False)[0], out.logits)
    assert torch.equal(model(text(), logits_to_keep=2).logits, out.logits[:, -2:])
    which = torch.tensor([3, 9])
    assert torch.equal(model(text(), logits_to_keep=which).logits, out.logits[:, which])
    embeds = model.get_input_embeddings()(text())
    assert torch.equal(model(inputs_embeds=embeds).logits, out.logits)

@pytest.mark.parametrize('call, error, message', [
    (lambda m: m.set_exit_layer(0), ValueError, 'counts blocks, 1 to 4'),
    (lambda m: m(text(1, 129)), ValueError, 'do not fit into block_size=128'),
    (lambda m: m(text(1), attention_mask=torch.ones(1, 19)), ValueError, r'is \(batch, 20\) here'),
    (lambda m: m(text(1), output_attentions=True), ValueError, 'which keeps no weights'),
    (lambda m: m(text(1), labels=text(1), logits_to_keep=1), ValueError, 'needs logits_to_keep=0'),
    (lambda m: m(text(1), exit_mode='gate', use_cache=False), ValueError, 'needs use_cache=True'),
    (lambda m: m.generate(text(1), exit_mode='gate', assistant_early_exit=2), ValueError, 'leave'),
    (lambda m: m(text(1), position_ids=text(1)), TypeError, 'position_ids')])
def test_what_cannot_be_done_is_refused_and_not_swallowed(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)

def test_a_larger_vocabulary_is_saved_and_loaded(model, pairs, tmp_path):
    """Bug: the embedding grew and the head did not; what was saved did not load."""
    grown = load('out/run/hf-latent')
    grown.resize_token_embeddings(260)
    assert grown.get_output_embeddings().weight.shape == (260, 32)
    grown.save_pretrained(tmp_path / 'grown')
    again = load(tmp_path / 'grown')
    assert torch.equal(again(text() + 4).logits, grown(text() + 4).logits)
    assert torch.equal(again(text()).logits[..., :256], model(text()).logits)
    with pytest.raises(ValueError, match='int8 rows cannot be resized'):
        pairs['packed'][0].resize_token_embeddings(260)

def test_bfloat16(pair):
    """Bug: int8 rows come as float32, and LayerNorm in bfloat16 does not take them."""
    model = load(f'out/run/hf-{pair[0].config.weights}', dtype=torch.bfloat16)
    logits, exact = model(text()).logits.float(), pair[0](text()).logits
    assert model.dtype == torch.bfloat16 and (logits - exact).std() < 0.2 * exact.std()

def test_gradient_checkpointing(plain):
    """The same gradients, with less kept for them; padding included."""
    mask, grads = torch.ones(2, 20, dtype=torch.int64), []
    mask[1, :5] = 0
    for enable in (plain.gradient_checkpointing_disable, plain.gradient_checkpointing_enable):
        enable()
        plain.train().zero_grad()
        plain(text(), attention_mask=mask, labels=text()).loss.backward()
        grads.append(plain.model.blocks[0].attn.q.weight.grad.clone())
    with pytest.raises(ValueError, match='needs use_cache=False'):
        plain(text(), use_cache=True)
    plain.gradient_checkpointing_disable()
    plain.eval().zero_grad()
    assert grads[0].abs().sum() > 0
    assert_close(*grads)

# ---- the tokenizers

PIECES = ['<|endoftext|>', 'Ā', 'Ġ', '  ', '\n', '\r\n', '\t', '\0', "'s", "don't", '\u3000',
          ' 123', 'word', ' word', '\ufeff', '\u200d', 'e\u0301', '...', '\x85', '\xa0', '你好']

@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_tokenizers_agree_on_any_text(name, tokenizer, tmp_path):
    """Ids and text are those of prepare.py, also of ids that no text has."""
    ours, theirs, rng = get_tokenizer(name), tokenizer, random.Random(0)
    if name == 'gpt2':
        hf.hf_tokenizer(ours, 128).save_pretrained(tmp_path)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == theirs.pad_token_id == theirs.bos_token_id == ours.eot
    planes = [(0, 128), (0, 0x600), (0x900, 0x3100), (0xAC00, 0xD7A3), (0xE000, 0x1FAFF)]
    texts = [''.join(rng.choice([*PIECES, *(chr(rng.randint(*plane)) for plane in planes * 6)])
                     for _ in range(rng.randint(0, 30))) for _ in range(200)]
    ids = [ours.encode(text) for text in texts]
    assert theirs(texts).input_ids == ids
    for row in ids + [rng.choices(range(ours.vocab_size), k=20) for _ in range(200)]:
        assert theirs.decode(row) == ours.decode(row)

# ---- pack, and mistakes

def test_packed_pt_is_the_model_with_an_int8_head(pairs, plain):
    """And less than half of the file. A full-precision model is refused."""
    pack.main(['--out_dir=out/run'])
    packed, _ = open_model('out/run/packed.pt')
    assert torch.equal(packed(text())[0], pairs['packed'][1](text())[0])
    assert os.path.getsize('out/run/packed.pt') < os.path.getsize('out/run/ckpt.pt') / 2
    with pytest.raises(UserError, match='out/fp/ckpt.pt cannot be packed: '):
        pack.main(['--out_dir=out/fp'])

@pytest.mark.parametrize('flags, message', [
    (['--weights=packed'], 'cannot be packed .* leave out --weights'),
    (['--hf_dir=data'], 'data is there already'),
    (['--as=arcee'], "has no norm='layernorm', sub_norm=True; .* config/arcee.py"),
    (['--as=arcee', '--weights=packed'], 'leave out --weights'),
    (['--exit_layer=1'], '--exit_layer is for --as=arcee'),
    (['--out_dir=out/own'], "linear='my_layer:Own' is a variant")])
def test_mistakes_are_one_sentence_and_leave_nothing(plain, monkeypatch, flags, message):
    monkeypatch.setattr('quant.find_class', lambda *_: BitLinear)
    save_run('out/own', linear='my_layer:Own') if 'own' in flags[0] else None
    before = sorted(Path('.').rglob('*'))
    with pytest.raises(UserError, match=message):
        hf.main(['--out_dir=out/fp', '--hf_dir=out/new', *flags])
    assert sorted(Path('.').rglob('*')) == before

def test_on_a_full_disk_nothing_remains(pairs):
    """Bugs: a traceback of safetensors, and half a folder; a foreign folder *.tmp was deleted."""
    Path('out/full.tmp').mkdir()
    before, limits = sorted(Path('.').rglob('*')), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, limits[1]))
    try:
        with pytest.raises(OSError, match='File too large'):
            hf.main(['--out_dir=out/run', '--hf_dir=out/full'])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(Path('.').rglob('*')) == before

def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match='needs transformers: pip install'):
        hf.main([])

def test_imports_become_relative():
    files = hf.flat_sources('export.modeling_bitskip')
    assert 'quant.py' in files and 'train.py' not in files
    for source in files.values():
        found = re.findall(r'^\s*(?:import|from) (\w+)', source, re.M)
        assert not {f'{name}.py' for name in found} & files.keys()
