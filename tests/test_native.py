"""Native decoding: the same numbers as in PyTorch, whatever computes them, and a reason wherever it cannot be had."""
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from torch.testing import assert_close

import native
from decode import EXIT_MODES, exit_score, stream
from packed import int8_rows, to_ternary

KINDS = {
    'bitlinear': dict(),
    'hadamard': dict(linear='hbitlinear'),
    'hadamard at o and down': dict(linear='hbitlinear', hadamard_layers='o,down'),
    '4 bits': dict(linear='hbitlinear', act_bits=4),
    'paper B': dict(norm='rmsnorm', ffn='swiglu', sub_norm=False),
    'hadamard, paper B': dict(linear='hbitlinear', norm='rmsnorm', ffn='swiglu', sub_norm=False, act_bits=4),
    'layernorm inside': dict(linear_norm='layernorm'),
    'rmsnorm inside': dict(linear='hbitlinear', linear_norm='rmsnorm'),
    'raw exits': dict(exit_norm='none'),
    'no final norm': dict(linear='hbitlinear', final_norm=False),
    'no gates': dict(gate_dim=0),
    'adapters': dict(linear='hbitlinear', ee_adapter=5),
    'adapters, raw exits': dict(ee_adapter=130, exit_norm='none'),
    'odd widths': dict(n_head=3, n_kv_head=3, n_embd=66, ffn_dim=37),
    'narrow': dict(linear='hbitlinear', n_head=2, n_kv_head=1, n_embd=12, ffn_dim=7),
    'heads of 64, 1:1': dict(n_head=2, n_kv_head=2, n_embd=128, ffn_dim=300),
    'heads of 32, 4:1': dict(n_head=4, n_kv_head=1, n_embd=128, ffn_dim=512),
    'one layer': dict(n_layer=1),
    'many words': dict(vocab_size=300),
}
MIXED = ['bitlinear', 'hadamard, paper B', 'odd widths', 'adapters']
kinds = pytest.mark.parametrize('kind', KINDS)
mixed = pytest.mark.parametrize('kind', MIXED)


@pytest.fixture
def make(make_model):
    """make(kind, **settings): a tiny model, and a function that makes decoders of it. Skips, with the reason, where
    native decoding is not available."""
    available, how = native.available()
    if not available:
        pytest.skip(how)

    def make(kind='bitlinear', **settings):
        model = make_model(**KINDS[kind] | dict(block_size=48) | settings)
        return model, lambda **options: native.Decoder(model, **dict(head='fp32') | options)
    return make


def texts(model, n=8, length=7):
    return torch.randint(model.config.vocab_size, (n, length), generator=torch.Generator().manual_seed(1))


def assert_same(ours, theirs, tolerance=2e-5):
    """Each text's logits (T, V) equal, but for texts where a rounding error of 1e-7 has tipped a quantizer over the
    edge between two codes: few, and even these not far off."""
    errors = torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs)])
    assert (errors <= tolerance).float().mean() >= 0.7 and errors.max() < 0.5, errors


def greedy(model, idx, n, decoder=None, **options):
    tokens, layers = zip(*stream(model, idx, n, temperature=0, decoder=decoder, **options))
    return torch.cat(tokens, dim=1).flatten().tolist(), torch.cat(layers).tolist()


# --------------------------------------------------------------------------------------------------------------------
# the model's own numbers

@kinds
def test_logits_are_the_models(make, kind):
    """At every exit, after every token."""
    model, decoder = make(kind)
    idx, decoder = texts(model), decoder()
    for layer in range(model.config.n_layer):
        ours = []
        for text in idx:
            decoder.reset()
            ours.append(decoder.step(text, n_logits=len(text), exit_layer=layer)[0])
        assert_same(ours, model(idx, exit_layer=layer)[0].detach())


@kinds
@pytest.mark.parametrize('head', ['int8', 'fp32'])
def test_packed_models_too(make, kind, head):
    """Decoder(model, head) is Decoder(to_ternary(model, head)), and computes what that computes."""
    model, decoder = make(kind)
    packed, idx = to_ternary(model, head), texts(model)
    a, b = decoder(head=head), native.Decoder(packed, head=head)
    ours = []
    for text in idx:
        a.reset()
        b.reset()
        ours.append(a.step(text, n_logits=len(text))[0])
        assert torch.equal(ours[-1], b.step(text, n_logits=len(text))[0])
    assert_same(ours, packed(idx)[0].detach())


@kinds
@pytest.mark.parametrize('options', [{}, dict(exit_layer=0), dict(exit_mode='confidence', exit_threshold=0.25),
                                     dict(exit_mode='saturation', exit_threshold=0.72),
                                     dict(exit_mode='gate', exit_threshold=0.5)], ids=str)
def test_greedy_text_and_exits_are_the_models(make, kind, options):
    """Also past block_size, where the cache starts anew."""
    model, decoder = make(kind, block_size=20)
    if options.get('exit_mode') == 'gate' and not model.gates:
        pytest.skip('no gates')
    idx = texts(model)[:1]
    assert greedy(model, idx, 30, decoder(), **options) == greedy(model, idx, 30, **options)


@pytest.mark.parametrize('mode, threshold', [('gate', 0.5), ('confidence', 0.25), ('saturation', 0.72)])
def test_tokens_do_leave_at_different_layers(make, mode, threshold):
    """The test above would prove little if they did not."""
    model, decoder = make()
    layers = greedy(model, texts(model)[:1], 30, decoder(), exit_mode=mode, exit_threshold=threshold)[1]
    assert len(set(layers)) > 1
    for threshold, layer in ((0.0, 0), (1.0, 2)):
        layers = greedy(model, texts(model)[:1], 5, decoder(), exit_mode=mode, exit_threshold=threshold)[1]
        assert layers == [2] + [layer] * 4  # the prompt runs in full


@pytest.mark.parametrize('kind', ['bitlinear', 'many words', 'adapters, raw exits'])
@pytest.mark.parametrize('mode', EXIT_MODES)
def test_scores_are_the_models(make, kind, mode):
    """A token leaves at a threshold a bit below what PyTorch says it scores, and stays at one a bit above."""
    model, decoder = make(kind)
    decoder = decoder()
    for token in range(7, model.config.vocab_size, 40):
        h = next(model.hidden_states(torch.tensor([[token]]))).detach()
        score = exit_score(model, h, model.embedding.weight[token], 0, mode).item()
        for threshold, leaves in ((score - 0.01 * abs(score), True), (score + 0.01 * abs(score), False)):
            decoder.reset()
            layer = decoder.step([token], exit_mode=mode, exit_threshold=threshold)[1]
            assert (layer == 0) == leaves, (token, score)


def test_saturation_is_at_most_one(make):
    """Blocks that do next to nothing: rounding may take a cosine above 1, which is no reason to leave."""
    model, decoder = make('many words')
    with torch.no_grad():
        for block in model.blocks:
            block.attn.sub_norm.weight.mul_(1e-5)
            block.ffn.sub_norm.weight.mul_(1e-5)
    decoder = decoder()
    for token in range(300):
        decoder.reset()
        assert decoder.step([token], exit_mode='saturation', exit_threshold=1.0)[1] == 2
        assert decoder.step([token], exit_mode='saturation', exit_threshold=0.999)[1] == 0


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_weights_of_any_kind_of_float(make_model, make, dtype):
    """C reads float32: it is given that, whatever the model holds."""
    _, decoder = make()
    model = make_model(linear='bitlinear').to(dtype)
    logits = native.Decoder(model, head='fp32').step([3, 1, 4])[0]
    assert_close(logits[0], model.float()(torch.tensor([[3, 1, 4]]))[0][0, -1].detach(), rtol=0, atol=1e-4)


def test_the_head_is_exact_at_the_ends_of_its_range(make):
    """255 * 127 in every column: sums that overflow 16 bits, where an instruction set saturates."""
    model, decoder = make('raw exits')
    with torch.no_grad():
        model.head.weight.copy_(torch.arange(31)[:, None] % 2 * 2.0 - 1)
    for isa in range(native.library()[0].best_isa() + 1):
        for sign in (1.0, -1.0):
            logits = decoder(head='int8', isa=isa).logits(torch.full((1, 32), sign), layer=0)[0]
            assert_close(logits, model.head.weight.detach().sum(1) * sign)


SANITIZED = """
import os, sys, torch, native
from model import BitSkip, BitSkipConfig
native.FLAGS += ['-O1', '-fsanitize=undefined,bounds-strict', '-fno-sanitize-recover=all']
if not native.available()[0]:
    sys.exit(print('not here:', native.available()[1]))
model = BitSkip(BitSkipConfig(vocab_size=31, block_size=48, n_layer=2, n_head=3, n_kv_head=3, n_embd=66, ffn_dim=100))
for isa in range(native.library()[0].best_isa() + 1):
    decoder = native.Decoder(model, isa=isa)
    for tokens, mode in (range(20), None), ([5], 'gate'), ([6], 'confidence'):
        assert decoder.step(list(tokens), exit_mode=mode)[0].isfinite().all()
print('defined')
"""


def test_behaviour_is_defined(tmp_path):
    """An index past the declared end of an array worked with GCC 12. GCC 14 then left out the zeros behind an input
    whose width is no multiple of 16: wrong logits, with AVX-512 alone."""
    done = subprocess.run([sys.executable, '-c', SANITIZED], capture_output=True, text=True, timeout=300,
                          env=os.environ | {'PYTHONPATH': str(native.SOURCE.parent), 'XDG_CACHE_HOME': str(tmp_path)})
    if done.stdout.startswith('not here'):
        pytest.skip(done.stdout)
    assert done.stdout == 'defined\n', done.stdout + done.stderr


# --------------------------------------------------------------------------------------------------------------------
# one position, one result, to the last bit

@kinds
@pytest.mark.parametrize('head', ['int8', 'fp32'])
def test_instruction_sets_and_threads_agree(make, kind, head):
    model, decoder = make(kind)
    text = texts(model, 1, 40)[0]
    expected, _ = decoder(head=head, threads=1).step(text, n_logits=40)
    for isa in range(native.library()[0].best_isa() + 1):
        for threads in (1, 2, 3):
            assert torch.equal(decoder(head=head, threads=threads, isa=isa).step(text, n_logits=40)[0], expected)


@mixed
@pytest.mark.parametrize('chunks', [[1] * 40, [17, 1, 22], [3, 5, 4, 8, 2, 18], [39, 1]], ids=str)
def test_tokens_together_or_one_by_one(make, kind, chunks):
    model, decoder = make(kind)
    text, whole, parts = texts(model, 1, 40)[0], decoder(), decoder()
    expected, _ = whole.step(text, n_logits=40)
    logits = torch.cat([parts.step(chunk, n_logits=len(chunk))[0] for chunk in text.split(chunks)])
    assert torch.equal(logits, expected) and parts.length == whole.length == 40
    assert torch.equal(parts.states[-1], whole.states[-1])


@kinds
@pytest.mark.parametrize('head', ['int8', 'fp32'])
def test_later_tokens_change_nothing(make, kind, head):
    """Causality: a changed token leaves every logit before it as it was."""
    model, decoder = make(kind)
    text, decoder = texts(model, 1, 40)[0], decoder(head=head)
    expected, _ = decoder.step(text, n_logits=40)
    for t in (1, 15, 16, 39):
        changed = text.clone()
        changed[t] = (changed[t] + 1) % 31
        decoder.reset()
        logits, _ = decoder.step(changed, n_logits=40)
        assert torch.equal(logits[:t], expected[:t]) and not torch.equal(logits[t], expected[t])


def test_decoders_at_the_same_time(make):
    """The threads are the process's, not a decoder's: steps wait for each other and do not mix."""
    model, decoder = make()
    text, results = texts(model, 1, 40)[0], []
    expected, _ = decoder().step(text, n_logits=40)

    def work():
        mine = decoder(threads=3)
        for _ in range(20):
            mine.reset()
            results.append(mine.step(text, n_logits=40)[0])
    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 60 and all(torch.equal(result, expected) for result in results)


# --------------------------------------------------------------------------------------------------------------------
# parts of a step, and going back

@mixed
def test_blocks_in_ranges(make, kind):
    model, decoder = make(kind)
    text, whole, parts = texts(model, 1, 20)[0], decoder(), decoder()
    expected, _ = whole.step(text, n_logits=20)
    h = parts.embed(text)
    for layer in range(3):
        h = parts.blocks(h, layer, layer)
    assert torch.equal(h, whole.states) and torch.equal(parts.logits(h), expected) and parts.length == 0
    parts.length = 20  # the cache is complete, too
    assert torch.equal(parts.step([1])[0], whole.step([1])[0])


@mixed
@pytest.mark.parametrize('accepted', [0, 2, 4])
def test_draft_with_the_first_blocks_and_verify_with_the_rest(make, kind, accepted):
    """What self-speculative decoding does: the drafts' states go through the blocks that they have not seen, in one
    pass, and the tokens that fail are taken back."""
    model, decoder = make(kind)
    prompt, drafts, whole, ours = texts(model, 1, 9)[0], [3, 1, 4, 1], decoder(), decoder()
    whole.step(prompt)
    ours.step(prompt)
    states = []
    for token in drafts:
        logits, layer = ours.step([token], exit_layer=0)
        states.append(ours.states)
        assert layer == 0 and torch.equal(logits, ours.logits(ours.states, 0))
    h = ours.blocks(torch.cat(states), 1, 2, start=9)
    expected, _ = whole.step(drafts, n_logits=4)
    assert torch.equal(ours.logits(h), expected) and ours.length == 13
    whole.length = ours.length = 9 + accepted
    assert torch.equal(ours.step([5])[0], whole.step([5])[0])


def test_going_back_leaves_no_trace(make):
    model, decoder = make()
    text, fresh, ours = texts(model, 1, 30)[0], decoder(), decoder()
    ours.step(text)
    ours.length = 10
    ours.step([7, 7, 7])
    ours.length = 10
    fresh.step(text[:10])
    assert torch.equal(ours.step(text[10:20], n_logits=10)[0], fresh.step(text[10:20], n_logits=10)[0])


def test_a_layer_without_the_tokens_before_is_refused(make):
    """A pass that was cut leaves holes above it; running over them would be silently wrong."""
    model, decoder = make()
    decoder = decoder()
    decoder.step([1, 2, 3], exit_layer=1)
    with pytest.raises(ValueError, match='the cache of layers 0 to 2 holds'):
        decoder.step([4])
    decoder.step([4], exit_layer=1)
    decoder.length = 0
    decoder.step([4])
    decoder.length = 5  # nothing has been computed there
    with pytest.raises(ValueError, match='the cache'):
        decoder.step([4])


# --------------------------------------------------------------------------------------------------------------------
# what is refused

@pytest.mark.parametrize('arguments, options, message', [
    (([],), {}, 'one or more'), (([31],), {}, '0 to 30'), (([-1],), {}, '0 to 30'),
    ((torch.zeros(2, 3, dtype=torch.int64),), {}, 'one text at a time'), (([1] * 49,), {}, 'block_size=48'),
    (([1],), dict(n_logits=2), 'n_logits'), (([1],), dict(exit_layer=3), 'layers are 0 to 2'),
    (([1],), dict(exit_layer=-2), 'layers are 0 to 2'), (([1],), dict(exit_mode='often'), 'exit_mode')])
def test_impossible_steps(make, arguments, options, message):
    _, decoder = make()
    decoder = decoder()
    with pytest.raises(ValueError, match=message):
        decoder.step(*arguments, **options)
    assert decoder.length == 0 and decoder.step([1])[0].isfinite().all()


def test_impossible_models(make, make_model):
    model, decoder = make('no gates')
    with pytest.raises(ValueError, match='no gates'):
        decoder().step([1], exit_mode='gate')
    for options in (dict(head='int4'), dict(isa=3), dict(isa=-1), dict(threads=-1)):
        with pytest.raises(ValueError, match='got'):
            decoder(**options)
    with pytest.raises(ValueError, match='rounded already'):
        native.Decoder(to_ternary(model, 'int8'), head='fp32')
    for linear in ('fp', 'hadamard_after'):
        with pytest.raises(ValueError, match=f"linear='{linear}' cannot be packed"):
            native.Decoder(make_model(linear=linear))
    with pytest.raises(ValueError, match='sees the future'):
        native.Decoder(make_model(linear='bitlinear', causal=False))
    model.blocks[0].attn.q.latent = True
    with pytest.raises(ValueError, match='latent'):
        decoder()
    with pytest.raises(ValueError, match='length'):
        native.Decoder(make_model()).length = 17


# --------------------------------------------------------------------------------------------------------------------
# layouts, by their definition

@pytest.mark.parametrize('rows, cols', [(16, 16), (1, 1), (17, 40), (48, 33)])
def test_layouts_are_as_drawn(rows, cols):
    codes = torch.randint(-1, 2, (rows, cols), dtype=torch.int8)
    bytes_ = torch.randint(-127, 128, (rows, cols), dtype=torch.int8)
    ternary, int8 = native.ternary_blocks(codes), native.int8_blocks(bytes_)
    assert ternary.shape == (-(-rows // 16), -(-cols // 16), 64) and int8.shape == (*ternary.shape[:2], 4, 64)
    for row in range(rows):
        for col in range(cols):
            (R, r), (b, c) = divmod(row, 16), divmod(col, 16)
            s, j = divmod(c, 4)
            assert (ternary[R, b, 4 * r + j].item() >> 2 * s & 3) - 1 == codes[row, col]
            assert int8[R, b, s, 4 * r + j].item() - 128 == bytes_[row, col]


def test_int8_heads_are_those_of_packed_models(make):
    model, decoder = make()
    codes, scales = int8_rows(model.head.weight)
    blocks = native.int8_blocks(codes)
    kept = decoder(head='int8').tensors
    assert any(tensor.shape == blocks.shape and torch.equal(tensor, blocks) for tensor in kept)


# --------------------------------------------------------------------------------------------------------------------
# building

@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not built anything, with an empty cache: its folder."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / 'bitskip'
    native.library.cache_clear()


def test_no_compiler(fresh, monkeypatch, make_model):
    monkeypatch.setenv('PATH', '')
    monkeypatch.delenv('CC', raising=False)
    assert native.available() == (False, 'there is no C compiler here (cc, gcc or clang, or what CC names)')
    with pytest.raises(RuntimeError, match='no C compiler'):
        native.Decoder(make_model())


@pytest.mark.parametrize('compiler, message', [
    ('false', 'the C compiler false fails on native.c: it gives no reason'),
    ('sh -c "echo out of ideas >&2; exit 1" --', 'the C compiler sh fails on native.c: out of ideas'),
    ('/nowhere/cc', 'the C compiler /nowhere/cc fails on native.c: .*No such file'),
    ('sh -c "echo no library >$9" --', 'native.c compiles, but does not load')])  # $9 comes after -o
def test_broken_compilers(fresh, monkeypatch, compiler, message):
    monkeypatch.setenv('CC', compiler)
    available, reason = native.available()
    assert not available and re.search(message, reason), reason
    assert not list(fresh.glob('*.tmp'))


def test_built_once(fresh, monkeypatch):
    available, how = native.available()
    if not available:
        pytest.skip(how)
    files = list(fresh.iterdir())
    assert len(files) == 1 and files[0].suffix == '.so' and oct(fresh.stat().st_mode)[-3:] == '700'
    native.library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(native, 'compile_library', lambda *_: pytest.fail('compiled again'))
        assert native.available() == (True, how)


def test_a_damaged_library_is_built_anew(fresh):
    available, how = native.available()
    if not available:
        pytest.skip(how)
    file, = fresh.iterdir()
    file.unlink()  # the one that is loaded keeps its contents
    file.write_bytes(b'half a library')
    native.library.cache_clear()
    assert native.available() == (True, how)


@pytest.mark.skipif(os.name != 'posix', reason='POSIX threads')
def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    """Then there is a folder for this process, which goes with it."""
    fresh.parent.joinpath('file').write_text('in the way')
    monkeypatch.setenv('XDG_CACHE_HOME', str(fresh.parent / 'file'))
    available, how = native.available()
    if not available:
        pytest.skip(how)
    assert list(native.cache_folder().glob('native-*.so'))
    assert native.cache_folder() == native.cache_folder() != fresh
