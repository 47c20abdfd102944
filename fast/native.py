"""
Native decoding: a whole step of the model in one call of C (native.c), for one text on a CPU.

    decoder = native.Decoder(model)             # a BitSkip, or the packed copy that packed.py makes
    logits, layer = decoder.step(prompt)        # (1, V), and the layer that its last token left at
    logits, layer = decoder.step([token], exit_mode='gate')
    decoder.length = 100                        # forget the tokens from position 100 on

With one text PyTorch spends its time between the operations. In C a step takes as long as reading
the weights takes, and ternary weights are small: 2 bits each, as `ternary_blocks` draws. Numbers
are those of the packed model, up to the rounding of float32 sums. (Such an error of 1e-7 may tip a
quantizer over the edge between two codes. So it does between two ways to compute in PyTorch.)

The system's C compiler builds native.c when it is first needed, in some seconds. The library stays
in the user's cache folder. Where that fails `available()` says why, and PyTorch decodes.
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
from itertools import zip_longest

import torch
import torch.nn.functional as F

from common import atomic_write
from decode import require_exits
from fast.packed import Int8Head, to_ternary
from quant import BitLinear, HBitLinear

SOURCE = pathlib.Path(__file__).with_name('native.c')
FLAGS = ['-std=gnu11', '-O3', '-shared', '-fPIC', '-pthread', '-ffp-contract=off',
         '-fno-trapping-math']
ISAS = ('portable C', 'AVX2', 'AVX-512 VNNI')  # by native.c's numbers
MARGIN = 4.0  # nats: words that much less likely than the likeliest have logits of 4-bit weights

# --------------------------------------------------------------------------------------------------
# the library

class BuildError(RuntimeError):
    """Why there is no library, in one sentence."""

def available():
    """(True, how) if this machine can decode natively, else (False, why not). The first call
    compiles."""
    lib, how = library()
    return lib is not None, how

@functools.cache
def library():
    """(native.c as a ctypes library, how it runs), or (None, why there is none)."""
    try:
        lib = ctypes.CDLL(str(compiled(cache_folder())))
    except BuildError as error:
        return None, str(error)
    except OSError as error:
        return None, f'native.c compiles, but does not load: {error}'
    decoder, step, draft = map(ctypes.POINTER, (CDecoder, CStep, CDraft))
    lib.bitskip_step.argtypes, lib.bitskip_step.restype = [decoder, step], None
    lib.bitskip_draft.argtypes, lib.bitskip_draft.restype = [decoder, draft], None
    lib.bitskip_workspace.argtypes, lib.bitskip_workspace.restype = [decoder], ctypes.c_int64
    return lib, f'native decoding ({ISAS[lib.bitskip_isa()]})'

def compiled(folder):
    """The path of the library in `folder`, compiled if it is not there. BuildError if it cannot be.

    Its name holds two hashes: of all that it depends on, and of its own bytes. A damaged library is
    never loaded: that would be a bus error."""
    if os.name != 'posix':
        raise BuildError('native decoding needs POSIX threads (Linux, macOS)')
    compiler = find_compiler()
    key = digest('\0'.join([SOURCE.read_text(encoding='utf-8'), *FLAGS, str(compiler),
                            platform.system(), platform.machine()]).encode())
    for path in folder.glob(f'native-{key}-*.so'):
        if path.name == f'native-{key}-{digest(path.read_bytes())}.so':
            return path
    if not compiler:
        raise BuildError('there is no C compiler here (cc, gcc or clang, or what CC names)')
    library = compile_library(compiler)
    path = folder / f'native-{key}-{digest(library)}.so'
    with atomic_write(str(path)) as file:
        file.write(library)
    return path

def find_compiler():
    return os.environ.get('CC') or next(filter(shutil.which, ('cc', 'gcc', 'clang')), None)

def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]

def compile_library(compiler, source=SOURCE):
    """The bytes of native.c as a library. compiler: a command, with arguments if need be."""
    with tempfile.TemporaryDirectory() as folder:
        target = pathlib.Path(folder, 'native.so')
        try:
            command = [*shlex.split(compiler), *FLAGS, '-o', str(target), str(source), '-lm']
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
            if done.returncode == 0:
                return target.read_bytes()
            message = (done.stderr.strip().splitlines() or ['it gives no reason'])[0]
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            message = str(error)
    raise BuildError(f'the C compiler {compiler} fails on native.c: {message[:200]}')

def cache_folder():
    """The folder for compiled libraries in the user's cache. Where others could write into it, or
    we cannot: one for this process."""
    with contextlib.suppress(OSError, RuntimeError):
        cache = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
        folder = pathlib.Path(cache, 'bitskip')
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stat = folder.stat()
        ours = stat.st_uid == os.getuid() and not stat.st_mode & 0o022  # no one else may write
        if ours and os.access(folder, os.W_OK):
            return folder
    return pathlib.Path(temporary_folder().name)

@functools.cache
def temporary_folder():
    return tempfile.TemporaryDirectory(prefix='bitskip-')  # removed at exit

# --------------------------------------------------------------------------------------------------
# layouts
#
# A kernel takes 16 rows of a matrix at a time, one in each 4-byte lane of 64 bytes. The instruction
# vpdpbusd multiplies the 4 bytes of every lane with 4 int8 inputs, the same for all lanes, and adds
# the products to that lane's int32. In the end the 16 lanes are 16 rows of the product: no sum
# across lanes, no transposition.
#
#     64 bytes     |      row 0      |      row 1      |  ...  |      row 15     |
#                  |  0   1   2   3  |  4   5   6   7  |  ...  | 60  61  62  63  |
#
#     ternary      byte 4r + j  =   w[r, 12+j] + 1   w[r, 8+j] + 1   w[r, 4+j] + 1   w[r, j] + 1
#                                     bits 7 6         bits 5 4        bits 3 2       bits 1 0
#
#                  16 rows x 16 columns: (bytes >> 2s) & 3 are the 64 bytes of columns 4s ... 4s + 3
#
#     the head     byte 4r + j  =   (w[r, 4+j] + 128) / 16          (w[r, j] + 128) / 16
#                                          bits 7 6 5 4                  bits 3 2 1 0
#
# Weights are stored unsigned, as the instruction wants one of its operands. What that adds to the
# sum is taken off again: sum_k (w_k + 1) x_k - sum_k x_k = sum_k w_k x_k.
#
# Of the head these are the upper 4 of 8 bits, for 16 rows x 8 columns. They tell which words are
# likely. Only for those does the step read all 8 bits, which lie row by row.

def ternary_blocks(codes):
    """codes (rows, cols) in {-1, 0, 1} -> (rows / 16, cols / 16, 64) uint8, both rounded up."""
    c = in_tiles((codes + 1).to(torch.uint8))  # (rows / 16, cols / 16, s, r, j)
    return (c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6).flatten(2)

def int4_blocks(codes):
    """codes (rows, cols) int8 -> (rows / 16, cols / 16, 2, 64) uint8: the upper halves of + 128."""
    c = in_tiles(codes).flatten(3).view(torch.uint8) ^ 128  # (rows / 16, cols / 16, 4, 64)
    return c[:, :, ::2] >> 4 | c[:, :, 1::2] & 240

def in_tiles(x):
    """(rows, cols) -> (rows / 16, cols / 16, 4, 16, 4), both rounded up: [R, b, s, r, j] is row
    16R + r, column 16b + 4s + j."""
    x = F.pad(x, (0, -x.shape[1] % 16, 0, -x.shape[0] % 16))
    tiles = x.unflatten(1, (-1, 4, 4)).unflatten(0, (-1, 16))  # [R, r, b, s, j]
    return tiles.permute(0, 2, 3, 1, 4).contiguous()

# --------------------------------------------------------------------------------------------------
# the structures of native.c, field by field

def structure(name, *fields):
    return type(name, (ctypes.Structure,), {
        '_fields_': [(field, kind) for kind, names in fields for field in names.split()]})

pointer, integer, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
CLinear = structure(
    'CLinear', (pointer, 'weights codes scales norm_weight'), (integer, 'rows inputs cols'),
    (integer, 'w_bits bits activation norm linear_norm hadamard'))
CBlock = structure('CBlock', (CLinear, 'qkv o up down'), (pointer, 'gate1 gate2'))
CDecoder = structure(
    'CDecoder', (CLinear, 'head'), (pointer, 'blocks embedding embedding_scales cos sin k v'),
    (pointer, 'workspace'), (integer, 'n_layer n_head n_kv_head n_embd vocab_size block_size'),
    (integer, 'gate_dim normed_exits threads isa'), (real, 'margin'))
CStep = structure(
    'CStep', (pointer, 'tokens h logits'), (integer, 'T start first last n_logits exit_mode'),
    (real, 'threshold'), (integer, 'exit_layer'))
CDraft = structure(
    'CDraft', (pointer, 'tokens h q p random'), (integer, 'T start layer most'),
    (real, 'temperature confidence'), (integer, 'n'))
NORMS = {'none': 0, 'layernorm': 1, 'rmsnorm': 2}
ACTIVATIONS = {None: 0, 'relu2': 1, 'swiglu': 2}
EXIT_NUMBERS = {None: 0, 'gate': 1, 'confidence': 2}  # native.c: FULL, GATE, ...

class Decoder:
    """A packed model, and the key-value cache of one text: the twin of decode.Decoder.

    model: what packed.to_ternary returns, or what it takes (head='int8' then). threads: at most how
    many, by default torch.get_num_threads(). isa: an index of ISAS, by default the best here; all
    give the same bits. margin: logits that are not that far below the largest are those of the int8
    head; the others, for which 4 of its bits are read, are close. BuildError where native decoding
    is not available, ValueError if the model cannot be decoded so.

    length: how many tokens the cache holds; setting it back forgets the newest.
    states (1, T, C): what the newest tokens left the blocks with, before any norm."""

    def __init__(self, model, threads=None, isa=None, margin=MARGIN):
        self.lib, how = library()
        if self.lib is None:
            raise BuildError(how)
        threads, best = threads or torch.get_num_threads(), self.lib.bitskip_isa()
        isa = best if isa is None else isa
        if not 1 <= threads <= 1024 or not 0 <= isa <= best:
            raise ValueError(f'threads is 1 to 1024 and isa 0 to {best} here, got {threads}, {isa}')
        model = to_ternary(model)
        if not isinstance(model.head, Int8Head):
            raise ValueError("native decoding takes a packed model with head='int8'")
        self.config, self.has_gates, self.tensors = model.config, bool(model.gates), []
        self.c = self.describe(model, threads, isa, margin)
        self.filled, self.length = [0] * self.config.n_layer, 0  # tokens that each layer holds

    def keep(self, tensor):
        """The address of a tensor on the CPU, floats in float32, that lives as long as we do."""
        if tensor is None:
            return None
        tensor = tensor.float() if tensor.is_floating_point() else tensor
        self.tensors.append(tensor.detach().cpu().contiguous())
        return self.tensors[-1].data_ptr()

    def describe(self, model, threads, isa, margin):
        """The CDecoder of a packed model."""
        c, D = model.config, model.config.n_embd // model.config.n_head
        blocks = zip_longest(model.blocks, model.gates)  # the last block has no gate
        self.c_blocks = (CBlock * c.n_layer)(*(self.describe_block(*pair) for pair in blocks))
        cos, sin = model.rope(0, c.block_size)
        decoder = CDecoder(
            head=self.describe_linear(int4_blocks(model.head.codes), 4, model.head.scale, c.n_embd,
                                      c.n_embd, model.norm, codes=self.keep(model.head.codes)),
            blocks=ctypes.addressof(self.c_blocks), cos=self.keep(cos), sin=self.keep(sin),
            embedding=self.keep(model.embedding.codes), margin=margin,
            embedding_scales=self.keep(model.embedding.scale),
            k=self.keep(torch.zeros(c.n_layer, c.n_kv_head, -(-c.block_size // 16), D, 16)),
            v=self.keep(torch.zeros(c.n_layer, c.n_kv_head, c.block_size, -(-D // 16) * 16)),
            normed_exits=c.exit_norm != 'none', threads=threads, isa=isa,
            **{name: getattr(c, name) for name in ('n_layer', 'n_head', 'n_kv_head', 'n_embd',
                                                   'vocab_size', 'block_size', 'gate_dim')})
        workspace = torch.zeros(self.lib.bitskip_workspace(decoder), dtype=torch.uint8)
        decoder.workspace = self.keep(workspace)
        return decoder

    def describe_block(self, block, gate):
        config, attn, ffn = self.config, block.attn, block.ffn
        C, up = config.n_embd, [ffn.up] if ffn.gate is None else [ffn.gate, ffn.up]
        return CBlock(
            qkv=self.describe_ternary([attn.q, attn.k, attn.v], C, block.attn_norm),
            o=self.describe_ternary([attn.o], C, attn.sub_norm),
            up=self.describe_ternary(up, C, block.ffn_norm),
            down=self.describe_ternary([ffn.down], config.ffn_dim, ffn.sub_norm, config.ffn),
            gate1=self.keep(gate and gate.w1.weight), gate2=self.keep(gate and gate.w2.weight))

    def describe_ternary(self, layers, inputs, norm, activation=None):
        """Layers that share their input, as one matrix."""
        first, prepare = layers[0], layers[0].prepare.__func__
        if prepare not in (BitLinear.prepare, HBitLinear.prepare):
            raise ValueError('native.c does not know how this model prepares the input of a layer')
        codes, scales = zip(*(layer.ternary() for layer in layers))
        scales = torch.cat([scale.reshape(-1).expand(len(c)) for c, scale in zip(codes, scales)])
        return self.describe_linear(
            ternary_blocks(torch.cat(codes)), 2, scales, inputs, first.in_features, norm,
            activation=ACTIVATIONS[activation], linear_norm=NORMS[first.linear_norm],
            hadamard=prepare is HBitLinear.prepare, bits=first.act_bits)

    def describe_linear(self, blocks, w_bits, scales, inputs, cols, norm, bits=8, **options):
        return CLinear(
            weights=self.keep(blocks), scales=self.keep(F.pad(scales.flatten(), (0, 15))),
            rows=scales.numel(), inputs=inputs, cols=cols, w_bits=w_bits, bits=bits,
            norm=NORMS[self.config.norm],
            norm_weight=self.keep(getattr(norm, 'weight', None)), **options)

    @property
    def length(self):
        return self._length

    @length.setter
    def length(self, length):
        if not 0 <= length <= self.config.block_size:
            raise ValueError(f'length is 0 to {self.config.block_size}, got {length}')
        self._length = length
        self.filled = [min(n, length) for n in self.filled]

    def step(self, tokens, n_logits=1, exit_layer=None, exit_mode=None, exit_threshold=0.5):
        """The next tokens, (1, T) int64 or a list -> logits (n_logits, V) float32 of the last
        n_logits of them, and the layer that the last one left at. Arguments as decode.Decoder.step.

        ValueError if tokens are none, do not fit into block_size or are not in the vocabulary, or
        if model or cache do not have what this takes."""
        require_exits(exit_mode, self.has_gates)
        last = self.config.n_layer - 1 if exit_layer is None else exit_layer
        tokens = self.as_list(tokens)
        self.states, logits, layer = self.run(
            tokens, None, self.length, 0, last, n_logits,
            exit_mode if len(tokens) == 1 else None, exit_threshold)
        self._length += len(tokens)
        return logits, layer

    def blocks(self, h, first, last, start=None):
        """The states before block `first` (1, T, C), of tokens from position `start` (default:
        length) on -> those after block `last`. As decode.Decoder.blocks."""
        return self.run(None, h, self.length if start is None else start, first, last, 0)[0]

    def logits(self, h, layer=None):
        """h (1, T, C) after block `layer` (default: the last) -> logits (1, T, V) of that exit."""
        layer = self.config.n_layer - 1 if layer is None else layer
        return self.run(None, h, 0, layer + 1, layer, h.shape[1])[1].unsqueeze(0)

    def draft(self, tokens, layer, most, temperature=0.0, confidence=0.0, generator=None):
        """A pass of speculate.py in one call of C. Blocks 0 ... layer read the next tokens (1, T),
        and draft up to `most` more, each with a probability of at least `confidence` for the
        likeliest; the other blocks check them. Returns the drafts (n, 1), the logits (n, V) that
        they were drawn from, and those of full depth, (n + 1, V). `length` counts them all."""
        c, tokens = self.config, self.as_list(tokens)
        T, start, last = len(tokens), self.length, c.n_layer - 1
        self.require_room(start, T + most, 0, last)
        ids = torch.tensor(tokens + [0] * most)
        states = torch.zeros(T + most, -(-c.n_embd // 16) * 16)
        logits = torch.empty(2 * most + 1, c.vocab_size)
        random = torch.rand(most, generator=generator) if temperature else torch.zeros(most)
        draft = CDraft(tokens=ids.data_ptr(), h=states.data_ptr(), q=logits.data_ptr(),
                       p=logits[most:].data_ptr(), random=random.data_ptr(), T=T, start=start,
                       layer=layer, most=most, temperature=temperature, confidence=confidence)
        self.lib.bitskip_draft(self.c, draft)
        n = draft.n
        self.filled, self._length = [start + T + n] * c.n_layer, start + T + n
        return ids[T:T + n, None], logits[:n], logits[most:most + n + 1]

    def as_list(self, tokens):
        """The tokens of one text as a list. ValueError if they are none, or no tokens."""
        tokens = tokens.tolist() if torch.is_tensor(tokens) else tokens
        if tokens and isinstance(tokens[0], list):
            if len(tokens) > 1:
                raise ValueError(f'native decoding is for one text at a time, got {len(tokens)}')
            tokens = tokens[0]
        if not tokens or min(tokens) < 0 or max(tokens) >= self.config.vocab_size:
            raise ValueError(f'tokens are one or more of 0 to {self.config.vocab_size - 1}, got '
                             f'{tokens}')
        return list(tokens)

    def require_room(self, start, T, first, last):
        """ValueError if T tokens from position `start` on cannot go through these blocks."""
        L, size = self.config.n_layer, self.config.block_size
        if not 0 <= first <= last + 1 <= L:
            raise ValueError(f'layers {first} to {last} are outside the model: its layers are 0 to '
                             f'{L - 1}')
        if not 0 <= start < start + T <= size:
            raise ValueError(f'{T} tokens from position {start} on do not fit into '
                             f'block_size={size}')
        if any(n < start for n in self.filled[first:last + 1]):
            raise ValueError(f'the cache of layers {first} to {last} holds '
                             f'{self.filled[first:last + 1]} tokens, not the {start} before these')

    def run(self, tokens, h, start, first, last, n_logits, exit_mode=None, exit_threshold=0.0):
        """One call of native.c's step, of tokens (T) or from states h (1, T, C), at positions from
        `start` on, through blocks first ... last: states (1, T, C), logits (n_logits, V), layer."""
        c, T = self.config, len(tokens) if h is None else h.shape[1]
        self.require_room(start, T, first, last)
        if not 0 <= n_logits <= T:
            raise ValueError(f'n_logits is 0 to {T}, the number of these tokens, got {n_logits}')
        if exit_mode not in EXIT_NUMBERS:
            raise ValueError(f'native.c knows no exit_mode={exit_mode!r}; --packed=False does')
        states = torch.zeros(1, T, -(-c.n_embd // 16) * 16)
        logits = torch.empty(max(1, n_logits), c.vocab_size)
        ids = None if tokens is None else (ctypes.c_int64 * T)(*tokens)
        if h is not None:
            states[..., :c.n_embd] = h
        step = CStep(tokens=ids and ctypes.addressof(ids), h=states.data_ptr(), T=T, start=start,
                     logits=logits.data_ptr(), first=first, last=last, n_logits=n_logits,
                     exit_mode=EXIT_NUMBERS[exit_mode], threshold=exit_threshold)
        self.lib.bitskip_step(self.c, step)
        self.filled[first:last + 1] = [start + T] * (last + 1 - first)
        return states[..., :c.n_embd], logits if n_logits else logits[:0], step.exit_layer

