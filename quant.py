"""
Ternary weights, integer activations, and the two linear layers made of them.

    A1, B7   alpha = mean|W|                W^ = alpha * clip(round(W / alpha), -1, 1)
    A2       s = max|x|, q = 2^(b-1) - 1    x^ = clip(round(x q / s), -q-1, q) * s / q
    A3       y = W^ Q_b(FWHT(Pad(norm(x))))          BitLinear leaves FWHT and Pad out
    A8       L_quant = mean over matrices of mean((W - W^)^2)

A quantizer returns integer codes and a scale; codes * scale is W^ or x^. A matrix has one alpha, a
token one s. Rounding has no useful gradient. The straight-through estimator takes the quantizer for
the identity on the way back: dL/dW := dL/dW^ and dL/dx := dL/dx^. The optimizer moves the *latent*
weight W, in full precision. The model computes with W^ only.

`ternary_linear` is the product of A3 by its definition. Its fast twin, `IntegerLinear`, multiplies
int8 codes, sums in int32, and scales once: the same numbers and gradients, up to rounding.

What differs from Paper A: A3's squared ReLU is in the FFN only (model.py), its LayerNorm is the one
before each projection anyway, and `linear_norm` adds one inside.
"""
import contextlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from configurator import find_class
from hadamard import fwht, next_pow2, pad_to_pow2

EPS = 1e-20  # the least mean|W| and max|x| that we divide by: only zeros are below it

def weight_ternary(w):
    """A1: w (out, in) floating -> codes (out, in) int8 in {-1, 0, 1}, scale () = mean|w|."""
    w = w.detach().float()
    scale = w.abs().mean().clamp(min=EPS)  # alpha
    return (w / scale).round_().clamp_(-1, 1).to(torch.int8), scale

def activation_quant(x, bits=8):
    """A2: x (..., k) floating -> codes (..., k) int8 of `bits` bits, scale (..., 1) = max|x| / q.

    With s = max|x| there is nothing to clip: the codes are -q ... q."""
    q = 2 ** (bits - 1) - 1
    x = x.detach().float()
    scale = torch.maximum(x.amax(-1, True), -x.amin(-1, True)).clamp_(min=EPS) / q  # max|x| / q
    return (x / scale).round_().to(torch.int8), scale

def dequantize(codes, scale):
    """codes * scale: W^ (out, in) float32. The scale is one a matrix (), one a row (out, 1), or one
    for each group of neighbours in a row (out, groups)."""
    if scale.dim() < 2 or scale.shape[-1] == 1:
        return codes * scale
    groups = codes.unflatten(-1, (scale.shape[-1], -1))  # (out, groups, in / groups)
    return (groups * scale[..., None]).flatten(-2)

def straight_through(x, x_hat):
    """Forward x_hat, exactly; backward the identity to x: x - x.detach() is 0 with gradient 1."""
    return x_hat.to(x.dtype) + (x - x.detach())

def activation_quant_ste(x, bits=8):
    """x^ of A2 with the straight-through gradient: same shape and dtype as x."""
    return straight_through(x, dequantize(*activation_quant(x, bits)))

class BitLinear(nn.Module):
    """y = W^ Q_b(norm(x)) (A1, A2): (..., in_features) -> (..., out_features), no bias.

    weight: the latent W, (out, in) float32. act_bits: 2 to 8. linear_norm: 'none', 'layernorm' or
    'rmsnorm', without parameters."""

    latent = False  # True computes with W instead of W^ (see latent_weights)

    def __init__(self, in_features, out_features, act_bits=8, linear_norm='none'):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.act_bits, self.linear_norm = act_bits, linear_norm
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * 0.02)

    def ternary(self):
        """codes (out, in) int8 and scale of W^, as `dequantize` takes them. Statistics, packing and
        export ask here, too."""
        return weight_ternary(self.weight)  # A1

    def prepare(self, x):
        """What happens to x before it is quantized."""
        if self.linear_norm == 'layernorm':
            return F.layer_norm(x, x.shape[-1:])
        return F.rms_norm(x, x.shape[-1:]) if self.linear_norm == 'rmsnorm' else x

    def forward(self, x):
        x = self.prepare(x)  # A3: the norm; in HBitLinear Pad and FWHT as well
        if self.latent:
            return F.linear(activation_quant_ste(x, self.act_bits), self.weight)
        return ternary_linear(x, self.weight, *self.ternary(), self.act_bits)

class HBitLinear(BitLinear):
    """y = W^ Q_b(FWHT(Pad(norm(x)))) (A3). The transform comes before the quantizer.

    As BitLinear, but W is (out, n), n the next power of two: it lives in the transformed space."""

    def __init__(self, in_features, out_features, act_bits=8, linear_norm='none'):
        super().__init__(next_pow2(in_features), out_features, act_bits, linear_norm)
        self.width = in_features

    def prepare(self, x):
        if x.shape[-1] != self.width:
            raise ValueError(f'this layer takes {self.width} features, got {x.shape[-1]}')
        return fwht(pad_to_pow2(super().prepare(x)))

class FullPrecision(nn.Linear):
    """y = W x, for comparison."""

    def __init__(self, in_features, out_features, act_bits=8, linear_norm='none'):
        super().__init__(in_features, out_features, bias=False)

def linear_class(kind):
    """The class of a projection, the switch of every ablation: 'fp', 'bitlinear', 'hbitlinear', or
    your own subclass of BitLinear as 'module:Class'. ValueError if there is none."""
    classes = {'fp': FullPrecision, 'bitlinear': BitLinear, 'hbitlinear': HBitLinear}
    if kind not in classes and ':' not in kind:
        raise ValueError(f'linear is {", ".join(classes)} or module:Class, got {kind!r}')
    return classes.get(kind) or find_class(kind, BitLinear)

def ternary_linear(x, weight, codes, scale, bits):
    """W^ Q_b(x), the product of A3: x (..., in) -> (..., out). codes and scale say what W^ is; the
    gradient goes to `weight`, the latent W."""
    if integers_serve(x, codes, scale):
        return IntegerLinear.apply(x, weight, codes, scale, bits)  # the same, fast
    w_hat = straight_through(weight, dequantize(codes, scale))  # A1
    return F.linear(activation_quant_ste(x, bits), w_hat)  # A2

def project(x, *layers):
    """[layer(x) for layer in layers], layers of one kind, as one product: q, k and v share their
    input, which is prepared and quantized once."""
    first, usual = layers[0], (BitLinear.prepare, HBitLinear.prepare)
    if any(type(layer).forward is not BitLinear.forward or
           type(layer).prepare not in usual or layer.latent for layer in layers):
        return [layer(x) for layer in layers]
    codes, scales = zip(*(layer.ternary() for layer in layers))
    rows = [torch.atleast_2d(scale).expand(len(c), -1) for c, scale in zip(codes, scales)]
    weight = torch.cat([layer.weight for layer in layers])
    y = ternary_linear(first.prepare(x), weight, torch.cat(codes), torch.cat(rows), first.act_bits)
    return y.split([layer.out_features for layer in layers], dim=-1)

def bit_linears(model):
    """All BitLinear layers of a model, in order."""
    return [module for module in model.modules() if isinstance(module, BitLinear)]

def quantization_loss(model):
    """A8: mean over ternary matrices of mean((W - W^)^2), a float32 scalar (0 if there are none).

    W^ counts as a constant. With its straight-through gradient the loss would have none at all."""
    errors = [(layer.weight - dequantize(*layer.ternary())).square().mean()
              for layer in bit_linears(model)]
    return torch.stack(errors).mean() if errors else torch.zeros((), device=model.device)

@contextlib.contextmanager
def latent_weights(model):
    """Inside this block the model computes with its latent weights W instead of W^."""
    layers = bit_linears(model)
    try:
        for layer in layers:
            layer.latent = True
        yield model
    finally:
        for layer in layers:
            del layer.latent  # back to the class's

# Storage: five ternary digits to a byte, because 3^5 = 243 <= 256. That is 1.6 bits a weight; the
# limit is log2(3) = 1.585. Byte j of a row holds columns 5j to 5j+4, the first is the lowest digit:
#     byte = (c0 + 1) + 3 (c1 + 1) + 9 (c2 + 1) + 27 (c3 + 1) + 81 (c4 + 1)      c in {-1, 0, 1}
# The last byte of a row is filled up with zeros (digit 1).
TRITS = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8)

def pack_ternary(codes):
    """codes (out, k) int8 -> packed (out, ceil(k / 5)) uint8. ValueError on other codes."""
    if codes.dtype != torch.int8:
        raise ValueError(f'pack_ternary takes int8 codes, got {codes.dtype}')
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError('pack_ternary takes codes -1, 0 and 1 only')
    digits = F.pad(codes, (0, -codes.shape[-1] % 5)).unflatten(-1, (-1, 5)) + 1  # (out, bytes, 5)
    return (digits * TRITS.to(codes.device)).sum(-1).to(torch.uint8)

def unpack_ternary(packed, k):
    """packed (out, ceil(k / 5)) uint8 -> codes (out, k) int8. ValueError if they do not fit."""
    if packed.shape[-1] != -(-k // 5):
        raise ValueError(f'{k} columns take {-(-k // 5)} bytes a row, got {packed.shape[-1]}')
    if packed.numel() and packed.max() > 242:
        raise ValueError('not packed ternary weights: a byte is over 242')
    digits = packed.unsqueeze(-1) // TRITS.to(packed.device) % 3  # (out, bytes, 5)
    return digits.flatten(-2)[..., :k].to(torch.int8) - 1

# ---- the product of A3, fast ----

class IntegerLinear(torch.autograd.Function):
    """F.linear(x^, W^) as one int8 product with int32 sums, scaled at the end.

    Arguments as ternary_linear; one scale a matrix () or a row (out, 1). Only int8
    codes are kept for backward: a quarter of the memory."""

    @staticmethod
    def forward(ctx, x, weight, codes, scale, bits):
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        x_codes, x_scale = activation_quant(x.reshape(-1, x.shape[-1]), bits)  # (N, in), (N, 1)
        ctx.save_for_backward(x_codes, x_scale, codes, scale)
        y = torch._int_mm(x_codes, codes.t()).float().mul_(x_scale * scale.reshape(1, -1))
        return y.to(ctx.dtype).reshape(*x.shape[:-1], len(codes))

    @staticmethod
    def backward(ctx, grad_y):
        x_codes, x_scale, codes, scale = ctx.saved_tensors
        g = grad_y.reshape(-1, grad_y.shape[-1]).to(ctx.dtype)  # (N, out)
        grad_x = float_product(g, codes.to(ctx.dtype).mul_(scale))  # dL/dx = dL/dy W^
        grad_w = float_product(g.t(), x_codes.to(ctx.dtype).mul_(x_scale))  # dL/dW = dL/dy^T x^
        grad_x = grad_x.reshape(*grad_y.shape[:-1], x_codes.shape[-1])
        return grad_x, grad_w, None, None, None  # autograd gives them the inputs' dtypes

def integers_serve(x, codes, scale):
    """Whether IntegerLinear serves here: one scale a matrix or a row, and shapes and a machine that
    torch._int_mm is good for (on CUDA: more than 16 rows, and multiples of 8)."""
    rows, columns = codes.shape
    if scale.numel() not in (1, rows) or columns == 1 or not int8_support(x.device.type)[0]:
        return False
    fits = x.numel() // columns > 16 and rows % 8 == columns % 8 == 0
    return fits or x.device.type == 'cpu'

def int8_support(device_type):
    """(True, how) if such a device multiplies int8 fast and exactly, else (False, why not)."""
    if device_type == 'cpu':  # without VNNI torch._int_mm is a scalar loop; floats are faster
        return (True, 'int8 products (VNNI)') if VNNI else (False, 'this CPU has no VNNI')
    if device_type == 'cuda' and torch.cuda.get_device_capability() >= (7, 5):
        return True, 'int8 products (tensor cores)'
    return False, f'no int8 products on this {device_type}'

CPU = Path('/proc/cpuinfo')
VNNI = torch.cpu._is_vnni_supported()
AMD = CPU.exists() and 'AuthenticAMD' in CPU.read_text()

def float_product(a, b):
    """a b: (m, k), (k, n) -> (m, n). In float32 on AMD's processors by oneDNN: MKL, which @ asks,
    has less than half of its speed there. (torch.compile knows no way to oneDNN.)"""
    if a.stride(0) == 1 and len(a) > b.shape[1]:  # = (b' a')': transpose the smaller
        return float_product(b.t(), a.t()).t()
    known = AMD and a.is_cpu and a.dtype == torch.float32 and a.numel() and b.numel()
    if known and not torch.compiler.is_compiling():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, 'none', [], '')
    return a @ b
