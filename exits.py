"""
Early exit: how intermediate layers are supervised, skipped, and chosen.

Block l of L leaves a hidden state h_l. Any of them can be read out: logits_l = head(norm(h_l)).

    A4, B6   L_ee = sum_{l < L-1} w_l CE(logits_l, next token), sum w_l = 1     exit_loss
    A5, B2   block l is skipped with probability p_max (l / (L-1))^2            skip_probabilities
    A6       p_l = sigmoid(W2 ReLU(W1 norm(h_l))), z_l ~ Bernoulli(p_l)         Gate, sample_exits
    A9       L_route = (E - l*)^2, E = sum_l l p_l prod_{j<l} (1 - p_j)         routing_loss

What differs from the authors' code: every exit learns the *next* token, where theirs learn the
current one. The probability of never having left belongs to the last layer, where theirs drops it.
"""
import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

from quant import float_product, straight_through

def exit_weights(n_layer, weighting):
    """w_l of the exits 0 ... L-2, sum 1: (L-1,) float32. 'early': w_l ~ L - l (A4); 'late':
    w_l ~ l + 1 (B6); 'uniform': all the same."""
    layers = torch.arange(n_layer - 1, dtype=torch.float32)
    weights = {'early': n_layer - layers, 'late': layers + 1, 'uniform': layers * 0 + 1}[weighting]
    return weights / weights.sum()

def exit_loss(rows, targets, weights, head):
    """A4, B6: sum over exits l of w_l CE(head h_l, next token), a scalar. minimal.py says it as a
    loop; here all exits are one batch of rows, whose logits are never held whole.

    rows: what the head reads at each exit, (N_l, C) each; targets: (N_l,) int64 each, shifted;
    weights: w_l, as floats; head: (V, C)."""
    token_weights = [torch.full((len(h),), w / max(1, len(h)), device=h.device)
                     for h, w in zip(rows, weights)]
    rows, targets = torch.cat(rows), torch.cat(targets)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (rows, head)]
    return LinearCrossEntropy.apply(rows, head, targets, torch.cat(token_weights), *needs)

def deal(n, exits, device):
    """The tokens 0 ... n-1, dealt out at random to so many exits: a list of int64 tensors. The mean
    over an exit's share is an unbiased estimate of its mean over all tokens."""
    return torch.randperm(n).to(device, non_blocking=True).tensor_split(exits)

def skip_probabilities(n_layer, p_max, normalize=False):
    """A5, B2: the chance p_max (l / (L-1))^2 that a sample skips block l in training: list of L
    floats, 0 for the last. normalize: scaled to sum 1, whatever p_max is (Paper B, section 3.3).

    ValueError if a block would then be skipped always."""
    p = [p_max * (layer / max(1, n_layer - 1)) ** 2 for layer in range(n_layer)]
    p[-1] = 0.0
    if normalize and sum(p) > 0:
        p = [p_l / sum(p) for p_l in p]
    if max(p) >= 1:
        raise ValueError(f'a block of these {n_layer} would always be skipped; take more layers or '
                         'skip_normalize=False')
    return p

class Gate(nn.Module):
    """A6: the probability that a token leaves here: h (..., C) -> (...) float32 in [0, 1].

    No biases, as A6 is printed. Its norm is a LayerNorm without parameters."""

    def __init__(self, n_embd, gate_dim):
        super().__init__()
        self.w1 = nn.Linear(n_embd, gate_dim, bias=False)
        self.w2 = nn.Linear(gate_dim, 1, bias=False)

    def forward(self, h):
        hidden = F.relu(self.w1(F.layer_norm(h, h.shape[-1:])))  # (..., gate_dim)
        return torch.sigmoid(self.w2(hidden).squeeze(-1).float())  # A6

def sample_exits(p):
    """A6 in training: z ~ Bernoulli(p) in {0, 1}, straight-through: dz/dp := 1. Same shape as p."""
    return straight_through(p, torch.rand_like(p) < p)

def expected_exit_layer(p):
    """A9: E, the mean layer that a token leaves at: p (..., L-1) -> (...).

    p_l is the chance to leave at layer l once reached; who has not left by then leaves at L-1.
    E is linear in each p_l, so on independent samples z ~ p its mean is E(p)."""
    stays = itertools.accumulate((1 - p).unbind(dim=-1), torch.mul)  # leaves at none of 0 ... l
    return sum(stays)  # sum_l l P(leave at l) = sum_{l >= 0} P(get past l)

def routing_loss(p, target_exit):
    """A9: (E - l*)^2, a scalar, of p (B, T, L-1). E is a mean over tokens ("on average")."""
    return (expected_exit_layer(p).mean() - target_exit).square()

def divergence_loss(gates, states, last, read, head):
    """Not in the papers: gates foresee the KL to full depth. A scalar; only gates learn from it.

    A gate's p is read as e^-D. D should foresee KL(full depth || exit), and a token leaves where
    D < -log(tau). The mean of D - KL log D is least where D is the expected KL. states: L-1 of
    (B, T, C); last (B, T, C): what the head reads at full depth; read(h, layer): at an exit."""
    losses, n = [], last[..., 0].numel()
    shares = deal(n, max(len(states), n // 256), last.device)  # a gate has its own tokens: 256
    for layer, (gate, h, share) in enumerate(zip(gates, states, shares)):
        h, full = h.detach().flatten(0, 1)[share], last.detach().flatten(0, 1)[share]
        with torch.no_grad():
            p, q = (head(x).float().log_softmax(dim=-1) for x in (read(h, layer), full))
            kl = F.kl_div(p, q, reduction='none', log_target=True).sum(dim=-1).clamp(min=0)  # (N,)
        D = -gate(h).clamp(1e-6, 1 - 1e-6).log()
        losses.append((D - kl * D.log()).sum() / max(1, len(share)))
    return torch.stack(losses).mean()

class LinearCrossEntropy(torch.autograd.Function):
    """sum_n weight_n CE(softmax(h_n W^T), target_n), with one chunk of logits at a time: h (N, C),
    w (V, C), targets (N,) int64, weights (N,) float32; whether h and w need a gradient.

    With 50,257 words and 12 exits, logits would be most of a step's memory. But a row's softmax
    needs that row only, so its gradient, softmax - target, is used up at once, in forward."""

    # at most so many rows and logits in a chunk; the vocabulary padded to a multiple of the last
    CPU, GPU = (2 ** 11, 2 ** 25, 1), (2 ** 20, 2 ** 28, 64)

    @staticmethod
    def forward(ctx, h, w, targets, weights, needs_h, needs_w):
        device, V = h.device.type, len(w)
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else h.dtype
        most_rows, most_logits, m = LinearCrossEntropy.CPU if h.is_cpu else LinearCrossEntropy.GPU
        rows = max(1, min(most_rows, most_logits // V))
        w_cast, total = F.pad(w.to(dtype), (0, 0, 0, -V % m)), torch.zeros((), device=h.device)
        grad_h = torch.empty_like(h) if needs_h else None
        grad_w = torch.zeros_like(w_cast, dtype=w.dtype) if needs_w else None
        for start in range(0, len(h), rows):
            chunk = slice(start, start + rows)
            h_cast, target, weight = h[chunk].to(dtype), targets[chunk, None], weights[chunk, None]
            logits = float_product(h_cast, w_cast.t()).float()  # (rows, V + padding)
            logits[:, V:] = -torch.inf  # the padding
            wanted = logits.gather(1, target)  # (rows, 1): the target's logit
            top = logits.amax(dim=-1, keepdim=True)
            exps = logits.sub_(top).exp_()
            Z = exps.sum(dim=-1, keepdim=True)
            total += ((top + Z.log() - wanted) * weight).sum()  # CE = log sum exp - target's logit
            if needs_h or needs_w:
                grad = exps.mul_(weight / Z)  # the softmax...
                grad = grad.scatter_add_(1, target, -weight).to(dtype)  # ...minus the target
                if needs_h:
                    grad_h[chunk] = float_product(grad, w_cast)
                if needs_w:
                    grad_w += float_product(grad.t(), h_cast)
        ctx.save_for_backward(grad_h, grad_w[:V] if needs_w else None)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grads = [None if grad is None else grad * grad_total for grad in ctx.saved_tensors]
        return *grads, None, None, None, None
