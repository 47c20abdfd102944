"""
Data sets as files of token ids.

    python prepare.py                          the embedded default: pydocs, in bytes
    python prepare.py --dataset=wikitext2      Paper A's data, 2.4M tokens of GPT-2's BPE
    python prepare.py --dataset=tinystories    Paper B's data, 0.5B tokens
    python prepare.py --dataset=user/name      another set of the Hugging Face hub
    python prepare.py --dataset=my/texts       your own text: a file, or a folder of files

Each becomes a folder data/<name>-<tokenizer>/ with train.bin, val.bin and test.bin (token ids,
little-endian uint16) and meta.json (source, tokenizer, size and SHA-256 of each split). pydocs
needs no network: it is the 9 MB of docstrings that every installation of PyTorch brings along.
"""
import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import warnings

from common import move_aside, say
from filelock import FileLock  # torch requires it
import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError, configure, run

FORMAT = 3  # raise it when the same input gives other files: then all is prepared anew
HUB = {'wikitext2': 'Salesforce/wikitext:wikitext-2-raw-v1',  # repository:configuration
       'tinystories': 'roneneldan/TinyStories'}
SPLITS = {'train': 'train', 'validation': 'val', 'test': 'test'}  # the hub's names, and ours
PIECE = re.compile(r'(?s).{1,1000000}(?:\n|\Z)|.{1,1000000}')  # a megabyte, to a line's end
NOT_DOCS = {'test', 'tests', 'idle_test', 'testing', 'site-packages', 'dist-packages'}

@dataclasses.dataclass
class Settings:
    """Prepares a data set for training: text to files of token ids."""
    dataset: str = 'pydocs'  # pydocs, wikitext2, tinystories, user/name of the hub, or a path
    tokenizer: str = ''  # gpt2 or bytes; empty: bytes for pydocs, else gpt2
    source: str = ''  # folder with a local copy of a set of the hub, in parquet files
    data_dir: str = 'data'  # where prepared data sets are

# ---- text ----
def documents(dataset, source=''):
    """Iterator of (split, piece of text, whether a document ends here)."""
    if dataset == 'pydocs':
        return read_pydocs(python_packages().values())
    if os.path.exists(dataset):
        return read_files(dataset)
    repo, _, config = HUB.get(dataset, dataset).partition(':')
    if not re.fullmatch(r'[\w.-]+/[\w.-]+', repo):
        raise UserError(f"no data set '{dataset}': there are pydocs, wikitext2, tinystories, "
                        'user/name of the Hugging Face hub, and paths of text')
    if source:
        return read_rows(dataset, 'parquet', data_dir=source)
    return read_rows(dataset, repo, config or None)

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
    """{'numpy 2.4.6': (prefix of its modules' names, folder), ...}"""
    return {f'Python {platform.python_version()}': ('', os.path.dirname(os.__file__)),
            f'numpy {np.__version__}': ('numpy.', os.path.dirname(np.__file__)),
            f'torch {torch.__version__}': ('torch.', os.path.dirname(torch.__file__))}

def read_pydocs(packages):
    """A document is a module (its name, and its docstrings in source order) or a topic of the
    language reference, as help('assert') shows it. Of equal docstrings the first is kept, and a
    module goes to one split as a whole: no docstring is in two splits."""
    seen = {None}
    for prefix, folder in packages:
        for path in (path for path in walk(folder, NOT_DOCS) if path.endswith('.py')):
            module = prefix + os.path.relpath(path, folder).removesuffix('.py').replace(os.sep, '.')
            module, parts, tree = module.removesuffix('.__init__'), [], parse(path)
            first = hashlib.sha256(module.encode()).digest()[0]
            split = 'val' if first < 8 else 'test' if first < 16 else 'train'  # always the same
            if module == 'pydoc_data.topics':  # topics = {name: text}; they quote one another
                for topic, text in ast.literal_eval(tree.body[-1].value).items():
                    yield split, f'{topic}\n\n{text.strip()}\n', True
            for name, doc in docstrings(tree):
                if doc not in seen:
                    seen.add(doc)
                    parts.append(f'{name}\n{doc}'.strip())
            if parts:
                yield split, '\n\n'.join([module, *parts]) + '\n', True

def parse(path):
    """The syntax tree of a file; an empty one if it is not Python."""
    with warnings.catch_warnings(), contextlib.suppress(Exception), open(path, 'rb') as file:
        warnings.simplefilter('ignore')  # of invalid escapes, and the like
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

def read_files(path):
    """One's own text. The first 80% of each file are train, 10% val and 10% test. A document is
    the part of a file in a split."""
    endings, found = ('.txt', '.md', '.rst'), walk(path)
    files = [file for file in found if os.path.isfile(file) and os.path.getsize(file)
             and (file == path or file.endswith(endings))]
    if not files:
        raise UserError(f"no text in {path}: no file there ends in {', '.join(endings)}")
    left_out = sorted(os.path.relpath(file, path) for file in {*found} - {*files})
    say(f'{path}: texts read: {len(files)}; left out: {len(left_out)}', *left_out[:4])
    for file in files:
        try:
            with open(file, 'rb') as opened:
                text = opened.read().decode()
        except UnicodeDecodeError as error:
            raise UserError(f'{file} is not UTF-8 text: see byte {error.start}') from None
        a, b = len(text) * 8 // 10, len(text) * 9 // 10
        a, b = text.rfind('\n', 0, a) + 1 or a, text.rfind('\n', a, b) + 1 or b  # at a line's end
        for split, start, stop in ('train', 0, a), ('val', a, b), ('test', b, len(text)):
            for piece in PIECE.finditer(text, start, stop):
                yield split, piece[0], piece.end() == stop

def read_rows(dataset, *args, **options):
    """The column `text` of what the library `datasets` loads. A row is a document, but WikiText's
    rows are the lines of one. Splits that a set lacks are cut off the end of its training text."""
    try:
        import datasets  # slow
        data = datasets.load_dataset(*args, **options)
        for name in filter(data.__contains__, SPLITS):
            tenths = [SPLITS[name]] * 10
            if name == 'train' and 'validation' not in data:
                tenths[8:] = 'val', 'val' if 'test' in data else 'test'
            for i, row in enumerate(data[name]):
                split, text = tenths[10 * i // len(data[name])], row['text'] or ''
                if dataset == 'wikitext2':
                    yield split, text, False
                elif text.strip():
                    yield split, text.strip(), True
    except Exception as error:  # the library raises whatever it likes
        why = f'{type(error).__name__}: {error}'.splitlines()[0]
        raise UserError(f'{dataset} cannot be read ({why}); is it a path that is not there? A set '
                        'of the hub needs a network, or a local copy: --source=DIR') from error

# ---- tokens ----
def get_tokenizer(name):
    if name not in ('bytes', 'gpt2'):
        raise UserError(f"no tokenizer '{name}'; there are bytes and gpt2")
    return Bytes() if name == 'bytes' else GPT2()

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
        try:
            import tiktoken
            self.bpe = tiktoken.get_encoding('gpt2')  # downloaded, the first time
        except (ImportError, OSError) as error:
            raise UserError(f'tiktoken cannot download gpt2 ({type(error).__name__}): it needs a '
                            'network once, --tokenizer=bytes never') from error

    def encode(self, text):  # taken literally: '<|endoftext|>' is 13 characters
        pieces = re.findall(r'(?s).*?\s{4096}|.+', text)  # tiktoken overflows on endless blanks
        return [i for piece in pieces for i in self.bpe.encode_ordinary(piece)]

    def decode_bytes(self, ids):
        return self.bpe.decode_bytes([int(i) for i in ids])

# ---- prepared folders ----
def prepare(dataset, tokenizer='', source='', data_dir='data', anew=False):
    """Prepare a data set, unless that has been done, and return its folder."""
    tokenizer = tokenizer or ('bytes' if dataset == 'pydocs' else 'gpt2')
    folder, pieces = folder_of(dataset, tokenizer, data_dir), documents(dataset, source)
    meta = {'format': FORMAT, 'dataset': dataset}
    with FileLock(f'{folder}.lock'):  # one process at a time
        if anew or not meta.items() <= load_meta(folder).items():
            source = ', '.join(python_packages()) if dataset == 'pydocs' else source or dataset
            build(folder, meta | {'source': source}, pieces, get_tokenizer(tokenizer))
        else:
            say(f'{folder} is there; python prepare.py --dataset={dataset} would make it anew')
    return folder

def folder_of(dataset, tokenizer, data_dir):
    name = os.path.splitext(os.path.basename(os.path.abspath(dataset)))[0]
    return os.path.join(data_dir, f'{name}-{tokenizer}')

def build(folder, meta, pieces, tok):
    """Write a folder aside and rename it: it is whole, or not there. An older text is kept."""
    say(f"preparing {folder} from {meta['source']}")
    aside = f'{folder}.tmp'
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    os.makedirs(aside)
    try:
        splits = write_splits(aside, meta['dataset'], pieces, tok)
        meta |= {'tokenizer': tok.name, 'vocab_size': tok.vocab_size, 'splits': splits}
        with open(f'{aside}/meta.json', 'w', encoding='utf-8') as file:
            json.dump(meta, file, indent=1)
        if load_meta(folder).get('splits') == splits:  # the same text, touched or damaged
            shutil.rmtree(folder)
        elif os.path.exists(folder):
            say(f'{folder} held another text, which is now in {move_aside(folder)}')
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    counts = [f"{split} {count['tokens']:,} tokens" for split, count in splits.items()]
    say(f"prepared {folder}:\n  {', '.join(counts)}")

def write_splits(folder, dataset, pieces, tok):
    """Tokenize into <folder>/<split>.bin. Returns what meta.json tells of each split."""
    splits = {split: {'tokens': 0, 'bytes': 0, 'documents': 0} for split in SPLITS.values()}
    with contextlib.ExitStack() as stack:
        files = {s: stack.enter_context(open(f'{folder}/{s}.bin', 'wb')) for s in splits}
        for split, text, ends in tqdm(pieces, 'tokenizing', unit=' texts', disable=None):
            ids = tok.encode(text) + [tok.eot] * ends
            files[split].write(np.array(ids, dtype='<u2').tobytes())
            sizes = len(ids), len(text.encode(errors='replace')), ends
            for key, size in zip(splits[split], sizes):
                splits[split][key] += size
    if not splits['test']['tokens']:  # TinyStories has no test split
        os.unlink(f'{folder}/test.bin')
        del splits['test']
    for split, count in splits.items():
        if count['tokens'] < 2:  # one, and one to predict from it
            raise UserError(f'{dataset} has too little text for a {split} split')
        tokens = np.memmap(f'{folder}/{split}.bin', mode='r')
        count['sha256'] = hashlib.sha256(tokens).hexdigest()
    return splits

def load_meta(folder):
    """The dict in meta.json of a prepared data set; an empty one if there is none."""
    with contextlib.suppress(OSError, ValueError), open(f'{folder}/meta.json', 'rb') as file:
        return json.load(file)
    return {}

def load_tokens(folder, split):
    """Token ids of a split: np.memmap of uint16 (tokens,). UserError if missing or damaged."""
    meta, path = load_meta(folder), os.path.join(folder, f'{split}.bin')
    splits = meta.get('splits', {})
    if split not in splits:
        raise UserError(f"{folder} has no {split} split, only {', '.join(splits) or 'none'}")
    with contextlib.suppress(OSError, ValueError):  # no file, or an empty one
        tokens = np.memmap(path, dtype='<u2', mode='r')
        if hashlib.sha256(tokens).hexdigest() == splits[split]['sha256']:
            return tokens
    raise UserError(f'{path} is missing or damaged: run python prepare.py '
                    f"--dataset={meta['dataset']} --tokenizer={meta['tokenizer']} again")

def data_of(settings, split='val'):
    """(meta, tokens of a split) for a run: its settings, with its meta. If the text is not the one
    that the run was trained on, this is said."""
    saved = {key: settings[key] for key in vars(Settings()) if key in settings}
    s = configure(Settings, [], saved | {'tokenizer': settings['meta']['tokenizer']})
    folder = folder_of(s.dataset, s.tokenizer, s.data_dir)
    if not load_meta(folder):
        prepare(**vars(s))
    if load_meta(folder).get('splits') != settings['meta']['splits']:
        say(f'note: {folder} is not the text that this model was trained on')
    return load_meta(folder), load_tokens(folder, split)

def main(argv):
    prepare(**vars(configure(Settings, argv)), anew=True)

if __name__ == '__main__':
    run(main)
