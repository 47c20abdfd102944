"""
Native decoding: a whole step of the model in one call of C (native.c), for batch 1 on a CPU.

    decoder = native.Decoder(model)                            # a BitSkip, or the packed copy that packed.py makes
    logits, layer = decoder.step(prompt)                       # (1, V), and the layer that its last token left at
    logits, layer = decoder.step([token], exit_mode='gate')
    decoder.length = 100                                       # forget the tokens from position 100 on

At batch 1 PyTorch spends its time between the operations, not in them. In C a step costs what it takes to read the
weights, and ternary weights are small: 2 bits each, laid out as `ternary_blocks` draws. Numbers are those of the
model, packed or not, up to the rounding of float32 sums. (Where such an error of 1e-7 tips a quantizer over the edge
between two codes, more changes; so it does between two ways to compute in PyTorch.)

native.c is compiled when it is first needed, by the system's C compiler, in two seconds, and kept in the user's cache
folder under the hash of all that it depends on. Where that fails `available()` says why, and decode.py serves.
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
from itertools import starmap, zip_longest

import torch
import torch.nn.functional as F

import triton_ternary
from decode import EXIT_MODES, require_exits
from packed import int8_rows, to_ternary
from quant import HBitLinear, bit_linears

SOURCE = pathlib.Path(__file__).with_name('native.c')
FLAGS = ['-std=gnu11', '-O3', '-shared', '-fPIC', '-pthread', '-ffp-contract=off', '-fno-trapping-math']
ISAS = ('portable C', 'AVX2', 'AVX-512 VNNI')  # by native.c's numbers
UNPACKABLE = ('fp', 'hadamard_after')  # projections without ternary weights, and those for training only


# --------------------------------------------------------------------------------------------------------------------
# the library

def available():
    """(True, how) if this machine can decode natively, else (False, why not). Compiles at the first call."""
    lib, how = library()
    return lib is not None, how


@functools.cache
def library():
    """(native.c as a ctypes library, how it runs), or (None, why there is none)."""
    try:
        lib = load(cache_folder())
    except BuildError as error:
        return None, str(error)
    lib.step.argtypes, lib.step.restype = [ctypes.POINTER(CDecoder), ctypes.POINTER(CStep)], None
    lib.workspace_bytes.argtypes, lib.workspace_bytes.restype = [ctypes.POINTER(CDecoder)], ctypes.c_int64
    return lib, f'native decoding ({ISAS[lib.best_isa()]})'


class BuildError(Exception):
    """Why there is no library, in one sentence."""


def load(folder):
    """The library from `folder`, compiled first if it is not there yet. BuildError if that cannot be done."""
    if os.name != 'posix':
        raise BuildError('native decoding needs POSIX threads (Linux, macOS)')
    compiler = os.environ.get('CC') or next(filter(shutil.which, ('cc', 'gcc', 'clang')), None)
    key = '\0'.join([SOURCE.read_text(encoding='utf-8'), *FLAGS, str(compiler), platform.system(),
                     platform.machine()])
    path = folder / f'native-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so'
    if path.exists():
        with contextlib.suppress(OSError):  # damaged: compile it anew
            return ctypes.CDLL(str(path))
    if not compiler:
        raise BuildError('there is no C compiler here (cc, gcc or clang, or what CC names)')
    try:
        command = shlex.split(compiler)
    except ValueError as error:
        raise BuildError(f'CC={compiler!r} is no command: {error}') from None
    compile_library(command, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f'native.c compiles, but does not load: {error}') from None


def compile_library(compiler, path):
    aside = path.with_suffix(f'.{os.getpid()}.tmp')  # renamed when whole: another process may be compiling, too
    try:
        result = subprocess.run([*compiler, *FLAGS, '-o', str(aside), str(SOURCE), '-lm'], capture_output=True,
                                text=True, timeout=120)
        if result.returncode == 0:
            return os.replace(aside, path)
        message = (result.stderr.strip().splitlines() or ['it gives no reason'])[0]
    except (OSError, subprocess.TimeoutExpired) as error:
        message = str(error)
    finally:
        aside.unlink(missing_ok=True)
    raise BuildError(f'the C compiler {compiler[0]} fails on native.c: {message[:200]}')


def cache_folder():
    """The user's own folder for compiled libraries; where that cannot be written, one for this process."""
    with contextlib.suppress(OSError, RuntimeError):
        folder = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'bitskip'
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    return pathlib.Path(temporary_folder().name)


@functools.cache
def temporary_folder():
    return tempfile.TemporaryDirectory(prefix='bitskip-')  # removed at exit


# --------------------------------------------------------------------------------------------------------------------
# layouts
#
# The kernels take 16 rows of a matrix at a time, one in each 4-byte lane of 64 bytes. vpdpbusd multiplies the 4 bytes
# of every lane with 4 int8 inputs, the same for all lanes, and adds the products to that lane's int32. When all are
# through, the 16 lanes are 16 rows of the product: no sum across lanes, no transposition.
#
#     64 bytes     |      row 0      |      row 1      |  ...  |      row 15     |
#                  |  0   1   2   3  |  4   5   6   7  |  ...  | 60  61  62  63  |
#
#     int8         byte 4r + j  =  w[r, j] + 128                                            16 rows x 4 columns
#
#     ternary      byte 4r + j  =    w[r, 12+j] + 1   w[r, 8+j] + 1   w[r, 4+j] + 1   w[r, j] + 1     16 rows x
#                                      bits 7 6          bits 5 4        bits 3 2       bits 1 0      16 columns
#
#                  (bytes >> 2s) & 3 is then the 64 bytes of columns 4s ... 4s + 3
#
# Weights are stored unsigned, as the instruction wants one of its operands; what that adds to the sum is taken off
# again: sum_k (w_k + 1) x_k - sum_k x_k = sum_k w_k x_k.

def ternary_blocks(codes):
    """codes (rows, cols) int8 in {-1, 0, 1} -> (rows / 16, cols / 16, 64) uint8, both rounded up."""
    c = in_tiles((codes + 1).to(torch.uint8))  # (rows / 16, cols / 16, s, r, j)
    return (c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6).flatten(2)


def int8_blocks(codes):
    """codes (rows, cols) int8 -> (rows / 16, cols / 16, 4, 64) uint8, both rounded up."""
    return in_tiles(codes).flatten(3).view(torch.uint8) ^ 128  # that is + 128, in two's complement


def in_tiles(x):
    """(rows, cols) -> (rows / 16, cols / 16, 4, 16, 4), both rounded up: [R, b, s, r, j] is row 16R + r, column
    16b + 4s + j."""
    x = F.pad(x, (0, -x.shape[1] % 16, 0, -x.shape[0] % 16))
    tiles = x.unflatten(1, (-1, 4, 4)).unflatten(0, (-1, 16))  # [R, r, b, s, j]
    return tiles.permute(0, 2, 3, 1, 4).contiguous()


# --------------------------------------------------------------------------------------------------------------------
# the structures of native.c, field by field

def structure(name, *fields):
    return type(name, (ctypes.Structure,), {'_fields_': [(f, kind) for kind, names in fields for f in names.split()]})


pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
CLinear = structure('CLinear', (pointer, 'weights scales norm_weight'), (integer, 'kind rows inputs cols'),
                    (integer, 'activation norm linear_norm hadamard bits'))
CBlock = structure('CBlock', (CLinear, 'qkv o up down adapter1 adapter2'), (pointer, 'gate1 gate2'))
CDecoder = structure(
    'CDecoder', (CLinear, 'head'), (pointer, 'blocks embedding embedding_scales cos sin k v workspace'),
    (integer, 'n_layer n_head n_kv_head n_embd vocab_size block_size gate_dim normed_exits threads isa'))
CStep = structure('CStep', (pointer, 'tokens h logits'), (integer, 'T start first last n_logits exit_mode'),
                  (real, 'threshold'), (integer, 'exit_layer'))
KINDS = {'fp32': 0, 'int8': 1, 'ternary': 2}
NORMS = {'none': 0, 'layernorm': 1, 'rmsnorm': 2}
ACTIVATIONS = {None: 0, 'relu2': 1, 'swiglu': 2}
EXIT_NUMBERS = {mode: i for i, mode in enumerate((None, *EXIT_MODES))}  # native.c: FULL, GATE, ...


# --------------------------------------------------------------------------------------------------------------------

def fast_decoder(model):
    """What decodes one text quickest: (a model, its decoder or None for PyTorch, how in words). On a CPU packed weights
    with an int8 head, in C if it compiles; on a GPU 2-bit weights by way of Triton; where neither can be, the model as
    it is. ValueError if it cannot decode."""
    if model.config.linear in UNPACKABLE:
        return model, None, f'as trained, since linear={model.config.linear!r} cannot be packed'
    if model.device.type != 'cpu':
        two_bit, how = triton_ternary.available(model.device.type)
        return (to_ternary(model, head='fp32'), None, how) if two_bit else (model, None, f'as trained, since {how}')
    packed = to_ternary(model)
    native_step, how = available()
    if native_step:
        return packed, Decoder(packed), f'{how}, int8 head'
    return packed, None, f'packed weights in PyTorch, int8 head; no native step, since {how}'


class Decoder:
    """A model packed for native.c, and the key-value cache of one text. The twin of decode.Decoder.

    model: a BitSkip with ternary layers, packed or not. head: 'int8' rounds head and embedding to 8 bits, as
    packed.to_ternary does; 'fp32' leaves them (and shares their memory). threads: at most how many, by default
    torch.get_num_threads(). isa: an index of ISAS, by default the best here; all give the same bits.
    RuntimeError where native decoding is not available, ValueError if the model cannot be decoded so.

    length: how many tokens the cache holds; setting it back forgets the newest.
    states (T, C) float32: the hidden states that the newest tokens left the blocks with, before any norm."""

    def __init__(self, model, head='int8', threads=None, isa=None):
        self.lib, how = library()
        if self.lib is None:
            raise RuntimeError(how)
        threads, best = threads or torch.get_num_threads(), self.lib.best_isa()
        isa = best if isa is None else isa
        if model.config.linear in UNPACKABLE:
            raise ValueError(f'native decoding is for packed weights: linear={model.config.linear!r} cannot be packed')
        if any(layer.latent for layer in bit_linears(model)):
            raise ValueError('native decoding is for ternary weights, and this model computes with its latent ones')
        if not model.config.causal:
            raise ValueError('a model that sees the future (causal=False) cannot decode')
        if head not in ('int8', 'fp32') or (head == 'fp32' and hasattr(model.head, 'codes')):
            raise ValueError(f"head is 'int8' or, unless the model's is rounded already, 'fp32'; got {head!r}")
        if not 1 <= threads <= 1024 or not 0 <= isa <= best:
            raise ValueError(f'threads is 1 to 1024 and isa 0 to {best} here, got {threads} and {isa}')
        self.config, self.tensors = model.config, []
        self.c = self.describe(model, head, threads, isa)
        self.reset()

    def keep(self, tensor):
        """The address of a tensor on the CPU, floats in float32, which lives as long as this decoder."""
        if tensor is None:
            return None
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        self.tensors.append(tensor.detach().cpu().contiguous())
        return self.tensors[-1].data_ptr()

    @torch.no_grad()
    def describe(self, model, head, threads, isa):
        """The CDecoder of a model."""
        config = model.config
        D, tiles = config.n_embd // config.n_head, -(-config.block_size // 16)
        parts = zip_longest(model.blocks, model.gates, model.adapters)  # the last block has neither gate nor adapter
        blocks = starmap(self.describe_block, parts)
        self.c_blocks = (CBlock * config.n_layer)(*blocks)
        embedding, embedding_scales = rows_of(model.embedding, head)
        c = CDecoder(
            head=self.describe_linear(*rows_of(model.head, head), head, config.n_embd, config.n_embd, model.norm),
            blocks=ctypes.addressof(self.c_blocks),
            embedding=self.keep(embedding), embedding_scales=self.keep(embedding_scales),
            cos=self.keep(model.rope_cos), sin=self.keep(model.rope_sin),
            k=self.keep(torch.zeros(config.n_layer, config.n_kv_head, tiles, D, 16)),
            v=self.keep(torch.zeros(config.n_layer, config.n_kv_head, config.block_size, -(-D // 16) * 16)),
            normed_exits=config.exit_norm == 'final', threads=threads, isa=isa,
            **{name: getattr(config, name) for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'vocab_size',
                                                        'block_size', 'gate_dim')})
        c.workspace = self.keep(torch.zeros(self.lib.workspace_bytes(c), dtype=torch.uint8))
        return c

    def describe_block(self, block, gate, adapter):
        config, attn, ffn = self.config, block.attn, block.ffn
        adapters = {}
        if adapter is not None:
            adapters = dict(adapter1=self.describe_float(adapter.a.weight, linear_norm=NORMS['layernorm']),
                            adapter2=self.describe_float(adapter.b.weight))
        C, up = config.n_embd, [ffn.up] if ffn.gate is None else [ffn.gate, ffn.up]
        return CBlock(
            qkv=self.describe_ternary([attn.q, attn.k, attn.v], C, block.attn_norm),
            o=self.describe_ternary([attn.o], C, attn.sub_norm),
            up=self.describe_ternary(up, C, block.ffn_norm),
            down=self.describe_ternary([ffn.down], config.ffn_dim, ffn.sub_norm, activation=config.ffn),
            gate1=self.keep(gate and gate.w1.weight), gate2=self.keep(gate and gate.w2.weight), **adapters)

    def describe_float(self, weight, **options):
        rows, inputs = weight.shape
        return self.describe_linear(weight, None, 'fp32', inputs, inputs, None, **options)

    def describe_ternary(self, layers, inputs, norm, activation=None):
        """Layers that share their input, as one matrix."""
        first, (codes, scales) = layers[0], zip(*(layer.ternary() for layer in layers))
        scales = torch.cat([scale.expand(len(c)) for c, scale in zip(codes, scales)])  # (rows,)
        return self.describe_linear(
            torch.cat(codes), scales, 'ternary', inputs, first.in_features, norm, activation=ACTIVATIONS[activation],
            linear_norm=NORMS[first.linear_norm], hadamard=isinstance(first, HBitLinear), bits=first.act_bits)

    def describe_linear(self, w, scales, kind, inputs, cols, norm, bits=8, **options):
        weights = {'fp32': lambda w: w, 'int8': int8_blocks, 'ternary': ternary_blocks}[kind](w)
        return CLinear(weights=self.keep(weights), scales=self.keep(None if scales is None else in_16s(scales)),
                       norm_weight=self.keep(getattr(norm, 'weight', None)), norm=NORMS[self.config.norm],
                       kind=KINDS[kind], rows=len(w), inputs=inputs, cols=cols, bits=bits, **options)

    def reset(self):
        """Forget everything."""
        self.filled = [0] * self.config.n_layer  # how many tokens each layer holds keys and values of
        self.length = 0

    @property
    def length(self):
        return self._length

    @length.setter
    def length(self, length):
        if not 0 <= length <= self.config.block_size:
            raise ValueError(f'length is 0 to block_size={self.config.block_size}, got {length}')
        self._length = length
        self.filled = [min(n, length) for n in self.filled]

    def step(self, tokens, n_logits=1, exit_layer=None, exit_mode=None, exit_threshold=0.5):
        """Append tokens, T of them (a list or an integer tensor), to the text.

        Returns the logits (n_logits, V) float32 of the last n_logits tokens, and the layer that they left at. That is
        exit_layer (default: the last) or, for a single token with one of decode.py's exit modes, the first layer
        whose score is above exit_threshold, as in decode.py. ValueError if the tokens are none, do not fit into
        block_size or are not in the vocabulary, or the model or its cache do not have what this takes."""
        last = self.config.n_layer - 1 if exit_layer is None else exit_layer
        require_exits(exit_mode, self.config.gate_dim > 0)
        tokens = self.as_list(tokens)
        self.states, logits, layer = self.run(tokens, None, self.length, 0, last, n_logits,
                                              exit_mode if len(tokens) == 1 else None, exit_threshold)
        self._length += len(tokens)
        return logits, layer

    def embed(self, tokens):
        """The states (T, C) that block 0 reads, of tokens (T)."""
        return self.run(self.as_list(tokens), None, 0, 0, -1, 0)[0]

    def blocks(self, h, first, last, start=None):
        """h (T, C), the states before block `first` at the positions from `start` (default: length) on -> the states
        after block `last`, (T, C). The cache keeps their keys and values, but `length` stays.

        ValueError if a layer from first to last does not hold all that comes before `start`."""
        return self.run(None, h, self.length if start is None else start, first, last, 0)[0]

    def logits(self, h, layer=None):
        """h (T, C), states after block `layer` (default: the last) -> the logits (T, V) of that exit."""
        layer = self.config.n_layer - 1 if layer is None else layer
        return self.run(None, h, 0, layer + 1, layer, len(h))[1]

    def as_list(self, tokens):
        """The tokens of one text, as a list of ids. ValueError if they are none, of several texts, or no ids."""
        if torch.is_tensor(tokens):
            if tokens.numel() != tokens.shape[-1]:
                raise ValueError(f'native decoding is for one text at a time, got tokens {tuple(tokens.shape)}')
            tokens = tokens.flatten().tolist()
        if not tokens or min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            raise ValueError(f'tokens are one or more of 0 to {self.config.vocab_size - 1}, got {tokens}')
        return list(tokens)

    def run(self, tokens, h, start, first, last, n_logits, exit_mode=None, exit_threshold=0.0):
        """One call of native.c's step: (states (T, C), logits (n_logits, V), exit layer).

        Of tokens (T), or from states h (T, C); at positions from `start` on, through blocks first ... last."""
        C, L, T = self.config.n_embd, self.config.n_layer, len(tokens if h is None else h)
        if not 0 <= first <= last + 1 <= L:
            raise ValueError(f'layers {first} to {last} are outside the model: its {L} layers are 0 to {L - 1}')
        if not 0 <= start < start + T <= self.config.block_size:
            raise ValueError(f'{T} tokens from position {start} on do not fit into '
                             f'block_size={self.config.block_size}')
        if not 0 <= n_logits <= T:
            raise ValueError(f'n_logits is 0 to the number of tokens, {T}, got {n_logits}')
        if any(n < start for n in self.filled[first:last + 1]):
            raise ValueError(f'the cache of layers {first} to {last} holds {self.filled[first:last + 1]} tokens, not '
                             f'the {start} before these')
        states, logits = torch.zeros(T, -(-C // 16) * 16), torch.empty(max(1, n_logits), self.config.vocab_size)
        ids = None
        if h is None:
            ids = (ctypes.c_int64 * T)(*tokens)
        else:
            states[:, :C] = h
        step = CStep(tokens=ids and ctypes.addressof(ids), h=states.data_ptr(), logits=logits.data_ptr(), T=T,
                     start=start, first=first, last=last, n_logits=n_logits, exit_mode=EXIT_NUMBERS[exit_mode],
                     threshold=exit_threshold)
        self.lib.step(self.c, step)
        self.filled[first:last + 1] = [start + T] * (last + 1 - first)
        return states[:, :C], logits[:n_logits], step.exit_layer


def rows_of(module, kind):
    """The matrix of an embedding or a head: int8 codes and their scales (rows,), or float32 and None."""
    if kind == 'fp32':
        return module.weight, None
    return (module.codes, module.scale) if hasattr(module, 'codes') else int8_rows(module.weight)


def in_16s(x):
    return F.pad(x, (0, -len(x) % 16))
