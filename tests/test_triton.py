"""Ternary products in Triton. Whether Triton interprets is settled when it is imported, so what runs a kernel runs in
a process of its own: pytest on this file, for the functions named interpreted_* or compiled_*."""
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import triton_ternary
from quant import BitLinear, activation_quant, fake_quant_linear
from triton_ternary import available, pack_2bit, ternary_matmul, unpack_2bit

SIZES = [1, 3, 15, 16, 17, 63, 64, 65, 100, 257]
needs_triton = pytest.mark.skipif(importlib.util.find_spec('triton') is None, reason='Triton is not installed')


def codes(N, K):
    return torch.randint(-1, 2, (N, K)).to(torch.int8)


def activations(M, K):
    return torch.randint(-128, 128, (M, K)).to(torch.int8)


def reference(x_codes, w_codes):
    return x_codes.int() @ w_codes.int().t()


def python(*arguments, **env):
    """Run Python in the repository's folder; its output."""
    env = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'} | env
    result = subprocess.run([sys.executable, *arguments], env=env, cwd=pathlib.Path(triton_ternary.__file__).parent,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def run_functions(prefix, **env):
    return python('-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-o', f'python_functions={prefix}*', __file__,
                  **env)


# --------------------------------------------------------------------------------------------------------------------
# layout

def test_layout_by_hand():
    """Ten columns are three bytes: columns 0-2, 3-5, 6-8 and 9 are the planes, from the low bits up."""
    row = torch.tensor([[1, 0, -1, 0, 1, -1, -1, 0, 1, 1]], dtype=torch.int8)
    assert pack_2bit(row).tolist() == [[0b10_00_01_10, 0b01_01_10_01, 0b01_10_00_00]]


@pytest.mark.parametrize('K', [0, 1, 2, 3, 4, 5, *SIZES[2:]])
def test_pack_round_trip(K):
    w = codes(7, K)
    packed = pack_2bit(w)
    assert packed.dtype == torch.uint8 and packed.shape == (7, -(-K // 4))
    assert torch.equal(unpack_2bit(packed, K), w) and unpack_2bit(packed, K).dtype == torch.int8


def test_every_quadruple_of_codes_has_its_own_byte():
    w = torch.tensor(list(itertools.product((-1, 0, 1), repeat=4)), dtype=torch.int8)
    packed = pack_2bit(w)
    assert packed.unique().numel() == 81 and torch.equal(unpack_2bit(packed, 4), w)


def test_storage_refusals():
    for bad in (codes(2, 3) + 3, codes(2, 3).int(), codes(2, 3).float(), codes(2, 3)[0]):
        with pytest.raises(ValueError, match='pack_2bit takes'):
            pack_2bit(bad)
    packed = pack_2bit(codes(2, 9))
    for bad, K in ((packed, 8), (packed, 13), (packed.int(), 9), (packed[0], 9)):
        with pytest.raises(ValueError, match='columns are packed as'):
            unpack_2bit(bad, K)
    with pytest.raises(ValueError, match='a pair of bits is 11'):
        unpack_2bit(packed | 0b1100, 9)


# --------------------------------------------------------------------------------------------------------------------
# who may use it

def test_what_is_missing_is_named(monkeypatch):
    def verdict(device_type):
        return available.__wrapped__(device_type)
    monkeypatch.setattr(triton_ternary, 'triton', None)
    monkeypatch.setattr(triton_ternary, 'INTERPRET', False)
    assert verdict('cuda') == (False, 'Triton is not installed')
    monkeypatch.setattr(triton_ternary, 'triton', object())
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert verdict('cpu') == verdict('cuda') == (False, '2-bit products need a CUDA device')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (7, 5))
    assert not verdict('cuda')[0] and 'older' in verdict('cuda')[1]
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: (8, 0))
    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setattr('shutil.which', lambda name: None)
    assert not verdict('cuda')[0] and 'C compiler' in verdict('cuda')[1]
    monkeypatch.setattr('shutil.which', lambda name: f'/bin/{name}')
    assert verdict('cuda') == (True, '2-bit products (Triton)')
    assert not verdict('cpu')[0]  # a GPU beside it changes nothing
    monkeypatch.setattr(triton_ternary, 'INTERPRET', True)
    assert verdict('cpu')[0] and 'interpreter' in verdict('cpu')[1]


def test_never_runs_where_it_is_not_available(monkeypatch):
    monkeypatch.setattr(triton_ternary, 'available', lambda device_type: (False, f'not on {device_type}'))
    with pytest.raises(RuntimeError, match='not on cpu'):
        ternary_matmul(activations(1, 4), pack_2bit(codes(2, 4)), 4)


def test_imports_without_triton():
    output = python('-c', "import sys; sys.modules['triton'] = None; import triton_ternary as t; "
                          "print(t.available('cpu'), t.available('cuda'), t.pack_2bit)")
    assert output.count("(False, 'Triton is not installed')") == 2


def test_product_refusals():
    """One sentence each, before anything is computed."""
    x, w, K = activations(2, 9), pack_2bit(codes(5, 9)), 9
    x_scale, w_scale = torch.ones(2, 1), torch.ones(())
    for wrong, message in [
            ((x.int(), w, K), 'activations are'), ((x.float(), w, K), 'activations are'),
            ((x[0], w, K), 'activations are'), ((x[None], w, K), 'activations are'), ((x, w, 10), 'activations are'),
            ((x, w[:, :2], K), 'columns are packed as'), ((x, w.to(torch.int8), K), 'columns are packed as'),
            ((x, w[0], K), 'columns are packed as'), ((x, codes(5, 9), K), 'columns are packed as'),
            ((x, w, K, x_scale), 'scales are'), ((x, w, K, None, w_scale), 'scales are'),
            ((x, w, K, x_scale[:, 0], w_scale), 'scales are'), ((x, w, K, x_scale[:1], w_scale), 'scales are'),
            ((x, w, K, x_scale, torch.ones(4)), 'scales are'), ((x, w, K, x_scale, torch.ones(5, 1)), 'scales are'),
            ((x, w, K, x_scale.double(), w_scale), 'scales are'), ((x, w, K, x_scale, w_scale.half()), 'scales are'),
            ((x, w, K, x_scale, w_scale, torch.int32), 'scales are'), ((x, w.to('meta'), K), 'on one device')]:
        with pytest.raises(ValueError, match=message) as error:
            ternary_matmul(*wrong)
        assert '\n' not in str(error.value) and len(str(error.value)) < 200


# --------------------------------------------------------------------------------------------------------------------
# the kernel, interpreted

@needs_triton
def test_kernel_in_the_interpreter():
    assert re.search(r'\b10 passed\b', run_functions('interpreted_', TRITON_INTERPRET='1'))


def interpreted_product_is_exact():
    """Sizes in a Latin square: each pair of them in each pair of dimensions, and some tiles in a row."""
    assert available('cpu') == (True, "2-bit products (Triton's interpreter)")
    shapes = [(SIZES[(i + j) % 10], N, K) for (i, N), (j, K) in itertools.product(enumerate(SIZES), repeat=2)]
    for M, N, K in shapes + [(1, 257, 1100), (15, 40, 600), (16, 65, 600), (256, 130, 258)]:
        x, w = activations(M, K), codes(N, K)
        y = ternary_matmul(x, pack_2bit(w), K)
        assert y.dtype == torch.int32 and torch.equal(y, reference(x, w)), (M, N, K)


def interpreted_empty_products():
    for M, N, K in itertools.product((0, 2, 20), (0, 5), (0, 9)):
        x, w = activations(M, K), codes(N, K)
        assert torch.equal(ternary_matmul(x, pack_2bit(w), K), reference(x, w)), (M, N, K)


@pytest.mark.parametrize('M', [1, 2, 16])
def interpreted_extremes(M):
    """The largest sums, of either sign."""
    for value, code in itertools.product((-128, 127), (-1, 0, 1)):
        x, w = torch.full((M, 1030), value, dtype=torch.int8), torch.full((3, 1030), code, dtype=torch.int8)
        assert ternary_matmul(x, pack_2bit(w), 1030).unique().tolist() == [1030 * value * code]


def interpreted_every_byte():
    """The product with the identity is the weights themselves: all 81 bytes, all four planes."""
    w = torch.tensor(list(itertools.product((-1, 0, 1), repeat=4)), dtype=torch.int8)
    for M in (4, 16):
        y = ternary_matmul(torch.eye(M, 4, dtype=torch.int8), pack_2bit(w), 4)
        assert torch.equal(y[:4].t(), w.int()) and not y[4:].any()


def interpreted_every_tile_size(monkeypatch):
    """Those for few rows serve up to 15 of them, those with tl.dot the others: each list works without the other."""
    x, w = activations(33, 1030), codes(70, 1030)
    for name, other, M, border in (('few_rows', 'many_rows', 2, 15), ('many_rows', 'few_rows', 33, 16)):
        for tile in getattr(triton_ternary, name.upper()):
            monkeypatch.setattr(triton_ternary, name, triton_ternary.tuned([tile]))
            assert torch.equal(ternary_matmul(x[:M], pack_2bit(w), 1030), reference(x[:M], w)), tile
        with monkeypatch.context() as patch:
            patch.setattr(triton_ternary, other, None)
            rows = x[:border, :9]
            assert torch.equal(ternary_matmul(rows, pack_2bit(w[:, :9]), 9), reference(rows, w[:, :9])), border


def interpreted_scaled_product():
    """Equal in float32 and float16. In bfloat16 the interpreter cuts bits off where a GPU rounds, so to 1/128."""
    dtypes = torch.float32, torch.float16, torch.bfloat16
    for M, per_row, dtype in itertools.product((1, 5, 37), (False, True), dtypes):
        x, w, x_scale = activations(M, 65), codes(50, 65), torch.rand(M, 1) / 100
        w_scale = torch.rand(50) if per_row else torch.rand(())
        y = ternary_matmul(x, pack_2bit(w), 65, x_scale, w_scale, dtype)
        expected = (reference(x, w).float() * (x_scale * w_scale)).to(dtype)
        tolerance = 1 / 128 if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=0)


def interpreted_strided_inputs():
    x, w = activations(40, 18).t(), codes(40, 10).t()
    x_scale, w_scale = torch.rand(36, 1)[::2], torch.rand(20)[::2]
    packed = torch.stack([pack_2bit(w)] * 2, dim=2)[:, :, 0]
    assert not any(t.is_contiguous() for t in (x, w, packed, x_scale, w_scale))
    assert torch.equal(ternary_matmul(x, packed, 40, x_scale, w_scale), reference(x, w).float() * (x_scale * w_scale))


def interpreted_product_of_a_layer():
    """A frozen BitLinear by this kernel: A3 by its definition, to the rounding of float32."""
    layer, x = BitLinear(70, 33), torch.randn(5, 70)
    expected = fake_quant_linear(x, layer.weight, 8)
    layer.freeze()
    y = ternary_matmul(*activation_quant(x)[:1], pack_2bit(layer.codes), 70, activation_quant(x)[1], layer.scale)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# the kernel, compiled (Triton brings NVIDIA's assembler along, so this takes no GPU)

@needs_triton
def test_kernel_compiles_for_gpus(tmp_path):
    if not list(pathlib.Path(importlib.util.find_spec('triton').origin).parent.glob('backends/nvidia/bin/ptxas*')):
        pytest.skip('this Triton cannot compile for NVIDIA GPUs')
    assert '2 passed' in run_functions('compiled_', TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.parametrize('capability, product', [(80, 'mma.sync.*s32.s8.s8.s32'), (90, 'mma.*s32.s8.s8')])
def compiled_products_are_int8_on_tensor_cores(capability, product):
    """All tile sizes assemble; tl.dot becomes an int8 product, and results are rounded to bfloat16, not cut off."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names = ['x_ptr', 'packed_ptr', 'x_scale_ptr', 'w_scale_ptr', 'y_ptr', 'M', 'N', 'K', 'K4', 'w_stride', 'M_like',
             'BLOCK_M', 'BLOCK_N', 'BLOCK_J']
    types = ['*i8', '*u8', '*fp32', '*fp32', '*bf16', *['i32'] * 6, *['constexpr'] * 3]
    aligned = {(i,): [['tt.divisibility', 16]] for i in (0, 1, 2, 3, 4, 6, 7, 8)}  # what Triton finds for usual sizes
    for tile in triton_ternary.FEW_ROWS + triton_ternary.MANY_ROWS[:None if capability == 80 else 1]:
        constants = {(11 + i,): size for i, size in enumerate(tile[:3])}
        source = ASTSource(triton.jit(triton_ternary.ternary_kernel), dict(zip(names, types)), constants, aligned)
        kernel = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=dict(num_warps=tile[3]))
        assert bool(re.search(product, kernel.asm['ptx'])) == (tile[0] > 1), tile
        assert 'cvt.rn.bf16' in kernel.asm['ptx'] and len(kernel.asm['cubin']), tile
