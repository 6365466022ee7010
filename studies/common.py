"""What studies and benchmarks share: CSV files, tables, pictures, intervals, runs over seeds.

    1. Files                    recorded, by, read_csv, write_csv
    2. Tables and pictures      print_table, picture, draw_curve, draw_median
    3. What a run did           steps_to, area, first, last, mean, bootstrap, interval
    4. Runs over seeds          Study: settings to compare; run, show
    5. Command line             Flags, script

Imports no study.
"""

import collections
import contextlib
import csv
import io
import itertools
import math
import operator
import os
import random
import shutil
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

from tqdm import tqdm

import runlog
import train_rl
from cli import command_line, flat, numpy, parse, torch, unflat

# ============================================================================
# 1. Files
# ============================================================================


def recorded(flags, name, measure):
    """Rows of NAME.csv: measured (a function of --quick) and written now, or with --redraw those
    that are there.
    """
    path = Path(flags.out) / f"{name}.csv"
    if not flags.redraw:
        torch.manual_seed(0)
        write_csv(path, measure(flags.quick))
    elif not path.exists():
        raise ValueError(f"{path} is not there to be drawn; leave out --redraw to measure it")
    return read_csv(path)


def by(rows, *columns):
    """Rows grouped by one column, {value: rows}, or by several, {(value, ...): rows}, in the order
    they come in.
    """
    key, groups = operator.itemgetter(*columns), {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def read_csv(path):
    """A CSV file -> a list of dicts; what looks like a number is one, what is empty is absent."""

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value(text) for name, text in row.items() if text} for row in rows]


def write_csv(path, rows):
    """A list of dicts -> a CSV file. Columns stand in the order in which rows bring them; a row may
    lack some.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = dict.fromkeys(name for row in rows for name in row)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
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


def draw_median(axis, logs, x, y, label=None, **kw):
    """The curve of y against x over several logs, where more than half measured y: their median,
    with their range as its band.
    """
    rows = []
    for at, seen in sorted(by([row for log in logs for row in log if y in row], x).items()):
        if len(seen) > len(logs) / 2:
            values = [row[y] for row in seen]
            ends = {f"{y}_low": min(values), f"{y}_high": max(values)}
            rows.append({x: at, y: statistics.median(values)} | ends)
    draw_curve(axis, rows, x, y, label, **kw)


# ============================================================================
# 3. What a run did
# ============================================================================

THRESHOLDS = {"fork_rate": 0.5, "accuracy": 0.7}


def curve(run, column):
    """The steps at which a run measured `column`, and the values: two lists."""
    rows = [row for row in run if column in row]
    return [row["step"] for row in rows], [row[column] for row in rows]


def steps_to(run, column):
    """The first step at which `column` reaches its threshold, linear between measurements and at
    least 1; one more than the last if never.
    """
    steps, values = curve(run, column)
    for i, value in enumerate(values):
        if value >= THRESHOLDS[column]:
            near = slice(max(i - 1, 0), i + 1)
            return max(float(numpy.interp(THRESHOLDS[column], values[near], steps[near])), 1)
    return steps[-1] + 1


def area(run, column):
    """Mean height of the curve of `column` over the steps (trapezoids)."""
    steps, values = curve(run, column)
    return float(numpy.trapezoid(values, steps)) / max(steps[-1] - steps[0], 1)


def first(run, column):
    """The first value measured."""
    return curve(run, column)[1][0]


def last(run, column):
    """The last value measured, nan if none was."""
    return [math.nan, *curve(run, column)[1]][-1]


def mean(run, column):
    """The mean of what was measured, nan if nothing was."""
    return statistics.fmean(curve(run, column)[1] or [math.nan])


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

SEEDS = range(5)
# the regime in which studies look: many updates per rollout, and a rare token that matters
PRESSURE = {"updates_per_rollout": 16, "steps": 36, "eval_every": 3}
PRESSURE |= {"eval_problems": 150, "eval_samples": 4}
BASE = {"preset": "base", "device": "cuda", "moves": 10, "steps": 24}  # ... on one GPU
RARE_FORK = {"fork_prior": 0.01}
MIXED = {"min_moves": 2, "moves": 8}  # chains of 2 to 8 steps are responses of 6 to 12 tokens
COLD = ("fork_prior", "sft_steps", "sft_skill", "preset")  # settings of a cold start alone
CHANGES = ("change", "always")  # of the code, see Study
SHARED = ("seed", "always", "device", *MIXED, *COLD)  # what a cold start has of its runs' settings
QUICK = {"sft_steps": 40, "prompts": 16, "min_groups": 1, "eval_problems": 6, "eval_samples": 1}
KEPT = """step accuracy eval_fork_rate correct fork_rate length entropy grad_norm ratio_max
weight_clip_frac_high ppo_would_drop_frac ess prob_corr logp_gap_mean busiest_expert over_capacity
groups window length_p99 perplexity negative_early negative_late seconds""".split()
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


def train_run(out, settings, quick=False):
    """Rows of the log of one run of train_rl in this process, into the folder `out`, by default on
    the CPU; what it prints is dropped. With `init` settings of a cold start do not count. `change`
    and `always` are functions that change the code first.
    """
    settings = {"device": "cpu"} | settings | {"out": str(out)}
    changes = [settings.pop(name) for name in CHANGES if name in settings]
    if unknown := settings.keys() - flat(train_rl.Flags()).keys():
        raise ValueError(f"train_rl has no setting {', '.join(sorted(unknown))}")
    if quick:
        settings |= QUICK | {"steps": min(settings["steps"], 2)}
    if settings.get("init"):
        settings = {name: x for name, x in settings.items() if name not in COLD}
    for change in changes:
        change()
    with contextlib.redirect_stdout(io.StringIO()):
        train_rl.train(unflat(train_rl.Flags, settings))
    return runlog.read_log(f"{out}/log.csv")


def study_run(setting, seed, out, settings, *how):
    """Rows of one run of a study. One that ends because its numbers overflow is told, and its last
    accuracy and fork rate stand for the rest of its steps.
    """
    try:
        log = train_run(out, settings, *how)
    except ValueError as error:
        if not any(words in str(error) for words in ("not finite", "overflows", "gradient norm")):
            raise
        tqdm.write(f"{setting}, seed {seed}, counts as it stood when it ended: {error}")
        log = runlog.read_log(f"{out}/log.csv")
        log.append({"step": settings["steps"], **{c: last(log, c) for c in THRESHOLDS}})
    shutil.rmtree(out)  # hundreds of checkpoints would fill a disk
    return [{"setting": setting, "seed": seed} | {c: row.get(c, "") for c in KEPT} for row in log]


def in_processes(function, jobs, title, at_once=None):
    """Rows of function(*job) for all jobs, each in a process of its own and of one thread, as many
    at a time as there are processors, or as at_once says.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # children read it when they import torch
    how = {"mp_context": get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(at_once or os.cpu_count(), **how) as pool:
        found = pool.map(function, *zip(*jobs))
        found = tqdm(found, total=len(jobs), desc=title, disable=None, leave=False)
        return [row for rows in found for row in rows]


@dataclass(frozen=True)
class Study:
    """Settings to compare over seeds, from a cold start that a seed's runs share.

    Among a setting's flags may stand `change`, a function that changes the code of its runs, or
    `always`, one that changes that of their cold starts as well.
    """

    name: str
    title: str
    settings: dict  # {name: {flag: value}}
    flags: dict = field(default_factory=dict)  # of all runs, beside PRESSURE
    curves: tuple = ("fork_rate", "accuracy", "entropy")
    beside: dict = field(default_factory=dict)  # {name: the one to compare it with, not the first}
    verdict: Callable | None = None  # {name: [log of every seed]} -> a last sentence
    base: dict = field(default_factory=lambda: BASE)  # what runs at base have of their own

    def run(self, quick=False, seeds=SEEDS):
        """Rows of NAME.csv: setting, seed and what log.csv says, for every step of every run."""
        starts, runs, seeds = {}, [], seeds[:1] if quick else seeds
        at_once = (
            2 if self.flags.get("device") == "cuda" else None
        )  # of base, while one is on the host
        with tempfile.TemporaryDirectory() as folder:
            for seed, (name, own) in itertools.product(seeds, self.settings.items()):
                settings = PRESSURE | self.flags | own | {"seed": seed}
                cold = {k: settings[k] for k in SHARED if k in settings}
                new = f"{folder}/cold-{len(starts)}", cold | {"steps": 0}, quick
                start, *_ = starts.setdefault(str(cold), new)
                settings |= {"init": start}
                runs.append((name, seed, f"{folder}/{name}-{seed}", settings, quick))
            in_processes(train_run, list(starts.values()), "cold starts", at_once)
            return in_processes(study_run, runs, "runs", at_once)

    def show(self, flags):
        """Run it, or with --redraw read its CSV; picture, table, what each setting changes beside
        its base. With --preset base the same on a GPU, with a CSV and a picture of its own.
        """
        if flags.preset == "base" and not self.name.endswith("-base"):
            bigger = replace(self, name=f"{self.name}-base", flags=self.flags | self.base)
            return bigger.show(flags)

        def measure(quick):
            path = Path(flags.out) / f"{self.name}.csv"
            seeds = [int(seed) for seed in flags.seeds.split(",")]
            kept = read_csv(path) if flags.seeds != Comparison.seeds and path.exists() else []
            return [row for row in kept if row["seed"] not in seeds] + self.run(quick, seeds)

        rows = recorded(flags, self.name, measure)
        logs = {name: list(by(its, "seed").values()) for name, its in by(rows, "setting").items()}
        n = len(next(iter(logs.values())))
        title = f"{self.title} (median and range of {n} seeds)"
        with picture(flags, self.name, len(self.curves), (11, 3.6), title) as axes:
            for axis, column in zip(axes, self.curves):
                for width, (name, runs) in zip(range(len(logs), 0, -1), logs.items()):
                    style = {"band": 0.4 / len(logs), "lw": 1.2 * width}  # equal ones side by side
                    draw_median(axis, runs, "step", column, name, **style)
                axis.set(xlabel="RL step", ylabel=LABELS.get(column, column))
                if column in ("logp_gap_mean", "ratio_max") and axis.dataLim.ymax > 0:
                    axis.set_yscale("log")
            axes[0].legend(fontsize=8)
        goals = [column for column in self.curves if column in THRESHOLDS]
        measures = {"accuracy before": (first, "accuracy")}
        measures |= {f"steps to {c} of {THRESHOLDS[c]:.0%}": (steps_to, c) for c in goals}
        measures |= {what: (measure, "accuracy") for what, measure in OVERALL.items()}
        measures |= {f"mean {c}": (mean, c) for c in self.curves if c not in goals}
        table = []
        for name, runs in logs.items():
            row = {x: interval(f(run, c) for run in runs) for x, (f, c) in measures.items()}
            table.append({"setting": name} | row)
        never = "a run that never gets there counts one step too long"
        print(f"median over {n} seeds [95 % bootstrap interval]; {never}")
        print_table(table)
        print(*compare(logs, self.beside), sep="\n")
        if self.verdict:
            print(self.verdict(logs))


def compare(logs, beside):
    """What a setting changes beside another, by default the first, seed by seed: a line each.

    All of five seeds agree in sign by chance once in 16 times: one such line proves little.
    """
    start, *others = logs
    for other in others:
        parts, base = [], beside.get(other, start)
        for what, measure in OVERALL.items():
            pairs = zip(logs[base], logs[other])
            gaps = [measure(b, "accuracy") - measure(a, "accuracy") for a, b in pairs]
            agree = "all seeds agree" if min(gaps) > 0 or max(gaps) < 0 else "seeds disagree"
            parts.append("{} {:+.3f} [{:+.3f}, {:+.3f}], {}".format(what, *bootstrap(gaps), agree))
        yield f"{other} beside {base}: {'; '.join(parts)}."


# ============================================================================
# 5. Command line
# ============================================================================


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


@dataclass(frozen=True)
class Comparison(Flags):
    """... by those that compare settings (Study.show)."""

    preset: Literal["tiny", "base"] = "tiny"
    """base: 649 M parameters on one GPU, into NAME-base.csv"""
    seeds: str = "0,1,2,3,4"
    """seeds to run; of others the CSV keeps what it has"""

    def __post_init__(self):
        super().__post_init__()
        if not all(seed.isdecimal() for seed in self.seeds.split(",")):
            raise ValueError(f"--seeds must be numbers such as 0,1, found {self.seeds!r}")


def script(study, text, kind=Flags):
    """main(argv=None) of a study, a function of its flags. text: its docstring."""
    return command_line(lambda argv=None: study(parse(kind, argv, text)))
