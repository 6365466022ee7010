"""What a machine does: Figure 1 of the report and every speed; a name, a CSV, a picture each.

    python bench.py flops        Figure 1 (right): inference FLOPs against generation length
    python bench.py length       ... and measured: a small hybrid beside its all-softmax twin
    python bench.py forms        every form of attention against length; what M1's heads remember
    python bench.py cpu          training, generation, RL beside transformers' MiniMax if installed

    python bench.py kernel       lightning attention on a GPU: memory floor, fla, SDPA
    python bench.py decode-step  one token of many sequences on a GPU
    python bench.py rollout      generation of the 0.65 B model on a GPU, many prompts at a time
    python bench.py model        four full-width M1 layers on a GPU (50 GB): a step, a long prompt;
                                 training 0.98 B active parameters
    python bench.py long         a million tokens through the 0.65 B model on a GPU
    python bench.py scale        steps of RL and long sequences on 1, 2, 4 ... GPUs

    python bench.py plan         RL of the 456 B model on 512 GPUs: memory, traffic, time, cost
    python bench.py plan-check   the same arithmetic beside real steps; torchrun --nproc_per_node=2

length, forms and cpu take a minute each, on an idle machine. Those of a GPU are in bench_gpu.py;
rollout and model go beside transformers too. Runs of train_rl.py are in studies/.

    1. Against length     flops, length, forms
    2. Beside transformers, on a CPU
    3. Command line
"""

import contextlib
import math
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

from tyro.conf import Positional

import bench_gpu
import cispo
import engine
import train_rl
from bench_check import check
from bench_gpu import draw, measured, race, their_config, their_generate, used
from bench_plan import plan
from bench_scale import scale
from cli import Late, command_line, parse, torch
from cli import model as m1
from experience import Batch, make_batch, trained_logp
from studies import common
from studies.common import by, picture, print_table, quartiles, write_csv

attn, softmax = Late("lightning_attn"), Late("softmax_attn")
transformers = Late("transformers")  # to compare with

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
    runs["softmax"] = softmax.attend
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
        return engine.generate(model, prompts.tolist(), **how)

    def experience(prompts, n):
        rollout, asked = generate(prompts, n, group_size=G), prompts.repeat_interleave(G, 0)
        rewards, mask = [0.0, 1.0] * (len(asked) // 2), rollout.mask.flatten()
        found = rollout.tokens.tolist(), mask, "cpu", rewards, rollout.logp.flatten()
        return make_batch(asked.tolist(), *found)

    def logp(part):
        logp, _, aux = trained_logp(model, part)
        return logp, aux.router_loss

    return jobs(model, forward, generate, experience, logp)


def their_side():
    """The same of transformers' model, and its version. ImportError where it is not installed."""
    config = their_config(m1.M1Config.preset("tiny"))
    model = transformers.MiniMaxForCausalLM(config).train()

    def forward(tokens, n=0):  # logits of the last n tokens, 0 = all
        how = {"output_router_logits": torch.is_grad_enabled(), "use_cache": False}
        out = model(tokens, logits_to_keep=n, **how)
        return out.logits, out.aux_loss

    generate = partial(their_generate, model)

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
# 3. Command line
# ============================================================================

BENCHES = {"flops": flops, "length": length, "forms": forms, "cpu": cpu}
BENCHES |= bench_gpu.BENCHES | {"scale": scale, "plan": plan, "plan-check": check}


@dataclass(frozen=True)
class Flags(common.Flags):
    """What to measure."""

    name: Positional[str] = ""
    """flops, length, forms, cpu; of GPUs kernel, decode-step, rollout, model, long, scale,
    plan-check; plan"""
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
