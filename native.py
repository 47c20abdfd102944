"""
Native decoding: a whole step of the model in one call of C (native.c), for batch 1 on a CPU.

    decoder = native.Decoder(model, head='int8')
    logits, layer = decoder.step(prompt)                       # (1, V), and the layer that the last token left at
    logits, layer = decoder.step([token], exit_mode='gate')
    decoder.length = 100                                       # forget the tokens from position 100 on

At batch 1 PyTorch spends its time between the operations, not in them. In C a step costs what it takes to read the
weights, and ternary weights are small: 2 bits each, in blocks that `ternary_blocks` draws. Numerics are those of
model.py up to the rounding of float32 sums; head='int8' rounds the head's weights to 8 bits, too.

native.c is compiled when it is first needed, by the system's C compiler, in about a second, and kept in the user's
cache folder under the hash of all that it depends on. Where that fails, `available()` says why, and decode.py serves.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from typing import NamedTuple

import torch
import torch.nn.functional as F

from hadamard import next_pow2, signs
from quant import weight_ternary

SOURCE = pathlib.Path(__file__).with_name('native.c')
FLAGS = ['-std=gnu11', '-O3', '-shared', '-fPIC', '-ffp-contract=off', '-fno-math-errno', '-fno-trapping-math',
         '-Wno-psabi']
ISAS = ('portable C', 'AVX2', 'AVX-512 VNNI')  # native.c's numbers for them


# ----------------------------------------------------------------------------------------------------------------------
# the library

def available():
    """(True, how) if this machine can decode natively, else (False, why not). Builds the library at the first call."""
    lib, reason = library()
    return lib is not None, reason


@functools.cache
def library():
    """(native.c as a ctypes library, how it runs), or (None, why there is none)."""
    try:
        lib = load(cache_folder())
    except BuildError as error:
        return None, str(error)
    lib.step.argtypes = [ctypes.POINTER(CDecoder), ctypes.POINTER(CStep)]
    lib.step.restype = None
    lib.workspace_bytes.argtypes, lib.workspace_bytes.restype = [ctypes.POINTER(CDecoder)], ctypes.c_int64
    return lib, f'native decoding ({ISAS[lib.best_isa()]})'


class BuildError(Exception):
    pass


def load(folder):
    """The library from `folder`, built first if it is not there yet. BuildError if that cannot be done."""
    compiler = os.environ.get('CC') or next(filter(shutil.which, ('cc', 'gcc', 'clang')), None)
    key = '\0'.join([SOURCE.read_text(encoding='utf-8'), *FLAGS, compiler or '', platform.system(), platform.machine()])
    path = folder / f'native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
    if not path.exists():
        if compiler is None:
            raise BuildError('there is no C compiler here (cc, gcc or clang, or the one that CC names)')
        build(shlex.split(compiler), path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f'the built library does not load: {error}') from None


def build(compiler, path):
    """Compile native.c to `path`: with OpenMP or, where the compiler has none, without."""
    aside = path.with_suffix(f'.{os.getpid()}.tmp')  # renamed when whole: another process may be building, too
    for openmp in (['-fopenmp'], []):
        command = [*compiler, *FLAGS, *openmp, '-o', str(aside), str(SOURCE), '-lm']
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f'the C compiler {compiler[0]} does not run: {error}') from None
        if result.returncode == 0:
            os.replace(aside, path)
            return
    message = (result.stderr.strip().splitlines() or ['no message'])[0]
    raise BuildError(f'the C compiler {compiler[0]} cannot build native.c: {message[:200]}')


def cache_folder():
    """The user's own folder for built libraries; where that cannot be written, one that lasts as long as we do."""
    folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'bitskip'
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return pathlib.Path(temporary_folder().name)


@functools.cache
def temporary_folder():
    return tempfile.TemporaryDirectory(prefix='bitskip-')  # removed at exit


# ----------------------------------------------------------------------------------------------------------------------
# layouts
#
# The kernels take 16 rows of a matrix at a time, one in each 4-byte lane of a 64-byte block. vpdpbusd multiplies the
# four bytes of every lane with four int8 inputs, the same for all lanes, and adds them to the lane's int32: when the
# blocks of these rows are through, the 16 lanes are 16 rows of the product. No sum across lanes, no transposition.
#
#     one block        row 0          row 1                row 15
#     64 bytes    | 0  1  2  3  | 4  5  6  7  |   ...  | 60 61 62 63 |
#
#     int8        byte 4r + j  =  w[r, j] + 128                                             16 rows x 4 columns
#
#     ternary     byte 4r + j  =  | w[r, 12+j] + 1 | w[r, 8+j] + 1 | w[r, 4+j] + 1 | w[r, j] + 1 |     16 rows x
#                                   bits 7, 6        bits 5, 4       bits 3, 2       bits 1, 0         16 columns
#                 (block >> 2s) & 3 is then a block of codes for columns 4s ... 4s + 3
#
# Weights are stored unsigned, as the instruction wants one of its operands; the kernels' callers take the excess off:
# sum_k (w + 1) x = sum_k w x + sum_k x.

def ternary_blocks(codes):
    """codes (rows, cols) int8 in {-1, 0, 1} -> (rows / 16, cols / 16, 64) uint8, both rounded up (padding is 0)."""
    c = to_multiples(codes + 1, 16, 16).unflatten(1, (-1, 4, 4)).unflatten(0, (-1, 16))  # (R, 16, blocks, s, j)
    byte = c[..., 0, :] | c[..., 1, :] << 2 | c[..., 2, :] << 4 | c[..., 3, :] << 6  # (R, 16, blocks, j)
    return byte.transpose(1, 2).flatten(2).contiguous().view(torch.uint8)


def int8_blocks(codes):
    """codes (rows, cols) int8 -> (rows / 16, cols / 4, 64) uint8; rows and cols are padded to multiples of 16."""
    c = to_multiples(codes, 16, 16).unflatten(1, (-1, 4)).unflatten(0, (-1, 16))  # (R, 16, blocks, j)
    return c.transpose(1, 2).flatten(2).contiguous().view(torch.uint8) ^ 128  # x ^ 128 is x + 128, modulo 256


def to_multiples(x, rows, cols):
    return F.pad(x, (0, -x.shape[1] % cols, 0, -x.shape[0] % rows))


def int8_rows(w):
    """w (rows, cols), floating -> codes (rows, cols) int8, scales (rows,) float32: w ~ codes * scales, max|code| 127."""
    scales = w.float().abs().amax(dim=1).clamp(min=1e-12) / 127
    return (w / scales[:, None]).round_().to(torch.int8), scales


# ----------------------------------------------------------------------------------------------------------------------
# packing

class Packed(NamedTuple):
    """A model as native.c reads it: the tensors by name ('0.qkv.codes', 'head', ...), and the BitSkipConfig."""
    config: object
    tensors: dict


def pack(config, weights, head='int8', embedding='fp32'):
    """The model of `config` with `weights`, its state dict, as Packed.

    A weight may be a tensor or, if it has been quantized already, a pair (codes int8, scale): a projection's as from
    quant.weight_ternary, the head's and the embedding's as from int8_rows. head, embedding: 'int8' rounds a float
    tensor to 8 bits with one scale a row, 'fp32' leaves it. ValueError if the model has no ternary weights."""
    if config.linear == 'fp':
        raise ValueError("native decoding is for ternary weights, and this model has linear='fp'")
    for name, kind in (('head', head), ('embedding', embedding)):
        if kind not in ('int8', 'fp32'):
            raise ValueError(f"{name} is 'int8' or 'fp32', got {kind!r}")
    tensors = {'norm': floats(weights['norm.weight'])}
    for name, kind in (('embedding', embedding), ('head', head)):
        w = weights[f'{name}.weight']
        if kind == 'int8' and torch.is_tensor(w):
            w = int8_rows(w)
        if torch.is_tensor(w):
            tensors[name] = floats(w)
        else:
            codes, scales = w
            tensors[name] = (int8_blocks(codes) if name == 'head' else codes).contiguous()
            tensors[f'{name}_scales'] = F.pad(floats(scales), (0, -len(scales) % 16))
    for layer in range(config.n_layer):
        for name, parts in projections(config).items():
            pairs = [weights[f'blocks.{layer}.{part}.weight'] for part in parts]
            codes, scales = zip(*(weight_ternary(w) if torch.is_tensor(w) else w for w in pairs))
            scales = torch.cat([floats(scale).expand(len(c)) for c, scale in zip(codes, scales)])  # (rows,)
            tensors[f'{layer}.{name}.codes'] = ternary_blocks(torch.cat(codes))
            tensors[f'{layer}.{name}.scales'] = F.pad(scales, (0, -len(scales) % 16))
        for name in ('attn_norm', 'attn.sub_norm', 'ffn_norm', 'ffn.sub_norm'):
            if f'blocks.{layer}.{name}.weight' in weights:
                tensors[f'{layer}.{name}'] = floats(weights[f'blocks.{layer}.{name}.weight'])
        if config.gate_dim and layer < config.n_layer - 1:
            for name in ('w1', 'w2'):
                tensors[f'{layer}.gate.{name}'] = floats(weights[f'gates.{layer}.{name}.weight'])
    return Packed(config, tensors)


def projections(config):
    """The four matrices of a block, and the projections that each consists of (they share their input)."""
    return {'qkv': ['attn.q', 'attn.k', 'attn.v'], 'o': ['attn.o'],
            'up': ['ffn.up'] if config.ffn == 'relu2' else ['ffn.gate', 'ffn.up'], 'down': ['ffn.down']}


def floats(x):
    return x.detach().to('cpu', torch.float32).contiguous()
