"""What a machine does: Figure 1 of the report and every speed; a name, a CSV, a picture each.

    python bench.py flops        Figure 1 (right): inference FLOPs against generation length
    python bench.py length       ... and measured: a small hybrid beside its all-softmax twin
    python bench.py forms        every form of attention against length; what M1's heads remember
    python bench.py cpu          training, generation, RL beside transformers' MiniMax if installed
    python bench.py kernel       lightning attention on a GPU: memory floor, fla, SDPA
    python bench.py decode-step  one token of many sequences on a GPU
    python bench.py rollout      generation of the 0.65 B model on a GPU, many prompts at a time
    python bench.py model        four full-width M1 layers on a GPU (50 GB): a step, a long prompt

length, forms and cpu take a minute each, on an idle machine. Runs of train_rl.py are in studies/.

    1. flops, length, forms   2. cpu   3. kernel, decode-step   4. rollout, model
    5. timing, command line
"""

import contextlib
import math
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from timeit import timeit

from tyro.conf import Positional

import cispo
import sample
import train_rl
from cli import Late, command_line, parse, torch
from cli import model as m1
from experience import Batch, make_batch, trained_logp
from studies import common
from studies.common import by, draw_curve, picture, print_table, quartiles, recorded, write_csv

attn = Late("lightning_attn")
fla, transformers = Late("fla.ops.simple_gla"), Late("transformers")  # to compare with
WALL = partial(timeit, setup="gc.enable()", number=1)

# ============================================================================
# 1. Against length: Figure 1 (right), a small model, forms of attention
# ============================================================================

K = 1024
LENGTHS = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 100, 112, 128)  # times K
MODELS = {"r1": "DeepSeek-R1", "qwen3": "Qwen3-235B-A22B", "m1": "MiniMax-M1"}
TWINS = {"hybrid": "7 lightning : 1 softmax", "softmax": "all softmax"}


def generation_flops(model, convention, n):
    """FLOPs to generate n tokens: a part linear in n (weights, lightning) and a quadratic one.

    "report" reproduces the 17 markers of each curve of Figure 1 to 0.04 % (read off its vector
    plot): QK^T causal but PV a full n x n product, R1's three dense FFNs twice, M1 with 8 softmax
    layers (its config.json has 10), lightning attention 32 times its 4 n K^2. "textbook": 2 FLOPs
    per active weight (head included), n (n + 1) / 2 visible pairs, a state update and a read.
    """
    if convention == "report":
        return {
            "r1": 2 * 37.707e9 * n + 61 * 128 * (192 + 2 * 128) * n**2,
            "qwen3": 2 * 21.518e9 * n + 94 * 64 * (128 + 2 * 128) * n**2,
            "m1": 2 * 47.434e9 * n + 72 * 2 * 8192**2 * n + 8 * 64 * (128 + 2 * 128) * n**2,
        }[model]
    return {
        "r1": 2 * 36.518e9 * n + 61 * 128 * (192 + 128) * n * (n + 1),
        "qwen3": 2 * 21.518e9 * n + 94 * 64 * (128 + 128) * n * (n + 1),
        "m1": 2 * 47.157e9 * n + 70 * 64 * 4 * 128**2 * n + 10 * 64 * (128 + 128) * n * (n + 1),
    }[model]


def flops(flags):
    """Redraw Figure 1 (right) with both ways of counting: flops.csv and flops.png."""
    titles = {"report": "counted as in the report", "textbook": "textbook causal counting"}
    rows, shown = [], (32, 64, 100, 128)
    print("M1's FLOPs as a share of R1's      " + "".join(f"{n:>6}K" for n in shown))
    with picture(flags, "flops", 2, (10, 4), sharey=True) as axes:
        for axis, (way, title) in zip(axes, titles.items()):
            curves = {m: [generation_flops(m, way, n * K) for n in LENGTHS] for m in MODELS}
            for model, y in curves.items():
                axis.plot(LENGTHS, [f / 1e16 for f in y], "o-", ms=3, label=MODELS[model])
                row = {"model": model, "convention": way}
                rows += [row | {"tokens": n * K, "flops": f"{f:.9e}"} for n, f in zip(LENGTHS, y)]
            share = {n: m / r for n, m, r in zip(LENGTHS, curves["m1"], curves["r1"])}
            print(f"{title:<35}" + "".join(f"{share[n]:7.1%}" for n in shown))
            title = f"{title}: M1 needs {share[100]:.0%} of R1 at 100K"
            axis.set(title=title, xlabel="generated tokens (x 1024)")
        axes[0].set_ylabel("FLOPs (x 1e16)")
        axes[0].legend()
        write_csv(Path(flags.out) / "flops.csv", rows)
    print('The report\'s text says "about 25 % at 100K"; its own curve reaches that near 128K.')


def length(flags):
    """Time per generated token and size of the cache against context: length.csv and length.png."""
    rows = measured(flags, "length", time_twins)
    first, last = rows[0], rows[-1]
    faster, less = (last[f"softmax_{unit}"] / last[f"hybrid_{unit}"] for unit in ("ms", "mb"))
    with picture(flags, "length", 2, (10, 4)) as axes:
        for axis, unit in zip(axes, ("ms", "mb")):
            draw(axis, rows, "context", TWINS, unit, xlabel="tokens of context")
        title = f"the hybrid is {faster:.1f} times as fast at {last['context']:,.0f} tokens"
        axes[0].set(title=title, ylabel="ms per generated token")
        axes[1].set(title=f"with a cache {less:.1f} times smaller", ylabel="cache, MB")
        axes[0].legend()
    columns = {f"{t}, {u}": f"{{{t}_{u.lower()}:,.2f}}" for u, t in product(("ms", "MB"), TWINS)}
    print_table(rows, {"context": "{context:,.0f}"} | columns)
    hybrid, softmax = (last[f"{twin}_ms"] / first[f"{twin}_ms"] for twin in TWINS)
    print(
        f"From {first['context']:,.0f} to {last['context']:,.0f} tokens of context a step takes "
        f"{hybrid:.1f} times as long in the hybrid and {softmax:.1f} times in its all-softmax twin;"
        f" there the hybrid is {faster:.1f} times as fast, with a cache {less:.1f} times smaller."
    )


def time_twins(quick):
    """Rows of length.csv: one sequence, random weights; only the kind of attention differs. Caches
    hold random numbers, which cost a step the same as what 32K tokens would have left there.
    """
    contexts, steps, rounds = ((16, 32), 2, 2) if quick else ([2**i for i in range(8, 16)], 8, 9)
    models, caches, rows = {}, {}, []
    for twin, kinds in zip(TWINS, (None, [1] * 8)):
        config = m1.M1Config.preset("tiny" if quick else "small", attn_type_list=kinds)
        models[twin] = m1.MiniMaxM1(config)
        caches[twin] = models[twin].new_cache(1, contexts[-1] + steps)
        for tensors in used(caches[twin]):
            tensors.normal_()
    for n in contexts:
        row = {"context": n}
        runs = {twin: partial(decode, models[twin], caches[twin], n, steps) for twin in TWINS}
        for twin, seconds in race(runs, rounds).items():
            row |= quartiles(f"{twin}_ms", [s / steps * 1e3 for s in seconds])
            row[f"{twin}_mb"] = f"{sum(x.nbytes for x in used(caches[twin], n)) / 1e6:.6g}"
        rows.append(row)
    return rows


def decode(model, cache, n, steps):
    """`steps` greedy tokens after a context of n."""
    cache.position.fill_(n)
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(steps):
        token = model(token, cache=cache)[:, -1].argmax(-1, keepdim=True)


def used(cache, n=None):
    """What n tokens (None: all) occupy: n slots of softmax layers, whole states of lightning's."""
    layers = ([t[:, :n] for t in x] if isinstance(x, tuple) else [x] for x in cache.layers)
    return [tensor for layer in layers for tensor in layer]


HEADS, WIDTH = 4, 64
CURVES = {form: f"lightning, {form}" for form in ("recurrent", "quadratic", "chunk")}
CURVES |= {"softmax": "softmax (SDPA)"}
LONGEST_QUADRATIC = 4 * K  # at 8K its tables over pairs of tokens, in fp64, would pass 5 GB


def forms(flags):
    """Time per token against length, and half-lives in M1, layer by head: forms.csv, forms.png."""
    rows = measured(flags, "forms", time_forms)
    told, memory = [], half_lives()
    for other in ("softmax", "quadratic"):
        n = crossover(rows, "chunk_us", f"{other}_us")
        told.append(f"beats {other} from {n:,.0f} tokens on" if n else f"does not beat {other}")
    with picture(flags, "forms", 2, (11, 4.2)) as (left, right):
        xlabel = f"tokens of one sequence, forward pass, {HEADS} heads of width {WIDTH}, CPU"
        draw(left, rows, "tokens", CURVES, "us", xlabel=xlabel, ylabel="microseconds per token")
        left.set_title(f"lightning in chunks {told[0]}")
        left.set_ylim(top=5_000)  # room for the legend
        left.legend(loc="upper left", fontsize=8)
        image = right.imshow(memory.numpy(), norm="log", aspect="auto")
        title = "what M1's heads remember (blank: softmax layers)"
        right.set(title=title, xlabel="head", ylabel="layer")
        right.figure.colorbar(image, label="half-life in tokens")
    print_table(rows, {"tokens": "{tokens:,.0f}"} | {f"{x}, us": f"{{{x}_us:.2f}}" for x in CURVES})
    known = memory[~memory.isnan()]
    print(
        f"The chunk form {' and '.join(told)}. Half-lives in M1 go from {known.min():.1f} to "
        f"{known.max():,.0f} tokens; {(known > 1000).float().mean():.1%} of its lightning heads "
        "remember beyond 1,000."
    )


def time_forms(quick):
    """Rows of forms.csv: every form takes and returns (1, L, heads, width), fp32."""
    slope, rows = attn.decay_slopes(HEADS, 0, 8), []
    runs = {form: partial(attn.lightning_attention, slope=slope, impl=form) for form in CURVES}
    runs["softmax"] = m1.SoftmaxAttention.attend
    for n in (16, 32) if quick else (2**i for i in range(6, 15)):
        qkv, row = torch.randn(3, 1, n, HEADS, WIDTH), {"tokens": n}
        if n > LONGEST_QUADRATIC:
            runs.pop("quadratic", None)
        now = {form: partial(run, *qkv) for form, run in runs.items()}
        for form, seconds in race(now, 2 if quick else min(max(2**14 // n, 5), 50)).items():
            row |= quartiles(f"{form}_us", [s / n * 1e6 for s in seconds])
        rows.append(row)
    return rows


def crossover(rows, a, b):
    """The length from which on column a stays below b, log-interpolated; None if it ends above."""
    gaps = [(r["tokens"], math.log(r[a] / r[b])) for r in rows if a in r and b in r]
    start = gaps[0][0]
    for (n, above), (m, below) in zip(gaps, gaps[1:]):
        if above >= 0 > below:
            start = n * (m / n) ** (above / (above - below))
    return start if gaps[-1][1] < 0 else None


def half_lives():
    """Tokens after which a head of M1 has forgotten half, ln 2 / slope (layers, heads); or NaN."""
    c = m1.M1Config.preset("m1")
    H, n = c.num_attention_heads, c.num_hidden_layers
    tokens = math.log(2) / torch.stack([attn.decay_slopes(H, layer, n) for layer in range(n)])
    return tokens.masked_fill(torch.tensor(c.attn_type_list)[:, None] == 1, math.nan)


# ============================================================================
# 2. Beside transformers, on a CPU
# ============================================================================

BATCHES = {"training": ((48, 24), (64, 24), (256, 24), (16, 256))}
BATCHES |= {"generation": ((64, 14), (256, 14)), "rl step": ((256, 14),)}  # 32 prompts x 8
GOALS = {"training": 1.3, "generation": 1.5, "rl step": 1.5}  # times transformers' tokens/s
G, UPDATES = 8, 4  # of an RL step


def cpu(flags):
    """Tokens/s at `tiny` beside transformers' MiniMax of the same shape: cpu.csv and cpu.png."""
    rows = measured(flags, "cpu", time_cpu)
    columns = {"job": "{job}", "sequences x tokens": "{batch}", "ours, tokens/s": "{ours:,.0f}"}
    ratio = "{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})"
    columns |= {"transformers": "{theirs:,.0f}", "ratio": ratio}
    print_table(rows, columns)
    if "theirs" not in rows[0]:
        return print("transformers 5 is not installed: nothing to compare with, no picture.")
    with picture(flags, "cpu", 1, (8, 4)) as [axis]:
        ratios, ends = [row["ratio"] for row in rows], ("ratio_low", "ratio_high")
        spread = [[abs(row["ratio"] - row[end]) for row in rows] for end in ends]
        names = ["{job}\n{batch}".format(**row) for row in rows]
        axis.bar(names, ratios, yerr=spread, capsize=4, color="tab:green", alpha=0.7)
        axis.plot(names, [GOALS[row["job"]] for row in rows], "k_", ms=40)
        axis.set(title="tokens/s, transformers = 1 (lines: goals)", ylabel="median and quartiles")
    verdicts = []
    for job, its_rows in by(rows, "job").items():
        goal, ratios = GOALS[job], [row["ratio"] for row in its_rows]
        low = sum(r < goal for r in ratios)
        reached = f"missed in {low} of {len(ratios)}" if low else "reached"
        verdict = f"{job} is {min(ratios):.2f} to {max(ratios):.2f} times as fast"
        verdicts.append(f"{verdict} (goal {goal}: {reached})")
    print(f"Beside transformers {rows[0]['transformers']}, {', '.join(verdicts)}.")


def time_cpu(quick):
    """Rows of cpu.csv: both sides take turns in one process, with the same batches and AdamW."""
    sides, version, rows = {"ours": our_side()}, None, []
    with contextlib.suppress(ImportError):
        sides["theirs"], version = their_side()
    for job, batches in BATCHES.items():
        for n, new in ((32, 4),) if quick else batches:
            sizes = {"training": (n, new + 1), "generation": (n, 8), "rl step": (n // G, 8)}
            tokens = torch.randint(0, 256, sizes[job])
            runs = {name: partial(side[job], tokens, new) for name, side in sides.items()}
            seconds = race(runs, 2 if quick else 15)
            row = {"job": job, "batch": f"{n}x{new}", "transformers": version}
            row |= {name: f"{n * new / median(s):.5g}" for name, s in seconds.items()}
            if version:
                row |= quartiles("ratio", [b / a for a, b in zip(*seconds.values())])
            rows.append(row)
    return rows


def our_side():
    """{job: function of (tokens, n)} of our model."""
    model = m1.MiniMaxM1(m1.M1Config.preset("tiny"))

    def forward(tokens):
        hidden, aux = model.hidden(tokens)
        return model.head(hidden), aux.router_loss

    def generate(prompts, n, **how):
        how |= {"max_new_tokens": n, "eos_id": -1, "seed": 0}
        return sample.generate(model, prompts.tolist(), **how)

    def experience(prompts, n):
        rollout, asked = generate(prompts, n, group_size=G), prompts.repeat_interleave(G, 0)
        found = rollout.tokens.tolist(), rollout.mask, "cpu", [0.0, 1.0] * (len(asked) // 2)
        return make_batch(asked.tolist(), *found, rollout.logp)

    def logp(part):
        logp, _, aux = trained_logp(model, part)
        return logp, aux.router_loss

    return jobs(model, forward, generate, experience, logp)


def their_side():
    """The same of transformers' model, and its version. ImportError where it is not installed."""
    transformers.logging.set_verbosity_error()
    c = m1.M1Config.preset("tiny")
    kinds = ["full_attention" if kind else "linear_attention" for kind in c.attn_type_list]
    parts = ("full_attn", "linear_attn", "mlp")
    settings = asdict(c) | {f"{x}_alpha_factor": c.layernorm_mlp_alpha for x in parts}
    config = transformers.MiniMaxConfig(**settings, layer_types=kinds)  # other keys: same names
    model = transformers.MiniMaxForCausalLM(config).train()

    def forward(tokens, n=0):  # logits of the last n tokens, 0 = all
        how = {"output_router_logits": torch.is_grad_enabled(), "use_cache": False}
        out = model(tokens, logits_to_keep=n, **how)
        return out.logits, out.aux_loss

    def generate(prompts, n, group_size=1):  # top_k 0: else it looks for the 50 likeliest first
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "use_cache": True}
        how |= {"num_return_sequences": group_size, "attention_mask": torch.ones_like(prompts)}
        return model.generate(prompts, min_new_tokens=n, max_new_tokens=n, pad_token_id=0, **how)

    def experience(prompts, n):
        tokens = generate(prompts, n, G)
        learned = torch.ones(len(tokens), n, dtype=torch.bool)
        return Batch(tokens, learned, learned, torch.arange(len(tokens)) % 2.0, learned)

    def logp(part):
        n = part.trained.shape[1]
        (logits, router_loss), targets = forward(part.tokens[:, :-1], n), part.tokens[:, -n:, None]
        return logits.log_softmax(-1).gather(-1, targets)[..., 0], router_loss

    return jobs(model, forward, generate, experience, logp), transformers.__version__


def jobs(model, forward, generate, experience, logp):
    """{job: function of (tokens, n)} of a side; in an RL step every second response is right."""
    optimizer = train_rl.make_optimizer(model, 1e-4)

    def update(loss, router_loss):
        (loss + model.config.router_aux_loss_coef * router_loss).backward()
        train_rl.clip(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def train(tokens, _):
        logits, router_loss = forward(tokens[:, :-1])
        logits, targets = logits.flatten(0, 1), tokens[:, 1:].flatten()
        update(torch.nn.functional.cross_entropy(logits, targets), router_loss)

    def rl_step(prompts, n):
        batch = experience(prompts, n)
        advantages = cispo.group_advantages(batch.rewards, G)
        parts = batch._replace(advantages=advantages).slices(UPDATES, G)
        with torch.no_grad():
            old = [logp(part)[0] for part in parts]
        for part, old_logp in zip(parts, old):
            new_logp, router_loss = logp(part)
            weights = cispo.token_weights(part.trained)
            loss, *_ = cispo.policy_loss(new_logp, old_logp, part.advantages, weights)
            update(loss, router_loss)

    return {"training": train, "generation": generate, "rl step": rl_step}


# ============================================================================
# 3. The kernel and one token, on a GPU
# ============================================================================

SHAPES = [(1, 8192, 64, 128), (1, 32768, 64, 128), (8, 8192, 64, 128)]
SHAPES += [(8, 2048, 16, 64), (1, 8192, 8, 128)]
RIVALS = {"recurrent": "lightning, definition", "chunk": "lightning, PyTorch"}
RIVALS |= {"triton": "lightning, this kernel", "fla": "lightning, fla"}
RIVALS |= {"flash": "softmax, SDPA flash", "cudnn": "softmax, SDPA cuDNN"}
LONGEST = {"recurrent": 512} | dict.fromkeys(("chunk", "flash", "cudnn"), 32 * K)  # tokens
JOBS = {"forward": ("forward", 4), "both": ("forward + backward", 11)}  # tensors moved at least
ERRORS = ("o", "state", "dq", "dk", "dv")


def kernel(flags):
    """Attention on a GPU against the memory floor and other kernels: kernel.csv, kernel.png."""
    if flags.sweep:
        return print_table(recorded(flags, "kernel-sweep", time_block_sizes))
    rows = measured(flags, "kernel", time_kernels)
    shapes, lengths = by(rows, "part").values()
    shown = {"B, L, H, D": "{shape}"}
    for job, (title, _) in JOBS.items():
        columns = shown | {f"{title}: floor, us": f"{{{job}_floor_us:,.0f}}"}
        columns |= {f"{x}, us": f"{{{x}_{job}_us:,.0f}}" for x in RIVALS if x != "recurrent"}
        print_table(shapes, columns | {"this kernel, x floor": f"{{triton_{job}_x:.2f}}"})
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
        qkvo = torch.randn(4, *shape, device="cuda", dtype=torch.bfloat16)
        slope, floor = attn.decay_slopes(shape[2], 0, 80, "cuda"), qkvo.nbytes / bandwidth
        for flat, (C, BV, warps, stages) in product((True, False), usual):
            choice = {"C": C, "BV": BV, "warps": warps, "stages": stages, "flat": flat}
            with contextlib.suppress(attn.triton.runtime.errors.OutOfResources):
                run = partial(attn._scan, *qkvo, slope, **choice)
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
            for name, seconds in gpu_race(rivals(shape, job), 12).items():
                row |= quartiles(f"{name}_{job}_us", [s * scale for s in seconds])
            row[f"triton_{job}_x"] = f"{float(row[f'triton_{job}_us']) / floor / scale:.4g}"
        rows.append(row | (errors(shape) if part == "shapes" else {}))
        print(shape, flush=True)
    columns = dict.fromkeys(name for row in rows for name in row)  # before the machine's: all
    return [columns | row | machine for row in rows]


def rivals(shape, job):
    """{name: functions of nothing}, one for each set of inputs; all sets exceed the cache."""
    L, H = shape[1:3]
    slope, n_sets = attn.decay_slopes(H, 0, 80, "cuda"), 2**28 // (8 * math.prod(shape))
    sets = torch.randn(max(1, min(4, n_sets)), 4, *shape, device="cuda", dtype=torch.bfloat16)

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

    def call(function, q, k, v, do):
        if job == "forward":
            return function(q, k, v)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(function(q, k, v)[0], (q, k, v), do)

    return {name: [partial(call, f, *x) for x in sets] for name, f in functions.items()}


def errors(shape):
    """Worst relative error against fp64 of the first (fastest), middle and last (slowest) head."""
    L, H, D = shape[1:]
    slope, heads = attn.decay_slopes(H, 0, 80, "cuda"), [0, H // 2, H - 1]
    *qkv, do = torch.randn(4, 1, L, H, D, device="cuda", dtype=torch.bfloat16)
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
    slope = attn.decay_slopes(H, 0, 80, "cuda")
    for B in (1, 4) if quick else (1, 4, 16, 64, 256):
        qkv = torch.randn(3, B, H, D, device="cuda", dtype=torch.bfloat16)
        states = torch.zeros(max(1, 64 // B), B, H, D, D, device="cuda")  # exceed the cache
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
# 4. The model on a GPU
# ============================================================================


def on_gpu(config):
    """A random model in bf16, router gates fp32."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = m1.MiniMaxM1(config).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
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


def rollout(flags):
    """Tokens/s of generation at `base`, bf16, 64-token prompts, 128 new tokens: rollout.csv."""
    rows = measured(flags, "rollout", time_rollouts)
    columns = {"batch": "{batch:,.0f}", "tokens/s": "{tokens_per_s:,.0f}"}
    columns |= {"one step, ms": "{step_ms:.3f}", "memory floor, tokens/s": "{floor_per_s:,.0f}"}
    print_table(rows, columns | {"share of it": "{share:.2f}"})


def time_rollouts(quick):
    """Rows of rollout.csv; the whole of generate is timed, prompts included."""
    (bandwidth, machine), rows, prompt, new = this_gpu(), [], 64, 128
    model = on_gpu(m1.M1Config.preset("base", vocab_size=512))
    for batch in (1, 64) if quick else (1, 64, 256, 1024):
        prompts = torch.randint(0, 512, (batch, prompt)).tolist()
        how = {"max_new_tokens": new, "eos_id": -1, "repetition_stop": 0}
        runs = [partial(sample.generate, model, prompts, seed=seed, **how) for seed in range(4)]
        seconds = [run().seconds for run in runs][1:]  # the first records the graphs
        floor = batch * bandwidth / step_bytes(model, batch, prompt + new / 2)
        speeds = [batch * new / s for s in seconds]
        row = {"batch": batch, "step_ms": f"{median(seconds) / new * 1e3:.4g}"}
        row |= quartiles("tokens_per_s", speeds) | {"floor_per_s": f"{floor:.5g}"}
        rows.append(row | {"share": f"{median(speeds) / floor:.3f}"} | machine)
        sample.Graphs.forget(model)
    return rows


def model_slice(flags):
    """A decode step and the prefill of four M1 layers of full width: model.csv."""
    rows = measured(flags, "model", time_model)
    columns = {
        "job": "{job}",
        "size": "{size:,.0f}",
        "ms": "{ms:.2f}",
        "floor, ms": "{floor_ms:.2f}",
    }
    print_table(rows, columns | {"x floor": "{x:.2f}"})


def time_model(quick):
    """Rows of model.csv. Floors: the bytes of a step; 2 FLOPs per active weight and token and those
    of causal softmax, at the rate of a large product.
    """
    (bandwidth, machine), rows, n = this_gpu(), [], 1024
    small = {"hidden_size": 512, "intermediate_size": 512} if quick else {}
    config = m1.M1Config(num_hidden_layers=4, attn_type_list=[0, 0, 0, 1], **small)
    model, a = on_gpu(config), torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    flops = 2 * 8192**3 / median(event_seconds(lambda: a @ a) for _ in range(10))
    cases = [("decode", batch) for batch in (1, 16, 64)]
    cases += [("prefill", length) for length in ((2048,) if quick else (2048, 8192, 32768))]
    for job, size in cases:
        cache = model.new_cache(*((size, n + 64) if job == "decode" else (1, size)))
        tokens = torch.randint(0, 1000, (size,), device="cuda")
        if job == "decode":

            def step(cache=cache, tokens=tokens):
                cache.position.fill_(n)
                model.decode(tokens, cache, n + 64)

            seconds = gpu_race({job: [step]}, 10)[job]
            floor = step_bytes(model, size, n) / bandwidth
        else:
            active = 2 * m1.count_parameters(config)["active"] * size
            softmax = 2 * size**2 * config.num_attention_heads * config.head_dim  # one layer
            floor, seconds = (active + softmax) / flops, []
            for _ in range(5):
                cache.reset()
                with torch.no_grad():
                    run = partial(model, tokens[None], cache=cache, last_only=True)
                    seconds.append(event_seconds(run))
        row = {"job": job, "size": size} | quartiles("ms", [s * 1e3 for s in seconds[-4:]])
        row |= {"floor_ms": f"{floor * 1e3:.4g}", "x": f"{median(seconds[-4:]) / floor:.3f}"}
        rows.append(row | {"product_tflops": f"{flops / 1e12:.0f}"} | machine)
    return rows


# ============================================================================
# 5. Timing, command line
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
    in a CUDA graph, short ones eight times over, so that no launch is timed.
    """
    graphs, n_calls = {}, {}
    for name, calls in runs.items():
        graphs[name], stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()  # compiles
            torch.cuda.synchronize()
            again = 8 if event_seconds(calls[0]) < 1e-3 else 1
            with torch.cuda.graph(graphs[name], stream=stream):
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
    x, y = torch.randn(2, 2**29, device="cuda")
    bandwidth = 2 * x.nbytes / median(event_seconds(lambda: y.copy_(x)) for _ in range(10))
    row = {"gpu": torch.cuda.get_device_name(), "triton": attn.triton.__version__, "fla": None}
    with contextlib.suppress(ImportError):  # flash-linear-attention
        row["fla"] = Late("fla").__version__
    return bandwidth, row | {"copy_tb_s": f"{bandwidth / 1e12:.3f}"}


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


BENCHES = {"flops": flops, "length": length, "forms": forms, "cpu": cpu}
BENCHES |= {"kernel": kernel, "decode-step": decode_step}
BENCHES |= {"rollout": rollout, "model": model_slice}


@dataclass(frozen=True)
class Flags(common.Flags):
    """What to measure."""

    name: Positional[str] = ""
    """flops, length, forms, cpu, kernel, decode-step, rollout or model"""
    sweep: bool = False
    """kernel: time its block sizes instead"""


@command_line
def main(argv=None):
    """Run one benchmark."""
    flags = parse(Flags, argv, __doc__)
    if flags.name not in BENCHES:
        names, studies = ", ".join(BENCHES), "studies are run with python -m studies.NAME"
        raise ValueError(f"{flags.name or 'NAME'}: choose from {names}; {studies}")
    BENCHES[flags.name](flags)


if __name__ == "__main__":
    main()
