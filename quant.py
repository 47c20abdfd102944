"""
Ternary weights, integer activations, and the two linear layers made of them.

    A1, B7   alpha = mean|W|                  W^ = alpha * clip(round(W / alpha), -1, 1)       one alpha per matrix
    A2       s = max|x|, q = 2^(b-1) - 1      x^ = clip(round(x q / s), -q-1, q) * s / q       one s per token
    A3       BitLinear:   y = Q_b(x) W^T
             HBitLinear:  y = Q_b(FWHT(Pad(norm(x)))) W^T

Both quantizers return integer codes and a scale, so that codes * scale is W^ or x^. Rounding has no useful gradient;
the straight-through estimator takes the quantizer for the identity on the way back: dL/dW := dL/dW^, dL/dx := dL/dx^.
The optimizer moves the full-precision *latent* weight W, the model only ever computes with W^.

The forward pass runs in two ways that agree to rounding, gradients included (tests/test_quant.py):

- the definition: multiply x^ and W^ as floats ("fake quantization"). `fake_quant_linear`, for reading, and for
  machines without a fast int8 product.
- exact integers: multiply the int8 codes into int32, then scale once. Faster than the float product, not slower, and
  the backward pass keeps int8 codes instead of floats, a quarter of the memory. `IntegerLinear`.

What differs from the papers: A3 names a squared ReLU and a LayerNorm. The squared ReLU belongs to the FFN (on q, k, v
it would allow only non-negative values), so it is in model.py. The norm is an option of both layers (`linear_norm`,
without parameters), because otherwise "Hadamard" and "a norm before every linear" cannot be told apart.
"""
import contextlib

import torch
import torch.nn as nn
import torch.nn.functional as F

import triton_ternary
from hadamard import fwht, next_pow2, pad_to_pow2
from triton_ternary import pack_2bit, ternary_matmul, unpack_2bit

VNNI = torch.cpu._is_vnni_supported()  # (torch.compile cannot look inside)
ONEDNN = torch.backends.mkldnn.is_available()
EPS = 1e-20  # smallest max|x| and mean|W| that we divide by: only zeros are below it


# ----------------------------------------------------------------------------------------------------------------------
# quantizers

def weight_ternary(w):
    """A1: w (out, in), floating -> codes (out, in) int8 in {-1, 0, 1}, scale () float32 = mean|w|."""
    w = w.detach().float()
    scale = w.abs().mean().clamp(min=EPS)
    codes = (w / scale).round_().clamp_(-1, 1).to(torch.int8)
    return codes, scale


def activation_quant(x, bits=8):
    """A2: x (..., k), floating -> codes (..., k) int8 of `bits` (2 to 8) bits, scale (..., 1) float32 = max|x| / q.

    With s = max|x| there is nothing to clip: the codes are -q ... q."""
    q = 2 ** (bits - 1) - 1
    x = x.detach().float()
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_(min=EPS) / q
    codes = (x / scale).round_().to(torch.int8)
    return codes, scale


def straight_through(x, x_hat):
    """Forward x_hat, exactly; backward the identity to x. (x - x.detach() is zero with gradient one.)"""
    return x_hat.to(x.dtype) + (x - x.detach())


def weight_ternary_ste(w):
    """W^ of A1 with the straight-through gradient: same shape and dtype as w."""
    codes, scale = weight_ternary(w)
    return straight_through(w, codes * scale)


def activation_quant_ste(x, bits=8):
    """x^ of A2 with the straight-through gradient: same shape and dtype as x."""
    codes, scale = activation_quant(x, bits)
    return straight_through(x, codes * scale)


# ----------------------------------------------------------------------------------------------------------------------
# the product Q_b(x) W^T

def fake_quant_linear(x, w, bits):
    """Q_b(x) W^T by its definition: x (..., in), w (out, in) -> (..., out)."""
    return F.linear(activation_quant_ste(x, bits), weight_ternary_ste(w))


class IntegerLinear(torch.autograd.Function):
    """The same numbers in exact integers: the codes are multiplied in int8 with int32 sums, then scaled once.

    Takes several weights at once, (out_i, in) each with its own scale, and returns (..., sum of out_i): layers that
    share their input (q, k and v) quantize it once and become one product."""

    @staticmethod
    def forward(ctx, x, bits, *weights):
        device = x.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.x_dtype, ctx.rows = x.dtype, [len(w) for w in weights]
        x_codes, x_scale = activation_quant(x.reshape(-1, x.shape[-1]), bits)  # (N, in) int8, (N, 1)
        w_codes, w_scales = zip(*map(weight_ternary, weights))
        w_codes = torch.cat(w_codes)  # (out, in) int8
        ctx.save_for_backward(x_codes, x_scale, w_codes, *w_scales)
        y = torch._int_mm(x_codes, w_codes.t()).float()  # (N, out)
        for part, scale in zip(y.split(ctx.rows, dim=1), w_scales):
            part.mul_(x_scale * scale)
        return y.to(ctx.dtype).reshape(*x.shape[:-1], len(w_codes))

    @staticmethod
    def backward(ctx, grad_y):
        x_codes, x_scale, w_codes, *w_scales = ctx.saved_tensors
        g = grad_y.reshape(-1, grad_y.shape[-1]).to(ctx.dtype)  # (N, out)
        w_hat, x_hat = w_codes.to(ctx.dtype), x_codes.to(ctx.dtype).mul_(x_scale)
        for part, scale in zip(w_hat.split(ctx.rows), w_scales):
            part.mul_(scale)
        grad_x = float_product(g, w_hat)  # dL/dx = dL/dy W^
        grad_w = float_product(g.t(), x_hat)  # dL/dW = dL/dy^T x^
        grad_x = grad_x.to(ctx.x_dtype).reshape(*grad_y.shape[:-1], x_codes.shape[-1])
        return grad_x, None, *grad_w.float().split(ctx.rows)


def float_product(a, b):
    """a b: (m, k), (k, n) -> (m, n). In float32 on a CPU by oneDNN, where there is a choice: MKL, which @ would ask,
    runs at less than half of that speed on AMD's processors. (torch.compile knows no way from here to oneDNN.)"""
    if (ONEDNN and a.device.type == 'cpu' and a.dtype == torch.float32 and a.numel() and b.numel()
            and not torch.compiler.is_compiling()):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, 'none', [], '')
    return a @ b


def product(x_codes, x_scale, w_codes, w_scale):
    """x^ W^T from codes, no gradient: (..., in), (..., 1), (out, in), () -> (..., out) float32."""
    if not int8_fits(x_codes, w_codes):
        return F.linear(x_codes * x_scale, w_codes * w_scale)
    y = torch._int_mm(x_codes.reshape(-1, x_codes.shape[-1]), w_codes.t())
    return y.reshape(*x_codes.shape[:-1], len(w_codes)).float().mul_(x_scale * w_scale)


def int8_support(device_type):
    """(True, how) if this kind of device has a fast exact int8 product, else (False, why not)."""
    if device_type == 'cpu':
        # without VNNI torch._int_mm is a scalar loop, and a float product is faster
        return (True, 'int8 products (VNNI)') if VNNI else (False, 'this CPU has no VNNI')
    if device_type == 'cuda':
        major, minor = torch.cuda.get_device_capability()
        return (True, 'int8 products (tensor cores)') if (major, minor) >= (7, 5) else (
            False, 'this GPU has no int8 tensor cores')
    return False, f'no int8 product on {device_type}'


def int8_fits(x, w):
    """Whether torch._int_mm takes these shapes: on the CPU any (but of inner width 1 it makes garbage); on CUDA over 16
    rows and multiples of 8."""
    if not int8_support(x.device.type)[0]:
        return False
    if x.device.type == 'cpu':
        return w.shape[1] > 1
    return x.numel() // x.shape[-1] > 16 and w.shape[0] % 8 == w.shape[1] % 8 == 0


# ----------------------------------------------------------------------------------------------------------------------
# layers

class BitLinear(nn.Module):
    """y = Q_b(norm(x)) W^T (A1, A2): (..., in_features) -> (..., out_features), no bias.

    act_bits: 4 or 8. linear_norm: 'none', 'layernorm' or 'rmsnorm', without parameters.
    `weight` (out, in) is the latent weight, float32. `latent = True` computes with it instead of W^."""

    def __init__(self, in_features, out_features, act_bits=8, linear_norm='none'):
        super().__init__()
        if act_bits not in (4, 8):
            raise ValueError(f'act_bits is 4 or 8, got {act_bits}')
        if linear_norm not in ('none', 'layernorm', 'rmsnorm'):
            raise ValueError(f"linear_norm is 'none', 'layernorm' or 'rmsnorm', got {linear_norm!r}")
        self.in_features, self.out_features = in_features, out_features
        self.act_bits, self.linear_norm = act_bits, linear_norm
        self.latent = False
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * 0.02)

    def forward(self, x):
        return project(x, [self])[0]

    def prepare(self, x):
        """What happens to x before its quantization."""
        if self.linear_norm == 'layernorm':
            return F.layer_norm(x, x.shape[-1:])
        if self.linear_norm == 'rmsnorm':
            return F.rms_norm(x, x.shape[-1:])
        return x

    def freeze(self):
        """For inference: keep the ternary codes (out, in) int8 and their scale, and forget the latent weight."""
        codes, scale = self.ternary()
        del self.weight
        self.register_buffer('codes', codes)
        self.register_buffer('scale', scale)

    @property
    def frozen(self):
        return 'codes' in self._buffers

    @property
    def two_bit(self):
        """Whether frozen codes are kept as a GPU wants them, at 2 bits (uint8), instead of int8."""
        return self.frozen and self.codes.dtype == torch.uint8

    def ternary(self):
        """codes (out, in) int8 and scale () float32 of W^."""
        if not self.frozen:
            return weight_ternary(self.weight)
        return unpack_2bit(self.codes, self.in_features) if self.two_bit else self.codes, self.scale

    def frozen_product(self, x_codes, x_scale):
        """x^ W^T of frozen codes: (..., in) int8, (..., 1) -> (..., out) float32."""
        two_bit, _ = triton_ternary.available(x_codes.device.type)
        if two_bit != self.two_bit:  # the model has been moved to another kind of device
            self.codes = pack_2bit(self.codes) if two_bit else self.ternary()[0]
        if not two_bit:
            return product(x_codes, x_scale, self.codes, self.scale)
        y = ternary_matmul(x_codes.flatten(0, -2), self.codes, self.in_features, x_scale.flatten(0, -2), self.scale)
        return y.reshape(*x_codes.shape[:-1], self.out_features)

    def extra_repr(self):
        return f'{self.in_features}, {self.out_features}, act_bits={self.act_bits}, linear_norm={self.linear_norm}'


class HBitLinear(BitLinear):
    """y = Q_b(FWHT(Pad(norm(x)))) W^T (A3): the transform comes before the quantizer, which it is there to help.

    As BitLinear, but `weight` is (out, n) with n the next power of two: W lives in the transformed space."""

    def __init__(self, in_features, out_features, act_bits=8, linear_norm='none'):
        super().__init__(next_pow2(in_features), out_features, act_bits, linear_norm)
        self.width = in_features

    def prepare(self, x):
        if x.shape[-1] != self.width:
            raise ValueError(f'this layer takes {self.width} features, got {x.shape[-1]}')
        return fwht(pad_to_pow2(super().prepare(x)))


class HadamardAfter(BitLinear):
    """For comparison only: the authors' order. It quantizes first and transforms then, unnormalised (gain sqrt(n)), and
    transforms the output, too: y = H' (W^ H' Q_b(norm(x))), H' = sqrt(n) H. The outliers meet the quantizer as ever."""

    def __init__(self, in_features, out_features, act_bits=8, linear_norm='none'):
        super().__init__(next_pow2(in_features), next_pow2(out_features), act_bits, linear_norm)
        self.width = out_features

    def forward(self, x):
        x_hat = activation_quant_ste(pad_to_pow2(self.prepare(x)), self.act_bits)
        w = self.weight if self.latent else weight_ternary_ste(self.weight)
        y = F.linear(fwht(x_hat) * self.in_features ** 0.5, w)
        return (fwht(y) * self.out_features ** 0.5)[..., :self.width]

    def freeze(self):
        raise ValueError("linear='hadamard_after' is for comparison in training only: it cannot be packed")


def make_linear(kind, in_features, out_features, act_bits=8, linear_norm='none'):
    """The switch of every ablation: 'fp' (full precision), 'bitlinear', 'hbitlinear' or 'hadamard_after'."""
    if kind == 'fp':
        return nn.Linear(in_features, out_features, bias=False)
    layer = {'bitlinear': BitLinear, 'hbitlinear': HBitLinear, 'hadamard_after': HadamardAfter}[kind]
    return layer(in_features, out_features, act_bits, linear_norm)


def project(x, layers):
    """[layer(x) for layer in layers], for layers of one kind and one input: x is transformed and quantized once."""
    first = layers[0]
    if type(first).forward is not BitLinear.forward:  # it has its own way
        return [layer(x) for layer in layers]
    x, bits = first.prepare(x), first.act_bits
    if first.frozen:
        quantized = activation_quant(x, bits)
        return [layer.frozen_product(*quantized).to(x.dtype) for layer in layers]
    if first.latent:
        return [F.linear(activation_quant_ste(x, bits), layer.weight) for layer in layers]
    if all(int8_fits(x, layer.weight) for layer in layers):
        y = IntegerLinear.apply(x, bits, *(layer.weight for layer in layers))
        return y.split([layer.out_features for layer in layers], dim=-1)
    return [fake_quant_linear(x, layer.weight, bits) for layer in layers]


def bit_linears(model):
    """All BitLinear and HBitLinear layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, BitLinear)]


def quantization_loss(model):
    """A8: mean over quantized matrices of mean((W - W^)^2), a float32 scalar (zero if there are none).

    W^ counts as a constant here: with its straight-through gradient the two would cancel to nothing. (They nearly do
    anyway: the mean over all weights leaves each 2 (W - W^) / size, some 1e-5 of what cross-entropy asks of it.)"""
    errors = []
    for layer in bit_linears(model):
        if not layer.frozen:
            codes, scale = layer.ternary()
            errors.append((layer.weight - codes * scale).square().mean())
    loss = torch.stack(errors).mean() if errors else torch.zeros((), device=next(model.parameters()).device)
    # under FSDP this is the mean over what all processes have of each W (clone: a view would lose the model's hooks)
    return loss.full_tensor().clone() if hasattr(loss, 'full_tensor') else loss


@contextlib.contextmanager
def latent_weights(model):
    """Inside this block the model computes with its latent weights W instead of W^ (Table A3, column "FP")."""
    before = [(layer, layer.latent) for layer in bit_linears(model)]
    if any(layer.frozen for layer, _ in before):
        raise ValueError('a packed model has no latent weights')
    try:
        for layer, _ in before:
            layer.latent = True
        yield model
    finally:
        for layer, latent in before:
            layer.latent = latent


# ----------------------------------------------------------------------------------------------------------------------
# storage
#
# Five ternary digits (trits) to a byte, because 3^5 = 243 <= 256: 1.6 bits a weight; log2(3) = 1.585 is the limit.
# Each row is packed on its own; byte j of a row holds columns 5j ... 5j+4, the first as the lowest digit:
#
#     byte = (c0 + 1) + 3 (c1 + 1) + 9 (c2 + 1) + 27 (c3 + 1) + 81 (c4 + 1)        c in {-1, 0, 1}, byte in 0...242
#
# The last byte of a row is filled up with zeros (digit 1).

TRITS = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)


def pack_ternary(codes):
    """codes (out, k) int8 in {-1, 0, 1} -> packed (out, ceil(k / 5)) uint8. ValueError on anything else."""
    if codes.dtype != torch.int8:
        raise ValueError(f'pack_ternary takes int8 codes, got {codes.dtype}')
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError('pack_ternary takes codes -1, 0 and 1 only')
    digits = F.pad(codes, (0, -codes.shape[-1] % 5)).unflatten(-1, (-1, 5)) + 1  # (out, ceil(k/5), 5)
    return (digits * TRITS.to(codes.device)).sum(-1).to(torch.uint8)


def unpack_ternary(packed, k):
    """packed (out, ceil(k / 5)) uint8 -> codes (out, k) int8. ValueError if k does not fit or a byte exceeds 242."""
    if packed.shape[-1] != -(-k // 5):
        raise ValueError(f'{k} columns take {-(-k // 5)} bytes a row, got {packed.shape[-1]}')
    if packed.numel() and packed.max() > 242:
        raise ValueError('not packed ternary weights: a byte is over 242')
    digits = packed.unsqueeze(-1) // TRITS.to(packed.device) % 3  # (out, ceil(k/5), 5)
    return digits.flatten(-2)[..., :k].to(torch.int8) - 1
