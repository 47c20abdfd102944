"""14. An exit as draft of its own model (speculative decoding)."""
import torch
import torch.nn.functional as F


def accept_probability(p, q):
    """An exit has drafted a token x ~ q, the whole model says p, both (..., V). The chance to
    accept x: (..., V)."""
    raise NotImplementedError


def residual(p, q):
    """The distribution to draw from after a rejection, (..., V), such that in the end the token is
    exactly ~ p. (p is not q.)"""
    raise NotImplementedError


def n_accepted(draft, target):
    """Greedy decoding: draft (k,) int64 was proposed, target (k,) is what the model itself would
    have said at each of these places, given the draft before it. How many drafted tokens stand: an
    int."""
    raise NotImplementedError


def observe():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50, generator=generator)
    p, q = F.softmax(2 * z, -1), F.softmax(2 * z + torch.randn(50, generator=generator), -1)
    n = 200_000
    drafted = torch.multinomial(q, n, replacement=True, generator=generator)
    accepted = torch.rand(n, generator=generator) < accept_probability(p, q)[drafted]
    again = torch.multinomial(residual(p, q), n, replacement=True, generator=generator)
    tokens = torch.where(accepted, drafted, again)

    def distance(tokens):
        return (tokens.bincount(minlength=50) / len(tokens) - p).abs().sum() / 2
    a = accepted.float().mean().item()
    print(f'accepted: {a:.3f}, and sum of min(p, q) is {torch.minimum(p, q).sum():.3f}')
    print(f'total variation from p: {distance(drafted):.3f} as drafted, '
          f'{distance(tokens):.3f} after the rule')
    print(f'a draft of 4 yields {(1 - a ** 5) / (1 - a):.2f} tokens for one pass of the whole '
          f'model')


if __name__ == '__main__':
    observe()
