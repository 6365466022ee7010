"""Which experts a token gets, and where its rows go, for few tokens: two launches on a GPU.

A step of generation has few tokens, so that sorting them by expert costs a dozen launches of
almost no work. Here they are counted instead: one kernel makes the router's logits, one the rest.

    1. By sorting        plan: for any number of tokens, differentiable beside it
    2. By counting       route: top k, weights and plan (Triton)

Dimension key: T tokens, D width, E experts, k experts per token.
"""

import functools

import torch

from lightning_attn import _jit, tl, triton

# ============================================================================
# 1. By sorting
# ============================================================================


@functools.cache
def iota(n, device):
    """0 .. n - 1, made once."""
    return torch.arange(n, device=device)


def plan(chosen, n_experts):
    """Choices (T, k) of experts, sorted by expert: (token, place, ends).

    token (T k,) int64: of every sorted row; place (T k,) int64: row of every choice; ends (E,)
    int32: where each expert's rows end. Nothing waits for the device.
    """
    choices, (T, k) = chosen.flatten(), chosen.shape
    order = choices.argsort(stable=True)
    ends = torch.searchsorted(choices[order], iota(n_experts, chosen.device), right=True).int()
    place = torch.empty_like(order).scatter_(0, order, iota(T * k, chosen.device))
    return order // k, place, ends


# ============================================================================
# 2. By counting
# ============================================================================

MOST = 2**14  # entries of the (tokens, experts) table, which one program holds


def can_route(x, n_experts):
    """Whether `route` serves x (T, D)."""
    able = triton is not None and (x.is_cuda or not isinstance(_route, triton.JITFunction))
    size = triton.next_power_of_2(len(x)) * triton.next_power_of_2(n_experts) if able else 0
    return able and size <= MOST and not torch.is_grad_enabled()


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
    _logits[(T, triton.cdiv(E, few))](x, gate, logits, D, E, few, BD)
    _route[(1,)](logits, weight, token, place, ends, T, E, k, BT, BE, num_warps=8)
    return weight, (token, place, ends)


@_jit
def _logits(x, gate, logits, D, E, BE: tl.constexpr, BD: tl.constexpr):
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


@_jit
def _route(
    logits, weight, token, place, ends, T, E, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):
    """All tokens in one program: the best k of every row, then the rows of every expert."""
    t, e = tl.arange(0, BT), tl.arange(0, BE)
    inside = (t < T)[:, None] & (e < E)[None, :]
    scores = tl.load(logits + t[:, None] * E + e[None, :], mask=inside, other=-float("inf"))
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
        share = tl.exp(tl.max(left, 1) - best) / total
        left = tl.where(hit, -float("inf"), left)
        at = tl.sum(tl.where(hit, row, 0), 1)
        tl.store(weight + t * K + j, share, mask=t < T)
        tl.store(place + t * K + j, at.to(tl.int64), mask=t < T)
        tl.store(token + at, t.to(tl.int64), mask=t < T)
