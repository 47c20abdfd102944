"""
Ternary products on a GPU: weights stay at 2 bits until they are in registers; sums are exact.

    y_mn = sum_k x_mk c_nk, int32;    with scales y_mn = (sum_k x_mk c_nk) * (x_scale_m * w_scale_n)

Decoding multiplies a few rows with a whole matrix. It takes as long as the matrix takes to arrive,
and 2 bits a weight are a quarter of int8 codes. torch._int_mm refuses 16 rows or fewer on CUDA;
this kernel takes any shape.

Each program makes one tile of y. It walks along K: load a tile of packed bytes, shift out its four
planes of codes (drawn below), multiply each with the activations of the same columns. BLOCK_M
decides how. From 16 rows on, a plane is an int8 product on tensor cores (tl.dot, of at least 16
rows). Below, a program takes one row of x and keeps a sum for each place in its tile. These sums
meet only at the end, because a sum across threads is slow.

Why 2 bits, and not the 1.6 of quant.pack_ternary? A 2-bit code takes a shift and a mask to unpack.
A base-3 digit takes a division and a remainder, for each weight at each use.

The first calls are slow: Triton compiles, and times the tile sizes below for each new shape.
"""
from __future__ import annotations  # the kernel's annotations name Triton, which may be missing

import functools
import os

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

INTERPRET = triton is not None and os.environ.get('TRITON_INTERPRET') == '1'  # without a GPU

@functools.cache
def available(device_type):
    """(True, how) if the kernel runs on this kind of device, else (False, what is missing)."""
    if triton is None or INTERPRET:
        return INTERPRET, "2-bit products (Triton's interpreter)" if INTERPRET else 'no Triton here'
    if device_type != 'cuda' or not torch.cuda.is_available():
        return False, '2-bit products need a CUDA device'
    if torch.cuda.get_device_capability() < (8, 0):
        return False, 'Triton has int8 products from Ampere (8.0) on, and this GPU is older'
    try:
        trial()
    except Exception as error:  # what Triton calls may fail in any way
        return False, ('Triton does not start here, which takes a C compiler and the headers of '
                       f'Python (python3-dev): {type(error).__name__}')
    return True, '2-bit products (Triton)'

def trial():
    """Compile and run a kernel that does nothing."""
    triton.jit(nothing)[(1,)](torch.zeros(1, device='cuda'))

def nothing(x_ptr):
    tl.store(x_ptr, tl.load(x_ptr))

def require(ok, message):
    if not ok:
        raise ValueError(message)

# Four codes to a byte, as c + 1 in two bits. The four are not neighbours: a row is cut into four
# planes of K4 = ceil(K / 4) columns, and byte j holds column j of each:
#
#     bits   7 6   5 4   3 2   1 0     plane 0: columns  0 ... K4-1    plane 2: 2 K4 ... 3 K4-1
#     plane   3     2     1     0      plane 1: columns K4 ... 2 K4-1  plane 3: 3 K4 ... K-1, zeros
#
# Neighbouring bytes, shifted by the same 2p bits, are then neighbouring columns p K4 + j, and their
# activations are neighbours in memory. Neighbours in one byte would need every fourth activation.

def pack_2bit(codes):
    """codes (N, K) int8 in {-1, 0, 1} -> packed (N, ceil(K / 4)) uint8. ValueError on others."""
    require(codes.dtype == torch.int8 and codes.dim() == 2 and codes.ge(-1).all()
            and codes.le(1).all(),
            f'pack_2bit takes codes -1, 0, 1: (N, K) int8, got {tuple(codes.shape)} {codes.dtype}')
    digits = (F.pad(codes, (0, -codes.shape[1] % 4)) + 1).to(torch.uint8)
    a, b, c, d = digits.unflatten(1, (4, digits.shape[1] // 4)).unbind(1)  # (N, K4) each
    return a | b << 2 | c << 4 | d << 6

def unpack_2bit(packed, K):
    """packed (N, ceil(K / 4)) uint8 -> codes (N, K) int8. ValueError if they do not fit."""
    require_packed(packed, K)
    require(not (packed & packed >> 1 & 0x55).any(), 'no packed ternary weights: two bits are 11')
    planes = [(packed >> 2 * p & 3).to(torch.int8) - 1 for p in range(4)]
    return torch.cat(planes, dim=1)[:, :K]

def require_packed(packed, K):
    require(packed.dtype == torch.uint8 and packed.dim() == 2 and packed.shape[1] == -(-K // 4),
            f'{K} columns are packed as (N, {-(-K // 4)}) uint8, got {tuple(packed.shape)} '
            f'{packed.dtype}')

def ternary_kernel(x_ptr, packed_ptr, x_scale_ptr, w_scale_ptr, y_ptr, M, N, K, K4, w_stride,
                   M_like, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr):
    """One tile (BLOCK_M, BLOCK_N) of y, from BLOCK_J bytes, 4 BLOCK_J columns, at a time."""
    tiles_n = tl.cdiv(N, BLOCK_N)  # neighbours share rows of x; packed weights fit the L2 cache
    m_tile = (tl.program_id(0) // tiles_n).to(tl.int64)  # int64: M N may exceed 2^31
    n_tile = (tl.program_id(0) % tiles_n).to(tl.int64)
    m, n = m_tile * BLOCK_M + tl.arange(0, BLOCK_M), n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_J) if BLOCK_M == 1 else (BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K4, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (n[:, None] < N) & (j[None, :] < K4)
        # 0x55: four codes 0. Past the end of a plane x goes on with the next, but weights are 0
        packed = tl.load(packed_ptr + n[:, None] * K4 + j[None, :], mask=inside, other=0x55)
        for p in tl.static_range(4):
            k = p * K4 + j
            mask = (m[:, None] < M) & (k[None, :] < K)
            x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=mask, other=0)
            w = (packed >> 2 * p & 3).to(tl.int8) - 1  # plane p: (BLOCK_N, BLOCK_J)
            if BLOCK_M == 1:
                acc += x.to(tl.int32) * w  # (1, BLOCK_J) * (BLOCK_N, BLOCK_J)
            else:
                acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)  # (BLOCK_M, BLOCK_N)
    if BLOCK_M == 1:
        acc = tl.sum(acc, axis=1)[None, :]  # (1, BLOCK_N)
    if x_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + m, m < M)
        w_scale = tl.load(w_scale_ptr + n * w_stride, n < N)
        acc = acc.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])  # as packed.product
    tl.store(y_ptr + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N))

# (BLOCK_M, BLOCK_N, BLOCK_J, warps) to choose from, for M up to M_like, a power of 2
FEW_ROWS = [(1, 32, 64, 4), (1, 16, 128, 4), (1, 8, 128, 2), (1, 4, 256, 2), (1, 16, 256, 4)]
MANY_ROWS = [(64, 64, 64, 4), (16, 64, 64, 4), (16, 32, 128, 4), (32, 64, 64, 4), (64, 128, 32, 4),
             (128, 64, 64, 8)]

@functools.cache
def tuned(*tiles):  # (not before it is needed: Triton 3.2 then asks for a GPU)
    configs = [triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_J=j), num_warps=warps)
               for m, n, j, warps in tiles]
    kernel = triton.jit(ternary_kernel, do_not_specialize=['M', 'M_like'])  # one for all M
    return triton.autotune(configs[:1] if INTERPRET else configs, key=['M_like', 'N', 'K'])(kernel)

def ternary_matmul(x_codes, packed, K, x_scale=None, w_scale=None, dtype=torch.float32):
    """x_codes (M, K) int8, packed (N, ceil(K / 4)) uint8 -> y (M, N) int32, exactly.

    Given x_scale (M, 1) and w_scale () or (N, 1), float32: y scaled, as floating `dtype`.
    ValueError if shapes, dtypes or devices do not fit; RuntimeError where there is no Triton."""
    M, N, scales = len(x_codes), len(packed), [s for s in (x_scale, w_scale) if s is not None]
    require(x_codes.dtype == torch.int8 and x_codes.dim() == 2 and x_codes.shape[1] == K,
            f'activations are (M, {K}) int8, got {tuple(x_codes.shape)} {x_codes.dtype}')
    require_packed(packed, K)
    require(not scales or [scale.dtype for scale in scales] == [torch.float32] * 2
            and x_scale.shape == (M, 1) and w_scale.shape in ((), (1, 1), (N, 1))
            and dtype.is_floating_point,
            f'scales are ({M}, 1) and () or ({N}, 1) float32, for a floating result, got '
            f'{[(tuple(scale.shape), scale.dtype) for scale in scales]} for {dtype}')
    require(len({t.device for t in (x_codes, packed, *scales)}) == 1, 'tensors are on one device')
    ok, reason = available(x_codes.device.type)
    if not ok:
        raise RuntimeError(reason)
    y = torch.empty(M, N, dtype=dtype if scales else torch.int32, device=x_codes.device)
    if y.numel():  # else there is nothing to run, or to time
        kernel = tuned(*(FEW_ROWS if M < 16 else MANY_ROWS))
        M_like = min(1024, 1 << max(4, (M - 1).bit_length()))
        tensors = [t if t is None else t.contiguous() for t in (x_codes, packed, *scales, y)]
        if not scales:
            tensors[2:2] = [None, None]
        stride = int(bool(scales) and w_scale.numel() > 1)  # 0: one scale for all rows

        def grid(tile):
            return triton.cdiv(M, tile['BLOCK_M']) * triton.cdiv(N, tile['BLOCK_N']),
        with torch.cuda.device_of(y):  # Triton launches on the current device
            kernel[grid](*tensors, M, N, K, packed.shape[1], stride, M_like)
    return y
