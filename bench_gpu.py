"""What one GPU does, beside what its memory and arithmetic allow; run by bench.py.

    1. Timing                    race, gpu_race, this_gpu, measured, draw
    2. The kernel and one token  kernel, decode-step
    3. transformers' MiniMax     compare: columns of it, where it is installed
    4. The model                 rollout, model
    5. One long sequence         long

A floor is what the card would need for the bytes, at the speed of a large copy, or for the
arithmetic, at that of a large product; both are measured first.
"""

import contextlib
import gc
import math
from dataclasses import asdict
from functools import partial
from itertools import product
from statistics import median
from timeit import timeit

import engine
from cli import Late, short, torch
from cli import model as m1
from studies.common import by, draw_curve, picture, print_table, quartiles, recorded

attn = Late("lightning_attn")
fla, transformers = Late("fla.ops.simple_gla"), Late("transformers")  # to compare with
mlstm = Late("mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging")
DEVICE = "cuda"  # a test of what is around the measuring puts "cpu" here
WALL = partial(timeit, setup="gc.enable()", number=1)

# ============================================================================
# 1. Timing
# ============================================================================


def race(runs, rounds, clock=WALL):
    """{name: seconds of each call}. Functions take turns, every other round in reverse order: what
    slows the machine for a while slows all of them. The first round warms up and is left out.
    """
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            seconds[name].append(clock(runs[name]))
    return {name: times[1:] for name, times in seconds.items()}


def gpu_race(runs, rounds):
    """{name: seconds on the device of each call}; runs: {name: calls that cost the same}, captured
    in a CUDA graph, short ones eight times over, so that no launch is timed. Graphs share their
    memory: nobody reads what a call returns.
    """
    graphs, n_calls, stream, pool = {}, {}, torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    for name, calls in runs.items():
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            for call in calls:
                call()  # compiles
            torch.cuda.synchronize()
            again = 8 if event_seconds(calls[0]) < 1e-3 else 1
            with torch.cuda.graph(graphs[name], pool, stream):
                for call in calls * again:
                    call()
        n_calls[name] = again * len(calls)
    seconds = race({name: graphs[name].replay for name in runs}, rounds, event_seconds)
    return {name: [s / n_calls[name] for s in seconds[name]] for name in runs}


def event_seconds(run):
    """Seconds between two events on the GPU around run()."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def this_gpu():
    """Bytes per second, read plus written, of a large copy on the GPU; and what rows say of it."""
    if not torch.cuda.is_available():
        raise ValueError("this benchmark measures a GPU and there is none here")
    x, y = torch.randn(2, 2**29, device=DEVICE)
    bandwidth = 2 * x.nbytes / median(event_seconds(lambda: y.copy_(x)) for _ in range(10))
    row = {"gpu": torch.cuda.get_device_name(), "triton": attn.triton.__version__, "fla": None}
    with contextlib.suppress(ImportError):  # flash-linear-attention
        row["fla"] = Late("fla").__version__
    return bandwidth, row | {"copy_tb_s": f"{bandwidth / 1e12:.3f}"}


def on_gpu(build, config, dtype):
    """build(config) with random weights of that dtype. Models before it must have been let go."""
    free()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            return build(config)
    finally:
        torch.set_default_dtype(torch.float32)


def free():
    """Memory that nobody holds goes back to the GPU; its peak counts from here."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measured(flags, name, measure):
    """recorded(...) with the machine in every row; says on which one it was."""
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    rows = recorded(flags, name, lambda quick: [row | machine for row in measure(quick)])
    cpu = "fp32, {threads:.0f} CPU threads, torch {torch}"
    gpu = "bf16, {gpu}, torch {torch}\ntriton {triton}, copy bandwidth {copy_tb_s:.2f} TB/s"
    print("medians,", (gpu if "gpu" in rows[0] else cpu).format(**rows[0]))
    return rows


def draw(axis, rows, x, names, unit, **labels):
    """Columns NAME_UNIT, {name: label}, against column x, both logarithmic; a floor is dashed."""
    for name, label in names.items():
        draw_curve(axis, rows, x, f"{name}_{unit}", label, "k--" if "floor" in name else "o-")
    axis.set(xscale="log", yscale="log", **labels)


# ============================================================================
# 2. The kernel and one token
# ============================================================================

SHAPES = [(1, 8192, 64, 128), (1, 32768, 64, 128), (8, 8192, 64, 128)]
SHAPES += [(8, 2048, 16, 64), (1, 8192, 8, 128)]
RIVALS = {"recurrent": "lightning, definition", "chunk": "lightning, PyTorch"}
RIVALS |= {"triton": "lightning, this kernel", "fla": "lightning, fla"}
RIVALS |= {"flash": "softmax, SDPA flash", "cudnn": "softmax, SDPA cuDNN"}
PEERS = {"fla_128": "fla, chunks of 128", "fla_fused": "fla, fused", "mlstm": "mlstm_kernels"}
LONGEST = {"recurrent": 512} | dict.fromkeys(("chunk", "flash", "cudnn"), 2**15)  # tokens
JOBS = {"forward": ("forward", 4), "both": ("forward + backward", 11)}  # tensors moved at least
ERRORS = ("o", "state", "dq", "dk", "dv")


def kernel(flags):
    """Attention on a GPU against the memory floor and other kernels: kernel.csv, kernel.png."""
    if flags.sweep:
        return print_table(recorded(flags, "kernel-sweep", time_block_sizes))
    rows = measured(flags, "kernel", time_kernels)
    shapes, lengths, *launches = by(rows, "part").values()
    shown = {"B, L, H, D": "{shape}"}
    for job, (title, _) in JOBS.items():
        columns = shown | {f"{title}: floor, us": f"{{{job}_floor_us:,.0f}}"}
        names = [x for x in (RIVALS | PEERS) if x != "recurrent"]
        columns |= {f"{x}, us": f"{{{x}_{job}_us:,.0f}}" for x in names}
        print_table(shapes, columns | {"this kernel, x floor": f"{{triton_{job}_x:.2f}}"})
    for [row] in launches:
        print("Microseconds of the host for a call on almost no tokens, as 16 layers make them")
        for name in ("triton", "fla", "add"):
            if f"{name}_forward_us" in row:
                told = f"{{{name}_forward_us:7.1f}} forward {{{name}_both_us:7.1f}} with gradients"
                print(f"  {RIVALS.get(name, 'x + x'):24}" + told.format(**row))
    heads = "fastest, middle and slowest head"
    print(f"Relative error against fp64 at batch 1, the worst of a layer's {heads}")
    print_table(shapes, shown | {x: f"{{error_{x}:.1e}}" for x in ERRORS})
    title = "lightning attention: within 1.5 times the memory floor forward from 2,048 tokens on"
    with picture(flags, "kernel", 2, (11, 4.2), f"{title} ({rows[0]['gpu']})") as axes:
        for axis, (job, (title, _)) in zip(axes, JOBS.items()):
            draw(axis, lengths, "tokens", RIVALS, f"{job}_us", ylabel="microseconds per token")
            draw(axis, lengths, "tokens", {f"{job}_floor": "memory floor"}, "us")
            axis.set(title=title, xlabel="tokens of one sequence, 64 heads of width 128, bf16")
        axes[0].legend(fontsize=8)
    if "fla_forward_us" in shapes[0]:
        best = [min(r[f"fla_{x}_us"] / r[f"triton_{x}_us"] for r in shapes[:3]) for x in JOBS]
        times = "{:.2f} (forward) and {:.2f} times as fast as fla.".format(*best)
        print(f"At the first three shapes at least {times}")


def time_block_sizes(quick):
    """Rows of kernel-sweep.csv: forward times of possible block sizes, x floor, best first."""
    (bandwidth, machine), rows = this_gpu(), []
    usual = [(64, 64, 4, n) for n in (2, 3, 4, 5)]
    usual += [(64, 32, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 2)]
    for shape in SHAPES[3:4] if quick else (SHAPES[0], SHAPES[2], SHAPES[3]):
        qkvo = torch.randn(4, *shape, device=DEVICE, dtype=torch.bfloat16)
        slope, floor = attn.decay_slopes(shape[2], 0, 80, DEVICE), qkvo.nbytes / bandwidth
        for flat, (C, BV, warps, stages) in product((True, False), usual):
            choice = {"C": C, "BV": BV, "warps": warps, "stages": stages, "flat": flat}
            with contextlib.suppress(attn.triton.runtime.errors.OutOfResources):
                run = partial(attn._scan, [tuple(qkvo)], slope, **choice)
                seconds = median(gpu_race({"x": [run]}, 10)["x"])
                row = {"shape": str(shape)[1:-1], **choice, "x_floor": f"{seconds / floor:.3f}"}
                rows.append(row | {"gpu": machine["gpu"]})
    return sorted(rows, key=lambda row: (row["shape"], float(row["x_floor"])))


def time_kernels(quick):
    """Rows of kernel.csv: microseconds, in those of part "lengths" microseconds per token."""
    (bandwidth, machine), rows = this_gpu(), []
    cases = [("shapes", shape) for shape in (SHAPES[3:] if quick else SHAPES)]
    cases += [("lengths", (1, 2**i, 64, 128)) for i in ((8, 9) if quick else range(8, 18))]
    for part, shape in cases:
        row = {"part": part, "shape": str(shape)[1:-1], "tokens": shape[1]}
        scale = 1e6 / (1 if part == "shapes" else shape[1])
        for job, (_, n_tensors) in JOBS.items():
            floor = n_tensors * math.prod(shape) * 2 / bandwidth
            row[f"{job}_floor_us"] = f"{floor * scale:.5g}"
            free()
            functions = rivals(shape, job)
            if part == "shapes":
                functions |= peers(shape, job)
            for name, seconds in gpu_race(functions, 12).items():
                row |= quartiles(f"{name}_{job}_us", [s * scale for s in seconds])
            row[f"triton_{job}_x"] = f"{float(row[f'triton_{job}_us']) / floor / scale:.4g}"
        rows.append(row | (errors(shape) if part == "shapes" else {}))
        print(shape, flush=True)
    rows.append(time_launches((1, 256, 64, 128)))
    columns = dict.fromkeys(name for row in rows for name in row)  # before the machine's: all
    return [columns | row | machine for row in rows]


def time_launches(shape, n_layers=16):
    """A row of kernel.csv: what a call costs the host where the device has little to do."""
    qkv, row = torch.randn(3, *shape, device=DEVICE, dtype=torch.bfloat16), {"part": "launch"}
    slope = attn.decay_slopes(shape[2], 0, 80, DEVICE)
    calls = {"add": lambda q, *_: (q + q,)}
    calls["triton"] = partial(attn.lightning_attention, slope=slope, impl="triton")
    with contextlib.suppress(ImportError):
        calls["fla"] = partial(fla.chunk_simple_gla, g_gamma=-slope, scale=1.0)

    def layers(call, job):
        _, k, v = o = [x.detach().requires_grad_(job == "both") for x in qkv]
        for _ in range(n_layers):
            o = call(o[0], k, v)
        if job == "both":
            o[0].sum().backward()

    for job, (name, call) in product(JOBS, calls.items()):
        [seconds] = race({name: partial(layers, call, job)}, 100).values()
        row |= quartiles(f"{name}_{job}_us", [s * 1e6 / n_layers for s in seconds])
    return row | {"shape": str(shape)[1:-1]}


def rivals(shape, job):
    """{name: functions of nothing}, one for each set of inputs; all sets exceed the cache."""
    L, H = shape[1:3]
    slope, n_sets = attn.decay_slopes(H, 0, 80, DEVICE), 2**28 // (8 * math.prod(shape))
    new = partial(torch.randn, shape, device=DEVICE, dtype=torch.bfloat16)
    sets = [[new() for _ in "qkvo"] for _ in range(max(1, min(4, n_sets)))]

    def sdpa(q, k, v, backend):
        qkv = (x.transpose(1, 2) for x in (q, k, v))
        with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, backend)):
            o = torch.nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
        return o.transpose(1, 2), None

    functions = {}
    for impl in ("triton", "chunk", "recurrent"):
        functions[impl] = partial(attn.lightning_attention, slope=slope, impl=impl)
    functions |= {x: partial(sdpa, backend=f"{x.upper()}_ATTENTION") for x in ("flash", "cudnn")}
    functions = {name: f for name, f in functions.items() if L <= LONGEST.get(name, L)}
    with contextlib.suppress(ImportError):
        if H == 64:  # it tunes itself for minutes at every new head shape
            functions["fla"] = partial(fla.chunk_simple_gla, g_gamma=-slope, scale=1.0)

    return {name: [partial(run, job, f, *x) for x in sets] for name, f in functions.items()}


def run(job, function, q, k, v, do):
    """A forward pass, or one with its gradients."""
    if job == "forward":
        return function(q, k, v)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    return torch.autograd.grad(function(q, k, v)[0], (q, k, v), do)


def peers(shape, job):
    """rivals() of other people's kernels that compute this operator, where they are installed and
    checked against it; fla tunes itself for minutes at every new number of heads.
    """
    (B, L, H, D), functions = shape, {}
    slope = attn.decay_slopes(H, 0, 80, DEVICE)
    with contextlib.suppress(ImportError):
        if H == 64:
            how = {"g_gamma": -slope, "scale": 1.0}
            functions["fla_128"] = partial(fla.chunk_simple_gla, chunk_size=128, **how)
            functions["fla_fused"] = partial(fla.fused_chunk_simple_gla, **how)
    with contextlib.suppress(ImportError):
        kernel = mlstm.mlstm_siging_chunkwise__xl_chunk

        def gated(q, k, v):  # heads first; sigmoid(30) = 1, sigmoid(f) = exp(-slope)
            ones = torch.ones(*q.shape[:2], H, device=DEVICE).mT.contiguous()
            gates = 30 * ones, -torch.expm1(slope)[:, None].log() * ones
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return (kernel(q, k, v, *gates, normalize=False).transpose(1, 2),)

        functions["mlstm"] = gated
    small = torch.randn(3, 1, 256, H, D, device=DEVICE, dtype=torch.bfloat16)
    for name, function in list(functions.items()):
        right, _ = attn.lightning_attention(*small, slope)
        found, scale = function(*small)[0], 1 if name != "mlstm" else D**-0.5
        error = float((found - scale * right).norm() / (scale * right).norm())
        if not error < 2e-2:
            print(f"{PEERS[name]}: off by {error:.1e}, so it is left out", flush=True)
            del functions[name]
    lies = (B, L, H, D), (B, H, L, D)  # each has its tensors as it wants them
    new = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
    tensors = {name: [new(lies[name == "mlstm"]) for _ in "qkvo"] for name in functions}
    for x in tensors.get("mlstm", ()):
        x.transpose_(1, 2)
    return {name: [partial(run, job, f, *tensors[name])] for name, f in functions.items()}


def errors(shape):
    """Worst relative error against fp64 of the first (fastest), middle and last (slowest) head."""
    L, H, D = shape[1:]
    slope, heads = attn.decay_slopes(H, 0, 80, DEVICE), [0, H // 2, H - 1]
    *qkv, do = torch.randn(4, 1, L, H, D, device=DEVICE, dtype=torch.bfloat16)
    qkv, worst = [x.requires_grad_() for x in qkv], {}
    o, last = attn.lightning_attention(*qkv, slope, impl="triton")
    found = (o, last, *torch.autograd.grad(o, qkv, do))
    exact = [x[:, :, heads].detach().double().requires_grad_() for x in qkv]
    o, last = attn.lightning_attention(*exact, slope[heads], impl="chunk")
    right = (o, last, *torch.autograd.grad(o, exact, do[:, :, heads].double()))
    for name, x, y in zip(ERRORS, found, right):
        at = 1 if name == "state" else 2  # where the heads are
        x, y = x.movedim(at, 0)[heads].flatten(1), y.movedim(at, 0).flatten(1)
        worst[f"error_{name}"] = f"{((x - y).norm(dim=1) / y.norm(dim=1)).max():.2e}"
    return worst


def decode_step(flags):
    """A token of B sequences, 64 heads of width 128: decode-step.csv and decode-step.png."""
    rows = measured(flags, "decode-step", time_steps)
    columns = {"batch": "{batch:.0f}", "floor, us": "{floor_us:,.1f}"}
    columns |= {"this kernel": "{triton_us:,.1f}", "PyTorch": "{torch_us:,.1f}"}
    print_table(rows, columns | {"fla": "{fla_us:,.1f}", "x floor": "{triton_x:.2f}"})
    names = {"triton": "this kernel", "torch": "PyTorch", "fla": "fla, fused recurrent"}
    with picture(flags, "decode-step", 1, (6, 4)) as [axis]:
        draw(axis, rows, "batch", names | {"floor": "memory floor"}, "us", xlabel="sequences")
        axis.set(title="one token costs one pass over the states", ylabel="microseconds")
        axis.legend()


def time_steps(quick):
    """Rows of decode-step.csv."""
    (bandwidth, machine), H, D, rows = this_gpu(), 64, 128, []
    slope = attn.decay_slopes(H, 0, 80, DEVICE)
    for B in (1, 4) if quick else (1, 4, 16, 64, 256):
        qkv = torch.randn(3, B, H, D, device=DEVICE, dtype=torch.bfloat16)
        states = torch.zeros(max(1, 64 // B), B, H, D, D, device=DEVICE)  # exceed the cache
        step = partial(attn.lightning_step, *qkv, slope)
        runs = {x: [partial(step, state=s, impl=x) for s in states] for x in ("triton", "torch")}
        with contextlib.suppress(ImportError):
            how = {"g_gamma": -slope, "scale": 1.0, "output_final_state": True}
            step = partial(fla.fused_recurrent_simple_gla, *(x[:, None] for x in qkv), **how)
            runs["fla"] = [partial(step, initial_state=s) for s in states]
        floor = 8 * B * H * D * D / bandwidth
        row = {"batch": B, "floor_us": f"{floor * 1e6:.4g}"}
        for name, seconds in gpu_race(runs, 20).items():
            row |= quartiles(f"{name}_us", [s * 1e6 for s in seconds])
        row["triton_x"] = f"{float(row['triton_us']) / floor / 1e6:.4g}"
        rows.append(row | machine)
    return rows


# ============================================================================
# 3. transformers' MiniMax, where it is installed
# ============================================================================


@contextlib.contextmanager
def optional():
    """What fails inside is told and costs no row of ours; a package that is missing is not told."""
    try:
        yield
    except ImportError:
        pass
    except Exception as error:
        print(f"transformers: {short(error)}", flush=True)


def compare(rows, config, prepare, columns):
    """Columns of transformers' model of the same shape in these rows: three calls, after one
    that warms up, of what prepare(model, row) returns, as columns(row, seconds).
    """
    with optional():
        model = on_gpu(transformers.MiniMaxForCausalLM, their_config(config), torch.bfloat16)
        model.requires_grad_(False)
        for row in rows:
            free()
            with optional():
                run = prepare(model, row)
                seconds = [event_seconds(run) for _ in range(4)][1:]
                row |= columns(row, seconds) | {"transformers": transformers.__version__}


def their_config(config):
    """The MiniMaxConfig of an M1Config. ImportError where transformers is not installed."""
    transformers.logging.set_verbosity_error()
    kinds = ["full_attention" if kind else "linear_attention" for kind in config.attn_type_list]
    parts = ("full_attn", "linear_attn", "mlp")
    settings = asdict(config) | {f"{x}_alpha_factor": config.layernorm_mlp_alpha for x in parts}
    return transformers.MiniMaxConfig(**settings, layer_types=kinds)  # other keys: same names


def their_generate(model, prompts, n, group_size=1):
    """n tokens after prompts (B, L). top_k 0: else it looks for the 50 likeliest first."""
    how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "use_cache": True}
    how |= {"num_return_sequences": group_size, "attention_mask": torch.ones_like(prompts)}
    return model.generate(prompts, min_new_tokens=n, max_new_tokens=n, pad_token_id=0, **how)


def their_pass(model, row, n):
    """A prefill, or the next token after n, of row["size"] tokens or sequences."""
    job, size, how = row["job"], row["size"], {"use_cache": True, "logits_to_keep": 1}
    shape = (1, size) if job == "prefill" else (size, n)
    tokens = torch.randint(0, model.config.vocab_size, shape, device=DEVICE)
    if job == "prefill":
        return partial(model, tokens, **how)
    cache = model(tokens, **how).past_key_values
    return partial(model, tokens[:, :1], past_key_values=cache, **how)


def their_ms(row, seconds):
    """Column transformers_ms."""
    return quartiles("transformers_ms", [s * 1e3 for s in seconds])


# ============================================================================
# 4. The model
# ============================================================================

M1_LAYERS = {"num_hidden_layers": 4, "attn_type_list": [0, 0, 0, 1]}  # 25 B parameters
TRAINED = {"vocab_size": 32_000, "hidden_size": 2048, "num_hidden_layers": 16}  # 0.98 B active
TRAINED |= {"num_attention_heads": 16, "num_key_value_heads": 2}
TRAINED |= {"intermediate_size": 3072, "num_local_experts": 16}
QUICK = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4}
QUICK |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
LONG = (2048, 8192, 32_768)  # prompts
AGAIN = {"no": False, "yes": True}  # activations are computed again when going backward


def our_model(config):
    """A random model in bf16, router gates fp32."""
    model = on_gpu(m1.MiniMaxM1, config, torch.bfloat16).requires_grad_(False)
    for layer in model.layers:
        layer.block_sparse_moe.gate.float()
    return model


def step_bytes(model, batch, n_tokens):
    """Bytes that a decode step moves at least: weights that `batch` tokens touch, states in and
    out, keys and values of n_tokens.
    """
    c, n, cache = model.config, m1.count_parameters(model.config), model.new_cache(1, 1).layers
    E, k = c.num_local_experts, c.num_experts_per_tok
    touched = n["experts"] * (1 - (1 - k / E) ** batch)
    weights = n["total"] - n["embedding"] - n["experts"] + touched
    states = sum(2 * x.nbytes for x in cache if torch.is_tensor(x))
    kv = sum(t.nbytes for x in cache if isinstance(x, tuple) for t in x)
    return 2 * weights + batch * (states + n_tokens * kv)


def pass_flops(config, n_sequences, n_tokens, head):
    """FLOPs of a forward pass at least: 2 per active weight and token, and causal softmax."""
    active = m1.count_parameters(config)["active_with_head" if head else "active"]
    pairs = 2 * n_tokens**2 * config.num_attention_heads * config.head_dim
    return n_sequences * (2 * active * n_tokens + pairs * sum(config.attn_type_list))


def rollout(flags):
    """Tokens/s of generation at `base`, bf16, 64-token prompts, 128 new tokens: rollout.csv."""
    rows = measured(flags, "rollout", time_rollouts)
    columns = {"batch": "{batch:,.0f}", "tokens/s": "{tokens_per_s:,.0f}"}
    columns |= {"one step, ms": "{step_ms:.3f}", "memory floor, tokens/s": "{floor_per_s:,.0f}"}
    columns |= {"share of it": "{share:.2f}"}
    print_table(rows, columns | {"transformers": "{transformers_tokens_per_s:,.0f}"})


def time_rollouts(quick):
    """Rows of rollout.csv; the whole of generate is timed, prompts included."""
    (bandwidth, machine), rows, prompt, new = this_gpu(), [], 64, 8 if quick else 128
    config = m1.M1Config.preset("tiny" if quick else "base", vocab_size=512)
    model = our_model(config)
    for batch in (1, 4) if quick else (1, 64, 256, 1024):
        prompts = torch.randint(0, 512, (batch, prompt)).tolist()
        how = {"max_new_tokens": new, "eos_id": -1, "repetition_stop": 0}
        runs = [partial(engine.generate, model, prompts, seed=seed, **how) for seed in range(4)]
        seconds = [run().seconds for run in runs][1:]  # the first records the graphs
        floor = batch * bandwidth / step_bytes(model, batch, prompt + new / 2)
        speeds = [batch * new / s for s in seconds]
        row = {"batch": batch, "step_ms": f"{median(seconds) / new * 1e3:.4g}"}
        row |= quartiles("tokens_per_s", speeds) | {"floor_per_s": f"{floor:.5g}"}
        rows.append(row | {"share": f"{median(speeds) / floor:.3f}"})
        engine.Graphs.forget(model)

    def prepare(theirs, row):
        prompts = torch.randint(0, 512, (row["batch"], prompt), device=DEVICE)
        return partial(their_generate, theirs, prompts, new)

    def columns(row, seconds):
        speeds = [row["batch"] * new / s for s in seconds]
        return quartiles("transformers_tokens_per_s", speeds)

    compare(rows, config, prepare, columns)
    return [row | machine for row in rows]


def model_parts(flags):
    """A decode step and the prefill of four M1 layers of full width, a training step of a model
    with 0.98 B active parameters: model.csv.
    """
    rows, layers = by(measured(flags, "model", time_model), "job"), []
    columns = {"size": "{size:,.0f}", "ms": "{ms:.2f}", "floor, ms": "{floor_ms:.2f}"}
    columns |= {"x floor": "{x:.2f}", "transformers, ms": "{transformers_ms:.2f}"}
    training = rows.pop("training", [])
    for part in rows.values():
        layers += part
    print_table(layers, {"job": "{job}"} | columns)
    if training:
        columns = {"training, activations computed again": "{recompute}"} | columns
        columns |= {"tokens/s": "{tokens_per_s:,.0f}", "peak memory, GB": "{peak_gb:.1f}"}
        print_table(training, columns)


def time_model(quick):
    """Rows of model.csv. Floors: the bytes of a decode step; the arithmetic of the others, at the
    rate of a large product.
    """
    (bandwidth, machine), side = this_gpu(), 512 if quick else 8192
    n, batches, lengths, L = (64, (1, 4), (256,), 32) if quick else (1024, (1, 16, 64), LONG, 4096)
    a = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    rate = 2 * side**3 / median(event_seconds(lambda: a @ a) for _ in range(10))

    config = m1.M1Config(**M1_LAYERS | (QUICK if quick else {}))
    layers = time_layers(config, n, batches, lengths, bandwidth, rate)
    compare(layers, config, partial(their_pass, n=n), their_ms)
    config = m1.M1Config(**TRAINED | (QUICK if quick else {}))
    training = time_training(config, 4, L, rate)
    own = {"product_tflops": f"{rate / 1e12:.3g}"} | machine
    return [row | own for row in layers + training]


def timed(job, size, seconds, floor):
    """A row of model.csv."""
    row = {"job": job, "size": size} | quartiles("ms", [s * 1e3 for s in seconds])
    return row | {"floor_ms": f"{floor * 1e3:.4g}", "x": f"{median(seconds) / floor:.3f}"}


def time_layers(config, n, batches, lengths, bandwidth, rate):
    """Rows of a decode step after n tokens, for each size of a batch, and of the prefill of one
    prompt into a cache, its last logits included.
    """
    model, rows = our_model(config), []
    for batch in batches:
        cache = model.new_cache(batch, n + 64)
        tokens = torch.randint(0, config.vocab_size, (batch,), device=DEVICE)

        def step(cache=cache, tokens=tokens):
            cache.position.fill_(n)
            model.decode(tokens, cache, n + 64)

        seconds = gpu_race({"step": [step]}, 10)["step"]
        rows.append(timed("decode", batch, seconds, step_bytes(model, batch, n) / bandwidth))
    for length in lengths:
        cache, seconds = model.new_cache(1, length), []
        tokens = torch.randint(0, config.vocab_size, (1, length), device=DEVICE)
        for _ in range(5):
            cache.reset()
            seconds.append(event_seconds(partial(model, tokens, cache=cache, last_only=True)))
        floor = pass_flops(config, 1, length, head=False) / rate
        rows.append(timed("prefill", length, seconds[1:], floor))  # the first one compiles
    return rows


def time_training(config, N, L, rate):
    """Rows of forward and backward of N packed sequences of L tokens: fp32 weights and gradients,
    products in bf16, no optimizer; a row for each way of keeping activations that fits.
    """
    rows = []
    model = on_gpu(m1.MiniMaxM1, config, torch.float32)
    model.compute = torch.bfloat16
    tokens = torch.randint(0, config.vocab_size, (1, N * L), device=DEVICE)
    ends = torch.arange(0, N * L + 1, L, dtype=torch.int32, device=DEVICE)

    def step():
        model.zero_grad(set_to_none=True)
        hidden, aux = model.hidden(tokens, cu_seqlens=ends)
        logp = model.target_logp(hidden, tokens.roll(-1, 1))
        (config.router_aux_loss_coef * aux.router_loss - logp.mean()).backward()

    floor = 3 * pass_flops(config, N, L, head=True) / rate  # a backward pass is two forward
    for again, model.recompute in AGAIN.items():
        model.zero_grad(set_to_none=True)
        free()
        try:
            seconds = [event_seconds(step) for _ in range(6)][1:]  # the first one compiles
        except torch.OutOfMemoryError:
            print(f"training, computed again: {again}: more memory than there is", flush=True)
            continue
        row = {"recompute": again, "tokens_per_s": f"{N * L / median(seconds):.5g}"}
        row |= {"peak_gb": f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"}
        rows.append(timed("training", N * L, seconds, floor) | row)
    return rows


# ============================================================================
# 5. One long sequence
# ============================================================================

PATTERNS = {"hybrid": None, "lightning": 0, "softmax": 1}  # kinds of layers, None = 7 : 1
NAMES = {"hybrid": "7 lightning : 1 softmax", "lightning": "all lightning"}
NAMES |= {"softmax": "all softmax"}


def long(flags):
    """`base` over a million tokens, time and memory by position: long.csv and long.png."""
    rows = measured(flags, "long", time_long)
    columns = {"layers": "{pattern}", "after tokens": "{tokens:,.0f}"}
    columns |= {"reading, us a token": "{prefill_us:.2f}", "all so far, s": "{prefill_s:.2f}"}
    columns |= {"a further token, us": "{decode_us:,.0f}", "floor, us": "{floor_us:,.0f}"}
    print_table(rows, columns | {"cache, MB": "{cache_mb:,.1f}", "peak, GB": "{peak_gb:.2f}"})
    parts = by(rows, "pattern")
    first, last = parts["hybrid"][0], parts["hybrid"][-1]
    slower = last["decode_us"] / first["decode_us"]
    title = f"7 : 1 generates after {last['tokens']:,.0f} tokens in {slower:.2f} times the time it "
    title += f"takes after {first['tokens']:,.0f} ({rows[0]['gpu']})"
    with picture(flags, "long", 2, (11, 4.5), title) as (left, right):
        for color, (pattern, part) in zip(("tab:green", "tab:blue", "tab:orange"), parts.items()):
            how = {"color": color, "band": 0}
            draw_curve(left, part, "tokens", "decode_us", f"{NAMES[pattern]}, generating", **how)
            draw_curve(left, part, "tokens", "prefill_us", "... reading", "o--", **how)
            draw_curve(right, part, "tokens", "cache_mb", NAMES[pattern], **how)
        left.set(title="time of a token", ylabel="microseconds")
        right.set(title="the cache grows with softmax layers alone", ylabel="cache in use, MB")
        for axis in (left, right):
            axis.set(xscale="log", yscale="log", xlabel="tokens of one sequence so far")
            axis.legend(fontsize=8)


def time_long(quick):
    """Rows of long.csv; with all softmax layers a million tokens would take a minute to read."""
    (bandwidth, machine), rows = this_gpu(), []
    piece, places = (16, (16, 64)) if quick else (2**14, (2**14, 2**16, 2**18, 2**20))
    for pattern, kind in PATTERNS.items():
        shape = {"vocab_size": 512, "max_position_embeddings": 2**21}
        config = m1.M1Config.preset("tiny" if quick else "base", **shape)
        if kind is not None:
            config.attn_type_list = [kind] * config.num_hidden_layers
        most = 2**18 if pattern == "softmax" else 2**20
        found = read_long(config, piece, [n for n in places if n <= most], bandwidth)
        rows += [{"pattern": pattern} | row | machine for row in found]
        print(NAMES[pattern], flush=True)
    return rows


def read_long(config, piece, places, bandwidth):
    """Rows of one pattern: random tokens are read in pieces; at each of these places the last
    piece's time, and a decode step's, after which the sequence goes on as if it had not been.
    """
    model, rows, seconds = our_model(config), [], []
    cache = model.new_cache(1, places[-1] + 1)
    tokens = torch.randint(0, config.vocab_size, (1, places[-1]), device=DEVICE)
    for part in tokens[:, : 2 * piece].split(piece, 1):  # compiles
        model(part, cache=cache, last_only=True)
    cache.reset()
    for n in places:
        for start in range(len(seconds) * piece, n, piece):
            new = tokens[:, start : start + piece]
            seconds.append(event_seconds(partial(model, new, cache=cache, last_only=True)))
        states = [x.clone() for x in cache.layers if torch.is_tensor(x)]

        def step(n=n):
            cache.position.fill_(n)
            model.decode(tokens[0, :1], cache, n + 1)

        steps = gpu_race({"step": [step]}, 10)["step"]
        cache.position.fill_(n)
        for x, state in zip((x for x in cache.layers if torch.is_tensor(x)), states):
            x.copy_(state)
        row = {"tokens": n} | quartiles("decode_us", [s * 1e6 for s in steps])
        row["floor_us"] = f"{step_bytes(model, 1, n) / bandwidth * 1e6:.4g}"
        row |= {"prefill_us": f"{seconds[-1] / piece * 1e6:.4g}"}
        row |= {"prefill_s": f"{sum(seconds):.4g}"}
        row["cache_mb"] = f"{sum(x.nbytes for x in used(cache, n)) / 1e6:.6g}"
        rows.append(row | {"peak_gb": f"{torch.cuda.max_memory_allocated() / 1e9:.3f}"})
    return rows


def used(cache, n=None):
    """What n tokens (None: all) occupy: n slots of softmax layers, whole states of lightning's."""
    layers = ([t[:, :n] for t in x] if isinstance(x, tuple) else [x] for x in cache.layers)
    return [tensor for layer in layers for tensor in layer]


BENCHES = {"kernel": kernel, "decode-step": decode_step}
BENCHES |= {"rollout": rollout, "model": model_parts, "long": long}
