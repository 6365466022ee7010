"""Is one softmax layer in eight enough for recall (MiniMax-01)?

python -m studies.hybrid (100 minutes)

Associative recall of 2 to 8 pairs, asked at once or across 32 characters, for five mixtures of
layers: one cold start each, scored by guesses, where memory alone helps. A seed that ends low has
not learnt it yet; that is not its limit.
"""

import itertools
import tempfile
from statistics import median

from cli import read_json
from studies import common

RATIOS = {0: "all lightning", 8: "7 : 1 (M1)", 4: "3 : 1", 2: "1 : 1", 1: "all softmax"}
RECALLS = {"recall": "asked at once", "far": "asked after 32 characters of filler"}
PAIRS, SKILL, STEPS = (2, 4, 8), 0.99, 1600


def recall(task, ratio, seed, quick):
    """Rows of hybrid.csv of one cold start on 2 to 8 pairs: its score at each number of PAIRS."""
    settings = {"task": task, "seed": seed, "steps": 0, "eval_samples": 4}
    effort = {"sft_steps": STEPS, "sft_skill": SKILL, "fork_prior": 0.0}
    shape = {"softmax_every": ratio, "min_moves": 2, "moves": PAIRS[-1]}
    row, rows = {"task": task, "softmax_every": ratio, "seed": seed}, []
    with tempfile.TemporaryDirectory() as folder:
        cold = f"{folder}/cold"
        common.train_run(cold, settings | effort | shape, quick)
        learnt = read_json(f"{cold}/run.json")["cold_start"]
        for pairs in PAIRS:
            asked = settings | {"init": cold, "moves": pairs}
            accuracy = common.train_run(f"{folder}/{pairs}", asked, quick)[0]["accuracy"]
            score = {"pairs": pairs, "accuracy": accuracy}
            rows.append(row | score | {"steps": learnt["steps"], "skill": learnt["skill"]})
    return rows


def run_recalls(quick):
    """Rows of hybrid.csv."""
    jobs = list(itertools.product(RECALLS, RATIOS, common.SEEDS, [quick]))
    jobs = jobs[:: len(jobs) // 2] if quick else jobs
    return common.in_processes(recall, jobs, "recalls")


def study(flags):
    """Run it, or read it; picture, table, and how many seeds have learnt it."""
    parts = common.by(common.recorded(flags, "hybrid", run_recalls), "task")
    table = []
    with common.picture(flags, "hybrid", len(parts), (10, 3.8)) as axes:
        for axis, (task, rows) in zip(axes, parts.items()):
            for i, (ratio, runs) in enumerate(common.by(rows, "softmax_every").items()):
                seeds, color = common.by(runs, "pairs"), f"C{i}"
                row = {"task": task, "layers": RATIOS[ratio]}
                scores = {n: [run["accuracy"] for run in seeds[n]] for n in PAIRS}
                for n, x in scores.items():
                    row[f"{n} pairs"] = f"{median(x):.2f} [{min(x):.2f}, {max(x):.2f}]"
                    axis.plot([n] * len(x), x, "o", ms=4, color=color)
                middle = [median(scores[n]) for n in PAIRS]
                axis.plot(PAIRS, middle, color=color, label=RATIOS[ratio])
                easiest = scores[PAIRS[0]]
                row["have learnt it"] = f"{sum(x >= 0.9 for x in easiest)} of {len(easiest)}"
                steps = common.bootstrap(run["steps"] for run in seeds[PAIRS[0]])
                table.append(row | {"steps": "{:.0f} [{:.0f}, {:.0f}]".format(*steps)})
            axis.plot(PAIRS, [1 / n + (1 - 1 / n) / 10 for n in PAIRS], ":", color="gray")
            ylabel = "accuracy (dotted: a pair by chance)"
            axis.set(title=RECALLS[task], xlabel="pairs to remember", ylabel=ylabel)
        axes[0].legend(fontsize=8, title="median; dots: seeds")
    print(f"held-out accuracy after imitation, median [range]; learnt: 0.9 of {PAIRS[0]} pairs")
    print(f"steps: until {SKILL:.0%} of forced chains are right, {STEPS} at most")
    common.print_table(table)


main = common.script(study, __doc__)

if __name__ == "__main__":
    main()
