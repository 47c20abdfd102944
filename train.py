"""
Train a BitSkip model.

    python train.py config/bitskip_h_ee.py config/cpu.py            H + EE, minutes on two CPU cores
    python train.py config/bitskip_h_ee.py                          Paper A's scale: needs a GPU
    python train.py config/... --init_from=resume                   go on where a run was stopped
    torchrun --nproc_per_node=4 train.py config/bitskip_h_ee.py     four GPUs, or four CPU processes

Each micro-batch seeds its random numbers from (seed, step, micro-batch). So a resumed run is
bit-exact, and n processes take the step that one takes, up to rounding.
A run is a folder, out/<configs>/ (checkpoint.py).
"""
import math
import os
import shlex
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Literal

from common import (Processes, autocast, can_compile, interrupts, keep_freed_memory, pick_device,
                    pick_dtype, say)  # before torch: it sets OMP_WAIT_POLICY
import numpy as np
from filelock import FileLock, Timeout
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from checkpoint import load_checkpoint, log, of_today, resume, save, start, start_from
from configurator import UserError, build, check, collect, configs_of, run
from eval_exits import bits_per_byte, evaluate, perplexity
from model import BitSkip, BitSkipConfig
from prepare import data_of, load_meta, load_tokens, prepare
from quant import int8_support

@dataclass
class TrainSettings(BitSkipConfig):
    """The run. Defaults: Paper A's set-up (section 4)."""
    dataset: str = 'wikitext2'  # pydocs, wikitext2, tinystories, a path, or user/name (prepare.py)
    tokenizer: str = ''  # gpt2 or bytes; empty: the data set's own
    source: str = ''  # folder with a local copy of a published data set
    data_dir: str = 'data'  # where prepared data lie
    out_dir: str = ''  # where the run is kept; empty: out/ and the names of the config files
    init_from: str = 'scratch'  # resume: go on; a run's folder: start from its model
    batch_size: int = 32  # sequences in a micro-batch
    gradient_accumulation_steps: int = 4  # micro-batches in a step, over all processes
    max_iters: int = 10000  # steps at most
    eval_interval: int = 100  # steps between evaluations, which also save
    log_interval: int = 10  # steps between lines in log.jsonl
    patience: int = 3  # stop after so many evaluations without improvement; 0: never
    learning_rate: float = 6e-4  # the peak
    min_lr: float = 0.0  # what the decay runs towards
    warmup_iters: int = 100  # steps of linear warm-up, but at most a tenth of max_iters
    schedule: Literal['wsd', 'linear', 'cosine'] = 'wsd'  # wsd: warm up, stay, decay
    decay_frac: float = 0.2  # share of all steps that wsd decays over
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of products; auto: bfloat16 on GPUs
    compile: bool = False  # torch.compile each block
    threads: int = 0  # of the CPU; 0: PyTorch's own number
    seed: int = 7  # of everything random

    def __post_init__(self):
        super().__post_init__()
        check(self, LIMITS)
        if self.gate_dim and self.lambda_r and self.gate_loss == 'cost':
            check(self, {'target_exit': (0, self.n_layer - 1)})

def train(s, saved, Model):
    """The run that these settings describe, from scratch or from a checkpoint. Returns as main."""
    torch.set_num_threads(s.threads or torch.get_num_threads())
    processes = Processes(pick_device(s.device))
    s.dtype = pick_dtype(s.dtype, processes.device)  # a resumed run keeps the choice
    if s.gradient_accumulation_steps % processes.world:
        raise UserError(f'--gradient_accumulation_steps={s.gradient_accumulation_steps} cannot be '
                        f'dealt out to {processes.world} processes: take a multiple of that')
    data = meta, train_tokens, _ = load_data(s, saved)
    if len(train_tokens) <= s.block_size:
        raise UserError(f'the training text has {len(train_tokens)} tokens, too few for '
                        f'block_size={s.block_size}; take more text or a smaller --block_size')
    s.vocab_size = meta['vocab_size']
    torch.manual_seed(s.seed)
    model = Model(Model.Config.of(asdict(s))).to(processes.device)
    optimizer = make_optimizer(model, s)
    progress = {'iter': 0, 'last_eval': 0, 'val_loss': math.inf, 'bad_evals': 0, 'seconds': 0.0}
    if s.init_from == 'resume':
        progress = resume(model, optimizer, saved, s, processes.is_main)
    else:
        if saved:
            start_from(model, saved, s)
        if processes.is_main:
            start(s, meta)
    if s.compile and can_compile(processes.device):
        for block in model.blocks:
            block.compile()
    n_all, n_projected = sum(p.numel() for p in model.parameters()), model.quantizable_parameters()
    say(f'{s.out_dir}: {n_all / 1e6:.1f}M parameters, {n_projected / 1e6:.1f}M in projections '
        f'({s.linear})\n  {s.dtype} on {processes.world} x {processes.device} '
        f'({int8_support(processes.device.type)[1]})')
    finished = loop(s, model, optimizer, progress, data, processes)
    if processes.is_main:
        conclude(s, meta, progress, finished)
    processes.close()
    return finished

def loop(s, model, optimizer, progress, data, processes):
    """Steps and evaluations to the end: True. Ctrl-C saves after the step under way: False."""
    meta, train_tokens, val_tokens = data
    parallel = model
    if processes.world > 1:  # (a block that all samples skip has no gradient: find_unused)
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
    bar = tqdm(total=s.max_iters, initial=progress['iter'], disable=not processes.is_main or None,
               bar_format='{n}/{total} |{bar:10}| {desc} ETA {remaining}', dynamic_ncols=True)
    clock = time.perf_counter() - progress['seconds']
    with interrupts() as wanted, bar:
        while True:
            step = progress['iter']
            due = step % s.eval_interval == 0 or step == s.max_iters
            if due and step > progress['last_eval']:
                bar.set_description_str('evaluating')
                evaluate_and_save(s, model, optimizer, progress, meta, val_tokens, processes)
            finished = step >= s.max_iters or 0 < s.patience <= progress['bad_evals']
            if finished or processes.any(wanted):
                break
            # one step: gradient, clip, update
            started, lr = time.perf_counter(), get_lr(step, s)
            model.train()
            optimizer.zero_grad(set_to_none=True)
            losses = gradient(parallel, train_tokens, s, step, processes)
            losses['grad_norm'] = clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
            losses = dict(zip(losses, torch.stack([*losses.values()]).tolist()))  # waits for a GPU
            require_finite(s, f'step {step}: loss, gradient', losses['total'], losses['grad_norm'])
            for group in optimizer.param_groups:
                group['lr'] = lr
            optimizer.step()
            progress |= {'iter': step + 1, 'seconds': time.perf_counter() - clock}
            tokens = s.gradient_accumulation_steps * s.batch_size * s.block_size
            speed = tokens / (time.perf_counter() - started)
            if processes.is_main and (step + 1) % s.log_interval == 0:
                log(s, iter=step + 1, **losses, lr=lr, tok_per_s=speed, seconds=progress['seconds'])
            bar.set_description_str(f'loss {losses["ce"]:.3f} {speed / 1000:.1f}k tok/s', False)
            bar.update()
    if processes.is_main and not finished:
        save(s, 'last.pt', model, meta, progress, optimizer)
    return finished

def gradient(model, tokens, s, step, processes):
    """The gradient of one step into .grad; its losses, a mean over micro-batches: dict of scalars.
    model: the BitSkip, or DDP around it."""
    micros = range(processes.rank, s.gradient_accumulation_steps, processes.world)  # our share
    sums = 0
    for micro in micros:
        seed_microbatch(s.seed, step, micro)
        idx, targets = get_batch(tokens, s.batch_size, s.block_size, processes.device)
        exchange = processes.world == 1 or micro == micros[-1]
        with nullcontext() if exchange else model.no_sync():  # DDP exchanges after the last only
            with autocast(processes.device, s.dtype):
                _, losses = model(idx, targets, return_logits=False)
            (losses['total'] / len(micros)).backward()  # adds to .grad
        sums = sums + torch.stack([loss.detach() for loss in losses.values()])
    return dict(zip(losses, processes.sum(sums) / s.gradient_accumulation_steps))

def get_batch(tokens, batch_size, block_size, device):
    """Random windows of the text: idx and targets (B, T) int64, targets one token ahead."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
    windows = [torch.from_numpy(tokens[i:i + block_size + 1].astype(np.int64)) for i in starts]
    windows = torch.stack(windows).to(device, non_blocking=True)  # (B, T + 1)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

def seed_microbatch(seed, step, micro):
    """Everything random in one micro-batch follows from this."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro]).generate_state(1)[0]))

def make_optimizer(model, s):
    """AdamW, with weight decay on matrices (embedding and head among them), not on norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in trained if p.dim() >= 2 or model.decay_all]
    rest = [p for p in trained if p.dim() < 2 and not model.decay_all]
    groups = [{'params': decay, 'weight_decay': s.weight_decay},
              {'params': rest, 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)

def get_lr(step, s):
    """The learning rate of step 0, 1, ... max_iters-1."""
    # 1) linear warm-up to the peak
    warmup_iters = min(s.warmup_iters, s.max_iters // 10)
    if step < warmup_iters:
        return s.learning_rate * (step + 1) / (warmup_iters + 1)
    # 2) how much of the decay is still ahead: 1 at its start, 0 at the end
    wsd = s.schedule == 'wsd'
    decay_iters = s.max_iters * s.decay_frac if wsd else s.max_iters - warmup_iters
    ahead = min(1.0, (s.max_iters - step) / max(1, decay_iters))
    # 3) from peak to min_lr, straight or along a cosine
    if s.schedule == 'cosine':
        ahead = 0.5 - 0.5 * math.cos(math.pi * ahead)
    return s.min_lr + (s.learning_rate - s.min_lr) * ahead

# ---- around the loop ----

LIMITS = dict.fromkeys(('batch_size', 'gradient_accumulation_steps', 'max_iters', 'eval_interval',
                        'log_interval'), (1, math.inf))
LIMITS |= dict.fromkeys(('patience', 'learning_rate', 'min_lr', 'warmup_iters', 'weight_decay',
                         'grad_clip', 'seed', 'threads'), (0, math.inf))
LIMITS |= {'beta1': (0, 0.999999), 'beta2': (0, 0.999999), 'decay_frac': (0, 1)}

def evaluate_and_save(s, model, optimizer, progress, meta, val_tokens, processes):
    """The loss on the whole validation text; last.pt and, if the model is the best, ckpt.pt."""
    step = progress['iter']
    with autocast(processes.device, s.dtype):
        loss = evaluate(model, val_tokens, batch_size=s.batch_size, processes=processes)[-1]
    require_finite(s, f'step {step}: validation loss', loss)
    better = loss < progress['val_loss']
    progress |= {'last_eval': step, 'val_loss': min(loss, progress['val_loss']),
                 'bad_evals': 0 if better else progress['bad_evals'] + 1}
    if processes.is_main:
        if better:
            save(s, 'ckpt.pt', model, meta, progress)
        log(s, iter=step, val_loss=loss, best=progress['val_loss'])
        save(s, 'last.pt', model, meta, progress, optimizer)
        with tqdm.external_write_mode():
            say(f'step {step}: {describe(meta, loss)}' + ', not best' * (not better))

def read_settings(argv, Settings):
    """(settings, None), or (settings, checkpoint) where the run builds on another. To resume, the
    run's own settings hold; config files only name its folder, and flags come on top."""
    values, configs, saved = collect(Settings, argv), configs_of(Settings, argv), None
    name = '-'.join(os.path.basename(c).removesuffix('.py') for c in configs) or 'bitskip'
    out_dir = os.path.normpath(values['out_dir'] or os.path.join('out', name))
    init_from = values['init_from']
    if init_from != 'scratch':
        resumes = init_from == 'resume'
        folder, name = (out_dir, 'last.pt') if resumes else (init_from, 'ckpt.pt')
        saved = load_checkpoint(os.path.join(folder, name))
        old = of_today(saved['settings'])
        base = {f.name: old[f.name] for f in fields(Settings) if f.name in old}
        values = collect(Settings, [a for a in argv if not (resumes and a in configs)], base)
        for key in (*BitSkipConfig.__dataclass_fields__, 'dataset', 'tokenizer', 'seed'):
            if resumes and values[key] != base.get(key, values[key]):
                raise UserError(f'{out_dir} has {key}={base[key]!r}; a run that goes on keeps that')
    return build(Settings, values | {'out_dir': out_dir, 'init_from': init_from}), saved

def load_data(s, saved):
    """meta, training tokens, validation tokens. A run that is resumed goes on with its own."""
    if s.init_from == 'resume':
        own = asdict(s) | {'meta': saved['meta']}
        return *data_of(own, 'train'), data_of(own, 'val')[1]
    folder = prepare(s.dataset, s.tokenizer, s.source, s.data_dir)
    return load_meta(folder), load_tokens(folder, 'train'), load_tokens(folder, 'val')

def require_finite(s, found, *numbers):
    if not all(map(math.isfinite, numbers)):
        kept = os.path.exists(f'{s.out_dir}/last.pt')
        raise UserError(f'{found} = {", ".join(map(str, numbers))}: training has diverged; '
                       f'{s.out_dir + "/last.pt is whole" if kept else "nothing is saved"}; try a '
                       f'lower --learning_rate than {s.learning_rate:g} or a longer --warmup_iters')

def describe(meta, loss):
    return (f'val loss {loss:.4f}, PPL {perplexity(loss):.4g}, '
            f'{bits_per_byte(loss, meta):.3f} bits per byte')

def conclude(s, meta, progress, finished):
    if not finished:
        return say(f'stopped after {progress["iter"]} steps; --init_from=resume goes on')
    folder, early = shlex.quote(s.out_dir), f' --exit_layer {max(0, s.n_layer - 2)}'
    say(f'best: {describe(meta, progress["val_loss"])}\n{progress["iter"]} steps in '
        f'{progress["seconds"] / 60:.1f} minutes; next:\n  python sample.py --out_dir={folder}'
        f'{early if s.lambda_ee else ""}\n  python eval_exits.py --out_dir={folder}')

def main(argv, Settings=TrainSettings, Model=BitSkip):
    """Train by this command line: True at the end, False if it was interrupted. A variant of the
    model trains through here, too: it passes its own Settings and Model (papers/)."""
    keep_freed_memory()
    torch.set_float32_matmul_precision('high')  # TF32, on GPUs that have it
    s, saved = read_settings(argv, Settings)
    if s.n_embd >= 512 and pick_device(s.device).type == 'cpu':
        say('a model of this size trains for days on a CPU; add config/cpu.py to train for minutes')
    is_main = os.environ.get('RANK', '0') == '0'
    try:
        with FileLock(f'{s.out_dir}.lock', blocking=False) if is_main else nullcontext():
            return train(s, saved, Model)
    except Timeout:
        raise UserError(f'{s.out_dir} is being trained by another process; wait until it ends, or '
                        'name another folder: --out_dir=...') from None

if __name__ == '__main__':
    run(main)
