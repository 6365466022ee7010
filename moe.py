"""Mixture of experts: the router, four forms of one product, and kernels for a step of generation.

All give the same; `loop` is the definition. On a GPU nothing waits for the device: rows are sorted
by expert, or, for the few tokens of a generation step, counted: sorting would cost a dozen launches
of almost no work, counting costs two. Such a step takes as long as reading its experts' weights.

    1. The layer                     MoE, SharedMLP
    2. Rows of experts, by sorting   plan, and the products over rows: for any number of tokens
    3. Rows of experts, by counting  route: logits, best k, weights and plan (Triton)
    4. The experts of a step         step_experts: products that read weights once (Triton)

Dimension key: B batch, L tokens, T = B * L, D width, E experts, F expert width, k experts a token.
A row is one choice of one token, T k in all.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

import parallel
from layers import Linear, iota, swiglu, widen
from lightning_attn import jit, tl, triton

constexpr = tl.constexpr

# ============================================================================
# 1. The layer
# ============================================================================


class Routing(NamedTuple):
    """What the router did in one layer, padding excluded."""

    loss: torch.Tensor  # E sum_e f_e P_e: k when balanced, up to E when collapsed on k experts
    load: torch.Tensor  # (E,) f_e: fraction of tokens that chose e, dropped or not; sums to k
    prob: torch.Tensor  # (E,) P_e: mean router probability


class MoE(nn.Module):
    """Top-k mixture of SwiGLU experts: out = sum_e weight_e w2_e(silu(w1_e x) * w3_e x).

    The router works in fp32: softmax over all E, top k, renormalised to sum 1. `form` names one of
    four methods or "auto", see best_form.
    """

    def __init__(self, config):
        super().__init__()
        D, E, F_ = config.hidden_size, config.num_local_experts, config.intermediate_size
        self.top_k, self.form = config.num_experts_per_tok, "auto"
        self.capacity = None  # a number drops tokens in passes without a cache, see within_capacity
        self.gate = Linear(D, E)
        # w2 is published as (D, F); this way the experts stack into one matrix
        self.w1, self.w3, self.w2 = (nn.Parameter(torch.empty(E, F_, D)) for _ in range(3))

    def forward(self, x, mask=None, with_routing=True):
        """x (B, L, D), mask (B, L) or None -> (B, L, D) and the Routing of real tokens, or None."""
        flat = x.flatten(0, 1)  # (T, D)
        form = self.best_form(flat)
        whole = not parallel.in_parts(self.w1)
        steps = form == "grouped_mm" and not with_routing and whole
        if steps and can_route(flat, len(self.gate.weight)):
            weight, rows = route(flat, self.gate.weight, self.top_k)
            matrices = (w.to(x.dtype) for w in (self.w1, self.w3, self.w2))
            return step_experts(flat, weight, rows, *matrices).view_as(x), None
        logits = widen(self.gate.weight) @ widen(flat).T  # (E, T): a CPU is slow at short rows
        probs = logits.softmax(0).T  # (T, E)
        weight, chosen = probs.topk(self.top_k, dim=-1)  # (T, k)
        weight = weight / weight.sum(-1, keepdim=True)
        if self.capacity and with_routing:
            weight = weight * self.within_capacity(chosen, mask)
        out = getattr(self, form) if whole else self.exchanged
        out = out(flat, weight.to(x.dtype), chosen)
        return out.view_as(x), self.routing(probs, chosen, mask) if with_routing else None

    def best_form(self, x):
        """`form`, or the fastest for x (T, D): on a GPU one that asks the device nothing."""
        if self.form != "auto":
            return self.form
        _, F_, D = self.w1.shape
        if x.is_cuda:
            aligned = x.dtype == torch.bfloat16 and D % 8 == 0 and F_ % 8 == 0
            return "grouped_mm" if aligned else "dense" if len(x) <= 2048 else "grouped"
        return "dense" if len(x) <= 512 and self.w1.numel() <= 2**17 else "grouped"

    def experts(self):
        """The matrices of the experts that this process holds: all, but for several processes."""
        return [parallel.own(w) for w in (self.w1, self.w3, self.w2)]

    def exchanged(self, x, weight, chosen):
        """Where several processes hold some experts each: rows go to theirs and come back."""
        token, place, ends = plan(chosen, len(self.w1))
        rows, expert, back = parallel.exchange(_Spread.apply(x, chosen, token, place), ends)
        form = self.best_form(rows) if len(rows) else "loop"  # kernels take no empty batch
        y = getattr(self, form)(rows, torch.ones_like(rows[:, :1]), expert[:, None])
        return _Summed.apply(back(y), weight, token, place)

    def loop(self, x, weight, chosen):
        """The definition, expert by expert. x (T, D), weight and chosen (T, k) -> (T, D)."""
        out = torch.zeros_like(x)
        for e, experts in enumerate(zip(*self.experts())):
            token, slot = (chosen == e).nonzero(as_tuple=True)
            w1, w3, w2 = (w.to(x.dtype) for w in experts)
            y = swiglu(x[token] @ w1.T, x[token] @ w3.T) @ w2
            out = out.index_add(0, token, y * weight[token, slot, None])
        return out

    def grouped(self, x, weight, chosen):
        """Choices sorted by expert, so that each expert's tokens are one slice."""
        matrices = [w.to(x.dtype) for w in self.experts()]
        order = chosen.flatten().argsort(stable=True)
        token = order // chosen.shape[1]
        counts = chosen.flatten().bincount(minlength=len(matrices[0])).tolist()
        slices = x.index_select(0, token).split(counts)
        experts = zip(slices, *(w.unbind() for w in matrices))
        y = torch.cat([swiglu(part @ w1.T, part @ w3.T) @ w2 for part, w1, w3, w2 in experts])
        y = y * weight.flatten().index_select(0, order)[:, None]
        return torch.zeros_like(x).index_add(0, token, y)

    def grouped_mm(self, x, weight, chosen):
        """`grouped` in three products; where an expert's rows end stays on the device."""
        experts = self.experts()
        return _Planned.apply(x, weight, *experts, *plan(chosen, len(experts[0])))

    def dense(self, x, weight, chosen):
        """Every expert on every token, as one wide expert: wasteful, but few large operations."""
        experts = self.experts()
        E, F_, D = experts[0].shape
        w1, w3, w2 = (w.to(x.dtype).view(-1, D) for w in experts)
        scale = torch.zeros(len(x), E, dtype=x.dtype, device=x.device).scatter(1, chosen, weight)
        hidden = swiglu(x @ w1.T, x @ w3.T)
        return (hidden.view(-1, E, F_) * scale[..., None]).view(-1, E * F_) @ w2

    def within_capacity(self, chosen, mask):
        """Token drop (MiniMax-01): which choices (T, k) their expert has room for, bool.

        An expert takes at most `capacity` (not published) times an even share, in the order of the
        batch: late rows lose first (ours). A dropped choice adds nothing; other weights stay.
        """
        E, choices = len(self.w1), chosen.flatten()
        hit = F.one_hot(choices, E)
        if mask is not None:
            hit = hit * mask.flatten().repeat_interleave(self.top_k)[:, None]
        place = hit.cumsum(0).gather(1, choices[:, None])  # 1 = the first to choose this expert
        return (place <= self.capacity * hit.sum() / E).view_as(chosen)

    def routing(self, probs, chosen, mask):
        """The load-balancing loss of one layer and its two factors (01 sec. 3). Of several
        processes each has its share of loss and prob; the load is that of all.
        """
        hit = torch.zeros_like(probs).scatter(1, chosen, 1.0)
        if mask is not None:
            probs, hit = probs[mask.flatten()], hit[mask.flatten()]
        hits, n = parallel.totals(hit.sum(0), len(hit) or 1e-9)  # without tokens 0, not nan
        load, prob = hits / n, probs.sum(0) / n
        return Routing(len(load) * (load * prob).sum(), load, prob)


class SharedMLP(nn.Module):
    """The shared expert of the released code: a SwiGLU of width intermediate_size. M1 has none."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


# ============================================================================
# 2. Rows of experts, by sorting
# ============================================================================


def plan(chosen, n_experts):
    """Choices (T, k) of experts, sorted by expert: (token, place, ends).

    token (T k,) int64: of every sorted row; place (T k,) int64: row of every choice; ends (E,)
    int32: where each expert's rows end. Nothing waits for the device.
    """
    choices, (T, k) = chosen.flatten(), chosen.shape
    order = choices.argsort(stable=True)
    ends = torch.searchsorted(choices[order], iota(n_experts, chosen.device), right=True).int()
    rows = torch.arange(T * k, device=chosen.device)
    place = torch.empty_like(order).scatter_(0, order, rows)
    return order // k, place, ends


class _Planned(torch.autograd.Function):
    """x (T, D), weight (T, k), the experts, and a plan -> (T, D).

    Kept for the backward pass is what products gave; rows, hidden values and weights in x's dtype
    are made again.
    """

    @staticmethod
    def forward(ctx, x, weight, w1, w3, w2, token, place, ends):
        product = functools.partial(F.grouped_mm, offs=ends)
        v1, v3, v2 = (w.to(x.dtype) for w in (w1, w3, w2))
        part = x.index_select(0, token)
        a, b = product(part, v1.mT), product(part, v3.mT)
        y = product(swiglu(a, b), v2)
        ctx.save_for_backward(x, weight, w1, w3, w2, token, place, ends, a, b, y)
        return sum_rows(y, place, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, w1, w3, w2, token, place, ends, a, b, y = ctx.saved_tensors
        product = functools.partial(F.grouped_mm, offs=ends)
        v1, v3, v2 = (w.to(x.dtype) for w in (w1, w3, w2))
        dy, d_weight = _summed_grads(grad, y, weight, token, place)
        with torch.enable_grad():
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            h = swiglu(a, b)
        da, db = torch.autograd.grad(h, (a, b), product(dy, v2.mT))
        part, h = x.index_select(0, token), h.detach()
        weights = product(da.mT, part), product(db.mT, part), product(h.mT, dy)
        d_part = product(da, v1) + product(db, v3)
        dx = sum_rows(d_part, place, torch.ones_like(weight))
        d_experts = (d.to(w.dtype) for d, w in zip(weights, (w1, w3, w2)))
        return dx, d_weight, *d_experts, None, None, None


class _Spread(torch.autograd.Function):
    """x (T, D) -> rows (T k, D); the sum that goes back has one order, and no atomic additions."""

    @staticmethod
    def forward(ctx, x, chosen, token, place):
        ctx.place = place.view_as(chosen)
        return x.index_select(0, token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ones = torch.ones_like(ctx.place, dtype=grad.dtype)
        return sum_rows(grad.contiguous(), ctx.place.flatten(), ones), None, None, None


class _Summed(torch.autograd.Function):
    """Rows y (T k, D), weight (T, k) -> (T, D)."""

    @staticmethod
    def forward(ctx, y, weight, token, place):
        y = parallel.arrived(y)
        ctx.save_for_backward(y, weight, token, place)
        return sum_rows(y, place, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_summed_grads(grad, *ctx.saved_tensors), None, None


def _summed_grads(grad, y, weight, token, place):
    """Gradients of sum_rows(y, place, weight) for y and weight."""
    parts = y.index_select(0, place).view(*weight.shape, y.shape[1])
    row_weight = torch.empty_like(weight).flatten().scatter_(0, place, weight.flatten())
    dy = grad.index_select(0, token) * row_weight[:, None].to(y.dtype)
    return dy, (parts * grad[:, None]).sum(-1).to(weight.dtype)


def sum_rows(y, place, weight, dtype=None):
    """Rows `place` (T k,) of y, times weight (T, k), summed over k: (T, D); on a GPU in fp32.

    y (T k, D), or (T k, S, D) to be summed over S, too. dtype: of the sum; None = y's.
    """
    (T, k), D = weight.shape, y.shape[-1]
    if triton is None or not (y.is_cuda or y.ndim == 3) or y.dtype == torch.float64:
        return (y.index_select(0, place).view(T, k, D) * weight[..., None].to(y.dtype)).sum(1)
    out = torch.empty(T, D, dtype=dtype or y.dtype, device=y.device)
    S = y.shape[1] if y.ndim == 3 else 1
    with torch.cuda.device_of(y):
        _sum_rows[(T, triton.cdiv(D, 1024))](y, place, weight, out, D, k, S, 1024)
    return out


@jit
def _sum_rows(y, place, weight, out, D, K: constexpr, S: constexpr, BD: constexpr):
    """1,024 columns of one token."""
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([BD], dtype=tl.float32)
    for j in tl.static_range(K):
        row, share = tl.load(place + t * K + j), tl.load(weight + t * K + j)
        for s in tl.static_range(S):
            part = tl.load(y + (row * S + s) * D + d, mask=d < D, other=0.0).to(tl.float32)
            total += share * part
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=d < D)


# ============================================================================
# 3. Rows of experts, by counting
# ============================================================================

MOST = 2**13  # entries of the (tokens, experts) table, which one program holds


def can_route(x, n_experts):
    """Whether `route` serves x (T, D)."""
    able = triton is not None and (x.is_cuda or not isinstance(_route, triton.JITFunction))
    size = triton.next_power_of_2(len(x)) * triton.next_power_of_2(n_experts) if able else 0
    return able and size <= MOST and len(x) <= FEW and not torch.is_grad_enabled()


def route(x, gate, k):
    """x (T, D), gate (E, D) -> weight (T, k) fp32 and the plan of its k best experts.

    Logits in fp32; the weights are the softmax over all experts, of the best k, made to sum to 1,
    which is the softmax over those k. Not differentiable.
    """
    (T, D), E = x.shape, len(gate)
    new = functools.partial(torch.empty, device=x.device)
    logits, weight = new(T, E, dtype=torch.float32), new(T, k, dtype=torch.float32)
    token, place = (new(T * k, dtype=torch.int64) for _ in range(2))
    ends = new(E, dtype=torch.int32)
    BT, BE = triton.next_power_of_2(T), triton.next_power_of_2(E)
    few, BD = min(BE, 4), min(triton.next_power_of_2(D), 2048)
    with torch.cuda.device_of(x):
        _logits[(T, triton.cdiv(E, few))](x, gate, logits, D, E, few, BD)
        _route[(1,)](logits, weight, token, place, ends, T, E, k, BT, BE, num_warps=8)
    return weight, (token, place, ends)


@jit
def _logits(x, gate, logits, D, E, BE: constexpr, BD: constexpr):
    """One token: its product with BE rows of the gate."""
    t, e = tl.program_id(0).to(tl.int64), tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.zeros([BE], dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        row = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        inside = (e < E)[:, None] & (d < D)[None, :]
        tile = tl.load(gate + e[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(tile * row[None, :], 1)
    tl.store(logits + t * E + e, total, mask=e < E)


@jit
def _route(logits, weight, token, place, ends, T, E, K: constexpr, BT: constexpr, BE: constexpr):
    """All tokens in one program: the best k of every row, then the rows of every expert."""
    t, e = tl.arange(0, BT), tl.arange(0, BE)
    inside = (t < T)[:, None] & (e < E)[None, :]
    scores = tl.load(logits + t[:, None] * E + e[None, :], mask=inside, other=0.0)
    scores = tl.where(scores > -3e38, scores, -3e38)  # also nan: an expert is taken once at most
    scores = tl.where(inside, scores, -float("inf"))
    best, total = tl.where(t < T, tl.max(scores, 1), 0.0), tl.zeros([BT], dtype=tl.float32)
    left, hits = scores, tl.zeros([BT, BE], dtype=tl.int32)
    for _ in tl.static_range(K):
        hit = e[None, :] == tl.argmax(left, 1)[:, None]
        total += tl.exp(tl.max(left, 1) - best)
        left = tl.where(hit, -float("inf"), left)
        hits += (hit & (t < T)[:, None]).to(tl.int32)
    rows = tl.sum(hits, 0)
    end = tl.cumsum(rows, 0)
    row = tl.cumsum(hits, 0) - hits + (end - rows)[None, :]  # tokens in their order
    tl.store(ends + e, end, mask=e < E)
    left = scores
    for j in tl.static_range(K):
        hit = e[None, :] == tl.argmax(left, 1)[:, None]
        share = tl.exp(tl.max(left, 1) - best) / tl.where(t < T, total, 1.0)
        left = tl.where(hit, -float("inf"), left)
        at = tl.sum(tl.where(hit, row, 0), 1)
        tl.store(weight + t * K + j, share, mask=t < T)
        tl.store(place + t * K + j, at.to(tl.int64), mask=t < T)
        tl.store(token + at, t.to(tl.int64), mask=t < T)


# ============================================================================
# 4. The experts of a step
# ============================================================================

FEW = 1024  # tokens: for more, three F.grouped_mm

# Rows of an expert are cut into blocks of BM; a program multiplies one block with one tile of the
# expert's matrix. Blocks are the grid's first axis, so that a second block of an expert finds the
# tile in the L2 cache. Tokens are the columns of a product, not its rows: a matrix instruction
# takes 64 rows but as few as 8 columns. Every sum has one order: equal inputs, equal outputs.


def step_experts(x, weight, rows, w1, w3, w2):
    """The experts of rows (see plan) in three launches, without gradients: for few tokens."""
    n, (E, F_, D), deep = len(rows[0]), w1.shape, 128 // x.element_size()
    BM = min(max(16, triton.next_power_of_2(2 * n // E)), 128)  # so most experts have one block
    tiles = most_blocks(n, E, BM) * triton.cdiv(D, 64)
    S = max(1, min(512 // tiles, F_ // 128, 16))  # few tiles would leave processors idle
    how = dict(num_stages=4, num_warps=8 if BM == 128 else 4)
    h = hidden(x, rows, w1, w3, BM, 64, deep, **how)
    y = outputs(h, rows, w2, BM, deep, 64, S, **how)
    return sum_rows(y, rows[1], weight, x.dtype)


def most_blocks(n, E, BM):
    """How many n rows can need; experts without rows have none."""
    return min(n, E) + max(0, n - E) // BM


def hidden(x, rows, w1, w3, BM, BF, BD, **how):
    """silu(w1 x) * w3 x of every row: (T k, F)."""
    (token, _, ends), (E, F_, D) = rows, w1.shape
    h = torch.empty(len(token), F_, dtype=x.dtype, device=x.device)
    grid = most_blocks(len(h), E, BM), triton.cdiv(F_, BF)
    with torch.cuda.device_of(x):
        _hidden[grid](x, token, ends, w1, w3, h, F_, D, E, BM, BF, BD, **how)
    return h


def outputs(h, rows, w2, BM, BF, BD, S, **how):
    """w2 h of every row, in S parts to be summed: (T k, S, D) fp32."""
    E, F_, D = w2.shape
    y = torch.empty(len(h), S, D, dtype=torch.float32, device=h.device)
    grid, part = (most_blocks(len(h), E, BM), triton.cdiv(D, BD), S), triton.cdiv(F_, S * BF) * BF
    with torch.cuda.device_of(h):
        _outputs[grid](h, rows[2], w2, y, part, F_, D, E, BM, BF, BD, **how)
    return y


@jit
def _hidden(
    x, token, ends, w1, w3, h, F, D, E: constexpr, BM: constexpr, BF: constexpr, BD: constexpr
):
    """BF hidden numbers of every row of a block."""
    e, row, end = _block(ends, tl.program_id(0), E, BM)
    if row >= end:
        return
    m, f = row + tl.arange(0, BM), tl.program_id(1) * BF + tl.arange(0, BF)
    x += tl.load(token + m, mask=m < end, other=0)[None, :] * D
    a, b = tl.zeros([BF, BM], dtype=tl.float32), tl.zeros([BF, BM], dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        tokens = tl.load(x + d[:, None], mask=(d < D)[:, None] & (m < end)[None, :], other=0.0)
        tile, inside = f[:, None] * D + d[None, :], (f < F)[:, None] & (d < D)[None, :]
        a = tl.dot(tl.load(w1 + e * F * D + tile, mask=inside, other=0.0), tokens, a, "ieee")
        b = tl.dot(tl.load(w3 + e * F * D + tile, mask=inside, other=0.0), tokens, b, "ieee")
    y, inside = a * tl.sigmoid(a) * b, (f < F)[:, None] & (m < end)[None, :]
    tl.store(h + m.to(tl.int64)[None, :] * F + f[:, None], y.to(h.dtype.element_ty), mask=inside)


@jit
def _outputs(h, ends, w2, y, part, F, D, E: constexpr, BM: constexpr, BF: constexpr, BD: constexpr):
    """BD outputs of every row of a block, summed over `part` of its hidden numbers."""
    e, row, end = _block(ends, tl.program_id(0), E, BM)
    if row >= end:
        return
    m, d = (row + tl.arange(0, BM)).to(tl.int64), tl.program_id(1) * BD + tl.arange(0, BD)
    s, total = tl.program_id(2), tl.zeros([BD, BM], dtype=tl.float32)
    for start in range(s * part, (s + 1) * part, BF):
        f = start + tl.arange(0, BF)
        inside = (f < F)[:, None] & (m < end)[None, :]
        tokens = tl.load(h + m[None, :] * F + f[:, None], mask=inside, other=0.0)
        tile, inside = f[None, :] * D + d[:, None], (f < F)[None, :] & (d < D)[:, None]
        matrix = tl.load(w2 + e * F * D + tile, mask=inside, other=0.0)
        total = tl.dot(matrix, tokens, total, "ieee")
    y += (m * tl.num_programs(2) + s)[None, :] * D + d[:, None]
    tl.store(y, total, mask=(d < D)[:, None] & (m < end)[None, :])


@jit
def _block(ends, block, E: constexpr, BM: constexpr):
    """A block's expert (int64), first row and the end of its expert's rows; 0, 0, 0 if empty."""
    e = tl.arange(0, triton.next_power_of_2(E))
    end = tl.load(ends + e, mask=e < E, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    n = (end - begin + BM - 1) // BM
    past = tl.cumsum(n, 0)
    here = (past - n <= block) & (block < past)
    row = begin + (block - past + n) * BM
    e, row = tl.sum(tl.where(here, e, 0), 0).to(tl.int64), tl.sum(tl.where(here, row, 0), 0)
    return e, row, tl.sum(tl.where(here, end, 0), 0)
