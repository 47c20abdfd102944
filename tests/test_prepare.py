import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import corpora
import prepare
from configurator import UserError
from prepare import load_meta, load_tokens
from tokenizer import get_tokenizer

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@contextlib.contextmanager
def user_error(match):
    """A UserError of one line in which `match` occurs."""
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert '\n' not in str(caught.value)


def text_of(folder, split):
    """A prepared split as text, once meta.json has been checked against it."""
    meta, tokens = load_meta(folder), load_tokens(folder, split)
    tok, count = get_tokenizer(meta['tokenizer']), meta['splits'][split]
    assert tokens.dtype == np.dtype('<u2') and len(tokens) == count['tokens']
    assert int((tokens == tok.eot).sum()) == count['documents']
    text = tok.decode(tokens[tokens != tok.eot])
    assert len(text.encode()) == count['bytes']
    return text


def files_below(folder):
    return sorted(name for _, _, names in os.walk(folder) for name in names)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
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
    return os.path.join(write(tmp_path, {'poem.txt': ''.join(f'line {i:02} é\n' for i in range(100))}), 'poem.txt')


# ---- pydocs --------------------------------------------------------------------------------------------------------

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
    return list(corpora.read_pydocs([('pkg.', write(folder, files))]))


def test_pydocs_document(tmp_path):
    """Name and docstrings in source order; what occurs again is left out; nothing is imported."""
    (split, text, ends), = pydocs_of(tmp_path, {'sub/__init__.py': MODULE})
    assert ends and split == ('val' if corpora.in_val('pkg.sub') else 'train')
    assert text == ('pkg.sub\n\nModule  docstring\nwith two lines.\n\nOuter\nOuter docstring.\n\n'
                    'Outer.Inner.method\nMethod docstring.\n\nlate\nLate docstring.\n\nlate\nFallback docstring.\n')


def test_pydocs_leaves_out_tests_and_what_does_not_parse(tmp_path, capsys):
    doc = '"""The docstring of {}."""'
    skipped = ('test/a.py', 'sub/tests/b.py', 'idle_test/c.py', 'testing/d.py', 'site-packages/e.py', '.venv/f.py')
    documents = pydocs_of(tmp_path, {
        'kept.py': doc.format('kept'), 'testable.py': doc.format('testable'), 'empty.py': '', 'code.py': 'x = 1',
        'latin.py': b'# coding: latin-1\n"""caf\xe9"""', 'escape.py': '"""\\d"""', 'zero.py': b'\0',
        'broken.py': 'def', **{path: doc.format(path) for path in skipped}})
    assert [text for _, text, _ in documents] == [
        'pkg.escape\n\n\\d\n', 'pkg.kept\n\nThe docstring of kept.\n', 'pkg.latin\n\ncafé\n',
        'pkg.testable\n\nThe docstring of testable.\n']
    assert capsys.readouterr() == ('2 modules are not valid Python and are left out\n', '')


def test_pydocs_splits_do_not_leak(tmp_path):
    """Modules of both splits have docstrings in common: each docstring is in one split, once."""
    files = {f'm{i:03}.py': f'"""Shared {i % 5}."""\ndef f():\n    """Own {i}."""' for i in range(200)}
    documents = pydocs_of(tmp_path, files)
    docs = [(line, split) for split, text, _ in documents for line in text.split('\n') if line.endswith('.')]
    assert len(docs) == len(set(doc for doc, _ in docs)) == 205
    assert 4 <= sum(split == 'val' for _, split in docs) <= 30
    assert documents == pydocs_of(tmp_path, {})  # the same again


def test_pydocs_language_reference(tmp_path):
    """Topics are documents. They quote one another, so all of them are in one split."""
    topics = {f'topic{i}': f'The statement {i}\n*****\n\nText.\n' for i in range(50)}
    folder = write(tmp_path, {'pydoc_data/topics.py': f'# generated\ntopics = {topics!r}\n'})
    documents = list(corpora.read_pydocs([('', folder)]))
    assert [text for _, text, _ in documents] == [f'{name}\n\n{text}' for name, text in topics.items()]
    assert {split for split, _, _ in documents} == {'train'}


def test_pydocs_of_this_python():
    """The real packages are found, and numpy alone, which takes a second, gives its megabyte and a half."""
    packages = corpora.python_packages()
    assert [name.split()[0] for name in packages] == ['Python', 'numpy', 'torch']
    (_, stdlib), numpy_package, _ = packages.values()
    size = {'train': 0, 'val': 0}
    for split, text, _ in corpora.read_pydocs([numpy_package]):
        size[split] += len(text)
    assert sum(size.values()) > 1_000_000 and size['val'] > 1_000
    documents = [text for _, text, _ in corpora.read_pydocs([('pydoc_data.', os.path.join(stdlib, 'pydoc_data'))])]
    assert any(text.startswith('assert\n\nThe "assert" statement\n') for text in documents)


def test_pydocs_without_numpy(tmp_path, data, monkeypatch, capsys):
    """What is not installed is named; versions are the inputs, so an upgrade prepares anew."""
    files = {f'm{i}.py': f'"""Docstring number {i}."""' for i in range(40)}
    monkeypatch.setattr(corpora.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.setattr(corpora.sysconfig, 'get_path', lambda name: write(tmp_path / 'lib', files))
    folder = prepare.prepare('pydocs', data_dir=data)
    assert folder == os.path.join(data, 'pydocs-bytes')
    assert 'numpy is not installed: pydocs goes without its docstrings' in capsys.readouterr().out
    meta = load_meta(folder)
    assert meta['source'] == f'the docstrings of Python {sys.version.split()[0]}' and meta['vocab_size'] == 256
    assert 'Docstring number' in text_of(folder, 'train') and 'Docstring number' in text_of(folder, 'val')
    prepare.prepare('pydocs', data_dir=data)
    assert 'up to date' in capsys.readouterr().out
    monkeypatch.setattr(corpora.platform, 'python_version', lambda: '9.9')
    prepare.prepare('pydocs', data_dir=data)
    assert load_meta(folder)['source'] == 'the docstrings of Python 9.9'


# ---- wikitext2 and tinystories -------------------------------------------------------------------------------------

WIKI = {'train': ['', ' = Title = \n', '', ' Some <unk> text , in two @-@ part words . \n', ' = = Next = = \n'],
        'validation': [' = Other = \n', ' Text with <|endoftext|> in it . \n'],
        'test': [' = Third = \n', ' End . \n']}
STORIES = {'train': ['Once upon a time.\n\nThe end.', 'A café.', 'Three.'], 'validation': ['Lily smiled.', 'Bye.']}


def parquet(folder, rows, shards=1):
    """Files as the hub serves them."""
    folder.mkdir(parents=True)
    for split, texts in rows.items():
        for i in range(shards):
            part = texts[len(texts) * i // shards:len(texts) * (i + 1) // shards]
            name = f'{split}-{i:05}-of-{shards:05}.parquet'
            pyarrow.parquet.write_table(pyarrow.table({'text': part}), folder / name)
    return folder


@pytest.mark.parametrize('below', ['', 'wikitext-2-raw-v1', 'data'])
def test_wikitext2_from_parquet(tmp_path, data, below):
    parquet(tmp_path / 'copy' / below, WIKI, shards=2)
    folder = prepare.prepare('wikitext2', source=str(tmp_path / 'copy'), data_dir=data)
    assert folder == os.path.join(data, 'wikitext2-gpt2')
    assert files_below(data) == ['meta.json', 'test.bin', 'train.bin', 'val.bin']
    tok = get_tokenizer('gpt2')
    for split, ours in (('train', 'train'), ('validation', 'val'), ('test', 'test')):
        text = ''.join(WIKI[split])
        assert text_of(folder, ours) == text
        assert load_tokens(folder, ours).tolist() == tok.encode(text)  # rows end in a line end: as in one piece


def test_wikitext2_from_text(tmp_path, data):
    files = {f'wiki.{split[:5]}.raw': ''.join(rows) for split, rows in WIKI.items()}
    folder = prepare.prepare('wikitext2', 'bytes', write(tmp_path / 'copy', files), data)
    assert [text_of(folder, split) for split in ('train', 'val', 'test')] == [''.join(rows) for rows in WIKI.values()]


def test_tinystories(tmp_path, data):
    """Parquet and text files give the same tokens; each story is a document."""
    source = str(parquet(tmp_path / 'parquet', {split: [' ', *texts] for split, texts in STORIES.items()}))
    folder = prepare.prepare('tinystories', source=source, data_dir=data)
    assert files_below(data) == ['meta.json', 'train.bin', 'val.bin']
    assert load_meta(folder)['splits']['train']['documents'] == 3
    assert load_tokens(folder, 'val').tolist() == [
        i for story in STORIES['validation'] for i in get_tokenizer('gpt2').encode(story) + [50256]]
    for names in ('TinyStories-{}.txt', 'TinyStoriesV2-GPT4-{}.txt'):
        source = write(tmp_path / names, {names.format(split[:5]): '\n<|endoftext|>\n'.join(stories)
                                          for split, stories in STORIES.items()})
        other = prepare.prepare('tinystories', source=source, data_dir=str(tmp_path / names / 'data'))
        assert load_meta(other)['splits'] == load_meta(folder)['splits']


def test_tinystories_as_the_hub_lays_it_out(tmp_path, data):
    """Two versions of the text above, and the parquet files in data/: the latter are the data set."""
    parquet(tmp_path / 'copy' / 'data', STORIES, shards=2)
    source = write(tmp_path / 'copy', {f'TinyStories{version}-{split}.txt': 'not this'
                                       for version in ('', 'V2-GPT4') for split in ('train', 'valid')})
    folder = prepare.prepare('tinystories', 'bytes', source, data)
    assert text_of(folder, 'train') == ''.join(STORIES['train'])


def test_published_source_errors(tmp_path, data):
    with user_error("no wikitext2 in 'nowhere': expected .parquet or .txt files with train, valid, test in"):
        prepare.prepare('wikitext2', source='nowhere', data_dir=data)
    with user_error('no tinystories in'):
        prepare.prepare('tinystories', source=write(tmp_path / 'a', {'train.txt': 'no validation'}), data_dir=data)
    names = [f'{name}-{split}.txt' for name in ('V1', 'V2') for split in ('train', 'valid')]
    with user_error('which of .*V1-train.txt and .*V2-train.txt is tinystories'):
        prepare.prepare('tinystories', source=write(tmp_path / 'b', dict.fromkeys(names, 'x')), data_dir=data)
    broken = write(tmp_path / 'c', {'train.parquet': 'PAR1', 'validation.parquet': 'PAR1'})
    with user_error('cannot be read as tinystories'):
        prepare.prepare('tinystories', source=broken, data_dir=data)
    with user_error('--source is for a local copy of wikitext2 or tinystories, not for pydocs'):
        prepare.prepare('pydocs', source=broken, data_dir=data)
    assert not os.listdir(data)


def test_hub(data, monkeypatch, capsys):
    """The download: without a network the library is told, so that it does not retry; then its cache or an error."""
    def load_dataset(repo, config):
        assert (repo, config) == ('roneneldan/TinyStories', None)
        return {split: [{'text': text} for text in texts] for split, texts in STORIES.items()}

    def unreachable(*args):
        raise ConnectionError('no\nnetwork')

    fake = types.SimpleNamespace(load_dataset=load_dataset, disable_progress_bars=lambda: None)
    monkeypatch.setitem(sys.modules, 'datasets', fake)
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    monkeypatch.setattr(corpora.urllib.request, 'getproxies', dict)
    monkeypatch.setattr(corpora.socket, 'getaddrinfo', lambda *args: [])
    folder = prepare.prepare('tinystories', data_dir=data)
    assert os.environ['HF_HUB_OFFLINE'] == '0'
    assert load_meta(folder)['source'] == 'huggingface.co/datasets/roneneldan/TinyStories'
    monkeypatch.setattr(corpora.socket, 'getaddrinfo', unreachable)
    fake.load_dataset = unreachable
    prepare.prepare('tinystories', data_dir=data)
    assert 'up to date' in capsys.readouterr().out
    with user_error('tinystories cannot be downloaded .ConnectionError: no.: train on the embedded data with python '
                    'train.py config/cpu.py, or prepare a local copy with --source=DIR'):
        prepare.prepare('tinystories', 'bytes', data_dir=data)
    assert os.environ['HF_HUB_OFFLINE'] == '1'
    assert os.listdir(data) == ['tinystories-gpt2']


def test_what_was_prepared_from_a_copy_needs_it_no_more(tmp_path, data, capsys):
    """train.py, which knows of no --source, finds the data set that prepare.py made from one."""
    source = parquet(tmp_path / 'copy', WIKI)
    folder = prepare.prepare('wikitext2', 'bytes', str(source), data)
    for path in source.iterdir():
        path.unlink()
    assert prepare.prepare('wikitext2', 'bytes', data_dir=data) == folder
    assert 'up to date' in capsys.readouterr().out


# ---- text files ----------------------------------------------------------------------------------------------------

def test_text_file_is_cut_at_a_line(poem, data):
    folder = prepare.prepare(poem, data_dir=data)
    assert folder == os.path.join(data, 'poem-gpt2')
    train, val = text_of(folder, 'train'), text_of(folder, 'val')
    assert train + val == ''.join(f'line {i:02} é\n' for i in range(100))
    assert train.count('\n') == 90 and val.startswith('line 90')


@pytest.mark.parametrize('text', ['é' * 50, 'a' + '🎉' * 30, '你好吗' * 7, 'ab\r\n' * 20, 'ab' * 10])
@pytest.mark.parametrize('piece', [5, 1 << 20])
def test_text_of_any_form_is_kept(tmp_path, data, monkeypatch, text, piece):
    monkeypatch.setattr(corpora, 'PIECE', piece)
    path = os.path.join(write(tmp_path, {'text': text}), 'text')
    folder = prepare.prepare(path, 'bytes', data_dir=data)
    assert text_of(folder, 'train') + text_of(folder, 'val') == text
    assert 0.05 < load_meta(folder)['splits']['val']['bytes'] / len(text.encode()) < 0.25


def test_folder_is_split_by_file(tmp_path, data):
    files = {f'sub{i % 3}/{i}.md': f'text of file {i}\n' for i in range(100)} | {'empty.txt': ''}
    left_out = {'a.py': 'code', '.git/b.txt': 'hidden'}
    folder = prepare.prepare(write(tmp_path / 'my.texts', files | left_out), 'bytes', data_dir=data)
    train, val = (text_of(folder, split).splitlines() for split in ('train', 'val'))
    assert sorted(train + val) == sorted(text.strip() for text in files.values() if text)
    assert 2 <= len(val) <= 20
    assert set(val) == {text.strip() for name, text in files.items() if corpora.in_val(name) and text}
    assert load_meta(folder)['splits']['val']['documents'] == len(val)


def test_folder_of_few_files_is_split_in_each(tmp_path, data):
    files = {f'{i}.txt': f'{i} a line\n' * 50 for i in range(2)}
    folder = prepare.prepare(write(tmp_path / 'texts', files), 'bytes', data_dir=data)
    assert text_of(folder, 'train') == '0 a line\n' * 45 + '1 a line\n' * 45
    assert text_of(folder, 'val') == '0 a line\n' * 5 + '1 a line\n' * 5


def test_text_errors(tmp_path, data):
    files = {'empty.txt': '', 'short.txt': 'a', 'latin.txt': b'caf\xe9 au lait ' * 9, 'binary': b'\x80' * 3_000_000,
             'end.txt': b'line\n' * 20 + b'\xff'}
    folder = write(tmp_path / 'texts', files | {'none/a.py': 'code'})
    for name, message in (('empty.txt', 'no text in .*empty.txt: expected a text file, or a folder with .txt, .md'),
                          ('none', 'no text in .*none'), ('short.txt', 'too little text for a (train|val) split'),
                          ('latin.txt', 'latin.txt is not UTF-8 text: see byte 3'),
                          ('end.txt', 'end.txt is not UTF-8 text: see byte 100'),
                          ('binary', 'binary is not UTF-8 text: see byte 0')):
        with user_error(message):
            prepare.prepare(os.path.join(folder, name), 'bytes', data_dir=data)
        assert not files_below(data)


def test_unknown_names(tmp_path, poem, data):
    with user_error("no data set 'wikitext-2': there are pydocs, wikitext2, .*; did you mean wikitext2?"):
        prepare.prepare('wikitext-2', data_dir=data)
    with user_error("no data set '/no/such/file.txt'"):
        prepare.prepare('/no/such/file.txt', data_dir=data)
    with user_error("no tokenizer 'gpt4'"):
        prepare.prepare(poem, 'gpt4', data_dir=data)
    assert not os.path.exists(data)


# ---- preparing once, and whole -------------------------------------------------------------------------------------

def times(folder):
    return {name: os.stat(os.path.join(folder, name)).st_mtime_ns for name in os.listdir(folder)}


def test_second_run_does_nothing(poem, data, monkeypatch, capsys):
    folder = prepare.prepare(poem, 'bytes', data_dir=data)
    before = times(folder)
    monkeypatch.setattr(prepare, 'get_tokenizer', None)
    assert prepare.prepare(poem, 'bytes', data_dir=data) == folder
    assert times(folder) == before
    assert 'poem-bytes is up to date: train 991 tokens (990 bytes, 1 documents), val' in capsys.readouterr().out


@pytest.mark.parametrize('damage', ['text', 'meta', 'missing', 'short', 'range', 'format'])
def test_what_changed_is_prepared_anew(poem, data, monkeypatch, damage):
    folder = prepare.prepare(poem, 'bytes', data_dir=data)
    whole, train = text_of(folder, 'train'), os.path.join(folder, 'train.bin')
    if damage == 'text':
        with open(poem, 'a') as file:
            file.write('another line\n' * 50)
    elif damage == 'meta':
        os.truncate(os.path.join(folder, 'meta.json'), 100)
    elif damage == 'missing':
        os.unlink(train)
    elif damage == 'short':
        os.truncate(train, 100)
    elif damage == 'range':
        np.full(991, 256, dtype='<u2').tofile(train)
    elif damage == 'format':
        monkeypatch.setattr(corpora, 'FORMAT', corpora.FORMAT + 1)
    before = times(folder)
    prepare.prepare(poem, 'bytes', data_dir=data)
    assert times(folder)['meta.json'] != before['meta.json']
    assert text_of(folder, 'train').startswith(whole) and (text_of(folder, 'train') == whole) == (damage != 'text')


def test_another_file_of_the_same_name(tmp_path, poem, data):
    other = os.path.join(write(tmp_path / 'other', {'poem.txt': 'another text\n' * 40}), 'poem.txt')
    folder = prepare.prepare(poem, 'bytes', data_dir=data)
    assert prepare.prepare(other, 'bytes', data_dir=data) == folder
    assert text_of(folder, 'train').startswith('another')


def corpus(documents):
    return corpora.Corpus('a test', 'fingerprint', ('train', 'val'), documents)


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_failed_run_leaves_nothing(data, monkeypatch, error):
    def documents():
        yield 'train', 'some text' * 100_000, True
        yield 'val', 'some text' * 100_000, True
        assert files_below(data) == ['stream-bytes.lock', 'train.bin.tmp', 'val.bin.tmp']
        raise error
    monkeypatch.setattr(prepare, 'open_corpus', lambda dataset, source: corpus(documents))
    with pytest.raises(error):
        prepare.prepare('stream', 'bytes', data_dir=data)
    assert os.listdir(data) == []


def test_two_at_once(data, monkeypatch):
    """The second waits for the first, instead of writing into its files, and then finds all done."""
    started, told = threading.Event(), []

    def documents():
        told.append('prepared')
        started.set()
        time.sleep(0.5)
        yield 'train', 'some text', True
        yield 'val', 'some text', True
    monkeypatch.setattr(prepare, 'open_corpus', lambda dataset, source: corpus(documents))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(prepare.prepare, 'stream', 'bytes', data_dir=data)
        started.wait()
        second = pool.submit(prepare.prepare, 'stream', 'bytes', data_dir=data)
        assert first.result() == second.result()
    assert told == ['prepared']
    assert files_below(data) == ['meta.json', 'train.bin', 'val.bin']


def test_failed_run_keeps_the_earlier_data(poem, data):
    folder = prepare.prepare(poem, 'bytes', data_dir=data)
    with open(poem, 'ab') as file:
        file.write(b'\xff')
    with user_error('not UTF-8'):
        prepare.prepare(poem, 'bytes', data_dir=data)
    assert text_of(folder, 'val').startswith('line 90')
    assert files_below(data) == ['meta.json', 'train.bin', 'val.bin']


def test_meta_is_gone_before_a_file_is_replaced(poem, data, monkeypatch):
    """Killed between the two renames, old counts would stand beside new tokens."""
    folder = prepare.prepare(poem, 'bytes', data_dir=data)
    with open(poem, 'a') as file:
        file.write('another line\n' * 50)
    replace, calls = os.replace, []

    def fail_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError
        replace(*args)
    monkeypatch.setattr(os, 'replace', fail_the_second_time)
    with pytest.raises(OSError):
        prepare.prepare(poem, 'bytes', data_dir=data)
    with user_error('no prepared data set'):
        load_meta(folder)


def test_memory_is_bounded(data, monkeypatch):
    """20 MB of documents pass through; a few at a time are in memory."""
    def documents():
        for i in range(2000):
            yield ('val' if i % 10 == 0 else 'train'), 'some text\n' * 1000, True
    monkeypatch.setattr(prepare, 'open_corpus', lambda dataset, source: corpus(documents))
    tracemalloc.start()
    try:
        folder = prepare.prepare('stream', 'bytes', data_dir=data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert load_meta(folder)['splits']['train'].items() >= {'tokens': 18_001_800, 'documents': 1800}.items()
    assert peak < 2_000_000


# ---- reading -------------------------------------------------------------------------------------------------------

def test_load_meta_errors(tmp_path):
    with user_error('no prepared data set in .*: run python prepare.py'):
        load_meta(str(tmp_path))
    whole = {'dataset': 'd', 'source': 's', 'fingerprint': 'f', 'tokenizer': 'bytes', 'vocab_size': 256,
             'dtype': 'uint16', 'splits': {'train': {'tokens': 2, 'bytes': 1, 'documents': 1}}}
    write(tmp_path, {'meta.json': json.dumps(whole)})
    assert load_meta(str(tmp_path)) == whole
    for damaged in (b'', b'{', b'\xff', b'[]', b'null', b'3', json.dumps(whole | {'splits': [1]}),
                    json.dumps(whole | {'vocab_size': '256'}), json.dumps(whole | {'splits': {'train': 3}}),
                    json.dumps(whole | {'splits': {'train': {'tokens': 2}}}),
                    json.dumps(whole | {'splits': {'train': {'tokens': 1, 'bytes': 1, 'documents': 1}}}),
                    *(json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole)):
        write(tmp_path, {'meta.json': damaged})
        with user_error('meta.json is damaged: re-run python prepare.py'):
            load_meta(str(tmp_path))


def test_load_tokens_errors(poem, data):
    folder = prepare.prepare(poem, 'bytes', data_dir=data)
    train, val = os.path.join(folder, 'train.bin'), os.path.join(folder, 'val.bin')
    redo = f're-run python prepare.py --dataset={poem} --tokenizer=bytes'
    with user_error('poem-bytes has no test split, only train, val'):
        load_tokens(folder, 'test')
    np.full(991, 300, dtype='<u2').tofile(train)
    with user_error(f'train.bin has token 300, but the vocabulary ends at 255: {redo}'):
        load_tokens(folder, 'train')
    for size in (0, 1981, 1980):
        os.truncate(train, size)
        with user_error(f'train.bin has {size:,} bytes instead of 1,982: {redo}'):
            load_tokens(folder, 'train')
    os.unlink(val)
    with user_error(f'val.bin is missing: {redo}'):
        load_tokens(folder, 'val')


def test_load_tokens_looks_at_all_of_them(tmp_path):
    n = (1 << 24) + 1
    meta = {'dataset': 'd', 'source': 's', 'fingerprint': 'f', 'tokenizer': 'bytes', 'vocab_size': 256,
            'dtype': 'uint16', 'splits': {'train': {'tokens': n, 'bytes': n, 'documents': 0}}}
    write(tmp_path, {'meta.json': json.dumps(meta), 'train.bin': b''})
    os.truncate(tmp_path / 'train.bin', 2 * n)  # zeros
    assert len(load_tokens(str(tmp_path), 'train')) == n
    np.memmap(tmp_path / 'train.bin', dtype='<u2', mode='r+')[-1] = 256
    with user_error('train.bin has token 256'):
        load_tokens(str(tmp_path), 'train')


# ---- the command line ----------------------------------------------------------------------------------------------

def test_command_line(tmp_path, poem):
    """Errors are one line and exit code 2; the Hub, told to be offline, has nothing here."""
    env = os.environ | {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)}

    def run(*flags):
        return subprocess.run([sys.executable, os.path.join(ROOT, 'prepare.py'), *flags], cwd=tmp_path, env=env,
                              capture_output=True, text=True)

    done = run(f'--dataset={poem}', '--tokenizer=bytes')
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines() == [
        f'preparing data/poem-bytes from {poem}',
        'prepared data/poem-bytes: '
        'train 991 tokens (990 bytes, 1 documents), val 111 tokens (110 bytes, 1 documents)']
    failed = run('--dataset=wikitext2')
    assert failed.returncode == 2 and failed.stderr.count('\n') == 1
    assert failed.stderr.startswith('error: wikitext2 cannot be downloaded')
    assert os.listdir(tmp_path / 'data') == ['poem-bytes']
