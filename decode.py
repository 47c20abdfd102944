"""
Decoding: a key-value cache, and tokens that leave the model at different layers.

A token that left at layer l has no keys and values above l, but later tokens that go deeper attend
to it there. We compute them from the state that it left with, h_l: the projections k and v of each
block above, and nothing else ("state propagation", CALM, Schuster et al., 2022).

    exit_layer = k              every token leaves after block k
    exit_mode = 'gate'          at the first l with p_l > threshold (A6)
    exit_mode = 'confidence'    at the first l whose likeliest token has more probability (CALM)
"""
import torch
import torch.nn.functional as F

EXIT_MODES = ('gate', 'confidence')

class KVCache:
    """Keys and values of all tokens so far: k and v (L, B, n_kv_head, block_size, head_dim).

    `length` counts the tokens; setting it back forgets the newest. `filled` counts what each layer
    holds. After a pass that ended at an exit, the layers above refuse the next one (ValueError)."""

    def __init__(self, model, batch_size):
        c, like = model.config, next(model.parameters())
        shape = (c.n_layer, batch_size, c.n_kv_head, c.block_size, c.n_embd // c.n_head)
        self.k, self.v = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in 'kv')
        self.filled, self.length = [0] * c.n_layer, 0

    @property
    def length(self):
        return self._length

    @length.setter
    def length(self, length):
        self._length, self.filled = length, [min(n, length) for n in self.filled]

    def layer(self, layer, rows=slice(None), start=None):
        """A layer for tokens from position `start` (default: length) on, of samples `rows`."""
        start = self.length if start is None else start
        if self.filled[layer] < start:
            raise ValueError(f'the cache of layer {layer} holds {self.filled[layer]} tokens, not '
                             f'the {start} before these')
        return LayerCache(self.k[layer], self.v[layer], start, rows)

    def advance(self, n_tokens, depth):
        """The first `depth` layers have taken n_tokens more."""
        self.length += n_tokens
        self.filled[:depth] = [self.length] * depth

class LayerCache:
    """One layer of a cache, for some samples of the batch."""

    mask = None  # (b, 1, T, S) bool, who sees whom, for batches that are padded on the left

    def __init__(self, k, v, start, rows):
        self.k, self.v, self.start, self.rows = k, v, start, rows

    def attend(self, q, k, v):
        """Keep k, v (b, n_kv_head, T, D) of the T newest tokens, and attend to all S so far:
        q (b, n_head, T, D) -> the same shape."""
        stop, T, mask = self.write(k, v), q.shape[2], self.mask
        k, v = self.k[self.rows, :, :stop], self.v[self.rows, :, :stop]  # (b, n_kv_head, S, D)
        if mask is None and 1 < T < stop:  # new token i sees all old ones and the new up to itself
            mask = torch.ones(T, stop, dtype=torch.bool, device=q.device).tril(stop - T)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True,
                                              is_causal=mask is None and T == stop)

    def write(self, k, v):
        """Only keep them; returns S."""
        stop = self.start + k.shape[2]
        for old, new in ((self.k, k), (self.v, v)):
            if len(old[self.rows, :0]) != len(new):  # (:0 copies nothing)
                raise ValueError(f'{len(new)} samples do not fit a cache for {len(old[self.rows])}')
            old[self.rows, :, self.start:stop] = new.to(old.dtype)
        return stop

def sample(logits, temperature=1.0, top_k=None, generator=None):
    """One token per row: logits (B, V) -> (B, 1) int64. Temperature 0 takes the likeliest; top_k
    draws among the k likeliest only."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.shape[-1]))  # (B, top_k)
    p = F.softmax(logits.float() / temperature, dim=-1)
    choice = torch.multinomial(p, 1, generator=generator)
    return choice if ids is None else ids.gather(-1, choice)

class Decoder:
    """A model and its cache, one step at a time. fast/native.py has its twin in C.

    length: how many tokens have been seen; setting it back forgets the newest."""

    length = property(lambda self: self.cache.length,
                      lambda self, length: setattr(self.cache, 'length', length))

    def __init__(self, model, batch_size=1):
        self.model, self.cache = model, KVCache(model, batch_size)

    @torch.no_grad()
    def step(self, tokens, n_logits=1, exit_layer=None, exit_mode=None, exit_threshold=0.5):
        """The next tokens (B, T) int64 -> logits (B n_logits, V) of the last n_logits of them, and
        the layers (B,) int64 that the last one left at.

        With an exit_mode a single token may leave before exit_layer; more of them run to it, in one
        pass. ValueError on what the model cannot do."""
        last, T = self.model.require_layer(exit_layer), tokens.shape[1]
        require_exits(exit_mode, bool(self.model.gates))
        if not 0 <= n_logits <= T:
            raise ValueError(f'n_logits is 0 to {T}, the number of these tokens, got {n_logits}')
        if exit_mode is not None and T == 1:
            return step_with_exits(self.model, tokens, self.cache, last, exit_mode, exit_threshold)
        *_, h = self.model.hidden_states(tokens, last, self.cache)  # (B, T, C)
        logits = self.model.head(self.model.exit_state(h[:, T - n_logits:], last)).flatten(0, 1)
        return logits, torch.full((len(tokens),), last, device=tokens.device)

def require_exits(exit_mode, has_gates):
    """ValueError if tokens cannot leave in this way."""
    if exit_mode not in (None, *EXIT_MODES):
        raise ValueError(f'exit_mode is one of {", ".join(EXIT_MODES)}, got {exit_mode!r}')
    if exit_mode == 'gate' and not has_gates:
        raise ValueError("this model has no gates; exit_mode='confidence' needs none")

def require_sampling(idx, temperature, top_k):
    """ValueError if these cannot be sampled with."""
    if idx.shape[1] == 0:
        raise ValueError('the prompt is empty: generation starts from at least one token')
    if not (temperature == 0 or 1e-3 <= temperature < float('inf')):
        raise ValueError(f'temperature is 0 (greedy) or at least 0.001, got {temperature}')
    if top_k is not None and top_k < 1:
        raise ValueError(f'top_k is at least 1, got {top_k}')

def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, exit_layer=None, exit_mode=None,
           exit_threshold=0.5, generator=None, decoder=None):
    """Continue idx (B, T) int64. Yield each new token (B, 1) and the layer (B,) that it left at.

    exit_layer: run blocks 0 ... exit_layer at most. exit_mode: None, or one of EXIT_MODES to leave
    before that, token by token; the prompt runs in full. When the cache is full, it starts again
    from the newer half of the text. decoder: what runs the model, if not PyTorch (fast/native.py).
    ValueError on settings that the model cannot follow."""
    model.require_layer(exit_layer)
    require_exits(exit_mode, bool(model.gates))
    require_sampling(idx, temperature, top_k)
    decoder, block_size = decoder or Decoder(model, len(idx)), model.config.block_size

    @torch.no_grad()
    def steps():
        was_training, decoder.length = model.training, 0
        model.eval()
        try:
            context = new = idx[:, -block_size:]  # new: what the decoder has not seen yet
            for _ in range(max_new_tokens):
                if decoder.length + new.shape[1] > block_size:
                    decoder.length, new = 0, context[:, -max(1, block_size // 2):]
                mode = exit_mode if decoder.length else None  # a prompt runs in full, always
                logits, layer = decoder.step(new, 1, exit_layer, mode, exit_threshold)
                new = sample(logits, temperature, top_k, generator)
                context = torch.cat((context, new), dim=1)[:, -block_size:]
                yield new, torch.as_tensor(layer).reshape(-1)
        finally:
            model.train(was_training)
    return steps()

def step_with_exits(model, idx, cache, last, mode, threshold):
    """One token of each sample through blocks 0 ... last, each only as deep as it needs (A6).

    idx (B, 1) int64 -> logits (B, V), layers (B,) int64."""
    rope, h = model.rope(cache.length, 1), model.embed(idx, cache.length)  # h (B, 1, C)
    layers = torch.full((len(idx),), last, device=idx.device)
    inside = torch.ones(len(idx), dtype=torch.bool, device=idx.device)
    for layer in range(last + 1):
        block, rows = model.blocks[layer], inside.nonzero().squeeze(1)
        if len(rows) < len(h):  # state propagation: who has left leaves no hole in the cache
            gone = (~inside).nonzero().squeeze(1)
            block.remember(h[gone], rope, cache.layer(layer, gone))
        if len(rows):
            h = h.index_copy(0, rows, block(h[rows], rope, cache.layer(layer, rows)))
        if layer < last and len(rows):
            leaving = rows[exit_score(model, h[rows, 0], layer, mode) > threshold]
            layers[leaving], inside[leaving] = layer, False
    cache.advance(1, depth=last + 1)
    read = [model.exit_state(h[i, 0], layer) for i, layer in enumerate(layers.tolist())]
    return model.head(torch.stack(read)), layers

def exit_score(model, h, layer, mode):
    """How ready states h (..., C) after block `layer` are to leave: (...)."""
    if mode == 'gate':
        return model.gates[layer](h)  # A6
    logits = model.head(model.exit_state(h, layer)).float()
    return F.softmax(logits, dim=-1).amax(dim=-1)  # CALM
