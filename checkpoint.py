"""
Runs on disk: a folder with ckpt.pt (the best model on validation text), last.pt (the newest state,
with the optimizer), log.jsonl, and packed.pt, if export/pack.py made ckpt.pt small.

A checkpoint is a dict: model (weights by name), model_class, settings, meta (of the data), progress
and, in last.pt, the optimizer. It loads with weights_only=True: it cannot run code.
"""
import glob
import json
import math
import os
import zipfile
from dataclasses import asdict

from common import atomic_write, move_aside, say
import torch

from configurator import UserError, class_name, find_class, is_out_of_memory, side_room
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

# ---- a run that train.py makes: its settings s tell the folder ----

def start(s, meta):
    """The folder of a new run. A run that is there already is moved aside, never overwritten."""
    if os.path.exists(f'{s.out_dir}/ckpt.pt') or os.path.exists(f'{s.out_dir}/last.pt'):
        say(f'{s.out_dir} held an earlier run, which is now in {move_aside(s.out_dir)}')
    with atomic_write(f'{s.out_dir}/log.jsonl', 'w') as file:
        file.write(json.dumps({'settings': asdict(s), 'meta': meta}) + '\n')

def log(s, **metrics):  # a line of log.jsonl
    with open(f'{s.out_dir}/log.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps(metrics) + '\n')

def save(s, name, model, meta, progress, optimizer=None):
    """ckpt.pt, or, with the optimizer, last.pt."""
    progress['log_size'] = os.path.getsize(f'{s.out_dir}/log.jsonl')
    state = {'model': model.state_dict(), 'model_class': class_name(type(model)),
             'settings': asdict(s), 'meta': meta, 'progress': dict(progress)}
    state |= {'optimizer': optimizer.state_dict()} if optimizer is not None else {}
    save_checkpoint(f'{s.out_dir}/{name}', state)

def resume(model, optimizer, saved, s, is_main):
    """Take over what `save` wrote, to go on from it bit-exactly. Returns its progress."""
    try:
        if (name := saved.get('model_class', 'model:BitSkip')) != class_name(type(model)):
            raise ValueError(f'it is a {name}')
        model.load_state_dict(saved['model'])
        groups = optimizer.state_dict()['param_groups']  # rate, decay, betas: of today's settings
        optimizer.load_state_dict({'state': saved['optimizer']['state'], 'param_groups': groups})
        for p, state in optimizer.state.items():
            shapes = {name: moment.shape for name, moment in state.items()}
            if shapes != {'step': (), 'exp_avg': p.shape, 'exp_avg_sq': p.shape}:
                raise ValueError('its optimizer is for other parameters')
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = ' '.join(str(error).split())[:120]
        raise UserError(f'{s.out_dir}/last.pt does not fit these settings ({why})') from None
    log_path, size = f'{s.out_dir}/log.jsonl', saved['progress'].get('log_size', math.inf)
    if is_main and os.path.exists(log_path) and os.path.getsize(log_path) > size:
        os.truncate(log_path, size)  # the rest is logged again
    return dict(saved['progress'])

def start_from(model, saved, s):
    """Take over the weights of a finished model. Parts that it lacks, gates say, start anew."""
    same_gates = saved['settings'].get('gate_loss') == s.gate_loss  # else they start anew
    state, own = model.adopt(saved['model']), model.state_dict()
    state = {name: w for name, w in state.items() if same_gates or not name.startswith('gates.')}
    odd = [name for name, w in state.items() if name not in own or own[name].shape != w.shape]
    odd += [name for name in own if name not in state and not name.startswith(model.new_parts)]
    if odd:
        raise UserError(f'the model in {s.init_from} does not fit these settings: see its {odd[0]}')
    model.load_state_dict(state, strict=False)

# ---- a run that is there ----

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
