import torch
import torch.nn.functional as F

from exercises.hints import Work, same

N, C, V, ROWS = 70, 4, 1000, 8  # the last chunk has 6 rows


def data():
    torch.manual_seed(0)
    h, w = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    return h, w, torch.randint(V, (N,))


def test_value_and_gradients(student):
    for rows in (1, ROWS, N, 1000):
        (h, w, targets), (h2, w2, _) = data(), data()
        loss, right = student.linear_cross_entropy(h, w, targets, rows), F.cross_entropy(
            h2 @ w2.T, targets)
        same(loss, right, f'not the mean over all {N} tokens, with {rows} at a time',
             (right * N, 'this is the sum over the tokens, not their mean'))
        try:
            (3 * loss).backward()
        except Exception as error:
            raise AssertionError(f'the backward pass fails ({type(error).__name__}): does each '
                                 'chunk get its own rows, as arguments and not by a loop variable?'
                                 ) from None
        (3 * right).backward()
        for name, got, expected in (('h', h, h2), ('w', w, w2)):
            assert got.grad is not None, f'no gradient comes to {name}'
            same(got.grad, expected.grad, f'a wrong gradient comes to {name}')


def test_survives_large_logits(student):
    h, targets = 1000 * torch.eye(3), torch.tensor([1, 2, 0])
    loss = student.linear_cross_entropy(h.requires_grad_(), torch.eye(3), targets, 2).item()
    assert loss == 1000, f'logits of 1,000 make a loss of {loss}, not of 1000: exp overflows'


def test_never_makes_more_than_a_chunk_of_logits(student):
    h, w, targets = data()
    with Work() as work:
        student.linear_cross_entropy(h, w, targets, ROWS).backward()
    assert work.largest <= ROWS * V, (
        f'a tensor of {work.largest:,} numbers was made: {ROWS} rows of logits are {ROWS * V:,}')


def test_keeps_no_logits_for_the_backward_pass(student):
    h, w, targets = data()
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = student.linear_cross_entropy(h, w, targets, ROWS)
    held = sum(tensor.numel() for tensor in kept.values())
    assert held <= 2 * (h.numel() + w.numel()) + ROWS * V, (
        f'{held:,} numbers wait for the backward pass: autograd keeps every chunk of logits')
    assert loss.requires_grad, 'no gradient: h and w could not learn'
