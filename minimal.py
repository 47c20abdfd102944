"""
BitSkip in one file: a transformer with ternary weights that can stop after any of its blocks.

This is Paper A from equation A1 to A9, in the paper's order: one model, H + EE, without options.
model.py is the same model with settings and fast twins. The tests hold it to this file.

    A1 weight_ternary      A4 exit_loss     A7 losses
    A2 activation_quant    A5 skip_block    A8 quantization_loss
    A3 HBitLinear, fwht    A6 Gate          A9 routing_loss

    python minimal.py       trains two minutes on two CPU cores: PPL 14 at exit 0, 9 at exit 5
    python minimal.py 20    trains 20 steps
"""
import math
import sys

from prepare import documents

import torch
import torch.nn as nn
import torch.nn.functional as F

L, C, FFN = 6, 128, 256  # blocks (numbered 0 ... L-1), width, inner width of the FFN
HEADS, KV_HEADS = 4, 2  # heads of queries; heads of keys and values, each for two of queries
T, V, BITS = 128, 256, 8  # context, vocabulary (a token is a byte), bits of an activation
P_MAX, GATE = 0.7, 32  # A5: highest probability to skip a block; A6: inner width of a gate
LAMBDA_EE, LAMBDA_Q, LAMBDA_R = 0.3, 0.05, 0.2  # A7: weights of the losses
TARGET = L // 2  # A9: l*, the layer where tokens leave on average
STEPS, BATCH, LR = 1200, 4, 8e-3  # training: steps, windows in a step, peak of the learning rate

def weight_ternary(W):
    """A1: W^ = alpha clip(round(W / alpha), -1, 1), alpha = mean|W|. One alpha per matrix."""
    alpha = W.abs().mean().clamp(min=1e-20)
    return alpha * (W / alpha).round().clip(-1, 1)

def activation_quant(x):
    """A2: x^ = clip(round(x q/s), -q-1, q) s/q, s = max|x|, q = 2^(b-1) - 1. One s per token."""
    s, q = x.abs().amax(dim=-1, keepdim=True).clamp(min=1e-20), 2 ** (BITS - 1) - 1
    return (x * q / s).round().clip(-q - 1, q) * s / q

def straight_through(x, x_hat):
    """Forward x^, backward the identity to x: rounding has no useful gradient of its own."""
    return x + (x_hat - x).detach()

def fwht(x):
    """B4: H_m x of 2^m features, H_m = 1/sqrt(2) [[H_m-1, H_m-1], [H_m-1, -H_m-1]], in m rounds.
    Each y_i mixes all x_j. So an outlier is spread, and the quantizer wastes fewer levels on it."""
    x = x.movedim(-1, 0)  # features first, so that each half lies in one piece
    for _ in range(int(math.log2(len(x)))):
        a, b = x.chunk(2)
        x = torch.stack((a + b, a - b), dim=1).flatten(0, 1)  # the index's top bit goes last
    return x.movedim(0, -1) / math.sqrt(len(x))

class HBitLinear(nn.Module):
    """A3: y = W^ Q_b(FWHT(Pad(LN(x)))). LN is the norm that a block has before each HBitLinear."""
    def __init__(self, n_in, n_out):
        super().__init__()
        self.pad = 2 ** math.ceil(math.log2(n_in)) - n_in  # to the next power of two
        self.weight = nn.Parameter(torch.empty(n_out, n_in + self.pad))  # BitSkip fills it

    def forward(self, x):
        x, W = fwht(F.pad(x, (0, self.pad))), self.weight
        return straight_through(x, activation_quant(x)) @ straight_through(W, weight_ternary(W)).T

def rotate(x):
    """RoPE: turns the pair (x_i, x_i+D/2) at position t by t / 10000^(2i/D). x (B, heads, T, D)."""
    *_, t, D = x.shape
    angle = torch.arange(t)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)  # (T, D/2)
    pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.exp(1j * angle)  # (B, heads, T, D/2)
    return torch.cat((pairs.real, pairs.imag), dim=-1)

class Block(nn.Module):
    """h_{l-1} -> h_l, (B, T, C) -> (B, T, C): causal attention, then a feed-forward network."""
    def __init__(self):
        super().__init__()
        kv = C * KV_HEADS // HEADS
        self.attn_norm, self.ffn_norm = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.attn = nn.ModuleDict(dict(q=HBitLinear(C, C), k=HBitLinear(C, kv), v=HBitLinear(C, kv),
                                       sub_norm=nn.LayerNorm(C, bias=False), o=HBitLinear(C, C)))
        self.ffn = nn.ModuleDict(dict(up=HBitLinear(C, FFN), down=HBitLinear(FFN, C),
                                      sub_norm=nn.LayerNorm(FFN, bias=False)))

    def forward(self, h):
        attn, ffn, x = self.attn, self.ffn, self.attn_norm(h)
        q, k, v = (attn[name](x).unflatten(-1, (-1, C // HEADS)).transpose(1, 2)
                   for name in 'qkv')  # (B, heads, T, D)
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k, v))  # as many as q
        mask = torch.full((h.shape[1], h.shape[1]), -math.inf).triu(1)  # no token sees later ones
        scores = rotate(q) @ rotate(k).mT / math.sqrt(C // HEADS) + mask  # (B, heads, T, T)
        y = scores.softmax(dim=-1) @ v  # (B, heads, T, D)
        h = h + attn.o(attn.sub_norm(y.transpose(1, 2).flatten(2)))
        y = F.relu(ffn.up(self.ffn_norm(h))).square()  # (B, T, FFN): A3's squared ReLU
        return h + ffn.down(ffn.sub_norm(y))

def exit_loss(logits, targets):
    """A4: sum of w_l CE(logits_l, next token) over the exits l < L-1, w_l ~ L - l, sum w_l = 1."""
    w = [(L - l) / sum(L - j for j in range(L - 1)) for l in range(L - 1)]
    return sum(w[l] * F.cross_entropy(logits[l], targets) for l in range(L - 1))

def skip_block(block, h, l):
    """A5: in training each sample skips block l with probability p, the last block excepted."""
    p = P_MAX * (l / (L - 1)) ** 2 if l < L - 1 else 0
    if not block.training or p == 0:
        return block(h)
    keep, = (torch.rand(len(h)) >= p).nonzero(as_tuple=True)  # the samples that do not skip
    return h.index_copy(0, keep, block(h[keep])) if len(keep) else h

class Gate(nn.Module):
    """A6: p_l = sigmoid(W2 ReLU(W1 LN(h_l))), the chance to leave: (B, T, C) -> (B, T)."""
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(C, GATE, bias=False), nn.Linear(GATE, 1, bias=False)

    def forward(self, h):
        return torch.sigmoid(self.w2(F.relu(self.w1(F.layer_norm(h, (C,))))).squeeze(-1))

class BitSkip(nn.Module):
    """Tokens (B, T) -> the states h_0 ... h_{L-1}, (B, T, C) each. One head reads any of them."""
    def __init__(self):
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(V, C), nn.ModuleList(Block() for _ in range(L))
        self.norm, self.head = nn.LayerNorm(C, bias=False), nn.Linear(C, V, bias=False)
        self.gates = nn.ModuleList(Gate() for _ in range(L - 1))
        for name, W in self.named_parameters():
            if W.dim() == 2:  # o and down add to h, 2L times in all: they start smaller
                adds = name.endswith(('attn.o.weight', 'ffn.down.weight'))
                nn.init.normal_(W, std=0.02 / math.sqrt(2 * L if adds else 1))

    def forward(self, idx, n_blocks=None):
        states = [self.embedding(idx)]
        for l, block in enumerate(self.blocks[:n_blocks]):
            states.append(skip_block(block, states[-1], l))
        return states[1:]

    def logits(self, h):
        return self.head(self.norm(h)).flatten(0, 1)  # (B T, V)

def losses(model, idx, targets):
    """A7: L = L_CE + lambda_ee L_ee + lambda_q L_quant + lambda_r L_route. idx, targets (B, T)."""
    states, targets = model(idx), targets.flatten()
    logits = [model.logits(h) for h in states]
    ce, ee = F.cross_entropy(logits[-1], targets), exit_loss(logits, targets)
    quant, route = quantization_loss(model), routing_loss(model, states)
    total = ce + LAMBDA_EE * ee + LAMBDA_Q * quant + LAMBDA_R * route
    return {'total': total, 'ce': ce, 'ee': ee, 'quant': quant, 'route': route}

def quantization_loss(model):
    """A8: mean over the matrices of mean (W - W^)^2, where W^ is a constant."""
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, HBitLinear)]
    return sum((W - weight_ternary(W).detach()).square().mean() for W in matrices) / len(matrices)

def routing_loss(model, states):
    """A9: (E - l*)^2, E = sum of l z_l prod_j<l (1 - z_j). Who never left, leaves at L-1."""
    p = torch.stack([gate(h) for gate, h in zip(model.gates, states)], dim=-1)  # (B, T, L-1)
    z = straight_through(p, (torch.rand_like(p) < p).to(p.dtype)) if model.training else p  # A6
    E, stays = 0, 1
    for l in range(L - 1):
        E, stays = E + l * z[..., l] * stays, stays * (1 - z[..., l])  # (B, T)
    return ((E + (L - 1) * stays).mean() - TARGET).square()

def sample(model, l, prompt='Return ', length=150):
    """What the model writes after the prompt when it stops at block l."""
    text = list(prompt.encode())
    for _ in range(length):
        logits = model.logits(model(torch.tensor([text[-T:]]), n_blocks=l + 1)[l])[-1]  # (V,)
        text.append(torch.multinomial((logits / 0.7).softmax(dim=-1), 1).item())
    return bytes(text).decode(errors='replace')

if __name__ == '__main__':
    argument = ' '.join(sys.argv[1:]) or str(STEPS)
    steps = int(argument) if argument.isdecimal() else 0
    if steps == 0:
        print(f"minimal.py takes a number of steps, not '{argument}'", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(7)
    text = {'train': bytearray(), 'val': bytearray(), 'test': bytearray()}
    for split, piece, _ in documents('pydocs'):
        text[split] += piece.encode()
        if len(text['train']) > 2e6:  # enough for two minutes
            break
    train, val = (torch.tensor(text[split]) for split in ('train', 'val'))  # int64
    model = BitSkip()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):  # rate: warm up for a tenth, stay, fall to 0 in the last third
        windows = train.unfold(0, T + 1, 1)[torch.randint(len(train) - T, (BATCH,))]  # (B, T+1)
        parts = losses(model, windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        parts['total'].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]['lr'] = LR * min(1, 10 * (step + 1) / steps, 3 - 3 * step / steps)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f'step {step}:', ', '.join(f'{name} {part:.4f}' for name, part in parts.items()))
    model.eval().requires_grad_(False)
    windows = val.unfold(0, T + 1, T)[:steps]  # one after the other, at most so many as steps
    nats = [[F.cross_entropy(model.logits(h), w[1:]) for h in model(w[None, :-1])] for w in windows]
    for l, nat in enumerate(torch.tensor(nats).mean(dim=0)):
        print(f'exit {l}: PPL {nat.exp():.2f}')
    for l in (1, L - 1):
        print(f'\nexit {l} writes: {sample(model, l)}')
