"""MiniMax-M1, the whole model: hybrid attention, mixture of experts, cache, published checkpoints.

Seven of eight layers use lightning attention (a state of fixed size), every eighth uses softmax attention (keys and
values of every token); each is followed by a mixture of experts.

    n1 = RMSNorm(x);   y  = alpha_a n1 + beta_a Attention(n1)
    n2 = RMSNorm(y);   x' = alpha_m n2 + beta_m MoE(n2)           after the last layer: RMSNorm, lm_head, fp32 logits

Where a choice comes from: *report* = MiniMax-M1 report (arXiv:2506.13585), *01* = MiniMax-01 report
(arXiv:2501.08313), *released* = published configuration and modelling code, *ours* = decided here.

    1. Configuration         M1Config, presets
    2. Small parts           rms_norm, rope
    3. Attention             LightningAttention, SoftmaxAttention
    4. Mixture of experts    MoE, SharedMLP
    5. The model             Block, Cache, MiniMaxM1
    6. Checkpoints           load_pretrained, save_pretrained, count_parameters
    7. Command lines         flag, check_flags, parse_flags, command_line: shared by the scripts
    8. See it run            main: `python model.py --preset m1` (sizes, memory), `--trace` (one token's way through)

Dimension key: B batch, L new tokens, D model width, H query heads, J key/value heads, K head width, S cache slots,
E experts, F expert width, W vocabulary. Parameters keep the names of the published checkpoint.
"""

import argparse
import dataclasses
import functools
import json
import math
import operator
import os
import shutil
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_attn import check_boundaries, decay_slopes, lightning_attention, lightning_step

# ============================================================================
# 1. Configuration
# ============================================================================

PRESETS = {
    # train_rl's default on a CPU: 0.6 M parameters, learns the default tasks in minutes
    "tiny": dict(hidden_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 intermediate_size=64, num_local_experts=4),
    # a patient CPU or any GPU: 15 M parameters
    "small": dict(hidden_size=256, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, head_dim=32,
                  intermediate_size=256, num_local_experts=8),
    # one GPU: 650 M parameters
    "base": dict(hidden_size=768, num_hidden_layers=16, num_attention_heads=12, num_key_value_heads=2, head_dim=64,
                 intermediate_size=2048, num_local_experts=8),
}  # fmt: skip


@dataclass
class M1Config:
    """The published config.json, key by key; the defaults are the released 456 B model.

    None stands for a rule: attn_type_list = every eighth layer softmax (1), the others lightning (0); rotary_dim =
    half a head; alpha = (2 L)^(1/4) with L layers (released for M1; for other depths ours, after DeepNorm).
    """

    vocab_size: int = 200064
    hidden_size: int = 6144
    num_hidden_layers: int = 80
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9216
    num_local_experts: int = 32
    num_experts_per_tok: int = 2
    shared_intermediate_size: int = 0  # > 0 adds a shared expert; its width is intermediate_size (released)
    attn_type_list: list = None
    rotary_dim: int = None
    rope_theta: float = 10_000_000
    max_position_embeddings: int = 10_240_000
    rms_norm_eps: float = 1e-5
    postnorm: bool = True  # the residual carries the normed tensor
    layernorm_full_attention_alpha: float = None
    layernorm_full_attention_beta: float = 1.0
    layernorm_linear_attention_alpha: float = None
    layernorm_linear_attention_beta: float = 1.0
    layernorm_mlp_alpha: float = None
    layernorm_mlp_beta: float = 1.0
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    sliding_window: int = None
    bos_token_id: int = None
    eos_token_id: int = None
    pad_token_id: int = None  # this and the next key are ours
    tokenizer: str = "m1"  # "m1" or "byte"

    def __post_init__(self):
        self._check_types()
        L = self.num_hidden_layers
        if self.attn_type_list is None:
            self.attn_type_list = [int((l + 1) % 8 == 0) for l in range(L)]
        if self.rotary_dim is None:
            self.rotary_dim = self.head_dim // 2
        for part in ("full_attention", "linear_attention", "mlp"):
            if getattr(self, f"layernorm_{part}_alpha") is None:
                setattr(self, f"layernorm_{part}_alpha", (2 * L) ** 0.25)
        self._check_values()

    def _check_types(self):
        for f in dataclasses.fields(self):
            value, kind = getattr(self, f.name), (int, float) if f.type is float else f.type
            right = isinstance(value, kind) and isinstance(value, bool) == (f.type is bool)
            _need(
                right or (value is None and f.default is None),
                f"{f.name} must be of type {f.type.__name__}, found {value!r}",
            )

    def _check_values(self):
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                    "head_dim", "intermediate_size", "num_local_experts", "num_experts_per_tok"):  # fmt: skip
            _need(0 < getattr(self, key) <= 2**24, f"{key} must be 1 to 2^24, found {getattr(self, key)}")
        for key in ("rms_norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, key)
            _need(math.isfinite(value) and value > 0, f"{key} must be a positive number, found {value}")
        L, types = self.num_hidden_layers, self.attn_type_list
        _need(
            len(types) == L and all(kind in (0, 1) for kind in types),
            f"attn_type_list must hold {L} entries, 0 = lightning or 1 = softmax, found {types}",
        )
        H, J = self.num_attention_heads, self.num_key_value_heads
        _need(H % J == 0, f"num_attention_heads {H} must be a multiple of num_key_value_heads {J}")
        _need(
            self.rotary_dim % 2 == 0 and 0 <= self.rotary_dim <= self.head_dim,
            f"rotary_dim must be even and at most head_dim {self.head_dim}, found {self.rotary_dim}",
        )
        k, E = self.num_experts_per_tok, self.num_local_experts
        _need(k <= E, f"num_experts_per_tok {k} exceeds num_local_experts {E}")
        for key, only in (("hidden_act", "silu"), ("tie_word_embeddings", False), ("sliding_window", None)):
            _need(getattr(self, key) == only, f"{key} must be {only!r} as in MiniMax-M1, found {getattr(self, key)!r}")

    @classmethod
    def preset(cls, name, **changes):
        """A named size: "tiny", "small", "base" (byte tokenizer, ids below 272) or "m1" (the released 456 B model)."""
        if name == "m1":
            return cls(**changes)
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}, m1")
        shape = PRESETS[name]
        ours = dict(vocab_size=272, rope_theta=10_000, max_position_embeddings=32_768, tokenizer="byte",
                    initializer_range=shape["hidden_size"] ** -0.5)  # fmt: skip
        return cls(**{**ours, **shape, **changes})

    @classmethod
    def from_json(cls, path):
        """Read a config.json (or the one in a directory). Keys that do not shape the computation are ignored."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        stored = read_json(path)
        kind = stored.get("model_type") if isinstance(stored, dict) else None
        if kind != "minimax_m1":
            raise ValueError(f"{path} describes model_type {kind!r}; this code runs 'minimax_m1' only")
        if stored.get("rope_scaling"):
            raise ValueError(f"{path} asks for rope_scaling, which MiniMax-M1 does not have and this code does not do")
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            return cls(**{key: value for key, value in stored.items() if key in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self, path):
        """Write the published schema (plus our two keys) to a file."""
        kind = {"architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1"}
        Path(path).write_text(json.dumps({**kind, **dataclasses.asdict(self)}, indent=2) + "\n")


def _need(ok, what):
    if not ok:
        raise ValueError(f"config: {what}")


# ============================================================================
# 2. Small parts
# ============================================================================


def widen(x):
    """x in fp32, or as it is if already fp64: for norms, routers, states and logits, whatever the model's dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) in fp32, cast back to x's dtype, then times weight (released order)."""
    return F.rms_norm(widen(x), x.shape[-1:], eps=eps).to(x.dtype) * weight


class RMSNorm(nn.Module):
    """rms_norm with its weight (D,)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rope_tables(positions, config, dtype):
    """cos and sin of position * theta^(-2i/R), i < R/2: positions (B, L) -> two (B, L, 1, R/2), made in fp64.

    dtype: fp32, or fp64 for an fp64 model. (released)
    """
    R = config.rotary_dim
    i = torch.arange(0, R, 2, dtype=torch.float64, device=positions.device)
    angle = positions[..., None, None] * config.rope_theta ** (-i / R)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rope(x, cos, sin):
    """Rotate the first R dims of every head, dim i with dim i + R/2, in fp32; the others pass. x (B, L, H, K)."""
    half = cos.shape[-1]
    a, b, rest = widen(x).split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).to(x.dtype)


class Linear(nn.Module):
    """A matrix (n_out, n_in) without bias, as everywhere in M1; MiniMaxM1.init_weights fills it."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def forward(self, x):
        return F.linear(x, self.weight)


@dataclass
class Layout:
    """Where the tokens of one forward pass stand; computed once, used by every layer."""

    mask: torch.Tensor = None  # (B, L) bool, True = real token; None = all real
    cu_seqlens: torch.Tensor = None  # (N + 1,) boundaries when sequences are packed along L
    rope: tuple = None  # cos, sin
    visible: torch.Tensor = None  # (B, 1, L, S) bool: which keys a query sees; None = plain causal
    rows: torch.Tensor = None  # with a cache: row and slot of every real new token, (n,) each
    slots: torch.Tensor = None
    n_slots: int = 0  # S: slots in use after this pass
    continues: bool = False  # padded tokens meet states that are not empty


# ============================================================================
# 3. Attention
# ============================================================================


class LightningAttention(nn.Module):
    """Linear attention with per-head decay, gated: out = (sigmoid(u Wgate^T) * RMSNorm(o)) Wout^T. (released)

    The inner RMSNorm runs over all H*K values jointly and has an eps of its own, 1e-6.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.head_dim
        self.place = (self.heads, layer, config.num_hidden_layers)
        inner = self.heads * self.width
        self.qkv_proj = Linear(config.hidden_size, 3 * inner)  # rows of head h: its q, then its k, then its v
        self.output_gate = Linear(config.hidden_size, inner)
        self.norm = RMSNorm(inner, 1e-6)
        self.out_proj = Linear(inner, config.hidden_size)

    def forward(self, u, at, state=None):
        """u (B, L, D), state (B, H, K, K) of the cache, updated in place. Returns (B, L, D)."""
        B, L, _ = u.shape
        slope = _slopes(*self.place, u.device)
        qkv = self.qkv_proj(u).view(B, L, self.heads, 3, self.width)
        if u.is_cuda:  # the kernel reads views
            q, k, v = F.silu(qkv).unbind(3)
        else:  # one copy here saves one in every product
            q, k, v = (x.transpose(1, 2) for x in F.silu(qkv.permute(3, 0, 2, 1, 4).contiguous()))
        if at.mask is not None:
            v = v * at.mask[..., None, None]  # a padded token writes nothing into the state
        if state is None:
            o, _ = lightning_attention(q, k, v, slope, cu_seqlens=at.cu_seqlens)
        elif L == 1 and at.mask is None:
            o = lightning_step(q[:, 0], k[:, 0], v[:, 0], slope, state)[:, None]
        elif at.continues:  # ... but it would make a state decay, so rows are packed without their padding
            ends = F.pad(at.mask.sum(1).cumsum(0), (1, 0))
            packed = (x[at.mask][None] for x in (q, k, v))
            o = torch.zeros_like(v)
            o[at.mask], last = (x.squeeze(0) for x in lightning_attention(*packed, slope, state, cu_seqlens=ends))
            state.copy_(last)
        else:
            o, last = lightning_attention(q, k, v, slope, state)
            state.copy_(last)
        return self.out_proj(torch.sigmoid(self.output_gate(u)) * self.norm(o.flatten(2)))


_slopes = functools.lru_cache(maxsize=None)(decay_slopes)  # not a buffer: casting a model must not round its slopes


class SoftmaxAttention(nn.Module):
    """Causal attention with grouped key/value heads (query head h reads head h // (H/J)) and rope on part of a head."""

    def __init__(self, config):
        super().__init__()
        self.width = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * config.head_dim)
        self.k_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.v_proj = Linear(config.hidden_size, config.num_key_value_heads * config.head_dim)
        self.o_proj = Linear(config.num_attention_heads * config.head_dim, config.hidden_size)

    def forward(self, u, at, kv=None):
        """u (B, L, D), kv = the cache's keys and values (B, max_len, J, K), written in place. Returns (B, L, D)."""
        q, k, v = (f(u).unflatten(-1, (-1, self.width)) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rope(q, *at.rope), rope(k, *at.rope)
        if kv is not None:
            for cached, new in zip(kv, (k, v)):
                cached[at.rows, at.slots] = new.flatten(0, 1) if at.mask is None else new[at.mask]
            k, v = (cached[:, : at.n_slots] for cached in kv)
        if at.cu_seqlens is not None:
            lengths = at.cu_seqlens.diff().tolist()
            o = torch.cat([self.attend(*x) for x in zip(*(x.split(lengths, dim=1) for x in (q, k, v)))], 1)
        else:
            o = self.attend(q, k, v, at.visible)
        return self.o_proj(o.flatten(2))

    @staticmethod
    def attend(q, k, v, visible=None):
        """softmax(q k^T / sqrt(K)) v over (B, L, heads, K) tensors."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, enable_gqa=True)
        return o.transpose(1, 2)


# ============================================================================
# 4. Mixture of experts
# ============================================================================


class Routing(NamedTuple):
    """What the router did in one layer, padding excluded."""

    loss: torch.Tensor  # E sum_e f_e P_e, differentiable; k when balanced, up to E when collapsed on k experts
    load: torch.Tensor  # (E,) f_e: fraction of tokens whose top k contains expert e, dropped or not; sums to k
    prob: torch.Tensor  # (E,) P_e: mean router probability


class MoE(nn.Module):
    """Top-k mixture of SwiGLU experts: out = sum_e weight_e w2_e(silu(w1_e x) * w3_e x).

    The router works in fp32: softmax over all E, top k, renormalised to sum 1. Three forms, chosen by `form`:
    "loop" over the experts (the definition), "grouped" = tokens sorted by expert, one product per expert, "dense" =
    every expert on every token, masked by the weights (for a decode step of a small model on a CPU, where few large
    operations beat many small ones). "auto" takes dense for up to 512 tokens of such a model, else grouped.
    """

    def __init__(self, config):
        super().__init__()
        D, E, F_ = config.hidden_size, config.num_local_experts, config.intermediate_size
        self.top_k, self.form = config.num_experts_per_tok, "auto"
        self.capacity = None  # a number drops tokens in passes without a cache, see within_capacity
        self.gate = Linear(D, E)
        self.w1 = nn.Parameter(torch.empty(E, F_, D))
        self.w3 = nn.Parameter(torch.empty(E, F_, D))
        self.w2 = nn.Parameter(torch.empty(E, F_, D))  # published as (D, F); this way experts stack into one matrix

    def forward(self, x, mask=None, with_routing=True):
        """x (B, L, D), mask (B, L) bool or None. Returns (B, L, D) and the Routing of the real tokens, or None."""
        flat = x.flatten(0, 1)  # (T, D)
        logits = widen(self.gate.weight) @ widen(flat).T  # (E, T): a CPU is slow at a softmax along a short last dim
        probs = logits.softmax(0).T  # (T, E)
        weight, chosen = probs.topk(self.top_k, dim=-1)  # (T, k)
        weight = weight / weight.sum(-1, keepdim=True)
        if self.capacity and with_routing:
            weight = weight * self.within_capacity(chosen, mask)
        form = self.form
        if form == "auto":
            few = x.device.type == "cpu" and len(flat) <= 512 and self.w1.numel() <= 2**17
            form = "dense" if few else "grouped"
        out = getattr(self, form)(flat, weight.to(x.dtype), chosen)
        return out.view_as(x), self.routing(probs, chosen, mask) if with_routing else None

    def loop(self, x, weight, chosen):
        """Expert by expert, the tokens that chose it: the definition. x (T, D), weight and chosen (T, k)."""
        out = torch.zeros_like(x)
        for e in range(len(self.w1)):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            y = (F.silu(x[token] @ self.w1[e].T) * (x[token] @ self.w3[e].T)) @ self.w2[e]
            out = out.index_add(0, token, y * weight[token, slot, None])
        return out

    def grouped(self, x, weight, chosen):
        """Choices sorted by expert, so that each expert's tokens are one slice."""
        order = chosen.flatten().argsort(stable=True)
        token = order // self.top_k
        slices = x.index_select(0, token).split(chosen.flatten().bincount(minlength=len(self.w1)).tolist())
        experts = zip(slices, self.w1.unbind(), self.w3.unbind(), self.w2.unbind())
        y = torch.cat([(F.silu(part @ w1.T) * (part @ w3.T)) @ w2 for part, w1, w3, w2 in experts])
        return torch.zeros_like(x).index_add(0, token, y * weight.flatten().index_select(0, order)[:, None])

    def dense(self, x, weight, chosen):
        """All experts as one wide expert, whose hidden units are scaled by the weight of their expert."""
        E, F_, D = self.w1.shape
        scale = torch.zeros(len(x), E, dtype=x.dtype, device=x.device).scatter(1, chosen, weight)
        hidden = F.silu(x @ self.w1.view(-1, D).T) * (x @ self.w3.view(-1, D).T)
        return (hidden.view(-1, E, F_) * scale[..., None]).view(-1, E * F_) @ self.w2.view(-1, D)

    def within_capacity(self, chosen, mask):
        """Token drop (MiniMax-01): which choices (T, k) their expert has room for, bool.

        An expert takes at most `capacity` times an even share (the factor was not published), in the order of the
        batch: late rows lose first (ours). A dropped choice adds nothing; the weights of the others stay as they are.
        This holds in every pass without a cache, for old log-probs as for new ones.
        """
        E, choices = len(self.w1), chosen.flatten()
        hit = F.one_hot(choices, E)
        if mask is not None:
            hit = hit * mask.flatten().repeat_interleave(self.top_k)[:, None]
        place = hit.cumsum(0).gather(1, choices[:, None])  # 1 = the first to choose this expert
        return (place <= self.capacity * hit.sum() / E).view_as(chosen)

    def routing(self, probs, chosen, mask):
        """The load-balancing loss of one layer and its two factors (01 sec. 3; padding excluded)."""
        hit = torch.zeros_like(probs).scatter(1, chosen, 1.0)
        if mask is not None:
            probs, hit = probs[mask.flatten()], hit[mask.flatten()]
        load, prob = (x.sum(0) / max(len(x), 1) for x in (hit, probs))
        return Routing(len(load) * (load * prob).sum(), load, prob)


class SharedMLP(nn.Module):
    """The shared expert of the released code: a SwiGLU of width intermediate_size. M1 has none."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ============================================================================
# 5. The model
# ============================================================================


class Block(nn.Module):
    """One layer: attention and experts, each around the post-norm residual of the module docstring."""

    def __init__(self, config, layer):
        super().__init__()
        c = config
        softmax = c.attn_type_list[layer] == 1
        self.self_attn = SoftmaxAttention(c) if softmax else LightningAttention(c, layer)
        kind = "full" if softmax else "linear"
        self.alpha_a = getattr(c, f"layernorm_{kind}_attention_alpha")
        self.beta_a = getattr(c, f"layernorm_{kind}_attention_beta")
        self.alpha_m, self.beta_m = c.layernorm_mlp_alpha, c.layernorm_mlp_beta
        self.postnorm = c.postnorm
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.block_sparse_moe = MoE(c)
        if c.shared_intermediate_size > 0:
            self.shared_mlp = SharedMLP(c)
            self.coefficient = Linear(c.hidden_size, 1)

    def forward(self, x, at, cached=None):
        """x (B, L, D) -> (B, L, D) and the layer's Routing (None when generating)."""
        n1 = self.input_layernorm(x)
        attention = self.self_attn(n1, at, cached)
        x = torch.add(self.alpha_a * (n1 if self.postnorm else x), attention, alpha=self.beta_a)
        n2 = self.post_attention_layernorm(x)
        out, routing = self.block_sparse_moe(n2, at.mask, with_routing=cached is None)
        if hasattr(self, "shared_mlp"):
            c = torch.sigmoid(F.linear(widen(n2), widen(self.coefficient.weight))).to(out.dtype)  # (B, L, 1)
            out = out * (1 - c) + self.shared_mlp(n2) * c
        return torch.add(self.alpha_m * (n2 if self.postnorm else x), out, alpha=self.beta_m), routing


class Cache:
    """What a batch of sequences remembers: static tensors, so that a decode step allocates nothing.

    layers[l] is the fp32 state (B, H, K, K) of a lightning layer or the (keys, values), each (B, max_len, J, K), of a
    softmax layer, where slot = position. position (B,) counts the tokens each row has seen.
    """

    def __init__(self, layers, position, max_len):
        self.layers, self.position, self.max_len = layers, position, max_len

    def select(self, rows):
        """A new cache holding these rows (a tensor of row numbers), which may repeat: n prompts -> n groups."""
        layers = [tuple(t[rows] for t in x) if isinstance(x, tuple) else x[rows] for x in self.layers]
        return Cache(layers, self.position[rows], self.max_len)

    def reset(self, rows=slice(None)):
        """Empty these rows (all by default) so that other prompts can take their place."""
        self.position[rows] = 0
        for x in self.layers:
            if not isinstance(x, tuple):  # keys and values are masked by position; a state has to be cleared
                x[rows] = 0


class Aux(NamedTuple):
    """Side results of a forward pass: the mean over layers of each layer's own load-balancing loss (ours; the released
    code pools the tokens of all layers, which hides layers that collapsed on different experts), and (layers, E) loads
    and mean router probabilities.
    """

    router_loss: torch.Tensor
    expert_load: torch.Tensor
    expert_prob: torch.Tensor


class MiniMaxM1(nn.Module):
    """The language model. Two layouts of a batch and no third:

    left-padded    tokens (B, L) with mask (B, L) bool, True = real token, False only on the left (None = no padding).
                   Each sequence gets exactly what it would get alone.
    packed         tokens (1, L) with cu_seqlens (N + 1,): N sequences one after another; positions restart.

    With a cache, tokens are the NEW ones: a whole prompt, a piece of one, or one token per row.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Block(config, l) for l in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal with std initializer_range; what enters the residual (values, output projections, experts) is scaled
        by DeepNorm's gain (8 L)^(-1/4). Ours: M1's initialisation was not published.
        """
        gain = (8 * self.config.num_hidden_layers) ** -0.25
        if self.device.type == "meta":
            return  # nothing to draw, and asking would import half of PyTorch
        branch = (".v_proj", ".o_proj", ".out_proj", ".w1", ".w2", ".w3", ".shared_mlp")
        for name, p in self.named_parameters():
            if p.ndim > 1:
                p.normal_(std=self.config.initializer_range)
                if any(part in name for part in branch):
                    p.mul_(gain)
            if name.endswith("qkv_proj.weight"):
                p.view(self.config.num_attention_heads, 3, -1)[:, 2] *= gain

    @property
    def device(self):
        return self.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.embed_tokens.weight.dtype

    def new_cache(self, batch, max_len):
        """An empty Cache for `batch` rows of at most `max_len` tokens."""
        c, kw = self.config, dict(device=self.device)
        H, J, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        wide = torch.promote_types(self.dtype, torch.float32)
        layers = [
            tuple(torch.zeros(batch, max_len, J, K, dtype=self.dtype, **kw) for _ in "kv")
            if kind == 1
            else torch.zeros(batch, H, K, K, dtype=wide, **kw)
            for kind in c.attn_type_list
        ]
        return Cache(layers, torch.zeros(batch, dtype=torch.int64, **kw), max_len)

    def forward(self, tokens, *, mask=None, cache=None, cu_seqlens=None, last_only=False):
        """tokens (B, L) int64 -> logits (B, L, W) fp32 (fp64 for an fp64 model), or (B, 1, W) with last_only."""
        hidden, _ = self.hidden(tokens, mask=mask, cache=cache, cu_seqlens=cu_seqlens)
        return self.head(hidden[:, -1:] if last_only else hidden)

    def hidden(self, tokens, *, mask=None, cache=None, cu_seqlens=None):
        """Everything before the head, final norm included: (B, L, D) fp32 and Aux (None with a cache)."""
        at = self._layout(tokens, mask, cache, cu_seqlens)
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):  # a cache is for generation
            x = self.embed_tokens(tokens)
            routings = []
            for l, layer in enumerate(self.layers):
                x, routing = layer(x, at, cache and cache.layers[l])
                routings.append(routing)
            hidden = self.norm(widen(x))
        if cache is not None:
            cache.position += tokens.shape[1] if mask is None else mask.sum(1)
            return hidden, None
        loss, load, prob = (torch.stack(x) for x in zip(*routings))
        return hidden, Aux(loss.mean(), load, prob)

    def head(self, hidden):
        """Logits from hidden states, both fp32: never a bf16 logit (report sec. 3.2)."""
        return F.linear(hidden, self.lm_head.weight.to(hidden.dtype))

    def logp(self, tokens, targets, *, mask=None, cu_seqlens=None, temperature=1.0, with_entropy=False):
        """Log-probs (B, L) fp32 of targets (B, L): entry t is that of targets[:, t] after tokens[:, : t + 1]."""
        hidden, _ = self.hidden(tokens, mask=mask, cu_seqlens=cu_seqlens)
        return self.target_logp(hidden, targets, temperature, with_entropy)

    def target_logp(self, hidden, targets, temperature=1.0, with_entropy=False, max_logits=2**24):
        """Log-probs (...) of targets (...) from hidden (..., D), or (log-probs, entropies in nats) with with_entropy.

        At most max_logits logits exist at a time; beyond that, blocks of positions are recomputed in the backward pass.
        """

        def block(h, target):
            logits = self.head(h)
            logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
            entropy = -(logp.exp() * logp).sum(-1) if with_entropy else logp.new_zeros(())
            return logp.gather(-1, target[:, None])[:, 0], entropy

        h, target = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        rows = max(max_logits // self.config.vocab_size, 1)
        if len(h) <= rows:
            logp, entropy = block(h, target)
        else:
            parts = [checkpoint(block, *x, use_reentrant=False) for x in zip(h.split(rows), target.split(rows))]
            logp, entropy = (torch.cat([x.view(-1) for x in column]) for column in zip(*parts))
        return (logp.view_as(targets), entropy.view_as(targets)) if with_entropy else logp.view_as(targets)

    def _layout(self, tokens, mask, cache, cu_seqlens):
        """Check the arguments of forward and work out positions, visible keys and cache slots, once for all layers."""
        B, L = tokens.shape
        if mask is not None:
            if mask.shape != tokens.shape or mask.dtype != torch.bool or cu_seqlens is not None:
                found = f"{mask.dtype} {tuple(mask.shape)}"
                raise ValueError(f"mask must be bool of tokens' shape {(B, L)}, without cu_seqlens; found {found}")
            if (mask[:, :-1] & ~mask[:, 1:]).any():
                raise ValueError("padding must be on the left: in a row of the mask, False comes before True")
            if mask.all():
                mask = None
        if cu_seqlens is not None:
            check_boundaries(cu_seqlens, tokens.shape)
            if cache is not None:
                raise ValueError("packed sequences (cu_seqlens) and a cache exclude each other")

        positions = torch.arange(L, device=tokens.device).expand(B, L)
        if mask is not None:
            positions = (positions - (~mask).sum(1, keepdim=True)).clamp(min=0)
        if cu_seqlens is not None:
            lengths = cu_seqlens.diff().to(positions)
            positions = positions - torch.repeat_interleave(cu_seqlens[:-1].to(positions), lengths)
        at = Layout(mask, cu_seqlens)

        if cache is None:
            if mask is not None:  # a padded query sees itself, so that its row of the softmax is not empty
                causal = torch.ones(L, L, dtype=torch.bool, device=tokens.device).tril()
                itself = torch.eye(L, dtype=torch.bool, device=tokens.device)
                at.visible = ((causal & mask[:, None, :]) | itself)[:, None]
        else:
            if len(cache.position) != B:
                raise ValueError(f"the cache has {len(cache.position)} rows, the tokens {B}")
            at.continues = mask is not None and bool(cache.position.any())
            positions = positions + cache.position[:, None]
            n_new = L if mask is None else mask.sum(1)
            at.n_slots = max(int((cache.position + n_new).max()), 1)
            if at.n_slots > cache.max_len:
                raise ValueError(f"the cache holds {cache.max_len} tokens per row, {at.n_slots} are needed; enlarge it")
            at.visible = (torch.arange(at.n_slots, device=tokens.device) <= positions[..., None])[:, None]
            real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            at.rows, at.slots = real.nonzero(as_tuple=True)[0], positions[real]
        if 1 in self.config.attn_type_list:
            at.rope = rope_tables(positions, self.config, torch.promote_types(self.dtype, torch.float32))
        return at


# ============================================================================
# 6. Checkpoints                                   (the published layout)
# ============================================================================

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def published_name(name, expert=0):
    """The published checkpoint's name for a parameter of ours; our experts are stacked, one tensor for all."""
    stem, _, last = name.rpartition(".")
    if last in ("w1", "w2", "w3"):
        return f"model.{stem}.experts.{expert}.{last}.weight"
    return name if stem == "lm_head" else f"model.{name}"


def published_tensors(model):
    """{name in the published checkpoint: view of our parameter}. Copying into a view loads it; reading one saves it."""
    tensors = {}
    for name, p in model.named_parameters():
        if p.ndim < 3:
            tensors[published_name(name)] = p.detach()
        else:
            for e, w in enumerate(p.detach()):
                tensors[published_name(name, e)] = w.T if name.endswith("w2") else w
    return tensors


def count_parameters(config):
    """Parameters by kind, from the configuration alone (nothing is allocated, also for 456 B).

    "active" = those that one token passes through, without embedding and head: the published 45.9 B of M1.
    """
    with torch.device("meta"):
        sizes = {name: t.numel() for name, t in published_tensors(MiniMaxM1(config)).items()}
    total = sum(sizes.values())
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    embedding, head = sizes["model.embed_tokens.weight"], sizes["lm_head.weight"]
    active = total - embedding - head - experts + experts * config.num_experts_per_tok // config.num_local_experts
    return {
        "total": total,
        "active": active,
        "active_with_head": active + head,
        "embedding": embedding,
        "head": head,
        "experts": experts,
    }


def read_json(path):
    """The content of a JSON file; ValueError if it is not there or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; a model or run folder has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def checkpoint_dir(path):
    """A run folder's newest checkpoint (its file `latest` names it), or the directory itself."""
    path = Path(path)
    pointer = path / "latest"
    return path / pointer.read_text().strip() if pointer.is_file() else path


def load_pretrained(path, device="cpu", dtype=None):
    """Load a published MiniMax-M1 directory, or a run of train_rl, shard by shard (peak memory: model plus one tensor).

    Checkpoints of ours carry checksums, which are verified; published ones have none.
    dtype None keeps every tensor's stored dtype. A given dtype casts all but the router gates, which stay fp32 (fp64
    in an fp64 model). Raises ValueError if the directory, a shard, a name or a shape is not what the config promises.
    """
    path = checkpoint_dir(path)
    config = M1Config.from_json(path)
    stored = _stored_tensors(path)
    with torch.device("meta"):
        model = MiniMaxM1(config)
    expected = {name: tuple(t.shape) for name, t in published_tensors(model).items()}
    _check_names(path, expected, {name: shape for name, (_, shape, _) in stored.items()})

    for name, p in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        parts = [published_name(name, e) for e in range(len(p) if p.ndim == 3 else 1)]
        cast = dtype or functools.reduce(torch.promote_types, (stored[part][2] for part in parts))
        if dtype and ".gate." in name:
            cast = torch.promote_types(dtype, torch.float32)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(torch.empty(p.shape, dtype=cast, device=device)))
    views = published_tensors(model)
    files = sorted({file for file, _, _ in stored.values()})
    check_sums(path, [file.name for file in files])
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                views[name].copy_(shard.get_tensor(name))
    return model


def _stored_tensors(path):
    """{name: (file, shape, dtype)} from the headers of all shards of a directory."""
    index = path / "model.safetensors.index.json"
    try:
        listed = read_json(index)["weight_map"].values() if index.exists() else ["model.safetensors"]
        files = sorted({Path(name).name for name in listed})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index: {error!r}") from None
    stored = {}
    for file in (path / name for name in files):
        if not file.is_file():
            raise ValueError(f"{path} is incomplete: the shard {file.name} is missing; copy it there again")
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():
                    if name in stored:
                        raise ValueError(f"{path}: {name} is stored twice, in {stored[name][0].name} and {file.name}")
                    part = shard.get_slice(name)
                    stored[name] = (file, tuple(part.get_shape()), DTYPES.get(part.get_dtype()))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or no safetensors file ({error}); copy it again") from None
    for name, (file, _, dtype) in stored.items():
        if dtype is None:
            raise ValueError(f"{file}: {name} has a dtype that is not supported; allowed: {', '.join(DTYPES)}")
    return stored


def crc32(file):
    """CRC-32 of a file's bytes."""
    value = 0
    with open(file, "rb") as content:
        while block := content.read(2**24):
            value = zlib.crc32(block, value)
    return value


def check_sums(path, names):
    """ValueError if a file of a checkpoint is not what save_pretrained wrote. Where there is no checksum, no check."""
    index = path / "model.safetensors.index.json"
    stored = read_json(index) if index.exists() else {}
    sums = (stored.get("metadata") or {}).get("crc32", {})
    for name in names:
        if name in sums and crc32(path / name) != sums[name]:
            raise ValueError(f"{path / name} is damaged: its bytes are not those that were saved; copy it again")


def _check_names(path, expected, found):
    def some(names):
        return f"{len(names)} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"

    common = expected.keys() & found.keys()
    problems = {
        "missing": expected.keys() - found.keys(),
        "unexpected": found.keys() - expected.keys(),
        "of another shape": [f"{n} is {found[n]}, not {expected[n]}" for n in common if found[n] != expected[n]],
    }
    report = "; ".join(f"{what}: {some(names)}" for what, names in problems.items() if names)
    if report:
        raise ValueError(f"{path} does not hold the tensors its config.json promises. {report}")


def save_pretrained(model, path, max_shard_bytes=2 * 10**9, trainer_state=None):
    """Write a model as config.json, numbered *.safetensors shards and their index: the published layout.

    Everything is written beside `path` first and moved there when complete. Refuses to overwrite. A trainer_state
    (dicts, lists, numbers, tensors) goes into trainer.pt.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already; remove it or choose another name")
    shards, room = [], 0
    for name, tensor in published_tensors(model).items():
        if tensor.nbytes > room:
            shards.append({})
            room = max(max_shard_bytes, tensor.nbytes)
        shards[-1][name] = tensor
        room -= tensor.nbytes
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]

    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.writing-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        for file, shard in zip(names, shards):
            save_file({name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in shard.items()},
                      draft / file, metadata={"format": "pt"})  # fmt: skip
        total = sum(t.nbytes for shard in shards for t in shard.values())
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        if trainer_state is not None:
            torch.save(trainer_state, draft / "trainer.pt")
        sums = {file.name: crc32(file) for file in sorted(draft.iterdir())}
        index = {"metadata": {"total_size": total, "crc32": sums}, "weight_map": weight_map}
        (draft / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        model.config.to_json(draft / "config.json")
        draft.rename(path)
    except (SafetensorError, RuntimeError) as error:  # how safetensors and torch.save report a full disk
        raise OSError(f"cannot write {path}: {error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# ============================================================================
# 7. Command lines, shared by the scripts
# ============================================================================


def flag(default, help, group, **kw):
    """One field of a frozen dataclass = one documented command-line flag.

    kw: at_least, above, at_most (bounds of its value), choices, optional=True (takes "none" as well).
    """
    return field(default=default, metadata=dict(help=help, group=group, **kw))


BOUNDS = {"at_least": operator.ge, "above": operator.gt, "at_most": operator.le}


def check_flags(flags):
    """Hold every field of a flags dataclass against its bounds and choices; ValueError names flag, value and bound."""
    for f in dataclasses.fields(flags):
        name, value, meta = f"--{f.name.replace('_', '-')}", getattr(flags, f.name), f.metadata
        if value is None and (f.default is None or meta.get("optional")):
            continue
        kind = (int, float) if f.type is float else f.type
        if not isinstance(value, kind) or isinstance(value, bool) != (f.type is bool):
            raise ValueError(f"{name} must be of type {f.type.__name__}, found {value!r}")
        for bound, holds in BOUNDS.items():
            if bound in meta and not holds(value, meta[bound]):
                raise ValueError(f"{name} must be {bound.replace('_', ' ')} {meta[bound]}, found {value}")
        if value not in meta.get("choices", (value,)):
            raise ValueError(f"{name} must be one of {', '.join(meta['choices'])}, found {value}")


def parse_flags(flags, argv, description, defaults=None):
    """argv -> an instance of the dataclass `flags`, whose fields are the flags, their types, defaults and help.

    defaults: {field: value} that take the place of the dataclass's own where argv is silent. Booleans become --name and
    --no-name. Bad input: one line on stderr, exit code 2.
    """
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=plain, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists what is allowed\n")
    groups = {}
    for f in dataclasses.fields(flags):
        meta = f.metadata
        group = groups.setdefault(meta["group"], parser.add_argument_group(meta["group"]))
        optional = f.default is None or meta.get("optional", False)
        choices = f"; {', '.join(meta['choices'])}" if "choices" in meta else ""
        text = f"{meta['help']}{choices} (default: {'none' if f.default is None else f.default})".replace("%", "%%")
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": _reader(f.type, optional)}
        group.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)
    parser.set_defaults(**(defaults or {}))
    return flags(**vars(parser.parse_args(argv)))


def _reader(kind, optional):
    def read(text):
        if text == "none" and optional:
            return None
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value

    read.__name__ = kind.__name__  # argparse prints it
    return read


def command_line(main):
    """Decorator of a script's main(argv=None): a ValueError or OSError becomes one line on stderr and exit code 2, a
    KeyboardInterrupt one line and 130.
    """

    @functools.wraps(main)
    def wrapped(argv=None):
        try:
            return main(argv)
        except (ValueError, OSError) as error:
            code, message = 2, str(error)
        except KeyboardInterrupt as stop:
            code, message = 130, str(stop) or "stopped"
        print(f"{Path(main.__code__.co_filename).name}: {' '.join(message.split())}", file=sys.stderr)
        raise SystemExit(code)

    return wrapped


# ============================================================================
# 8. See it run
# ============================================================================

# One token's way through a lightning (L) or a softmax (S) block: operation, what it reads (a parameter of the block or
# the memory of the sequence), shape of the result (n: tokens so far, k: experts per token).
PATH = (
    ("LS", "n1 = norm(x)", "input_layernorm.weight", "D"),
    ("L", "q, k, v = silu(Wqkv n1)", "self_attn.qkv_proj.weight", "H 3 K"),
    ("L", "S = lam S + k v^T;  o = q S", "state", "H K"),
    ("L", "g = sigmoid(Wgate n1)", "self_attn.output_gate.weight", "H K"),
    ("L", "o = g * norm(o)", "self_attn.norm.weight", "H K"),
    ("L", "y = alpha n1 + beta Wout o", "self_attn.out_proj.weight", "D"),
    ("S", "q = rope(Wq n1)", "self_attn.q_proj.weight", "H K"),
    ("S", "k = rope(Wk n1)", "self_attn.k_proj.weight", "J K"),
    ("S", "v = Wv n1", "self_attn.v_proj.weight", "J K"),
    ("S", "p = softmax(q keys / sqrt K)", "keys", "H n"),
    ("S", "o = p values", "values", "H K"),
    ("S", "y = alpha n1 + beta Wo o", "self_attn.o_proj.weight", "D"),
    ("LS", "n2 = norm(y)", "post_attention_layernorm.weight", "D"),
    ("LS", "w = top k of softmax(Wg n2)", "block_sparse_moe.gate.weight", "E"),
    ("LS", "h = silu(w1 n2)", "block_sparse_moe.w1", "k F"),
    ("LS", "h = h * (w3 n2)", "block_sparse_moe.w3", "k F"),
    ("LS", "x = alpha n2 + beta w (w2 h)", "block_sparse_moe.w2", "D"),
)


def trace(model, context):
    """One token, the last of `context`, on its way through the first block of each kind, and the sums over all blocks.

    FLOPs: 2 per weight, 4 per number of a state, 2 per number of a key or value and query head that meets it. Returns
    {title: [(operation or part, source, shape read, shape of the result, bytes read, FLOPs)]}.
    """
    c, cache, tables = model.config, model.new_cache(1, context), {}
    H, J, k = c.num_attention_heads, c.num_key_value_heads, c.num_experts_per_tok
    sizes = dict(D=c.hidden_size, H=H, J=J, K=c.head_dim, n=context, E=c.num_local_experts, k=k, F=c.intermediate_size)
    memory = {"state": ("states", 4), **dict.fromkeys(("keys", "values"), ("keys and values", 2 * H // J))}
    for kind, title in enumerate(("lightning block", "softmax block")):
        l, tables[title] = c.attn_type_list.index(kind), []
        read, cached = dict(model.layers[l].named_parameters()), cache.layers[l]
        read |= dict(keys=cached[0][0], values=cached[1][0]) if kind else dict(state=cached[0])
        for what, name, result in (row[1:] for row in PATH if "LS"[kind] in row[0]):
            source, flops = memory.get(name, ("weights", 2))
            t = read[name][:k] if name.startswith("block_sparse_moe.w") else read[name]  # the chosen experts only
            result = [sizes.get(s) or int(s) for s in result.split()]
            shapes = ("x".join(map(str, shape)) for shape in (t.shape, result))
            tables[title].append((what, source, *shapes, t.nbytes, flops * t.numel()))
    steps = [step for kind in c.attn_type_list for step in list(tables.values())[kind]]
    steps += [("", "norm and head", "", "", t.nbytes, 2 * t.numel()) for t in (model.norm.weight, model.lm_head.weight)]
    parts = {part: [s[4:] for s in steps if s[1] == part] for part in dict.fromkeys(s[1] for s in steps)}
    parts["one token"] = [s[4:] for s in steps]
    tables["all blocks"] = [(part, "", "", "", *map(sum, zip(*costs))) for part, costs in parts.items()]
    return tables


def rounded(n, base=1000):
    """Three digits and a unit, of FLOPs in steps of 1000 or of bytes in steps of 1024."""
    units = ("", "k", "M", "G", "T", "P") if base == 1000 else ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
    power = next(i for i in range(len(units)) if n < 999.5 * base**i)
    return f"{n / base**power:.3g} {units[power]}"


def show_trace(models, context):
    """Print the traces of {name: model} side by side."""
    print(f"One token at n = {context:,}; bf16, states fp32; * memory of the sequence, all else weights")
    tables = [trace(model, context) for model in models.values()]
    for title in tables[0]:
        heads = (f"  {name + ' reads':>15} {'result':>10} {'bytes':>9} {'FLOPs':>6}" for name in models)
        print(f"\n{title:30}" + "".join(heads))
        for rows in zip(*(table[title] for table in tables)):
            line = f"{rows[0][0]:30}"
            for _, source, shape, result, n_bytes, flops in rows:
                shape += "*" if source in ("states", "keys and values") else ""
                line += f"  {shape:>15} {result:>10} {rounded(n_bytes, 1024):>9} {rounded(flops):>6}"
            print(line)


def describe(model, context):
    """Print layers, parameters, memory and half-lives of a model (on the meta device as well)."""

    def line(what, amount, note):
        print(f"  {what:30}{amount:>18}   {note}")

    c, n, types = model.config, count_parameters(model.config), model.config.attn_type_list
    letters = "".join("LS"[kind] for kind in types)
    print(f"layers: L lightning attention, S softmax attention, each followed by {c.num_local_experts} experts")
    print("  " + " ".join(letters[i : i + 8] for i in range(0, len(types), 8)))

    print("\nparameters")
    n["attention, routers, norms"] = n["total"] - n["experts"] - n["embedding"] - n["head"]
    for what, count in n.items():
        line(what.replace("_", " "), f"{count:,}", f"{count / n['total']:6.1%}")

    print(f"\nmemory of one sequence of {context:,} tokens (states fp32, keys and values bf16)")
    cached = model.new_cache(1, context).layers
    state = sum(x.nbytes for x in cached if not isinstance(x, tuple))
    kv = sum(t.nbytes for x in cached if isinstance(x, tuple) for t in x)
    n_softmax, L = sum(types), len(types)
    line(f"states, {L - n_softmax} lightning layers", rounded(state, 1024), "at any length")
    line(f"keys and values, {n_softmax} softmax", rounded(kv, 1024), f"{kv // context:,} B per token")
    line(f"... if all {L} were softmax", rounded(kv * L // n_softmax, 1024), "at this length")
    line("both alike at", f"{state * context // kv:,}", "tokens")

    print("\nhalf-life of what a lightning layer remembers, in tokens\n  layer   fastest head   slowest head")
    lightning = [l for l, kind in enumerate(types) if kind == 0]
    for l in sorted({lightning[min(i * len(lightning) // 4, len(lightning) - 1)] for i in range(5)}):
        half_life = math.log(2) / decay_slopes(c.num_attention_heads, l, L)
        print(f"  {l:5}   {half_life.min():12.2g}   {half_life.max():12,.0f}")


@dataclass(frozen=True)
class Flags:
    """What to show."""

    preset: str = flag("tiny", "model: tiny, small, base or m1 (456 B)", "what", choices=(*PRESETS, "m1"))
    trace: bool = flag(False, "follow one token through a block of each kind, beside m1", "what")
    context: int = flag(2**20, "tokens in the sequence", "what", at_least=1, at_most=10**9)

    def __post_init__(self):
        check_flags(self)


@command_line
def main(argv=None):
    """Print what a model consists of and remembers, or how one token goes through it. No weights are allocated."""
    flags = parse_flags(Flags, argv, main.__doc__)
    with torch.device("meta"):
        models = {name: MiniMaxM1(M1Config.preset(name)).bfloat16() for name in dict.fromkeys((flags.preset, "m1"))}
        if flags.trace:
            show_trace(models, flags.context)
        else:
            describe(models[flags.preset], flags.context)


if __name__ == "__main__":
    main()
