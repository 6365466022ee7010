"""Causal softmax attention: padded, packed, in pieces, one query.

    o_t = sum_s softmax_s(q_t k_s / sqrt(K)) v_s        over the keys s <= t of its own sequence

Query head h reads key and value head h // (H/J). Sequences are PyTorch's work. In a step of
generation, one query a row, all the time goes into reading the cache: a kernel of its own.

    1. Many queries     attend, attend_packed
    2. One query        attend_step, attend_step_torch (the slow twin)
    3. The kernel       shares of the keys, and their mean

Dimension key: B batch, L queries, H query heads, J key/value heads, G = H/J, K head width, S keys.
"""

import functools
import math

import torch
import torch.nn.functional as F

from lightning_attn import jit, tl, triton

# ============================================================================
# 1. Many queries
# ============================================================================


def attend(q, k, v, seen=None, most=2**25):
    """q (B, L, H, K), k, v (B, S, J, K) of one floating dtype -> (B, L, H, K). seen: first and last
    key of every query, (B, L) int64 each; None: the last query sees all keys, the one before one
    less, and so on (L < S needs has_flash). At most some `most` entries of a mask exist at a time.
    """
    (B, L), S = q.shape[:2], k.shape[1]
    if q.is_cuda and L == 1 and seen is not None:  # nothing is padded before it: first is 0
        return attend_step(q[:, 0], k, v, seen[1][:, 0])[:, None]
    if seen is None and L < S:  # a piece of a prompt
        ends = (torch.arange(0, B * n + 1, n, device=q.device).int() for n in (L, S))
        return _flash(*(x.flatten(0, 1) for x in (q, k, v)), *ends, L, S).view_as(q)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attention = functools.partial(F.scaled_dot_product_attention, enable_gqa=True)
    if seen is None:
        return attention(q, k, v, is_causal=True).transpose(1, 2)
    key, o, block = torch.arange(S, device=k.device), [], max(most // (B * S), 1)
    for part, first, last in zip(q.split(block, 2), *(x.split(block, 1) for x in seen)):
        visible = (first[..., None] <= key) & (key <= last[..., None])
        o.append(attention(part, k, v, visible[:, None]))
    return (o[0] if len(o) == 1 else torch.cat(o, 2)).transpose(1, 2)


def attend_packed(q, k, v, cu_seqlens, longest):
    """The same for sequences along L, B = 1: their boundaries (N + 1,) int32, longest of them."""
    if has_flash(q):
        return _flash(q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest)[None]
    lengths = cu_seqlens.diff().tolist()
    sequences = zip(*(x.split(lengths, dim=1) for x in (q, k, v)))
    return torch.cat([attend(*qkv) for qkv in sequences], dim=1)


def has_flash(x):
    """Whether PyTorch's flash attention takes x, or a model's tensors."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def _flash(q, k, v, *ends_and_longest):
    """Causal attention inside packed sequences: q (T, H, K), k and v (S, J, K), boundaries of both,
    longest of both. The last query of a sequence sees all its keys, the one before one less.
    """
    from torch.nn.attention.varlen import varlen_attn  # imports a compiler: a second

    grouped = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__kwdefaults__ else {}  # 2.13
    return varlen_attn(q, k, v, *ends_and_longest, window_size=(-1, 0), **grouped)


# ============================================================================
# 2. One query
# ============================================================================


def attend_step(q, k, v, last):
    """One query a row, which sees keys 0 .. last; a last beyond S - 1 counts as S - 1.

    q (B, H, K), k, v (B, S, J, K) of one floating dtype, views of a cache, say; last (B,) int64 on
    their device. Returns (B, H, K). The kernel runs where it can (_has_kernel), else the twin. It
    reads a row's last + 1 keys, not S, once for all heads that share them, records no gradient and
    asks the device nothing: a CUDA graph can hold it. ValueError for shapes that do not fit.
    """
    (B, H, K), (S, J) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape != (B, S, J, K) or H % J or last.shape != (B,):
        found = ", ".join(str(tuple(x.shape)) for x in (q, k, v, last))
        raise ValueError(f"q (B, H, K), k, v (B, S, J, K), last (B,) do not fit: found {found}")
    return (_launch if _has_kernel(q, H // J) else attend_step_torch)(q, k, v, last)


def attend_step_torch(q, k, v, last):
    """attend_step in PyTorch: heads that share keys as queries, and a mask (B, S)."""
    visible = torch.arange(k.shape[1], device=k.device) <= last[:, None]
    q, k, v = q.unflatten(1, (k.shape[2], -1)), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, visible[:, None, None]).flatten(1, 2)


def _has_kernel(q, G):
    """On a GPU: bf16, fp16 or fp32, heads up to 256 wide, up to 128 sharing keys, no gradient."""
    fits = q.dtype in (torch.bfloat16, torch.float16, torch.float32) and 0 < q.numel()
    fits = fits and q.shape[-1] <= 256 and G <= 128 and not torch.is_grad_enabled()
    return fits and q.is_cuda and triton is not None


# ============================================================================
# 3. The kernel                                                 (flash decoding)
# ============================================================================
#
# A program takes the G query heads of one row that share keys, as a tile, and a share of the row's
# keys. With few rows there are several shares, or most of the GPU would idle: their means and sums
# wait in fp32 for a second launch, which joins them. Their number follows from shapes alone; their
# length, on the GPU, from that of the row.


def _n_splits(B, J, S, programs=264, least=128):
    """Two programs for each of an H100's 132 processors; 2 `least` keys are still one launch."""
    return 1 if S <= 2 * least else max(min(programs // (B * J), S // least), 1)


def _launch(q, k, v, last, splits=None, least=128, BN=None, warps=None, stages=3):
    """attend_step by the kernel: at least `least` keys to a share, BN (16 KiB) in a step."""
    (B, H, K), (S, J) = q.shape, k.shape[1:3]
    BK, BG = max(triton.next_power_of_2(K), 16), max(triton.next_power_of_2(H // J), 16)
    BN = BN or min(2**14 // (BK * q.element_size()), 128)
    splits = splits or _n_splits(B, J, S, least=least)
    q = q.contiguous()
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    part = sums = o = torch.empty_like(q)  # one share is the whole
    if splits > 1:
        shape = B * J, splits, H // J, K
        part, sums = (q.new_empty(x, dtype=torch.float32) for x in (shape, shape[:-1]))
    strides = [x.stride(dim) for x in (k, v) for dim in (0, 1, 2)]
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    fixed = math.log2(math.e) / math.sqrt(K), H // J, K, BG, BK, BN, least, splits > 1, precision
    how = dict(num_warps=warps or (4 if BG <= 32 else 8), num_stages=stages)
    with torch.cuda.device_of(q):
        _step_kernel[(B * J, splits)](q, k, v, part, sums, last, S, J, *strides, *fixed, **how)
        if splits > 1:
            fixed = H, H // J, K, BN, least, triton.next_power_of_2(splits), 16
            _join_kernel[(B * H, triton.cdiv(K, 16))](part, sums, o, last, S, splits, *fixed)
    return o


@jit
def _share(last, S, splits, BN: tl.constexpr, LEAST: tl.constexpr):
    """Keys of a row, and of each of its shares but the last."""
    n = tl.minimum(tl.load(last) + 1, S).to(tl.int32)
    return n, tl.cdiv(tl.maximum(tl.cdiv(n, splits), LEAST), BN) * BN


@jit
def _step_kernel(
    q, k, v, o, sums, last, S, J, k_row, k_key, k_head, v_row, v_key, v_head, SCALE: tl.constexpr,
    G: tl.constexpr, K: tl.constexpr, BG: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    LEAST: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One share of the keys of one row and key head: o (G, K) and, if SPLIT, log2 of its sum."""
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, j = (pid // J).to(tl.int64), pid % J
    n, share = _share(last + b, S, splits, BN, LEAST)
    begin = split * share
    n_mine = tl.minimum(n - begin, share)
    if n_mine <= 0:
        return  # a short row: _join_kernel does not look here
    begin, pid = begin.to(tl.int64), pid.to(tl.int64)
    k += b * k_row + j * k_head + begin * k_key
    v += b * v_row + j * v_head + begin * v_key
    ks, gs, ns = tl.arange(0, BK), tl.arange(0, BG), tl.arange(0, BN)
    at, mine = gs[:, None] * K + ks[None, :], (gs < G)[:, None] & (ks < K)[None, :]
    heads = tl.load(q + pid * G * K + at, mask=mine, other=0.0)
    top = tl.full([BG], float("-inf"), tl.float32)
    total, y = tl.zeros([BG], tl.float32), tl.zeros([BG, BK], tl.float32)
    for i in tl.range(0, n_mine, BN):
        here = i + ns < n_mine
        tile = here[:, None] & (ks < K)[None, :]
        keys = tl.load(k + ns[:, None] * k_key + ks[None, :], mask=tile, other=0.0)
        x = tl.dot(heads, tl.trans(keys), input_precision=PRECISION) * SCALE
        x = tl.where(here[None, :], x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        p, fade = tl.exp2(x - higher[:, None]), tl.exp2(top - higher)
        values = tl.load(v + ns[:, None] * v_key + ks[None, :], mask=tile, other=0.0)
        y = tl.dot(p.to(values.dtype), values, y * fade[:, None], input_precision=PRECISION)
        total, top = total * fade + tl.sum(p, 1), higher
        k += BN * k_key
        v += BN * v_key
    y /= total[:, None]
    if SPLIT:
        pid = pid * splits + split
        tl.store(sums + pid * G + gs, top + tl.log2(total), mask=gs < G)
    tl.store(o + pid * G * K + at, y.to(o.dtype.element_ty), mask=mine)


@jit
def _join_kernel(
    part, sums, o, last, S, splits, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr,
    BN: tl.constexpr, LEAST: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """BK columns of one query head: the mean of its shares, by their sums."""
    h = tl.program_id(0).to(tl.int64)
    ss, ks = tl.arange(0, BS), tl.program_id(1) * BK + tl.arange(0, BK)
    n, share = _share(last + h // H, S, splits, BN, LEAST)
    here = ss < tl.cdiv(n, share)
    at = (h // G * splits + ss) * G + h % G
    x = tl.load(sums + at, mask=here, other=float("-inf"))
    weight = tl.exp2(x - tl.max(x, 0))
    tile = here[:, None] & (ks < K)[None, :]
    y = tl.load(part + at[:, None] * K + ks[None, :], mask=tile, other=0.0)
    y = tl.sum(weight[:, None] * y, 0) / tl.sum(weight, 0)
    tl.store(o + h * K + ks, y.to(o.dtype.element_ty), mask=ks < K)
