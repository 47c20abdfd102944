"""
A trained model as it is used, not as it was trained: ternary codes at 1.6 bits, int8 head and
embedding (fast/packed.py).

    python -m export.pack                       the newest run: out/<name>/packed.pt beside ckpt.pt
    python sample.py --checkpoint=packed.pt

Prints both sizes, and the PPL before and after: what the int8 head costs. The codes cost nothing.
"""
import os
from dataclasses import dataclass

from checkpoint import find_run, load_checkpoint, open_model, save_checkpoint
from common import keep_freed_memory
from configurator import UserError, configure, run
from eval_exits import evaluate, perplexity
from fast.packed import packed_state, to_ternary
from prepare import data_of

@dataclass
class PackSettings:
    """Packs a trained model."""
    out_dir: str = ''  # the run to pack; empty: the newest

def main(argv):
    s = configure(PackSettings, argv)
    keep_freed_memory()
    out_dir = find_run(s.out_dir)
    trained, small = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'packed.pt')
    model, settings = open_model(trained)
    try:
        packed = to_ternary(model)
    except ValueError as error:
        raise UserError(f'{trained} cannot be packed: {error}') from None
    checkpoint = load_checkpoint(trained) | {'model': packed_state(packed), 'packed': True}
    checkpoint.pop('optimizer', None)
    save_checkpoint(small, checkpoint)
    tokens = data_of(settings)[1]
    for path in (trained, small):
        ppl = perplexity(evaluate(open_model(path)[0], tokens)[-1])
        print(f'{path}: {os.path.getsize(path) / 1e6:.2f} MB, validation PPL {ppl:.4f}')

if __name__ == '__main__':
    run(main)
