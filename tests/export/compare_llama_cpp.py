"""
A GGUF file in llama.cpp beside the model that it was made of: logits, PPL and greedy text.

    python tests/export/compare_llama_cpp.py --out_dir=out/arcee-cpu
    python tests/export/compare_llama_cpp.py --gguf=exit1.gguf --exit_layer=1

Run by hand. Needs a binding of llama.cpp that comes compiled: pip install cyllama==0.2.18.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from checkpoint import find_run, open_model  # noqa: E402
from configurator import UserError, configure, run  # noqa: E402
from eval_exits import perplexity  # noqa: E402
from prepare import data_of, get_tokenizer  # noqa: E402


@dataclass
class CompareSettings:
    """Compares a GGUF file in llama.cpp with the model that it was made of."""
    out_dir: str = ''  # the run; empty: the newest
    gguf: str = 'model.gguf'  # the file in its folder
    exit_layer: int | None = None  # that it was exported with; none: the last
    windows: int = 16  # of block_size tokens of the validation split, each from an empty cache
    greedy: int = 200  # tokens that both continue a prompt by


class Llama:
    """A GGUF file in llama.cpp, that may read on from what it has read."""

    def __init__(self, path, n_ctx):
        try:
            from cyllama.llama import llama_cpp
        except ImportError:
            raise UserError('this needs llama.cpp: pip install cyllama==0.2.18') from None

        class Model(llama_cpp.LlamaModel):
            n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which it asks for and lacks
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


@torch.no_grad()
def compare(model, llama, tokens, layer, windows):
    """Both models' logits on the same windows: prints how far they are apart."""
    T, difference, kl, same, losses = model.config.block_size, [], [], [], []
    for window in torch.from_numpy(tokens[:windows * T].astype(np.int64)).view(windows, T):
        llama.forget()
        ours, theirs = model(window[None], exit_layer=layer)[0][0], llama.read(window.tolist())
        difference.append((ours - theirs).abs())
        kl.append(F.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True,
                           reduction='none').sum(-1))
        same.append((ours.argmax(-1) == theirs.argmax(-1)).float())
        losses.append([F.cross_entropy(x[:-1], window[1:]).item() for x in (ours, theirs)])
    difference, (here, there) = torch.stack(difference), torch.tensor(losses).mean(dim=0).tolist()
    print(f'{windows} windows of {T} tokens, logits with a standard deviation of {ours.std():.1f}\n'
          f'difference: {difference.max():.3f} at most, {difference.mean():.4f} in the mean\n'
          f'KL {torch.stack(kl).mean():.1e} nats, same argmax in {torch.stack(same).mean():.2%}\n'
          f'PPL {perplexity(here):.4f} here, {perplexity(there):.4f} there')


def common_prefix(model, llama, prompt, n, layer):
    """How many of n greedy tokens are the same until the first that is not."""
    ours = model.generate(torch.tensor([prompt]), n, temperature=0, exit_layer=layer)[0].tolist()
    llama.forget()
    theirs, unread = [], prompt
    for _ in range(n):
        unread = [llama.read(unread)[-1].argmax().item()]
        theirs += unread
    return next((i for i, pair in enumerate(zip(ours[-n:], theirs)) if len(set(pair)) > 1), n)


def main(argv):
    s = configure(CompareSettings, argv)
    out_dir = find_run(s.out_dir)
    model, settings = open_model(os.path.join(out_dir, 'ckpt.pt'))
    llama, layer = Llama(os.path.join(out_dir, s.gguf), model.config.block_size), s.exit_layer
    compare(model, llama, data_of(settings)[1], layer, s.windows)
    for text in ('Return the', 'def f(x):\n', 'The module', 'Raises ValueError', 'naïve 日本'):
        prompt = get_tokenizer(settings['meta']['tokenizer']).encode(text)
        there = llama.model.get_vocab().tokenize(text, False, False)
        n = min(s.greedy, model.config.block_size - len(prompt))
        print(f'{text!r}: {"the same" if there == prompt else "OTHER"} tokens; greedy text as ours '
              f'for {common_prefix(model, llama, prompt, n, layer)} of {n} tokens')


if __name__ == '__main__':
    run(main)
