"""
Train a BitSkip model.

    python train.py config/bitskip_h_ee.py config/cpu.py            H + EE at a scale for two CPU cores, ten minutes
    python train.py config/bitskip_h_ee.py                          Paper A's scale: needs a GPU
    python train.py config/... --init_from=resume                   go on where a run was stopped
    torchrun --nproc_per_node=4 train.py config/bitskip_h_ee.py     four GPUs (or, with gloo, four CPU processes)
    torchrun --nproc_per_node=4 train.py config/... --fsdp=True     a model too large for each of them (parallel.py)

Step k of a run is a pure function of (settings, weights and optimizer state after k-1 steps, k): every micro-batch
seeds the random numbers of its data, layer skipping, gates and dropout from (seed, step, micro-batch). So a resumed run
needs no generator states to be bit-exact, and n processes with m micro-batches each take the same step as one process
with n*m.
"""
import json
import math
import os
import shutil
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
from configurator import UserError, build, collect, run
from eval_exits import bits_per_byte, evaluate, perplexity
from exits import curriculum_weights, exit_weights, ramp
from model import BitSkip, BitSkipConfig
from parallel import Processes, forget_skipped, gathered, replicate, scattered, shard
from prepare import default_tokenizer, load_meta, load_tokens, prepare
from quant import int8_support, latent_weights
from runtime import Interrupts, autocast, keep_freed_memory, metrics_board, pick_device, pick_dtype
from tokenizer import vocabulary


@dataclass
class TrainSettings(BitSkipConfig):
    """The run. Defaults: Paper A's set-up (section 4)."""
    dataset: str = 'wikitext2'  # pydocs, wikitext2, tinystories, or a path to text (see prepare.py)
    tokenizer: str = ''  # 'gpt2' or 'bytes'; empty: the data set's own
    source: str = ''  # folder with a local copy of a published data set
    data_dir: str = 'data'  # where prepared data lie
    out_dir: str = ''  # where the run is kept; empty: out/ and the names of the config files
    init_from: str = 'scratch'  # resume: go on from out_dir/last.pt; a run's folder: start from its model
    freeze: bool = False  # train only what exits have of their own, adapters and gates, on a finished model
    batch_size: int = 32  # sequences in a micro-batch
    gradient_accumulation_steps: int = 4  # micro-batches in a step, over all processes
    max_iters: int = 10000  # steps at most
    eval_interval: int = 100  # steps between evaluations, which also save
    log_interval: int = 10  # steps between lines in log.jsonl
    log_to: Literal['none', 'tensorboard', 'wandb'] = 'none'  # show the lines of log.jsonl there, too
    patience: int = 3  # stop after so many evaluations without improvement; 0: never
    learning_rate: float = 6e-4  # the peak
    min_lr: float = 0.0  # at the end
    warmup_iters: int = 100  # steps of linear warm-up, but at most a tenth of max_iters
    schedule: Literal['wsd', 'linear', 'cosine'] = 'wsd'  # after warm-up: stable then decay, or straight, or cosine
    decay_frac: float = 0.2  # share of all steps that wsd decays over
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: any
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # of matrix products; auto: bfloat16 on a GPU that has it
    compile: bool = False  # torch.compile each block
    fsdp: bool = False  # with torchrun: processes share one model, instead of each having all of it (parallel.py)
    ee_ramp: Literal['none', 'up', 'down'] = 'none'  # lambda_ee grows from 0, or shrinks to 0, over the run
    train_latent: bool = False  # experiment: no straight-through, train W itself and ternarize afterwards
    seed: int = 7  # of everything random

    def __post_init__(self):
        if self.freeze:  # what is learned is learned from the model as it is used
            self.p_max = self.dropout = self.ee_leave = 0.0
        super().__post_init__()
        if not 1 <= self.batch_size <= 2 ** 20:
            raise ValueError(f'batch_size is 1 to {2 ** 20}, got {self.batch_size}')
        for name in ('gradient_accumulation_steps', 'max_iters', 'eval_interval', 'log_interval'):
            if getattr(self, name) < 1:
                raise ValueError(f'{name} is at least 1, got {getattr(self, name)}')
        if self.log_to != 'none' and find_spec(self.log_to) is None:
            raise ValueError(f'--log_to={self.log_to} needs a package: pip install {self.log_to}; without it '
                             'log.jsonl has the same metrics')
        for name in ('beta1', 'beta2'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f'{name} is at least 0 and below 1, got {getattr(self, name)}')
        if not 0 <= self.decay_frac <= 1:
            raise ValueError(f'decay_frac is a share, 0 to 1, got {self.decay_frac}')
        for name in ('patience', 'learning_rate', 'min_lr', 'warmup_iters', 'weight_decay', 'grad_clip', 'seed'):
            if not getattr(self, name) >= 0:
                raise ValueError(f'{name} is at least 0, got {getattr(self, name)}')
        learns_cost = self.gate_dim and self.lambda_r and self.gate_loss == 'cost'
        if learns_cost and not 0 <= self.target_exit < self.n_layer:  # (checked here: a finished model may have any)
            raise ValueError(f'target_exit={self.target_exit} is outside the model: its {self.n_layer} layers are 0 to '
                             f'{self.n_layer - 1}, and --target_exit=none means half of them')


# ----------------------------------------------------------------------------------------------------------------------
# pure functions of the step

def get_lr(step, s):
    """The learning rate of step 0, 1, ... max_iters-1."""
    # 1) linear warm-up to the peak
    warmup_iters = min(s.warmup_iters, s.max_iters // 10)
    if step < warmup_iters:
        return s.learning_rate * (step + 1) / (warmup_iters + 1)
    # 2) how much of the decay is still ahead: 1 at its start, 0 at the end
    decay_iters = s.max_iters * s.decay_frac if s.schedule == 'wsd' else s.max_iters - warmup_iters
    ahead = min(1.0, (s.max_iters - step) / max(1, decay_iters))
    # 3) from peak to min_lr, straight or along a cosine
    if s.schedule == 'cosine':
        ahead = 0.5 - 0.5 * math.cos(math.pi * ahead)
    return s.min_lr + (s.learning_rate - s.min_lr) * ahead


def seed_microbatch(seed, step, micro):
    """Everything random in one micro-batch follows from this."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, micro]).generate_state(1)[0]))


def get_batch(tokens, batch_size, block_size, device):
    """Random windows of the training text: idx and targets, each (B, T) int64, targets one token ahead."""
    starts = torch.randint(len(tokens) - block_size, (batch_size,)).tolist()
    windows = torch.stack([torch.from_numpy(tokens[i:i + block_size + 1].astype(np.int64)) for i in starts])
    if torch.device(device).type == 'cuda':
        windows = windows.pin_memory()  # so that the copy need not wait for the GPU
    windows = windows.to(device, non_blocking=True)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# the run

class Diverged(UserError):
    """Loss or gradient are not finite any more."""


def make_optimizer(model, s):
    """AdamW; weight decay on matrices (embedding and head among them), not on norms."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': s.weight_decay}, {'params': vectors, 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)


def load_optimizer(optimizer, saved):
    """Take over the moments that the state_dict `saved` holds; learning rate, decay and betas follow the settings.
    ValueError, or others, if they are not those of our parameters."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group['params']))  # as saved['state']
    state = {i: {name: scattered(moment, parameters.get(i)) for name, moment in moments.items()}
             for i, moments in saved['state'].items()}
    optimizer.load_state_dict({'state': state, 'param_groups': optimizer.state_dict()['param_groups']})
    for p, state in optimizer.state.items():
        shapes = {name: moment.shape for name, moment in state.items()}
        if shapes != {'step': (), 'exp_avg': p.shape, 'exp_avg_sq': p.shape}:
            raise ValueError('its optimizer is for other parameters')


class Run:
    """A training run: model, optimizer, data and progress, and the folder that keeps them."""

    def __init__(self, s):
        self.device = pick_device(s.device)
        self.processes = Processes(self.device)
        s.dtype = pick_dtype(s.dtype, self.device)  # a resumed run keeps the choice
        self.device, self.rank, self.world = self.processes.device, self.processes.rank, self.processes.world
        if s.gradient_accumulation_steps % self.world:
            raise UserError(f'gradient_accumulation_steps={s.gradient_accumulation_steps} counts the micro-batches of '
                            f'all processes, so it must be a multiple of their number, {self.world}')
        if s.fsdp and self.world == 1:
            raise UserError('--fsdp=True lets several processes share a model: start them with torchrun, as in '
                            'torchrun --nproc_per_node=2 train.py ... --fsdp=True')
        folder = self.processes.first_then_all(lambda: prepare(s.dataset, s.tokenizer, s.source, s.data_dir))
        self.meta = load_meta(folder)
        self.train_tokens, self.val_tokens = load_tokens(folder, 'train'), load_tokens(folder, 'val')
        if len(self.train_tokens) <= s.block_size:
            raise UserError(f'the training text has {len(self.train_tokens)} tokens, too few for one window of '
                            f'block_size={s.block_size}; take more text or a smaller --block_size')
        s.vocab_size = self.meta['vocab_size']
        self.s = s
        torch.manual_seed(s.seed)
        self.model = BitSkip(BitSkipConfig.of(asdict(s)))
        if s.freeze:
            if s.init_from == 'scratch':
                raise UserError('--freeze=True trains exits on a finished model: name its run, as in '
                                '--init_from=out/bitskip_h-cpu')
            if not (self.model.adapters and s.lambda_ee or self.model.gates and s.lambda_r):
                raise UserError('--freeze=True trains adapters by lambda_ee and gates by lambda_r, and this run has '
                                'neither pair: take --ee_adapter=16 --lambda_ee=1 or --gate_dim=32 --lambda_r=1')
            self.model.requires_grad_(False)
            self.model.adapters.requires_grad_(True)
            self.model.gates.requires_grad_(True)
        if s.fsdp:
            shard(self.model, self.device)
        self.model.to(self.device)
        self.optimizer = make_optimizer(self.model, s)
        # progress: steps done, the step of the newest evaluation, the best loss, evaluations since then, seconds
        self.progress = {'iter': 0, 'last_eval': 0, 'val_loss': math.inf, 'bad_evals': 0, 'seconds': 0.0}
        self.log_path = os.path.join(s.out_dir, 'log.jsonl')

    # -- the folder

    def path(self, name):
        return os.path.join(self.s.out_dir, name)

    def start(self):
        """A new run. One that is in the folder already is moved aside, never overwritten."""
        out = Path(self.s.out_dir)
        if (out / 'ckpt.pt').exists() or (out / 'last.pt').exists():
            if out.resolve() in (Path.cwd(), *Path.cwd().parents):
                raise UserError(f'{out} holds a run, and you are inside it: choose another --out_dir')
            aside = next(p for n in range(1, 10 ** 6) if not (p := out.with_name(f'{out.name}.{n}')).exists())
            shutil.move(out, aside)
            print(f'{out} held an earlier run, which is now in {aside}')
        out.mkdir(parents=True, exist_ok=True)
        with checkpoint.atomic_write(self.log_path, 'w') as file:
            file.write(json.dumps({'settings': asdict(self.s), 'meta': self.meta}) + '\n')

    def load_weights(self, state, strict=True):
        """model.load_state_dict of whole tensors, of which FSDP takes its part."""
        ours = self.model.state_dict()
        return self.model.load_state_dict({name: scattered(weight, ours.get(name)) for name, weight in state.items()},
                                          strict)

    def start_from(self, saved):
        """Take over the weights of a finished model. Adapters and gates may be new; gates are, where they learned by
        another gate_loss."""
        same_gates = saved['settings'].get('gate_loss', 'cost') == self.s.gate_loss
        state = {name: weight for name, weight in saved['model'].items()
                 if same_gates or not name.startswith('gates.')}
        try:
            missing, odd = self.load_weights(state, strict=False)
        except RuntimeError as error:
            missing, odd = [], error.args[0].splitlines()[1:]
        odd += [name for name in missing if not name.startswith(('adapters.', 'gates.'))]
        if odd:
            raise UserError(f'the model in {self.s.init_from} does not fit these settings: it differs in '
                            f'{odd[0].strip()[:120]}')

    def resume(self, saved):
        """Take over a state that `save` wrote, to go on from it bit-exactly."""
        if saved['meta'].get('splits') != self.meta['splits']:
            raise UserError(f'the data have changed since {self.path("last.pt")} was written, so the run cannot be '
                            'continued; start a new one, without --init_from=resume')
        try:
            self.load_weights(saved['model'])
            load_optimizer(self.optimizer, saved['optimizer'])
            self.progress = {name: saved['progress'][name] for name in self.progress}
            if min(self.progress.values()) < 0:
                raise ValueError('less than nothing was done')
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f'{self.path("last.pt")} does not fit these settings '
                            f'({" ".join(str(error).split())[:120]})') from None
        if self.processes.is_main:  # forget what was logged after this state: it will be logged again
            lines = Path(self.log_path).read_bytes().splitlines() if os.path.exists(self.log_path) else []
            kept = [line for line in lines if is_logged_by(line, self.progress)]
            with checkpoint.atomic_write(self.log_path) as file:
                file.writelines(line + b'\n' for line in kept)

    def save(self, name, with_optimizer):
        state = {'model': self.model.state_dict(), 'settings': asdict(self.s), 'meta': self.meta,
                 'progress': dict(self.progress)}
        if with_optimizer:
            state['optimizer'] = self.optimizer.state_dict()
        state = gathered(state, keep=self.processes.is_main)  # by all processes
        if self.processes.is_main:
            checkpoint.save(self.path(name), state)

    def log(self, **metrics):
        if self.processes.is_main:
            with open(self.log_path, 'a') as file:
                file.write(json.dumps(metrics) + '\n')
            self.show(metrics)

    # -- training

    def train(self):
        """Steps and evaluations until max_iters, or until patience is at its end: True. Ctrl-C saves: False."""
        s, progress = self.s, self.progress
        self.module = self.model
        if s.compile:  # (a cached Hadamard matrix is as good as one computed again)
            warnings.filterwarnings('ignore', 'Dynamo detected a call to a `functools.lru_cache`')
            for block in self.model.blocks:
                block.compile()
        if self.world > 1 and not s.fsdp:
            self.module = replicate(self.model)
        self.bar = tqdm(total=s.max_iters, initial=progress['iter'], disable=None if self.processes.is_main else True,
                        bar_format='{n}/{total} |{bar:12}| {desc} ETA {remaining}', dynamic_ncols=True)
        board = s.log_to if self.processes.is_main else 'none'
        self.show = metrics_board(board, s.out_dir, asdict(s), progress['iter'])
        self.clock = time.perf_counter() - progress['seconds']
        with Interrupts(together=self.world > 1) as self.interrupts:
            try:
                while True:
                    self.interrupts.agree(self.processes)
                    done = progress['iter']
                    is_last = done >= s.max_iters
                    if done > progress['last_eval'] and (is_last or done % s.eval_interval == 0):
                        self.evaluate_and_save()
                    if is_last or (s.patience and progress['bad_evals'] >= s.patience):
                        break
                    self.step()
            except KeyboardInterrupt:
                with self.interrupts.held():
                    self.bar.close()
                    self.save('last.pt', with_optimizer=True)
                    self.say(f'\nstopped after {progress["iter"]} steps, nothing lost; the same command with '
                             '--init_from=resume goes on')
                return False
        self.bar.close()
        return True

    def step(self):
        """One optimizer step, and its line in the log."""
        s, done, started = self.s, self.progress['iter'], time.perf_counter()
        losses = self.forward_backward(done)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.grad_clip or math.inf)
        grad_norm = gathered(grad_norm).item()
        total = losses['total']
        self.require_finite(f'step {done}: the loss is {total}, its gradient {grad_norm}', total, grad_norm)
        lr = get_lr(done, s)
        for group in self.optimizer.param_groups:
            group['lr'] = lr
        tokens = s.gradient_accumulation_steps * s.batch_size * s.block_size
        with self.interrupts.held():  # a step is taken, counted and logged, or nothing of it
            self.optimizer.step()
            tokens_per_s = tokens / (time.perf_counter() - started)
            self.progress['iter'] += 1
            self.progress['seconds'] = time.perf_counter() - self.clock
            if self.progress['iter'] % s.log_interval == 0:
                self.log(iter=self.progress['iter'], **losses, lr=lr, grad_norm=grad_norm, tok_per_s=tokens_per_s,
                         seconds=self.progress['seconds'])
        self.bar.set_description_str(f'loss {losses["ce"]:.3f} PPL {perplexity(losses["ce"]):.4g} '
                                     f'{tokens_per_s / 1000:.1f}k tok/s', refresh=False)
        self.bar.update()

    def forward_backward(self, step):
        """The gradient of one step into .grad; the losses, averaged over its micro-batches: dict of floats."""
        s = self.s
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        micros = range(self.rank, s.gradient_accumulation_steps, self.world)  # this process's share
        ee_weights = curriculum_weights(exit_weights(s.n_layer, s.ee_weighting), s.ee_curriculum, step, s.max_iters)
        ee_weights *= ramp(s.ee_ramp, step, s.max_iters)
        # while lambda_ee is 0, at a ramp's foot, a frozen model's adapters have no gradient
        learns = not s.freeze or bool(s.lambda_r and self.model.gates) or bool(ee_weights.any())
        total = 0
        for micro in micros:
            seed_microbatch(s.seed, step, micro)
            idx, targets = get_batch(self.train_tokens, s.batch_size, s.block_size, self.device)
            # DDP exchanges gradients once a step; FSDP at once, since all of them would not fit anywhere
            synchronize = self.world == 1 or s.fsdp or micro == micros[-1]
            with nullcontext() if synchronize else self.module.no_sync():
                latent = latent_weights(self.model) if s.train_latent else nullcontext()
                with autocast(self.device, s.dtype), latent, torch.set_grad_enabled(learns):
                    _, losses = self.module(idx, targets, return_logits=False, ee_weights=ee_weights)
                if learns:
                    (losses['total'] / len(micros)).backward()
            total = total + torch.stack([loss.detach() for loss in losses.values()])
        if s.fsdp:
            forget_skipped(self.model.blocks, self.processes)
        total = self.processes.sum(total) / s.gradient_accumulation_steps
        return dict(zip(losses, total.tolist()))

    def require_finite(self, found, *numbers):
        if all(map(math.isfinite, numbers)):
            return
        saved = self.path('last.pt')
        keep = f'the last good state, {saved}, is unharmed' if os.path.exists(saved) else 'nothing was saved yet'
        raise Diverged(f'{found}: training has diverged; {keep}; try a lower --learning_rate than '
                       f'{self.s.learning_rate:g}, a longer --warmup_iters or a smaller --grad_clip')

    def evaluate_and_save(self):
        """Loss over the whole validation split, with ternary weights (of a frozen model: the mean over its exits);
        then save what resuming needs."""
        progress = self.progress
        layers = range(self.s.n_layer) if self.s.freeze else None  # a frozen model's last layer stays what it is
        with autocast(self.device, self.s.dtype):
            losses = evaluate(self.model, self.val_tokens, layers, self.s.batch_size, self.processes)
        loss = sum(losses) / len(losses)
        self.require_finite(f'step {progress["iter"]}: the validation loss is {loss}', loss)
        gates_only = self.s.freeze and not (self.model.adapters and self.s.lambda_ee)
        with self.interrupts.held():
            progress['last_eval'] = progress['iter']
            if loss < progress['val_loss'] or gates_only:  # gates do not change an exit's loss: the newest are best
                progress['val_loss'], progress['bad_evals'] = loss, 0
                self.save('ckpt.pt', with_optimizer=False)
            else:
                progress['bad_evals'] += 1
            # the line comes before the state that says it is there: of a run killed between, it is written again
            self.log(iter=progress['iter'], val_loss=loss, val_ppl=perplexity(loss), best=progress['val_loss'])
            self.save('last.pt', with_optimizer=True)
        if self.processes.is_main:
            self.bar.write(f'step {progress["iter"]}: {self.describe(loss)}'
                      + (f', no better than {progress["val_loss"]:.4f}' if progress['bad_evals'] else ''))

    def describe(self, loss):
        kind = 'full precision' if self.s.linear == 'fp' else 'ternary weights'
        return (f'val loss {loss:.4f}, PPL {perplexity(loss):.4g}, {bits_per_byte(loss, self.meta):.3f} bits per byte '
                f'({self.meta["tokenizer"]}, {kind})')

    def say(self, text):
        if self.processes.is_main:
            print(text)


def is_logged_by(line, progress):
    """Whether this line of log.jsonl belongs to a run at this point of its progress."""
    try:
        entry = json.loads(line)
        limit = progress['last_eval'] if 'val_loss' in entry else progress['iter']
        return entry.get('iter', 0) <= limit
    except (ValueError, TypeError, AttributeError, RecursionError):  # half a line, of a killed process, or not ours
        return False


def training_flops(s):
    """Floating-point operations in the matrix products of the whole run: 2 a weight forward, 4 backward, per token."""
    with torch.device('meta'):
        model = BitSkip(BitSkipConfig.of(asdict(s)))
    exits = s.ee_share if s.ee_positions == 'sampled' else s.n_layer - 1
    heads = 1 + (exits if s.lambda_ee else 0)  # as many as read a token
    vocab_size = vocabulary(s.tokenizer or default_tokenizer(s.dataset))  # the data may not be prepared yet
    weights = model.quantizable_parameters() + heads * s.n_embd * vocab_size
    return 6 * weights * s.max_iters * s.gradient_accumulation_steps * s.batch_size * s.block_size


def estimate_hours(s):
    """How long the whole run may take on this CPU, by a quick measurement of its speed."""
    a, fastest = torch.ones(1024, 1024), math.inf
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        fastest = min(fastest, time.perf_counter() - started)
    return training_flops(s) / (2 * 1024 ** 3 / fastest) / 3600


def is_config(arg):
    return arg.endswith('.py') and not arg.startswith('--')


def read_settings(argv):
    """(settings, None) of this command line, or (settings, saved state) where it builds on a run. To resume: the run's
    own settings hold, the config files only name its folder, and flags come on top (--max_iters to train on, say).
    From another run's model: that run's settings, then config files and flags on top."""
    names = [Path(arg).stem for arg in argv if is_config(arg)]
    values, saved = collect(TrainSettings, argv), None
    out_dir = os.path.normpath(values['out_dir'] or os.path.join('out', '-'.join(names) or 'bitskip'))
    init_from = values['init_from']
    if init_from != 'scratch':
        resumes = init_from == 'resume'
        saved = checkpoint.load(os.path.join(out_dir, 'last.pt') if resumes else os.path.join(init_from, 'ckpt.pt'))
        known = {field.name for field in fields(TrainSettings)} - {'fsdp'}  # which is this launch's matter
        base = {key: value for key, value in saved['settings'].items() if key in known}
        values = collect(TrainSettings, [arg for arg in argv if not (resumes and is_config(arg))], base)
    return build(TrainSettings, values | {'out_dir': out_dir, 'init_from': init_from}), saved


def main(argv):
    """Train by this command line; True at the end, False if it was interrupted."""
    s, saved = read_settings(argv)
    is_main = os.environ.get('RANK', '0') == '0'
    with checkpoint.exclusive(s.out_dir, wait=False) if is_main else nullcontext(True) as mine:
        if not mine:
            raise UserError(f'{s.out_dir} is being trained by another process; wait until it ends, or name another '
                            'folder: --out_dir=...')
        return train(argv, s, saved)


def train(argv, s, saved):
    """The run that these settings describe, which starts from, or goes on with, a saved state or None. As `main`."""
    keep_freed_memory()
    torch.set_float32_matmul_precision('high')  # TF32, on GPUs that have it; nothing changes on a CPU
    if pick_device(s.device).type == 'cpu' and 'RANK' not in os.environ and (hours := estimate_hours(s)) > 2:
        print(f'on this CPU the whole run takes about {hours:,.0f} hours; config/cpu.py shrinks any recipe to '
              f'minutes:\n  python train.py {" ".join(argv)} config/cpu.py')
    training = Run(s)
    if s.init_from == 'resume':
        training.resume(saved)
    else:
        if saved:
            training.start_from(saved)
        if training.processes.is_main:
            training.start()
    del saved  # three times the model
    training.processes.barrier()
    fast, how = int8_support(training.device.type)
    millions = sum(p.numel() for p in training.model.parameters()) / 1e6
    quantizable = training.model.quantizable_parameters() / 1e6
    together = f' and {training.world - 1} more, {"FSDP" if s.fsdp else "DDP"}' if training.world > 1 else ''
    training.say(f'{s.out_dir}: {s.linear}, {millions:.1f}M parameters ({quantizable:.1f}M quantizable), '
                 f'{s.n_layer} layers, on {training.device}{together}, {s.dtype}; '
                 + (how if fast else f'fake quantization in floats, since {how}'))
    finished = training.train()
    progress = training.progress
    if finished:
        early = f' --exit_layer {max(0, s.n_layer - 2)}' if s.lambda_ee else ''  # else its exits were not trained
        folder = '' if Path(s.out_dir).parent == Path('out') else f' --out_dir={s.out_dir}'  # where the scripts look
        training.say(f'best: {training.describe(progress["val_loss"])}\n'
                     f'after {progress["iter"]} steps and {progress["seconds"] / 60:.1f} minutes; model in '
                     f'{training.path("ckpt.pt")}\nnext:\n'
                     f'  python sample.py{folder}{early}\n  python eval_exits.py{folder}')
    training.module = None  # a DDP wrapper must go before its process group
    training.processes.close()
    return finished


if __name__ == '__main__':
    run(main)
