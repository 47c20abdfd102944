import torch

from quant import pack_ternary


def random_codes(k):
    return torch.randint(-1, 2, (7, k), dtype=torch.int8)


def test_layout(student):
    assert student.pack(torch.tensor([[-1, 0, 1, 0, -1]], dtype=torch.int8)).tolist() == [[0 + 3 + 18 + 27 + 0]]
    assert student.pack(torch.ones(1, 5, dtype=torch.int8)).tolist() == [[242]]
    assert student.pack(torch.ones(1, 1, dtype=torch.int8)).tolist() == [[2 + 3 + 9 + 27 + 81]]


def test_pack_is_the_projects(student):
    for k in (1, 4, 5, 6, 512):
        codes = random_codes(k)
        packed = student.pack(codes)
        assert packed.dtype == torch.uint8 and torch.equal(packed, pack_ternary(codes))


def test_unpack_is_the_inverse(student):
    for k in (1, 4, 5, 6, 512):
        codes = random_codes(k)
        unpacked = student.unpack(pack_ternary(codes), k)
        assert unpacked.dtype == torch.int8 and torch.equal(unpacked, codes)
