"""
A trained model as GGUF, the file format of llama.cpp: for the recipes that llama.cpp can run.

    python -m export.gguf                    the newest run: out/<name>/model.gguf, weights as TQ2_0
    python -m export.gguf --type=TQ1_0       fewer bits, slower to unpack; F16 multiplies in floats
    python -m export.gguf --exit_layer=3     an exit is a file with fewer blocks: 0 to 3, norm, head

llama.cpp has no Hadamard transform and no SubLN (README.md says what they would take). What it
calls arcee is our architecture without them, in RMSNorm. config/arcee.py trains that.

A GGUF file is "GGUF", version 3, the numbers of tensors and settings (all little-endian), and

    settings    key, type, value                             width, depth, ..., the tokenizer
    tensors     name, shape (columns first), type, offset
    data        each tensor from a multiple of 32 bytes on

Ternary weights come in blocks of 256 codes c_0 ... c_255 of a row and one scale, here alpha of A1
in all blocks. With digits d = c + 1 in {0, 1, 2}:

    TQ2_0       bits  76   54   32   10           66 bytes a block, 2.06 bits a weight
      byte j         d96+j d64+j d32+j d_j        j = 0 ... 31: digits 32 apart share a byte
      byte 32 + j    the same of c_128 ... c_255
      bytes 64, 65   alpha as float16

    TQ1_0       ceil(256/243 n), n base 3:        54 bytes a block, 1.69 bits a weight
      byte j       n = d_j d_32+j d_64+j d_96+j d_128+j               j = 0 ... 31
      byte 32 + j  n = d_160+j d_176+j d_192+j d_208+j d_224+j        j = 0 ... 15
      byte 48 + j  n = d_240+j d_244+j d_248+j d_252+j 0              j = 0 ... 3
      bytes 52, 53 alpha as float16

A byte b of TQ1_0 is the binary fraction b/256: n/243, rounded up. 3b carries the first digit into
bit 8, and its low 8 bits are the next fraction. So unpacking needs no division.

What differs from model.py: alpha is a float16, head and embedding are Q8_0 (or F16). llama.cpp
quantizes activations with a scale per 256 values, where A2 has one per token, and for F16 not at
all. README.md has what that comes to.
"""
import os
import struct
from dataclasses import dataclass
from typing import Literal

import torch

from checkpoint import find_run, open_model
from common import atomic_write, require_suffix
from configurator import UserError, configure, run
from export import last_merge, spelling
from model import BitSkip
from prepare import get_tokenizer
from quant import BitLinear, activation_quant

BLOCK = 256  # codes that share a scale
NUMBERS = {'F32': 0, 'F16': 1, 'Q8_0': 8, 'TQ1_0': 34, 'TQ2_0': 35}  # GGUF's types of tensors
FILE_TYPES = {'F16': 1, 'TQ1_0': 36, 'TQ2_0': 37}  # and of files
ARCEE = {'norm': ['rmsnorm'], 'sub_norm': [False], 'ffn': ['relu2'], 'act_bits': [8],
         'linear': ['bitlinear', 'fp'], 'linear_norm': ['none'], 'exit_norm': ['final', 'none']}

@dataclass
class ExportSettings:
    """Writes a trained model for llama.cpp."""
    out_dir: str = ''  # the run to export; empty: the newest
    gguf: str = 'model.gguf'  # the file to write, in the run's folder
    type: Literal['TQ2_0', 'TQ1_0', 'F16'] = 'TQ2_0'  # projections: 2.06, 1.69 or 16 bits a weight
    exit_layer: int | None = None  # write blocks 0 to exit_layer only; none: all

# ---- tensors as bytes: codes (out, k) int8 and their scale, or floats -> (out, bytes) uint8 ----

def tq2_0(codes, scale):
    digits = (codes + 1).unflatten(-1, (-1, 2, 4, 32)).to(torch.uint8)  # (out, blocks, half, 4, 32)
    places = torch.tensor([1, 4, 16, 64], dtype=torch.uint8)[:, None]
    return with_scale((digits * places).sum(-2, dtype=torch.uint8).flatten(-2), scale)

def tq1_0(codes, scale):
    digits = (codes + 1).unflatten(-1, (-1, BLOCK)).int()
    places = torch.tensor([81, 27, 9, 3, 1])[:, None]
    n = [(part.unflatten(-1, (-1, width)) * places[:part.shape[-1] // width]).sum(-2)
         for part, width in zip(digits.split((160, 80, 16), -1), (32, 16, 4))]
    n = torch.cat(n, dim=-1)  # (out, blocks, 52)
    return with_scale(((n * 256 + 242) // 243).to(torch.uint8), scale)

def with_scale(packed, scale):
    """Each block's bytes, then its scale: (out, blocks, n) uint8, () -> (out, blocks (n + 2))."""
    scale = scale.to(torch.float16).reshape(1).view(torch.uint8)
    return torch.cat([packed, scale.expand(*packed.shape[:-1], 2)], dim=-1).flatten(1)

def q8_0(w):
    """Blocks of 32: max|w| / 127 as float16, then int8 codes. A2 once more, 8.5 bits a weight."""
    codes, scale = activation_quant(w.unflatten(-1, (-1, 32)))  # (V, blocks, 32), (V, blocks, 1)
    return torch.cat([scale.half().view(torch.uint8), codes.view(torch.uint8)], dim=-1).flatten(1)

def f16(w, scale=1.0):
    return (w * scale).half().view(torch.uint8)

def tensors(model, type, last):
    """Name, type, shape and bytes of each tensor of blocks 0 ... last and around them. The final
    norm comes with any number of blocks: exits read h_l under it, too."""
    def projection(name, layer, heads):
        codes, scale = layer.ternary() if isinstance(layer, BitLinear) else (layer.weight, 1.0)
        if heads:
            codes = neighbours(codes, heads)
        pack = {'TQ1_0': tq1_0, 'TQ2_0': tq2_0, 'F16': f16}[type]
        return name, type, codes.shape, pack(codes, scale)

    def table(name, w):
        return (name, 'F16', w.shape, f16(w)) if type == 'F16' else (name, 'Q8_0', w.shape, q8_0(w))

    def norm(name, w):
        return name, 'F32', w.shape, w.float().view(torch.uint8)

    yield table('token_embd.weight', model.embedding.weight)
    for i, block in enumerate(model.blocks[:last + 1]):
        attn, ffn, c = block.attn, block.ffn, model.config
        yield norm(f'blk.{i}.attn_norm.weight', block.attn_norm.weight)
        yield norm(f'blk.{i}.ffn_norm.weight', block.ffn_norm.weight)
        for name, layer, heads in (
                ('attn_q', attn.q, c.n_head), ('attn_k', attn.k, c.n_kv_head),
                ('attn_v', attn.v, 0), ('attn_output', attn.o, 0),
                ('ffn_up', ffn.up, 0), ('ffn_down', ffn.down, 0)):
            yield projection(f'blk.{i}.{name}.weight', layer, heads)
    yield norm('output_norm.weight', model.norm.weight)
    yield table('output.weight', model.head.weight)

def neighbours(w, heads):
    """model.py rotates (x_i, x_{i + D/2}), llama.cpp (x_2i, x_2i+1). That is the same, if the rows
    of q and k change places: w (heads D, k), per head 0, D/2, 1, D/2 + 1, ..."""
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

# ---- settings ----

def metadata(model, tokenizer, name, type, last):
    c = model.config
    arcee = {
        'vocab_size': c.vocab_size, 'context_length': c.block_size, 'embedding_length': c.n_embd,
        'block_count': last + 1, 'feed_forward_length': c.ffn_dim, 'attention.head_count': c.n_head,
        'attention.head_count_kv': c.n_kv_head, 'rope.freq_base': c.rope_theta,
        'attention.layer_norm_rms_epsilon': model.norm.eps,
        'rope.dimension_count': c.n_embd // c.n_head}
    return {'general.architecture': 'arcee', 'general.name': name,
            'general.file_type': FILE_TYPES[type], 'general.quantization_version': 2,
            **{f'arcee.{key}': value for key, value in arcee.items()}, **vocabulary(tokenizer)}

def vocabulary(tokenizer):
    """Both tokenizers are byte-pair encodings; 'bytes' has learned no merges at all."""
    spell, tokens = spelling(tokenizer)
    rank = {token: i for i, token in enumerate(tokens) if i != tokenizer.eot}
    merges = [' '.join(map(spell, last_merge(token, rank))) for token in rank if len(token) > 1]
    settings = {
        'model': 'gpt2', 'pre': 'gpt-2',  # the pattern that cuts text into words
        'tokens': [spell(t) if t in rank else '<|endoftext|>' for t in tokens],
        'token_type': [1 if t in rank else 3 for t in tokens],  # normal, control
        'merges': merges, 'add_bos_token': False,
        'bos_token_id': tokenizer.eot, 'eos_token_id': tokenizer.eot}
    return {f'tokenizer.ggml.{key}': value for key, value in settings.items()}

# ---- the file ----

def write_gguf(file, settings, tensors):
    """settings: a dict; tensors: a list of (name, type, shape, uint8 tensor), as above."""
    file.write(b'GGUF' + struct.pack('<IQQ', 3, len(tensors), len(settings)))
    for key, value in settings.items():
        file.write(string(key) + typed(value))
    offset = 0
    for name, type, shape, data in tensors:
        file.write(string(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape[::-1],
                                              NUMBERS[type], offset))
        offset += data.numel() + -data.numel() % 32
    for _, _, _, data in tensors:
        file.write(bytes(-file.tell() % 32))
        file.write(data.contiguous().numpy().data)

def string(text):
    data = text.encode()
    return struct.pack('<Q', len(data)) + data

def typed(value):
    """A value behind the number of its type; a list behind the type and number of its items."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return struct.pack('<IIQ', 9, 8, len(value)) + b''.join(map(string, value))
    if isinstance(value, list):  # of int32
        return struct.pack(f'<IIQ{len(value)}i', 9, 5, len(value), *value)
    if isinstance(value, str):
        return struct.pack('<I', 8) + string(value)
    number, code = {int: (4, 'I'), float: (6, 'f'), bool: (7, '?')}[type(value)]
    return struct.pack(f'<I{code}', number, value)

# ---- the script ----

def require_arcee(model, exit_layer=None, type='F16'):
    """The last block to write. UserError if arcee cannot express the blocks up to it, or tensors of
    this type their weights."""
    c = model.config
    try:
        last = model.require_layer(exit_layer)
    except ValueError as error:
        raise UserError(str(error)) from None
    unfit = [f'{name}={getattr(c, name)!r}' for name, fits in ARCEE.items()
             if getattr(c, name) not in fits]
    if unfit or model.__class__ is not BitSkip:
        what = ', '.join(unfit) or f'the changes of {model.__class__.__name__}'
        raise UserError(f'arcee, which llama.cpp and transformers know, has no {what}; a model '
                        'trained with config/arcee.py is one')
    if c.exit_norm == 'none' and last < c.n_layer - 1:
        raise UserError("exits of this model read h_l without the final norm (exit_norm='none'), "
                        'which arcee always applies; leave out --exit_layer')
    if type != 'F16' and c.linear == 'fp':
        raise UserError(f"a full-precision model (linear='fp') has no ternary weights for {type}; "
                        'write it with --type=F16')
    if type != 'F16' and (c.n_embd % BLOCK or c.ffn_dim % BLOCK):
        raise UserError(f'{type} has blocks of {BLOCK} weights, so n_embd={c.n_embd} and '
                        f'ffn_dim={c.ffn_dim} must be multiples of it; --type=F16 takes any')
    return last

@torch.no_grad()
def main(argv):
    s = configure(ExportSettings, argv)
    require_suffix('--gguf', s.gguf, '.gguf')
    out_dir = find_run(s.out_dir)
    model, settings = open_model(os.path.join(out_dir, 'ckpt.pt'))
    last = require_arcee(model, s.exit_layer, s.type)
    tokenizer = get_tokenizer(settings['meta']['tokenizer'])
    path, name = os.path.join(out_dir, s.gguf), os.path.basename(os.path.abspath(out_dir))
    with atomic_write(path) as file:
        write_gguf(file, metadata(model, tokenizer, name, s.type, last),
                   list(tensors(model, s.type, last)))
    print(f'{path}: {os.path.getsize(path) / 1e6:.2f} MB, {last + 1} of {model.config.n_layer} '
          f'blocks, {s.type}')

if __name__ == '__main__':
    run(main)
