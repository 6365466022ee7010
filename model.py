"""MiniMax-M1, the whole model: hybrid attention, mixture of experts, cache.

Seven of eight layers use lightning attention (a state of fixed size), every eighth uses softmax
attention (keys and values of every token); each is followed by a mixture of experts.

    n1 = RMSNorm(x);   y  = alpha_a n1 + beta_a Attention(n1)
    n2 = RMSNorm(y);   x' = alpha_m n2 + beta_m MoE(n2)
    after the last layer: RMSNorm, lm_head, fp32 logits

Where a choice comes from: *report* = MiniMax-M1 report (arXiv:2506.13585), *01* = MiniMax-01 report
(arXiv:2501.08313), *released* = published configuration and modelling code, *ours* = decided here.

    1. Configuration         M1Config, presets
    2. Attention             Layout, LightningAttention, SoftmaxAttention
    3. The model             Block, Cache, MiniMaxM1, count_parameters
    4. See it run            main: `python model.py --preset m1` (sizes, memory, half-lives)

Dimension key: B batch, L new tokens, D model width, H query heads, J key/value heads, K head width,
S cache slots, E experts, F expert width, W vocabulary. Parameters keep their published names.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import parallel
from cli import check, command_line, parse, read_json, short
from layers import (
    HeadProduct,
    Linear,
    RMSNorm,
    residual,
    rms_norm,
    rope,
    rope_tables,
    times_bf16,
    widen,
)
from lightning_attn import check_boundaries, decay_slopes, lightning_attention, lightning_step
from moe import MoE, SharedMLP
from softmax_attn import attend, attend_packed, has_flash

# ============================================================================
# 1. Configuration
# ============================================================================

SIZES = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size num_local_experts num_experts_per_tok"
).split()
PRESETS = {
    "tiny": dict(zip(SIZES, (272, 64, 8, 4, 2, 16, 64, 4, 2))),  # 0.6 M parameters: a CPU
    "small": dict(zip(SIZES, (272, 256, 8, 8, 2, 32, 256, 8, 2))),  # 15 M: a patient CPU, any GPU
    "base": dict(zip(SIZES, (272, 768, 16, 12, 2, 64, 2048, 8, 2))),  # 649 M: one GPU
}
RESIDUAL = [  # alpha and beta of the residual: after softmax, after lightning attention, after MoE
    f"layernorm_{part}_{factor}"
    for part in ("full_attention", "linear_attention", "mlp")
    for factor in ("alpha", "beta")
]
BOUNDS = {name: (1, 2**18) for name in SIZES} | {name: (-1000, 1000) for name in RESIDUAL}
BOUNDS |= {"num_hidden_layers": (1, 10_000), "num_local_experts": (1, 2**16)}
BOUNDS |= {"vocab_size": (1, 2**24), "num_attention_heads": (1, 2**14), "head_dim": (1, 2**14)}
BOUNDS |= {"shared_intermediate_size": (0, 2**18), "rotary_dim": (0, 2**14)}
BOUNDS |= {"max_position_embeddings": (1, 2**40), "rope_theta": (1e-6, 10**15)}
BOUNDS |= {"rms_norm_eps": (1e-30, 1), "initializer_range": (1e-12, 1000)}
BOUNDS |= {"router_aux_loss_coef": (0, 1000)}
FIXED = {"hidden_act": "silu", "tie_word_embeddings": False, "sliding_window": None}


@dataclass
class M1Config:
    """The published config.json, key by key; the defaults are the released 456 B model.

    None stands for a rule: attn_type_list = softmax (1) in every eighth layer, else lightning (0);
    rotary_dim = half a head; alpha = (2 L)^(1/4), L layers (ours but for 80: DeepNorm's rule).
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
    shared_intermediate_size: int = 0  # > 0: a shared expert, of width intermediate_size (released)
    attn_type_list: list[int] | None = None
    rotary_dim: int | None = None
    rope_theta: float = 10_000_000
    max_position_embeddings: int = 10_240_000
    rms_norm_eps: float = 1e-5
    postnorm: bool = True  # the residual carries the normed tensor
    layernorm_full_attention_alpha: float | None = None
    layernorm_full_attention_beta: float = 1.0
    layernorm_linear_attention_alpha: float | None = None
    layernorm_linear_attention_beta: float = 1.0
    layernorm_mlp_alpha: float | None = None
    layernorm_mlp_beta: float = 1.0
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None  # this and the next key are ours
    tokenizer: str = "m1"  # "m1" or "byte"

    def __post_init__(self):
        check(self, dashes=False, **BOUNDS)
        L = self.num_hidden_layers
        if self.attn_type_list is None:
            self.attn_type_list = [int((l + 1) % 8 == 0) for l in range(L)]
        if self.rotary_dim is None:
            self.rotary_dim = self.head_dim // 2
        for part in ("full_attention", "linear_attention", "mlp"):
            if getattr(self, f"layernorm_{part}_alpha") is None:
                setattr(self, f"layernorm_{part}_alpha", (2 * L) ** 0.25)
        self._check_values()

    def _check_values(self):
        def need(ok, what):
            if not ok:
                raise ValueError(f"config: {what}")

        L, types = self.num_hidden_layers, self.attn_type_list
        right, found = len(types) == L and set(types) <= {0, 1}, short(types)
        need(right, f"attn_type_list must hold {L} entries, 0 lightning, 1 softmax, found {found}")
        H, J = self.num_attention_heads, self.num_key_value_heads
        need(H % J == 0, f"num_attention_heads {H} must be a multiple of num_key_value_heads {J}")
        R, K = self.rotary_dim, self.head_dim
        need(R % 2 == 0 and R <= K, f"rotary_dim must be even, at most head_dim {K}, found {R}")
        k, E = self.num_experts_per_tok, self.num_local_experts
        need(k <= E, f"num_experts_per_tok {k} exceeds num_local_experts {E}")
        for key, only in FIXED.items():
            found = getattr(self, key)
            need(found == only, f"{key} must be {only!r} as in MiniMax-M1, found {short(found)}")

    @classmethod
    def preset(cls, name, **changes):
        """A named size: "tiny", "small", "base" (byte tokenizer, ids below 272) or "m1" (456 B)."""
        if name == "m1":
            return cls(**changes)
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}, m1")
        ours = dict(rope_theta=10_000, max_position_embeddings=32_768, tokenizer="byte")
        ours["initializer_range"] = PRESETS[name]["hidden_size"] ** -0.5
        return cls(**{**ours, **PRESETS[name], **changes})

    @classmethod
    def from_json(cls, path):
        """Read a config.json, or that of a directory. Keys that do not shape a pass are ignored;
        those that do must be there, since other code assumes other values where a file is silent.
        """
        path = Path(path, "config.json") if Path(path).is_dir() else Path(path)
        stored = read_json(path)
        if stored.get("model_type") != "minimax_m1":
            found = short(stored.get("model_type"))
            raise ValueError(f"{path} describes model_type {found}, not 'minimax_m1'")
        rope = stored.get("rope_parameters") or {}  # a newer way of writing rope_theta
        rope = rope if isinstance(rope, dict) else {"rope_parameters": rope}
        plain = {"rope_theta": stored.setdefault("rope_theta", rope.get("rope_theta"))}
        plain |= {"rope_type": "default"}
        if stored.get("rope_scaling") or plain | rope != plain:
            found = short(stored.get("rope_scaling") or rope)
            raise ValueError(f"{path}: rope is one rope_theta, without scaling, found {found}")
        needed = [*SIZES, "attn_type_list", "rotary_dim", "rope_theta", "rms_norm_eps", "postnorm"]
        missing = [name for name in [*needed, *RESIDUAL] if stored.get(name) is None]
        if missing:
            raise ValueError(
                f"{path} does not say {', '.join(missing)}, which no default can guess"
            )
        known = {f.name: stored[f.name] for f in dataclasses.fields(cls) if f.name in stored}
        try:
            return cls(**known)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self, path):
        """Write the published schema (plus our two keys) to a file."""
        kind = {"architectures": ["MiniMaxM1ForCausalLM"], "model_type": "minimax_m1"}
        Path(path).write_text(json.dumps({**kind, **dataclasses.asdict(self)}, indent=2) + "\n")


# ============================================================================
# 2. Attention
# ============================================================================


@dataclass
class Layout:
    """Where the tokens of one forward pass stand; computed once, used by every layer."""

    mask: torch.Tensor = None  # (B, L) bool, True = real token; None = all real
    cu_seqlens: torch.Tensor = None  # (N + 1,) int32 boundaries when sequences are packed along L
    longest: int = 0  # of the packed sequences
    part: parallel.Part = None  # of them, where other ranks have the rest
    rope: tuple = None  # cos, sin
    seen: tuple = None  # first and last key that a query sees, (B, L) each; None = plain causal
    rows: torch.Tensor = None  # with a cache: row and slot of every real new token, (n,) each
    slots: torch.Tensor = None
    n_slots: int = 0  # S: slots in use after this pass
    continues: bool = False  # padded tokens meet states that are not empty


class LightningAttention(nn.Module):
    """Linear attention with per-head decay, gated: out = (sigmoid(u Wgate^T) * RMSNorm(o)) Wout^T.
    The inner RMSNorm runs over all H*K values jointly and has an eps of its own, 1e-6. (released)
    """

    def __init__(self, config, layer):
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.head_dim
        self.place = (self.heads, layer, config.num_hidden_layers)
        D, inner = config.hidden_size, self.heads * self.width
        self.qkv_proj = Linear(D, 3 * inner)  # rows of head h: its q, then its k, then its v
        self.output_gate = Linear(D, inner)
        self.norm = RMSNorm(inner, 1e-6)
        self.out_proj = Linear(inner, D)

    def forward(self, u, at, state=None):
        """u (B, L, D) -> (B, L, D). state: the cache's (B, H, K, K), updated in place."""
        B, L, _ = u.shape
        slope = _slopes(*self.place, u.device)
        qkv = self.qkv_proj(u).view(B, L, self.heads, 3, self.width)
        if u.is_cuda:  # the kernel reads views
            q, k, v = F.silu(qkv).unbind(3)
        else:  # one copy here saves one in every product
            q, k, v = (x.transpose(1, 2) for x in F.silu(qkv.permute(3, 0, 2, 1, 4).contiguous()))
        if at.mask is not None:
            v = v * at.mask[..., None, None]  # a padded token writes nothing into the state
        if at.part is not None:
            o = parallel.lightning(q, k, v, slope, at.part)
        elif state is None:
            o, _ = lightning_attention(q, k, v, slope, cu_seqlens=at.cu_seqlens)
        elif L == 1 and at.mask is None:
            o = lightning_step(q[:, 0], k[:, 0], v[:, 0], slope, state)[:, None]
        elif at.continues:  # ... but would make a state decay: rows are packed without padding
            ends = F.pad(at.mask.sum(1).cumsum(0), (1, 0))
            packed = (x[at.mask][None] for x in (q, k, v))
            real, last = lightning_attention(*packed, slope, state, cu_seqlens=ends)
            o = torch.zeros_like(v)
            o[at.mask] = real[0]
            state.copy_(last)
        else:
            o, last = lightning_attention(q, k, v, slope, state)
            state.copy_(last)
        gate = self.output_gate(u)
        return self.out_proj(rms_norm(o.flatten(2), self.norm.weight, self.norm.eps, gate))


_slopes = functools.cache(decay_slopes)  # no buffer: casting a model must not round its slopes


class SoftmaxAttention(nn.Module):
    """Causal; query head h reads key and value head h // (H/J); rope on part of every head."""

    def __init__(self, config):
        super().__init__()
        D, H, J = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.width = config.head_dim
        self.q_proj = Linear(D, H * self.width)
        self.k_proj = Linear(D, J * self.width)
        self.v_proj = Linear(D, J * self.width)
        self.o_proj = Linear(H * self.width, D)

    def forward(self, u, at, kv=None):
        """u (B, L, D) -> (B, L, D). kv: the cache's (B, max_len, J, K) twice, written in place."""
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (f(u).unflatten(-1, (-1, self.width)) for f in projections)
        q, k = rope(q, *at.rope), rope(k, *at.rope)
        if kv is not None:
            for cached, new in zip(kv, (k, v)):
                cached[at.rows, at.slots] = new.flatten(0, 1) if at.mask is None else new[at.mask]
            k, v = (cached[:, : at.n_slots] for cached in kv)
        if at.cu_seqlens is None:
            o = attend(q, k, v, at.seen)
        else:
            q, k, v = (parallel.by_heads(x, at.part) for x in (q, k, v))
            o = parallel.by_tokens(attend_packed(q, k, v, at.cu_seqlens, at.longest), at.part)
        return self.o_proj(o.flatten(2))


# ============================================================================
# 3. The model
# ============================================================================


class Block(nn.Module):
    """One layer: attention and experts, each in the post-norm residual of the module docstring."""

    def __init__(self, config, layer):
        super().__init__()
        c, softmax = config, config.attn_type_list[layer] == 1
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
        out = self.self_attn(n1, at, cached)
        x = residual(n1 if self.postnorm else x, out, self.alpha_a, self.beta_a)
        n2 = self.post_attention_layernorm(x)
        out, routing = self.block_sparse_moe(n2, at.mask, with_routing=cached is None)
        if hasattr(self, "shared_mlp"):
            logit = F.linear(widen(n2), widen(self.coefficient.weight))  # (B, L, 1)
            share = torch.sigmoid(logit).to(out.dtype)
            out = out * (1 - share) + self.shared_mlp(n2) * share
        x = residual(n2 if self.postnorm else x, out, self.alpha_m, self.beta_m)
        return x, routing


@dataclass
class Cache:
    """What a batch of sequences remembers: static tensors, so a decode step allocates nothing."""

    layers: list  # lightning: state (B, H, K, K) fp32; softmax: (keys, values), slot = position
    position: torch.Tensor  # (B,) tokens that each row has seen
    max_len: int  # keys and values are (B, max_len, J, K)

    def select(self, rows):
        """A new cache of these rows (a tensor of numbers)."""
        layers = [x[rows] if torch.is_tensor(x) else (x[0][rows], x[1][rows]) for x in self.layers]
        return Cache(layers, self.position[rows], self.max_len)

    def put(self, slots, other, rows, used):
        """Rows of another cache, of `used` tokens at most, take these slots; a row may repeat."""
        for own, x in zip(self.layers, other.layers):
            if torch.is_tensor(own):
                own[slots] = x[rows]
            else:
                for mine, theirs in zip(own, x):
                    mine[slots, :used] = theirs[rows, :used]
        self.position[slots] = other.position[rows]

    def reset(self, rows=slice(None)):
        """Empty these rows (all by default) so that other prompts can take their place."""
        self.position[rows] = 0
        for x in self.layers:
            if not isinstance(x, tuple):  # position hides old keys and values, but not old states
                x[rows] = 0


class Aux(NamedTuple):
    """What the routers did in a forward pass, see Routing. (The released code pools the tokens of
    all layers for the loss, which hides layers that collapsed on different experts.)
    """

    router_loss: torch.Tensor  # the mean over layers of each layer's own loss (ours)
    expert_load: torch.Tensor  # (layers, E)
    expert_prob: torch.Tensor  # (layers, E)

    def loss_at(self, load):
        """The router loss where this was a part of a larger batch, of that load."""
        return load.shape[1] * (load * self.expert_prob).sum(1).mean()


class MiniMaxM1(nn.Module):
    """The language model. Two layouts of a batch and no third:

    left-padded    tokens (B, L) with mask (B, L) bool, True = real token, False only on the left
                   (None = no padding). Each sequence gets exactly what it would get alone.
    packed         tokens (1, L) with cu_seqlens (N + 1,): N sequences, each from position 0. With
                   `part`, see parallel.py, tokens are this process's part of them.

    With a cache, tokens are the NEW ones, one or more per row, and nothing records gradients.
    which: the layers to build, by number; None = all. A part still has embedding, norm and head.
    """

    def __init__(self, config, which=None):
        super().__init__()
        self.which = list(range(config.num_hidden_layers) if which is None else which)
        self.config, self.compute = config, None  # dtype of the activations; None = the embedding's
        self.recompute = False  # True: layers keep their input only, for the backward pass
        vectors = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(vectors, freeze=False)
        self.layers = nn.ModuleList(Block(config, l) for l in self.which)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Normal; what enters the residual times DeepNorm's gain (ours: M1's was not published)."""
        if self.device.type == "meta":
            return  # nothing to draw, and asking would import half of PyTorch
        gain = (8 * self.config.num_hidden_layers) ** -0.25
        branch = (".v_proj", ".o_proj", ".out_proj", ".w1", ".w2", ".w3", ".shared_mlp")
        for name, p in self.named_parameters():
            if p.ndim > 1:
                p.normal_(std=self.config.initializer_range)
                if any(part in name for part in branch):
                    p.mul_(gain)
            if name.endswith("qkv_proj.weight"):
                p.view(self.config.num_attention_heads, 3, -1)[:, 2] *= gain

    device = property(lambda self: self.embed_tokens.weight.device)
    dtype = property(lambda self: self.compute or self.embed_tokens.weight.dtype)
    wide = property(lambda self: torch.promote_types(self.dtype, torch.float32))  # as in widen

    def new_cache(self, batch, max_len):
        """An empty Cache for `batch` rows of at most `max_len` tokens."""
        c, zeros = self.config, functools.partial(torch.zeros, batch, device=self.device)
        H, J, K = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        state = functools.partial(zeros, H, K, K, dtype=self.wide)
        kv = functools.partial(zeros, max_len, J, K, dtype=self.dtype)
        kinds = [c.attn_type_list[l] for l in self.which]
        layers = [(kv(), kv()) if kind == 1 else state() for kind in kinds]
        return Cache(layers, zeros(dtype=torch.int64), max_len)

    def decode(self, tokens, cache, reach):
        """One more token (B,) int64 of every row of a cache: logits (B, W).

        Shapes are fixed and the device is asked nothing, so a CUDA graph can hold it. reach: keys
        that are looked at, at least as many as tokens in the longest row, this one included.
        """
        with torch.no_grad():
            hidden, _ = self.hidden(tokens[:, None], cache=cache, reach=reach)
            return self.head(hidden[:, 0])

    def forward(self, tokens, *, mask=None, cache=None, cu_seqlens=None, last_only=False):
        """tokens (B, L) int64 -> logits (B, L, W), or (B, 1, W) with last_only; fp32 or wider."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            hidden, _ = self.hidden(tokens, mask=mask, cache=cache, cu_seqlens=cu_seqlens)
            return self.head(hidden[:, -1:] if last_only else hidden)

    def hidden(self, tokens, *, mask=None, cache=None, cu_seqlens=None, reach=None, part=None):
        """All before the head, final norm included: (B, L, D) fp32 and Aux (None with a cache)."""
        at = self._layout(tokens, mask, cache, cu_seqlens, reach, part)
        learns = torch.is_grad_enabled() and cache is None
        with torch.set_grad_enabled(learns), torch.autocast(self.device.type, enabled=False):
            x, routings = self.embed_tokens(tokens).to(self.dtype), []
            again = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            for l, layer in enumerate(self.layers):
                run = functools.partial(again, layer) if learns and self.recompute else layer
                x, routing = run(x, at, cache and cache.layers[l])
                routings.append(routing)
            hidden = self.norm(widen(x))
        if cache is not None:
            cache.position += tokens.shape[1] if mask is None else mask.sum(1)
            return hidden, None
        loss, load, prob = (torch.stack(x) for x in zip(*routings))
        return hidden, Aux(loss.mean(), load, prob)

    def head(self, hidden):
        """Logits from hidden states, both fp32: never a bf16 logit (report sec. 3.2)."""
        weight, half = self.lm_head.weight, torch.bfloat16
        rows, shape = hidden.flatten(0, -2), (*hidden.shape[:-1], len(weight))
        with torch.autocast(self.device.type, enabled=False):
            if weight.is_cuda and weight.dtype == half and not torch.is_grad_enabled():
                return times_bf16(rows, weight).view(shape)
            if weight.is_cuda and self.compute == half and weight.dtype == torch.float32:
                return HeadProduct.apply(rows, weight).view(shape)
            return self.lm_head(hidden)

    def logp(
        self, tokens, targets, *, mask=None, cu_seqlens=None, temperature=1.0, with_entropy=False
    ):
        """Log-probs (B, L) fp32: entry t is that of targets[:, t] after tokens[:, : t + 1]."""
        hidden, _ = self.hidden(tokens, mask=mask, cu_seqlens=cu_seqlens)
        return self.target_logp(hidden, targets, temperature, with_entropy)

    def target_logp(self, hidden, targets, temperature=1.0, with_entropy=False, max_logits=None):
        """Log-probs (...) of targets (...) from hidden (..., D); with_entropy: and entropies, nats.
        At most max_logits logits (2^24, on a GPU 2^28) exist at a time; more are computed again for
        the backward pass.
        """
        max_logits = max_logits or (2**28 if hidden.is_cuda else 2**24)

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
            blocks = zip(h.split(rows), target.split(rows))
            how = dict(use_reentrant=False, preserve_rng_state=False)
            parts = [checkpoint(block, *x, **how) for x in blocks]
            logp, entropy = (torch.cat([x.view(-1) for x in column]) for column in zip(*parts))
        logp = logp.view_as(targets)
        return (logp, entropy.view_as(targets)) if with_entropy else logp

    def _layout(self, tokens, mask, cache, cu_seqlens, reach=None, part=None):
        """Check forward's arguments; positions, visible keys and cache slots for all layers."""
        (B, L), device = tokens.shape, tokens.device
        if part is not None:
            L = sum(part.sizes)
        positions = torch.arange(L, device=device).expand(B, L)
        if mask is not None:
            if mask.shape != tokens.shape or mask.dtype != torch.bool or cu_seqlens is not None:
                wrong = f"found {mask.dtype} {tuple(mask.shape)}"
                raise ValueError(f"mask must be bool {(B, L)}, without cu_seqlens; {wrong}")
            if (mask[:, :-1] & ~mask[:, 1:]).any():
                raise ValueError("padding must be on the left: in a mask, False before True")
            positions = (positions - (~mask).sum(1, keepdim=True)).clamp(min=0)
            mask = None if mask.all() else mask
        if cu_seqlens is not None:
            check_boundaries(cu_seqlens, (B, L))
            if cache is not None:
                raise ValueError("packed sequences (cu_seqlens) and a cache exclude each other")
            cu_seqlens = cu_seqlens.int()
            starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff()
            positions = positions - starts.repeat_interleave(lengths, output_size=L)
            positions = positions if part is None else positions[:, part.here]
        longest = 0 if cu_seqlens is None else _longest(lengths, L)
        at = Layout(mask, cu_seqlens, longest, part)
        if cache is not None:
            if len(cache.position) != B:
                raise ValueError(f"the cache has {len(cache.position)} rows, the tokens {B}")
            at.continues = mask is not None and bool(cache.position.any())
            positions = positions + cache.position[:, None]
            n_new = L if mask is None else mask.sum(1)
            least = n = reach
            if reach is None:
                after = cache.position + n_new
                least, n = torch.stack([after.min(), after.max().clamp(min=1)]).tolist()
            if n > cache.max_len:
                raise ValueError(f"the cache holds {cache.max_len} tokens per row, {n} are needed")
            even = mask is None and reach is None and least == n  # every row's last token sees all
            if not even or (L < n and (L == 1 or not has_flash(self))):
                at.seen = torch.zeros_like(positions), positions
            row = torch.arange(B, device=device)[:, None].expand(B, L)
            places = (row, positions) if mask is None else (row[mask], positions[mask])
            at.n_slots, (at.rows, at.slots) = n, (x.flatten() for x in places)
        elif mask is not None:
            last = torch.arange(L, device=device).expand(B, L)
            first = (~mask).sum(1, keepdim=True)
            at.seen = torch.minimum(first, last), last  # padding sees itself: no softmax is empty
        if 1 in self.config.attn_type_list:
            at.rope = rope_tables(positions, self.config, self.wide)
        return at


def _longest(lengths, most):
    """Of packed sequences; a CUDA graph, where nothing can be looked up, takes what it can be."""
    recording = lengths.is_cuda and torch.cuda.is_current_stream_capturing()
    return most if recording else int(lengths.max())


def count_parameters(config):
    """Parameters by kind, none allocated. active: those a token meets, embedding and head aside."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in MiniMaxM1(config).named_parameters()}
    total = sum(sizes.values())
    experts = sum(n for name, n in sizes.items() if name.endswith((".w1", ".w2", ".w3")))
    embedding, head = sizes["embed_tokens.weight"], sizes["lm_head.weight"]
    chosen = experts * config.num_experts_per_tok // config.num_local_experts
    active = total - embedding - head - experts + chosen  # of M1: the published 45.9 B
    counts = dict(total=total, active=active, active_with_head=active + head)
    return counts | dict(embedding=embedding, head=head, experts=experts)


# ============================================================================
# 4. See it run
# ============================================================================


def rounded(n, base=1000):
    """Three digits and a unit, of FLOPs in steps of 1000 or of bytes in steps of 1024."""
    units = (" k M G T P" if base == 1000 else "B KiB MiB GiB TiB PiB").split(" ")
    power = next(i for i in range(len(units)) if n < 999.5 * base**i)
    return f"{n / base**power:.3g} {units[power]}"


def describe(model, context):
    """Print layers, parameters, memory and half-lives of a model (on the meta device as well)."""

    def line(what, amount, note):
        print(f"  {what:30}{amount:>18}   {note}")

    c, n, types = model.config, count_parameters(model.config), model.config.attn_type_list
    letters = "".join("LS"[kind] for kind in types)
    E, k = c.num_local_experts, c.num_experts_per_tok
    print(f"layers: L lightning attention, S softmax attention, each with {E} experts, {k} a token")
    print("  " + " ".join(letters[i : i + 8] for i in range(0, len(types), 8)))

    print("\nparameters")
    n["attention, routers, norms"] = n["total"] - n["experts"] - n["embedding"] - n["head"]
    for what, count in n.items():
        line(what.replace("_", " "), f"{count:,}", f"{count / n['total']:6.1%}")

    print(f"\nmemory of one sequence of {context:,} tokens (states fp32, keys and values bf16)")
    cached = model.new_cache(1, context).layers
    state = sum(x.nbytes for x in cached if not isinstance(x, tuple))
    kv = sum(t.nbytes for x in cached if isinstance(x, tuple) for t in x)
    S, L = sum(types), len(types)
    line(f"states, {L - S} lightning layers", rounded(state, 1024), "at any length")
    line(f"keys and values, {S} softmax", rounded(kv, 1024), f"{kv // context:,} B per token")
    line(f"... if all {L} were softmax", rounded(kv * L // S, 1024), "at this length")
    line("both alike at", f"{state * context // kv:,}", "tokens")

    print("\nhalf-life of what a lightning layer remembers, in tokens")
    print("  layer   fastest head   slowest head")
    lightning = [l for l, kind in enumerate(types) if kind == 0]
    shown = {lightning[min(i * len(lightning) // 4, len(lightning) - 1)] for i in range(5)}
    for l in sorted(shown):
        half_life = math.log(2) / decay_slopes(c.num_attention_heads, l, L)
        print(f"  {l:5}   {half_life.min():12.2g}   {half_life.max():12,.0f}")


@dataclass(frozen=True)
class Flags:
    """What to show."""

    preset: Literal["tiny", "small", "base", "m1"] = "tiny"
    """model size; m1 is the released one of 456 B"""
    context: int = 2**20
    """tokens in the sequence"""

    def __post_init__(self):
        check(self, context=(1, 10**9))


@command_line
def main(argv=None):
    """Print what a model consists of and what it remembers. No weights are allocated."""
    flags = parse(Flags, argv, main.__doc__)
    with torch.device("meta"):
        model = MiniMaxM1(M1Config.preset(flags.preset)).bfloat16()
    describe(model, flags.context)


if __name__ == "__main__":
    main()
