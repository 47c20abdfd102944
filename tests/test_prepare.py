"""Data sets: what text they hold, how it is split, and that a prepared folder is whole."""
import contextlib
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import prepare
from configurator import UserError
from prepare import data_of, get_tokenizer, load_meta, load_tokens

@contextlib.contextmanager
def user_error(match):
    """A UserError of one line in which `match` occurs."""
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert '\n' not in str(caught.value)

def prepared(data):
    return sorted(name for name in os.listdir(data) if not name.endswith('.lock'))

def text_of(folder, split):
    """A prepared split as text, once meta.json has been checked against it."""
    meta, tokens = load_meta(folder), load_tokens(folder, split)
    tok, count = get_tokenizer(meta['tokenizer']), meta['splits'][split]
    assert tokens.dtype == np.dtype('<u2') and len(tokens) == count['tokens']
    assert int((tokens == tok.eot).sum()) == count['documents']
    text = tok.decode(tokens[tokens != tok.eot])
    assert len(text.encode()) == count['bytes']
    return text

def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)

def parquet(folder, splits, shards=1):
    """Files as the hub serves them."""
    folder.mkdir(parents=True)
    for split, texts in splits.items():
        for i in range(shards):
            part = texts[len(texts) * i // shards:len(texts) * (i + 1) // shards]
            name = f'{split}-{i:05}-of-{shards:05}.parquet'
            pyarrow.parquet.write_table(pyarrow.table({'text': part}), folder / name)
    return str(folder)

@pytest.fixture(autouse=True)
def keep_out_of_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', str(tmp_path / 'cache'))

@pytest.fixture
def data(tmp_path):
    return str(tmp_path / 'data')

@pytest.fixture
def poem(tmp_path):
    """The path of a text file of 100 lines."""
    text = ''.join(f'line {i:02} é\n' for i in range(100))
    return os.path.join(write(tmp_path, {'poem.txt': text}), 'poem.txt')

# ---- pydocs ----

MODULE = '''
"""Module  docstring
   with two lines."""
raise RuntimeError('imported')
class Outer:
    """Outer docstring."""
    class Inner:
        def method(self):
            """Method docstring."""
try:
    async def late():
        """Late docstring."""
except Exception:
    if True:
        def late():
            """Fallback docstring."""
def again():
    """Outer docstring."""
'''

def pydocs_of(folder, files):
    return list(prepare.read_pydocs([('pkg.', write(folder, files))]))

def test_pydocs_documents(tmp_path):
    """Name and docstrings in source order; what occurs again is left out, and so are tests and what
    does not parse; nothing is imported."""
    doc = '"""The docstring of {}."""'
    skipped = 'test/a.py', 'sub/tests/b.py', 'site-packages/e.py', '.venv/f.py', 'a.txt'
    documents = pydocs_of(tmp_path, {
        'sub/__init__.py': MODULE, 'testable.py': doc.format('testable'), 'empty.py': '',
        'latin.py': b'# coding: latin-1\n"""caf\xe9"""', 'escape.py': '"""\\d"""', 'zero.py': b'\0',
        'broken.py': 'def', **{path: doc.format(path) for path in skipped}})
    assert [text for _, text, ends in documents if ends] == [
        'pkg.escape\n\n\\d\n', 'pkg.latin\n\ncafé\n',
        'pkg.sub\n\nModule  docstring\nwith two lines.\n\nOuter\nOuter docstring.\n\n'
        'Outer.Inner.method\nMethod docstring.\n\nlate\nLate docstring.\n\nlate\n'
        'Fallback docstring.\n', 'pkg.testable\n\nThe docstring of testable.\n']

def test_pydocs_splits_do_not_leak(tmp_path):
    """Modules of all splits have docstrings in common: each docstring is in one split, once. The
    topics of the language reference quote one another: all are in one split."""
    topics = {f'topic{i}': f'Statement {i}.\n' for i in range(50)}
    files = {f'm{i:03}.py': f'"""Shared {i % 5}."""\ndef f():\n    """Own {i}."""'
             for i in range(300)}
    documents = pydocs_of(tmp_path, files)
    docs = [line for _, text, _ in documents for line in text.split('\n') if line.endswith('.')]
    assert len(docs) == len(set(docs)) == 305
    splits = [split for split, _, _ in documents]
    assert all(3 <= splits.count(split) <= 30 for split in ('val', 'test'))
    write(tmp_path / 'lib', {'pydoc_data/topics.py': f'# generated\ntopics = {topics!r}\n'})
    documents = list(prepare.read_pydocs([('', str(tmp_path / 'lib'))]))
    assert documents == [('train', f'{name}\n\n{text}', True) for name, text in topics.items()]

# ---- sets of the hub, and their local copies ----

WIKI = {'train': ['', ' = Title = \n', '', ' Some <unk> text , in two @-@ part words . \n'],
        'validation': [' = Other = \n', ' Text with <|endoftext|> in it . \n'],
        'test': [' = Third = \n', ' End . \n']}
STORIES = {'train': ['Once upon a time.\n\nThe end.', ' ', 'A café.', 'Three.'],
           'validation': ['Lily smiled.', 'Bye.']}

def test_wikitext2_from_a_local_copy(tmp_path, data):
    """It needs the copy no more when it has been prepared: train.py knows of no --source."""
    source = tmp_path / 'copy'
    parquet(source / 'wikitext-2-raw-v1', WIKI, shards=2)
    folder = prepare.prepare('wikitext2', source=str(source), data_dir=data)
    assert folder == os.path.join(data, 'wikitext2-gpt2') and prepared(data) == ['wikitext2-gpt2']
    for split, ours in (('train', 'train'), ('validation', 'val'), ('test', 'test')):
        text = ''.join(WIKI[split])
        assert text_of(folder, ours) == text  # one running text, tokenized as in one piece
        assert load_tokens(folder, ours).tolist() == get_tokenizer('gpt2').encode(text)
    source.rename(tmp_path / 'gone')
    assert prepare.prepare('wikitext2', data_dir=data) == folder

def test_tinystories_from_a_local_copy(tmp_path, data):
    """Each story is a document. What is no table, beside the tables, is not read."""
    source = parquet(tmp_path / 'parquet', STORIES)
    write(tmp_path / 'parquet', {'README.md': 'not this', '.git/x': ''})
    folder = prepare.prepare('tinystories', source=source, data_dir=data)
    assert sorted(os.listdir(folder)) == ['meta.json', 'train.bin', 'val.bin']
    assert text_of(folder, 'train') == 'Once upon a time.\n\nThe end.A café.Three.'
    assert text_of(folder, 'val') == 'Lily smiled.Bye.'
    assert load_meta(folder)['splits']['val']['documents'] == 2

@pytest.mark.parametrize('published, expected', [
    (('train', 'validation', 'test'), [20, 20, 20]), (('train', 'validation'), [20, 20]),
    (('train', 'test'), [16, 4, 20]), (('train',), [16, 2, 2])])
def test_any_set_of_the_hub(tmp_path, data, monkeypatch, published, expected):
    """Its own splits where it has them; the rest is cut off the training text."""
    local = parquet(tmp_path / 'hub', {s: [f'{s} row {i}' for i in range(20)] for s in published})
    load = datasets.load_dataset

    def load_dataset(repo, config):
        assert (repo, config) == ('user/some.set', None)
        return load(local)
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    meta = load_meta(prepare.prepare('user/some.set', 'bytes', data_dir=data))
    assert [count['documents'] for count in meta['splits'].values()] == expected

def test_what_cannot_be_read(tmp_path, data, monkeypatch, poem):
    def unreachable(*args):
        raise ConnectionError('no\nnetwork')
    with user_error('tinystories cannot be read .Arrow'):
        prepare.prepare('tinystories', source=write(tmp_path / 'c', {'train.parquet': 'PAR1'}),
                        data_dir=data)
    folder = write(tmp_path, {'empty.txt': '', 'short.txt': 'a', 'latin.txt': b'caf\xe9\n' * 9,
                              'none/a.py': 'code'})
    for name, message in (('empty.txt', 'no text in .*empty.txt'), ('none', 'no text in .*none'),
                          ('short.txt', 'too little text for a train split'),
                          ('latin.txt', 'latin.txt is not UTF-8 text: see byte 3')):
        with user_error(message):
            prepare.prepare(os.path.join(folder, name), 'bytes', data_dir=data)
    monkeypatch.setattr(datasets, 'load_dataset', unreachable)
    with user_error('wikitext2 cannot be read .ConnectionError: no.; .*--source=DIR'):
        prepare.prepare('wikitext2', 'bytes', data_dir=data)
    for name in ('wikitext-2', '/no/such/file.txt', ''):
        with user_error(f"no data set '{name}': there are pydocs, wikitext2, "):
            prepare.prepare(name, data_dir=data)
    with user_error("no tokenizer 'gpt4'; there are bytes and gpt2"):
        prepare.prepare(poem, 'gpt4', data_dir=data)
    assert not prepared(data)

# ---- one's own text ----

def test_a_folder_of_files(tmp_path, data, capsys):
    """Linked folders were left out without a word. Each file is split by position."""
    files = {f'sub{i % 3}/{i}.md': f'text {i:03}\n' * 10 for i in range(5)} | {'empty.txt': ''}
    folder = Path(write(tmp_path / 'my.texts', files | {'a.py': 'code', '.git/b.txt': 'hidden'}))
    (folder / 'linked').symlink_to(tmp_path)
    made = prepare.prepare(str(folder), 'bytes', data_dir=data)
    assert ('my.texts: texts read: 5; left out: 4 .git a.py empty.txt linked\n'
            in capsys.readouterr().out)
    parts = [bytes(load_tokens(made, split)).decode('utf-16').replace('\0', '\n').split('\n')
             for split in ('train', 'val', 'test')]
    assert sorted(filter(None, sum(parts, []))) == sorted([f'text {i:03}' for i in range(5)] * 10)
    assert min(map(len, parts)) > 2

# ---- prepared once, and whole ----

@pytest.mark.parametrize('damage', [None, 'meta', 'format', 'missing', 'short', 'sum'])
def test_prepared_once_and_anew_if_asked(poem, data, monkeypatch, capsys, damage):
    folder = prepare.prepare(poem, 'bytes', data_dir=data)
    whole, train = text_of(folder, 'train'), os.path.join(folder, 'train.bin')
    if damage == 'meta':
        os.truncate(os.path.join(folder, 'meta.json'), 100)
    elif damage == 'format':
        monkeypatch.setattr(prepare, 'FORMAT', prepare.FORMAT + 1)
    elif damage == 'missing':
        os.unlink(train)
    elif damage == 'short':
        os.truncate(train, 100)
    elif damage == 'sum':  # sums were written, and never read
        np.memmap(train, mode='r+')[10] += 1
    prepare.prepare(poem, 'bytes', data_dir=data)
    assert ('would make it anew' in capsys.readouterr().out) == (damage not in ('meta', 'format'))
    if damage in ('missing', 'short', 'sum'):
        with user_error('train.bin is missing or damaged: run python prepare.py --dataset=.*poem'):
            load_tokens(folder, 'train')
        prepare.main([f'--dataset={poem}', '--tokenizer=bytes', f'--data_dir={data}'])
    assert text_of(folder, 'train') == whole
    assert prepared(data) == ['poem-bytes'] + ['poem-bytes.1'] * (damage == 'meta')

def test_data_of_a_run(poem, data, tmp_path, capsys):
    """Edited, a text is read when prepare.py is asked to; what it held is kept. A run is told when
    its text is another one, and needs no source while its tokens are there."""
    folder = prepare.prepare(poem, 'bytes', data_dir=data)
    settings = {'dataset': poem, 'tokenizer': '', 'source': '', 'data_dir': data, 'n_layer': 3,
                'meta': load_meta(folder)}
    own = load_tokens(folder, 'val').tolist()
    with open(poem, 'a') as file:
        file.write('another line\n' * 50)
    prepare.prepare(poem, 'bytes', data_dir=data)
    assert data_of(settings)[0] == settings['meta'] and data_of(settings)[1].tolist() == own
    with user_error('has no other split, only train, val, test'):
        data_of(settings, 'other')
    assert 'is not the text' not in capsys.readouterr().out
    prepare.main([f'--dataset={poem}', '--tokenizer=bytes', f'--data_dir={data}'])
    assert 'held another text, which is now in' in capsys.readouterr().out
    os.unlink(poem)
    assert len(data_of(settings)[1]) > len(own) == len(load_tokens(f'{folder}.1', 'val'))
    assert 'is not the text that this model was trained on' in capsys.readouterr().out
    os.rename(folder, f'{folder}-gone')
    write(tmp_path, {'poem.txt': 'a third text\n' * 50})
    assert data_of(settings)[0]['dataset'] == poem  # prepared, as the run says
    with user_error('saved tokenizer: expected str, got 3'):
        data_of(settings | {'meta': {'tokenizer': 3}})

@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_failed_run_leaves_what_was_there(poem, data, monkeypatch, error):
    def documents():
        yield 'train', 'some text' * 100_000, True
        assert prepared(data) == ['poem-bytes', 'poem-bytes.tmp']
        raise error
    folder = prepare.prepare(poem, 'bytes', data_dir=data)
    monkeypatch.setattr(prepare, 'documents', lambda *args: documents())
    with pytest.raises(error):
        prepare.prepare(poem, 'bytes', data_dir=data, anew=True)
    assert prepared(data) == ['poem-bytes'] and text_of(folder, 'val').startswith('line 80')

# ---- tokenizers ----

@pytest.mark.parametrize('text', ['', 'Hello world', 'naïve café 你好 👩‍👩‍👧 🎉', 'a\r\n\tb\x01c',
                                  "it's 12345  spaces\n\n\n", 'x <|endoftext|> y'])
@pytest.mark.parametrize('name', ['bytes', 'gpt2'])
def test_round_trip(name, text):
    tok = get_tokenizer(name)
    ids = tok.encode(text)
    assert all(type(i) is int and 0 <= i < tok.vocab_size and i != tok.eot for i in ids)
    assert tok.decode(ids) == text and tok.decode_bytes(np.array(ids, int)) == text.encode()
    assert tok.decode(tok.encode('a\ud800b'))[::2] == 'ab'  # half a surrogate pair is no error

def test_a_million_blanks():
    """tiktoken panics at so many, with an exception that is no Exception. (Fewer: as before.)"""
    tok = get_tokenizer('gpt2')
    for blank in (' ', '\n'):
        text = f'a{blank * 1_000_000}b'
        assert tok.decode(tok.encode(text)) == text
    text = (' ' * 4000 + 'word\n') * 20
    assert tok.encode(text) == tok.bpe.encode_ordinary(text)
    assert tok.encode('Hello world') == [15496, 995]  # as published
