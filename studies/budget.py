"""Does thinking longer buy accuracy, more so for the model with the larger window (40K, 80K)?

python -m studies.budget (15 minutes)

One run a seed, whose window jumps from 8 to 12 tokens after 40 of 80 steps; both checkpoints are
scored with a thinking budget of 1 to 10 tokens.
"""

import functools
import tempfile
from statistics import fmean

import experience
import train_rl
from cli import checkpoint, unflat
from studies.common import (
    MIXED,
    by,
    draw_median,
    in_processes,
    interval,
    picture,
    print_table,
    recorded,
    script,
    train_run,
)
from studies.windows import jump
from tokenizer import Tokenizer

STAGED = MIXED | {"fork_prior": 0.3, "windows": "8,12", "steps": 80, "checkpoint_every": 40}
BUDGETS = range(1, 11)  # tokens of thinking, the fork among them; none at all is malformed


def spend_budgets(quick):
    """Rows of budget.csv: seed, window, budget, accuracy, tokens and time of a response."""
    few = {"sft_steps": 4, "steps": 2, "checkpoint_every": 1, "eval_problems": 6} if quick else {}
    settings, rows = STAGED | few, []
    middle = settings["steps"] // 2
    with tempfile.TemporaryDirectory() as folder:
        change = functools.partial(jump, middle + 1)
        seeds = range(1 if quick else 5)
        jobs = [(f"{folder}/{seed}", settings | {"seed": seed}, change) for seed in seeds]
        in_processes(train_run, jobs, "runs")
        run, byte = unflat(train_rl.Flags, settings), Tokenizer.byte()
        for seed in seeds:
            for window, step in zip(run.growth.limits, (middle, settings["steps"])):
                model = checkpoint.load_pretrained(f"{folder}/{seed}/step-{step:06d}")
                ask = functools.partial(experience.respond, model, byte, run.held_out, seed, 4)
                for limit in BUDGETS:
                    rollout, scores = ask(**run.limits(), think_budget=limit)
                    row = {"seed": seed, "window": window, "budget": limit}
                    row["accuracy"] = f"{fmean(s.correct for s in scores):.4f}"
                    row["tokens"] = f"{float(rollout.lengths.float().mean()):.3f}"
                    rows.append(row | {"us": f"{rollout.seconds / len(scores) * 1e6:.4g}"})
    return rows


def study(flags):
    """Run it, or read it; picture and table."""
    windows = by(recorded(flags, "budget", spend_budgets), "window")
    labels = {"accuracy": "held-out accuracy", "tokens": "tokens of a response"}
    labels["us"] = "microseconds of a response"
    title, table = "thinking longer buys accuracy, for a model that has learnt to", []
    with picture(flags, "budget", 3, (11, 3.6), f"{title} (median and range of 5 seeds)") as axes:
        for window, rows in windows.items():
            name = f"responses of up to {window:.0f} tokens in training"
            for axis, (column, label) in zip(axes, labels.items()):
                draw_median(axis, by(rows, "seed").values(), "budget", column, name)
                axis.set(xlabel="thinking budget, tokens", ylabel=label)
            for limit, seeds in by(rows, "budget").items():
                row = {column: interval([seed[column] for seed in seeds]) for column in labels}
                table.append({"window": f"{window:.0f}", "budget": f"{limit:.0f}"} | row)
        axes[0].legend(fontsize=7)
    print("median over seeds [95 % bootstrap interval]")
    print_table(table)


main = script(study, __doc__)

if __name__ == "__main__":
    main()
