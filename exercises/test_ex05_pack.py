import torch

from exercises.hints import same
from quant import pack_ternary


def random_codes(k):
    return torch.randint(-1, 2, (7, k), dtype=torch.int8)


def test_layout(student):
    codes = torch.tensor([[-1, 0, 1, 0, -1]], dtype=torch.int8)
    same(student.pack(codes).int(), torch.tensor([[48]]).int(),
         'codes -1 0 1 0 -1 are the byte 0 + 3 + 18 + 27 + 0: each digit is c + 1',
         (48 - 121, 'a digit is c + 1, so that it is not negative'))


def test_the_last_byte_is_filled_with_codes_0(student):
    same(student.pack(torch.ones(1, 1, dtype=torch.int8)).int(), torch.tensor([[122]]).int(),
         'a single code 1 is the byte 2 + 3 + 9 + 27 + 81: code 0 has the digit 1')


def test_pack_is_the_projects(student):
    for k in (1, 4, 5, 6, 512):
        codes = random_codes(k)
        packed = student.pack(codes)
        assert packed.dtype == torch.uint8, f'packed bytes are uint8, not {packed.dtype}'
        same(packed.int(), pack_ternary(codes).int(), f'wrong bytes for rows of {k} codes')


def test_unpack_is_the_inverse(student):
    for k in (1, 4, 5, 6, 512):
        codes = random_codes(k)
        unpacked = student.unpack(pack_ternary(codes), k)
        assert unpacked.dtype == torch.int8, f'codes are int8, not {unpacked.dtype}'
        same(unpacked.int(), codes.int(), f'these are not the {k} codes of a row that were packed',
             (codes.int() + 1, 'these are the digits: codes are digit - 1'))
