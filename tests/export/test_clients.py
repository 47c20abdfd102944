"""What others have already, on our models: their architectures, adapters and harnesses."""
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from runs import ARCEE, EXTRA, L, folder, greedy, load, save_run, text  # noqa: F401
from torch.testing import assert_close

from checkpoint import open_model
from export import hf
from quant import weight_ternary

transformers = pytest.importorskip('transformers', reason=f'transformers {EXTRA}')

@pytest.mark.parametrize('linear', ['bitlinear', 'fp'])
@pytest.mark.parametrize('blocks', [2, L])
def test_arcee_of_transformers_computes_what_ours_does(linear, blocks):
    """Its own code, on our folder. An exit is a folder with fewer blocks. (Theirs multiplies by
    127 / max|x| where ours divides by max|x| / 127: the rare code at a tie may differ by one.)"""
    pytest.importorskip('accelerate', reason=f'accelerate {EXTRA}')
    save_run(f'out/{linear}', **ARCEE | dict(linear=linear))
    name = f'out/{linear}/hf-{blocks}'
    hf.main([f'--out_dir=out/{linear}', '--as=arcee', f'--exit_layer={blocks - 1}',
             f'--hf_dir={name}'])
    with torch.compiler.set_stance('force_eager'), torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(name)
        ours = open_model(f'out/{linear}/ckpt.pt')[0]
        assert type(theirs).__name__ == 'ArceeForCausalLM' and len(theirs.model.layers) == blocks
        idx = text(4, 60)
        difference = (theirs(idx).logits - ours(idx, exit_layer=blocks - 1)[0]).abs()
        assert (difference.amax(-1) < 1e-3).float().mean() > 0.9 and difference.median() < 1e-4
        out = theirs.generate(text(1), max_length=60, do_sample=False)
        assert out[0].tolist() == greedy(ours, text(1), 60, blocks)
    assert 'trust_remote_code' not in Path(name, 'README.md').read_text()

@pytest.fixture(scope='module')
def ternary():
    """The folder of a ternary model, BitLinear in q, k and v, HBitLinear in o and down."""
    save_run('out/ternary')
    hf.main(['--out_dir=out/ternary'])
    return 'out/ternary/hf-latent'

@pytest.mark.parametrize('where', [
    dict(target_modules=['v']),  # q and k, which go with it in one product, stay as they are
    dict(target_modules=['q', 'v', 'up']),
    dict(target_modules=[], target_parameters=['q.weight', 'down.weight'])])
def test_lora(ternary, where):
    """LoRA on modules adapts outputs; merged, W + BA is made ternary anew, which is another model.
    LoRA on parameters adapts the latent W, of HBitLinear too, and merging changes nothing."""
    peft = pytest.importorskip('peft', reason=f'peft {EXTRA}')
    model = load(ternary)
    before = model(text()).logits
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type='CAUSAL_LM', **where))
    assert torch.equal(lora(input_ids=text()).logits, before)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(8):
        losses.append(lora(input_ids=text(), labels=text()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    adapted = lora.eval()(input_ids=text()).logits
    name = 'v' if 'v' in where['target_modules'] else 'q'
    layer = getattr(lora.base_model.model.model.blocks[0].attn, name)
    expected = layer.get_base_layer().weight + layer.get_delta_weight('default')
    merged = getattr((whole := lora.merge_and_unload()).model.blocks[0].attn, name)
    assert_close(merged.weight, expected)
    assert torch.equal(merged.ternary()[0], weight_ternary(expected)[0])
    difference = (whole(text()).logits - adapted).std() / adapted.std()
    assert difference > 0.05 if where['target_modules'] else difference < 1e-3

def test_log_likelihoods_of_lm_eval(ternary):
    lm_eval = pytest.importorskip('lm_eval.models.huggingface', reason=f'lm_eval {EXTRA}')
    from lm_eval.api.instance import Instance
    pairs = [('Once upon', ' a time'), ('x =', ' 3'), ('def main', '(argv):\n')]
    harness = lm_eval.HFLM(pretrained=ternary, trust_remote_code=True, batch_size=3, device='cpu')
    found = harness.loglikelihood(
        [Instance('loglikelihood', {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)
    ours = open_model('out/ternary/ckpt.pt')[0]
    assert harness.max_length == 128
    for (prompt, rest), (likelihood, _) in zip(pairs, found):
        ids = torch.tensor([list((prompt + rest).encode())])
        loss = F.cross_entropy(ours(ids[:, :-1])[0][0], ids[0, 1:], reduction='none')
        assert abs(likelihood + loss[-len(rest):].sum().item()) < 0.01 * abs(likelihood)
