"""What all scripts need: a device, files that are whole, processes, interrupts."""
import contextlib
import ctypes
import itertools
import os
import secrets
import signal

os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # idle threads sleep; torch must come later
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from configurator import UserError  # noqa: E402

def pick_device(name):
    """torch.device of cpu, cuda, cuda:1, mps or auto. UserError if this machine has none."""
    if name == 'auto':
        mps = torch.backends.mps.is_available()
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        return torch.empty(0, device=name if name[:3] in ('cpu', 'cud', 'mps') else 'none').device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"device '{name}' is not here; --device=auto picks one that is") from None

def pick_dtype(name, device):
    """'float32' or 'bfloat16'. 'auto' is bfloat16 on a GPU that multiplies it natively."""
    native = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
    return name if name != 'auto' else 'bfloat16' if native else 'float32'

def autocast(device, dtype):
    """Matrix products in bfloat16, if asked; weights and all that is delicate stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == 'bfloat16')

def synchronize(device):  # before a clock is read
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)

def can_compile(device):
    """Whether torch.compile works here. It needs a C++ compiler and the headers of Python."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
        return True
    except Exception as error:  # each part of it has errors of its own
        why = ' '.join(str(error).split())[:150]
        say(f'--compile does not work here, and training goes on without it: {why}')
        return False

def keep_freed_memory():
    """Tell glibc to keep large freed blocks. A training step asks for the same tensors again, and
    fresh pages cost more than the arithmetic: elementwise operations get 2 to 8 times faster."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no Linux with glibc
        mallopt = ctypes.CDLL('libc.so.6').mallopt
        mallopt(-3, 2 ** 31 - 1) or mallopt(-3, 2 ** 25)  # M_MMAP_THRESHOLD
        mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD

def say(*text):
    """print, in the main process."""
    if os.environ.get('RANK', '0') == '0':
        print(*text, flush=True)

def require_suffix(flag, path, suffix):
    """`path`, unless it names another kind of file: a model, say, that would be overwritten."""
    if not path.endswith(suffix):
        raise UserError(f'{flag}={path} should end in {suffix}: it names the file to write')
    return path

@contextlib.contextmanager
def atomic_write(path, mode='wb'):
    """A file to write. It takes the place of `path` when the block has ended without an error."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    aside = f'{path}.{secrets.token_hex(4)}.tmp'  # each writer has its own
    try:
        with open(aside, mode.replace('w', 'x'), encoding=None if 'b' in mode else 'utf-8') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind a RuntimeError
        full = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(full, OSError):
            full.filename = full.filename or path
            raise full from None
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)

def move_aside(path):
    """Rename a file or folder to the first free of path.1, path.2, ... and return that name."""
    aside = next(f'{path}.{n}' for n in itertools.count(1) if not os.path.lexists(f'{path}.{n}'))
    os.rename(path, aside)
    return aside

class Processes:
    """The processes that train together: one, or those of torchrun (gloo on CPU, nccl on CUDA)."""

    def __init__(self, device):
        self.rank = int(os.environ.get('RANK', 0))
        self.world = int(os.environ.get('WORLD_SIZE', 1))
        self.device, self.is_main = device, self.rank == 0
        if self.world > 1:
            if device.type == 'cuda':
                self.device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
                torch.cuda.set_device(self.device)
            # DDP imports this. After the next line, its defaults would keep the group for good.
            from torch.distributed.nn import functional  # noqa: F401
            dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')

    def sum(self, tensor):  # over all processes, in place, the same on each
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag):  # whether it is true in one of them, the same on each
        where = self.device if self.world > 1 else 'cpu'  # alone, no GPU is asked
        return self.sum(torch.tensor(float(bool(flag)), device=where)).item() > 0

    def close(self):  # stop the threads that exchange tensors, before Python ends
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()

@contextlib.contextmanager
def interrupts():
    """A list that Ctrl-C or SIGTERM puts something in. The second raises KeyboardInterrupt."""
    wanted = []

    def handle(*what):
        if wanted:
            raise KeyboardInterrupt
        wanted.append(what)
        os.write(2, b'\nstops after this step (Ctrl-C again: at once)\n')
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wanted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
