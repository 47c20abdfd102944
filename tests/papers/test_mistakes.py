"""Each mistake is what its name says, and no more than that."""
import pytest
import torch
from conftest import RUN, flags, initial, text_folder

import eval_exits
import sample
from checkpoint import load_checkpoint, open_model
from configurator import UserError
from hadamard import fwht
from model import BitSkip
from papers import mistakes
from papers.mistakes import (HadamardAfter, NonCausal, SmallInit, TrainLatent, Unshifted,
                             UnshiftedExits)
from quant import activation_quant_ste, dequantize, latent_weights

def make(Model):
    return initial(Model, lambda_ee=0.3)

def test_labels(tokens):
    """Exits, or exits and full depth, learn the token that they have read."""
    idx, targets, ours = tokens(), tokens(seed=1), make(BitSkip)
    next_token, current = ours(idx, targets)[1], ours(idx, idx)[1]
    exits, everything = (make(Model)(idx, targets)[1] for Model in (UnshiftedExits, Unshifted))
    assert everything == current and current['ce'] != next_token['ce']
    assert exits['ce'] == next_token['ce'] and exits['ee'] == current['ee'] != next_token['ee']

def test_small_init():
    for small, usual in zip(make(SmallInit).linears(), make(BitSkip).linears()):
        torch.testing.assert_close(small.weight, usual.weight * 0.1)
    assert torch.equal(make(SmallInit).head.weight, make(BitSkip).head.weight)

def test_train_latent(tokens):
    """Trained with W, evaluated with W^."""
    model, ours, idx, targets = make(TrainLatent), make(BitSkip), tokens(), tokens(seed=1)
    assert torch.equal(model(idx)[0], ours(idx)[0])
    with latent_weights(ours):
        latent = ours.train()(idx, targets)[1]
    assert model.train()(idx, targets)[1] == latent != ours(idx, targets)[1]
    assert not any(layer.latent for layer in model.linears())

def test_hadamard_after():
    layer, x = HadamardAfter(24, 12), torch.randn(3, 24)
    x_hat = activation_quant_ste(torch.nn.functional.pad(x, (0, 8)))
    y = fwht(fwht(x_hat) * 32 ** 0.5 @ dequantize(*layer.ternary()).T) * 16 ** 0.5
    torch.testing.assert_close(layer(x), y[:, :12])
    layer.latent = True
    assert not torch.equal(layer(x), y[:, :12])

def test_command_line(tmp_path, capsys):
    """The class comes first; the run knows it, and sample.py and eval_exits.py refuse in words."""
    with pytest.raises(UserError, match='name one of NonCausal, Unshifted'):
        mistakes.main(['config/cpu.py'])
    with text_folder(tmp_path, 6000):
        mistakes.main(['NonCausal', *flags(max_iters=4)])
        assert load_checkpoint('out/run/ckpt.pt')['model_class'] == 'papers.mistakes:NonCausal'
        assert isinstance(open_model('out/run/ckpt.pt')[0], NonCausal)
        for script in (sample, eval_exits):
            with pytest.raises(UserError, match='sees the future'):
                script.main(['--out_dir=out/run'])
        mistakes.main(['SmallInit', *flags(max_iters=4, linear='papers.mistakes:HadamardAfter')])
        assert isinstance(open_model('out/run/ckpt.pt')[0].linears()[0], HadamardAfter)
        sample.main(['--out_dir=out/run', '--max_new_tokens=5'])
    assert f'of 0 to {RUN["n_layer"] - 1}' in capsys.readouterr().out
