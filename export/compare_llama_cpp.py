"""
A GGUF file in llama.cpp beside the model that it was made of: logits, PPL and greedy text.

    python -m export.compare_llama_cpp --out_dir=out/arcee-cpu
    python -m export.compare_llama_cpp --gguf=exit1.gguf --exit_layer=1

Run by hand. Needs a binding of llama.cpp that comes compiled: pip install cyllama==0.2.18.
"""
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from cyllama.llama import llama_cpp

from checkpoint import find_run, open_model
from configurator import configure, run
from eval_exits import perplexity
from prepare import data_of, get_tokenizer

@dataclass
class CompareSettings:
    """Compares a GGUF file in llama.cpp with the model that it was made of."""
    out_dir: str = ''  # the run; empty: the newest
    gguf: str = 'model.gguf'  # the file in its folder
    exit_layer: int | None = None  # that it was exported with; none: the last

class LlamaModel(llama_cpp.LlamaModel):
    n_vocab = property(lambda self: self.get_vocab().n_vocab)  # which cyllama asks for and lacks

class Llama:
    """A GGUF file in llama.cpp."""

    def __init__(self, path, n_ctx):
        params = llama_cpp.LlamaContextParams()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_threads = params.n_threads_batch = 1
        self.model = LlamaModel(path)
        self.context = llama_cpp.LlamaContext(self.model, params)

    def read(self, tokens, start=0):
        """Logits (n, V) after each of `tokens`, a list of n, at positions from `start` on."""
        if start == 0:
            self.context.kv_cache_clear()
        batch = llama_cpp.LlamaBatch(n_tokens=len(tokens), embd=0, n_seq_max=1)
        for i, token in enumerate(tokens):
            batch.add(token, start + i, [0], True)
        self.context.decode(batch)
        return torch.tensor([self.context.get_logits_ith(i) for i in range(len(tokens))])

@torch.no_grad()
def compare(model, llama, tokens, layer, n=16):
    """Both models' logits on n windows of the text: prints how far they are apart."""
    T = model.config.block_size
    windows = torch.from_numpy(tokens[:n * T].astype(np.int64)).view(n, T)
    ours = model(windows, exit_layer=layer)[0]
    theirs = torch.stack([llama.read(window.tolist()) for window in windows])
    difference, same = (ours - theirs).abs(), (ours.argmax(-1) == theirs.argmax(-1)).float()
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    here, there = (perplexity(F.cross_entropy(x[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))
                   for x in (p, q))
    print(f'{n} windows of {T} tokens, logits with a standard deviation of {ours.std():.1f}\n'
          f'difference: {difference.max():.3f} at most, {difference.mean():.4f} in the mean\n'
          f'KL {(p.exp() * (p - q)).sum(-1).mean():.1e} nats, same argmax in {same.mean():.2%}\n'
          f'PPL {here:.4f} here, {there:.4f} there')

def common_prefix(llama, prompt, ours):
    """How many of the greedy tokens `ours` llama.cpp writes after the prompt, before another."""
    logits = llama.read(prompt)
    for i, token in enumerate(ours):
        if logits[-1].argmax() != token:
            return i
        logits = llama.read([token], len(prompt) + i)
    return len(ours)

def main(argv):
    s = configure(CompareSettings, argv)
    out_dir = find_run(s.out_dir)
    model, settings = open_model(os.path.join(out_dir, 'ckpt.pt'))
    llama = Llama(os.path.join(out_dir, s.gguf), model.config.block_size)
    compare(model, llama, data_of(settings)[1], s.exit_layer)
    for text in ('Return the', 'def f(x):\n', 'The module', 'Raises ValueError', 'naïve 日本'):
        prompt = get_tokenizer(settings['meta']['tokenizer']).encode(text)
        there = llama.model.get_vocab().tokenize(text, False, False)
        n = min(200, model.config.block_size - len(prompt))
        ours = model.generate(torch.tensor([prompt]), n, temperature=0, exit_layer=s.exit_layer)[0]
        same = common_prefix(llama, prompt, ours[len(prompt):].tolist())
        print(f'{text!r}: {"the same" if there == prompt else "OTHER"} tokens; greedy text as ours '
              f'for {same} of {n} tokens')

if __name__ == '__main__':
    run(main)
