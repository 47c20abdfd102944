"""11. Where a token leaves (A9)."""
import torch


def expected_exit_layer(p):
    """A9: p (..., L-1), the chance to leave at layers 0 ... L-2 for who gets there -> the mean
    layer of leaving, (...).

        E = sum_l l p_l prod_{j<l} (1 - p_j),    and who never left leaves at the last layer, L-1

    Differentiable in p."""
    raise NotImplementedError


def observe():
    def authors(p):
        return expected_exit_layer(p) - 11 * (1 - p).prod(-1)  # the last layer is forgotten
    for chance in (0.0, 0.05, 0.12, 0.5):
        p = torch.full((11,), chance, dtype=torch.float64, requires_grad=True)
        E, E_authors = expected_exit_layer(p), authors(p)
        slopes = [torch.autograd.grad(e, p)[0].sum().item() for e in (E, E_authors)]
        print(f'all gates at {chance:.2f}: E = {E:.2f}, slope {slopes[0]:+.1f}; '
              f'without the last layer {E_authors:.2f}, slope {slopes[1]:+.1f}')
    p = torch.linspace(0, 1, 1001, dtype=torch.float64)[:, None].expand(-1, 11)
    print(f'largest without the last layer: {authors(p).max():.2f}; the target is 6')


if __name__ == '__main__':
    observe()
