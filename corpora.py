"""
Where text comes from: the embedded documentation, two published data sets, and files of one's own.

pydocs needs no network: it is the documentation inside every installation of PyTorch. The docstrings of the standard
library, numpy and torch are read from the sources with `ast` (nothing is imported), and so are the chapters of the
language reference that `help('assert')` shows. It is about 9 MB of technical English. Of equal docstrings only the
first is kept, and whole modules go to one split, so no docstring is in both.

A Corpus yields its text in pieces, each with the split that it belongs to; nothing ever holds all of it in memory.
"""
import ast
import dataclasses
import difflib
import hashlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import socket
import sys
import sysconfig
import typing
import urllib.parse
import urllib.request
import warnings

from configurator import UserError

FORMAT = 1  # raise it when the same input gives other files: then every data set is prepared anew
PUBLISHED = {  # name: repository at huggingface.co, its configuration, {split there: split here}
    'wikitext2': ('Salesforce/wikitext', 'wikitext-2-raw-v1',
                  {'train': 'train', 'validation': 'val', 'test': 'test'}),
    'tinystories': ('roneneldan/TinyStories', None, {'train': 'train', 'validation': 'val'}),
}
TEXT_FILES = ('.txt', '.md', '.rst')  # what is read of a folder
PIECE = 1 << 20  # bytes of a text file that are tokenised at once
NOT_DOCS = {'test', 'tests', 'idle_test', 'testing', 'site-packages', 'dist-packages'}  # folders pydocs leaves out


@dataclasses.dataclass
class Corpus:
    """A data set before tokenisation."""
    source: str  # where the text is from
    fingerprint: str  # changes if the text may have changed; cheap to compute
    splits: tuple  # their names
    documents: typing.Callable  # () -> iterator of (split, piece of text, whether a document ends here)


def open_corpus(dataset, source=''):
    """The Corpus called `dataset`, or at that path. Only its documents, when they are asked for, take any time."""
    if dataset in PUBLISHED:
        repo, _, splits = PUBLISHED[dataset]
        files = local_copy(dataset, source) if source else {}
        inputs = [state(file) for split in files for file in files[split]]
        return Corpus(source or f'huggingface.co/datasets/{repo}', fingerprint(dataset, *inputs),
                      tuple(splits.values()), lambda: read_published(dataset, source, files))
    if source:
        raise UserError(f"--source is for a local copy of {' or '.join(PUBLISHED)}, not for {dataset}")
    if dataset == 'pydocs':
        packages = python_packages()
        versions = ', '.join(packages)
        return Corpus(f'the docstrings of {versions}', fingerprint(dataset, versions), ('train', 'val'),
                      lambda: read_pydocs(packages.values()))
    if os.path.exists(dataset):
        sizes = text_files(dataset)
        return Corpus(dataset, fingerprint('text', *map(state, sizes)), ('train', 'val'),
                      lambda: read_text(dataset, sizes))
    known = ['pydocs', *PUBLISHED]
    near = difflib.get_close_matches(dataset, known, n=1)
    raise UserError(f"no data set '{dataset}': there are {', '.join(known)}, and the paths of text files"
                    + (f'; did you mean {near[0]}?' if near else ''))


def in_val(name):
    """Whether the module or file `name` belongs to val: one in 32 does, and always the same ones."""
    return hashlib.sha256(name.encode('utf-8', errors='replace')).digest()[0] < 8


def fingerprint(name, *inputs):
    """Names the data set and the state of its inputs; without inputs, a prefix that fits every state of them."""
    return f'{FORMAT} {name} ' + (hashlib.sha256(repr(inputs).encode()).hexdigest()[:16] if inputs else '')


def state(path):
    """What changes with the content of a file, without reading it."""
    stat = os.stat(path)
    return os.path.realpath(path), stat.st_size, stat.st_mtime_ns


def find_files(folder, endings, skip=()):
    """Sorted paths of the files below `folder` with one of the `endings`; hidden folders and those in `skip` are not
    entered."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skip and not name.startswith('.')]
        found += [os.path.join(here, name) for name in names if name.endswith(endings)]
    return sorted(found)


def python_packages():
    """The packages in pydocs, {'numpy 2.4.6': (prefix of its modules' names, folder), ...}; none is imported."""
    packages = {f'Python {platform.python_version()}': ('', sysconfig.get_path('stdlib'))}
    for package in ('numpy', 'torch'):
        spec = importlib.util.find_spec(package)
        if spec is None:
            print(f'{package} is not installed: pydocs goes without its docstrings')
        else:
            version = importlib.metadata.version(package)
            packages[f'{package} {version}'] = (f'{package}.', spec.submodule_search_locations[0])
    return packages


def read_pydocs(packages):
    """The docstrings of `packages`, pairs of the prefix of the modules' names and their folder. A document is a
    module: its name, then its docstrings in source order; or a topic of the language reference."""
    seen, broken = set(), 0
    for prefix, folder in packages:
        for path in find_files(folder, '.py', skip=NOT_DOCS):
            module = prefix + os.path.relpath(path, folder).removesuffix('.py').replace(os.sep, '.')
            module = module.removesuffix('.__init__')
            split = 'val' if in_val(module) else 'train'
            tree = parse(path)
            if tree is None:
                broken += 1
            elif module == 'pydoc_data.topics':  # topics = {name: text}; they quote one another: all go to one split
                for topic, text in ast.literal_eval(tree.body[-1].value).items():
                    yield split, f'{topic}\n\n{text.strip()}\n', True
            else:
                parts = [module]
                for name, doc in docstrings(tree):
                    if doc not in seen:
                        seen.add(doc)
                        parts.append(f'{name}\n{doc}'.strip())
                if len(parts) > 1:
                    yield split, '\n\n'.join(parts) + '\n', True
    if broken:
        print(f'{broken} modules are not valid Python and are left out')


def parse(path):
    """The ast.Module of a Python file, or None if it is not valid Python."""
    with warnings.catch_warnings(), open(path, 'rb') as file:
        warnings.simplefilter('ignore')  # invalid escapes and the like
        try:
            return ast.parse(file.read())
        except (SyntaxError, ValueError):
            return None


def docstrings(node, name=''):
    """(qualified name, docstring) of `node`, an ast.Module, and of all that is defined in it, in source order."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        name = f'{name}.{node.name}' if name else node.name
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        doc = ast.get_docstring(node)  # cleaned as by inspect.cleandoc
        if doc:
            yield name, doc
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler)):  # `if` and `try` can hold definitions, too
            yield from docstrings(child, name)


def read_published(name, source, files):
    """The text of a published data set, from local `files` if there are any. WikiText-2 is one running text, its
    rows as published; a document of TinyStories is a story."""
    repo, config, splits = PUBLISHED[name]
    is_text = bool(files) and not files['train'][0].endswith('.parquet')
    try:
        data = load_files(files, is_text) if files else load_hub(repo, config)
        for split, ours in splits.items():
            texts = (row['text'] for row in data[split])
            if name == 'wikitext2':
                yield from ((ours, text, False) for text in texts)
            else:
                texts = stories(texts) if is_text else texts
                yield from ((ours, text.strip(), True) for text in texts if text.strip())
    except Exception as error:  # the many parts of the datasets library raise whatever they like
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        if source:
            raise UserError(f'{source} cannot be read as {name} ({reason})') from error
        raise UserError(f'{name} cannot be downloaded ({reason}): train on the embedded data with python train.py '
                        'config/cpu.py, or prepare a local copy with --source=DIR') from error


def local_copy(name, source):
    """{split: files} of a copy of a published data set: parquet files as the hub serves them, or else text files."""
    _, config, splits = PUBLISHED[name]
    for endings in ('.parquet', ('.txt', '.raw')):
        for folder in (source, os.path.join(source, 'data'), os.path.join(source, config or '')):
            names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
            files = {split: [os.path.join(folder, n) for n in names if n.endswith(endings) and split[:5] in n.lower()]
                     for split in splits}
            if all(files.values()):
                if endings != '.parquet' and len(files['train']) > 1:
                    raise UserError(f"which of {' and '.join(files['train'])} is {name}? leave only one there")
                return files
    raise UserError(f"no {name} in '{source}': expected .parquet or .txt files with "
                    f"{', '.join(split[:5] for split in splits)} in their names")


def load_files(files, is_text):
    """{split: rows} of local files, streamed."""
    import datasets  # slow
    options = {'keep_linebreaks': True} if is_text else {}  # a row is a line
    return datasets.load_dataset('text' if is_text else 'parquet', data_files=files, streaming=True, **options)


def load_hub(repo, config):
    """{split: rows} of a data set at the hub, by way of the cache of the datasets library."""
    host = urllib.parse.urlsplit(os.environ.get('HF_ENDPOINT', 'https://huggingface.co')).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        if not urllib.request.getproxies():  # offline: the library would retry for half a minute before it says so
            os.environ['HF_HUB_OFFLINE'] = '1'  # what its cache holds is still found
    import datasets  # slow, and reads the variable
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets.load_dataset(repo, config)


def stories(lines):
    """The stories in a text file of TinyStories, where a line <|endoftext|> ends each."""
    story = []
    for line in lines:
        if line.strip() == '<|endoftext|>':
            yield ''.join(story)
            story = []
        else:
            story.append(line)
    yield ''.join(story)


def text_files(path):
    """{file: size} of the text file `path`, or of the TEXT_FILES below it."""
    files = find_files(path, TEXT_FILES) if os.path.isdir(path) else [path]
    sizes = {file: os.path.getsize(file) for file in files if os.path.getsize(file)}
    if not sizes:
        raise UserError(f"no text in {path}: expected a text file, or a folder with {', '.join(TEXT_FILES)} files")
    return sizes


def read_text(path, sizes):
    """The text of `path`, that is, of the files in `sizes`. Whole files go to val if in_val gives it a fair share;
    else the last tenth of each file does. A document is a file, or the part of it in a split."""
    val = {file for file in sizes if in_val(os.path.relpath(file, path))}
    by_file = 0.02 < sum(sizes[file] for file in val) / sum(sizes.values()) < 0.2
    for file, size in sizes.items():
        with open(file, 'rb') as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if by_file:
                cut = 0 if file in val else size
            else:
                cut = boundary(data, size * 8 // 10, size * 9 // 10)
            for split, start, stop in (('train', 0, cut), ('val', cut, size)):
                while start < stop:
                    end = boundary(data, start, start + PIECE) if start + PIECE < stop else stop
                    try:
                        text = data[start:end].decode()
                    except UnicodeDecodeError as error:
                        raise UserError(f'{file} is not UTF-8 text: see byte {start + error.start}') from error
                    yield split, text, end == stop
                    start = end


def boundary(data, start, stop):
    """Where to cut UTF-8 `data`: after the last line end in start..stop, else at the character around `stop`."""
    line = data.rfind(b'\n', start, stop) + 1
    if line:
        return line
    for cut in range(stop, max(stop - 4, -1), -1):  # a character has up to 4 bytes, 0b10xxxxxx from the second on
        if data[cut] & 0xC0 != 0x80:
            return cut
    return stop  # not UTF-8, which decoding will tell
