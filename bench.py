"""Every claim and every speed: one sub-command, one CSV, one picture each.

    python bench.py flops        Figure 1 (right) of the report: inference FLOPs against generation length (a second)
    python bench.py length       ... and measured: a small hybrid beside its all-softmax twin, at up to 32K tokens
    python bench.py forms        every form of attention against length; a map of what M1's heads remember
    python bench.py cpu          training and generation beside transformers' MiniMax of the same shape (if installed)
    python bench.py main         Figure 4 in miniature: the main job for seeds 0, 1, 2 (3 to 9 minutes on two CPU cores)

length, forms and cpu take about a minute each and want an idle machine. Files go to figures/ (--out changes that).
--redraw makes the picture again from the CSV that is there. Numbers in README.md come from these files.

    1. flops    2. length    3. forms    4. cpu    5. main    6. timing, files, pictures, command line
"""

import collections
import contextlib
import csv
import dataclasses
import functools
import math
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

import train_rl
from lightning_attn import decay_slopes, lightning_attention
from model import M1Config, MiniMaxM1, SoftmaxAttention, command_line, flag, parse_flags
from sample import generate

# ============================================================================
# 1. FLOPs against generation length                  (report, Figure 1, right)
# ============================================================================

K = 1024
LENGTHS = [n * K for n in (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 100, 112, 128)]
MODELS = {"r1": "DeepSeek-R1", "qwen3": "Qwen3-235B-A22B", "m1": "MiniMax-M1"}


def generation_flops(model, convention, n):
    """FLOPs to generate n tokens: a part linear in n (weights, lightning attention) and a quadratic one (softmax).

    "report" reproduces the 17 markers of each curve of Figure 1 to 0.04 % (read off the report's vector plot): QK^T
    counted causally but PV as a full n x n product, R1's three dense FFNs twice, M1 with 8 softmax layers
    (its config.json has 10) and lightning attention at 32 times its 4 n K^2.
    "textbook" counts every multiply-add once: 2 FLOPs per active weight (head included) and token, softmax over the
    n (n + 1) / 2 visible pairs, lightning attention as one state update and one read.
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
    out, titles = Path(flags.out), {"report": "counted as in the report", "textbook": "textbook causal counting"}
    rows = [
        {"model": model, "convention": way, "tokens": n, "flops": f"{generation_flops(model, way, n):.9e}"}
        for way in titles
        for model in MODELS
        for n in LENGTHS
    ]
    write_csv(out / "flops.csv", rows)

    def share(way, n):
        return generation_flops("m1", way, n * K) / generation_flops("r1", way, n * K)

    with picture(out / "flops.png", 1, 2, figsize=(10, 4), sharey=True) as axes:
        for axis, (way, title) in zip(axes, titles.items()):
            for model, name in MODELS.items():
                y = [generation_flops(model, way, n) / 1e16 for n in LENGTHS]
                axis.plot([n / K for n in LENGTHS], y, "o-", ms=3, label=name)
            axis.set(title=f"{title}: M1 needs {share(way, 100):.0%} of R1 at 100K", xlabel="generated tokens (x 1024)")
        axes[0].set_ylabel("FLOPs (x 1e16)")
        axes[0].legend()

    print("M1's FLOPs as a share of R1's      " + "".join(f"{n:>6}K" for n in (32, 64, 100, 128)))
    for way, title in titles.items():
        print(f"{title:<35}" + "".join(f"{share(way, n):7.1%}" for n in (32, 64, 100, 128)))
    print('The report\'s text says "about 25 % at 100K"; its own curve reaches that near 128K.')


# ============================================================================
# 2. Length, measured                          (the companion of Figure 1, right)
# ============================================================================

TWINS = {"hybrid": "7 lightning : 1 softmax", "softmax": "all softmax"}


def length(flags):
    """Time per generated token and size of the cache against context: length.csv and length.png."""
    rows = measured(flags, "length", time_twins)
    first, last = rows[0], rows[-1]
    faster, smaller = (last[f"softmax_{unit}"] / last[f"hybrid_{unit}"] for unit in ("ms", "mb"))
    with picture(Path(flags.out) / "length.png", 1, 2, figsize=(10, 4)) as axes:
        for axis, unit in zip(axes, ("ms", "mb")):
            for twin, name in TWINS.items():
                draw_curve(axis, rows, "context", f"{twin}_{unit}", name)
            axis.set(xlabel="tokens of context", xscale="log", yscale="log")
        title = f"the hybrid is {faster:.1f} times as fast at {last['context']:,.0f} tokens"
        axes[0].set(title=title, ylabel="ms per generated token")
        axes[1].set(title=f"with a cache {smaller:.1f} times smaller", ylabel="cache of one sequence, MB")
        axes[0].legend()

    columns = {f"{twin}, {unit}": f"{{{twin}_{unit.lower()}:,.2f}}" for unit in ("ms", "MB") for twin in TWINS}
    print_table(rows, {"context": "{context:,.0f}", **columns})
    hybrid, softmax = (last[f"{twin}_ms"] / first[f"{twin}_ms"] for twin in TWINS)
    print(
        f"From {first['context']:,.0f} to {last['context']:,.0f} tokens of context a step takes {hybrid:.1f} times as "
        f"long in the hybrid and {softmax:.1f} times in its all-softmax twin; there the hybrid is {faster:.1f} times "
        f"as fast, with a cache {smaller:.1f} times smaller."
    )


def time_twins(quick):
    """Rows of length.csv: one sequence in two models of one shape, random weights; only the kind of attention differs.

    The caches are filled with random numbers instead of what tokens would have left there. That is fair: a decode step
    reads every slot below its position and does the same arithmetic whatever it finds. To read 32K tokens would take
    the all-softmax twin minutes and change no shape.
    """
    contexts, steps, rounds = ((16, 32), 2, 2) if quick else ([2**i for i in range(8, 16)], 8, 9)
    models, caches, rows = {}, {}, []
    for twin in TWINS:
        kinds = [1] * 8 if twin == "softmax" else None
        models[twin] = MiniMaxM1(M1Config.preset("tiny" if quick else "small", attn_type_list=kinds))
        caches[twin] = models[twin].new_cache(1, contexts[-1] + steps)
        for x in caches[twin].layers:
            for tensor in x if isinstance(x, tuple) else (x,):
                tensor.normal_()
    for n in contexts:
        rows.append({"context": n})
        runs = {twin: functools.partial(decode, models[twin], caches[twin], n, steps) for twin in TWINS}
        for twin, seconds in race(runs, rounds).items():
            rows[-1] |= quartiles(f"{twin}_ms", [s / steps * 1e3 for s in seconds])
            rows[-1] |= {f"{twin}_mb": f"{cache_bytes(caches[twin], n) / 1e6:.6g}"}
    return rows


@torch.no_grad()
def decode(model, cache, n, steps):
    """`steps` greedy tokens after a context of n."""
    cache.position.fill_(n)
    token = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(steps):
        token = model(token, cache=cache)[:, -1].argmax(-1, keepdim=True)


def cache_bytes(cache, n):
    """Bytes that n tokens occupy: n slots of every softmax layer, the whole state of every lightning layer."""
    return sum(sum(t[:, :n].nbytes for t in x) if isinstance(x, tuple) else x.nbytes for x in cache.layers)


# ============================================================================
# 3. Forms of attention, and what M1 remembers
# ============================================================================

HEADS, WIDTH = 4, 64
CURVES = {form: f"lightning, {form}" for form in ("recurrent", "quadratic", "chunk")} | {"softmax": "softmax (SDPA)"}
LONGEST_QUADRATIC = 4 * K  # at 8K its tables over pairs of tokens, in fp64, would pass 5 GB


def forms(flags):
    """Time per token against length, and a map of half-lives over M1's layers and heads: forms.csv and forms.png."""
    rows = measured(flags, "forms", time_forms)
    beats = {other: crossover(rows, "chunk_us", f"{other}_us") for other in ("softmax", "quadratic")}
    memory = half_lives()
    with picture(Path(flags.out) / "forms.png", 1, 2, figsize=(11, 4.2)) as (left, right):
        for form, name in CURVES.items():
            draw_curve(left, rows, "tokens", f"{form}_us", name)
        for (other, n), style in zip(beats.items(), (":", "--")):
            if n:
                left.axvline(n, color="gray", lw=1, ls=style, label=f"chunk beats {other}: {n:,.0f} tokens")
        n = beats["softmax"]
        title = (
            f"lightning in chunks beats softmax from {n:,.0f} tokens on" if n else "softmax stays ahead of lightning"
        )
        xlabel = f"tokens of one sequence, forward pass, {HEADS} heads of width {WIDTH}, CPU"
        left.set(title=title, xlabel=xlabel, ylabel="microseconds per token", xscale="log", yscale="log")
        left.set_ylim(top=5_000)  # room for the legend
        left.legend(loc="upper left", fontsize=8)
        image = right.imshow(memory.numpy(), norm="log", aspect="auto")
        right.set(title="what M1's heads remember (blank: softmax layers)", xlabel="head", ylabel="layer")
        right.figure.colorbar(image, label="half-life in tokens")

    print_table(rows, {"tokens": "{tokens:,.0f}"} | {f"{form}, us": f"{{{form}_us:.2f}}" for form in CURVES})
    told = (f"beats {other} from {n:,.0f} tokens on" if n else f"does not beat {other}" for other, n in beats.items())
    known = memory[~memory.isnan()]
    print(
        f"The chunk form {' and '.join(told)}. Half-lives in M1 go from {known.min():.1f} to {known.max():,.0f} "
        f"tokens; {(known > 1000).float().mean():.1%} of its lightning heads remember beyond 1,000."
    )


def time_forms(quick):
    """Rows of forms.csv: every form takes and returns (1, L, heads, width), fp32."""
    slope = decay_slopes(HEADS, 0, 8)
    runs = {form: functools.partial(lightning_attention, slope=slope, impl=form) for form in CURVES}
    runs["softmax"] = SoftmaxAttention.attend
    rows = []
    for n in (16, 32) if quick else (2**i for i in range(6, 15)):
        qkv = torch.randn(3, 1, n, HEADS, WIDTH)
        now = {form: functools.partial(run, *qkv) for form, run in runs.items()}
        if n > LONGEST_QUADRATIC:
            del now["quadratic"]
        rows.append({"tokens": n})
        for form, seconds in race(now, 2 if quick else min(max(2**14 // n, 5), 50)).items():
            rows[-1] |= quartiles(f"{form}_us", [s / n * 1e6 for s in seconds])
    return rows


def crossover(rows, a, b):
    """The length from which on column a stays below column b, interpolated in logarithms; None if it ends above."""
    gaps = [(row["tokens"], math.log(row[a] / row[b])) for row in rows if a in row and b in row]
    start = gaps[0][0]
    for (n, above), (m, below) in zip(gaps, gaps[1:]):
        if above >= 0 > below:
            start = n * (m / n) ** (above / (above - below))
    return start if gaps[-1][1] < 0 else None


def half_lives():
    """Tokens after which half of what a head of M1 read is forgotten, ln 2 / slope: (layers, heads); NaN: softmax."""
    c = M1Config.preset("m1")
    slopes = [decay_slopes(c.num_attention_heads, layer, c.num_hidden_layers) for layer in range(c.num_hidden_layers)]
    return (math.log(2) / torch.stack(slopes)).masked_fill(torch.tensor(c.attn_type_list)[:, None] == 1, torch.nan)


# ============================================================================
# 4. Beside transformers, on a CPU
# ============================================================================

BATCHES = {"training": ((48, 24), (64, 24), (256, 24), (16, 256)), "generation": ((64, 14), (256, 14))}
GOALS = {"training": 1.3, "generation": 1.5}  # times transformers' tokens per second


def cpu(flags):
    """Tokens per second at `tiny` beside transformers' MiniMaxForCausalLM of the same shape: cpu.csv and cpu.png."""
    rows = measured(flags, "cpu", time_cpu)
    columns = {"job": "{job}", "sequences x tokens": "{batch}", "ours, tokens/s": "{ours:,.0f}"}
    columns |= {"transformers": "{theirs:,.0f}", "ratio": "{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})"}
    print_table(rows, columns)
    if "theirs" not in rows[0]:
        print("transformers 5 is not installed: nothing to compare with, no picture.")
        return

    with picture(Path(flags.out) / "cpu.png", figsize=(8, 4)) as axis:
        spread = [[abs(row["ratio"] - row[end]) for row in rows] for end in ("ratio_low", "ratio_high")]
        names = ["{job}\n{batch}".format(**row) for row in rows]
        bars = axis.bar(names, [row["ratio"] for row in rows], yerr=spread, capsize=4, color="tab:green", alpha=0.7)
        axis.bar_label(bars, ["{ours:,.0f}\ntokens/s".format(**row) for row in rows], label_type="center")
        for i, row in enumerate(rows):
            axis.plot([i - 0.45, i + 0.45], [GOALS[row["job"]]] * 2, "k--", lw=1)
        axis.set(title="tokens per second, transformers = 1 (dashed: the goal)", ylabel="ratio, median and quartiles")

    verdicts = []
    for job, goal in GOALS.items():
        ratios = [row["ratio"] for row in rows if row["job"] == job]
        reached = "reached" if min(ratios) >= goal else f"missed in {sum(r < goal for r in ratios)} of {len(ratios)}"
        verdicts.append(f"{job} is {min(ratios):.2f} to {max(ratios):.2f} times as fast (goal {goal}: {reached})")
    print(f"Beside transformers {rows[0]['transformers']}, {' and '.join(verdicts)}.")


def time_cpu(quick):
    """Rows of cpu.csv: both sides take turns in one process, with the same threads, batches, AdamW and clipping, fp32,
    each with its router loss (0.001) on; then they sample at temperature 1, prompts of 8 tokens and no end token.
    """
    sides, version = {"ours": our_side()}, None
    with contextlib.suppress(ImportError):
        sides["theirs"], version = their_side()
    rows = []
    for job, batches in BATCHES.items():
        for n, new in ((2, 4),) if quick else batches:
            tokens = torch.randint(0, 256, (n, new + 1 if job == "training" else 8))
            runs = {name: functools.partial(side[job], tokens, new) for name, side in sides.items()}
            seconds = race(runs, 2 if quick else 15)
            row = {"job": job, "batch": f"{n}x{new}", "transformers": version}
            row |= {name: f"{n * new / statistics.median(s):.5g}" for name, s in seconds.items()}
            if version:
                row |= quartiles("ratio", [theirs / ours for ours, theirs in zip(*seconds.values())])
            rows.append(row)
    return rows


def our_side():
    """{job: function of (tokens, n)} of our model."""
    model = MiniMaxM1(M1Config.preset("tiny"))

    def forward(tokens):
        hidden, aux = model.hidden(tokens)
        return model.head(hidden), aux.router_loss

    def sample(prompts, n):
        generate(model, prompts.tolist(), max_new_tokens=n, eos_id=-1, seed=0)

    return {"training": trainer(model, forward), "generation": sample}


def their_side():
    """The same of transformers' model, and its version. ImportError where it is not installed."""
    import transformers

    transformers.logging.set_verbosity_error()
    c = M1Config.preset("tiny")
    kinds = ["full_attention" if kind else "linear_attention" for kind in c.attn_type_list]
    alphas = {f"{part}_alpha_factor": c.layernorm_mlp_alpha for part in ("full_attn", "linear_attn", "mlp")}
    config = transformers.MiniMaxConfig(**dataclasses.asdict(c), **alphas, layer_types=kinds)  # other keys: same names
    model = transformers.MiniMaxForCausalLM(config).train()

    def forward(tokens):
        out = model(tokens, output_router_logits=True, use_cache=False)
        return out.logits, out.aux_loss

    def sample(prompts, n):  # top_k 0: its default would look for the 50 likeliest tokens first
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "use_cache": True, "pad_token_id": 0}
        mask = torch.ones_like(prompts)
        model.generate(prompts, attention_mask=mask, min_new_tokens=n, max_new_tokens=n, **how)

    return {"training": trainer(model, forward), "generation": sample}, transformers.__version__


def trainer(model, forward):
    """A function of tokens (N, L + 1): forward (logits and router loss), cross-entropy, backward, clip, AdamW."""
    optimizer = train_rl.make_optimizer(model, 0.0)

    def step(tokens, _):
        logits, router_loss = forward(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        (loss + model.config.router_aux_loss_coef * router_loss).backward()
        train_rl.optimizer_step(model, optimizer, 1e-4, 1.0)

    return step


# ============================================================================
# 5. The main job over seeds                               (report, Figure 4)
# ============================================================================

SEEDS = (0, 1, 2)


def main_job(flags):
    """Run `python train_rl.py --device cpu` for three seeds: main-seed0.csv to main-seed2.csv (their logs), main.csv
    (their summaries) and main.png.
    """
    out = Path(flags.out)
    if not flags.redraw:
        summaries = []
        out.mkdir(parents=True, exist_ok=True)
        for seed in SEEDS:
            with tempfile.TemporaryDirectory() as folder:
                summaries.append(train_rl.main(["--device", "cpu", "--seed", str(seed), "--out", f"{folder}/run"]))
                shutil.copy(Path(folder, "run", "log.csv"), out / f"main-seed{seed}.csv")
        write_csv(out / "main.csv", summaries)
    logs = [train_rl.read_log(out / f"main-seed{seed}.csv") for seed in SEEDS]

    with picture(out / "main.png", 1, 3, figsize=(11, 3.4)) as axes:
        for axis, (column, (_, label)) in zip(axes, train_rl.CURVES.items()):
            draw_curve(axis, median_and_range(logs, "step", column), "step", column)
            axis.set(xlabel="RL step", ylabel=label)
        title = "RL makes the model think first: accuracy rises with response length (band: range of 3 seeds)"
        axes[0].figure.suptitle(title)

    columns = {"accuracy": ".3f", "fork_rate": ".2f", "length": ".1f"}
    columns = {f"{name}, before -> after": f"{{{name}_start:{f}}} -> {{{name}_end:{f}}}" for name, f in columns.items()}
    print_table(train_rl.read_log(out / "main.csv"), {"seed": "{seed:.0f}", **columns, "seconds": "{seconds:.0f}"})


def median_and_range(logs, x, y):
    """Over several logs, where all measured y: rows of x, y (the median), y_low and y_high (the range)."""
    curves = [{row[x]: row[y] for row in log if y in row} for log in logs]
    at = sorted(set.intersection(*map(set, curves)))
    values = [sorted(curve[t] for curve in curves) for t in at]
    return [{x: t, y: v[len(v) // 2], f"{y}_low": v[0], f"{y}_high": v[-1]} for t, v in zip(at, values)]


# ============================================================================
# 6. Timing, files, pictures, command line
# ============================================================================


def race(runs, rounds):
    """Seconds of every call of several functions, {name: [seconds] * rounds}, after one call each to warm up.

    They take turns, every other round in reverse order: what slows the machine for a while slows all of them.
    """
    for run in runs.values():
        run()
    seconds = {name: [] for name in runs}
    for i in range(rounds):
        for name in list(runs)[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles(name, values):
    """Median and quartiles as columns: name, name_low, name_high."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: f"{median:.4g}", f"{name}_low": f"{low:.4g}", f"{name}_high": f"{high:.4g}"}


def measured(flags, name, measure):
    """Rows of NAME.csv: measured and written now, or with --redraw those that are there."""
    path = Path(flags.out) / f"{name}.csv"
    if not flags.redraw:
        torch.manual_seed(0)
        machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        write_csv(path, [row | machine for row in measure(flags.quick)])
    rows = read_csv(path)
    print("medians, fp32, {threads:.0f} CPU threads, torch {torch}".format(**rows[0]))
    return rows


def read_csv(path):
    """A CSV file -> a list of dicts; what looks like a number is one, and what is empty is absent."""

    def value(text):
        with contextlib.suppress(ValueError):
            return float(text)
        return text

    with open(path, newline="") as file:
        return [{name: value(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def write_csv(path, rows):
    """A list of dicts -> a CSV file. The first row has every column; a later one may lack some."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows, columns):
    """Aligned columns {title: format of a row}; nan where a row lacks what the format names."""
    rows = [collections.defaultdict(lambda: math.nan, row) for row in rows]
    table = [list(columns), *([text.format_map(row) for text in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)))


@contextlib.contextmanager
def picture(path, *grid, **kw):
    """The axes of plt.subplots(*grid, **kw) to draw on; saved as `path` at the end."""
    plt = train_rl.pyplot()
    figure, axes = plt.subplots(*grid, layout="constrained", **kw)
    yield axes
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curve(axis, rows, x, y, label=None):
    """Column y against column x with a band from y_low to y_high, where they were measured."""
    rows = [row for row in rows if y in row]
    at, mid = ([row[column] for row in rows] for column in (x, y))
    low, high = ([row.get(f"{y}_{end}", row[y]) for row in rows] for end in ("low", "high"))
    axis.fill_between(at, low, high, alpha=0.3, lw=0)
    axis.plot(at, mid, "o-", ms=3, label=label)


@dataclass(frozen=True)
class Flags:
    """Shared by all benchmarks."""

    out: str = flag("figures", "folder for CSV and PNG files", "files")
    redraw: bool = flag(False, "only draw the picture, from the CSV files that are there", "files")
    quick: bool = flag(False, "length, forms, cpu: tiny sizes, to see that they work; needs --out", "sizes")

    def __post_init__(self):
        if self.quick and self.out == "figures":
            raise ValueError("--quick makes numbers that mean nothing; keep them out of figures/ with --out DIR")


BENCHES = {"flops": flops, "length": length, "forms": forms, "cpu": cpu, "main": main_job}


@command_line
def main(argv=None):
    """python bench.py NAME [--out DIR] [--redraw] [--quick]"""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    flags = parse_flags(Flags, argv, __doc__)
    if name not in BENCHES:
        raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(BENCHES)}, e.g. python bench.py flops")
    BENCHES[name](flags)


if __name__ == "__main__":
    main()
