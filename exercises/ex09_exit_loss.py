"""9. The early-exit loss (A4, B6)."""
import torch
import torch.nn.functional as F


def exit_loss(logits, tokens, weighting):
    """L_ee = sum over l < L-1 of w_l CE(logits_l, next token), sum w_l = 1: a scalar.

    logits (L, B, T, V) of all L layers; the last layer is not an exit. tokens (B, T) int64 are the
    *inputs*: the token after tokens[:, t] is tokens[:, t + 1], and the last position has none. CE
    is the mean over samples and positions.
    weighting 'early': w_l ~ L - l (A4); 'late': w_l ~ l + 1 (B6)."""
    raise NotImplementedError


def observe():
    V, L = 256, 12
    tokens = torch.randint(V, (8, 65), generator=torch.Generator().manual_seed(0))
    echo = 12.0 * F.one_hot(tokens, V).expand(L, -1, -1, -1)  # exits that repeat their input
    current = F.cross_entropy(echo[0].flatten(0, 1), tokens.flatten())
    following = exit_loss(echo, tokens, 'early')
    print(f'exits that repeat the current token: PPL {current.exp():.2f} on it, '
          f'{following.exp():,.0f} on the next one, where a uniform guess has {V}')


if __name__ == '__main__':
    observe()
