"""13. A loss that never holds its logits (A4)."""
import torch
import torch.nn.functional as F


def linear_cross_entropy(h, w, targets, rows):
    """mean of CE(h W^T, targets), `rows` tokens at a time: h (N, C), w (V, C), targets (N,) int64
    -> scalar.

    Differentiable in h and w. There are never more than `rows` * V logits at once, forward or
    backward. In particular, none wait for the backward pass: `torch.utils.checkpoint` computes them
    again, or compute the gradients at once, in an autograd.Function."""
    raise NotImplementedError


def kept_for_backward(loss_function, h, w, targets):
    """How many numbers autograd keeps between forward and backward, but for what h and w are."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_function(h, w, targets)
    assert loss.requires_grad
    return sum(tensor.numel() for tensor in kept.values()
               if tensor.numel() > max(h.numel(), w.numel()))


def observe():
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 16, generator=generator, requires_grad=True) for n in (512, 50257))
    targets = torch.randint(50257, (512,), generator=generator)
    plain, chunked = (kept_for_backward(loss, h, w, targets) * 4 / 1e6 for loss in (
        lambda h, w, targets: F.cross_entropy(h @ w.T, targets),
        lambda h, w, targets: linear_cross_entropy(h, w, targets, 64)))
    print(f'kept for backward, 512 tokens, 50,257 words: {plain:,.0f} MB of logits; in chunks '
          f'{chunked:,.0f} MB')
    whole, chunk = (tokens * 50257 * 4 / 1e9 for tokens in (16 * 512 * 12, 512))
    print(f"Paper A's step as run, 16 x 512 tokens at 12 exits: {whole:.1f} GB of logits, "
          f'and in chunks of 512 {chunk:.1f} GB')


if __name__ == '__main__':
    observe()
