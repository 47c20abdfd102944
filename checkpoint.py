"""
Runs on disk. A run is a folder out/<name>/ with

    ckpt.pt     the best model by validation loss: model, settings, meta (of its data), progress
    last.pt     the same at the newest step, and the optimizer's state: what resuming needs
    log.jsonl   the settings, then one line of metrics per log step

Every file is written aside, flushed to disk and renamed, so that whatever happens, what stands under a name is whole:
either the old content or the new. (But for log.jsonl, to which lines are added: an accident may leave half of the
last.) Checkpoints hold tensors and plain values only and load with weights_only=True, so a checkpoint from a stranger
cannot run code.
"""
import contextlib
import glob
import json
import os
import zipfile

import torch
from filelock import FileLock, Timeout  # which torch requires

from configurator import UserError, is_out_of_memory
from model import BitSkip, BitSkipConfig
from packed import load_packed

DATA = 'dataset', 'tokenizer', 'source', 'data_dir'  # the settings that lead to a run's data: prepare's arguments
# what the scripts read from a checkpoint beside the model
TYPES = {'settings': dict.fromkeys(DATA, str) | {'seed': int},
         'meta': {'dataset': str, 'tokenizer': str, 'vocab_size': int, 'splits': dict},
         'progress': {'iter': int, 'last_eval': int, 'val_loss': float, 'bad_evals': int, 'seconds': float}}


@contextlib.contextmanager
def atomic_write(path, mode='wb'):
    """A file open for writing that appears under `path` only when the block has ended without an error."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    aside = f'{path}.tmp'
    try:
        with open(aside, mode, encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        fsync_folder(folder)  # the rename itself must survive a power cut, too
    except BaseException as error:
        if os.path.exists(aside):
            os.unlink(aside)
        if isinstance(error, OSError):
            error.filename = error.filename or path
        raise


@contextlib.contextmanager
def exclusive(path, wait=True):
    """with exclusive(path) as mine: of several processes one at a time is in here, by the lock file `path`.lock.

    The others wait, or with wait=False come in at once, with mine False. The system lets go of what a dead process
    held."""
    path = f'{path}.lock'
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:  # leave no trace; who waits for a lock that is gone makes a new one
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        lock.release()


def fsync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(path, checkpoint):
    with atomic_write(path) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # torch buries a full disk under a complaint of its own
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load(path, device='cpu'):
    """The dict that `save` wrote, on `device`. UserError if the file is missing, damaged, or something else."""
    if not os.path.isfile(path):
        hint = ('without --init_from=resume training starts from scratch' if os.path.basename(path) == 'last.pt' else
                'python train.py config/bitskip_h_ee.py config/cpu.py makes one, and python pack.py a packed one')
        raise UserError(f'there is no checkpoint {path}; {hint}')
    try:
        with zipfile.ZipFile(path) as archive:  # torch's format: an archive with a checksum for every tensor
            if sum(record.file_size for record in archive.infolist()) > os.path.getsize(path):
                raise zipfile.BadZipFile('it would inflate to more than it is')
            if archive.testzip():
                raise zipfile.BadZipFile('a checksum is wrong')
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # reading arbitrary bytes can fail in any way
        if isinstance(error, PermissionError) or is_out_of_memory(error):
            raise
        raise UserError(f'{path} is damaged or not a checkpoint ({" ".join(str(error).split())[:80]}); '
                        'copy it again or train anew') from None
    expected = {'model', 'settings', 'meta', 'progress'}
    if not isinstance(checkpoint, dict) or not expected <= checkpoint.keys():
        raise UserError(f'{path} is not a BitSkip checkpoint: it should hold {", ".join(sorted(expected))}')
    model = checkpoint['model']
    if not (isinstance(model, dict) and all(isinstance(name, str) and torch.is_tensor(model[name]) for name in model)):
        raise UserError(f'{path} is a checkpoint of another model or program: it should hold weights by name')
    if not all(t.layout == torch.strided and not t.is_meta and not t.is_complex() for t in tensors(checkpoint)):
        raise UserError(f'{path} is a checkpoint of another program: its tensors are sparse, complex or empty shells')
    for part, types in TYPES.items():
        try:
            json.dumps(checkpoint[part])  # plain values only
            wrong = [key for key, kind in types.items() if type(checkpoint[part].get(key, kind())) is not kind]
        except (TypeError, ValueError, AttributeError, RecursionError):
            wrong = ['what it holds']
        if wrong:
            raise UserError(f'{path} is a checkpoint of another model or program: see {wrong[0]} in its {part}')
    return checkpoint


def tensors(tree):
    """All tensors in nested dicts and lists, one after another."""
    if torch.is_tensor(tree):
        yield tree
    for branch in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ():
        yield from tensors(branch)


def told(part, *keys):
    """The values of `keys` in a part of a checkpoint, its settings say. UserError if it lacks one."""
    for key in keys:
        if key not in part:
            raise UserError(f"this checkpoint does not tell its '{key}': train.py did not write it")
    return [part[key] for key in keys]


def build_model(checkpoint, path):
    """The BitSkip model that a checkpoint holds, in eval mode. UserError if its parts do not fit together."""
    try:
        config, state = BitSkipConfig.of(checkpoint['settings']), checkpoint['model']
        if config.n_layer > len(state):
            raise ValueError(f'it has no {config.n_layer} layers')  # rather than building them first
        if checkpoint.get('packed'):
            model = load_packed(config, state)
        else:
            model = BitSkip(config)
            model.load_state_dict(state)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f'{path} is a checkpoint of another model ({" ".join(str(error).split())[:120]})') from None
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise UserError(f'{path} holds weights that are not finite numbers: its model has diverged')
    return model.eval()


def load_checkpoint(path, device='cpu'):
    """(model, settings) of the checkpoint at `path`: a BitSkip in eval mode, and the dict of its run's settings.

    settings['meta'] tells of the data: tokenizer, vocabulary, counts. UserError as `load` and `build_model`."""
    checkpoint = load(path, device)
    model = build_model(checkpoint, path).to(device)
    return model, checkpoint['settings'] | {'meta': checkpoint['meta'], 'progress': checkpoint['progress']}


def find_run(out_dir=''):
    """`out_dir`, or the newest run under out/, which is then named. UserError if there is none."""
    if out_dir:
        return out_dir
    runs = glob.glob(os.path.join('out', '*', 'ckpt.pt'))
    if not runs:
        raise UserError('no run in out/; python train.py config/bitskip_h_ee.py config/cpu.py makes one, '
                        'or name a folder: --out_dir=...')
    newest = os.path.dirname(max(runs, key=os.path.getmtime))
    print(f'run: {newest} (the newest; --out_dir=... for another)')
    return newest
