"""
Data sets as files of token ids.

    python prepare.py                                       the embedded default: pydocs, in bytes
    python prepare.py --dataset=wikitext2                   Paper A's data, 2.4M tokens of GPT-2's BPE
    python prepare.py --dataset=tinystories                 Paper B's data, 0.5B tokens
    python prepare.py --dataset=my/texts --tokenizer=bytes  a text file, or a folder of *.txt, *.md and *.rst files

Each becomes a folder data/<name>-<tokenizer>/ with

    train.bin, val.bin, test.bin (if published)   token ids, little-endian uint16, nothing else
    meta.json    dataset, source, fingerprint, tokenizer, vocab_size, dtype, and for each split: tokens, bytes (of the
                 text in UTF-8: bits per byte need them), documents (that an end-of-text token ends) and sha256

meta.json is written last: without it there is no data set, so a killed run leaves nothing that could be mistaken for
one. Text streams through, a document at a time, whatever its size.
"""
import contextlib
import dataclasses
import hashlib
import json
import os

import numpy as np
from tqdm import tqdm

import configurator
from checkpoint import DATA, atomic_write, exclusive, told
from configurator import UserError
from corpora import open_corpus
from tokenizer import get_tokenizer, vocabulary

META = {'dataset': str, 'source': str, 'fingerprint': str, 'tokenizer': str, 'vocab_size': int, 'dtype': str,
        'splits': dict}


@dataclasses.dataclass
class Settings:
    """Prepares a data set for training: text to files of token ids."""
    dataset: str = 'pydocs'  # pydocs, wikitext2, tinystories, or the path of a text file or a folder of them
    tokenizer: str = ''  # gpt2 or bytes; empty: bytes for pydocs, else gpt2
    source: str = ''  # folder with a local copy of wikitext2 or tinystories (parquet or text files)
    data_dir: str = 'data'  # where prepared data sets are


def main(argv):
    prepare(**dataclasses.asdict(configurator.configure(Settings, argv)))


def prepare(dataset, tokenizer='', source='', data_dir='data'):
    """Prepare a data set, unless that has been done, and return its folder. Arguments as in Settings. UserError if
    the data set, its text or the tokenizer cannot be had; then what stood in the folder before is still there."""
    tokenizer = tokenizer or default_tokenizer(dataset)
    corpus = open_corpus(dataset, source)
    name = os.path.splitext(os.path.basename(os.path.abspath(dataset)))[0]
    folder = os.path.join(data_dir, f'{name}-{tokenizer}')
    meta = up_to_date(folder, corpus)
    if meta:
        print(f'{folder} is up to date: {summary(meta)}')
        return folder
    tok = get_tokenizer(tokenizer)
    with exclusive(folder):
        if up_to_date(folder, corpus):  # another process has prepared it meanwhile
            return folder
        print(f'preparing {folder} from {corpus.source}', flush=True)
        splits = write_splits(folder, dataset, corpus, tok)
        meta = {'dataset': dataset, 'source': corpus.source, 'fingerprint': corpus.fingerprint, 'tokenizer': tok.name,
                'vocab_size': tok.vocab_size, 'dtype': 'uint16', 'splits': splits}
        with atomic_write(f'{folder}/meta.json', 'w') as file:
            json.dump(meta, file, indent=1)
    print(f'prepared {folder}: {summary(meta)}')
    return folder


def default_tokenizer(dataset):
    return 'bytes' if dataset == 'pydocs' else 'gpt2'


def up_to_date(folder, corpus):
    """The meta.json of `folder` if it holds `corpus` whole, else None."""
    try:
        meta = load_meta(folder)
        for split in corpus.splits:
            load_tokens(folder, split)
    except UserError:
        return None
    return meta if meta['fingerprint'].startswith(corpus.fingerprint) else None


def summary(meta):
    return ', '.join(f"{split} {n['tokens']:,} tokens ({n['bytes']:,} bytes, {n['documents']:,} documents)"
                     for split, n in meta['splits'].items())


def write_splits(folder, dataset, corpus, tok):
    """Tokenise `corpus` into <folder>/<split>.bin, which appear when all is done, and return what meta.json tells of
    the splits."""
    counts = {split: {'tokens': 0, 'bytes': 0, 'documents': 0} for split in corpus.splits}
    hashes = {split: hashlib.sha256() for split in corpus.splits}
    os.makedirs(folder, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: os.listdir(folder) or os.rmdir(folder))  # a failure leaves nothing behind
        files = {split: stack.enter_context(atomic_write(f'{folder}/{split}.bin')) for split in corpus.splits}
        bar = stack.enter_context(tqdm(unit='B', unit_scale=True, disable=None))  # None: shown on a terminal only
        for split, text, ends in corpus.documents():
            ids = tok.encode(text) + [tok.eot] * ends
            data = np.array(ids, dtype='<u2').tobytes()
            n_bytes = len(text.encode('utf-8', errors='replace'))
            files[split].write(data)
            hashes[split].update(data)
            counts[split]['tokens'] += len(ids)
            counts[split]['bytes'] += n_bytes
            counts[split]['documents'] += ends
            bar.update(n_bytes)
        for split, count in counts.items():
            if count['tokens'] < 2:  # a token and the one to predict from it
                raise UserError(f'{dataset} has too little text for a {split} split')
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f'{folder}/meta.json')  # of an earlier preparation: its files are about to be replaced
    return {split: counts[split] | {'sha256': hashes[split].hexdigest()} for split in corpus.splits}


# ---- reading -------------------------------------------------------------------------------------------------------

def load_meta(folder):
    """The dict in meta.json of a prepared data set. UserError if there is none, or if it is damaged."""
    path = os.path.join(folder, 'meta.json')
    if not os.path.isfile(path):
        raise UserError(f'no prepared data set in {folder}: run python prepare.py --dataset=... first')
    try:
        with open(path, encoding='utf-8') as file:
            meta = json.load(file)
        whole = (all(type(meta[key]) is kind for key, kind in META.items())
                 and meta['vocab_size'] == vocabulary(meta['tokenizer'])
                 and all(type(count[key]) is int and count[key] >= least for count in meta['splits'].values()
                         for key, least in (('tokens', 2), ('bytes', 1), ('documents', 0))))
    except (ValueError, KeyError, TypeError, RecursionError, UserError):  # not JSON, keys missing, not an object
        whole = False
    if not whole:
        raise UserError(f'{path} is damaged: re-run python prepare.py for this data set')
    return meta


def data_of(settings, split='val'):
    """The data of a run, by its checkpoint's settings: meta.json's dict, and the tokens of a split. Says so where they
    are not the text that the run was trained on, some of which may stand in the split now. UserError as `prepare`."""
    folder = prepare(*told(settings, *DATA))
    meta = load_meta(folder)
    before = settings['meta']
    if meta['splits'] != before.get('splits'):
        print(f'note: {folder} is not the text that this model was trained on, of which its {split} split may hold a '
              f'part; that was {before.get("source")}, this is {meta["source"]}')
    return meta, load_tokens(folder, split)


def load_tokens(folder, split):
    """Token ids of a split: np.memmap of uint16 (tokens,), all below vocab_size. UserError if missing or damaged."""
    meta = load_meta(folder)
    path = os.path.join(folder, f'{split}.bin')
    redo = f"re-run python prepare.py --dataset={meta['dataset']} --tokenizer={meta['tokenizer']}"
    if split not in meta['splits']:
        raise UserError(f"{folder} has no {split} split, only {', '.join(meta['splits'])}")
    if not os.path.isfile(path):
        raise UserError(f'{path} is missing: {redo}')
    size, expected = os.path.getsize(path), 2 * meta['splits'][split]['tokens']
    if size != expected or size == 0:
        raise UserError(f'{path} has {size:,} bytes instead of {expected:,}: {redo}')
    tokens = np.memmap(path, dtype='<u2', mode='r')
    top = max(int(tokens[i:i + (1 << 24)].max()) for i in range(0, len(tokens), 1 << 24))
    if top >= meta['vocab_size']:
        raise UserError(f"{path} has token {top}, but the vocabulary ends at {meta['vocab_size'] - 1}: {redo}")
    return tokens


if __name__ == '__main__':
    configurator.run(main)
