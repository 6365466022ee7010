"""The small parts of a model: norms, rotary positions, matrices, gates, the head's product.

What is computed wide (fp32, or fp64 in an fp64 model) and what in the activations' dtype is decided
here: norms and rotations wide and cast back, products in the dtype of the activations.

Norms, gates, residuals and rotations are short formulas of PyTorch on a CPU and in fp64. On a GPU
each is one kernel (the end of this file), the same in training and in generation, which therefore
round alike; norms and gates have a second one for gradients.

Dimension key: B batch, L tokens, H heads, K head width, R rotary width, D width; P programs.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from lightning_attn import jit, tl, triton


def widen(x):
    """x in fp32, or as it is if fp64: for norms, routers, states and logits of any model."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, weight, eps, gate=None):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back, then times weight (released order); and, if
    there is a gate of x's shape, times sigmoid(gate).
    """
    if _fast(x):
        return _run(_launch_norm, _Norm, x, weight, gate, eps)
    y = F.rms_norm(x, x.shape[-1:], eps=eps) * weight.to(x.dtype)  # PyTorch widens by itself
    return y if gate is None else torch.sigmoid(gate) * y


def swiglu(gate, x):
    """silu(gate) * x."""
    if _fast(x):
        return _run(_launch_pairs, _Swiglu, gate, x)
    return F.silu(gate) * x


def residual(x, out, alpha, beta):
    """alpha x + beta out."""
    if _fast(x):
        return _run(_launch_pairs, _Residual, x, out, alpha, beta)
    return torch.add(alpha * x, out, alpha=beta)


class RMSNorm(nn.Module):
    """rms_norm with its weight (D,)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


@functools.cache
def iota(n, device):
    """0 .. n - 1, made once."""
    return torch.arange(n, device=device)


def rope_tables(positions, config, dtype):
    """cos and sin (B, L, 1, R/2) of position * theta^(-2i/R), i < R/2 (released), made in fp64."""
    R = config.rotary_dim
    i = torch.arange(0, R, 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None, None] * config.rope_theta ** (-i / R)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(x, cos, sin):
    """x (B, L, H, K): dims i and i + R/2 of every head rotate, i < R/2, in fp32; the rest pass."""
    if _fast(x) and cos.shape[-1]:
        return _run(_launch_rope, _Rope, x, cos, sin)
    half = cos.shape[-1]
    a, b, rest = widen(x).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


class Linear(nn.Module):
    """A matrix (n_out, n_in), no bias as everywhere in M1; MiniMaxM1.init_weights fills it.

    As in all of the model the product has the dtype of the activations, MiniMaxM1.dtype.
    """

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


# ---- the head, fp32 at a GPU's speed of bf16


def _bf16_parts(x, n):
    """n bf16 tensors whose sum is x to 8 n bits."""
    parts = []
    for _ in range(n):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts


def times_bf16(hidden, weight):
    """hidden (N, D) fp32 times bf16 weight (W, D), which as fp32 would be twice the bytes.

    hidden is three bf16 parts to fp32's last bit, and products are summed in fp32.
    """
    parts, shape = torch.cat(_bf16_parts(hidden, 3)), (3, len(hidden), len(weight))
    return torch.mm(parts, weight.T, out_dtype=torch.float32).view(shape).sum(0)


class HeadProduct(torch.autograd.Function):
    """hidden (N, D) times weight (W, D), both fp32, by products of bf16, 14 times as fast on a GPU.

    Each is split into two bf16 parts, 16 bits; of the four products the three larger are summed in
    fp32: right to 1e-5. Gradients are rounded to bf16 once, as those of all layers.
    """

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        (a, b), (c, d) = (_bf16_parts(x, 2) for x in (hidden, weight))
        parts = torch.cat([a, a, b], 1), torch.cat([c, d, c], 1).T
        return torch.mm(*parts, out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, grad = (x.bfloat16() for x in (*ctx.saved_tensors, grad))
        product = functools.partial(torch.mm, out_dtype=torch.float32)
        return product(grad, weight), product(grad.T, hidden)


# ---- norms, gates, residuals and rotations in one launch each, where PyTorch takes several


def _fast(x):
    return x.is_cuda and x.dtype != torch.float64 and triton is not None


def _run(launch, function, *inputs):
    """launch(*inputs), or the same through `function` where gradients may be asked of it."""
    learns = torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in inputs)
    return function.apply(*inputs) if learns else launch(*inputs)


def _launch(kernel, n_programs, *inputs, **how):
    if n_programs:
        with torch.cuda.device_of(inputs[0]):
            kernel[(n_programs,)](*inputs, **how)


def _packed(*tensors):
    return [x if x is None else x.contiguous() for x in tensors]


def _launch_norm(x, weight, gate, eps):
    """A program for each row (..., D)."""
    x, weight, gate = _packed(x, weight, gate)
    out, D = torch.empty_like(x), x.shape[-1]
    how = {"BD": triton.next_power_of_2(D), "num_warps": 4 if D <= 2048 else 8}
    _launch(_norm_kernel, x.numel() // D, x, weight, gate, out, D, eps, **how)
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gate, eps):
        ctx.save_for_backward(x, weight, gate)
        ctx.eps = eps
        return _launch_norm(x, weight, gate, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        """P programs walk over the rows; each sums its share of the weight's gradient."""
        dy, x, weight, gate = _packed(dy, *ctx.saved_tensors)
        dx, dgate = torch.empty_like(x), None if gate is None else torch.empty_like(gate)
        D, rows, BD = x.shape[-1], x.numel() // x.shape[-1], triton.next_power_of_2(x.shape[-1])
        parts = torch.empty((min(rows, _MOST_PROGRAMS), D), dtype=torch.float32, device=x.device)
        sizes, warps = (rows, D, ctx.eps, BD), min(max(BD // 512, 4), 16)
        tensors = dy, x, weight, gate, dx, parts, dgate
        _launch(_norm_backward_kernel, len(parts), *tensors, *sizes, num_warps=warps)
        return dx, parts.sum(0).to(weight.dtype), dgate, None


_MOST_PROGRAMS = 528  # four for each processor of an H100 or H200


def _launch_pairs(a, b, alpha=None, beta=None):
    """A program for each 1,024 pairs of numbers; alpha None = swiglu."""
    a, b = _packed(a, b)
    out, n = torch.empty_like(a), a.numel()
    _launch(_pairs_kernel, triton.cdiv(n, 1024), a, b, out, n, alpha, beta, 1024)
    return out


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, x):
        ctx.save_for_backward(gate, x)
        return _launch_pairs(gate, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dy, gate, x = _packed(dy, *ctx.saved_tensors)
        dgate, dx, n = torch.empty_like(gate), torch.empty_like(x), x.numel()
        tensors = dy, gate, x, dgate, dx
        _launch(_swiglu_backward_kernel, triton.cdiv(n, 1024), *tensors, n, 1024)
        return dgate, dx


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, out, alpha, beta):
        ctx.scales = alpha, beta
        return _launch_pairs(x, out, alpha, beta)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return *(dy if scale == 1 else scale * dy for scale in ctx.scales), None, None


def _launch_rope(x, cos, sin):
    """A program for each token."""
    x, cos, sin = _packed(x, cos, sin)
    out, (H, K), half = torch.empty_like(x), x.shape[2:], cos.shape[-1]
    blocks = (triton.next_power_of_2(n) for n in (H, half, max(K - 2 * half, 1)))
    _launch(_rope_kernel, x.shape[0] * x.shape[1], x, cos, sin, out, H, K, half, *blocks)
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _launch_rope(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors  # a rotation backwards
        return _launch_rope(dy, cos, -sin), None, None


@jit
def _norm_kernel(x, weight, gate, out, D, eps, BD: tl.constexpr):
    """One row of rms_norm."""
    d = tl.arange(0, BD)
    at, inside = tl.program_id(0).to(tl.int64) * D + d, d < D
    v = _load(x + at, inside)
    y = (v * tl.rsqrt(tl.sum(v * v, 0) / D + eps)).to(out.dtype.element_ty).to(tl.float32)
    y *= _load(weight + d, inside)
    if gate is not None:
        y *= tl.sigmoid(_load(gate + at, inside))
    tl.store(out + at, y, mask=inside)


@functools.partial(jit, do_not_specialize=["rows"])
def _norm_backward_kernel(dy, x, weight, gate, dx, parts, dgate, rows, D, eps, BD: tl.constexpr):
    """Every P-th row: v = x * scale, out = y * w * s; y is v rounded, which counts as slope 1."""
    d = tl.arange(0, BD)
    w, part, inside = _load(weight + d, d < D), tl.zeros([BD], dtype=tl.float32), d < D
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        at = row * D + d
        v, g = _load(x + at, inside), _load(dy + at, inside)
        scale = tl.rsqrt(tl.sum(v * v, 0) / D + eps)
        v *= scale
        y = v.to(dx.dtype.element_ty).to(tl.float32)
        if gate is not None:
            s = tl.sigmoid(_load(gate + at, inside))
            tl.store(dgate + at, g * y * w * s * (1 - s), mask=inside)
            g *= s
        part += g * y
        g *= w
        tl.store(dx + at, scale * (g - v * (tl.sum(g * v, 0) / D)), mask=inside)
    tl.store(parts + tl.program_id(0).to(tl.int64) * D + d, part, mask=inside)


@jit
def _pairs_kernel(a, b, out, n, alpha, beta, BLOCK: tl.constexpr):
    """swiglu or residual."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x, y = _load(a + i, i < n), _load(b + i, i < n)
    z = x * tl.sigmoid(x) * y if alpha is None else alpha * x + beta * y
    tl.store(out + i, z, mask=i < n)


@jit
def _rope_kernel(
    x, cos, sin, out, H, K, half, BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr
):
    """The heads of one token: dims i and i + half rotate, those from 2 half on pass."""
    t, i, rest = tl.program_id(0).to(tl.int64), tl.arange(0, BR), 2 * half + tl.arange(0, BP)
    heads = tl.arange(0, BH)
    head, some = t * H * K + heads[:, None] * K, (heads < H)[:, None]
    at, inside = head + i[None, :], some & (i < half)[None, :]
    a, b = _load(x + at, inside), _load(x + at + half, inside)
    c = _load(cos + t * half + i, i < half)[None, :]
    s = _load(sin + t * half + i, i < half)[None, :]
    tl.store(out + at, a * c - b * s, mask=inside)
    tl.store(out + at + half, b * c + a * s, mask=inside)
    at, inside = head + rest[None, :], some & (rest < K)[None, :]
    tl.store(out + at, _load(x + at, inside), mask=inside)


@jit
def _swiglu_backward_kernel(dy, gate, x, dgate, dx, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, a = _load(dy + i, i < n), _load(gate + i, i < n)
    s = tl.sigmoid(a)
    tl.store(dgate + i, g * _load(x + i, i < n) * s * (1 + a * (1 - s)), mask=i < n)
    tl.store(dx + i, g * a * s, mask=i < n)


@jit
def _load(pointers, inside):
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
