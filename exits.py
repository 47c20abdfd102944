"""
Early exit: how intermediate layers are supervised, skipped and chosen.

Block l of L leaves a hidden state h_l; logits_l = head(norm(h_l)) may be read off after any of them. This file holds
what is specific to that, as pure functions of their arguments (nothing here has a state that resuming could forget):

    A4, B6   L_ee = sum_{l < L-1} w_l CE(logits_l, next token), sum w_l = 1      exit_weights, linear_cross_entropy
             LayerSkip's curricula over training steps, and ramps                curriculum_weights, ramp
             a low-rank map of each exit's own, before the shared head           Adapter
    A5, B2   block l is skipped with probability p_max (l / (L-1))^2             skip_probabilities
    A6       p_l = sigmoid(W2 ReLU(W1 norm(h_l)))                                Gate, sample_exits
    A9       L_route = (E - l*)^2, E = sum_l l p_l prod_{j<l} (1 - p_j)          expected_exit_layer

What differs from the authors' code: labels are those of the next token at every exit (they compare the exits with the
current one, see the README); the probability of never having left is given to the last layer (they drop it, so that
E = 0 can mean "never exits").
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from quant import float_product


def exit_weights(n_layer, weighting):
    """w_l of the exits 0 ... L-2, summing to 1: (L-1,) float32. 'early': w_l ~ L - l (A4); 'late': w_l ~ l + 1 (B6);
    'uniform': all the same."""
    layers = torch.arange(n_layer - 1, dtype=torch.float32)
    weights = {'early': n_layer - layers, 'late': layers + 1, 'uniform': torch.ones_like(layers)}[weighting]
    return weights / weights.sum()


def curriculum_weights(weights, curriculum, step, max_iters):
    """The exit weights (L-1,) of one training step under LayerSkip's curricula: some set to 0, the rest sum to 1.

    'none': all exits in every step. 'rotational': one exit a step, in turn. 'gradual': the deepest exit first, then one
    more, towards the input, every max_iters / 2(L-1) steps, so that all are on in the second half."""
    n = len(weights)
    layers = torch.arange(n)
    if curriculum == 'rotational':
        weights = weights * (layers == step % max(1, n))
    elif curriculum == 'gradual':
        weights = weights * (layers >= n - 1 - step * 2 * n // max_iters)
    return weights / weights.sum() if n else weights


def ramp(kind, step, max_iters):
    """What lambda_ee is multiplied by in a step: 1 ('none'), growing from 0 to 1 ('up') or shrinking to 0 ('down')."""
    done = step / max_iters
    return {'none': 1.0, 'up': done, 'down': 1 - done}[kind]


def skip_probabilities(n_layer, p_max, schedule='quadratic', normalize=False, skip_last=False):
    """Probability of skipping each block in training (stochastic depth): list of L floats, the last one 0 without
    skip_last (A5, B2).

    schedule: with t = l / (L-1), p_l is p_max times t^2 ('quadratic'), t ('linear'), 2^t - 1 ('exp', as LayerSkip) or
    1 ('uniform'). normalize: scale so that they sum to 1, one skipped block per sample on average (B section 3.3),
    whatever p_max is. ValueError if a block would then always be skipped."""
    curve = {'quadratic': lambda t: t ** 2, 'linear': lambda t: t, 'exp': lambda t: 2 ** t - 1,
             'uniform': lambda t: 1.0}[schedule]
    p = [p_max * curve(layer / max(1, n_layer - 1)) for layer in range(n_layer)]
    if not skip_last:
        p[-1] = 0.0
    if normalize and sum(p) > 0:
        p = [p_l / sum(p) for p_l in p]
        if max(p) >= 1:
            raise ValueError(f'skip_normalize leaves a block of {n_layer} that is always skipped: take more layers')
    return p


class Adapter(nn.Module):
    """An exit's own low-rank step towards the space that the shared head reads (tuned lens, EE-Tuning):
    h + B A norm(h), (..., C) -> (..., C), with B zero at first, so that an untrained adapter changes nothing."""

    def __init__(self, n_embd, rank):
        super().__init__()
        self.a = nn.Linear(n_embd, rank, bias=False)
        self.b = nn.Linear(rank, n_embd, bias=False)

    def forward(self, h):
        return h + self.b(self.a(F.layer_norm(h, h.shape[-1:])))


class Gate(nn.Module):
    """A6: the probability that a token leaves here: h (..., C) -> (...) in [0, 1]. No biases, as A6 is printed; its
    norm is a LayerNorm without parameters."""

    def __init__(self, n_embd, gate_dim):
        super().__init__()
        self.w1 = nn.Linear(n_embd, gate_dim, bias=False)
        self.w2 = nn.Linear(gate_dim, 1, bias=False)

    def forward(self, h):
        return torch.sigmoid(self.w2(F.relu(self.w1(F.layer_norm(h, h.shape[-1:])))).squeeze(-1).float())


def sample_exits(p):
    """A6 in training: z ~ Bernoulli(p) in {0, 1}, with the straight-through gradient dz/dp := 1. Same shape as p."""
    return (torch.rand_like(p) < p).to(p.dtype) + (p - p.detach())


def expected_exit_layer(p):
    """A9: p (..., L-1), the chance to leave at layers 0 ... L-2 when reached -> E (...), the mean layer of leaving.

    A token that has not left by then leaves at L-1. E is linear in each p_l, so on independent samples z ~ p it is the
    layer that the sampled path leaves at, and its mean over them is E(p), its mean gradient that of E(p)."""
    reach = torch.cumprod(1 - p, dim=-1)  # (..., L-1): the chance to get past layer l
    return reach.sum(dim=-1)  # E[layer] = sum over l >= 0 of P(layer > l)


class LinearCrossEntropy(torch.autograd.Function):
    """sum_n weight_n CE(softmax(h_n W^T), target_n) without ever holding more than one chunk of logits.

    With 50,257 words and 12 exits, logits are most of the memory of a training step. But softmax needs only its own
    row, so rows are done a chunk at a time, and the gradient (softmax - target) is used up at once, in forward."""

    CHUNK = 2 ** 25  # logits at a time, at most: 128 MiB in float32
    ROWS = 2 ** 12  # and rows: what stays in the cache is quicker to go over again

    @staticmethod
    def forward(ctx, h, w, targets, weights, teacher, distill, needs_h, needs_w):
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        w_cast = w.to(dtype)
        total = torch.zeros((), device=h.device)
        grad_h, grad_w = torch.empty_like(h) if needs_h else None, torch.zeros_like(w) if needs_w else None
        rows = max(1, min(LinearCrossEntropy.ROWS, LinearCrossEntropy.CHUNK // len(w)))
        for start in range(0, len(h), rows):
            chunk = slice(start, start + rows)
            h_cast, target, weight = h[chunk].to(dtype), targets[chunk, None], weights[chunk, None]
            logits = float_product(h_cast, w_cast.t()).float()  # (rows, V)
            wanted = logits.gather(1, target) * (1 - distill)  # the target's mean logit, (rows, 1)
            if distill:
                soft = float_product(teacher[chunk].to(dtype), w_cast.t()).float().softmax(dim=-1).mul_(distill)
                wanted += (soft * logits).sum(dim=-1, keepdim=True)
            top = logits.amax(dim=-1, keepdim=True)
            exps = logits.sub_(top).exp_()
            Z = exps.sum(dim=-1, keepdim=True)
            total += ((top + Z.log() - wanted) * weight).sum()  # CE = log sum_v exp(logit_v) - the target's mean logit
            if needs_h or needs_w:
                grad = exps.mul_(weight / Z)  # the softmax...
                grad.scatter_add_(1, target, weight * (distill - 1))  # ...minus the target is dCE/dlogits
                if distill:
                    grad -= soft.mul_(weight)
                grad = grad.to(dtype)
                if needs_h:
                    grad_h[chunk] = float_product(grad, w_cast)
                if needs_w:
                    grad_w += float_product(grad.t(), h_cast)
        ctx.save_for_backward(grad_h, grad_w)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grads = [None if grad is None else grad * grad_total for grad in ctx.saved_tensors]
        return *grads, None, None, None, None, None, None


def linear_cross_entropy(h, w, targets, weights=None, teacher=None, distill=0.0):
    """Weighted sum of token cross-entropies of a linear head: scalar float32, differentiable in h and w.

    h (N, C), w (V, C), targets (N,) int64, weights (N,) float32, by default 1/N each (the mean). With distill > 0 that
    share of the target is what the head makes of `teacher` (N, C), a constant: (1 - distill) one-hot + distill
    softmax(teacher W^T)."""
    if weights is None:
        weights = torch.full((len(h),), 1 / len(h), device=h.device)
    needs = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (h, w)]
    return LinearCrossEntropy.apply(h, w, targets, weights, teacher, distill, *needs)
