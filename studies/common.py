"""What studies and benchmarks share: CSV files, tables, pictures, intervals, runs over seeds.

    1. Files                    recorded, by, read_csv, write_csv
    2. Tables and pictures      print_table, picture, draw_curve, draw_median
    3. What a run did           points, steps_to, area, last, bootstrap, interval
    4. Runs over seeds          Study, run_study, show_study, main

Imports no study.
"""

import collections
import contextlib
import csv
import functools
import io
import itertools
import math
import os
import random
import shutil
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

import runlog
import train_rl
from cli import command_line, flat, parse, torch, unflat

THRESHOLDS = {"fork_rate": 0.5, "accuracy": 0.7}

# ============================================================================
# 1. Files
# ============================================================================


def recorded(flags, name, measure, needs=()):
    """Rows of NAME.csv: measured (a function of --quick) and written now, or with --redraw those
    that are there, which must hold the columns and texts in `needs`.
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
        raise ValueError(
            f"{path} does not hold {', '.join(lacking)}; make it again without --redraw"
        )
    return rows


def by(rows, *columns):
    """Rows grouped by one column, {value: rows}, or by several, {(value, ...): rows}, in the order
    they come in.
    """
    groups = {}
    for row in rows:
        key = tuple(row[column] for column in columns)
        groups.setdefault(key if len(columns) > 1 else key[0], []).append(row)
    return groups


def read_csv(path):
    """A CSV file -> a list of dicts; what looks like a number is one, and what is empty is
    absent.
    """

    def value(text):
        with contextlib.suppress(ValueError):
            return float(text)
        return text

    with open(path, newline="") as file:
        return [
            {name: value(text) for name, text in row.items() if text}
            for row in csv.DictReader(file)
        ]


def write_csv(path, rows):
    """A list of dicts -> a CSV file. Columns stand in the order in which rows bring them; a row may
    lack some.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(
            file, dict.fromkeys(name for row in rows for name in row), lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(rows)


# ============================================================================
# 2. Tables and pictures
# ============================================================================


def print_table(rows, columns=None):
    """Aligned columns {title: format of a row}, by default all as they are; nan where a row lacks
    what is named.
    """
    columns = columns or {name: f"{{{name}}}" for row in rows for name in row}
    rows = [collections.defaultdict(lambda: math.nan, row) for row in rows]
    table = [list(columns), *([text.format_map(row) for text in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)))


@contextlib.contextmanager
def picture(flags, name, n, size, title=None, **kw):
    """A list of n axes side by side to draw on; saved as NAME.png, `size` in inches, at the end."""
    plt = runlog.pyplot()
    figure, axes = plt.subplots(1, n, figsize=size, layout="constrained", squeeze=False, **kw)
    yield axes[0]
    if title:
        figure.suptitle(title)
    figure.savefig(Path(flags.out) / f"{name}.png", dpi=110)
    plt.close(figure)


def draw_curve(axis, rows, x, y, label=None, style="o-", band=0.3, **kw):
    """Column y against column x with a band of that opacity from y_low to y_high, where they were
    measured.
    """
    rows = [row for row in rows if y in row]
    at, mid = ([row[column] for row in rows] for column in (x, y))
    low, high = ([row.get(f"{y}_{end}", row[y]) for row in rows] for end in ("low", "high"))
    axis.fill_between(at, low, high, alpha=band, lw=0)
    axis.plot(at, mid, style, ms=3, label=label, **kw)


def median_and_range(logs, x, y):
    """Over several logs, where more than half measured y: rows of x, y (the median), y_low and
    y_high (the range).
    """
    curves = [{row[x]: row[y] for row in log if y in row} for log in logs]
    values = {
        t: sorted(curve[t] for curve in curves if t in curve) for t in sorted(set().union(*curves))
    }
    values = {t: v for t, v in values.items() if len(v) > len(curves) / 2}
    return [
        {x: t, y: statistics.median(v), f"{y}_low": v[0], f"{y}_high": v[-1]}
        for t, v in values.items()
    ]


def draw_median(axis, logs, x, y, label=None, **kw):
    """The curve of y against x over several logs: their median, with their range as its band."""
    draw_curve(axis, median_and_range(logs, x, y), x, y, label, **kw)


# ============================================================================
# 3. What a run did
# ============================================================================


def points(run, column):
    """[(step, value)] wherever a run measured `column`."""
    return [(row["step"], row[column]) for row in run if column in row]


def steps_to(run, column, level=None):
    """The first step at which `column` reaches level (None: its threshold), linear between
    measurements and at least 1; one more than the last if never.
    """
    level = THRESHOLDS[column] if level is None else level
    curve = points(run, column)
    for (step0, value0), (step, value) in zip(curve[:1] + curve, curve):
        if value >= level:
            return max(
                step
                if value == value0
                else step0 + (step - step0) * (level - value0) / (value - value0),
                1,
            )
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


def bootstrap(values, n=2000):
    """Median and its 95 % bootstrap interval, percentile method: (median, low, high); nan is left
    out.

    Of five seeds the interval is nearly their range: [min, max] would hold the median 94 % of the
    time.
    """
    rng, values = random.Random(0), [value for value in values if value == value] or [math.nan]
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(n))
    return statistics.median(values), medians[int(0.025 * n)], medians[int(0.975 * n) - 1]


def interval(values):
    """bootstrap(values) as text."""
    return "{:.3g} [{:.3g}, {:.3g}]".format(*bootstrap(values))


def quartiles(name, values):
    """Median and quartiles as columns: name, name_low, name_high."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {name: f"{median:.4g}", f"{name}_low": f"{low:.4g}", f"{name}_high": f"{high:.4g}"}


# ============================================================================
# 4. Runs over seeds
# ============================================================================

# the regime in which studies look: many updates per rollout, and a rare token that matters
PRESSURE = {"updates_per_rollout": 16, "steps": 36, "eval_every": 3}
PRESSURE |= {"eval_problems": 150, "eval_samples": 4}
RARE_FORK = {"fork_prior": 0.01}
MIXED = {"min_moves": 2, "moves": 8}  # chains of 2 to 8 steps are responses of 6 to 12 tokens
COLD = ("fork_prior", "sft_steps", "sft_skill")  # settings of a cold start alone
KEPT = """step accuracy eval_fork_rate correct fork_rate length entropy grad_norm ratio_max
weight_clip_frac_high ppo_would_drop_frac ess prob_corr logp_gap_mean busiest_expert over_capacity
groups window length_p99 perplexity negative_early negative_late""".split()
LABELS = {  # of columns in pictures, where the name alone does not tell
    "fork_rate": "fork rate in rollouts", "accuracy": "held-out accuracy",
    "entropy": "entropy, nats per token", "ess": "effective sample size, share",
    "prob_corr": "correlation of probabilities, training and rollout",
    "logp_gap_mean": "|log-prob, training - rollout|, nats",
    "length_p99": "99th percentile of length, tokens",
    "negative_early": "negative share, early half", "negative_late": "negative share, late half",
    "over_capacity": "choices beyond 1.25 even loads", "ratio_max": "largest ratio of a step",
    "weight_clip_frac_high": "tokens at the cap, share",
}  # fmt: skip
OVERALL = {"area under accuracy": area, "final accuracy": last}


@dataclass(frozen=True)
class Study:
    """Settings to compare over seeds, from a cold start that a seed's runs share.

    settings: {name: {flag: value}}; flags: of all runs; cold: of the cold start; changes: {name:
    function of nothing that changes the code in the run's process}, in_cold: ... in its cold start
    already; beside: {setting: the one to compare it with}, where not with the first.
    """

    name: str
    title: str
    settings: dict
    flags: dict = field(default_factory=lambda: dict(PRESSURE))
    cold: dict = field(default_factory=dict)
    seeds: int = 5
    curves: tuple = ("fork_rate", "accuracy", "entropy")
    changes: dict = field(default_factory=dict)
    in_cold: bool = False
    beside: dict = field(default_factory=dict)


def train_run(out, settings, change=None):
    """One run of train_rl in this process, into the folder `out`, by default on the CPU; what it
    prints is dropped.
    """
    if unknown := settings.keys() - flat(train_rl.Flags()).keys():
        raise ValueError(f"train_rl has no setting {', '.join(sorted(unknown))}")
    if change:
        change()
    with contextlib.redirect_stdout(io.StringIO()):
        flags = unflat(train_rl.Flags, {"device": "cpu"} | settings | {"out": str(out)})
        return train_rl.train(flags)


def in_processes(function, jobs, title):
    """[function(*job) for job in jobs], each in a process of its own and of one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"  # children read it when they import torch
    how = {"mp_context": get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(os.cpu_count(), **how) as pool:
        found = pool.map(function, *zip(*jobs))
        return list(tqdm(found, total=len(jobs), desc=title, disable=None, leave=False))


def _run(setting, seed, out, settings, change):
    """Rows of one run of a study. One that ends because its numbers overflow is told, and its last
    accuracy and fork rate stand for the rest of its steps.
    """
    try:
        train_run(out, settings, change)
    except ValueError as error:
        if not any(words in str(error) for words in ("not finite", "overflows", "gradient norm")):
            raise
        tqdm.write(f"{setting}, seed {seed}, counts as it stood when it ended: {error}")
    log = runlog.read_log(f"{out}/log.csv")
    shutil.rmtree(out)  # hundreds of checkpoints would fill a disk
    if log[-1]["step"] < settings["steps"]:
        log.append({"step": settings["steps"], **{c: last(log, c) for c in THRESHOLDS}})
    return [{"setting": setting, "seed": seed} | {c: row.get(c, "") for c in KEPT} for row in log]


def run_study(plan, quick=False):
    """Rows of a study's CSV: setting, seed and what log.csv says, for every step of every run."""
    few = {"steps": 2, "prompts": 16, "eval_problems": 6, "eval_samples": 1} if quick else {}
    starts, runs = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, own) in itertools.product(
            range(1 if quick else plan.seeds), plan.settings.items()
        ):
            shape = plan.cold | {k: x for k, x in own.items() if k in COLD}
            change = plan.changes.get(name)
            label = f"{folder}/cold-{seed}-{sorted(shape.items())}-{plan.in_cold and name}"
            cold = shape | few | {"steps": 0, "seed": seed} | ({"sft_steps": 10} if quick else {})
            starts[label] = (label, cold, change if plan.in_cold else None)
            settings = plan.flags | own | few | {"seed": seed, "init": label}
            settings = {k: x for k, x in settings.items() if k not in COLD}
            runs.append((name, seed, f"{folder}/{name}-{seed}", settings, change))
        in_processes(train_run, list(starts.values()), "cold starts")
        return [row for rows in in_processes(_run, runs, "runs") for row in rows]


def show_study(plan, flags, verdict=None):
    """Run a Study or read its CSV (--redraw); picture, table, what each setting changes beside its
    base. verdict: {setting: [log of every seed]} -> a further sentence. Returns those logs.
    """
    rows = recorded(flags, plan.name, functools.partial(run_study, plan), plan.curves)
    logs = {name: list(by(mine, "seed").values()) for name, mine in by(rows, "setting").items()}
    n = len(next(iter(logs.values())))
    title = f"{plan.title} (median and range of {n} seeds)"
    with picture(flags, plan.name, len(plan.curves), (11, 3.6), title) as axes:
        for axis, column in zip(axes, plan.curves):
            for width, (name, runs) in zip(range(len(logs), 0, -1), logs.items()):
                style = {"band": 0.4 / len(logs), "lw": 1.2 * width}  # equal curves side by side
                draw_median(axis, runs, "step", column, name, **style)
            axis.set(xlabel="RL step", ylabel=LABELS.get(column, column))
            seen = [
                value for runs in logs.values() for run in runs for _, value in points(run, column)
            ]
            if column in ("logp_gap_mean", "ratio_max") and max(seen, default=0) > 0:
                axis.set_yscale("log")
        axes[0].legend(fontsize=8)
    table = []
    for name, runs in logs.items():
        first = [points(run, "accuracy")[0][1] for run in runs]
        row = {"setting": name, "accuracy before": interval(first)}
        for column in filter(THRESHOLDS.get, plan.curves):
            steps = [steps_to(run, column) for run in runs]
            row[f"steps to {column} of {THRESHOLDS[column]:.0%}"] = interval(steps)
        for what, measure in OVERALL.items():
            row[what] = interval([measure(run, "accuracy") for run in runs])
        others = [column for column in plan.curves if column not in THRESHOLDS]
        row |= {f"mean {c}": interval([mean(run, c) for run in runs]) for c in others}
        table.append(row)
    never = "a run that never gets there counts one step too long"
    print(f"median over {n} seeds [95 % bootstrap interval]; {never}")
    print_table(table)
    print("\n".join(filter(None, (compare(logs, plan.beside), verdict and verdict(logs)))))
    return logs


def compare(logs, beside):
    """What a setting changes beside another, by default the first, seed by seed.

    All of five seeds agree in sign by chance once in 16 times: one such line proves little.
    """
    first, *others = logs
    told = []
    for other in others:
        parts, base = [], beside.get(other, first)
        for what, measure in OVERALL.items():
            pairs = zip(logs[base], logs[other])
            gaps = [measure(b, "accuracy") - measure(a, "accuracy") for a, b in pairs]
            agree = "all seeds agree" if min(gaps) > 0 or max(gaps) < 0 else "seeds disagree"
            parts.append("{} {:+.3f} [{:+.3f}, {:+.3f}], {}".format(what, *bootstrap(gaps), agree))
        told.append(f"{other} beside {base}: {'; '.join(parts)}.")
    return "\n".join(told)


@dataclass(frozen=True)
class Flags:
    """Shared by all studies."""

    out: str = "figures"
    """folder for CSV and PNG files"""
    redraw: bool = False
    """only tell and draw again, from the CSV files that are there"""
    quick: bool = False
    """tiny sizes, to see that it works; needs --out"""

    def __post_init__(self):
        if self.quick and self.out == "figures":
            raise ValueError("--quick makes numbers that mean nothing; keep them out: --out DIR")


def script(study, text, kind=Flags):
    """main(argv=None) of a study: a function of its flags. text: its docstring."""

    def main(argv=None):
        return study(parse(kind, argv, text))

    return command_line(main)
