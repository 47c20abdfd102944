"""How a check speaks: one sentence about what is wrong, and never the answer itself."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode


def same(got, right, hint, *known, rtol=1e-4, atol=1e-5):
    """AssertionError with `hint` unless `got` is `right`, up to rounding. known: pairs (value that
    a typical mistake has, what to say then)."""
    assert got is not None, 'your function gave back None: is its return missing?'
    got, right = torch.as_tensor(got), torch.as_tensor(right)
    assert got.shape == right.shape, (
        f'the shape is {tuple(got.shape)}, it should be {tuple(right.shape)}. {hint}')
    for value, sentence in known:
        assert close(right, value, rtol, atol) or not close(got, value, rtol, atol), sentence
    assert close(got, right, rtol, atol), hint


def close(a, b, rtol=1e-4, atol=1e-5):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol, atol)


class Work(TorchDispatchMode):
    """with Work() as work: counts the numbers that all operations make (`total`), and those of the
    largest single result (`largest`). nan: an integer was made of a NaN, whatever that is."""
    total, largest, nan = 0, 0, False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and not result.dtype.is_floating_point:
            self.nan |= bool(args[0].isnan().any())
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.total += tensor.numel()
                self.largest = max(self.largest, tensor.numel())
        return result
