"""Ternary products in Triton. Whether Triton interprets is settled when it is imported. So what
runs a kernel is in a process of its own: pytest on this file, for interpreted_* or compiled_*."""
import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

from fast import triton_ternary
from fast.triton_ternary import available, pack_2bit, ternary_matmul, unpack_2bit

ROOT = pathlib.Path(triton_ternary.__file__).parents[1]
needs_triton = pytest.mark.skipif(not hasattr(triton_ternary.triton, 'knobs'),
                                  reason='no Triton here, or one that wants a GPU for this')

def codes(N, K):
    return torch.randint(-1, 2, (N, K)).to(torch.int8)

def activations(M, K):
    return torch.randint(-128, 128, (M, K)).to(torch.int8)

def reference(x_codes, w_codes):
    return x_codes.int() @ w_codes.int().t()

def run_functions(prefix, **env):
    env = {k: v for k, v in os.environ.items() if k != 'TRITON_INTERPRET'} | env
    command = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-o',
               f'python_functions={prefix}*', __file__]
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True).stdout

@pytest.mark.parametrize('K', [0, 1, 2, 3, 4, 5, 63, 257])
def test_layout_and_round_trip(K):
    """Ten columns are three bytes: columns 0-2, 3-5, 6-8 and 9 are the planes, low bits first."""
    row = torch.tensor([[1, 0, -1, 0, 1, -1, -1, 0, 1, 1]], dtype=torch.int8)
    assert pack_2bit(row).tolist() == [[0b10_00_01_10, 0b01_01_10_01, 0b01_10_00_00]]
    w = codes(7, K)
    packed = pack_2bit(w)
    assert packed.dtype == torch.uint8 and packed.shape == (7, -(-K // 4))
    assert torch.equal(unpack_2bit(packed, K), w) and unpack_2bit(packed, K).dtype == torch.int8

def test_what_is_missing_is_named(monkeypatch):
    """Without Python's headers Triton was said to be there, and its first use was a traceback."""
    def verdict(device_type, where=triton_ternary, **patches):
        for name, value in patches.items():
            monkeypatch.setattr(where, name, value)
        return available.__wrapped__(device_type)

    def fails():
        raise subprocess.CalledProcessError(1, 'gcc')
    assert verdict('cuda', INTERPRET=False, triton=None) == (False, 'no Triton here')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert verdict('cpu', triton=object()) == (False, '2-bit products need a CUDA device')
    assert 'older' in verdict('cuda', torch.cuda, get_device_capability=lambda: (7, 5))[1]
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 0))
    assert not verdict('cuda', trial=fails)[0] and 'python3-dev' in verdict('cuda')[1]
    assert verdict('cuda', trial=lambda: None) == (True, '2-bit products (Triton)')
    monkeypatch.setattr(triton_ternary, 'available', lambda device_type: (False, 'not here'))
    with pytest.raises(RuntimeError, match='not here'):
        ternary_matmul(activations(1, 4), pack_2bit(codes(2, 4)), 4)

def test_refusals():
    """One sentence each, before anything is computed."""
    x, w = activations(2, 9), pack_2bit(codes(5, 9))
    for wrong, message in [
            ((x.int(), w, 9), 'activations are'), ((x, w[:, :2], 9), 'columns are packed as'),
            ((x, w, 9, torch.ones(2, 1), torch.ones(5)), 'scales are'),
            ((x, w.to('meta'), 9), 'on one device')]:
        with pytest.raises(ValueError, match=message):
            ternary_matmul(*wrong)
    with pytest.raises(ValueError, match='pack_2bit takes'):
        pack_2bit(codes(2, 3) + 3)
    with pytest.raises(ValueError, match='two bits are 11'):
        unpack_2bit(w | 0b1100, 9)

@needs_triton
def test_kernel_in_the_interpreter():
    assert re.search(r'\b3 passed\b', run_functions('interpreted_', TRITON_INTERPRET='1'))

def interpreted_product_is_exact():
    """Each pair of sizes in each pair of dimensions, nothing at all, and the largest sums."""
    sizes = [1, 3, 16, 17, 65, 257]
    shapes = [(sizes[(i + j) % 6], N, K) for (i, N), (j, K) in itertools.product(
        enumerate(sizes), repeat=2)] + [(0, 5, 9), (2, 0, 9), (20, 5, 0)]
    for M, N, K in shapes:
        x, w = activations(M, K), codes(N, K)
        y = ternary_matmul(x, pack_2bit(w), K)
        assert y.dtype == torch.int32 and torch.equal(y, reference(x, w)), (M, N, K)
    for M, value, code in itertools.product((1, 2, 16), (-128, 127), (-1, 0, 1)):
        x, w = (torch.full((n, 1030), v).to(torch.int8) for n, v in ((M, value), (3, code)))
        assert ternary_matmul(x, pack_2bit(w), 1030).unique().tolist() == [1030 * value * code]

def interpreted_every_tile_size(monkeypatch):
    """Those for few rows serve up to 15 of them, those with tl.dot the others."""
    x, w = activations(33, 530), codes(70, 530)
    for name, M in (('FEW_ROWS', 15), ('MANY_ROWS', 33)):
        for tile in getattr(triton_ternary, name):
            monkeypatch.setattr(triton_ternary, name, [tile])
            assert torch.equal(ternary_matmul(x[:M], pack_2bit(w), 530), reference(x[:M], w)), tile

def interpreted_scaled_product_of_strided_inputs():
    """Equal in float32 and float16. In bfloat16 the interpreter cuts bits off: to 1/128."""
    dtypes = torch.float32, torch.float16, torch.bfloat16
    for M, per_row, dtype in itertools.product((1, 37), (False, True), dtypes):
        x, w, x_scale = activations(65, M).t(), codes(65, 50).t(), torch.rand(2 * M, 1)[::2] / 100
        w_scale = torch.rand(100, 1)[::2] if per_row else torch.rand(())
        y = ternary_matmul(x, pack_2bit(w), 65, x_scale, w_scale, dtype)
        expected = (reference(x, w).float() * (x_scale * w_scale.reshape(-1))).to(dtype)
        tolerance = 1 / 128 if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=0)

@needs_triton
def test_kernel_compiles_for_gpus(tmp_path):
    folder = pathlib.Path(triton_ternary.triton.__file__).parent
    if not list(folder.glob('backends/nvidia/bin/ptxas*')):
        pytest.skip('this Triton cannot compile for NVIDIA GPUs')
    assert '2 passed' in run_functions('compiled_', TRITON_CACHE_DIR=str(tmp_path))

@pytest.mark.parametrize('capability, product', [(80, 'mma.sync.*s32.s8'), (90, 'mma.*s32.s8.s8')])
def compiled_products_are_int8_on_tensor_cores(capability, product):
    """Tiles assemble; tl.dot becomes an int8 product; bfloat16 results are rounded, not cut off."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = ['x_ptr', 'packed_ptr', 'x_scale_ptr', 'w_scale_ptr', 'y_ptr', 'M', 'N', 'K', 'K4',
             'w_stride', 'M_like', 'BLOCK_M', 'BLOCK_N', 'BLOCK_J']
    types = ['*i8', '*u8', '*fp32', '*fp32', '*bf16', *['i32'] * 6, *['constexpr'] * 3]
    aligned = {(i,): [['tt.divisibility', 16]] for i in (0, 1, 2, 3, 4, 6, 7, 8)}  # as is usual
    for tile in (triton_ternary.FEW_ROWS[0], *triton_ternary.MANY_ROWS[:2]):
        constants = {(11 + i,): size for i, size in enumerate(tile[:3])}
        source = ASTSource(triton.jit(triton_ternary.ternary_kernel), dict(zip(names, types)),
                           constants, aligned)
        kernel = triton.compile(source, target=GPUTarget('cuda', capability, 32),
                                options=dict(num_warps=tile[3]))
        assert bool(re.search(product, kernel.asm['ptx'])) == (tile[0] > 1), tile
        assert 'cvt.rn.bf16' in kernel.asm['ptx'] and len(kernel.asm['cubin']), tile
