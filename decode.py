"""
Decoding: a key-value cache, and tokens that leave the model at different layers.

With a cache a new token costs one pass of itself alone; the keys and values of the tokens before it are read back, not
computed again. Early exit adds a difficulty: a token that left at layer l has no keys and values above l, but later
tokens that go deeper will want to attend to it there. We compute them from the state it left with, h_l, as CALM does
("state propagation", Schuster et al., 2022): the two small projections k and v of each block above, and nothing else.
So the cache never has a hole, and above its exit a token costs 1/11 of a block's multiplications (Paper A's shape).

    exit_layer = k              every token leaves after block k
    exit_mode = 'gate'          at the first l with p_l > threshold (A6)
    exit_mode = 'confidence'    at the first l where the largest softmax probability is > threshold (CALM)
    exit_mode = 'saturation'    at the first l whose block has changed little: cos(h_l, h_(l-1)) > threshold (CALM)
"""
from functools import partial

import torch
import torch.nn.functional as F

EXIT_MODES = ('gate', 'confidence', 'saturation')


class KVCache:
    """Keys and values of all tokens so far: k and v (L, B, n_kv_head, block_size, head_dim).

    `length` counts the tokens; setting it back forgets the newest. `filled` counts those that each layer holds: a pass
    that was cut at an exit_layer leaves out the layers above, and these refuse what comes next (ValueError)."""

    def __init__(self, model, batch_size):
        config = model.config
        if not config.causal:
            raise ValueError('a model that sees the future (causal=False) cannot decode')
        shape = (config.n_layer, batch_size, config.n_kv_head, config.block_size, config.n_embd // config.n_head)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.k = torch.zeros(shape, dtype=dtype, device=model.device)
        self.v = torch.zeros_like(self.k)
        self.filled = [0] * config.n_layer
        self.length = 0

    @property
    def length(self):
        return self._length

    @length.setter
    def length(self, length):
        self._length = length
        self.filled = [min(n, length) for n in self.filled]

    def layer(self, layer, rows=None, start=None):
        """Layer `layer` for tokens from position `start` (default: length) on, of the samples `rows` (int64) or all."""
        start = self.length if start is None else start
        if self.filled[layer] < start:
            raise ValueError(f'the cache of layer {layer} holds {self.filled[layer]} tokens, not the {start} before '
                             'these')
        return LayerCache(self.k[layer], self.v[layer], start, slice(None) if rows is None else rows)

    def advance(self, n_tokens, depth):
        """The first `depth` layers have taken n_tokens more."""
        self.length += n_tokens
        self.filled[:depth] = [self.length] * depth


class LayerCache:
    """One layer of a cache, for some samples of the batch."""

    mask = None  # (b, 1, T, S) bool where tokens do not just see all up to themselves: batches padded on the left

    def __init__(self, k, v, start, rows):
        self.k, self.v, self.start, self.rows = k, v, start, rows

    def append(self, k, v):
        """k, v (b, n_kv_head, T, D) of the T newest tokens -> those of all S tokens so far, (b, n_kv_head, S, D)."""
        stop = self.write(k, v)
        return self.k[self.rows, :, :stop], self.v[self.rows, :, :stop]

    def write(self, k, v):
        """Only keep them; returns S."""
        n = len(self.rows) if torch.is_tensor(self.rows) else len(self.k)
        if len(k) != n:
            raise ValueError(f'{len(k)} samples do not fit a cache for {n}')
        stop = self.start + k.shape[2]
        self.k[self.rows, :, self.start:stop] = k.to(self.k.dtype)
        self.v[self.rows, :, self.start:stop] = v.to(self.v.dtype)
        return stop


def sample(logits, temperature=1.0, top_k=None, generator=None):
    """One token per row: logits (B, V) -> (B, 1) int64. Temperature 0 takes the likeliest; top_k keeps k candidates
    (exactly k: where several tie for the last place, topk decides), and only among these it draws."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]))  # (B, top_k)
    choice = torch.multinomial(F.softmax(logits.float() / temperature, dim=-1), 1, generator=generator)
    return choice if top_k is None else ids.gather(-1, choice)


def distribution(logits, temperature=1.0, top_k=None):
    """The probabilities that `sample` draws with, temperature > 0: logits (B, V) -> (B, V) float32."""
    if top_k is None:
        return F.softmax(logits.float() / temperature, dim=-1)
    values, ids = logits.topk(min(top_k, logits.shape[-1]))
    return torch.zeros(logits.shape, device=logits.device).scatter(-1, ids, distribution(values, temperature))


class Decoder:
    """A model and its cache, one step at a time. native.Decoder is its twin in C, for batches of one.

    length: how many tokens have been seen; setting it back forgets the newest.
    states (B, T, C): the hidden states that the newest tokens left the blocks with, before any norm."""

    def __init__(self, model, batch_size=1):
        self.model, self.cache = model, KVCache(model, batch_size)

    @property
    def length(self):
        return self.cache.length

    @length.setter
    def length(self, length):
        self.cache.length = length

    @torch.no_grad()
    def step(self, tokens, n_logits=1, exit_layer=None, exit_mode=None, exit_threshold=0.5):
        """tokens (B, T) int64, the next ones -> logits (B n_logits, V) of the last n_logits, exit layers (B,) int64.

        With an exit_mode a single token may leave before exit_layer; more of them run to it, in one pass. ValueError on
        what the model cannot do."""
        last, T = self.model.require_layer(exit_layer), tokens.shape[1]
        require_exits(exit_mode, bool(self.model.gates))
        if not 0 <= n_logits <= T:
            raise ValueError(f'n_logits is 0 to {T}, the number of these tokens, got {n_logits}')
        if exit_mode is not None and T == 1:
            self.states, logits, layers = step_with_exits(self.model, tokens, self.cache, last, exit_mode,
                                                          exit_threshold)
            return logits, layers
        self.states = self.blocks(self.embed(tokens), 0, last)
        self.cache.length += T
        logits = self.logits(self.states[:, T - n_logits:], last).flatten(0, 1)
        return logits, torch.full((len(tokens),), last, device=tokens.device)

    def embed(self, tokens):
        """The states (B, T, C) that block 0 reads, of tokens (B, T)."""
        return self.model.embedding(tokens)

    @torch.no_grad()
    def blocks(self, h, first, last, start=None):
        """h (B, T, C), the states before block `first` at the positions from `start` (default: length) on -> the states
        after block `last`, (B, T, C). The cache keeps their keys and values, but `length` stays.

        ValueError if a layer from first to last does not hold all that comes before `start`."""
        start = self.length if start is None else start
        rope = self.model.rope(start, h.shape[1])
        for layer in range(first, last + 1):
            h = self.model.blocks[layer](h, rope, self.cache.layer(layer, start=start))
            self.cache.filled[layer] = start + h.shape[1]
        return h

    @torch.no_grad()
    def logits(self, h, layer=None):
        """h (..., C), states after block `layer` (default: the last) -> the logits (..., V) of that exit."""
        return self.model.head(self.model.exit_state(h, self.model.require_layer(layer)))


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, exit_layer=None, exit_mode=None,
           exit_threshold=0.5, generator=None, decoder=None):
    """Continue idx (B, T) int64; yield, for each new token, itself (B, 1) and the layer that it left at (B,), int64.

    exit_layer: run blocks 0 ... exit_layer at most. exit_mode None or one of EXIT_MODES: leave before that, token by
    token (the prompt itself runs in one pass, in full). Only the last block_size tokens are seen; when the cache is
    full, it starts again from the newer half of them. decoder: what runs the model, if not PyTorch (native.Decoder).
    ValueError on settings that the model cannot follow."""
    model.require_layer(exit_layer)
    require_sampling(idx, temperature, top_k)
    require_exits(exit_mode, bool(model.gates))
    choose = partial(sample, temperature=temperature, top_k=top_k, generator=generator)
    return steps(model, idx, max_new_tokens, choose, decoder or Decoder(model, len(idx)), exit_layer, exit_mode,
                 exit_threshold)


def require_exits(exit_mode, has_gates):
    """ValueError if tokens cannot leave in this way."""
    if exit_mode not in (None, *EXIT_MODES):
        raise ValueError(f'exit_mode is one of {", ".join(map(repr, EXIT_MODES))}, got {exit_mode!r}')
    if exit_mode == 'gate' and not has_gates:
        raise ValueError("this model has no gates; exit_mode='saturation' needs none")


def require_sampling(idx, temperature, top_k):
    """ValueError if these cannot be sampled with."""
    if idx.shape[1] == 0:
        raise ValueError('the prompt is empty: generation starts from at least one token')
    require_temperature(temperature)
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k is at least 1, got {top_k}')


def require_temperature(temperature):
    if not (temperature == 0 or temperature >= 1e-3):
        raise ValueError(f'temperature is 0, for the likeliest token, or at least 0.001, got {temperature}')


@torch.no_grad()
def steps(model, idx, max_new_tokens, choose, decoder, exit_layer, exit_mode, exit_threshold):
    """The generator behind `stream`, whose arguments are checked. choose: logits (B, V) -> (B, 1)."""
    block_size, was_training = model.config.block_size, model.training
    model.eval()
    try:
        context = new = idx[:, -block_size:]  # new: the tokens that the decoder has not seen yet
        decoder.length = 0
        for _ in range(max_new_tokens):
            if decoder.length + new.shape[1] > block_size:
                decoder.length, new = 0, context[:, -max(1, block_size // 2):]
            is_prompt = decoder.length == 0
            logits, layer = decoder.step(new, exit_layer=exit_layer, exit_mode=None if is_prompt else exit_mode,
                                         exit_threshold=exit_threshold)
            new = choose(logits)
            context = torch.cat((context, new), dim=1)[:, -block_size:]
            yield new, torch.as_tensor(layer).reshape(-1)
    finally:
        model.train(was_training)


def step_with_exits(model, idx, cache, last, mode, threshold):
    """One token of each sample through blocks 0 ... last, each sample only as deep as it needs.

    idx (B, 1) int64 -> the states that they left the blocks with (B, 1, C), logits (B, V), and the layer that each
    sample left at, (B,) int64."""
    B, rope = len(idx), model.rope(cache.length, 1)
    h = model.embedding(idx)  # (B, 1, C); a row stays as it is once its sample has left
    layers = torch.full((B,), last, device=idx.device)
    inside = torch.ones(B, dtype=torch.bool, device=idx.device)
    for layer, block in enumerate(model.blocks[:last + 1]):
        before = h[inside, 0]  # (rows, C)
        if inside.all():
            h = block(h, rope, cache.layer(layer))
        else:
            rows, gone = inside.nonzero().squeeze(1), (~inside).nonzero().squeeze(1)
            block.remember(h[gone], rope, cache.layer(layer, gone))  # state propagation: no holes in the cache
            if len(rows):
                h[rows] = block(h[rows], rope, cache.layer(layer, rows))
        rows = inside.nonzero().squeeze(1)
        if layer < last and len(rows):
            leaving = rows[exit_score(model, h[rows, 0], before, layer, mode) > threshold]
            layers[leaving], inside[leaving] = layer, False
    cache.advance(1, depth=last + 1)
    states = torch.stack([model.exit_state(state, layer) for state, layer in zip(h[:, 0], layers.tolist())])
    return h, model.head(states), layers


def exit_score(model, h, before, layer, mode):
    """How ready the states h (..., C) after block `layer`, and `before` it, are to leave: (...), at most 1."""
    if mode == 'gate':
        return model.gates[layer](h)  # A6
    if mode == 'saturation':
        return F.cosine_similarity(h.float(), before.float(), dim=-1).clamp(max=1)  # (rounding may exceed it)
    return F.softmax(model.head(model.exit_state(h, layer)).float(), dim=-1).amax(dim=-1)  # CALM


@torch.no_grad()
def exit_states(model, idx, mode, threshold):
    """What `step_with_exits` computes token by token, for whole texts at once: idx (B, T) int64 -> what the head reads
    of each token (B, T, C), and the layer that it left at (B, T) int64.

    A token that has left keeps its state, and every block takes its keys and values from that. So one pass through the
    blocks in their order is enough, as in training; nothing is saved, but what would be can be counted."""
    last = model.config.n_layer - 1
    h, rope = model.embedding(idx), model.rope(0, idx.shape[1])
    layers = torch.full(idx.shape, last, device=idx.device)
    inside = torch.ones_like(idx, dtype=torch.bool)
    for layer, block in enumerate(model.blocks):
        before, h = h, torch.where(inside[..., None], block(h, rope), h)
        if layer < last:
            leaving = inside & (exit_score(model, h, before, layer, mode) > threshold)
            layers[leaving], inside = layer, inside & ~leaving
    return read_off(model, h, layers), layers


def read_off(model, h, layers):
    """What the head reads of states (B, T, C) that left at `layers` (B, T): (B, T, C). (Each exit is asked about all
    states: a product rounds by the number of its rows, and how many leave where depends on later tokens.)"""
    out = h
    for layer in layers.unique().tolist():
        out = torch.where(layers[..., None] == layer, model.exit_state(h, layer), out)
    return out
