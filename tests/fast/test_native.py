"""Native decoding: the numbers of PyTorch, bit for bit the same whatever computes them, and a
reason where it cannot be had."""
import itertools
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.testing import assert_close

from decode import EXIT_MODES, exit_score, stream
from fast import native
from fast.packed import to_ternary
from fast.speculate import draft_in_steps

KINDS = {
    'bitlinear': dict(),
    'hadamard at o and down': dict(linear='hbitlinear', hadamard_layers='o,down'),
    'hadamard, paper B': dict(linear='hbitlinear', norm='rmsnorm', ffn='swiglu', sub_norm=False,
                              act_bits=4),
    'norms inside': dict(linear='hbitlinear', linear_norm='rmsnorm'),
    'exits without a norm': dict(exit_norm='none'),
    'no final norm': dict(linear='hbitlinear', exit_norm='raw', linear_norm='layernorm'),
    'odd widths': dict(n_head=3, n_kv_head=3, n_embd=66, ffn_dim=37, gate_dim=0),
    'narrow': dict(linear='hbitlinear', n_head=2, n_kv_head=1, n_embd=12, ffn_dim=7),
    'heads of 32, 4:1': dict(n_head=4, n_kv_head=1, n_embd=128, ffn_dim=300, vocab_size=128),
    'many words, a scale a row': dict(vocab_size=300, linear='tests.fast.test_packed:Rows'),
    'one layer': dict(n_layer=1),
}
kinds = pytest.mark.parametrize('kind', KINDS)
some = pytest.mark.parametrize('kind', ['bitlinear', 'hadamard, paper B', 'odd widths'])

@pytest.fixture
def make(make_model):
    """make(kind, **settings): a tiny packed model, and a function that makes decoders of it."""
    available, how = native.available()
    if not available:
        pytest.skip(how)

    def make(kind='bitlinear', **settings):
        model = to_ternary(make_model(**KINDS[kind] | dict(block_size=48) | settings))
        return model, lambda **how: native.Decoder(model, **dict(margin=math.inf) | how)
    return make

def isas():
    return range(native.library()[0].bitskip_isa() + 1)

def texts(model, n=8, length=7):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(model.config.vocab_size, (n, length), generator=generator)

def greedy(model, idx, n, decoder=None, **options):
    tokens, layers = zip(*stream(model, idx, n, temperature=0, decoder=decoder, **options))
    return torch.cat(tokens, dim=1).flatten().tolist(), torch.cat(layers).tolist()

@kinds
def test_logits_are_the_models(make, kind):
    """At every exit, after every token, in every instruction set; but for texts where a rounding
    error of 1e-7 has tipped a quantizer to its next code: few, and even these not far off."""
    model, decoder = make(kind)
    idx, decoders = texts(model), [decoder(isa=isa) for isa in isas()]
    for layer in range(model.config.n_layer):
        errors = []
        for text, theirs in zip(idx, model(idx, exit_layer=layer)[0]):
            for d in decoders:
                d.length = 0
            logits = [d.step(text, n_logits=len(text), exit_layer=layer)[0] for d in decoders]
            assert all(torch.equal(ours, logits[0]) for ours in logits)
            errors.append((logits[0] - theirs).abs().max())
        errors = torch.stack(errors)
        assert (errors <= 2e-5).float().mean() >= 0.7 and errors.max() < 0.5, errors

@kinds
@pytest.mark.parametrize('options', [
    {}, dict(exit_layer=0), dict(exit_mode='confidence', exit_threshold=0.25),
    dict(exit_mode='gate')], ids=str)
def test_greedy_text_and_exits_are_the_models(make, kind, options):
    """Also past block_size, where the cache starts anew; of four texts, three at least."""
    model, decoder = make(kind, block_size=20)
    if options.get('exit_mode') == 'gate' and not model.gates:
        with pytest.raises(ValueError, match='no gates'):
            decoder().step([1], exit_mode='gate')
        return
    ours, theirs = ([greedy(model, idx, 24, d, **options) for idx in texts(model, 4).split(1)]
                    for d in (decoder(), None))
    assert sum(a == b for a, b in zip(ours, theirs)) >= 3
    if kind == 'bitlinear' and 'exit_mode' in options:
        assert len({layer for _, layers in ours for layer in layers}) > 1  # not all at one layer

@pytest.mark.parametrize('kind', ['exits without a norm', 'many words, a scale a row'])
@pytest.mark.parametrize('mode', EXIT_MODES)
def test_scores_are_the_models(make, kind, mode):
    """A token leaves at a threshold a bit below its score in PyTorch, and stays a bit above."""
    model, decoder = make(kind)
    decoder = decoder()
    for token in range(7, model.config.vocab_size, 40):
        h = next(model.hidden_states(torch.tensor([[token]]))).detach()
        score = exit_score(model, h, 0, mode).item()
        for threshold, leaves in ((score * 0.99, True), (score * 1.01, False)):
            decoder.length = 0
            layer = decoder.step([token], exit_mode=mode, exit_threshold=threshold)[1]
            assert (layer == 0) == (leaves == (score > 0)), (token, score)

def test_sums_at_the_ends_of_their_range(make):
    """127 * 127 in every column, where an instruction that sums in 16 bits would saturate."""
    model, decoder = make('exits without a norm')
    model.head.codes.copy_(torch.arange(31)[:, None] % 2 * 254 - 127)
    for isa, sign, margin in itertools.product(isas(), (1.0, -1.0), (math.inf, -math.inf)):
        logits = decoder(isa=isa, margin=margin).logits(torch.full((1, 1, 32), sign), 0)[0, 0]
        expected = model.head.codes.float().sum(1) * sign * model.head.scale[:, 0]
        assert_close(logits, expected, rtol=1e-5 if margin > 0 else 0.1, atol=0)

@some
def test_unlikely_words_have_logits_of_four_bits(make, kind):
    """The likely ones are exact. All is the same in each instruction set, on 1 thread and on 3."""
    model, decoder = make(kind)
    text = texts(model, 1, 40)[0]
    exact, rough = (decoder(margin=m).step(text, n_logits=40)[0] for m in (math.inf, -math.inf))
    assert 0.001 < (rough - exact).norm() / exact.norm() < 0.2
    expected = torch.where(rough >= rough.max(dim=1, keepdim=True).values - 1.5, exact, rough)
    assert not torch.equal(expected, exact) and torch.equal(expected.argmax(1), exact.argmax(1))
    for isa, threads in itertools.product(isas(), (1, 3)):
        d = decoder(isa=isa, threads=threads, margin=1.5)
        assert torch.equal(d.step(text, n_logits=40)[0], expected)

@some
@pytest.mark.parametrize('confidence', [0.0, 0.3])
def test_a_pass_of_drafts_in_one_call(make, kind, confidence):
    """It gives what its steps give one by one: tokens, logits and what is left in the cache. (A C
    function named `step` was libc's own when another one called it.)"""
    model, decoder = make(kind)
    ours, theirs, how = decoder(), decoder(), dict(temperature=0, top_k=None)
    for new in (texts(model, 1, 9), torch.tensor([[5]])):
        a = ours.draft(new, 1, 6, confidence=confidence)
        b = draft_in_steps(theirs, new, 1, 2, 6, how, confidence, None)
        assert all(map(torch.equal, a, b)) and ours.length == theirs.length
        assert ours.filled == theirs.filled and (confidence or len(a[0]) == 6)
        assert torch.equal(ours.step([1])[0], theirs.step([1])[0])

SANITIZED = """
import sys, torch
from fast import native
from model import BitSkip, BitSkipConfig
native.FLAGS += ['-O1', '-fsanitize=undefined,bounds-strict', '-fno-sanitize-recover=all']
if not native.available()[0]:
    sys.exit(print('not here:', native.available()[1]))
model = BitSkip(BitSkipConfig(vocab_size=31, block_size=48, n_layer=2, n_head=3, n_kv_head=3,
                              n_embd=66, ffn_dim=100))
for isa in range(native.library()[0].bitskip_isa() + 1):
    decoder = native.Decoder(model, isa=isa)
    for tokens, mode in (range(20), None), ([5], 'gate'), ([6], 'confidence'):
        assert decoder.step(list(tokens), exit_mode=mode)[0].isfinite().all()
    assert decoder.draft([1, 2], 0, 5, temperature=0.9)[2].isfinite().all()
print('defined')
"""

def test_behaviour_is_defined(tmp_path):
    """An index past the declared end of an array worked with GCC 12. GCC 14 then left out the zeros
    behind an input whose width is no multiple of 16: wrong logits, with AVX-512 alone."""
    places = {'PYTHONPATH': str(native.SOURCE.parents[1]), 'XDG_CACHE_HOME': str(tmp_path)}
    done = subprocess.run([sys.executable, '-c', SANITIZED], capture_output=True, text=True,
                          env=os.environ | places)
    if done.stdout.startswith('not here'):
        pytest.skip(done.stdout)
    assert done.stdout == 'defined\n', done.stdout + done.stderr

@kinds
def test_threads_chunks_and_later_tokens_change_nothing(make, kind):
    """One position, one result, to the last bit. Causality: a changed token leaves every logit
    before it as it was."""
    model, decoder = make(kind)
    text, whole = texts(model, 1, 40)[0], decoder(threads=1)
    expected, _ = whole.step(text, n_logits=40)
    for threads, chunks in ((2, [40]), (3, [17, 1, 22]), (1, [1] * 40), (2, [3, 5, 4, 8, 2, 18])):
        parts = decoder(threads=threads)
        steps = [parts.step(chunk, n_logits=len(chunk))[0] for chunk in text.split(chunks)]
        assert torch.equal(torch.cat(steps), expected) and parts.length == 40
        assert torch.equal(parts.states[0, -1], whole.states[0, -1])
    for t in (1, 15, 16, 39):
        changed = text.clone()
        changed[t] = (changed[t] + 1) % 31
        whole.length = 0
        logits, _ = whole.step(changed, n_logits=40)
        assert torch.equal(logits[:t], expected[:t]) and not torch.equal(logits[t], expected[t])

def test_decoders_at_the_same_time(make):
    """The threads are the process's, not a decoder's: steps wait for each other, unmixed."""
    model, decoder = make()
    text, results = texts(model, 1, 40)[0], []
    expected, _ = decoder().step(text, n_logits=40)

    def work():
        mine = decoder(threads=3)
        for _ in range(20):
            mine.length = 0
            results.append(mine.step(text, n_logits=40)[0])
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(work)
    assert len(results) == 60 and all(torch.equal(result, expected) for result in results)

def test_what_is_impossible(make, make_model):
    """A pass that was cut leaves holes above it; running over them would be silently wrong."""
    decoder = make()[1]()
    for tokens, options, message in [
            ([], {}, 'one or more'), ([31], {}, '0 to 30'), ([-1], {}, '0 to 30'),
            (torch.zeros(2, 3).long(), {}, 'one text at a time'), ([1] * 49, {}, 'block_size=48'),
            ([1], dict(n_logits=2), 'n_logits'), ([1], dict(exit_layer=3), 'layers are 0 to 2')]:
        with pytest.raises(ValueError, match=message):
            decoder.step(tokens, **options)
    assert decoder.length == 0 and decoder.step([1, 2, 3], exit_layer=1)[0].isfinite().all()
    with pytest.raises(ValueError, match='the cache of layers 0 to 2 holds'):
        decoder.step([4])
    decoder.step([4], exit_layer=1)
    decoder.length = 0
    decoder.step([1, 2, 3])
    decoder.length = 1  # what is forgotten is forgotten in every layer
    decoder.step([4], exit_layer=0)
    with pytest.raises(ValueError, match=r'holds \[2, 1, 1\] tokens, not the 2'):
        decoder.step([5])
    for options in (dict(isa=3), dict(isa=-1), dict(threads=-1)):
        with pytest.raises(ValueError, match='got'):
            make()[1](**options)
    with pytest.raises(ValueError, match='int8'):
        native.Decoder(to_ternary(make_model(), head='fp32'))

@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not built anything, with an empty cache: its folder."""
    monkeypatch.setattr(native, 'FLAGS', [*native.FLAGS, '-O0'])  # quicker
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    native.library.cache_clear()
    yield tmp_path / 'bitskip'
    native.library.cache_clear()

def test_no_compiler_or_a_broken_one(fresh, monkeypatch, make_model):
    junk = "sh -c 'while [ $1 != -o ]; do shift; done; echo no library >$2' --"
    for compiler, message in [
            ('false', 'the C compiler false fails on native.c: it gives no reason'),
            ('sh -c "echo out of ideas >&2; exit 1" --', 'fails on native.c: out of ideas'),
            ('/nowhere/cc', 'fails on native.c: .*No such file'), (junk, 'but does not load'),
            ('', 'there is no C compiler')]:
        monkeypatch.setenv('CC', compiler)
        if not compiler:
            monkeypatch.setenv('PATH', '')
        native.library.cache_clear()
        available, reason = native.available()
        assert not available and re.search(message, reason), reason
        with pytest.raises(native.BuildError, match=message):
            native.Decoder(make_model())

def test_built_once_and_never_loaded_damaged(make, fresh, monkeypatch):
    """A library that was cut short in the cache was a bus error, at each start."""
    make()
    how, file = native.available(), *fresh.iterdir()
    assert oct(fresh.stat().st_mode)[-3:] == '700'
    native.library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(native, 'compile_library', lambda *_: pytest.fail('compiled again'))
        assert native.available() == how
    data = file.read_bytes()
    file.unlink()  # the one that is loaded keeps its contents
    file.write_bytes(data[:9000])
    native.library.cache_clear()
    assert native.available() == how

@pytest.mark.parametrize('trouble', ['a file in the way', 'others may write'])
def test_a_cache_that_is_not_ours_alone(make, fresh, monkeypatch, trouble):
    """Then there is a folder for this process, which goes with it."""
    make()
    if trouble == 'a file in the way':
        fresh.write_text('no folder')
    else:
        fresh.mkdir()
        fresh.chmod(0o777)
    native.library.cache_clear()
    assert native.available()[0] and list(native.cache_folder().glob('native-*.so'))
    assert native.cache_folder() == native.cache_folder() != fresh
