"""export/gguf.py: the gguf package reads what we write, and a plain arcee computes what we do."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import ARCEE, EXTRA
from torch.testing import assert_close

from checkpoint import save_checkpoint
from configurator import UserError
from export import gguf as ours
from export import spelling
from prepare import get_tokenizer
from quant import activation_quant, weight_ternary

gguf = pytest.importorskip('gguf', reason=f'gguf {EXTRA}')
SIZES = dict(vocab_size=256, n_embd=256, ffn_dim=512)
TYPES = ['TQ2_0', 'TQ1_0', 'F16']

@pytest.fixture
def export(make_model, tmp_path):
    """export(*flags, **settings): write a run of such a model, and its file; model and path."""
    def run(*flags, **settings):
        model = make_model(**ARCEE | SIZES | settings)
        with torch.no_grad():
            for layer in model.linears():  # an alpha that float16 holds: nothing is rounded
                layer.weight *= torch.tensor(0.05).half() / layer.weight.abs().mean()
        save_checkpoint(tmp_path / 'ckpt.pt', {
            'model': model.state_dict(), 'settings': vars(model.config), 'progress': {},
            'meta': {'tokenizer': 'bytes', 'vocab_size': 256, 'splits': {'val': {}}}})
        ours.main([f'--out_dir={tmp_path}', *flags])
        return model, tmp_path / 'model.gguf'
    return run

def read(path):
    """The settings of a file, and its tensors as floats, (out, in) each, by the gguf package."""
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    return settings, {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
                      for t in reader.tensors}

@pytest.mark.parametrize('type', ['TQ2_0', 'TQ1_0'])
def test_ternary_blocks_are_those_of_the_gguf_package(type):
    """Byte for byte, in all 243 combinations of digits."""
    codes, scale = weight_ternary(torch.randn(64, 768))
    packed = {'TQ2_0': ours.tq2_0, 'TQ1_0': ours.tq1_0}[type](codes, scale).numpy()
    kind = gguf.GGMLQuantizationType[type]
    assert np.array_equal(packed, gguf.quantize((codes * scale).numpy(), kind))
    assert type == 'TQ2_0' or len(np.unique(packed.reshape(-1, 54)[:, :48])) == 243

def arcee(settings, w, idx):
    """The architecture as llama.cpp computes it, from a file alone: idx (T,) -> logits (T, V)."""
    n_head, n_kv_head, D = (settings[f'arcee.{key}'] for key in (
        'attention.head_count', 'attention.head_count_kv', 'rope.dimension_count'))
    frequencies = settings['arcee.rope.freq_base'] ** (-torch.arange(0, D, 2).float() / D)
    angles = torch.outer(torch.arange(len(idx)).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)  # (T, D / 2)

    def norm(x, name):
        eps = settings['arcee.attention.layer_norm_rms_epsilon']
        return F.rms_norm(x, x.shape[-1:], w[name], eps)

    def linear(x, name):
        codes, scale = activation_quant(x)
        return F.linear(codes * scale, w[name])

    def rotate(x):  # (T, H, D): neighbours are the real and the imaginary part of one number
        x = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn[:, None]
        return torch.view_as_real(x).flatten(-2)
    h = w['token_embd.weight'][idx]
    for i in range(settings['arcee.block_count']):
        x = norm(h, f'blk.{i}.attn_norm.weight')
        q, k, v = (linear(x, f'blk.{i}.attn_{n}.weight').unflatten(-1, (-1, D)) for n in 'qkv')
        q, k, v = rotate(q), *(t.repeat_interleave(n_head // n_kv_head, 1) for t in (rotate(k), v))
        scores = torch.einsum('thd,shd->hts', q, k) / D ** 0.5
        scores = scores.masked_fill(torch.ones(len(idx), len(idx)).triu(1).bool(), -torch.inf)
        y = torch.einsum('hts,shd->thd', scores.softmax(-1), v).flatten(1)
        h = h + linear(y, f'blk.{i}.attn_output.weight')
        x = linear(norm(h, f'blk.{i}.ffn_norm.weight'), f'blk.{i}.ffn_up.weight')
        h = h + linear(F.relu(x).square(), f'blk.{i}.ffn_down.weight')
    return F.linear(norm(h, 'output_norm.weight'), w['output.weight'])

@pytest.mark.parametrize('type', TYPES)
@pytest.mark.parametrize('exit_layer', [0, None])
def test_arcee_computes_what_the_model_computes(export, tokens, type, exit_layer):
    """From the file alone, up to the order of sums. (Both sides have its embedding and head.)"""
    flags = [] if exit_layer is None else [f'--exit_layer={exit_layer}']
    model, path = export(f'--type={type}', '--gguf=model.gguf', *flags, rope_theta=500.0)
    settings, w = read(path)
    optional = {gguf.MODEL_TENSOR.ROPE_FREQS, gguf.MODEL_TENSOR.ATTN_ROT_EMBD}
    names = [gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.ARCEE]
             if t not in optional]
    blocks = range(3 if exit_layer is None else 1)
    assert set(w) == {name.format(bid=bid) + '.weight' for name in names for bid in blocks}
    assert settings['general.file_type'] == gguf.LlamaFileType['MOSTLY_' + type]
    assert settings['arcee.context_length'] == 16 and settings['arcee.feed_forward_length'] == 512
    with torch.no_grad():
        for name, table in (('token_embd', model.embedding), ('output', model.head)):
            assert_close(w[f'{name}.weight'], table.weight, rtol=1e-3, atol=4e-3)  # half a step
            table.weight.copy_(w[f'{name}.weight'])
        idx = tokens(1, 16)
        expected, found = model(idx, exit_layer=exit_layer)[0][0], arcee(settings, w, idx[0])
    assert (found - expected).std() < 1e-3 * expected.std()

def test_vocabularies(export):
    """Bytes have no merges: each is its id, and 0, which is in no text, ends one. Merging by those
    of GPT-2 gives tiktoken's ids."""
    tokenizers = pytest.importorskip('tokenizers', reason=f'transformers {EXTRA}')
    settings, _ = read(export()[1])
    spell = spelling(get_tokenizer('bytes'))[0]
    assert settings['tokenizer.ggml.tokens'] == [
        '<|endoftext|>', *(spell(bytes([b])) for b in range(1, 256))]
    assert settings['tokenizer.ggml.token_type'] == [3] + [1] * 255
    assert settings['tokenizer.ggml.eos_token_id'] == 0 and not settings['tokenizer.ggml.merges']
    tokenizer = get_tokenizer('gpt2')
    settings, text = ours.vocabulary(tokenizer), "naïve “λ” don't   gaze\n\n\t" + ours.__doc__
    ids = {token: i for i, token in enumerate(settings['tokenizer.ggml.tokens'])}
    merges = [tuple(merge.split(' ')) for merge in settings['tokenizer.ggml.merges']]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert len(merges) == 50000 and bpe.encode(text).ids == tokenizer.encode(text)

@pytest.mark.parametrize('flags, settings, message', [
    ([], dict(norm='layernorm', sub_norm=True, ffn='swiglu', act_bits=4, linear='hbitlinear'),
     "has no norm='layernorm', sub_norm=True, ffn='swiglu', act_bits=4, linear='hbitlinear'; a "),
    (['--exit_layer=1'], dict(exit_norm='none'), "exit_norm='none'"),
    (['--type=TQ1_0'], dict(linear='fp'), r"\(linear='fp'\) .* TQ1_0; .*--type=F16"),
    ([], dict(n_embd=128), 'n_embd=128 and ffn_dim=512 must be multiples of it; --type=F16'),
    (['--exit_layer=3'], {}, 'exit_layer=3 is outside the model: its layers are 0 to 2'),
    (['--gguf=ckpt.pt'], {}, r'--gguf=ckpt.pt should end in .gguf')])
def test_refusals_are_one_sentence_and_leave_no_file(export, tmp_path, flags, settings, message):
    """Bug: --gguf=ckpt.pt wrote over the model."""
    with pytest.raises(UserError, match=message):
        export(*flags, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ['ckpt.pt']
