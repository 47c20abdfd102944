"""The benchmark runs on a small shape, and its product in C is the layer's."""
import inspect
import json

import pytest
import torch

from fast import bench, native

SHAPE = bench.SQUARE | dict(n_embd=32, ffn_dim=32, n_head=2, n_kv_head=2, n_layer=2,
                            block_size=32, batch_size=2)

def test_what_a_gpu_would_be_asked_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, 'QUICK', bench.on_a_gpu(SHAPE, 'x'))
    monkeypatch.setattr(bench, 'product_speed', lambda dtype, device: 1e12)
    bench.main(['--quick', '--only=, x,', f'--json={tmp_path}/out.json'])
    report = json.loads((tmp_path / 'out.json').read_text())['benchmarks']
    assert len(report) == 6 and all(r['figure'] > 0 for r in report.values())
    ternary, fp = (report['train, x, BitLinear']['details'][case] for case in ('ternary', 'fp'))
    assert ternary['launches'] > fp['launches'] > 50 and 0 < ternary['MFU'] < 1
    assert report['decode, x, once']['details']['ours']['tokens/s'] > 0

def test_every_case_can_be_called():
    """Settings of a whole run once met an argument of the same name, after half an hour."""
    for _, _, made in (*bench.BENCHMARKS.values(), *bench.ON_A_GPU.values()):
        for function, shape, changes in made.values():
            inspect.signature(function).bind(shape, **changes)
            inspect.signature(bench.of_a_step).bind('step', 'device', 'seconds', shape, **changes)

@pytest.mark.skipif(not native.available()[0], reason=native.available()[1])
def test_the_product_in_c_is_that_of_the_layer():
    multiply = bench.product(SHAPE, 37, times=1)
    multiply()
    x, y = multiply.keeps
    expected = bench.build(SHAPE).blocks[0].attn.o(x).detach()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
