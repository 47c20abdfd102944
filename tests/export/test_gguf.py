"""export_gguf.py: the gguf package reads what we write, and a plain arcee computes with it what our model computes."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import checkpoint
import export_gguf
from configurator import UserError
from quant import activation_quant, weight_ternary
from tokenizer import get_tokenizer

ARCEE = dict(vocab_size=256, n_embd=256, ffn_dim=512, linear='bitlinear', norm='rmsnorm', sub_norm=False, gate_dim=0)
TYPES = ['TQ2_0', 'TQ1_0', 'F16']


@pytest.fixture
def gguf():
    return pytest.importorskip('gguf', reason='reading GGUF needs the gguf package: requirements-extra.txt')


@pytest.fixture
def export(make_model, tmp_path):
    """export(*flags, **settings): train nothing, but write a run of a model with these settings, and its GGUF file.
    Returns the model and the path."""
    def run(*flags, **settings):
        model = make_model(**ARCEE | settings)
        with torch.no_grad():
            for layer in model.linears():  # an alpha that float16 holds, so that nothing needs to be rounded
                layer.weight *= torch.tensor(0.05).half() / layer.weight.abs().mean()
        checkpoint.save(tmp_path / 'ckpt.pt', {'model': model.state_dict(), 'settings': model.settings(),
                                               'meta': {'tokenizer': 'bytes'}, 'progress': {}})
        export_gguf.main([f'--out_dir={tmp_path}', *flags])
        return model, tmp_path / 'model.gguf'
    return run


def read(gguf, path):
    """The settings of a GGUF file, and its tensors as floats, each (out, in), by the gguf package."""
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items() if not name.startswith('GGUF.')}
    return settings, {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors}


# ---- blocks

@pytest.mark.parametrize('type', ['TQ2_0', 'TQ1_0'])
def test_ternary_blocks_are_those_of_the_gguf_package(gguf, type):
    """Byte for byte, and unpacked they are codes * alpha with alpha in float16, in all 243 combinations of digits."""
    codes, scale = weight_ternary(torch.randn(64, 768))
    packed = {'TQ2_0': export_gguf.tq2_0, 'TQ1_0': export_gguf.tq1_0}[type](codes, scale).numpy()
    kind = gguf.GGMLQuantizationType[type]
    assert packed.shape == (64, 3 * {'TQ2_0': 66, 'TQ1_0': 54}[type])
    assert np.array_equal(packed, gguf.quantize((codes * scale).numpy(), kind))
    assert np.array_equal(gguf.dequantize(packed, kind), (codes * scale.half().float()).numpy())
    if type == 'TQ1_0':
        assert len(np.unique(packed.reshape(-1, 54)[:, :48])) == 243


def test_a_matrix_of_zeros_stays_one(gguf):
    codes, scale = weight_ternary(torch.zeros(1, 256))
    for pack, type in ((export_gguf.tq2_0, 'TQ2_0'), (export_gguf.tq1_0, 'TQ1_0')):
        assert not gguf.dequantize(pack(codes, scale).numpy(), gguf.GGMLQuantizationType[type]).any()


def test_q8_0_rows_are_within_half_a_step(gguf):
    w = torch.randn(50, 256) * torch.logspace(-1, 3, 50)[:, None]
    back = torch.from_numpy(gguf.dequantize(export_gguf.q8_0(w).numpy(), gguf.GGMLQuantizationType.Q8_0))
    steps = w.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True) / 127
    error = (back - w).unflatten(1, (-1, 32)).abs()
    assert (error <= steps * (0.5 + 127 * 2 ** -11)).all() and error.max() > 0  # and what float16 does to the scale


# ---- tensors

@pytest.mark.parametrize('type', TYPES)
def test_tensors_round_trip(gguf, export, type):
    """Every tensor that arcee has and no other; projections are codes * alpha exactly, up to alpha's float16."""
    model, path = export(f'--type={type}')
    _, found = read(gguf, path)
    optional = {gguf.MODEL_TENSOR.ROPE_FREQS, gguf.MODEL_TENSOR.ATTN_ROT_EMBD}
    names = [gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.ARCEE] if t not in optional]
    assert set(found) == {name.format(bid=bid) + '.weight' for name in names for bid in range(3)}
    for i, block in enumerate(model.blocks):
        attn, ffn = block.attn, block.ffn
        for name, layer in (('attn_q', attn.q), ('attn_k', attn.k), ('attn_v', attn.v), ('attn_output', attn.o),
                            ('ffn_up', ffn.up), ('ffn_down', ffn.down)):
            codes, scale = weight_ternary(layer.weight)
            if name in ('attn_q', 'attn_k'):  # row d of a half goes to 2 d, row d of the other half to 2 d + 1
                codes = codes.reshape(-1, 2, 32, 256).permute(0, 2, 1, 3).reshape(codes.shape)
            assert torch.equal(found[f'blk.{i}.{name}.weight'], codes * scale.half().float()), name
        assert torch.equal(found[f'blk.{i}.attn_norm.weight'], block.attn_norm.weight)
        assert torch.equal(found[f'blk.{i}.ffn_norm.weight'], block.ffn_norm.weight)
    assert torch.equal(found['output_norm.weight'], model.norm.weight)
    for name, w in (('token_embd', model.embedding.weight), ('output', model.head.weight)):
        assert_close(found[f'{name}.weight'], w.detach(), rtol=1e-3, atol=1e-6 if type == 'F16' else 5e-3)


def test_full_precision_weights_as_f16(gguf, export):
    model, path = export('--type=F16', linear='fp', n_embd=96, ffn_dim=80)  # and widths that no block divides
    assert torch.equal(read(gguf, path)[1]['blk.2.ffn_down.weight'], model.blocks[2].ffn.down.weight.half().float())


def arcee(settings, w, idx):
    """The architecture as llama.cpp computes it, from a file alone: idx (T,) -> logits (T, V). Activations as in A2."""
    n_head, n_kv_head, D = (settings[f'arcee.{key}'] for key in (
        'attention.head_count', 'attention.head_count_kv', 'rope.dimension_count'))
    angles = torch.outer(torch.arange(len(idx)).float(),
                         settings['arcee.rope.freq_base'] ** (-torch.arange(0, D, 2).float() / D))
    turn = torch.polar(torch.ones_like(angles), angles)  # (T, D / 2)

    def norm(x, name):
        return F.rms_norm(x, x.shape[-1:], w[name], settings['arcee.attention.layer_norm_rms_epsilon'])

    def linear(x, name):
        codes, scale = activation_quant(x)
        return F.linear(codes * scale, w[name])

    def rotate(x):  # (T, H, D): neighbours are the real and the imaginary part of one number
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn[:, None]).flatten(-2)
    h = w['token_embd.weight'][idx]
    for i in range(settings['arcee.block_count']):
        x = norm(h, f'blk.{i}.attn_norm.weight')
        q, k, v = (linear(x, f'blk.{i}.attn_{name}.weight').unflatten(-1, (-1, D)) for name in 'qkv')
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(n_head // n_kv_head, dim=1) for t in (k, v))
        scores = torch.einsum('thd,shd->hts', q, k) / D ** 0.5
        scores = scores.masked_fill(torch.ones(len(idx), len(idx)).triu(1).bool(), -torch.inf)
        y = torch.einsum('hts,shd->thd', scores.softmax(-1), v).flatten(1)
        h = h + linear(y, f'blk.{i}.attn_output.weight')
        x = norm(h, f'blk.{i}.ffn_norm.weight')
        h = h + linear(F.relu(linear(x, f'blk.{i}.ffn_up.weight')).square(), f'blk.{i}.ffn_down.weight')
    return F.linear(norm(h, 'output_norm.weight'), w['output.weight'])


@pytest.mark.parametrize('type', TYPES)
@pytest.mark.parametrize('exit_layer', [0, 1, None])
def test_arcee_computes_what_the_model_computes(gguf, export, tokens, type, exit_layer):
    """At full depth and at exits, up to the order of float32 sums. (Both sides have the file's embedding and head.)"""
    flags = [] if exit_layer is None else [f'--exit_layer={exit_layer}']
    model, path = export(f'--type={type}', *flags)
    settings, w = read(gguf, path)
    assert settings['arcee.block_count'] == (3 if exit_layer is None else exit_layer + 1)
    idx = tokens(1, 16)
    with torch.no_grad():
        model.embedding.weight.copy_(w['token_embd.weight'])
        model.head.weight.copy_(w['output.weight'])
        ours, theirs = model(idx, exit_layer=exit_layer)[0][0], arcee(settings, w, idx[0])
    assert (theirs - ours).std() < 1e-3 * ours.std()


# ---- settings and tokenizer

def test_settings(gguf, export):
    model, path = export('--type=TQ1_0', rope_theta=500.0)
    settings, _ = read(gguf, path)
    expected = {'vocab_size': 256, 'context_length': 16, 'embedding_length': 256, 'block_count': 3,
                'feed_forward_length': 512, 'attention.head_count': 4, 'attention.head_count_kv': 2,
                'attention.layer_norm_rms_epsilon': np.float32(1e-5), 'rope.dimension_count': 64,
                'rope.freq_base': 500.0}
    assert {key: settings[f'arcee.{key}'] for key in expected} == expected
    assert settings['general.architecture'] == 'arcee' == gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.ARCEE]
    assert settings['general.name'] == path.parent.name
    assert settings['general.file_type'] == gguf.LlamaFileType.MOSTLY_TQ1_0
    assert settings['tokenizer.ggml.eos_token_id'] == settings['tokenizer.ggml.bos_token_id'] == 0
    assert settings['tokenizer.ggml.add_bos_token'] is False


def encode(settings, words):
    """BPE as GPT-2's authors wrote it, by the rank of merges instead of tokens: token ids of the words (bytes)."""
    spell = export_gguf.byte_spelling()
    ids = {token: i for i, token in enumerate(settings['tokenizer.ggml.tokens'])}
    rank = {tuple(merge.split(' ')): i for i, merge in enumerate(settings['tokenizer.ggml.merges'])}
    for word in words:
        parts = [spell[b] for b in word]
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in rank]:
            i = list(zip(parts, parts[1:])).index(min(pairs, key=rank.get))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        yield from (ids[part] for part in parts)


def test_byte_vocabulary(gguf, export):
    """256 tokens without merges: each byte of a text is its own id. Byte 0, which is in no text, ends one."""
    settings, _ = read(gguf, export()[1])
    text = 'naïve “λ”\n\tif x == 0:  # ✓ Ā'
    assert list(encode(settings, [text.encode()])) == get_tokenizer('bytes').encode(text)
    assert list(encode(settings, [bytes(range(1, 256))])) == list(range(1, 256))
    assert settings['tokenizer.ggml.tokens'][0] == '<|endoftext|>' and settings['tokenizer.ggml.merges'] == []
    assert settings['tokenizer.ggml.token_type'] == [3] + [1] * 255


def test_gpt2_vocabulary():
    """The merges that GPT-2's published file begins and ends with; merging by them gives tiktoken's ids."""
    import regex
    from tiktoken_ext.openai_public import r50k_pat_str
    tokenizer = get_tokenizer('gpt2')
    settings = export_gguf.vocabulary(tokenizer)
    merges = settings['tokenizer.ggml.merges']
    assert len(merges) == 50000 and merges[:3] == ['Ġ t', 'Ġ a', 'h e'] and merges[-1] == 'Ġg azed'
    assert len(set(settings['tokenizer.ggml.tokens'])) == 50257
    assert settings['tokenizer.ggml.tokens'][50256] == '<|endoftext|>'
    assert [i for i, type in enumerate(settings['tokenizer.ggml.token_type']) if type != 1] == [50256]
    text = "naïve “λ” don't   gaze\n\n\tat 1.58 bits  " + export_gguf.__doc__
    assert list(encode(settings, [word.encode() for word in regex.findall(r50k_pat_str, text)])) \
        == tokenizer.encode(text)


# ---- refusals

@pytest.mark.parametrize('flags, settings, message', [
    ([], dict(linear='hbitlinear'), r"no architecture with linear='hbitlinear': .* config/arcee.py"),
    ([], dict(norm='layernorm', sub_norm=True), r"with norm='layernorm', sub_norm=True: .* config/arcee.py"),
    ([], dict(ffn='swiglu'), r"with ffn='swiglu': .* config/arcee.py"),
    ([], dict(linear_norm='rmsnorm'), r"with linear_norm='rmsnorm': .* config/arcee.py"),
    ([], dict(final_norm=False), r'with final_norm=False: .* config/arcee.py'),
    ([], dict(act_bits=4), r'with act_bits=4: .* config/arcee.py'),
    (['--exit_layer=1'], dict(exit_norm='none'), r"\(exit_norm='none'\).* config/arcee.py"),
    (['--type=TQ1_0'], dict(linear='fp'), r"\(linear='fp'\) .* TQ1_0; .*--type=F16.* config/arcee.py"),
    ([], dict(n_embd=128), r'n_embd=128 and ffn_dim=512 must be multiples of 256; --type=F16'),
    (['--type=TQ1_0'], dict(ffn_dim=384), r'TQ1_0 .* ffn_dim=384 must be multiples of 256; --type=F16'),
    (['--exit_layer=3'], {}, 'exit_layer=3 is outside the model: its 3 layers are 0 to 2'),
    (['--type=Q4_K'], {}, "expected one of 'TQ2_0', 'TQ1_0', 'F16', got 'Q4_K'"),
])
def test_refusals_are_one_sentence_and_leave_no_file(export, tmp_path, flags, settings, message):
    with pytest.raises(UserError, match=message):
        export(*flags, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']


def test_last_exit_of_raw_exits_is_full_depth(gguf, export):
    """exit_norm='none' only concerns layers before the last."""
    assert read(gguf, export('--exit_layer=2', exit_norm='none')[1])[0]['arcee.block_count'] == 3


def test_an_interrupted_export_leaves_the_old_file(export, tmp_path, monkeypatch):
    old = export()[1].read_bytes()

    def full(w):
        raise OSError('No space left on device')
    monkeypatch.setattr(export_gguf, 'q8_0', full)
    with pytest.raises(OSError):
        export('--exit_layer=0')
    assert {path.name for path in tmp_path.iterdir()} == {'ckpt.pt', 'model.gguf'}
    assert (tmp_path / 'model.gguf').read_bytes() == old
