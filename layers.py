"""The small parts of every layer: norms, rotary positions, matrices, gates.

What is computed wide (fp32, or fp64 in an fp64 model) and what in the activations' dtype is decided
here: norms and rotations wide and cast back, products in the dtype of the activations.

Dimension key: B batch, L tokens, H heads, K head width, R rotary width, D width.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn


def widen(x):
    """x in fp32, or as it is if fp64: for norms, routers, states and logits of any model."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def fused(function):
    """Decorator: on a GPU a function of tensors is one kernel, which torch.compile makes when it is
    first called, for all shapes; on a CPU it is what it says.
    """
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def call(x, *more):
        own = not x.is_cuda or torch.compiler.is_compiling()
        return (function if own else compiled())(x, *more)

    return call


@fused
def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back, then times weight (released order)."""
    return F.rms_norm(widen(x), x.shape[-1:], eps=eps).to(x.dtype) * weight.to(x.dtype)


@fused
def gated(x, weight, eps, gate):
    """sigmoid(gate) * rms_norm(x)."""
    return torch.sigmoid(gate) * rms_norm(x, weight, eps)


@fused
def swiglu(gate, x):
    """silu(gate) * x."""
    return F.silu(gate) * x


@fused
def residual(x, out, alpha, beta):
    """alpha x + beta out."""
    return torch.add(alpha * x, out, alpha=beta)


class RMSNorm(nn.Module):
    """rms_norm with its weight (D,)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rope_tables(positions, config, dtype):
    """cos and sin (B, L, 1, R/2) of position * theta^(-2i/R), i < R/2, made in fp64 (released)."""
    R = config.rotary_dim
    i = torch.arange(0, R, 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None, None] * config.rope_theta ** (-i / R)
    return angle.cos().to(dtype), angle.sin().to(dtype)


@fused
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
