"""
The machine under a run: device, precision, memory, its description, interrupts, and where its metrics show.
"""
import contextlib
import ctypes
import os
import platform
import shutil
import signal
import subprocess
import sys

import torch

from configurator import UserError


def pick_device(name):
    """torch.device of 'auto' (CUDA, then Apple's MPS, then CPU) or of a name such as 'cuda:1'. UserError if absent."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
        if device.type not in ('cpu', 'cuda', 'mps'):
            raise RuntimeError('torch has more kinds of devices than we can train on')
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device '{name}' is not available here; --device=auto picks one that is") from None
    return device


def synchronize(device):
    """Wait until the device has done what it was asked to do: before a clock is read."""
    if device.type != 'cpu':
        torch.accelerator.synchronize()


def pick_dtype(name, device):
    """'float32' or 'bfloat16', which is what 'auto' means on a GPU that multiplies it natively. (A CPU that can may
    still be slower at it: of two with AVX-512 BF16, one took 0.9 and one 1.4 times as long for a training step.)"""
    if name != 'auto':
        return name
    native = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    return 'bfloat16' if native else 'float32'


def autocast(device, dtype):
    """Matrix products in bfloat16 where asked; weights and everything delicate stay in float32."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, dtype))


def keep_freed_memory():
    """Tell glibc not to hand large freed blocks back to the system. Each training step asks for the same tensors
    again, and fresh pages cost more than the arithmetic done on them: elementwise operations get 2 to 8 times faster.
    Elsewhere than on Linux with glibc this does nothing."""
    if sys.platform == 'linux':
        with contextlib.suppress(OSError, AttributeError):
            libc, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = ctypes.CDLL('libc.so.6'), -1, -3
            libc.mallopt(M_MMAP_THRESHOLD, 2 ** 31 - 1) or libc.mallopt(M_MMAP_THRESHOLD, 2 ** 25)  # older ones' most
            libc.mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def commit():
    """The commit that the code is at, with a + where it differs from that; '' without git."""
    if shutil.which('git') is None:
        return ''
    options = dict(capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    head = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], **options).stdout.strip()
    differs = subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', '*.py', '*.c'], **options).returncode
    return head + '+' * (differs == 1)


def machine():
    """The processor and the threads in use."""
    model = platform.processor()
    if os.path.exists('/proc/cpuinfo'):
        names = [line.split(':')[1].strip() for line in open('/proc/cpuinfo') if line.startswith('model name')]
        model = names[0] if names else model
    cpu = f'{model}, {torch.get_num_threads()} threads'
    return f'{torch.cuda.get_device_name() if torch.cuda.is_available() else cpu}, torch {torch.__version__}'


class Interrupts:
    """with Interrupts() as interrupts: Ctrl-C and SIGTERM raise KeyboardInterrupt in here, except inside
    `with interrupts.held():`, where they wait until it ends. Of several processes (together=True) none stops alone in
    the middle of what they compute together: they wait until `agree` is called, by all, and raises it in all."""

    def __init__(self, together=False):
        self.holding, self.pending = int(together), False

    def __enter__(self):
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, *_):
        if not self.holding:
            raise KeyboardInterrupt
        self.pending = True

    @contextlib.contextmanager
    def held(self):
        self.holding += 1
        yield
        self.holding -= 1
        if self.pending and not self.holding:
            self.pending = False
            raise KeyboardInterrupt

    def agree(self, processes):
        if processes.world > 1 and processes.any(self.pending):
            raise KeyboardInterrupt


def metrics_board(name, out_dir, settings, step):
    """A function of dicts of metrics, 'iter' among them, that shows them in 'tensorboard', 'wandb' (Weights & Biases)
    or nowhere ('none'). What a board shows of later steps than `step` belongs to a run that was killed, and goes."""
    if name == 'tensorboard':
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(out_dir, purge_step=step + 1)

        def show(metrics):
            for key, value in metrics.items():
                writer.add_scalar(key, value, metrics['iter'])
            writer.flush()
        return show
    if name == 'wandb':
        import wandb
        try:
            board = wandb.init(project='bitskip', name=os.path.basename(out_dir), dir=out_dir, config=settings,
                               resume='auto')
        except wandb.Error as error:
            raise UserError(f'wandb does not start ({str(error).rstrip(".")}); the environment variable '
                            'WANDB_MODE=offline lets it run without account and network') from None
        return lambda metrics: board.log(metrics, step=metrics['iter'])
    return lambda metrics: None
