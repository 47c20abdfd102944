"""
A trained model as GGUF, the file format of llama.cpp: for the recipes that llama.cpp can run.

    python -m export.gguf                    the newest run: out/<name>/model.gguf, weights as TQ2_0
    python -m export.gguf --type=TQ1_0       fewer bits, slower to unpack; F16 multiplies in floats
    python -m export.gguf --exit_layer=3     an exit is a file with fewer blocks: 0 to 3, norm, head

llama.cpp has no Hadamard transform and no SubLN (README.md says what that would take). What it
calls arcee is our architecture without them: RMSNorm, rotary positions, grouped queries, a
squared-ReLU FFN of two matrices, a head of its own. config/arcee.py trains that.

A GGUF file, little-endian throughout:

    "GGUF", version 3, number of tensors, number of settings
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

What differs from model.py: alpha is rounded to float16, head and embedding to Q8_0 (beside ternary
weights) or float16. llama.cpp quantizes activations with one scale per 256 values, where A2 has one
per token, and for F16 weights not at all. README.md has what that comes to.
"""
import os
import struct
from dataclasses import dataclass
from typing import Literal

import torch

from common import atomic_write, find_run, require_suffix
from configurator import UserError, configure, run
from model import BitSkip, open_model
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


# --------------------------------------------------------------------------------------------------
# tensors as bytes: codes (out, k) int8 and their scale, or floats -> (out, bytes of a row) uint8

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


def f16(codes, scale=1.0):
    return (codes * scale).half().view(torch.uint8)


def tensors(model, type, last):
    """Name, type, shape and bytes of each tensor of blocks 0 ... last and around them. The final
    norm comes with any number of blocks: exits read h_l under it, too."""
    def projection(name, layer, heads=None):
        codes, scale = layer.ternary() if isinstance(layer, BitLinear) else (layer.weight, 1.0)
        if heads:
            codes = neighbours(codes, heads)
        pack = {'TQ1_0': tq1_0, 'TQ2_0': tq2_0, 'F16': f16}[type]
        return name, type, codes.shape, pack(codes, scale)

    def table(name, w):
        return (name, 'F16', w.shape, f16(w)) if type == 'F16' else (name, 'Q8_0', w.shape, q8_0(w))

    def norm(name, module):
        return name, 'F32', module.weight.shape, module.weight.float().view(torch.uint8)

    yield table('token_embd.weight', model.embedding.weight)
    for i, block in enumerate(model.blocks[:last + 1]):
        yield norm(f'blk.{i}.attn_norm.weight', block.attn_norm)
        yield projection(f'blk.{i}.attn_q.weight', block.attn.q, model.config.n_head)
        yield projection(f'blk.{i}.attn_k.weight', block.attn.k, model.config.n_kv_head)
        yield projection(f'blk.{i}.attn_v.weight', block.attn.v)
        yield projection(f'blk.{i}.attn_output.weight', block.attn.o)
        yield norm(f'blk.{i}.ffn_norm.weight', block.ffn_norm)
        yield projection(f'blk.{i}.ffn_up.weight', block.ffn.up)
        yield projection(f'blk.{i}.ffn_down.weight', block.ffn.down)
    yield norm('output_norm.weight', model.norm)
    yield table('output.weight', model.head.weight)


def neighbours(w, heads):
    """model.py rotates (x_i, x_{i + D/2}), llama.cpp (x_2i, x_2i+1). That is the same, if the rows
    of q and k change places: w (heads D, k), per head 0, D/2, 1, D/2 + 1, ..."""
    return w.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


# --------------------------------------------------------------------------------------------------
# settings

def metadata(model, tokenizer, name, type, last):
    config = model.config
    return {
        'general.architecture': 'arcee',
        'general.name': name,
        'general.file_type': FILE_TYPES[type],
        'general.quantization_version': 2,
        'arcee.vocab_size': config.vocab_size,
        'arcee.context_length': config.block_size,
        'arcee.embedding_length': config.n_embd,
        'arcee.block_count': last + 1,
        'arcee.feed_forward_length': config.ffn_dim,
        'arcee.attention.head_count': config.n_head,
        'arcee.attention.head_count_kv': config.n_kv_head,
        'arcee.attention.layer_norm_rms_epsilon': model.norm.eps,
        'arcee.rope.dimension_count': config.n_embd // config.n_head,
        'arcee.rope.freq_base': config.rope_theta,
        **vocabulary(tokenizer)}


def vocabulary(tokenizer):
    """Both tokenizers are byte-pair encodings; 'bytes' has learned no merges at all."""
    spell, tokens = spelling(tokenizer)
    rank = {token: i for i, token in enumerate(tokens) if i != tokenizer.eot}
    merges = [' '.join(map(spell, last_merge(token, rank))) for token in rank if len(token) > 1]
    return {
        'tokenizer.ggml.model': 'gpt2',
        'tokenizer.ggml.pre': 'gpt-2',  # the pattern that cuts text into words
        'tokenizer.ggml.tokens': [spell(t) if t in rank else '<|endoftext|>' for t in tokens],
        'tokenizer.ggml.token_type': [1 if t in rank else 3 for t in tokens],  # normal, control
        'tokenizer.ggml.merges': merges,
        'tokenizer.ggml.bos_token_id': tokenizer.eot,
        'tokenizer.ggml.eos_token_id': tokenizer.eot,
        'tokenizer.ggml.add_bos_token': False}


def spelling(tokenizer):
    """How GPT-2's files spell a token (a function of bytes), and all tokens, as bytes. A byte is
    spelled as itself if it is printable, else as the next character from 256 on."""
    others = iter(range(256, 512))
    characters = [chr(b) if chr(b).isprintable() and b != 32 else chr(next(others))
                  for b in range(256)]
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
    return lambda token: ''.join(characters[b] for b in token), tokens


def last_merge(token, ranks):
    """The two parts that BPE makes `token` (bytes) of, in the end."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        i = min(range(len(parts) - 1),
                key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


# --------------------------------------------------------------------------------------------------
# the file

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


# --------------------------------------------------------------------------------------------------
# the script

def require_arcee(model, last):
    """UserError if arcee cannot express blocks 0 ... last of this model."""
    config = model.config
    unfit = [f'{name}={getattr(config, name)!r}' for name, fits in ARCEE.items()
             if getattr(config, name) not in fits]
    if unfit or type(model) is not BitSkip:
        what = ', '.join(unfit) or f'the changes of {type(model).__name__}'
        raise UserError(f'arcee, which llama.cpp and transformers know, has no {what}; a model '
                        'trained with config/arcee.py is one')
    if config.exit_norm == 'none' and last < config.n_layer - 1:
        raise UserError("exits of this model read h_l without the final norm (exit_norm='none'), "
                        'which arcee always applies; leave out --exit_layer')


def require_type(config, type):
    """UserError if tensors of this type cannot hold the model's weights."""
    if type != 'F16' and config.linear == 'fp':
        raise UserError(f"a full-precision model (linear='fp') has no ternary weights for {type}; "
                        'write it with --type=F16')
    if type != 'F16' and (config.n_embd % BLOCK or config.ffn_dim % BLOCK):
        raise UserError(f'{type} has blocks of {BLOCK} weights, so n_embd={config.n_embd} and '
                        f'ffn_dim={config.ffn_dim} must be multiples of it; --type=F16 takes any')


def exit_of(model, exit_layer):
    """The last block of a model to write, for a flag --exit_layer."""
    try:
        return model.require_layer(exit_layer)
    except ValueError as error:
        raise UserError(str(error)) from None


@torch.no_grad()
def main(argv):
    s = configure(ExportSettings, argv)
    require_suffix('--gguf', s.gguf, '.gguf')
    out_dir = find_run(s.out_dir)
    model, settings = open_model(os.path.join(out_dir, 'ckpt.pt'))
    last = exit_of(model, s.exit_layer)
    require_arcee(model, last)
    require_type(model.config, s.type)
    tokenizer = get_tokenizer(settings['meta']['tokenizer'])
    path, name = os.path.join(out_dir, s.gguf), os.path.basename(os.path.abspath(out_dir))
    with atomic_write(path) as file:
        write_gguf(file, metadata(model, tokenizer, name, s.type, last),
                   list(tensors(model, s.type, last)))
    print(f'{path}: {os.path.getsize(path) / 1e6:.2f} MB, {last + 1} of {model.config.n_layer} '
          f'blocks, {s.type}')


if __name__ == '__main__':
    run(main)
