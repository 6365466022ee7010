"""Lightning attention: causal linear attention with one fixed decay per head, in forms that agree.

    S_t = lam S_{t-1} + k_t v_t^T        o_t = q_t S_t        lam = exp(-slope), one per head

There is no softmax, no 1/sqrt(K), no rope and no denominator; the current token is not decayed. The
state S has a fixed size, so a token costs the same at position 10 and at position 1,000,000.
Sources: MiniMax-01 report sec. 2.2 (arXiv:2501.08313); "released" = the published M1 model code.

    1. Decay rates        decay_slopes
    2. The definition     lightning_recurrent  one token at a time, O(L) but a Python loop
    3. The readable form  lightning_quadratic  one masked L x L product, as attention is often drawn
    4. The fast form      lightning_chunk      both: products inside a chunk, a state between chunks
    5. The kernel         lightning_kernel     the same as one Triton kernel for o, dq, dk and dv
    6. Generation         lightning_step       one token, state updated in place
    7. The door           lightning_attention  checks, packing, choice of form
    8. See it run         main                 error and time of every form, what M1 remembers

The kernel without a GPU: TRITON_INTERPRET=1 python lightning_attn.py runs it line by line in Python
(slow; pdb works). Triton reads that variable when kernels are defined, so before the import.

Dimension key: B batch, L tokens, H heads, K key width, V value width, C chunk, N packed sequences.
Numerics: states and sums are fp32 (fp64 for fp64 inputs). The PyTorch forms make their decay tables
in float64 and cast. Only non-negative powers of lam < 1 are formed, so nothing overflows however
steep the slope or long the text.
"""

import argparse
import functools
import math
import timeit
import types

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    jit = triton.jit
except ImportError:  # no Linux: the PyTorch forms serve
    triton, tl, jit = None, types.SimpleNamespace(constexpr=None), lambda kernel, **how: kernel

# ============================================================================
# 1. Decay rates                                   (released; ALiBi's geometric series)
# ============================================================================


def decay_slopes(n_heads, layer, n_layers, device="cpu"):
    """Decay rate of every head in one layer: lam = exp(-slope).

        slope_h = 2^(-8 (h+1) / H) * (1 - layer / (n_layers - 1) + 1e-5)

    The first head forgets fastest; later layers forget more slowly. `layer` counts all layers,
    softmax ones too. When H is no power of two, with c the largest power of two below it: the c
    slopes of c heads, then every second slope of 2c heads. Returns (H,) fp32. Source: released.
    (In the papers on lightning attention slopes are linear in the head index.)
    """
    if n_heads < 1 or not 0 <= layer < n_layers:
        found = f"{n_heads}, {layer}, {n_layers}"
        raise ValueError(f"decay_slopes needs n_heads >= 1 and 0 <= layer < n_layers, got {found}")

    def geometric(n):
        return [2.0 ** (-8 * (h + 1) / n) for h in range(n)]

    c = 2 ** (n_heads.bit_length() - 1)  # largest power of two <= n_heads
    slopes = geometric(c) + geometric(2 * c)[0::2][: n_heads - c]
    factor = 1 - layer / max(n_layers - 1, 1) + 1e-5
    return torch.tensor([s * factor for s in slopes], dtype=torch.float32, device=device)


def _accumulator(dtype):
    """The dtype of states and sums, of thousands of terms: fp64 for fp64 inputs, otherwise fp32."""
    return torch.promote_types(dtype, torch.float32)


def _forget(slope, n_tokens, dtype):
    """1 - lam^n, shaped (H, 1, 1) to act on a state.

    States are updated as S + (new - forget * S), not as lam * S + new. The two are equal in exact
    arithmetic, but fp32 holds lam = 1 - 5e-5 (M1's slowest head) only to 1e-8, an error that all
    tokens share and that grows to 2e-4 over that head's memory, whereas it holds 5e-5 to 3e-12.
    """
    return -torch.expm1(-slope.double() * n_tokens).to(dtype)[:, None, None]


# ============================================================================
# 2. The definition
# ============================================================================


def _sums_stay_wide(form):
    """Decorator of the forms in PyTorch: checks their inputs, and autocast changes nothing."""

    @functools.wraps(form)
    def wrapped(q, k, v, slope, state=None, **how):
        _check_inputs(q, k, v, slope)
        _check_state(state, q, v, q.shape[0])
        with torch.autocast(q.device.type, enabled=False):
            return form(q, k, v, slope, state, **how)

    return wrapped


@_sums_stay_wide
def lightning_recurrent(q, k, v, slope, state=None):
    """Causal linear attention with per-head decay, one token at a time: the definition.

        S_t = exp(-slope) S_{t-1} + k_t v_t^T        o_t = q_t S_t

    q, k (B, L, H, K), v (B, L, H, V), slope (H,) > 0, state (B, H, K, V) or None for zeros.
    Returns o (B, L, H, V) in q's dtype and the last state in fp32 (fp64 for fp64 inputs). O(L K V)
    time and O(K V) memory per head. Every other form in this file is tested against this one.
    """
    dtype, acc = q.dtype, _accumulator(q.dtype)
    q, k, v = q.to(acc), k.to(acc), v.to(acc)
    B, L, H, K = q.shape
    state = q.new_zeros(B, H, K, v.shape[-1]) if state is None else state.to(acc)
    forget = _forget(slope, 1, acc)
    o = []
    for t in range(L):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        state = state + (kv - forget * state)
        o.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return (torch.stack(o, 1) if o else torch.zeros_like(v)).to(dtype), state


# ============================================================================
# 3. The readable form
# ============================================================================


@_sums_stay_wide
def lightning_quadratic(q, k, v, slope, state=None):
    """The same function as one masked product, for reading: a decay in place of the softmax.

        O = [(Q K^T) * M] V + diag(lam^1 .. lam^L) Q S        M_ij = lam^(i-j) for i >= j, else 0

    Arguments and results as in lightning_recurrent. O(L^2) time and memory.
    """
    dtype, acc = q.dtype, _accumulator(q.dtype)
    q, k, v = (x.to(acc).transpose(1, 2) for x in (q, k, v))  # (B, H, L, .)
    L, rate = q.shape[2], slope.double()[:, None, None]
    t = torch.arange(L, device=q.device)
    mask = torch.exp(-rate * (t[:, None] - t).clamp(min=0)).tril().to(acc)  # (H, L, L)
    o = (q @ k.mT * mask) @ v
    last = (k * torch.exp(-rate * (L - 1 - t)[:, None]).to(acc)).mT @ v
    if state is not None:
        o = o + torch.exp(-rate * (t + 1)[:, None]).to(acc) * (q @ state.to(acc))
        last = last + (1 - _forget(slope, L, acc)) * state.to(acc)
    return o.transpose(1, 2).to(dtype), last


# ============================================================================
# 4. The fast form                                             (MiniMax-01 sec. 2.2)
# ============================================================================


@_sums_stay_wide
def lightning_chunk(q, k, v, slope, state=None, chunk=64):
    """The same function chunk by chunk: quadratic inside C tokens, a state carries what is older.

        m tokens r = 1..m of one chunk (m = C, or less in the last one), S the state before it:
        inside   o_r  = sum_{j<=r} lam^(r-j) (q_r . k_j) v_j        one (m, m) product under a mask
        older    o_r += lam^r q_r S
        state    S    = lam^m S + sum_j lam^(m-j) k_j v_j^T

    Arguments and results as in lightning_recurrent. Differentiable. O(L (C + K) V) time per head.
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"a chunk must have at least 1 token, found {chunk!r}")
    dtype, acc = q.dtype, _accumulator(q.dtype)
    q, k, v = (x.to(acc).transpose(1, 2) for x in (q, k, v))  # (B, H, L, .)
    C = max(min(chunk, q.shape[2]), 1)
    state = None if state is None else state.to(acc)

    steps = torch.arange(C + 1, device=q.device)
    power = torch.exp(-slope.double()[:, None] * steps).to(acc)  # (H, C + 1): lam^0 .. lam^C
    inside = power[:, (steps[1:, None] - steps[1:]).clamp(min=0)].tril()  # (H, C, C)
    older = power[:, 1:, None]  # (H, C, 1): lam^r
    tail = power[:, :C].flip(1)[..., None]  # (H, C, 1): lam^(C-r); its last m rows are lam^(m-j)

    o = []
    whole = q.shape[2] == C  # one chunk: split would cost a copy back
    chunks = [(q, k, v)] if whole else zip(*(x.split(C, dim=2) for x in (q, k, v)))
    for qc, kc, vc in chunks:
        m = qc.shape[2]
        oc = (qc @ kc.mT * inside[:, :m, :m]) @ vc
        kv = (kc * tail[:, C - m :]).mT @ vc
        if state is None:
            state = kv
        else:
            oc = oc + older[:, :m] * (qc @ state)
            state = state + (kv - _forget(slope, m, acc) * state)
        o.append(oc)
    return (o[0] if len(o) == 1 else torch.cat(o, 2)).transpose(1, 2).to(dtype), state


# ============================================================================
# 5. The kernel                                            (Triton; MiniMax-01 sec. 2.2.2, ours)
# ============================================================================
#
# One function gives the output and all three gradients:
#
#     scan(a, b, c)_t = sum_{j<=t} lam^(t-j) (a_t . b_j) c_j         reversed in time: sum_{j>=t}
#
#     o = scan(q, k, v)                dq = scan(do, v, k)
#     dk = reversed scan(v, do, q)     dv = reversed scan(k, q, do)
#
# so one kernel serves all four (a launch for o, one for dq, one for dk and dv), and backward needs
# nothing but the inputs. A program owns one head of one sequence and BV of the V columns of c, and
# walks along the tokens chunk by chunk. Its state S^T (BV, K) fp32 stays in registers; tiles of a,
# b and c come in ahead of their use (copy engine, STAGES deep), o goes out, nothing else moves.
# Where programs are fewer than processors, the length is cut into segments: a first launch
# computes what each adds to the state, the second begins every segment at the sum of what came
# before (see _plan).
# u = 0..C-1 counts tokens of a chunk in the direction of the walk; R = 0 (forward) or 1 (reversed):
#
#     inside   P^T    = (b a^T) * M          M_ju = lam^(u-j) for j <= u, else 0
#     older    o^T    = (S^T a^T) lam^(u+1-R)
#     both     o^T   += c^T P^T
#     state    S^T    = lam^C S^T + (c lam^(C-1-u+R))^T b
#
# R is the only trace of the direction: o_t sees its own token undecayed and the state one step
# older; in reverse the step lies on the other side. Everything is transposed so that S^T and c^T
# lam^.. go from the registers where they were made into the next product: the usual way round, both
# pass through shared memory once more a chunk.
#
# Bytes per token and head (bf16): 2 (2K + 2V), each input once from memory, each output once. a and
# b are read by V / BV programs at the same time; the L2 cache serves all but the first. FLOPs:
# 2 C (K + V) + 4 K V, K-products V / BV times. Backward reads three inputs in each of three scans,
# 9 + 3 tensors where 4 + 3 would do; dk and dv, in one launch, share q and do.
#
# What each idea bought, times the time that memory needs, bf16:
#
#     (B, L, H, D) = (1, 8192, 64, 128), but batch 8 in the third      forward   both   both, B = 8
#                                                                        H200    H100    H100
#     pointers, cp.async 4 deep                                           1.56
#     copy engine, (B, L, H, V) tiles                                     1.50
#     copy engine, flat (B L, H V) tiles                                  1.39
#     S^T from the registers, transposed throughout                       1.33
#     c^T lam^.. from the registers, too (the product of zeros below)     1.26
#     dk and dv on two streams                                                    1.31   1.54
#     dk and dv in one launch, their programs in turn                             1.29   1.36
#     all columns of a head in one program of 8 warps, where heads abound                1.33
#
# Forward and dq wait for memory (3.8 to 4.1 tensors' time for 4, H100); dk and dv take 6.2 to 7.4
# for 6: the longer the text, the further their programs drift apart and the less they share.
# Tried: this loop in Gluon, three products in flight, gives 6.0 to 6.2 there and nothing elsewhere.
# Tried: all gradients in one launch of that loop, dq from states that forward keeps every 512
# tokens: both 1.22 instead of 1.30 at batch 8, but 1.36 instead of 1.37 at 32,768 tokens, 1.34
# instead of 1.26 at 8,192, for 430 lines more; in Triton 1.66, as an `if` in the loop costs much.
# Where tensors lie matters: those of 32,768 tokens in one block of memory take 1.30 forward.


@functools.partial(jit, do_not_specialize=["L"])  # or it is compiled for odd and even L
def _scan_kernel(
    a, b, c, o, o_ptr, step_a, step_b, step_c, a2, b2, c2, o2, o2_ptr, step_a2, step_b2, step_c2,
    local, slope, first, last, cu_seqlens, L, H, segment, n_segments,
    FLIP: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """o = scan(a, b, c) of one head, BV columns of c and one segment.

    a, b (B, L, H, K), c, o (B, L, H, V): descriptors. o_ptr: o again, for masked stores. step_*:
    elements between heads. first, last (N, H, K, V), but (N, H, V, K) with FLIP, and then no last
    is stored. OUTPUT False: no o, only `local` (N, segments, H, 2, V, K), what each segment adds to
    the state, at 1 with FLIP. a2 and so on: None, or a second scan beside the first, not flipped,
    of the transposed state: each finds in the L2 cache what the other has read.
    """
    if EARLY and not OUTPUT:
        tl.extra.cuda.gdc_launch_dependents()  # the launch with OUTPUT may take what room is left
    n_v, flip = tl.cdiv(V, BV), FLIP
    pid, v0 = tl.program_id(0) // n_v, tl.program_id(0) % n_v * BV
    if a2 is not None:
        pid, flip = (pid // 2, pid % 2 == 0) if OUTPUT else (pid, False)
        if flip == 0:  # tensors are chosen: two branches would take the shared memory of both
            a, b, c, o, o_ptr = a2, b2, c2, o2, o2_ptr
            step_a, step_b, step_c = step_a2, step_b2, step_c2
    BK: tl.constexpr = triton.next_power_of_2(K)
    h, g, n = pid % H, pid // H % n_segments, pid // (H * n_segments)
    row, start, n_tokens = _sequence(cu_seqlens, n, L)
    begin = g * segment  # counted in the direction of the walk
    m_segment = tl.maximum(tl.minimum(segment, n_tokens - begin), 0)
    if not OUTPUT:
        m_segment = tl.where(g < n_segments - 1, m_segment, 0)  # nobody asks for the last state

    rate, r = tl.load(slope + h), tl.arange(0, C)
    rate2 = rate * 1.4426950408889634  # exp(-rate n) = exp2(-rate2 n)
    u = tl.where(REVERSE, C - 1 - r, r)
    mask, read, write = _tables(rate2, u, REVERSE, BV, C, FLAT)
    forget = _forget_kernel(rate, C)

    # The state at the head of the segment.
    vs, ks = v0 + tl.arange(0, BV)[:, None], tl.arange(0, BK)[None, :]
    inside = (vs < V) & (ks < K)
    at_state = tl.where(flip, ks + vs * K, ks * V + vs)
    S = tl.zeros([BV, BK], dtype=tl.float32)
    at_local = (2 * pid + flip).to(tl.int64) * K * V
    if OUTPUT:
        if first is not None:
            S = tl.load(first + (n * H + h).to(tl.int64) * K * V + at_state, mask=inside, other=0.0)
        if EARLY:  # all but `local` was whole before its launch began; nothing is written before it
            tl.extra.cuda.gdc_wait()
        if local is not None:
            own = local + at_local
            S = _add_segments(S, own, g, rate, segment, H, K, V, vs, ks, inside, STAGES)

    # The first chunk takes what whole chunks leave over, m < C tokens; other rows count as zeros.
    m = m_segment % C
    if m > 0:
        t = start + tl.where(REVERSE, n_tokens - C - begin, begin)
        real = u < m
        bt = tl.where(real[:, None], _tile(b, row, t, h, 0, L, step_b, C, BK, FLAT), 0.0)
        ct = tl.where(real[:, None], _tile(c, row, t, h, v0, L, step_c, C, BV, FLAT), 0.0)
        at = bt  # not read without OUTPUT
        if OUTPUT:
            at = tl.where(real[:, None], _tile(a, row, t, h, 0, L, step_a, C, BK, FLAT), 0.0)
        few = tl.where(real, tl.exp2(-rate2 * tl.maximum(m - 1 - u + REVERSE, 0)), 0.0)[None, :]
        S, y = _chunk(S, at, bt, ct, mask, read, few, _forget_kernel(rate, m), OUTPUT, PRECISION)
        if OUTPUT:
            at_o = (row * L + t + r).to(tl.int64)[None, :] * (H * V) + h * V + vs
            tl.store(o_ptr + at_o, y, mask=real[None, :] & (vs < V))

    # Whole chunks.
    for i in tl.range(0, m_segment // C, num_stages=STAGES):
        x = begin + m + i * C
        t = start + tl.where(REVERSE, n_tokens - C - x, x)
        bt = _tile(b, row, t, h, 0, L, step_b, C, BK, FLAT)
        ct = _tile(c, row, t, h, v0, L, step_c, C, BV, FLAT)
        at = bt  # not read without OUTPUT
        if OUTPUT:
            at = _tile(a, row, t, h, 0, L, step_a, C, BK, FLAT)
        S, y = _chunk(S, at, bt, ct, mask, read, write, forget, OUTPUT, PRECISION)
        if OUTPUT:
            if FLAT:
                o.store([row * L + t, h * V + v0], tl.trans(y))
            else:
                o.store([row, t, h, v0], tl.trans(y).reshape(1, C, 1, BV))

    if not OUTPUT:
        tl.store(local + at_local + vs * K + ks, S, mask=inside)
        if a2 is not None:
            tl.store(local + at_local + K * V + ks * V + vs, S, mask=inside)
    elif last is not None:
        ends = (begin + segment >= n_tokens) & ((begin < n_tokens) | (g == 0))
        if ends & (flip == 0):
            last += (n * H + h).to(tl.int64) * K * V
            tl.store(last + at_state, S, mask=inside)


@jit
def _sequence(cu_seqlens, n, L):
    """Sequence n: its row of the batch, its first token there, how many it has."""
    row, start, n_tokens = n, 0, L
    if cu_seqlens is not None:
        row, start = 0, tl.minimum(tl.maximum(tl.load(cu_seqlens + n), 0), L).to(tl.int32)
        n_tokens = tl.minimum(tl.load(cu_seqlens + n + 1), L).to(tl.int32) - start
    return row, start, n_tokens


@jit
def _tables(rate2, u, REVERSE: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, FLAT: tl.constexpr):
    """Decays inside of a chunk (j, u), of the older state (1, u), and of what is written (1, u)."""
    gap = u[None, :] - u[:, None]
    mask = tl.where(gap >= 0, tl.exp2(-rate2 * tl.maximum(gap, 0)), 0.0)
    read = tl.exp2(-rate2 * (u + 1 - REVERSE))[None, :]
    write = tl.exp2(-rate2 * (C - 1 - u + REVERSE))[None, :]
    if FLAT:  # adding zeros lays it out as tensor cores hold c^T lam^..: no trip to shared memory
        write += tl.dot(tl.zeros([BV, C], dtype=tl.bfloat16), tl.zeros([C, C], dtype=tl.bfloat16))
    return mask, read, write


@jit
def _add_segments(
    S, local, g, rate, segment, H, K: tl.constexpr, V: tl.constexpr, vs, ks, inside,
    STAGES: tl.constexpr,
):  # fmt: skip
    """S^T after segments 0 .. g - 1, each of which decays it and adds its own; local: where that of
    segment g lies. Later ones are on their way while the first are added.
    """
    forget_segment = _forget_kernel(rate, segment)
    for j in tl.range(-g, 0, num_stages=STAGES):
        added = local + j * (2 * H * K * V) + vs * K + ks
        S += tl.load(added, mask=inside, other=0.0) - forget_segment * S
    return S


@jit
def _chunk(S, a, b, c, mask, read, write, forget, OUTPUT: tl.constexpr, PRECISION: tl.constexpr):
    """One chunk: S^T (BV, K) after it and, if OUTPUT, o^T (BV, C), from a, b (C, K) and c (C, BV).

    With y before p nothing spills and a forward gains 2 %, but forward + backward at
    (8, 8192, 64, 128) loses 7 %.
    """
    ct = tl.trans(c)
    y = ct  # for want of an output
    if OUTPUT:
        p = tl.dot(b, tl.trans(a), input_precision=PRECISION) * mask
        y = tl.dot(S.to(a.dtype), tl.trans(a), input_precision=PRECISION) * read
    S -= forget * S  # before the last product, so that fewer values wait in registers
    S = tl.dot((ct * write).to(b.dtype), b, S, input_precision=PRECISION)
    if OUTPUT:
        y = tl.dot(ct, p.to(ct.dtype), y, input_precision=PRECISION).to(ct.dtype)
    return S, y


@jit
def _tile(x, row, t, h, column, L, step, C: tl.constexpr, W: tl.constexpr, FLAT: tl.constexpr):
    """(C, W) tile: tokens t .. t + C - 1 of one head, by the copy engine; zeros outside of x."""
    if FLAT:
        return x.load([row * L + t, h * step + column])
    else:
        return x.load([row, t, h, column]).reshape(C, W)


@jit
def _forget_kernel(rate, n_tokens):
    """1 - lam^n, see _forget: a scalar, in fp64 because lam is so close to 1."""
    return (1 - tl.exp(-rate.to(tl.float64) * n_tokens)).to(tl.float32)


def _scan(
    scans, slope, first=None, last=None, cu_seqlens=None, *, flip=False, reverse=False, **plan
):
    """Launch one scan, or a flipped one and one that is not: fills o, contiguous, and `last`.

    scans: [(a, b, c, o)], a, b (B, L, H, K), c, o (B, L, H, V); first, last None or (N, H, K, V)
    fp32, with `flip` (N, H, V, K): dq and dk are scans with K and V exchanged, whose state is the
    transpose. Of a flipped scan there is no last. plan: for _plan.
    """
    tensors = [*(x for scan in scans for x in scan), slope, first, last, cu_seqlens]
    kind = [flip, reverse, *plan.items(), tensors[0].device, tensors[0].dtype]
    for a, b, c, _ in scans:
        kind += [a.shape, c.shape, a.stride(), b.stride(), c.stride()]
    kind += [x if x is None else x.data_ptr() % 16 for x in tensors]
    if cu_seqlens is not None:
        kind += [len(cu_seqlens), cu_seqlens.dtype]
    launch = _launches.get(kind := tuple(kind))
    if launch is None:
        if len(_launches) >= 4096:
            _launches.clear()
        launch = _launches[kind] = _Launch(scans, cu_seqlens, flip, reverse, plan)
    launch(scans, slope, first, last, cu_seqlens)


_launches = {}  # all that a launch depends on but for addresses and numbers -> _Launch


class _Launch:
    """Launches of the kernel for tensors that lie in memory like these.

    What follows from that is worked out once: Triton would look at every argument of every launch,
    and a descriptor of tiles at itself, which takes three times as long as this.
    """

    def __init__(self, scans, cu_seqlens, flip, reverse, plan):
        (B, L, H, K), V = scans[0][0].shape, scans[0][2].shape[3]
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        self.in_place = [[_copy_engine_reads(x) for x in scan[:3]] for scan in scans]
        read = [self._readable(*x) for x in zip(scans, self.in_place)]
        C, BV, n_segments, flat, stages, self.warps = _plan(N, read, **plan)
        segment = triton.cdiv(triton.cdiv(L, n_segments), C) * C
        n_segments = triton.cdiv(L, segment)

        def tiles(x, width):
            if flat:  # (B L, H V) as it lies in memory: columns of head h begin at h * x.stride(2)
                shape = [B * L, (H - 1) * x.stride(2) + x.shape[3]]
                tiles = TensorDescriptor(x, shape, [x.stride(1), 1], [C, width])
            else:
                tiles = TensorDescriptor(x, list(x.shape), list(x.stride()), [1, C, 1, width])
            return {name: fact for name, fact in vars(tiles).items() if name != "base"}

        BK, self.tiles, self.steps = triton.next_power_of_2(K), [], []
        for (a, b, c), (*_, o) in zip(read, scans):
            self.tiles.append((tiles(a, BK), tiles(b, BK), tiles(c, BV), tiles(o, BV)))
            self.steps.append((a.stride(2), b.stride(2), c.stride(2)))
        precision = "tf32x3" if o.dtype == torch.float32 else "tf32"  # in fp32 1e-6, not 3e-4
        n, early = N * n_segments * H * triton.cdiv(V, BV), n_segments > 1 and _gpu(o.device)[2]
        fixed = L, H, segment, n_segments, flip, reverse, K, V, BV, C, flat, precision, stages
        how = {"launch_pdl": True} if early else {}
        self.local = (N, n_segments, H, 2, V, K) if n_segments > 1 else None
        self.launches = [((n, 1, 1), (*fixed, early, False), {})] if self.local else []
        self.launches.append(((n * len(scans), 1, 1), (*fixed, early, True), how))
        self.compiled = [None] * len(self.launches)

    def __call__(self, scans, slope, *states_and_bounds):
        tensors = []
        for scan, in_place, tiles, steps in zip(scans, self.in_place, self.tiles, self.steps):
            for x, facts in zip((*self._readable(scan, in_place), scan[3]), tiles):
                tensors.append(object.__new__(TensorDescriptor))
                tensors[-1].__dict__.update(facts, base=x)
            tensors += scan[3], *steps
        tensors += [None] * (16 - len(tensors))  # where there is no second scan
        local = self.local and slope.new_empty(self.local)
        with torch.cuda.device_of(slope):
            for i, (grid, fixed, how) in enumerate(self.launches):
                args = *tensors, local, slope, *states_and_bounds, *fixed
                if self.compiled[i] is None:  # compiles, or interprets and gives None
                    self.compiled[i] = _scan_kernel[grid](*args, num_warps=self.warps, **how)
                else:
                    self.compiled[i][grid](*args)

    def _readable(self, scan, in_place):
        """a, b and c, or copies of those that the copy engine cannot read as they lie."""
        how = dict(memory_format=torch.contiguous_format)
        return [x if fine else x.clone(**how) for x, fine in zip(scan, in_place)]


def _plan(N, scans, *, C=None, BV=None, n_segments=None, flat=None, stages=None, warps=None):
    """Block sizes and the like for N sequences of each scan (a, b, c): from sweeps on H200, H100.

    C = 64 rows are what a matrix instruction takes. BV = 64: two programs to a head of width 128,
    so 64 heads fill 128 of 132 processors. Where that is all there is (`alone`: at most one program
    to a processor), tiles are cut from a flat (B L, H V) view, 4 deep (5 gains up to 2 %, or loses
    it). Where two programs share a processor, (B, L, H, V) tiles 3 deep are better: two programs
    with flat ones do not fit. Where heads abound, one program takes all 128 columns of one.

    Segments: as many as fill the GPU. They read b and c once more, 2 (K + V) bytes per token and
    head on top of 2 (2K + 2V), dk and dv together.
    """
    tensors = [x for scan in scans for x in scan]
    (B, L, H, K), V = tensors[0].shape, tensors[2].shape[3]
    dtype, (processors, memory) = tensors[0].dtype, _gpu(tensors[0].device)[:2]
    BK, wide = triton.next_power_of_2(K), triton.next_power_of_2(V)
    many = N * H * len(scans) >= 2 * processors and dtype != torch.float32 and K == V == wide == 128
    BV = BV or (wide if many else min(64, wide))
    if C is None:
        C = 64
        while dtype == torch.float32 and C * (2 * BK + BV) > 12 * 1024:
            C //= 2  # 48 KB: tf32x3 keeps copies beside a tile
    n_programs = N * H * triton.cdiv(V, BV) * len(scans)
    if n_segments is None:
        n_segments = max(1, min(len(scans) * processors // n_programs, L // (4 * C)))
    alone = len(scans) == 1 and n_programs * n_segments <= processors
    if flat is None:
        flat = alone and all(B == 1 or x.stride(0) == L * x.stride(1) for x in tensors)
    whole = K == BK and V % BV == 0
    flat = flat and whole and all(H * x.stride(2) < 2**31 for x in tensors)
    stage = C * (2 * BK + BV) * tensors[0].element_size()
    if stages is None:
        memory *= 0.78 if alone or BV > 64 else 0.54
        stages = max(1, min(2 if dtype == torch.float32 else 4, int(memory) // stage))
    return C, BV, n_segments, flat, stages, warps or (8 if BV > 64 or BK > 128 else 4)


def _copy_engine_reads(x):
    """Whether tiles of x can be loaded as they lie: positive 16-byte steps, a head in one piece."""
    steps = [n * x.element_size() for n in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(n > 0 and n % 16 == 0 for n in steps)
    return aligned and x.stride(-1) == 1


@functools.cache
def _gpu(device):
    """Processors, bytes of shared memory a program may use, whether launches may overlap."""
    if device.type != "cuda":  # interpreted
        return 4, 2**17, False
    properties = torch.cuda.get_device_properties(device)
    early = properties.major >= 9 and isinstance(_scan_kernel, triton.JITFunction)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin, early


def _forward(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    o, last = _outputs(q, v, cu_seqlens)
    if o.numel():
        _scan([(q, k, v, o)], slope, state, last, cu_seqlens)
    else:
        last.zero_() if state is None else last.copy_(state)
    return o, last


def _backward(
    do: Tensor, dlast: Tensor | None, q: Tensor, k: Tensor, v: Tensor, slope: Tensor,
    state: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dstate = _gradients(q, k, v, state)
    if q.numel():
        _scan([(do, v, k, dq)], slope, state, None, cu_seqlens, flip=True)
        later, last = dict(cu_seqlens=cu_seqlens, reverse=True), None if state is None else dstate
        if q.shape == v.shape:
            _scan([(v, do, q, dk), (k, q, do, dv)], slope, dlast, last, **later)
        else:
            _scan([(v, do, q, dk)], slope, dlast, None, flip=True, **later)
            _scan([(k, q, do, dv)], slope, dlast, last, **later)
    elif state is not None:
        dstate.zero_() if dlast is None else dstate.copy_(dlast)
    return dq, dk, dv, dstate


def _outputs(q, v, cu_seqlens):
    """Room for the output and the last state."""
    n = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    (H, K), V = q.shape[2:], v.shape[3]
    last = torch.empty(n, H, K, V, dtype=torch.float32, device=q.device)
    return _empty_like(v), last


def _gradients(q, k, v, state):
    """Room for the gradients; an operator must return a tensor also where there was no state."""
    dstate = q.new_empty(0) if state is None else torch.empty_like(state)
    return _empty_like(q), _empty_like(k), _empty_like(v), dstate


def _empty_like(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save_inputs(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _input_gradients(ctx, do, dlast, backward):
    q, k, v, slope, state, cu_seqlens = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    dlast = None if dlast is None else dlast.contiguous()
    dq, dk, dv, dstate = backward(do, dlast, q, k, v, slope, state, cu_seqlens)
    return dq, dk, dv, None, None if state is None else dstate, None


class _Lightning(torch.autograd.Function):
    """What autograd sees. (An operator's dispatch costs the host a millisecond a call.)"""

    @staticmethod
    def forward(ctx, *inputs):
        _save_inputs(ctx, inputs, None)
        return _forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dlast):
        return _input_gradients(ctx, do, dlast, _backward)


# What torch.compile sees: two operators, into which it does not look.

_forward_op = torch.library.custom_op("minimax_m1::lightning", _forward, mutates_args=())
_backward_op = torch.library.custom_op("minimax_m1::lightning_backward", _backward, mutates_args=())
_forward_op.register_fake(lambda q, k, v, slope, state, ends: _outputs(q, v, ends))
_backward_op.register_fake(
    lambda do, dlast, q, k, v, slope, state, ends: _gradients(q, k, v, state)
)
_forward_op.register_autograd(
    functools.partial(_input_gradients, backward=_backward_op), setup_context=_save_inputs
)


def lightning_kernel(q, k, v, slope, state=None, cu_seqlens=None):
    """The same function as one GPU kernel, see above.

    Differentiable once; deterministic; any length. Arguments and results as in lightning_attention;
    bf16, fp16 or fp32, head sizes that are multiples of 16 from 16 to 256 (fp32: to 128). Strided
    views (of a fused qkv tensor, say) are read in place. States, sums and decays are fp32; factors
    of matrix products have q's dtype (fp32: three tf32 products each), so in fp16 a state must stay
    below 65,504. cu_seqlens on a GPU is read there, without waiting for it: boundaries outside of
    [0, L] are clamped, and tokens that belong to no sequence get undefined outputs.
    """
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(q.device).contiguous()
    state = None if state is None else state.contiguous()
    call = _forward_op if torch.compiler.is_compiling() else _Lightning.apply
    return call(q, k, v, slope.float().contiguous(), state, cu_seqlens)


def why_no_kernel(q, v):
    """One line on why the kernel cannot serve q and v, or "" if it can."""
    if triton is None:
        needs = "pip install triton, on Linux"
        return f"Triton is not installed ({needs}); the PyTorch forms work everywhere"
    if not q.is_cuda and isinstance(_scan_kernel, triton.JITFunction):
        needs = "Triton needs a GPU, or TRITON_INTERPRET=1 set before the start"
        return f"the tensors are on {q.device}; {needs}"
    if not q.is_cuda and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 wrongly (3.9); take fp32 or fp16"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bf16, fp16 or fp32, found {q.dtype}"
    most = 128 if q.dtype == torch.float32 else 256  # wider ones in fp32 crashed or lost to PyTorch
    K, V = q.shape[-1], v.shape[-1]
    if any(n % 16 or not 16 <= n <= most for n in (K, V)):
        return f"head sizes must be multiples of 16 from 16 to {most}, found K = {K}, V = {V}"
    return ""


def choose_impl(q, v):
    """What impl="auto" runs for tensors like q and v, and why: ("triton" | "chunk", a line)."""
    if not q.is_cuda:
        return "chunk", "PyTorch, the fastest form on a CPU"
    if reason := why_no_kernel(q, v):
        return "chunk", f"PyTorch: {reason}"
    return "triton", "one kernel for outputs and gradients"


def _use_kernel(impl, q, v):
    """Whether the kernel runs; ValueError if it was asked for by name and cannot."""
    if impl == "triton" and (reason := why_no_kernel(q, v)):
        raise ValueError(f'impl="triton": {reason}')
    return impl == "triton" or (impl == "auto" and choose_impl(q, v)[0] == "triton")


# ============================================================================
# 6. Generation
# ============================================================================


@torch.no_grad()
def lightning_step(q, k, v, slope, state, impl="auto"):
    """One token: updates `state` in place and returns its output. Not differentiable.

    q, k (B, H, K), v (B, H, V), slope (H,), state (B, H, K, V) fp32 (fp64 for fp64 inputs). Returns
    o (B, H, V) in q's dtype. Reads and writes the state once: 8 K V bytes per head and sequence,
    whatever the position. On a GPU this is one launch, which a CUDA graph can hold. impl: "torch"
    (below), "triton" (the kernel; needs a contiguous state), or "auto" = the kernel where it can.
    """
    if impl not in ("auto", "torch", "triton"):
        raise ValueError(f"impl must be auto, torch or triton, found {impl!r}")
    _check_inputs(q, k, v, slope, "B, H")
    if not torch.is_tensor(state):
        raise ValueError(f"state must be a tensor, found {state!r}")
    _check_state(state, q, v, q.shape[0])
    others = () if torch.compiler.is_compiling() else (q, k, v, slope)
    if any(_share(x, state) for x in others):
        raise ValueError(
            "q, k, v or slope is a view of the state, which a step overwrites: clone it"
        )
    if impl == "triton" and not state.is_contiguous():
        instead = 'call state.contiguous() or take impl="auto"'
        raise ValueError(f'impl="triton" needs a contiguous state; {instead}')
    acc = state.dtype
    if _use_kernel(impl, q, v) and state.is_contiguous():
        step = _step_op if torch.compiler.is_compiling() else _step
        return step(q, k, v, slope.float().contiguous(), state)
    kv = k.to(acc)[..., :, None] * v.to(acc)[..., None, :]
    state += kv.addcmul_(_forget(slope, 1, acc), state, value=-1)
    return (q.to(acc)[..., :, None] * state).sum(-2).to(q.dtype)


@jit
def _step_kernel(
    q, k, v, o, slope, state, H, q_row, k_row, v_row, q_head, k_head, v_head,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token of one head, BV columns: the tile of the state is read, used and written."""
    n_v = tl.cdiv(V, BV)
    pid, v0 = tl.program_id(0) // n_v, tl.program_id(0) % n_v * BV
    n, h = (pid // H).to(tl.int64), pid % H
    ks, vs = tl.arange(0, BK), v0 + tl.arange(0, BV)
    inside = (ks < K)[:, None] & (vs < V)[None, :]
    tile = state + pid.to(tl.int64) * K * V + ks[:, None] * V + vs[None, :]
    S = tl.load(tile, mask=inside, other=0.0)
    q = tl.load(q + n * q_row + h * q_head + ks, mask=ks < K, other=0.0).to(tl.float32)
    k = tl.load(k + n * k_row + h * k_head + ks, mask=ks < K, other=0.0).to(tl.float32)
    v = tl.load(v + n * v_row + h * v_head + vs, mask=vs < V, other=0.0).to(tl.float32)
    S += k[:, None] * v[None, :] - _forget_kernel(tl.load(slope + h), 1) * S
    tl.store(tile, S, mask=inside)
    y = tl.sum(q[:, None] * S, 0).to(o.dtype.element_ty)
    tl.store(o + pid.to(tl.int64) * V + vs, y, mask=vs < V)


def _step(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor) -> Tensor:
    B, H, K = q.shape
    V = v.shape[-1]
    o = torch.empty((B, H, V), dtype=q.dtype, device=q.device)
    BK, BV = triton.next_power_of_2(K), min(32, triton.next_power_of_2(V))
    if o.numel():
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        strides = [x.stride(dim) for dim in (0, 1) for x in (q, k, v)]
        grid = (B * H * triton.cdiv(V, BV),)
        with torch.cuda.device_of(q):
            _step_kernel[grid](q, k, v, o, slope, state, H, *strides, K, V, BK, BV, num_warps=4)
    return o


_step_op = torch.library.custom_op("minimax_m1::lightning_step", _step, mutates_args={"state"})
_step_op.register_fake(lambda q, k, v, slope, state: _empty_like(v))


# ============================================================================
# 7. The door
# ============================================================================

FORMS = dict(recurrent=lightning_recurrent, quadratic=lightning_quadratic, chunk=lightning_chunk)
IMPLS = ("auto", *FORMS, "triton")


def lightning_attention(q, k, v, slope, state=None, *, cu_seqlens=None, impl="auto"):
    """Lightning attention over whole sequences, in the form named by `impl`.

    q, k (B, L, H, K), v (B, L, H, V) of one floating dtype; slope (H,) > 0; state (B, H, K, V) fp32
    (fp64 for fp64 inputs) or None for zeros. cu_seqlens (N + 1,) int packs N sequences along L: it
    holds their boundaries from 0 to L, B is 1, and states are (N, H, K, V).
    impl: "recurrent" (the definition), "quadratic" (for reading), "chunk" (PyTorch), "triton" (the
    kernel), or "auto" = the kernel where it can serve a GPU (why_no_kernel), else "chunk".
    Returns o (B, L, H, V) in q's dtype and the last state. Differentiable in q, k, v and state, not
    in slope. Raises ValueError for shapes, dtypes or boundaries that do not fit together; values on
    a GPU (slopes, boundaries) are not looked at, as that would wait for it.
    """
    if impl not in IMPLS:
        raise ValueError(f"unknown impl {impl!r}; choose from {', '.join(IMPLS)}")
    if _use_kernel(impl, q, v):
        _check_inputs(q, k, v, slope)
        n = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        if cu_seqlens is not None:
            check_boundaries(cu_seqlens, q.shape[:2])
        _check_state(state, q, v, n)
        return lightning_kernel(q, k, v, slope, state, cu_seqlens)
    return _run_form(FORMS["chunk" if impl == "auto" else impl], q, k, v, slope, state, cu_seqlens)


def _run_form(form, q, k, v, slope, state, cu_seqlens):
    """One of FORMS, on a batch or one packed sequence after the other."""
    if cu_seqlens is None:
        return form(q, k, v, slope, state)

    _check_inputs(q, k, v, slope)
    bounds = check_boundaries(cu_seqlens.cpu(), q.shape[:2])
    _check_state(state, q, v, len(bounds) - 1)
    o, last = [], []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        first = None if state is None else state[n : n + 1]
        o_n, last_n = form(q[:, start:end], k[:, start:end], v[:, start:end], slope, first)
        o.append(o_n)
        last.append(last_n)
    return torch.cat(o, 1), torch.cat(last)


def _check_inputs(q, k, v, slope, dims="B, L, H"):
    n = dims.count(",") + 2
    if q.ndim != n or k.shape != q.shape or v.ndim != n or v.shape[:-1] != q.shape[:-1]:
        found = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q and k must be ({dims}, K) and v ({dims}, V), found {found}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        found = f"{q.dtype}, {k.dtype}, {v.dtype}"
        raise ValueError(f"q, k and v must share one floating dtype, found {found}")
    if slope.shape != q.shape[-2:-1] or not slope.is_floating_point():
        found = f"heads, found {slope.dtype} {tuple(slope.shape)}"
        raise ValueError(f"slope must be one number for each of the {q.shape[-2]} {found}")
    if slope.requires_grad:
        raise ValueError("slope must not require gradients: M1's are constants")
    seen = slope.device.type == "cpu" and not torch.compiler.is_compiling()
    if seen and not all(0 < x < math.inf for x in slope.tolist()):
        raise ValueError(f"slopes must be positive numbers, found {slope.tolist()[:8]}")


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _share(x, y):
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _check_state(state, q, v, n):
    expected, dtype = (n, *q.shape[-2:], v.shape[-1]), _accumulator(q.dtype)
    if state is not None and (state.shape != expected or state.dtype != dtype):
        found = f"{state.dtype} {tuple(state.shape)}"
        raise ValueError(f"state must be {dtype} of shape {expected}, found {found}")


def check_boundaries(cu_seqlens, shape):
    """cu_seqlens (N + 1,) as a list; ValueError unless it packs sequences of a (1, L) batch.

    Boundaries on a GPU are not looked at, as that would wait for it: None.
    """
    B, L = shape
    if not torch.is_tensor(cu_seqlens):
        raise ValueError(f"cu_seqlens must be a tensor, found {cu_seqlens!r}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
        found = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seqlens must be (N + 1,) integers, found {found}")
    if B != 1:
        raise ValueError(f"cu_seqlens packs sequences along L, so the batch must be 1, found {B}")
    if cu_seqlens.is_cuda:
        return None
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != L or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to L = {L}, found {bounds[:8]}")
    return bounds


# ============================================================================
# 8. See it run
# ============================================================================


@torch.no_grad()
def main(argv=None):
    """Print error and time of every form at growing lengths, then how long M1's heads remember."""
    argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False).parse_args(argv)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small products: more threads would mostly wait for each other
    H, K, lengths = 2, 64, (256, 1024, 4096)
    slope, rng = decay_slopes(H, 0, 80), torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 1, L, H, K, generator=rng).unbind() for L in lengths]
    truths = [lightning_recurrent(*(x.double() for x in qkv), slope)[0] for qkv in inputs]

    def step(q, k, v, slope):
        tokens, state = zip(q.unbind(1), k.unbind(1), v.unbind(1)), q.new_zeros(1, H, K, K)
        return torch.stack([lightning_step(*token, slope, state) for token in tokens], 1), state

    forms = {**FORMS, "step": step}
    if not why_no_kernel(*inputs[0][:2]):  # interpreted
        forms["triton"] = lightning_kernel
    print(f"{H} heads of width {K}, fp32, one CPU thread; errors against the definition in fp64\n")
    print(f"{'':12}{'relative error':>30}{'microseconds per token':>29}")
    columns = ("".join(f"{L:{width},}" for L in lengths) for width in (10, 9))
    print(f"{'L =':12}" + "  ".join(columns))
    for name, form in forms.items():
        errors = times = ""
        for L, qkv, truth in zip(lengths, inputs, truths):
            o, _ = form(*qkv, slope)
            errors += f"{(o - truth).norm() / truth.norm():10.1e}"
            seconds = timeit.timeit(functools.partial(form, *qkv, slope), number=1)
            times += f"{1e6 / L * seconds:9.1f}"
        print(f"{name:12}{errors}  {times}")
    torch.set_num_threads(n_threads)
    print("\nquadratic: the longer the text the dearer a token, O(L^2) in all;", end=" ")
    print("elsewhere always the same, O(L).")

    heads, layers = 64, 80  # M1 (released); every eighth layer is softmax attention
    lightning = [layer for layer in range(layers) if (layer + 1) % 8]
    print(f"\nHalf-life of the memory in M1, {heads} heads, {layers} layers, in tokens\n")
    print("layer   fastest head   slowest head")
    for layer in (lightning[0], lightning[len(lightning) // 2], lightning[-1]):
        fast, slow = (math.log(2) / s for s in decay_slopes(heads, layer, layers)[[0, -1]].tolist())
        print(f"{layer:5}   {fast:12.2g}   {slow:12,.0f}")
    kept = f"2^-{1e6 / slow:.0f}: only softmax layers read that far."
    print(f"\nOf a token 1,000,000 back the slowest head keeps {kept}")


if __name__ == "__main__":
    main()
