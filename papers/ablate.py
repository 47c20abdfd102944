"""
Train the cells of a table (papers/plan.py), and keep what each run measures.

    python -m papers.ablate --table=ladder               train what is missing, then print the table
    python -m papers.ablate --table=ladder,fixed --seeds=1

A run is a cell with a seed (and a rate, where rates are compared). It leaves one file,
papers/results/TABLE/LABEL-sSEED.json, with its command, commit, machine and minutes. What is there
is not trained again. An interrupted run goes on where it was. Start the command in two terminals,
and they share the work. Rates are chosen on validation text; the tables report test text.
"""
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import load_checkpoint, open_model
from common import atomic_write, keep_freed_memory, pick_device, say
from configurator import UserError, check, configure, run
from eval_exits import bits_per_byte, depth_statistics, evaluate, weight_statistics, windows
from fast.machine import commit, machine
from papers import measures
from papers.plan import EPOCH_STEPS, RESULTS, SEEDS, TABLES, all_runs
from papers.tables import show
from prepare import data_of, load_meta, load_tokens, prepare
from quant import bit_linears, latent_weights

# tokens of each split in Paper A's regime: an epoch, and what is read on the way and at the end
SHORT_TEXT = {'train': EPOCH_STEPS * 8 * 64, 'val': 2 ** 15, 'test': 2 ** 16}
COMMIT = commit()

def short_text():
    """data/short: the first SHORT_TEXT tokens of each split of pydocs."""
    whole, folder = prepare('pydocs'), Path('data/short/pydocs-bytes')
    if (folder / 'meta.json').exists():
        return
    aside, meta = folder.with_name('aside'), load_meta(whole)
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(whole, aside)
    for split, size in SHORT_TEXT.items():
        tokens = np.array(load_tokens(whole, split)[:size])
        tokens.tofile(aside / f'{split}.bin')
        meta['splits'][split] = {
            'tokens': len(tokens), 'bytes': len(tokens), 'documents': int((tokens == 0).sum()),
            'sha256': hashlib.sha256(tokens.tobytes()).hexdigest()}
    (aside / 'meta.json').write_text(json.dumps(meta, indent=1), encoding='utf-8')
    aside.rename(folder)

def do(r):
    """Train the run's model, or go on training it, and write what it measures."""
    if 'data/short' in TABLES[r.table].cells[r.label]:
        short_text()
    command = r.command()
    words = [sys.executable, *command, f'--out_dir={r.out_dir}']
    if (r.out_dir / 'last.pt').exists():
        words.append('--init_from=resume')
    say(f'\n{r.table}: {" ".join(command)}')
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True)
    result = {'command': f'python {" ".join(command)}', 'commit': COMMIT,
              'machine': machine(pick_device('auto')), 'seed': r.seed, 'rate': r.rate,
              'date': time.strftime('%Y-%m-%d')}
    if done.returncode and 'diverged' not in done.stderr:
        raise UserError(f'{" ".join(words)} failed: {done.stderr.strip()[-200:]}')
    result |= {'diverged': done.stderr.strip()} if done.returncode else measure(r.out_dir)
    with atomic_write(str(r.path), 'w') as file:
        json.dump(result, file)

def measure(folder):
    """What tables and plots want of a trained model: nats on the test text at every exit, by
    document at full depth, and on the validation text; what its weights are."""
    path = os.path.join(folder, 'ckpt.pt')
    model, settings = open_model(path, pick_device('auto'))
    meta, tokens = data_of(settings, 'test')
    progress = load_checkpoint(os.path.join(folder, 'last.pt'))['progress']
    as_run = hasattr(model.config, 'block_norm')  # papers/as_run.py
    report = measures.report(model, tokens) if as_run else None
    found = {'minutes': round(progress['seconds'] / 60, 1), 'steps': progress['iter'],
             'val': progress['val_loss'],
             'exits': report['ternary'][0] if as_run else evaluate(
                 model, tokens, range(model.config.n_layer)),
             'documents': document_losses(model, tokens),
             'weights': weight_statistics(model), 'parameters': sum(
                 p.numel() for p in model.parameters())}
    found['bits_per_byte'] = bits_per_byte(found['exits'][-1], meta, 'test')
    found['std'], found['gates'] = depth_statistics(model, tokens)
    if as_run:
        found['as_run'], s = report, model.config
        found['alpha'] = measures.decay_ratio(model, s, load_checkpoint(path)['progress']['iter'])
    elif bit_linears(model):
        with latent_weights(model):
            found['latent'] = evaluate(model, tokens)[-1]
    log = [json.loads(line) for line in open(os.path.join(folder, 'log.jsonl'), encoding='utf-8')]
    found['curve'] = [[e['iter'], round(e['val_loss'], 4)] for e in log if 'val_loss' in e]
    return found

@torch.no_grad()
def document_losses(model, tokens, eot=0):
    """[[nats, tokens], ...] of each document of the text at full depth: for intervals."""
    losses = []
    for idx, targets in windows(tokens, model.config.block_size, 16):
        logits = model(idx.to(model.device))[0].flatten(0, 1).float().cpu()
        losses.append(F.cross_entropy(logits, targets.flatten(), reduction='none'))
    losses = torch.cat(losses).double()
    document = torch.from_numpy(np.cumsum(tokens[:-1] == eot)).long()  # of each predicted token
    sums = torch.zeros(int(document.max()) + 1, dtype=torch.float64).index_add(0, document, losses)
    counts = torch.bincount(document, minlength=len(sums))
    return [[round(a, 3), b] for a, b in zip(sums.tolist(), counts.tolist()) if b]

def train_all(tables, seeds):
    """Do every run that is missing. Other processes may be doing the same."""
    while True:
        missing = [r for table in tables for r in all_runs(table, seeds) if not r.path.exists()]
        if not missing:
            return
        for r in missing:
            with contextlib.suppress(Timeout), FileLock(f'{r.out_dir}.run', blocking=False):
                if not r.path.exists():
                    do(r)
                    break  # its result may tell what to do next
        else:
            time.sleep(5)  # what is missing is being done elsewhere

@dataclass
class AblateSettings:
    """Trains the cells of a table that have not been trained, and prints what they measure."""
    table: str = 'ladder'  # which one, several with commas, or all
    seeds: int = 3  # runs of each cell
    fresh: bool = False  # train again what the repository has figures of

    def __post_init__(self):
        check(self, {'seeds': (1, len(SEEDS))})

def main(argv):
    s = configure(AblateSettings, argv)
    keep_freed_memory()
    names = list(TABLES) if s.table == 'all' else s.table.split(',')
    for name in names:
        if name not in TABLES:
            raise UserError(f"there is no table '{name}'; there are {', '.join(TABLES)} and all")
    for name in names:
        runs = all_runs(name, s.seeds)
        done = [r.result() for r in runs if r.path.exists()]
        dates = sorted({d['date'] for d in done}) or ['-']
        hours = sum(d.get('minutes', 0) for d in done) / 60
        say(f'{name}: {len(done)} of {len(runs)} runs are read from papers/results (trained '
            f'{dates[0]} to {dates[-1]}); --fresh=True would train them again, about {hours:.1f} '
            'hours of one thread')
        if s.fresh and (RESULTS / name).exists():
            say(f'{RESULTS / name} is moved to {RESULTS / name}.before')
            os.rename(RESULTS / name, f'{RESULTS / name}.before')
    train_all(names, s.seeds)
    for name in names:
        show(name, s.seeds)

if __name__ == '__main__':
    run(main)
