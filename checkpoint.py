"""
Runs on disk: a folder with ckpt.pt (the best model on validation text), last.pt (the newest state,
with the optimizer), log.jsonl, and packed.pt, if export/pack.py made ckpt.pt small.

A checkpoint is a dict: model (weights by name), model_class, settings, meta (of the data), progress
and, in last.pt, the optimizer. It loads with weights_only=True: it cannot run code.
"""
import glob
import os
import zipfile

from common import atomic_write, say
import torch

from configurator import UserError, find_class, is_out_of_memory, side_room
from model import BitSkip

def save_checkpoint(path, checkpoint):
    with atomic_write(path) as file:
        torch.save(checkpoint, file)

def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. UserError if it is missing or damaged."""
    if not os.path.isfile(path):
        raise UserError(f'there is no checkpoint {path}; train.py makes one from scratch')
    try:
        with zipfile.ZipFile(path) as archive:  # it has a checksum for every tensor
            if archive.testzip():
                raise ValueError('a checksum is wrong')
        found = torch.load(path, 'cpu', weights_only=True)
        if lacks := {'model', 'settings', 'meta', 'progress'} - found.keys():
            raise ValueError(f'it has no {lacks.pop()}')
    except Exception as error:  # reading arbitrary bytes can fail in any way
        if isinstance(error, PermissionError) or is_out_of_memory(error):
            raise
        why = ' '.join(repr(error).split())[:120]
        raise UserError(f'{path} is damaged, or not a checkpoint of train.py: {why}') from None
    return found

def find_run(out_dir=''):
    """`out_dir`, or else the newest run in out/, which is then named."""
    if out_dir:
        return out_dir
    runs = sorted(glob.glob('out/*/ckpt.pt') + glob.glob('out/*/packed.pt'), key=os.path.getmtime)
    if not runs:
        raise UserError('no run in out/: python train.py config/bitskip_h_ee.py config/cpu.py '
                        'makes one, or name a folder: --out_dir=...')
    say(f'run: {os.path.dirname(runs[-1])} (the newest; --out_dir=... for another)')
    return os.path.dirname(runs[-1])

def run_file(out_dir, name=''):
    """The path of a checkpoint in a run's folder; of ckpt.pt, or else packed.pt, without a name."""
    paths = [os.path.join(out_dir, n) for n in ([name] if name else ['ckpt.pt', 'packed.pt'])]
    return next(filter(os.path.exists, paths), paths[0])

# settings that are gone, and the only value of each that today's code still follows
REMOVED = {'ee_share': 1.0, 'ee_leave': 0.0, 'gate_detach': False, 'skip_schedule': 'quadratic',
           'skip_last': False, 'ee_curriculum': 'none', 'ee_ramp': 'none', 'ee_detach_head': False,
           'ee_adapter': 0, 'ee_distill': 0.0, 'freeze': False, 'init_scale': 1.0, 'causal': True,
           'unshifted': 'none', 'train_latent': False}

def of_today(settings):
    """The settings of a checkpoint, by today's names. UserError if it needs what is gone."""
    for name, value in REMOVED.items():
        if settings.get(name, value) != value:
            raise UserError(f'this model needs {name}={settings[name]!r}, a setting that is gone; '
                            'commit 8d883b7 of this project has it')
    return settings | ({'exit_norm': 'raw'} if settings.get('final_norm') is False else {})

def open_model(path, device='cpu'):
    """(model, settings) of a checkpoint: a BitSkip or the subclass that it names, in eval mode, and
    its run's settings, with the `meta` of its data. UserError if its parts do not fit together."""
    checkpoint = load_checkpoint(path)
    state = checkpoint['model']
    try:
        settings = of_today(checkpoint['settings'])
        if checkpoint.get('packed'):
            model = side_room('fast', True).load_packed(checkpoint | {'settings': settings})
        else:
            Model = find_class(checkpoint.get('model_class', 'model:BitSkip'), BitSkip)
            with torch.device('meta'):  # nothing is allocated before all fits
                model = Model(Model.Config.of(settings))
            model.load_state_dict({name: w.float() for name, w in state.items()}, assign=True)
    except (UserError, RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        why = ' '.join(str(error).split())[:200]
        raise UserError(f'{path} cannot be opened as a model: {why}') from None
    return model.to(device).eval(), settings | {'meta': checkpoint['meta']}
