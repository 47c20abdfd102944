"""
Yardsticks for a byte model: what a compressor and an n-gram model make of the same test text.

    python -m papers.yardsticks      writes papers/results/yardsticks.json: bits per byte
"""
import json
import lzma
import math
import time
from collections import Counter, defaultdict
from pathlib import Path

from common import atomic_write
from configurator import run
from fast.machine import commit
from prepare import load_tokens, prepare

def xz_bits(text, before=b''):
    """Bits per byte that xz adds for `text` after it has seen `before`."""
    extreme = 9 | lzma.PRESET_EXTREME
    size = [len(lzma.compress(data, preset=extreme)) for data in (before, before + text)]
    return 8 * (size[1] - size[0] * bool(before)) / len(text)

def ngram_bits(train, text, order):
    """Bits per byte of an n-gram model with Witten-Bell smoothing, contexts of 0 ... order-1 bytes:
    p_n = (count + kinds p_{n-1}) / (total + kinds), kinds: how many bytes followed a context."""
    counts = [defaultdict(Counter) for _ in range(order)]
    for n, table in enumerate(counts):
        for i in range(n, len(train)):
            table[train[i - n:i]][train[i]] += 1
    totals = [{c: sum(kinds.values()) for c, kinds in table.items()} for table in counts]
    bits = 0.0
    for i in range(len(text)):
        p = 1 / 256
        for n in range(min(order, i + 1)):
            context = text[i - n:i]
            if context not in totals[n]:
                break
            kinds, total = counts[n][context], totals[n][context]
            p = (kinds[text[i]] + len(kinds) * p) / (total + len(kinds))
        bits -= math.log2(p)
    return bits / len(text)

def main(argv):
    folder = prepare('pydocs')
    train, test = (load_tokens(folder, name).astype('uint8').tobytes()
                   for name in ('train', 'test'))
    seen = 1000 * 8 * 256  # as many bytes as a run of config/cpu.py trains on
    found = {'command': 'python -m papers.yardsticks', 'commit': commit(),
             'date': time.strftime('%Y-%m-%d'), 'test bytes': len(test), 'train bytes': len(train),
             'xz, test text alone': xz_bits(test),
             'xz, after 2.0 MB of training text': xz_bits(test, train[:seen]),
             'xz, after all training text': xz_bits(test, train)}
    for order in (3, 5, 6):
        found[f'{order}-gram, 2.0 MB of training text'] = ngram_bits(train[:seen], test, order)
    for name, value in found.items():
        print(f'{name:40} {value}')
    with atomic_write(str(Path(__file__).with_name('results') / 'yardsticks.json'), 'w') as file:
        json.dump(found, file, indent=1)

if __name__ == '__main__':
    run(main)
