"""Every claim and every speed: one sub-command, one CSV, one picture each.

    python bench.py flops        Figure 1 (right) of the report: inference FLOPs against generation length (a second)
    python bench.py length       ... and measured: a small hybrid beside its all-softmax twin, at up to 32K tokens
    python bench.py forms        every form of attention against length; a map of what M1's heads remember
    python bench.py cpu          training and generation beside transformers' MiniMax of the same shape (if installed)
    python bench.py main         Figure 4 in miniature: the main job for seeds 0, 1, 2 (3 to 9 minutes on two CPU cores)
    python bench.py traps        nine mistakes of reimplementers: the error that each makes and the test that turns red
    python bench.py kernel       the lightning-attention kernel on a GPU: memory floor, fla, SDPA (--sweep: block sizes)
    python bench.py decode-step  one token of many sequences on a GPU
    python bench.py forks        one response, token by token: what PPO's clip drops and CISPO keeps (2 minutes)
    python bench.py algos        CISPO, DAPO, GRPO, REINFORCE at 16 updates per rollout (report, Figure 2)
    python bench.py algos --full the map of where CISPO helps: fork prior x updates x learning rate (two hours)
    python bench.py control      ... without a planted fork
    python bench.py hybrid       associative recall for five mixtures of lightning and softmax layers (100 minutes)
    python bench.py budget       accuracy against the thinking budget, for the checkpoints of two windows of one run
    python bench.py eps | eps-fast | precision | adam | balance | windows    for the cap, the head, AdamW's eps, ...

length, forms and cpu take about a minute each and want an idle machine; traps takes a minute, too, a study about ten.
Files go to figures/ (--out changes that). --redraw makes picture and table again from the CSV that is there. Numbers in
README.md come from these files.

    1. flops   2. length   3. forms   4. cpu   5. main   6. traps   7. kernel   8. studies   9. forks, gradients
    10. hybrid   11. budget   12. timing, files, pictures, command line
"""

import collections
import contextlib
import csv
import dataclasses
import functools
import itertools
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import cispo
import lightning_attn
import model as m1
import sample
import tasks
import train_rl
from lightning_attn import decay_slopes, lightning_attention, lightning_step
from model import M1Config, MiniMaxM1, SoftmaxAttention, command_line, flag, load_pretrained, parse_flags
from sample import Tokenizer, generate

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
    titles = {"report": "counted as in the report", "textbook": "textbook causal counting"}
    rows = [
        {"model": model, "convention": way, "tokens": n, "flops": f"{generation_flops(model, way, n):.9e}"}
        for way, model, n in itertools.product(titles, MODELS, LENGTHS)
    ]
    write_csv(Path(flags.out) / "flops.csv", rows)

    def share(way, n):
        return generation_flops("m1", way, n * K) / generation_flops("r1", way, n * K)

    with picture(flags, "flops", 2, (10, 4), sharey=True) as axes:
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
    with picture(flags, "length", 2, (10, 4)) as axes:
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
    for twin, kinds in zip(TWINS, (None, [1] * 8)):
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
    with picture(flags, "forms", 2, (11, 4.2)) as (left, right):
        for form, name in CURVES.items():
            draw_curve(left, rows, "tokens", f"{form}_us", name)
        for (other, n), style in zip(beats.items(), (":", "--")):
            if n:
                left.axvline(n, color="gray", lw=1, ls=style, label=f"chunk beats {other}: {n:,.0f} tokens")
        n, title = beats["softmax"], "softmax stays ahead of lightning"
        left.set_title(f"lightning in chunks beats softmax from {n:,.0f} tokens on" if n else title)
        left.set_xlabel(f"tokens of one sequence, forward pass, {HEADS} heads of width {WIDTH}, CPU")
        left.set(ylabel="microseconds per token", xscale="log", yscale="log")
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
        fit = [form for form in runs if form != "quadratic" or n <= LONGEST_QUADRATIC]
        now = {form: functools.partial(runs[form], *qkv) for form in fit}
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
BATCHES |= {"rl step": ((256, 14),)}  # 32 prompts x 8
GOALS = {"training": 1.3, "generation": 1.5, "rl step": 1.5}  # times transformers' tokens per second
RL = train_rl.Flags(preset="tiny")  # groups of 8, 4 updates, CISPO


def cpu(flags):
    """Tokens per second at `tiny` beside transformers' MiniMaxForCausalLM of the same shape: cpu.csv and cpu.png."""
    rows = measured(flags, "cpu", time_cpu)
    columns = {"job": "{job}", "sequences x tokens": "{batch}", "ours, tokens/s": "{ours:,.0f}"}
    columns |= {"transformers": "{theirs:,.0f}", "ratio": "{ratio:.2f} ({ratio_low:.2f}-{ratio_high:.2f})"}
    print_table(rows, columns)
    if "theirs" not in rows[0]:
        print("transformers 5 is not installed: nothing to compare with, no picture.")
        return

    with picture(flags, "cpu", 1, (8, 4)) as [axis]:
        spread = [[abs(row["ratio"] - row[end]) for row in rows] for end in ("ratio_low", "ratio_high")]
        names = ["{job}\n{batch}".format(**row) for row in rows]
        bars = axis.bar(names, [row["ratio"] for row in rows], yerr=spread, capsize=4, color="tab:green", alpha=0.7)
        axis.bar_label(bars, ["{ours:,.0f}\ntokens/s".format(**row) for row in rows], label_type="center")
        for i, row in enumerate(rows):
            axis.plot([i - 0.45, i + 0.45], [GOALS[row["job"]]] * 2, "k--", lw=1)
        axis.set(title="tokens per second, transformers = 1 (dashed: the goal)", ylabel="ratio, median and quartiles")

    verdicts = []
    for job, its_rows in by(rows, "job").items():
        goal, ratios = GOALS[job], [row["ratio"] for row in its_rows]
        reached = "reached" if min(ratios) >= goal else f"missed in {sum(r < goal for r in ratios)} of {len(ratios)}"
        verdicts.append(f"{job} is {min(ratios):.2f} to {max(ratios):.2f} times as fast (goal {goal}: {reached})")
    print(f"Beside transformers {rows[0]['transformers']}, {', '.join(verdicts)}.")


def time_cpu(quick):
    """Rows of cpu.csv: both sides take turns in one process, with the same threads, batches, AdamW and clipping, fp32,
    each with its router loss (0.001) on; then they sample at temperature 1, prompts of 8 tokens and no end token.
    An RL step is 8 responses to every prompt, random rewards, a pass for the old log-probs (ours has a quarter of them
    from its first update) and 4 updates on CISPO's loss.
    """
    sides, version = {"ours": our_side()}, None
    with contextlib.suppress(ImportError):
        sides["theirs"], version = their_side()
    rows = []
    for job, batches in BATCHES.items():
        for n, new in ((32, 4),) if quick else batches:
            rows_in = n // RL.group_size if job == "rl step" else n
            tokens = torch.randint(0, 256, (rows_in, new + 1 if job == "training" else 8))
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

    def rl_step(prompts, n):
        prompts, G = prompts.tolist(), RL.group_size
        rollout = generate(model, prompts, group_size=G, max_new_tokens=n, eos_id=-1, seed=0)
        repeated = [prompt for prompt in prompts for _ in range(G)]
        batch = train_rl.make_batch(repeated, rollout.tokens.tolist(), rollout.mask.tolist(), "cpu")
        experience = train_rl.Experience(batch, coins(len(repeated)), rollout.logp.flatten(), {})
        train_rl.update(model, optimizer, experience, RL, 1e-4)

    optimizer = train_rl.make_optimizer(model, 0.0)
    return {"training": trainer(model, forward), "generation": sample, "rl step": rl_step}


def their_side():
    """The same of transformers' model, and its version. ImportError where it is not installed."""
    import transformers

    transformers.logging.set_verbosity_error()
    c = M1Config.preset("tiny")
    kinds = ["full_attention" if kind else "linear_attention" for kind in c.attn_type_list]
    alphas = {f"{part}_alpha_factor": c.layernorm_mlp_alpha for part in ("full_attn", "linear_attn", "mlp")}
    config = transformers.MiniMaxConfig(**dataclasses.asdict(c), **alphas, layer_types=kinds)  # other keys: same names
    model = transformers.MiniMaxForCausalLM(config).train()

    def forward(tokens, n=0):  # logits of the last n tokens, 0 = all
        out = model(tokens, output_router_logits=torch.is_grad_enabled(), use_cache=False, logits_to_keep=n)
        return out.logits, out.aux_loss

    def sample(prompts, n, group_size=1):  # top_k 0: its default would look for the 50 likeliest tokens first
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "use_cache": True, "pad_token_id": 0}
        how |= {"num_return_sequences": group_size, "attention_mask": torch.ones_like(prompts)}
        return model.generate(prompts, min_new_tokens=n, max_new_tokens=n, **how)

    def logp(tokens, n):
        logits, router_loss = forward(tokens[:, :-1], n)
        return logits.log_softmax(-1).gather(-1, tokens[:, -n:, None])[..., 0], router_loss

    def rl_step(prompts, n):
        tokens = sample(prompts, n, RL.group_size)
        advantages = cispo.group_advantages(coins(len(tokens)), RL.group_size)
        parts = tokens.chunk(RL.updates_per_rollout)
        with torch.no_grad():
            old = [logp(part, n)[0] for part in parts]
        for part, old_logp, advantage in zip(parts, old, advantages.chunk(len(parts))):
            new_logp, router_loss = logp(part, n)
            weights = cispo.token_weights(torch.ones_like(new_logp, dtype=torch.bool))
            loss, _ = cispo.policy_loss(new_logp, old_logp, advantage, weights)
            (loss + model.config.router_aux_loss_coef * router_loss).backward()
            train_rl.optimizer_step(model, optimizer, 1e-4, 1.0)

    optimizer = train_rl.make_optimizer(model, 0.0)
    jobs = {"training": trainer(model, forward), "generation": sample, "rl step": rl_step}
    return jobs, transformers.__version__


def coins(n):
    """n rewards of 0 or 1, at random and always the same."""
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(0)).float()


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

    title = "RL makes the model think first: accuracy rises with response length (band: range of 3 seeds)"
    with picture(flags, "main", 3, (11, 3.4), title) as axes:
        for axis, (column, (_, label)) in zip(axes, train_rl.CURVES.items()):
            draw_median(axis, logs, "step", column)
            axis.set(xlabel="RL step", ylabel=label)

    columns = {"accuracy": ".3f", "fork_rate": ".2f", "length": ".1f"}
    columns = {f"{name}, before -> after": f"{{{name}_start:{f}}} -> {{{name}_end:{f}}}" for name, f in columns.items()}
    print_table(train_rl.read_log(out / "main.csv"), {"seed": "{seed:.0f}", **columns, "seconds": "{seconds:.0f}"})


# ============================================================================
# 6. Traps: mistakes that people make when they rebuild M1
# ============================================================================

HERE = Path(__file__).parent


def traps(flags):
    """One mistake at a time: the error that it makes and whether its test turns red (traps.csv)."""
    rows = recorded(flags, "traps", plant_all)
    columns = {"mistake": "{mistake}", "error": "{error}", "right": "{right:.2g}", "planted": "{planted:.2g}"}
    print_table(rows, columns | {"turns": "{turns}", "test": "{test}"})
    turned = [row["turns"] for row in rows]
    print(f"{turned.count('red')} of {len(rows)} mistakes turn their test red; {turned.count('GREEN')} stay unseen")


def plant_all(quick):
    """Rows of traps.csv: the error of right code, then with the mistake planted."""
    if not quick and colour(None, *{trap.test for trap in TRAPS}) == "red":
        raise ValueError("these tests fail without any mistake planted: python -m pytest test_m1.py says which")
    rows = []
    for trap in TRAPS:
        row = {"mistake": trap.mistake, "error": trap.measure.__doc__, "right": f"{trap.measure():.2g}"}
        with trap.plant():
            row["planted"] = f"{trap.measure():.2g}"
        turns = "not run" if quick else colour(trap.mistake, trap.test)
        rows.append(row | {"turns": turns, "test": trap.test, "torch": torch.__version__})
    return rows


def colour(mistake, *tests):
    """What tests of test_m1.py say with a mistake planted (None: with none), "red" or "GREEN", in a new process."""
    code = f"import sys, bench; sys.exit(bench.run_planted(*{(mistake, *tests)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    if done.returncode and "1 failed" not in done.stdout:  # a crash is no red
        raise ValueError(f"pytest could not run {', '.join(tests)}: {(done.stdout + done.stderr).strip()[-300:]}")
    return "red" if done.returncode else "GREEN"


def run_planted(mistake, *tests):
    """pytest's exit code, the mistake being planted before test_m1.py imports anything."""
    import pytest

    plants = {None: contextlib.nullcontext} | {trap.mistake: trap.plant for trap in TRAPS}
    with plants[mistake]():
        return pytest.main(["-qx", "-p", "no:cacheprovider", *(f"{HERE / 'test_m1.py'}::{test}" for test in tests)])


# What is measured: errors, near 0 in right code. The docstrings are printed in the table.


@torch.no_grad()
def logp_error():
    """max |log-prob - released|, nats"""
    given = np.load(HERE / "parity/expected.npz")
    long, short, *released = (torch.from_numpy(given[f"{n}_{x}"]) for x in ("ids", "logits") for n in ("long", "short"))
    tokens, mask = sample.left_pad([*long, *short], 0, "cpu")
    ours = load_pretrained(HERE / "parity")(tokens, mask=mask)[mask]
    return float((ours.log_softmax(-1) - torch.cat([x.flatten(0, 1) for x in released]).log_softmax(-1)).abs().max())


@torch.no_grad()
def ratio_error():
    """max |pi / pi_rollout - 1| at the start"""
    model, prompts = load_pretrained(HERE / "parity"), torch.arange(64).view(8, 8).tolist()
    rollout = generate(model, prompts, max_new_tokens=16, temperature=0.7, eos_id=-1, seed=0)
    batch = train_rl.make_batch(prompts, rollout.tokens.tolist(), rollout.mask.tolist(), "cpu")
    logp, _ = train_rl.trained_logp(model, batch, 0.7)
    return float((logp - rollout.logp[rollout.mask]).expm1().abs().max())


def fork_error():
    """|fork rate taught - asked for|"""
    flags, byte = train_rl.Flags(fork_prior=0.1), sample.Tokenizer.byte()
    batch = train_rl.demonstrations(flags, random.Random(0), byte, 10_000, "cpu")
    learned = batch.tokens[:, 1:][batch.trained]
    forks, guesses = (int((learned == ord(token)).sum()) for token in (tasks.FORK, tasks.GUESS))
    return abs(forks / (forks + guesses) - flags.fork_prior)


def advantage_error():
    """max |mean advantage of a group|"""
    rewards = torch.ones(8, 8).tril(-1).flatten()  # eight prompts, from hard to easy: 0 to 7 of 8 answers are right
    return float(cispo.group_advantages(rewards, 8).view(8, 8).mean(1).abs().max())


def weight_error():
    """gradient lost when padding is added"""
    mask = torch.arange(8) < torch.tensor([[3], [8]])
    gradient, padded = (cispo.token_weights(F.pad(mask, (0, n))).sum() for n in (0, 8))  # at ratio 1 and advantage 1
    return float(1 - padded / gradient)


class Trap(NamedTuple):
    """One mistake and who sees it."""

    mistake: str
    measure: Callable  # function of nothing: the error
    test: str
    owner: object  # a module or class, whose function `name` is replaced
    name: str
    wrong: Callable  # function of what stood there and of its arguments

    def plant(self):
        """A context in which our code makes the mistake."""
        right = getattr(self.owner, self.name)
        return mock.patch.object(self.owner, self.name, lambda *args, **kw: self.wrong(right, *args, **kw))


TRAPS = (
    Trap("rope on the whole head", logp_error, "test_logits_are_those_of_the_released_code",
         m1, "rope_tables", lambda right, positions, c, dtype: (  # transformers' own minimax class
             right(positions, dataclasses.replace(c, rotary_dim=c.head_dim), dtype))),
    Trap("slopes linear in the head", logp_error, "test_logits_are_those_of_the_released_code",
         m1, "_slopes", lambda right, H, layer, n_layers, device: (  # the lightning-attention papers
             8 * torch.arange(1, H + 1) / H * (1 - layer / (n_layers - 1) + 1e-5))),
    Trap("slopes alike in all layers", logp_error, "test_logits_are_those_of_the_released_code",
         m1, "_slopes", lambda right, H, layer, n_layers, device: right(H, 0, n_layers, device)),
    Trap("padding enters the state", logp_error,  # a mask on scores, as in softmax attention, has no scores here
         "test_left_padded_rows_get_what_the_released_code_gives_each_sequence_alone",
         m1.LightningAttention, "forward", lambda right, self, u, at, *state: (
             right(self, u, dataclasses.replace(at, mask=None, continues=False), *state))),
    Trap("logits in bf16", logp_error, "test_logits_and_router_stay_fp32_in_a_bf16_model",  # report sec. 3.2
         MiniMaxM1, "head", lambda right, self, hidden: train_rl.bf16_head(self, hidden)),
    Trap("temperature in rollouts only", ratio_error, "test_recorded_log_probs_are_those_of_training_mode",
         train_rl, "trained_logp", lambda right, model, batch, temperature=1, *more: right(model, batch, 1, *more)),
    Trap("planted forks carry loss", fork_error, "test_a_fork_without_loss_stays_visible_as_input",
         tasks, "demonstration", lambda right, *args: (right(*args)[0], 0)),  # RL is to teach thinking first
    Trap("advantage over the batch", advantage_error,  # answers to an easy prompt gain from its being easy
         "test_group_advantages_compare_siblings_and_vanish_exactly_in_flat_groups",
         cispo, "group_advantages", lambda right, rewards, G, *more: right(rewards, len(rewards), *more)),
    Trap("token mean over padding", weight_error,  # (loss * mask).mean()
         "test_token_weights_are_the_means_they_are_named_after",
         cispo, "token_weights", lambda right, mask, *more, **kw: right(torch.ones_like(mask), *more, **kw) * mask),
)  # fmt: skip


# ============================================================================
# 7. The kernel, on a GPU
# ============================================================================

SHAPES = [(1, 8192, 64, 128), (1, 32768, 64, 128), (8, 8192, 64, 128), (8, 2048, 16, 64), (1, 8192, 8, 128)]
RIVALS = {"recurrent": "lightning, definition", "chunk": "lightning, PyTorch", "triton": "lightning, this kernel"}
RIVALS |= {"fla": "lightning, fla", "flash": "softmax, SDPA flash", "cudnn": "softmax, SDPA cuDNN"}
LONGEST = {"recurrent": 512, "chunk": 32 * K, "flash": 32 * K, "cudnn": 32 * K}  # tokens, where not all are timed
JOBS = {"forward": 4, "both": 11}  # tensors read and written at least: q k v o; and q k v do, dq dk dv
JOB_TITLES = {"forward": "forward", "both": "forward + backward"}


def kernel(flags):
    """Forward and backward of attention on a GPU against the memory floor and other kernels: kernel.csv, kernel.png."""
    if flags.sweep:
        return print_table(recorded(flags, "kernel-sweep", time_block_sizes))
    rows = measured(flags, "kernel", time_kernels)
    shapes, lengths = by(rows, "part").values()
    for job, title in JOB_TITLES.items():
        columns = {"B, L, H, D": "{shape}", f"{title}: floor, us": f"{{{job}_floor_us:,.0f}}"}
        columns |= {f"{name}, us": f"{{{name}_{job}_us:,.0f}}" for name in RIVALS if name != "recurrent"}
        print_table(shapes, columns | {"this kernel, x floor": f"{{triton_{job}_x:.2f}}"})
    print("Relative error against fp64 at batch 1, the worst of a layer's fastest, middle and slowest head")
    print_table(shapes, {"B, L, H, D": "{shape}"} | {x: f"{{error_{x}:.1e}}" for x in ("o", "state", "dq", "dk", "dv")})

    title = "lightning attention: within 1.5 times the memory floor forward from 2,048 tokens on ({gpu})"
    with picture(flags, "kernel", 2, (11, 4.2), title.format(**rows[0])) as axes:
        for axis, (job, title) in zip(axes, JOB_TITLES.items()):
            for name, label in RIVALS.items():
                draw_curve(axis, lengths, "tokens", f"{name}_{job}_us", label)
            draw_curve(axis, lengths, "tokens", f"{job}_floor_us", "memory floor", "k--")
            xlabel = "tokens of one sequence, 64 heads of width 128, bf16"
            axis.set(title=title, xlabel=xlabel, ylabel="microseconds per token", xscale="log", yscale="log")
        axes[0].legend(fontsize=8)
    if "fla_forward_us" in shapes[0]:
        best = [min(row[f"fla_{job}_us"] / row[f"triton_{job}_us"] for row in shapes[:3]) for job in JOBS]
        print("At the first three shapes at least {:.2f} (forward) and {:.2f} times as fast as fla.".format(*best))


def time_block_sizes(quick):
    """Rows of kernel-sweep.csv: forward times of the kernel's possible block sizes, x floor, best first."""
    bandwidth, rows = copy_bandwidth(), []
    usual = [(64, 64, 4, n) for n in (2, 3, 4, 5)] + [(64, 32, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 2)]
    for shape in SHAPES[3:4] if quick else (SHAPES[0], SHAPES[2], SHAPES[3]):
        B, L, H, D = shape
        q, k, v, o = torch.randn(4, B, L, H, D, device="cuda", dtype=torch.bfloat16)
        slope, floor = decay_slopes(H, 0, 80, "cuda"), 8 * q.numel() / bandwidth
        for flat, (C, BV, warps, stages) in itertools.product((True, False), usual):
            choice = {"C": C, "BV": BV, "warps": warps, "stages": stages, "flat": flat}
            run = functools.partial(lightning_attn._scan, q, k, v, o, slope, **choice)
            with contextlib.suppress(lightning_attn.triton.runtime.errors.OutOfResources):
                seconds = statistics.median(gpu_race({"x": [run]}, 10)["x"])
                rows.append({"shape": "{}, {}, {}, {}".format(*shape), **choice, "x_floor": f"{seconds / floor:.3f}"})
    rows.sort(key=lambda row: (row["shape"], float(row["x_floor"])))
    return [row | {"gpu": torch.cuda.get_device_name()} for row in rows]


def time_kernels(quick):
    """Rows of kernel.csv: device time of a CUDA graph's replay, inputs rotated so that they do not stay in the cache.

    Microseconds; in the rows of part "lengths" microseconds per token.
    """
    bandwidth, rows = copy_bandwidth(), []
    cases = [("shapes", shape) for shape in (SHAPES[3:] if quick else SHAPES)]
    cases += [("lengths", (1, 2**i, 64, 128)) for i in ((8, 9) if quick else range(8, 18))]
    for part, shape in cases:
        B, L, H, D = shape
        row = {"part": part, "shape": "{}, {}, {}, {}".format(*shape), "tokens": L}
        scale = 1e6 / (1 if part == "shapes" else B * L)  # microseconds, or microseconds per token
        for job, n_tensors in JOBS.items():
            floor = n_tensors * B * L * H * D * 2 / bandwidth
            row[f"{job}_floor_us"] = f"{floor * scale:.5g}"
            for name, seconds in gpu_race(rivals(shape, job), 12).items():
                row |= quartiles(f"{name}_{job}_us", [s * scale for s in seconds])
                if name == "triton":
                    row[f"triton_{job}_x"] = f"{statistics.median(seconds) / floor:.4g}"
        rows.append(row | (errors(shape) if part == "shapes" else {}) | gpu_columns(bandwidth))
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items() if k.endswith(("_x", "shape"))), flush=True)
    every_column = dict.fromkeys(name for row in rows for name in row)  # in the first row, too, before the machine's
    return [every_column | row for row in rows]


def rivals(shape, job):
    """{name: functions of nothing}, one for each set of inputs; sets together are larger than the cache."""
    B, L, H, D = shape
    slope = decay_slopes(H, 0, 80, "cuda")
    n_sets = max(1, min(4, 2**28 // (8 * B * L * H * D)))
    sets = [[torch.randn(B, L, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4)] for _ in range(n_sets)]

    def lightning(impl, q, k, v):
        return lightning_attention(q, k, v, slope, impl=impl)[0]

    def sdpa(backend, q, k, v):
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True)
        return o.transpose(1, 2)

    functions = {impl: functools.partial(lightning, impl) for impl in ("triton", "chunk", "recurrent")}
    functions["flash"] = functools.partial(sdpa, SDPBackend.FLASH_ATTENTION)
    functions["cudnn"] = functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION)
    functions = {name: function for name, function in functions.items() if L <= LONGEST.get(name, L)}
    if fla_version() and H == 64:  # it tunes itself for minutes at every new head shape
        from fla.ops.simple_gla import chunk_simple_gla

        functions["fla"] = lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=-slope, scale=1.0)[0]

    def both(function, q, k, v, do):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(function(q, k, v), (q, k, v), do)

    if job == "both":
        return {name: [functools.partial(both, f, *x) for x in sets] for name, f in functions.items()}
    return {name: [functools.partial(f, *x[:3]) for x in sets] for name, f in functions.items()}


def gpu_columns(bandwidth):
    """What a row of a GPU benchmark says of the machine."""
    triton = {"gpu": torch.cuda.get_device_name(), "triton": lightning_attn.triton.__version__}
    return triton | {"fla": fla_version(), "copy_tb_s": f"{bandwidth / 1e12:.3f}"}


def fla_version():
    """Version of flash-linear-attention, installed for the comparison only, or None."""
    with contextlib.suppress(ImportError):
        import fla

        return fla.__version__


def errors(shape):
    """Worst relative error of a head (the first, fastest; one in the middle; the last, slowest) against fp64."""
    B, L, H, D = 1, *shape[1:]
    slope = decay_slopes(H, 0, 80, "cuda")
    q, k, v, do = (torch.randn(B, L, H, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(4))
    o, last = lightning_attention(q, k, v, slope, impl="triton")
    found = (o, last, *torch.autograd.grad(o, (q, k, v), do))
    worst = dict.fromkeys(("o", "state", "dq", "dk", "dv"), 0.0)
    for h in (0, H // 2, H - 1):
        head = slice(h, h + 1)
        exact = [x[:, :, head].detach().double().requires_grad_() for x in (q, k, v)]
        o, last = lightning_attention(*exact, slope[head], impl="chunk")
        right = (o, last, *torch.autograd.grad(o, exact, do[:, :, head].double()))
        for name, x, y in zip(worst, found, right):
            x = x[:, head] if name == "state" else x[:, :, head]
            worst[name] = max(worst[name], ((x - y).norm() / y.norm()).item())
    return {f"error_{name}": f"{error:.2e}" for name, error in worst.items()}


DECODE_BATCHES = (1, 4, 16, 64, 256)


def decode_step(flags):
    """One token of B sequences, 64 heads of width 128, against the floor: decode-step.csv and decode-step.png."""
    rows = measured(flags, "decode-step", time_steps)
    columns = {"batch": "{batch:.0f}", "floor, us": "{floor_us:,.1f}", "this kernel": "{triton_us:,.1f}"}
    print_table(rows, columns | {"PyTorch": "{torch_us:,.1f}", "fla": "{fla_us:,.1f}", "x floor": "{triton_x:.2f}"})
    with picture(flags, "decode-step", 1, (6, 4)) as [axis]:
        for name, label in (("triton", "this kernel"), ("torch", "PyTorch"), ("fla", "fla, fused recurrent")):
            draw_curve(axis, rows, "batch", f"{name}_us", label)
        draw_curve(axis, rows, "batch", "floor_us", "memory floor", "k--")
        axis.set(title="one token costs one pass over the states", xlabel="sequences", ylabel="microseconds")
        axis.set(xscale="log", yscale="log")
        axis.legend()


def time_steps(quick):
    """Rows of decode-step.csv."""
    bandwidth, H, D = copy_bandwidth(), 64, 128
    slope, rows = decay_slopes(H, 0, 80, "cuda"), []
    for B in DECODE_BATCHES[:2] if quick else DECODE_BATCHES:
        q, k, v = torch.randn(3, B, H, D, device="cuda", dtype=torch.bfloat16)
        states = torch.zeros(max(1, 64 // B), B, H, D, D, device="cuda")  # together larger than the cache
        steps = {impl: functools.partial(lightning_step, q, k, v, slope, impl=impl) for impl in ("triton", "torch")}
        runs = {impl: [functools.partial(step, state=s) for s in states] for impl, step in steps.items()}
        if fla_version():
            from fla.ops.simple_gla import fused_recurrent_simple_gla

            how = {"g_gamma": -slope, "scale": 1.0, "output_final_state": True}
            step = functools.partial(fused_recurrent_simple_gla, *(x[:, None] for x in (q, k, v)), **how)
            runs["fla"] = [functools.partial(step, initial_state=s) for s in states]
        floor = 8 * B * H * D * D / bandwidth
        row = {"batch": B, "floor_us": f"{floor * 1e6:.4g}"}
        for name, seconds in gpu_race(runs, 20).items():
            row |= quartiles(f"{name}_us", [s * 1e6 for s in seconds])
        rows.append(row | {"triton_x": f"{float(row['triton_us']) / floor / 1e6:.4g}"} | gpu_columns(bandwidth))
    return rows


def copy_bandwidth():
    """Bytes per second, read plus written, of a large copy in device memory; ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("this benchmark measures a GPU and there is none here")
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.nbytes / statistics.median(event_seconds(lambda: y.copy_(x)) for _ in range(10))


def event_seconds(run):
    """Seconds between two events on the GPU around run()."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def gpu_race(runs, rounds):
    """Seconds of device time of one call: {name: [seconds] * rounds}. runs {name: functions that do the same work}.

    Each name's calls are captured in a CUDA graph, short ones eight times over, so that no launch from Python or of the
    graph itself is timed; the graphs take turns.
    """
    graphs, seconds, n_calls = {}, {}, {}
    for name, calls in runs.items():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for call in calls:
                call()  # compiles
            torch.cuda.synchronize()
            again = 8 if event_seconds(calls[0]) < 1e-3 else 1
            graphs[name], seconds[name], n_calls[name] = torch.cuda.CUDAGraph(), [], again * len(calls)
            with torch.cuda.graph(graphs[name], stream=stream):
                for call in calls * again:
                    call()
        graphs[name].replay()
    for _ in range(rounds):
        for name, graph in graphs.items():
            seconds[name].append(event_seconds(graph.replay) / n_calls[name])
    return seconds


# ============================================================================
# 8. Studies: many runs of train_rl.py
# ============================================================================


@dataclass(frozen=True)
class Study:
    """Settings to compare over seeds: one run of train_rl.py each, from a cold start that a seed's runs share."""

    title: str
    settings: dict  # name: {flag: value}
    flags: dict  # of all runs
    cold: dict = field(default_factory=dict)  # flags of the cold start
    seeds: int = 5
    curves: tuple = ("fork_rate", "accuracy", "entropy")
    beside: dict = field(default_factory=dict)  # {setting: the one to compare it with}, where not with the first
    verdict: Callable = lambda logs: None  # {setting: [log of every seed]} -> a further sentence


SHAPE_COLD_STARTS = ("fork_prior", "router_coef", "capacity")  # flags that act in the cold start already
LABELS = {  # of columns of log.csv in pictures
    "fork_rate": "fork rate in rollouts", "accuracy": "held-out accuracy", "entropy": "entropy, nats per token",
    "ess": "effective sample size, share", "prob_corr": "correlation of probabilities, training and rollout",
    "logp_gap_mean": "|log-prob, training - rollout|, nats", "grad_norm": "gradient norm before clipping",
    "length_p99": "99th percentile of length, tokens", "negative_early": "negative share, early half of window",
    "negative_late": "negative share, late half of window", "over_capacity": "choices beyond 1.25 even loads, share",
    "ratio_max": "largest ratio of a step", "weight_clip_frac_high": "tokens at the cap, share",
}  # fmt: skip
THRESHOLDS = {"fork_rate": 0.5, "accuracy": 0.7}
KEPT = ["step", "accuracy", "eval_fork_rate", "correct", "fork_rate", "length", "entropy", "grad_norm", "ratio_max",
        "weight_clip_frac_high", "ppo_would_drop_frac", "ess", "prob_corr", "logp_gap_mean", "busiest_expert",
        "over_capacity", "groups", "window", "length_p99", "perplexity", "negative_early", "negative_late"]  # fmt: skip


def study(name, flags):
    """Run a Study, or read its runs from NAME.csv (--redraw); table, sentence, NAME.csv and NAME.png."""
    plan = STUDIES[name]
    rows = recorded(flags, name, functools.partial(run_study, plan), (*plan.curves, *plan.settings))
    logs = {setting: list(by(mine, "seed").values()) for setting, mine in by(rows, "setting").items()}
    seeds = len(next(iter(logs.values())))
    title = f"{plan.title} (median and range of {seeds} seeds)"
    with picture(flags, name, len(plan.curves), (11, 3.6), title) as axes:
        for axis, column in zip(axes, plan.curves):
            for width, (setting, runs) in zip(range(len(logs), 0, -1), logs.items()):  # equal curves show side by side
                draw_median(axis, runs, "step", column, setting, band=0.4 / len(logs), lw=1.2 * width)
            axis.set(xlabel="RL step", ylabel=LABELS[column])
            if column in ("logp_gap_mean", "ratio_max"):
                axis.set_yscale("log")
        axes[0].legend(fontsize=8)

    table = []
    for setting, runs in logs.items():
        row = {"setting": setting, "accuracy before": interval([points(run, "accuracy")[0][1] for run in runs])}
        for column in filter(THRESHOLDS.get, plan.curves):
            row[f"steps to {column} of {THRESHOLDS[column]:.0%}"] = interval([steps_to(run, column) for run in runs])
        row |= {what: interval([measure(run, "accuracy") for run in runs]) for what, measure in OVERALL.items()}
        others = [column for column in plan.curves if column not in THRESHOLDS]
        table.append(row | {f"mean {column}": interval([mean(run, column) for run in runs]) for column in others})
    print(f"median over {seeds} seeds [95 % bootstrap interval]; a run that never gets there counts one step too long")
    print_table(table)
    print("\n".join(filter(None, (compare(logs, plan.beside), plan.verdict(logs)))))


def run_study(plan, quick=False):
    """Rows of a study's CSV: setting, seed and what log.csv says, for every step of every run.

    Runs are processes of one thread each, as many at a time as there are cores. One that ends early because its numbers
    overflow is told, and its last accuracy and fork rate stand for the rest of its steps.
    """
    jobs = list(itertools.product(range(1 if quick else plan.seeds), plan.settings))
    tiny = {"sft_steps": 10, "steps": 2, "prompts": 16, "eval_problems": 6, "eval_samples": 1} if quick else {}
    with tempfile.TemporaryDirectory() as folder:
        starts, init = {}, {}  # {folder of a cold start: its flags}, {job: folder of its cold start}
        for seed, setting in jobs:
            shape = plan.cold | {k: x for k, x in plan.settings[setting].items() if k in SHAPE_COLD_STARTS}
            init[seed, setting] = f"{folder}/cold-{seed}-" + "-".join(f"{k}-{x}" for k, x in shape.items())
            starts[init[seed, setting]] = shape | tiny | {"steps": 0, "seed": seed}

        def run(job):
            seed, setting = job
            out = f"{folder}/{setting}-{seed}"
            flags = plan.flags | plan.settings[setting] | tiny | {"init": init[job], "seed": seed}
            try:
                train_process(out, flags)
            except ValueError as error:
                if not any(words in str(error) for words in ("not finite", "overflows", "gradient norm")):
                    raise
                tqdm.write(f"{setting}, seed {seed}, counts as it stood when it ended: {error}")
            log = train_rl.read_log(f"{out}/log.csv")
            shutil.rmtree(out)  # hundreds of checkpoints would fill a disk
            if log[-1]["step"] < flags.get("steps", 0):
                log.append({"step": flags["steps"], **{c: last(log, c) for c in THRESHOLDS}})
            return [{"setting": setting, "seed": seed} | {c: row.get(c, "") for c in KEPT} for row in log]

        in_parallel(lambda start: train_process(*start), list(starts.items()), "cold starts")
        return [row for rows in in_parallel(run, jobs, "runs") for row in rows]


def in_parallel(function, jobs, title):
    """[function(job) for job in jobs] in as many threads as there are cores, for functions that wait for processes."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(tqdm(pool.map(function, jobs), total=len(jobs), desc=title, disable=None, leave=False))


def train_process(out, flags):
    """One run of train_rl.py, a process of one CPU thread; ValueError with its last words if it fails."""
    arguments = [f"--{k.replace('_', '-')}={'none' if v is None else v}" for k, v in flags.items()]
    command = [sys.executable, str(Path(__file__).with_name("train_rl.py")), "--device=cpu", f"--out={out}", *arguments]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")


def points(run, column):
    """[(step, value)] wherever a run measured `column`."""
    return [(row["step"], row[column]) for row in run if column in row]


def steps_to(run, column, level=None):
    """The first step at which `column` reaches level (None: its threshold), linear between measurements and at least 1;
    one more than the last if never."""
    level = THRESHOLDS[column] if level is None else level
    curve = points(run, column)
    for (step0, value0), (step, value) in zip(curve[:1] + curve, curve):
        if value >= level:
            return max(step if value == value0 else step0 + (step - step0) * (level - value0) / (value - value0), 1)
    return step + 1


def area(run, column):
    """Mean height of the curve of `column` over the steps (trapezoids)."""
    curve = points(run, column)
    steps = curve[-1][0] - curve[0][0]
    return sum((b - a) * (x + y) / 2 for (a, x), (b, y) in zip(curve, curve[1:])) / max(steps, 1)


def last(run, column):
    """The last value measured, nan if none was."""
    return [math.nan, *(value for _, value in points(run, column))][-1]


def mean(run, column):
    """The mean of what was measured, nan if nothing was."""
    return statistics.fmean([value for _, value in points(run, column)] or [math.nan])


OVERALL = {"area under accuracy": area, "final accuracy": last}


def bootstrap(values, n=2000):
    """Median and its 95 % bootstrap interval, percentile method: (median, low, high); nan is left out.

    Of five seeds the interval is nearly their range: [min, max] would hold the median 94 % of the time.
    """
    rng, values = random.Random(0), [value for value in values if value == value] or [math.nan]
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(n))
    return statistics.median(values), medians[int(0.025 * n)], medians[int(0.975 * n) - 1]


def interval(values):
    """bootstrap(values) as text."""
    return "{:.3g} [{:.3g}, {:.3g}]".format(*bootstrap(values))


def compare(logs, beside):
    """What a setting changes beside another, by default the first, seed by seed, in a sentence each.

    All of five seeds agree in sign by chance once in 16 times, so one such line among many proves little.
    """
    first, *others = logs
    told = []
    for other in others:
        parts, base = [], beside.get(other, first)
        for what, measure in OVERALL.items():
            gaps = [measure(b, "accuracy") - measure(a, "accuracy") for a, b in zip(logs[base], logs[other])]
            agree = "all seeds agree" if min(gaps) > 0 or max(gaps) < 0 else "seeds disagree"
            parts.append("{} {:+.3f} [{:+.3f}, {:+.3f}], {}".format(what, *bootstrap(gaps), agree))
        told.append(f"{other} beside {base}: {'; '.join(parts)}.")
    return "\n".join(told)


def compare_algorithms(logs):
    """How many steps CISPO takes, as a part of what the others take, seed by seed."""
    told = []
    for (column, level), other in itertools.product(THRESHOLDS.items(), ("dapo", "grpo")):
        parts = [steps_to(a, column) / steps_to(b, column) for a, b in zip(logs["cispo"], logs[other])]
        told.append(f"{interval(parts)} of {other}'s steps to {column.replace('_', ' ')} {level}")
    return f"CISPO takes {', '.join(told)}. The report says 0.5 of DAPO's (32 B parameters, AIME)."


def negative_by_window(logs):
    """How much of sum |A| over the tokens of a window's late half is negative (report sec. 5): while each window of the
    staged runs is open, and at the beginning and the end of runs that have the whole window from the start.
    """

    def share(setting, applies):
        return interval([mean([row for row in run if applies(row)], "negative_late") for run in logs[setting]])

    windows = sorted({row["window"] for run in logs["staged"] for row in run if "window" in row})
    told = [f"{share('staged', lambda row: row.get('window') == w)} in a window of {w:g}" for w in windows]
    parts = [share("at once", lambda row: row["step"] <= 10), share("at once", lambda row: row["step"] > 50)]
    return (f"Negative share of the late half, staged: {', '.join(told)} tokens. At once: {parts[0]} in steps 1 to 10, "
            f"{parts[1]} in steps 51 to 60.")  # fmt: skip


PRIORS, UPDATES, RATES = (0.01, 0.05, 0.2), (4, 16), (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
RACERS, CLIPPED, BEST = ("cispo", "dapo", "grpo", "reinforce"), ("dapo", "grpo"), "its best"


def regime_map(flags):
    """CISPO's steps to a fork rate of 50 % as a part of the others', over the regime: algos-map.csv, algos-map.png."""
    runs = by(recorded(flags, "algos-map", map_rows, ["peak_drop", "any"]), "fork_prior", "updates_per_rollout", "algo")
    runs = {here: by(rows, "lr") for here, rows in runs.items()}  # {(prior, updates, algo): {lr: run of every seed}}
    for sweep in runs.values():
        sweep[BEST] = at_best(sweep)
    places, rates, never = list(itertools.product(PRIORS, UPDATES)), (*RATES, BEST), PRESSURE["steps"] + 1

    def ratios(place, lr, other, column="fork_rate"):
        """Seed by seed (rows are in the order of seeds); nan where neither run gets there."""
        pairs = zip(runs[*place, "cispo"][lr], runs[*place, other][lr])
        pairs = ([run[f"steps_{column}"] for run in pair] for pair in pairs)
        return [mine / its if min(mine, its) < never else math.nan for mine, its in pairs]

    def median(place, lr, column, algo="cispo"):
        return statistics.median(run[column] for run in runs[*place, algo][lr])

    table, cells = [], {}  # cells: medians over seeds
    for place, lr in itertools.product(places, rates):
        row = dict(zip(("fork prior", "updates", "learning rate"), (*place, lr)))
        cell = cells[*place, lr] = {algo: median(place, lr, "final", algo) for algo in RACERS}
        cell["drops"] = median(place, lr, "peak_drop")
        row |= {f"{algo}, final": f"{cell[algo]:.2f}" for algo in RACERS}
        for column, other in itertools.product(THRESHOLDS, RACERS[1:]):
            cell[column, other] = bootstrap(ratios(place, lr, other, column))[0]
            if other in CLIPPED:
                row[f"{column}, / {other}"] = interval(ratios(place, lr, other, column))
        table.append(row | {"ppo drops, peak": f"{cell['drops']:.1%}"})
    print("CISPO's steps to a fork rate of 50 % and to an accuracy of 70 % over those of dapo and grpo: the median of")
    print("seeds in which one of them gets there [95 % bootstrap interval]. ppo drops, peak: until forks are at 50 %.")
    print(f"{BEST}: of each algorithm and seed the learning rate with the largest area over the other seeds.")
    print_table(table)
    for place in places:
        best = ", ".join(f"{algo} {median(place, BEST, 'lr', algo):g}" for algo in RACERS)
        print("prior {:g}, {} updates: best learning rates {}".format(*place, best))
    for prior in PRIORS:
        dials = {1: runs[prior, 1, "any"]} | {k: runs[prior, k, "cispo"] for k in UPDATES}
        best = ", ".join(f"{statistics.median(run['lr'] for run in dial[BEST]):g}" for dial in dials.values())
        steps = ", ".join(interval([run["steps_fork_rate"] for run in dial[BEST]]) for dial in dials.values())
        print(f"prior {prior:g}: at {', '.join(map(str, dials))} updates per rollout and rates of {best}")
        print(f"    CISPO takes {steps} steps to a fork rate of 50 % ({never}: never)")
    tell_map(cells)
    draw_map(flags, places, rates, cells)


def tell_map(cells):
    """Where CISPO saves most, and what its savings follow. cells: {(prior, updates, learning rate): medians}."""
    for column, other in itertools.product(THRESHOLDS, RACERS[1:]):
        for what, sound in (("a setting at which both end at 0.7 or more", True), ("any other", False)):
            seen = {w: c[column, other] for w, c in cells.items() if (min(c["cispo"], c[other]) >= 0.7) == sound}
            seen = {where: ratio for where, ratio in seen.items() if ratio > 0}  # nan is not
            if seen:
                place = "prior {:g}, {} updates, learning rate {}".format(*(where := min(seen, key=seen.get)))
                goal = f"steps to {column} {THRESHOLDS[column]} over {other}'s"
                print(f"{goal}, lowest in {what}: {seen[where]:.2f} ({place})")
    for other in CLIPPED:
        pairs = [(cell["drops"], cell["fork_rate", other]) for (*_, lr), cell in cells.items() if lr in RATES]
        pairs = [(x, y) for x, y in pairs if y > 0]
        few, many = ([y for x, y in pairs if low <= x < high] or [math.nan] for low, high in ((0, 0.02), (0.1, 1)))
        few, many = (f"{min(part):.3f} to {max(part):.3f}" for part in (few, many))
        fit = f"correlation {np.corrcoef(*zip(*pairs))[0, 1]:.2f}; {few} below 2 %, {many} from 10 % on"
        print(f"over {other}'s they follow what PPO's clip would drop at its peak: {fit}")


def draw_map(flags, places, rates, cells):
    """Two maps of the ratios, rows of places and columns of learning rates; the ratios against what a clip drops."""
    with picture(flags, "algos-map", 3, (13, 3.8)) as axes:
        for axis, other in zip(axes, CLIPPED):
            grid = [[cells[*place, lr]["fork_rate", other] for lr in rates] for place in places]
            image = axis.imshow(grid, cmap="Greens_r", vmin=0.5, vmax=1.05, aspect="auto")
            for y, x in itertools.product(range(len(places)), range(len(rates))):
                axis.text(x, y, f"{grid[y][x]:.2f}", ha="center", va="center")
            axis.axvline(len(RATES) - 0.5, color="black", lw=1)
            axis.set_xticks(range(len(rates)), [f"{1e4 * lr:g}" if lr in RATES else "best" for lr in rates])
            axis.set_yticks(range(len(places)), [f"{prior:g}, {k:g}" for prior, k in places])
            title = f"CISPO's steps to 50 % forks / {other}'s"
            axis.set(title=title, xlabel="learning rate, 1e-4; each at its best", ylabel="fork prior, updates")
            swept = [cells[*place, lr] for place, lr in itertools.product(places, RATES)]
            x, y = zip(*((100 * cell["drops"], cell["fork_rate", other]) for cell in swept))
            axes[2].plot(x, y, "o", label=other)
        axes[2].set(title="it saves where a clip would drop", ylabel="CISPO's steps / the other's")
        axes[2].set(xlabel="tokens that PPO's clip would drop, peak, %")
        axes[2].legend()
        axes[0].figure.colorbar(image, ax=axes[:2], location="left", label="darker: CISPO is faster")


def at_best(rates):
    """{learning rate: [run of every seed]} -> [run of every seed], each at the rate with the largest median area over
    the OTHER seeds, so that no run takes part in the choice of its own rate.
    """
    n_seeds = len(next(iter(rates.values())))

    def height(lr, seed):
        return statistics.median([run["area"] for i, run in enumerate(rates[lr]) if i != seed or n_seeds == 1])

    return [rates[max(rates, key=lambda lr: height(lr, seed))][seed] for seed in range(n_seeds)]


def map_rows(quick):
    """Rows of algos-map.csv, one of every run: its setting and seed, area, steps to the thresholds, final accuracy, and
    the largest share of tokens that PPO's clip would have dropped in a step until forks crossed their threshold.

    With one update per rollout all algorithms are one and the same (algo "any").
    """
    names, rows = ("fork_prior", "updates_per_rollout", "lr", "algo"), []
    grid = [*itertools.product(PRIORS, (1,), RATES, ("cispo",)), *itertools.product(PRIORS, UPDATES, RATES, RACERS)]
    settings = {str(cell): dict(zip(names, cell)) for cell in grid}
    runs = run_study(dataclasses.replace(STUDIES["algos"], settings=settings), quick)
    for (setting, seed), log in by(runs, "setting", "seed").items():
        log = [{c: x for c, x in row.items() if x != ""} for row in log]
        row = settings[setting] | {"seed": seed, "area": f"{area(log, 'accuracy'):.4g}"}
        if row["updates_per_rollout"] == 1:
            row["algo"] = "any"
        row |= {f"steps_{column}": f"{steps_to(log, column):.4g}" for column in THRESHOLDS}
        crossing = math.ceil(steps_to(log, "fork_rate"))
        drops = [r.get("ppo_would_drop_frac", 0) for r in log if r["step"] <= crossing]
        rows.append(row | {"final": last(log, "accuracy"), "peak_drop": f"{max(drops):.4g}"})
    return rows


PRESSURE = {"updates_per_rollout": 16, "steps": 36, "eval_every": 3, "eval_problems": 150, "eval_samples": 4}
MIXED = {"min_moves": 2, "moves": 8}  # chains of 2 to 8 steps are responses of 6 to 12 tokens
RARE_FORK = {"fork_prior": 0.01}  # the regime of the report: the token that matters is rare
ALGORITHMS = {algo: {"algo": algo} for algo in RACERS}
CAPS = {f"cap {cap}": {"eps_high": eps} for cap, eps in ((2, 1), (5, 4), (8, 7), ("none", None))}
STUDIES = {
    "algos": Study("16 updates per rollout, a fork of 1 %: who learns to think first",
                   ALGORITHMS, PRESSURE, RARE_FORK, verdict=compare_algorithms),
    "control": Study("no planted fork: every response is a chain, learnt in part",
                     ALGORITHMS, PRESSURE, {"fork_prior": 1.0, "sft_skill": 1.0, "sft_steps": 200},
                     curves=("accuracy", "entropy", "ess")),
    "eps": Study("the cap on CISPO's weight", CAPS, PRESSURE, RARE_FORK),
    "precision": Study("output head in fp32 and in bf16, training against rollout",
                       {head: {"head": head} for head in ("fp32", "bf16")}, PRESSURE,
                       curves=("prob_corr", "logp_gap_mean", "accuracy")),
    "adam": Study("AdamW's eps",
                  {f"eps {eps:g}": {"adam_eps": eps} for eps in (1e-15, 1e-8)}, PRESSURE | {"updates_per_rollout": 4},
                  curves=("grad_norm", "fork_rate", "accuracy")),
    "windows": Study("responses may grow in stages, at once, or by a forced jump",
                     {"staged": {"windows": "8,10,12"}, "at once": {"max_new_tokens": 12},
                      "forced jump": {"windows": "8,10,12", "jump_at": 10}},
                     PRESSURE | MIXED | {"updates_per_rollout": 4, "steps": 60}, MIXED, verdict=negative_by_window,
                     curves=("length_p99", "negative_early", "negative_late", "accuracy")),
    "balance": Study("load-balancing loss and token drop, in cold start and RL",
                     {f"weight {coef:g}": {"router_coef": coef} for coef in (0, 0.001, 0.1)}
                     | {f"weight {coef:g}, drop": {"router_coef": coef, "capacity": 1.25} for coef in (0, 0.1)},
                     PRESSURE, curves=("over_capacity", "logp_gap_mean", "accuracy"),
                     beside={"weight 0.1, drop": "weight 0.1"}),
    "eps-fast": Study("the cap on CISPO's weight, at a learning rate of 8e-4, where it acts",
                      CAPS, PRESSURE | {"lr": 8e-4}, RARE_FORK,
                      curves=("fork_rate", "accuracy", "ratio_max", "weight_clip_frac_high")),
}  # fmt: skip


# ============================================================================
# 9. Inside a run: one response token by token, the sizes of gradients
# ============================================================================


def forks(flags):
    """The ratio of every token of one real response after each of 16 updates: forks.csv and forks.png."""
    rows = recorded(flags, "forks", watch_a_response)
    updates = by(by(rows, "algo")["cispo"], "update")  # {update: row of every token}
    start, turn, n = updates[0], int(rows[0]["turn"]), int(max(updates))
    names = [str(row["token"]).replace("<end_of_sentence>", "end") for row in start]
    fork = by([row for row in rows if row["position"] == 0], "algo")
    with picture(flags, "forks", 2, (11, 3.8), width_ratios=(3, 2)) as (left, right):
        grid = [[row["ratio"] for row in updates[update]] for update in range(1, n + 1)]
        image = left.imshow(grid, norm="log", aspect="auto", cmap="RdBu_r", vmin=0.5, vmax=2)
        left.axhspan(turn - 2.5, turn - 1.5, fill=False, lw=2)
        labels = [f"{name}\np {row['probability']:.2g}" for name, row in zip(names, start)]
        left.set_xticks(range(len(labels)), labels, fontsize=8)
        left.set_yticks(range(n), range(1, n + 1), fontsize=7)
        left.set(title="one response under CISPO; box: what its own update sees", ylabel="after update")
        bar = left.figure.colorbar(image, label="ratio to the old policy", ticks=[0.5, 1, 2], format="{x:g}")
        bar.minorticks_off()
        for algo, its_rows in fork.items():
            draw_curve(right, its_rows, "update", "ratio", algo)
        right.axhline(1.28, color="gray", ls=":", label="DAPO's clip (GRPO's: 1.2)")
        right.axvline(turn - 1, color="black", lw=1, label="what its own update sees")
        right.set(title=f"the fork token {names[0]}, by algorithm", xlabel="update", ylabel="ratio")
        right.legend(fontsize=8)
    print_table(updates[n], {c: f"{{{c}}}" for c in ("token", "probability", "ratio")})
    ratio = {algo: its_rows[turn - 1]["ratio"] for algo, its_rows in fork.items()}
    print(
        f"This response is trained on in update {turn}. By then other responses have moved its fork token, of "
        f"probability {start[0]['probability']:.3f}, by x {ratio['dapo']:.2f} (dapo: dropped above 1.28), x "
        f"{ratio['grpo']:.2f} (grpo: above 1.2), x {ratio['cispo']:.2f} (cispo: always trained on)."
    )


def train_cold(folder, quick, **flags):
    """A cold start to look at from inside."""
    train_process(folder, flags | {"steps": 0} | ({"sft_steps": 40, "eval_problems": 6} if quick else {}))


def watch_a_response(quick):
    """Rows of forks.csv: algo, turn (the update that trains on the response), update, position, token, its ratio, ...

    After a cold start every algorithm trains on the same rollouts from the same weights. A response is trained on once.
    Watched is the last of the best-rewarded ones that begin with the fork (if none does, of all).
    """
    with tempfile.TemporaryDirectory() as folder:
        train_cold(f"{folder}/cold", quick, fork_prior=0.05)
        rows = []
        for algo in ("cispo", "dapo", "grpo"):
            flags = train_rl.Flags(preset="tiny", algo=algo, updates_per_rollout=16)
            model = load_pretrained(f"{folder}/cold", "cpu", torch.float32)
            tokenizer, optimizer = Tokenizer.of(model.config), train_rl.make_optimizer(model, 0.0)
            experience = train_rl.collect(model, tokenizer, flags, 1)
            if experience.batch is None:
                raise ValueError("no group of responses earned unequal rewards: nothing to watch")
            batch, fork = experience.batch, tokenizer.encode(tasks.FORK)[0]
            first = batch.tokens[:, 1:].gather(1, batch.trained.int().argmax(1, keepdim=True))[:, 0]
            value = experience.rewards + 10 * (first == fork)
            i = int((value == value.max()).nonzero()[-1])
            turn = next(k for k, part in enumerate(train_rl.minibatches(experience, flags), 1) if i < part.stop)
            one = batch.rows(slice(i, i + 1))
            ids = one.tokens[:, 1:][one.trained]
            logp = [train_rl.trained_logp(model, one)[0].detach()]
            for _ in train_rl.updates(model, optimizer, experience, flags, 2e-4):
                logp.append(train_rl.trained_logp(model, one)[0].detach())
            for update, now in enumerate(logp):
                for position, (token, old, new) in enumerate(zip(ids.tolist(), logp[0], now)):
                    text = repr(tokenizer.decode([token]))
                    row = {"algo": algo, "turn": turn, "update": update, "position": position, "token": text}
                    rows.append(row | {"probability": f"{old.exp():.4g}", "ratio": f"{(new - old).exp():.4g}"})
    return rows


def adam(flags):
    """The study of AdamW's eps, then what its gradients are like: adam-gradients.csv and adam-gradients.png."""
    study("adam", flags)
    rows = recorded(flags, "adam-gradients", watch_gradients)
    sizes, updates = ([row for row in rows if name in row] for name in ("share", "cosine"))
    with picture(flags, "adam-gradients", 2, (10, 3.4)) as (left, right):
        left.bar([row["exponent"] for row in sizes], [row["share"] for row in sizes], align="edge", width=0.9)
        left.set(title=f"sizes of gradients over {len(updates) + 1} updates", xlabel="log10 |g|", ylabel="share of all")
        right.plot([row["update"] for row in updates], [row["cosine"] for row in updates], "o-", ms=3)
        right.set(title="gradients of successive updates", xlabel="update", ylabel="cosine of the angle between")
    below = {n: sum(row["share"] for row in sizes if row["exponent"] < n) for n in (-14, -8, -5)}
    angle = bootstrap([row["cosine"] for row in updates])[0]
    told = ", ".join(f"{share:.2g} below 1e{n}" for n, share in below.items())
    print(f"Of all gradients but exact zeros a share of {told}; successive ones have a median cosine of {angle:.2f}.")


def watch_gradients(quick):
    """Rows of adam-gradients.csv: exponent and share of all non-zero gradients, then update and cosine to the next."""
    gradients, optimizer_step = [], train_rl.optimizer_step

    def watched_step(model, *rest):
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return optimizer_step(model, *rest)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(train_rl, "optimizer_step", watched_step):
        train_cold(f"{folder}/cold", quick)
        flags, model = train_rl.Flags(preset="tiny"), load_pretrained(f"{folder}/cold", "cpu", torch.float32)
        tokenizer, optimizer = Tokenizer.of(model.config), train_rl.make_optimizer(model, 0.0)
        for step in range(1, 2 if quick else 11):
            experience = train_rl.collect(model, tokenizer, flags, step)
            if experience.batch is not None:
                train_rl.update(model, optimizer, experience, flags, 2e-4)
    sizes = torch.cat(gradients).abs()
    exponents, counts = sizes[sizes > 0].log10().floor().int().unique(return_counts=True)
    shares = zip(exponents.tolist(), (counts / counts.sum()).tolist())
    cosines = (float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(gradients, gradients[1:]))
    rows = [{"exponent": n, "share": f"{share:.4g}"} for n, share in shares]
    return rows + [{"update": i, "cosine": f"{cosine:.4f}"} for i, cosine in enumerate(cosines, 1)]


# ============================================================================
# 10. How many softmax layers does memory need?
# ============================================================================

RATIOS = {0: "all lightning", 8: "7 : 1 (M1)", 4: "3 : 1", 2: "1 : 1", 1: "all softmax"}  # --softmax-every
PAIRS = (2, 4, 8)
RECALLS = {"recall": "asked at once", "far": "asked after 32 characters of filler"}
RECALL_SKILL, RECALL_STEPS = 0.99, 1600


def hybrid(flags):
    """Associative recall against the number of pairs, for five mixtures of layers: hybrid.csv and hybrid.png."""
    parts, table, told = by(recorded(flags, "hybrid", run_recalls, ["steps"]), "task"), [], []
    text = "{accuracy:.2f} [{accuracy_low:.2f}, {accuracy_high:.2f}]"
    with picture(flags, "hybrid", len(parts), (10, 3.8)) as axes:
        for axis, (task, rows) in zip(axes, parts.items()):
            learnt = []
            for ratio, runs in by(rows, "softmax_every").items():
                curve = median_and_range(by(runs, "seed").values(), "pairs", "accuracy")
                color = axis.plot(PAIRS, [point["accuracy"] for point in curve], label=RATIOS[ratio])[0].get_color()
                axis.plot([run["pairs"] for run in runs], [run["accuracy"] for run in runs], "o", ms=4, color=color)
                row = {f"{point['pairs']:.0f} pairs": text.format(**point) for point in curve}
                easiest = by(runs, "pairs")[PAIRS[0]]
                row["have learnt it"] = f"{sum(run['accuracy'] >= 0.9 for run in easiest)} of {len(easiest)}"
                row["steps"] = "{:.0f} [{:.0f}, {:.0f}]".format(*bootstrap([run["steps"] for run in easiest]))
                table.append({"task": task, "layers": RATIOS[ratio]} | row)
                learnt.append(f"{row['have learnt it']} {RATIOS[ratio]}")
            axis.plot(PAIRS, [1 / n + (1 - 1 / n) / 10 for n in PAIRS], ":", color="gray")
            axis.set(title=RECALLS[task], xlabel="pairs to remember", ylabel="accuracy (dotted: a pair by chance)")
            told.append(f"{RECALLS[task]}, these seeds have learnt it: {', '.join(learnt)}.")
        axes[0].legend(fontsize=8, title="median; dots: seeds")
    print(f"held-out accuracy after imitation, median [range] over seeds; learnt: 0.9 or more of {PAIRS[0]} pairs")
    print(f"steps: until {RECALL_SKILL:.0%} of forced chains are right, at most {RECALL_STEPS}; median [95 % interval]")
    print_table(table)
    print("\n".join(told))


def run_recalls(quick):
    """Rows of hybrid.csv: one cold start of train_rl.py each, on 2 to 8 pairs, then scored at each number of PAIRS.

    At most RECALL_STEPS of 48 demonstrations, fewer where RECALL_SKILL of forced chains over 8 pairs are right. What is
    scored are guesses: there memory alone helps. A seed that ends low has not learnt it yet; that is not its limit.
    """
    grid = list(itertools.product(RECALLS, RATIOS, range(5)))
    effort = {"sft_steps": 2 if quick else RECALL_STEPS, "sft_skill": RECALL_SKILL, "fork_prior": 0}
    few = {"eval_problems": 6, "eval_samples": 1} if quick else {"eval_samples": 4}

    def run(job, folder):
        task, ratio, seed = job
        out, rows = f"{folder}/{'-'.join(map(str, job))}", []
        common = {"task": task, "seed": seed, "steps": 0, **few}
        train_process(out, common | {"softmax_every": ratio, "min_moves": 2, "moves": PAIRS[-1]} | effort)
        learnt = m1.read_json(Path(out, "run.json"))["cold_start"]
        for pairs in PAIRS:
            train_process(f"{out}-{pairs}", common | {"init": out, "moves": pairs})
            accuracy = train_rl.read_log(f"{out}-{pairs}/log.csv")[0]["accuracy"]
            row = {"task": task, "softmax_every": ratio, "seed": seed, "pairs": pairs, "accuracy": accuracy}
            rows.append(row | {name: learnt[name] for name in ("steps", "skill")})
        return rows

    with tempfile.TemporaryDirectory() as folder:
        runs = in_parallel(lambda job: run(job, folder), grid[:: len(grid) // 2] if quick else grid, "recalls")
    return [row for rows in runs for row in rows]


# ============================================================================
# 11. Accuracy against the thinking budget            (the 40K and 80K models)
# ============================================================================

STAGED = MIXED | {"fork_prior": 0.3, "windows": "8,12", "jump_at": 41, "steps": 80, "checkpoint_every": 40, "keep": 2}
BUDGETS = range(1, 11)  # tokens of thinking, the fork among them; thinking nothing at all is malformed


def budget(flags):
    """What more thinking buys, before and after a run's window has grown: budget.csv and budget.png."""
    windows = by(recorded(flags, "budget", spend_budgets), "window")
    labels = {"accuracy": "held-out accuracy", "tokens": "tokens of a response", "us": "microseconds of a response"}
    title, table = "thinking longer buys accuracy, for a model that has learnt to (median and range of 5 seeds)", []
    with picture(flags, "budget", 3, (11, 3.6), title) as axes:
        for window, rows in windows.items():
            for axis, (column, label) in zip(axes, labels.items()):
                name = f"responses of up to {window:.0f} tokens in training"
                draw_median(axis, by(rows, "seed").values(), "budget", column, name)
                axis.set(xlabel="thinking budget, tokens", ylabel=label)
            for limit, seeds in by(rows, "budget").items():
                row = {column: interval([seed[column] for seed in seeds]) for column in labels}
                table.append({"window": f"{window:.0f}", "budget": f"{limit:.0f}"} | row)
        axes[0].legend(fontsize=7)
    print("median over seeds [95 % bootstrap interval]")
    print_table(table)


def spend_budgets(quick):
    """Rows of budget.csv: seed, window, budget, accuracy, tokens and time of a response; both windows of one run."""
    seeds = range(1 if quick else 5)
    tiny = {"sft_steps": 4, "steps": 2, "jump_at": 2, "checkpoint_every": 1, "eval_problems": 6} if quick else {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        in_parallel(lambda seed: train_process(f"{folder}/{seed}", STAGED | tiny | {"seed": seed}), seeds, "runs")
        for seed in seeds:
            run = train_rl.Flags(preset="tiny", **STAGED | tiny)
            for window, step in zip(run.window_limits, (run.jump_at - 1, run.steps)):
                model = load_pretrained(f"{folder}/{seed}/step-{step:06d}")
                for limit in BUDGETS:
                    rollout, scores = train_rl.respond(model, Tokenizer.byte(), run.held_out, run, seed, 4, 1.0, limit)
                    row = {"seed": seed, "window": window, "budget": limit}
                    row["accuracy"] = f"{train_rl.mean(s.correct for s in scores):.4f}"
                    row["tokens"] = f"{float(rollout.lengths.float().mean()):.3f}"
                    rows.append(row | {"us": f"{rollout.seconds / len(scores) * 1e6:.4g}"})
    return rows


# ============================================================================
# 12. Timing, files, pictures, command line
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


def recorded(flags, name, measure, needs=()):
    """Rows of NAME.csv: measured (a function of --quick) and written now, or with --redraw those that are there, which
    must hold the columns and texts in `needs`.
    """
    path = Path(flags.out) / f"{name}.csv"
    if not flags.redraw:
        torch.manual_seed(0)
        write_csv(path, measure(flags.quick))
    elif not path.exists():
        raise ValueError(f"{path} is not there to be drawn; leave out --redraw to measure it")
    rows = read_csv(path)
    held = {x for row in rows for pair in row.items() for x in pair}
    if flags.redraw and (lacking := [x for x in needs if x not in held]):
        raise ValueError(f"{path} does not hold {', '.join(lacking)}; make it again without --redraw")
    return rows


def measured(flags, name, measure):
    """recorded(...) with the machine in every row; says on which one it was."""
    machine = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    rows = recorded(flags, name, lambda quick: [row | machine for row in measure(quick)])
    text = "medians, fp32, {threads:.0f} CPU threads, torch {torch}"
    if "gpu" in rows[0]:
        text = "medians, bf16, {gpu}, torch {torch}\ntriton {triton}, copy bandwidth {copy_tb_s:.2f} TB/s"
    print(text.format(**rows[0]))
    return rows


def by(rows, *columns):
    """Rows grouped by one column, {value: rows}, or by several, {(value, ...): rows}, in the order they come in."""
    groups = {}
    for row in rows:
        key = tuple(row[column] for column in columns)
        groups.setdefault(key if len(columns) > 1 else key[0], []).append(row)
    return groups


def read_csv(path):
    """A CSV file -> a list of dicts; what looks like a number is one, and what is empty is absent."""

    def value(text):
        with contextlib.suppress(ValueError):
            return float(text)
        return text

    with open(path, newline="") as file:
        return [{name: value(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def write_csv(path, rows):
    """A list of dicts -> a CSV file. Columns stand in the order in which rows bring them; a row may lack some."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_table(rows, columns=None):
    """Aligned columns {title: format of a row}, by default all as they are; nan where a row lacks what is named."""
    columns = columns or {name: f"{{{name}}}" for row in rows for name in row}
    rows = [collections.defaultdict(lambda: math.nan, row) for row in rows]
    table = [list(columns), *([text.format_map(row) for text in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)))


@contextlib.contextmanager
def picture(flags, name, n, size, title=None, **kw):
    """A list of n axes side by side to draw on; saved as NAME.png, `size` in inches, at the end."""
    plt = train_rl.pyplot()
    figure, axes = plt.subplots(1, n, figsize=size, layout="constrained", squeeze=False, **kw)
    yield axes[0]
    if title:
        figure.suptitle(title)
    figure.savefig(Path(flags.out) / f"{name}.png", dpi=110)
    plt.close(figure)


def draw_curve(axis, rows, x, y, label=None, style="o-", band=0.3, **kw):
    """Column y against column x with a band of that opacity from y_low to y_high, where they were measured."""
    rows = [row for row in rows if y in row]
    at, mid = ([row[column] for row in rows] for column in (x, y))
    low, high = ([row.get(f"{y}_{end}", row[y]) for row in rows] for end in ("low", "high"))
    axis.fill_between(at, low, high, alpha=band, lw=0)
    axis.plot(at, mid, style, ms=3, label=label, **kw)


def median_and_range(logs, x, y):
    """Over several logs, where more than half measured y: rows of x, y (the median), y_low and y_high (the range)."""
    curves = [{row[x]: row[y] for row in log if y in row} for log in logs]
    values = {t: sorted(curve[t] for curve in curves if t in curve) for t in sorted(set().union(*curves))}
    values = {t: v for t, v in values.items() if len(v) > len(curves) / 2}
    return [{x: t, y: statistics.median(v), f"{y}_low": v[0], f"{y}_high": v[-1]} for t, v in values.items()]


def draw_median(axis, logs, x, y, label=None, **kw):
    """The curve of y against x over several logs: their median, with their range as its band."""
    draw_curve(axis, median_and_range(logs, x, y), x, y, label, **kw)


@dataclass(frozen=True)
class Flags:
    """Shared by all benchmarks."""

    out: str = flag("figures", "folder for CSV and PNG files", "files")
    redraw: bool = flag(False, "only draw the picture, from the CSV files that are there", "files")
    sweep: bool = flag(False, "kernel: time its block sizes instead", "sizes")
    full: bool = flag(
        False, "algos: the map over fork prior, updates and learning rate (675 runs, two hours on 2 cores)", "sizes"
    )
    quick: bool = flag(False, "tiny sizes, to see that it works; traps: no tests; needs --out", "sizes")

    def __post_init__(self):
        if self.quick and self.out == "figures":
            raise ValueError("--quick makes numbers that mean nothing; keep them out of figures/ with --out DIR")


BENCHES = {"flops": flops, "length": length, "forms": forms, "cpu": cpu, "main": main_job, "traps": traps}
BENCHES |= {"kernel": kernel, "decode-step": decode_step, "forks": forks, "hybrid": hybrid, "budget": budget}
BENCHES |= {name: functools.partial(study, name) for name in STUDIES} | {"adam": adam}
BENCHES["algos"] = lambda flags: regime_map(flags) if flags.full else study("algos", flags)


@command_line
def main(argv=None):
    """python bench.py NAME [--out DIR] [--redraw] [--quick]"""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    flags = parse_flags(Flags, argv, __doc__)
    if name not in BENCHES:
        wrong = "the benchmark's name comes first:" if name is None else f"unknown benchmark {name!r}; choose from"
        raise ValueError(f"{wrong} {', '.join(BENCHES)}, e.g. python bench.py flops")
    BENCHES[name](flags)


if __name__ == "__main__":
    main()
