"""Is one softmax layer in eight enough for recall (MiniMax-01)?

python -m studies.hybrid (100 minutes)

Associative recall of 2 to 8 pairs, asked at once or across 32 characters, for five mixtures of
layers: one cold start each, scored by guesses, where memory alone helps. A seed that ends low has
not learnt it yet; that is not its limit.
"""

import itertools
import tempfile
from pathlib import Path

import runlog
from cli import read_json
from studies.common import (
    bootstrap,
    by,
    in_processes,
    median_and_range,
    picture,
    print_table,
    recorded,
    script,
    train_run,
)

RATIOS = {0: "all lightning", 8: "7 : 1 (M1)", 4: "3 : 1", 2: "1 : 1", 1: "all softmax"}
RECALLS = {"recall": "asked at once", "far": "asked after 32 characters of filler"}
PAIRS, SKILL, STEPS = (2, 4, 8), 0.99, 1600


def recall(out, task, ratio, seed, quick):
    """Rows of hybrid.csv of one cold start on 2 to 8 pairs: its score at each number of PAIRS."""
    few = {"eval_problems": 6, "eval_samples": 1} if quick else {"eval_samples": 4}
    common, rows = {"task": task, "seed": seed, "steps": 0, **few}, []
    effort = {"sft_steps": 2 if quick else STEPS, "sft_skill": SKILL, "fork_prior": 0.0}
    shape = {"softmax_every": ratio, "min_moves": 2, "moves": PAIRS[-1]}
    train_run(out, common | effort | shape)
    learnt = read_json(Path(out, "run.json"))["cold_start"]
    for pairs in PAIRS:
        train_run(f"{out}-{pairs}", common | {"init": out, "moves": pairs})
        accuracy = runlog.read_log(f"{out}-{pairs}/log.csv")[0]["accuracy"]
        row = {"task": task, "softmax_every": ratio, "seed": seed, "pairs": pairs}
        row |= {"accuracy": accuracy, "steps": learnt["steps"], "skill": learnt["skill"]}
        rows.append(row)
    return rows


def run_recalls(quick):
    """Rows of hybrid.csv."""
    grid = list(itertools.product(RECALLS, RATIOS, range(5)))
    with tempfile.TemporaryDirectory() as folder:
        grid = grid[:: len(grid) // 2] if quick else grid
        jobs = [(f"{folder}/{'-'.join(map(str, job))}", *job, quick) for job in grid]
        return [row for rows in in_processes(recall, jobs, "recalls") for row in rows]


def study(flags):
    """Run it, or read it; picture, table, and how many seeds have learnt it."""
    parts, table, told = by(recorded(flags, "hybrid", run_recalls, ["steps"]), "task"), [], []
    text = "{accuracy:.2f} [{accuracy_low:.2f}, {accuracy_high:.2f}]"
    with picture(flags, "hybrid", len(parts), (10, 3.8)) as axes:
        for axis, (task, rows) in zip(axes, parts.items()):
            learnt = []
            for ratio, runs in by(rows, "softmax_every").items():
                curve = median_and_range(by(runs, "seed").values(), "pairs", "accuracy")
                x, y = ([point[c] for point in curve] for c in ("pairs", "accuracy"))
                color = axis.plot(x, y, label=RATIOS[ratio])[0].get_color()
                x, y = ([run[c] for run in runs] for c in ("pairs", "accuracy"))
                axis.plot(x, y, "o", ms=4, color=color)
                row = {f"{point['pairs']:.0f} pairs": text.format(**point) for point in curve}
                easiest = by(runs, "pairs")[PAIRS[0]]
                n = sum(run["accuracy"] >= 0.9 for run in easiest)
                row["have learnt it"] = f"{n} of {len(easiest)}"
                steps = bootstrap([run["steps"] for run in easiest])
                row["steps"] = "{:.0f} [{:.0f}, {:.0f}]".format(*steps)
                table.append({"task": task, "layers": RATIOS[ratio]} | row)
                learnt.append(f"{row['have learnt it']} {RATIOS[ratio]}")
            axis.plot(PAIRS, [1 / n + (1 - 1 / n) / 10 for n in PAIRS], ":", color="gray")
            ylabel = "accuracy (dotted: a pair by chance)"
            axis.set(title=RECALLS[task], xlabel="pairs to remember", ylabel=ylabel)
            told.append(f"{RECALLS[task]}, these seeds have learnt it: {', '.join(learnt)}.")
        axes[0].legend(fontsize=8, title="median; dots: seeds")
    print(f"held-out accuracy after imitation, median [range]; learnt: 0.9 of {PAIRS[0]} pairs")
    print(f"steps: until {SKILL:.0%} of forced chains are right, {STEPS} at most")
    print_table(table)
    print("\n".join(told))


main = script(study, __doc__)

if __name__ == "__main__":
    main()
