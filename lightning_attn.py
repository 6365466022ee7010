"""Lightning attention: causal linear attention with one fixed decay per head, in forms that agree.

    S_t = lam S_{t-1} + k_t v_t^T        o_t = q_t S_t        lam = exp(-slope), one per head

There is no softmax, no 1/sqrt(K), no rope and no denominator; the current token is not decayed. Because the
state S has a fixed size, a token costs the same at position 10 and at position 1,000,000.
Sources: MiniMax-01 report sec. 2.2 (arXiv:2501.08313); "released" = the published MiniMax-M1 modelling code.

    1. Decay rates               decay_slopes
    2. The definition            lightning_recurrent     one token at a time, O(L) but a Python loop
    3. The readable form         lightning_quadratic     one masked L x L product, as attention is usually drawn
    4. The fast form             lightning_chunk         both at once: products inside a chunk, a state between chunks
    5. Generation                lightning_step          one token, state updated in place
    6. The door                  lightning_attention     checks, packing, choice of form
    7. See it run                main: `python lightning_attn.py`, error and time of every form, what M1 remembers

Dimension key: B batch, L tokens, H heads, K key width, V value width, C chunk, N packed sequences.
Numerics: states and sums are fp32 (fp64 for fp64 inputs). Decay tables are made in float64 and cast. Only
non-negative powers of lam < 1 are formed, so nothing overflows however steep the slope or long the text.
"""

import argparse
import math
import timeit

import torch

# ============================================================================
# 1. Decay rates                                   (released; ALiBi's geometric series)
# ============================================================================


def decay_slopes(n_heads, layer, n_layers, device="cpu"):
    """Decay rate of every head in one layer: lam = exp(-slope).

        slope_h = 2^(-8 (h+1) / H) * (1 - layer / (n_layers - 1) + 1e-5)

    The first head forgets fastest; later layers forget more slowly. `layer` counts all layers, softmax ones too.
    When H is no power of two, with c the largest power of two below it: the c slopes of c heads, then every second
    slope of 2c heads. Returns (H,) fp32. Source: released. (The lightning-attention papers use slopes that are
    linear in the head index; the released weights do not.)
    """
    if n_heads < 1 or not 0 <= layer < n_layers:
        raise ValueError(
            f"decay_slopes needs n_heads >= 1 and 0 <= layer < n_layers, got {n_heads}, {layer}, {n_layers}"
        )

    def geometric(n):
        return [2.0 ** (-8 * (h + 1) / n) for h in range(n)]

    c = 2 ** (n_heads.bit_length() - 1)  # largest power of two <= n_heads
    slopes = geometric(c) + geometric(2 * c)[0::2][: n_heads - c]
    factor = 1 - layer / max(n_layers - 1, 1) + 1e-5
    return torch.tensor([s * factor for s in slopes], dtype=torch.float32, device=device)


def _accumulator(dtype):
    """The dtype of states and sums: fp64 for fp64 inputs, otherwise fp32 (a state sums thousands of terms)."""
    return torch.promote_types(dtype, torch.float32)


def _forget(slope, n_tokens, dtype):
    """1 - lam^n, shaped (H, 1, 1) to act on a state.

    States are updated as S + (new - forget * S), not as lam * S + new. The two are equal in exact arithmetic, but
    fp32 holds lam = 1 - 5e-5 (M1's slowest head) only to 1e-8, an error that all tokens share and that grows to 2e-4
    over that head's memory, whereas it holds 5e-5 to 3e-12.
    """
    return -torch.expm1(-slope.double() * n_tokens).to(dtype)[:, None, None]


# ============================================================================
# 2. The definition
# ============================================================================


def lightning_recurrent(q, k, v, slope, state=None):
    """Causal linear attention with per-head decay, one token at a time: the definition.

        S_t = exp(-slope) S_{t-1} + k_t v_t^T        o_t = q_t S_t

    q, k (B, L, H, K), v (B, L, H, V), slope (H,) > 0, state (B, H, K, V) or None for zeros.
    Returns o (B, L, H, V) in q's dtype and the last state in fp32 (fp64 for fp64 inputs).
    O(L K V) time and O(K V) memory per head. Every other form in this file is tested against this one.
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


def lightning_quadratic(q, k, v, slope, state=None):
    """The same function as one masked product, for reading: softmax attention with a decay in place of the softmax.

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


def lightning_chunk(q, k, v, slope, state=None, chunk=64):
    """The same function chunk by chunk: quadratic inside C tokens, a state carries what is older. Differentiable.

        m tokens r = 1..m of one chunk (m = C, or less in the last one), S the state before it:
        inside   o_r  = sum_{j<=r} lam^(r-j) (q_r . k_j) v_j        one (m, m) product under a mask
        older    o_r += lam^r q_r S
        state    S    = lam^m S + sum_j lam^(m-j) k_j v_j^T

    Arguments and results as in lightning_recurrent. O(L (C + K) V) time per head.
    """
    dtype, acc = q.dtype, _accumulator(q.dtype)
    q, k, v = (x.to(acc).transpose(1, 2) for x in (q, k, v))  # (B, H, L, .)
    L, C = q.shape[2], max(min(chunk, q.shape[2]), 1)
    state = None if state is None else state.to(acc)

    steps = torch.arange(C + 1, device=q.device)
    power = torch.exp(-slope.double()[:, None] * steps).to(acc)  # (H, C + 1): lam^0 .. lam^C
    inside = power[:, (steps[1:, None] - steps[1:]).clamp(min=0)].tril()  # (H, C, C)
    older = power[:, 1:, None]  # (H, C, 1): lam^r
    tail = power[:, :C].flip(1)[..., None]  # (H, C, 1): lam^(C-r); its last m rows are lam^(m-j)

    o = []
    for qc, kc, vc in zip(*(x.split(C, dim=2) for x in (q, k, v))):
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
# 5. Generation
# ============================================================================


@torch.no_grad()
def lightning_step(q, k, v, slope, state):
    """One token: updates `state` in place and returns its output. Not differentiable.

    q, k (B, H, K), v (B, H, V), slope (H,), state (B, H, K, V) fp32 (fp64 for fp64 inputs). Returns o (B, H, V) in
    q's dtype. Reads and writes the state once: 8 K V bytes per head and sequence, whatever the position.
    """
    acc = _accumulator(q.dtype)
    expected = (*q.shape, v.shape[-1])
    if state.dtype != acc or state.shape != expected:
        raise ValueError(f"the state must be {acc} of shape {expected}, found {state.dtype} {tuple(state.shape)}")
    kv = k.to(acc)[..., :, None] * v.to(acc)[..., None, :]
    state += kv.addcmul_(_forget(slope, 1, acc), state, value=-1)
    return (q.to(acc)[..., :, None] * state).sum(-2).to(q.dtype)


# ============================================================================
# 6. The door
# ============================================================================

FORMS = {"recurrent": lightning_recurrent, "quadratic": lightning_quadratic, "chunk": lightning_chunk}


def lightning_attention(q, k, v, slope, state=None, *, cu_seqlens=None, impl="auto"):
    """Lightning attention over whole sequences, in the form named by `impl`.

    q, k (B, L, H, K), v (B, L, H, V) of one floating dtype; slope (H,) > 0; state (B, H, K, V) fp32 (fp64 for fp64
    inputs) or None for zeros. cu_seqlens (N + 1,) int packs N sequences along L: it holds their boundaries from 0 to
    L, B is 1, and states are (N, H, K, V).
    impl: "recurrent" (the definition), "quadratic" (for reading), "chunk", or "auto" = "chunk".
    Returns o (B, L, H, V) in q's dtype and the last state. Differentiable in q, k, v and state.
    Raises ValueError for shapes, dtypes or boundaries that do not fit together.
    """
    if impl != "auto" and impl not in FORMS:
        raise ValueError(f"unknown impl {impl!r}; choose from auto, {', '.join(FORMS)}")
    _check_inputs(q, k, v, slope)
    form = FORMS["chunk" if impl == "auto" else impl]
    if cu_seqlens is None:
        _check_state(state, q, v, q.shape[0])
        return form(q, k, v, slope, state)

    bounds = check_boundaries(cu_seqlens, q.shape[:2])
    _check_state(state, q, v, len(bounds) - 1)
    o, last = [], []
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        first = None if state is None else state[n : n + 1]
        o_n, last_n = form(q[:, start:end], k[:, start:end], v[:, start:end], slope, first)
        o.append(o_n)
        last.append(last_n)
    return torch.cat(o, 1), torch.cat(last)


def _check_inputs(q, k, v, slope):
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        found = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q and k must be (B, L, H, K) and v (B, L, H, V), found {found}")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share one floating dtype, found {q.dtype}, {k.dtype}, {v.dtype}")
    if slope.shape != (q.shape[2],):
        raise ValueError(
            f"slope must have one entry for each of the {q.shape[2]} heads, found shape {tuple(slope.shape)}"
        )


def _check_state(state, q, v, n):
    expected = (n, q.shape[2], q.shape[3], v.shape[3])
    if state is not None and (state.shape != expected or state.dtype != _accumulator(q.dtype)):
        raise ValueError(
            f"state must be {_accumulator(q.dtype)} of shape {expected}, found {state.dtype} {tuple(state.shape)}"
        )


def check_boundaries(cu_seqlens, shape):
    """cu_seqlens (N + 1,) as a list; ValueError unless it packs sequences of a batch of shape (1, L)."""
    bounds, (B, L) = cu_seqlens.tolist(), shape
    if B != 1:
        raise ValueError(f"cu_seqlens packs sequences along L, so the batch must be 1, found {B}")
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != L or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens must rise from 0 to L = {L}, found {bounds[:8]}")
    return bounds


# ============================================================================
# 7. See it run
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

    print(f"{H} heads of width {K}, fp32, one CPU thread; errors against the definition in fp64\n")
    print(f"{'':12}{'relative error':>30}{'microseconds per token':>29}")
    print(f"{'L =':12}" + "".join(f"{L:10,}" for L in lengths) + "  " + "".join(f"{L:9,}" for L in lengths))
    for name, form in {**FORMS, "step": step}.items():
        errors = times = ""
        for L, qkv, truth in zip(lengths, inputs, truths):
            o, _ = form(*qkv, slope)
            errors += f"{(o - truth).norm() / truth.norm():10.1e}"
            times += f"{1e6 / L * timeit.timeit(lambda: form(*qkv, slope), number=1):9.1f}"
        print(f"{name:12}{errors}  {times}")
    torch.set_num_threads(n_threads)
    print("\nquadratic: the longer the text the dearer a token, O(L^2) in all; elsewhere always the same, O(L).")

    heads, layers = 64, 80  # M1 (released); every eighth layer is softmax attention
    lightning = [l for l in range(layers) if (l + 1) % 8]
    print(f"\nHalf-life of the memory in M1, {heads} heads, {layers} layers, in tokens\n")
    print("layer   fastest head   slowest head")
    for l in (lightning[0], lightning[len(lightning) // 2], lightning[-1]):
        fast, slow = (math.log(2) / s for s in decay_slopes(heads, l, layers)[[0, -1]].tolist())
        print(f"{l:5}   {fast:12.2g}   {slow:12,.0f}")
    print(f"\nOf a token 1,000,000 back the slowest head keeps 2^-{1e6 / slow:.0f}: only softmax layers read that far.")


if __name__ == "__main__":
    main()
