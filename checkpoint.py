"""
Runs on disk. A run is a folder out/<name>/ with

    ckpt.pt     the best model by validation loss: {'model', 'settings', 'meta', 'iter', 'val_loss'}
    last.pt     the same for the newest step, plus 'optimizer', 'best' and 'bad_evals': what resuming needs
    log.jsonl   the settings, then one line of metrics per log step

Every file is written aside, flushed to disk and renamed, so that whatever happens, what stands under a name is whole:
either the old content or the new. Checkpoints hold tensors and plain values only and load with weights_only=True,
so a checkpoint from a stranger cannot run code.
"""
import contextlib
import os


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
    except BaseException:
        if os.path.exists(aside):
            os.unlink(aside)
        raise


def fsync_folder(folder):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
