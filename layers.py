"""The small parts of every layer: norms, rotary positions, matrices, gates.

What is computed wide (fp32, or fp64 in an fp64 model) and what in the activations' dtype is decided
here: norms and rotations wide and cast back, products in the dtype of the activations.

Dimension key: B batch, L tokens, H heads, K head width, R rotary width, D width.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import nn

from lightning_attn import jit, tl, triton


def widen(x):
    """x in fp32, or as it is if fp64: for norms, routers, states and logits of any model."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, weight, eps, gate=None):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back, then times weight (released order); and, if
    there is a gate of x's shape, times sigmoid(gate).
    """
    if _fast(x):
        return _launch_rows(x, weight, gate, eps)
    y = F.rms_norm(widen(x), x.shape[-1:], eps=eps).to(x.dtype) * weight.to(x.dtype)
    return y if gate is None else torch.sigmoid(gate) * y


def swiglu(gate, x):
    """silu(gate) * x."""
    if _fast(x):
        return _launch_pairs(gate, x, 0.0, 0.0, True)
    return F.silu(gate) * x


def residual(x, out, alpha, beta):
    """alpha x + beta out."""
    if _fast(x):
        return _launch_pairs(x, out, alpha, beta, False)
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
    """cos and sin (B, L, 1, R/2) of position * theta^(-2i/R), i < R/2, made in fp64 (released)."""
    R = config.rotary_dim
    i = torch.arange(0, R, 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None, None] * config.rope_theta ** (-i / R)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(x, cos, sin):
    """x (B, L, H, K): dims i and i + R/2 of every head rotate, i < R/2, in fp32; the rest pass."""
    half = cos.shape[-1]
    a, b, rest = widen(x).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


class Linear(nn.Module):
    """A matrix (n_out, n_in), no bias as everywhere in M1; MiniMaxM1.init_weights fills it.

    As in all of the model the product has the dtype of the activations, which the embedding sets.
    """

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


# ---- the same in one launch each, where launches are what takes time: a step of generation

_steps = []


@contextlib.contextmanager
def generation(on):
    """Inside, parts of a model on a GPU are kernels without gradients. (Training never takes them:
    its two passes must round alike.)
    """
    if on:
        _steps.append(True)
    try:
        yield
    finally:
        if on:
            _steps.pop()


def _fast(x):
    return bool(_steps) and x.is_cuda and triton is not None


def _launch_rows(x, weight, gate, eps):
    """A program for each row (..., D)."""
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    D, gate = x.shape[-1], x if gate is None else gate.contiguous()
    size = {"BD": triton.next_power_of_2(D), "num_warps": 4 if D <= 2048 else 8}
    with torch.cuda.device_of(x):
        _norm_kernel[(x.numel() // D,)](x, weight, gate, out, D, eps, GATED=gate is not x, **size)
    return out


def _launch_pairs(a, b, alpha, beta, swiglu):
    """A program for each 1,024 pairs of numbers."""
    a, b, n = a.contiguous(), b.contiguous(), a.numel()
    out = torch.empty(a.shape, dtype=a.dtype, device=a.device)
    with torch.cuda.device_of(a):
        _pairs_kernel[(triton.cdiv(n, 1024),)](a, b, out, n, alpha, beta, swiglu, 1024)
    return out


@jit
def _norm_kernel(x, weight, gate, out, D, eps, GATED: tl.constexpr, BD: tl.constexpr):
    """One row of rms_norm."""
    row, d = tl.program_id(0).to(tl.int64) * D, tl.arange(0, BD)
    v = tl.load(x + row + d, mask=d < D, other=0.0).to(tl.float32)
    y = (v * tl.rsqrt(tl.sum(v * v, 0) / D + eps)).to(out.dtype.element_ty).to(tl.float32)
    y *= tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    if GATED:
        y *= tl.sigmoid(tl.load(gate + row + d, mask=d < D, other=0.0).to(tl.float32))
    tl.store(out + row + d, y.to(out.dtype.element_ty), mask=d < D)


@jit
def _pairs_kernel(a, b, out, n, alpha, beta, SWIGLU: tl.constexpr, BLOCK: tl.constexpr):
    """swiglu or residual."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(a + i, mask=i < n, other=0.0).to(tl.float32)
    y = tl.load(b + i, mask=i < n, other=0.0).to(tl.float32)
    z = x * tl.sigmoid(x) * y if SWIGLU else alpha * x + beta * y
    tl.store(out + i, z.to(out.dtype.element_ty), mask=i < n)
