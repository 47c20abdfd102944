"""
A GGUF file in llama.cpp against the model that it was made of: logits, PPL and greedy text.

    python tests/compare_llama_cpp.py --out_dir=out/arcee-cpu
    python tests/compare_llama_cpp.py --out_dir=out/arcee-cpu --gguf=exit1.gguf --exit_layer=1

Run by hand. Needs cyllama, a binding of llama.cpp that comes compiled (pip install cyllama==0.2.18). Windows of the
validation split are given to both, each from an empty cache.
"""
import importlib.util
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
from prepare import data_of
from tokenizer import get_tokenizer


@dataclass
class CompareSettings:
    """Compares a GGUF file in llama.cpp with the model that it was made of."""
    out_dir: str = ''  # the run; empty: the newest
    gguf: str = 'model.gguf'  # the file in its folder
    exit_layer: int | None = None  # that it was exported with; none: the last
    windows: int = 16  # of the model's context length
    greedy: int = 200  # tokens that both continue a prompt by


class Llama:
    """A GGUF file in llama.cpp, that may read on from what it has read."""

    def __init__(self, path, n_ctx):
        from cyllama.llama import llama_cpp

        class Model(llama_cpp.LlamaModel):
            n_vocab = property(lambda self: self.get_vocab().n_vocab)  # cyllama 0.2.18 lacks it, and asks for it
        params = llama_cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = 1
        self.cpp, self.model, self.n_read = llama_cpp, Model(path), 0
        self.context = llama_cpp.LlamaContext(self.model, params)

    def forget(self):
        self.context.kv_cache_clear()
        self.n_read = 0

    def read(self, tokens):
        """Logits (n, V) after each of `tokens`, a list of n."""
        batch = self.cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for i, token in enumerate(tokens):
            batch.add(token, self.n_read + i, [0], True)
        self.context.decode(batch)
        self.n_read += len(tokens)
        return torch.tensor([self.context.get_logits_ith(i) for i in range(len(tokens))])

    def tokenize(self, text):
        return self.model.get_vocab().tokenize(text, False, False)


@torch.no_grad()
def compare(model, llm, tokens, layer, windows):
    """Both models' logits on the same windows: prints how far they are apart."""
    T, difference, kl, same, losses = model.config.block_size, [], [], [], []
    for window in torch.from_numpy(tokens[:windows * T].astype(np.int64)).view(windows, T):
        ours = model(window[None], exit_layer=layer)[0][0]
        llm.forget()
        theirs = llm.read(window.tolist())
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
    llm.forget()
    theirs, unread = [], prompt
    for _ in range(n):
        unread = [llm.read(unread)[-1].argmax().item()]
        theirs += unread
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), n)


def main(argv):
    s = configure(CompareSettings, argv)
    if not importlib.util.find_spec('cyllama'):
        raise UserError('this needs llama.cpp: pip install cyllama==0.2.18')
    out_dir = checkpoint.find_run(s.out_dir)
    model, settings = checkpoint.load_checkpoint(os.path.join(out_dir, 'ckpt.pt'), torch.device('cpu'))
    try:
        layer = model.require_layer(s.exit_layer)
    except ValueError as error:
        raise UserError(str(error)) from None
    llm = Llama(os.path.join(out_dir, s.gguf), model.config.block_size)
    _, tokens = data_of(settings)
    compare(model, llm, tokens, layer, s.windows)
    encoder = get_tokenizer(*checkpoint.told(settings['meta'], 'tokenizer'))
    for text in ('Return the', 'def f(x):\n', 'The module', 'Raises ValueError', 'naïve 日本'):
        prompt = encoder.encode(text)
        there = llm.tokenize(text)
        print(f'{text!r}: {"the same" if there == prompt else "OTHER"} tokens; greedy text the same for '
              f'{greedy(model, llm, prompt, min(s.greedy, model.config.block_size - len(prompt)), layer)} tokens')


if __name__ == '__main__':
    run(main)
