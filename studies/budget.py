"""Does thinking longer buy accuracy, more so for the model with the larger window (40K, 80K)?

python -m studies.budget (15 minutes)

One run a seed, whose window jumps from 8 to 12 tokens after 40 of 80 steps; both checkpoints are
scored with a thinking budget of 1 to 10 tokens.
"""

import tempfile
from statistics import fmean

import experience
import train_rl
from cli import checkpoint, unflat
from studies import common
from studies.windows import jump
from tokenizer import Tokenizer

STAGED = common.MIXED | {"fork_prior": 0.3, "windows": "8,12"}
BUDGETS = range(1, 11)  # tokens of thinking, the fork among them; none at all is malformed
LABELS = {"accuracy": "held-out accuracy", "tokens": "tokens of a response"}
LABELS |= {"us": "microseconds of a response"}


def spend(seed, quick):
    """Rows of budget.csv of a seed: its run, whose checkpoints then answer with every budget."""
    steps, rows = (1, 2) if quick else (40, 80), []
    settings = STAGED | {"seed": seed, "checkpoint_every": steps[0], "steps": steps[1]}
    flags = unflat(train_rl.Flags, settings | (common.QUICK if quick else {}))
    with tempfile.TemporaryDirectory() as folder:
        changed = settings | {"change": lambda: jump(steps[0] + 1)}
        common.train_run(f"{folder}/run", changed, quick)
        for window, step in zip(flags.growth.limits, steps):
            model = checkpoint.load_pretrained(f"{folder}/run/step-{step:06d}")
            for limit in BUDGETS:
                how = flags.limits() | {"think_budget": limit}
                rollout, scores = experience.respond(
                    model, Tokenizer.byte(), flags.held_out, seed, 4, **how
                )
                row = {"seed": seed, "window": window, "budget": limit}
                row["accuracy"] = f"{fmean(score.correct for score in scores):.4f}"
                row["tokens"] = f"{float(rollout.lengths.float().mean()):.3f}"
                rows.append(row | {"us": f"{rollout.seconds / len(scores) * 1e6:.4g}"})
    return rows


def spend_budgets(quick):
    """Rows of budget.csv: seed, window, budget, accuracy, tokens and time of a response."""
    jobs = [(seed, quick) for seed in common.SEEDS[: 1 if quick else None]]
    return common.in_processes(spend, jobs, "runs")


def study(flags):
    """Run it, or read it; picture and table."""
    windows, table = common.by(common.recorded(flags, "budget", spend_budgets), "window"), []
    title = "thinking longer buys accuracy, for a model that has learnt to"
    title += " (median and range of 5 seeds)"
    with common.picture(flags, "budget", 3, (11, 3.6), title) as axes:
        for window, rows in windows.items():
            name = f"responses of up to {window:.0f} tokens in training"
            for axis, (column, label) in zip(axes, LABELS.items()):
                common.draw_median(axis, common.by(rows, "seed").values(), "budget", column, name)
                axis.set(xlabel="thinking budget, tokens", ylabel=label)
            for limit, seeds in common.by(rows, "budget").items():
                row = {"window": f"{window:.0f}", "budget": f"{limit:.0f}"}
                row |= {x: common.interval(seed[x] for seed in seeds) for x in LABELS}
                table.append(row)
        axes[0].legend(fontsize=7)
    print("median over seeds [95 % bootstrap interval]")
    common.print_table(table)


main = common.script(study, __doc__)

if __name__ == "__main__":
    main()
