"""
Write a trained model as it is used, not as it was trained: ternary codes at 1.6 bits, head and embedding in int8.

    python pack.py                       the newest run: out/<name>/packed.pt beside ckpt.pt
    python sample.py --checkpoint=packed.pt

Prints both sizes, and the validation PPL before and after: what the int8 head costs (the ternary codes cost nothing).
"""
import os
from dataclasses import dataclass

import checkpoint
from configurator import UserError, configure, run
from eval_exits import evaluate, perplexity
from packed import packed_state, to_ternary
from prepare import data_of
from runtime import keep_freed_memory


@dataclass
class PackSettings:
    """Packs a trained model."""
    out_dir: str = ''  # the run to pack; empty: the newest


def main(argv):
    s = configure(PackSettings, argv)
    keep_freed_memory()
    out_dir = checkpoint.find_run(s.out_dir)
    trained, small = os.path.join(out_dir, 'ckpt.pt'), os.path.join(out_dir, 'packed.pt')
    contents = checkpoint.load(trained)
    model = checkpoint.build_model(contents, trained)
    try:
        packed = to_ternary(model)
    except ValueError as error:
        raise UserError(f'{trained}: {error}') from None
    checkpoint.save(small, contents | {'model': packed_state(packed), 'packed': True})
    _, tokens = data_of(contents['settings'] | {'meta': contents['meta']})
    for path, m in ((trained, model), (small, checkpoint.load_checkpoint(small)[0])):
        ppl = perplexity(evaluate(m, tokens)[-1])
        print(f'{path}: {os.path.getsize(path) / 1e6:.2f} MB, validation PPL {ppl:.4f}')


if __name__ == '__main__':
    run(main)
