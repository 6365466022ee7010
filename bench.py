"""Every claim and every speed: one sub-command, one CSV, one picture each.

    python bench.py flops        Figure 1 (right) of the report: inference FLOPs against generation length (a second)
    python bench.py main         Figure 4 in miniature: the main job for seeds 0, 1, 2 (3 to 9 minutes on two CPU cores)

Files go to figures/ (--out changes that). --redraw makes the picture again from the CSV that is there. Numbers in
README.md come from these files.

    1. flops           2. main           3. files and command line
"""

import csv
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import train_rl
from model import command_line, flag, parse_flags

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
    out = Path(flags.out)
    rows = [
        {
            "model": model,
            "convention": convention,
            "tokens": n,
            "flops": f"{generation_flops(model, convention, n):.9e}",
        }
        for convention in ("report", "textbook")
        for model in MODELS
        for n in LENGTHS
    ]
    write_csv(out / "flops.csv", rows)

    plt = train_rl.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = {"report": "counted as in the report", "textbook": "textbook causal counting"}
    for axis, (convention, title) in zip(axes, titles.items()):
        for model, name in MODELS.items():
            y = [generation_flops(model, convention, n) / 1e16 for n in LENGTHS]
            axis.plot([n / K for n in LENGTHS], y, "o-", ms=3, label=name)
        share = generation_flops("m1", convention, 100 * K) / generation_flops("r1", convention, 100 * K)
        axis.set(title=f"{title}: M1 needs {share:.0%} of R1 at 100K", xlabel="generated tokens (x 1024)")
    axes[0].set_ylabel("FLOPs (x 1e16)")
    axes[0].legend()
    figure.savefig(out / "flops.png", dpi=110)
    plt.close(figure)

    print("M1's FLOPs as a share of R1's      " + "".join(f"{n // K:>6}K" for n in (32 * K, 64 * K, 100 * K, 128 * K)))
    for convention, title in titles.items():
        shares = (
            generation_flops("m1", convention, n * K) / generation_flops("r1", convention, n * K)
            for n in (32, 64, 100, 128)
        )
        print(f"{title:<35}" + "".join(f"{share:7.1%}" for share in shares))
    print('The report\'s text says "about 25 % at 100K"; its own curve reaches that near 128K.')


# ============================================================================
# 2. The main job over seeds                               (report, Figure 4)
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

    plt = train_rl.pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, (column, (_, label)) in zip(axes, train_rl.CURVES.items()):
        draw_band(axis, logs, "step", column)
        axis.set(xlabel="RL step", ylabel=label)
    figure.suptitle("RL makes the model think first: accuracy rises with response length (band: range of 3 seeds)")
    figure.savefig(out / "main.png", dpi=110)
    plt.close(figure)

    print("seed   accuracy before -> after    fork rate       length          seconds")
    line = "{seed:4.0f}   {accuracy_start:.3f} -> {accuracy_end:.3f}           {fork_rate_start:.2f} -> {fork_rate_end:.2f}"
    line += "    {length_start:.1f} -> {length_end:4.1f}     {seconds:.0f}"
    for row in train_rl.read_log(out / "main.csv"):
        print(line.format(**row))


def draw_band(axis, logs, x, y):
    """Median and range over runs of column y against column x, where it was measured."""
    curves = [{row[x]: row[y] for row in log if y in row} for log in logs]
    at = sorted(set.intersection(*map(set, curves)))
    columns = [sorted(curve[t] for curve in curves) for t in at]
    axis.fill_between(at, [c[0] for c in columns], [c[-1] for c in columns], alpha=0.3, lw=0)
    axis.plot(at, [c[len(c) // 2] for c in columns], "o-", ms=3)


# ============================================================================
# 3. Files and command line
# ============================================================================


def write_csv(path, rows):
    """A list of dicts with the same keys -> a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Flags:
    """Shared by all benchmarks."""

    out: str = flag("figures", "folder for CSV and PNG files", "files")
    redraw: bool = flag(False, "main: only draw the picture, from the CSV files that are there", "files")


BENCHES = {"flops": flops, "main": main_job}


@command_line
def main(argv=None):
    """python bench.py NAME [--out DIR] [--redraw]"""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    flags = parse_flags(Flags, argv, __doc__)
    if name not in BENCHES:
        raise ValueError(f"unknown benchmark {name!r}; choose from {', '.join(BENCHES)}, e.g. python bench.py flops")
    BENCHES[name](flags)


if __name__ == "__main__":
    main()
