"""
A GGUF file in llama.cpp against the model that it was made of: logits, PPL and greedy text.

    python tests/compare_llama_cpp.py --out_dir=out/arcee-cpu
    python tests/compare_llama_cpp.py --out_dir=out/arcee-cpu --gguf=exit1.gguf --exit_layer=1

Needs llama-cpp-python, which builds llama.cpp with the C++ compiler at hand. That takes too long for the tests, so this
is run by hand. Windows of the validation split are given to both, each from an empty cache.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpoint
from configurator import UserError, configure, run
from eval_exits import perplexity
from prepare import load_tokens, prepare
from tokenizer import get_tokenizer


@dataclass
class CompareSettings:
    """Compares a GGUF file in llama.cpp with the model that it was made of."""
    out_dir: str = ''  # the run; empty: the newest
    gguf: str = 'model.gguf'  # the file in its folder
    exit_layer: int = -1  # that it was exported with; -1: the last
    windows: int = 16  # of the model's context length
    greedy: int = 200  # tokens that both continue a prompt by


@torch.no_grad()
def compare(model, llm, tokens, layer, windows):
    """Both models' logits on the same windows: prints how far they are apart."""
    T, difference, kl, same, losses = model.config.block_size, [], [], [], []
    for window in torch.from_numpy(tokens[:windows * T].astype(np.int64)).view(windows, T):
        ours = model(window[None], exit_layer=layer)[0][0]
        llm.reset()
        llm.eval(window.tolist())
        theirs = torch.from_numpy(llm.scores[:T].copy())
        difference.append((ours - theirs).abs())
        kl.append(F.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction='none').sum(-1))
        same.append((ours.argmax(-1) == theirs.argmax(-1)).float())
        losses.append([F.cross_entropy(logits[:-1], window[1:]).item() for logits in (ours, theirs)])
    difference, (here, there) = torch.stack(difference), torch.tensor(losses).mean(dim=0).tolist()
    print(f'{windows} windows of {T} tokens, logits with a standard deviation of {ours.std():.1f}\n'
          f'absolute difference: {difference.max():.3f} at most, {difference.mean():.4f} in the mean\n'
          f'KL {torch.stack(kl).mean():.1e} nats, the same argmax in {torch.stack(same).mean():.2%}\n'
          f'PPL {perplexity(here):.4f} here, {perplexity(there):.4f} there')


def greedy(model, llm, prompt, n, layer):
    """How many greedy tokens are the same until the first that is not, of n."""
    ours = model.generate(torch.tensor([prompt]), n, temperature=0, exit_layer=layer)[0, len(prompt):].tolist()
    llm.reset()
    llm.eval(prompt)
    theirs = []
    for _ in range(n):
        theirs.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval(theirs[-1:])
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), n)


def main(argv):
    s = configure(CompareSettings, argv)
    try:
        import llama_cpp
    except ImportError:
        raise UserError('this needs llama.cpp: pip install llama-cpp-python') from None
    out_dir = checkpoint.find_run(s.out_dir)
    model, settings = checkpoint.load_checkpoint(os.path.join(out_dir, 'ckpt.pt'), torch.device('cpu'))
    model.eval()
    layer = model.config.n_layer - 1 if s.exit_layer == -1 else s.exit_layer
    llm = llama_cpp.Llama(os.path.join(out_dir, s.gguf), n_ctx=model.config.block_size, n_batch=model.config.block_size,
                          n_threads=1, logits_all=True, verbose=False)
    tokens = load_tokens(prepare(*checkpoint.told(settings, *checkpoint.DATA)), 'val')
    compare(model, llm, tokens, layer, s.windows)
    encoder = get_tokenizer(settings['tokenizer'] or settings['meta']['tokenizer'])
    for text in ('Return the', 'def f(x):\n', 'The module', 'Raises ValueError', 'naïve 日本'):
        prompt = encoder.encode(text)
        there = llm.tokenize(text.encode(), add_bos=False)
        print(f'{text!r}: {"the same" if there == prompt else "OTHER"} tokens; greedy text the same for '
              f'{greedy(model, llm, prompt, min(s.greedy, model.config.block_size - len(prompt)), layer)} tokens')


if __name__ == '__main__':
    run(main)
