"""Does thinking longer buy accuracy, more so for the model with the larger window (40K, 80K)?

python -m studies.budget                 (15 minutes)
python -m studies.budget --preset base   (one GPU): six windows, of which three are scored

One run a seed, whose window grows from 8 to 12 tokens after 40 of 80 steps; checkpoints at the end
of a window are scored with a thinking budget of 1 to 10 tokens.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal

import experience
import train_rl
from cli import unflat
from curriculum import Curriculum
from studies import common
from tokenizer import Tokenizer

STAGED = common.MIXED | {"fork_prior": 0.3, "windows": "8,12"}
SIX = common.BASE | {"min_moves": 2, "fork_prior": 0.3, "windows": "8,9,10,11,12,14"}
# Settings; steps of a window; which windows are scored; budgets, tokens of thinking with the fork
# among them (none at all is malformed).
PLANS = {"tiny": (STAGED, 40, (1, 2), range(1, 11)), "base": (SIX, 8, (1, 3, 6), range(1, 13))}
LABELS = {"accuracy": "held-out accuracy", "tokens": "tokens of a response"}
LABELS |= {"us": "microseconds of a response"}


def grows(every):
    """Change the curriculum: a window opens every so many steps, whatever outputs look like."""

    def observe(self, seen):
        self.correct = [*self.correct, seen["correct"]]  # a value a step
        self.window = min(len(self.correct) // every, len(self.growth.limits) - 1)

    Curriculum.observe = observe


def spend(preset, seed, quick):
    """Rows of budget.csv of a seed: its run, whose checkpoints then answer with every budget."""
    (settings, every, scored, budgets), rows = PLANS[preset], []
    every = 1 if quick else every
    settings = settings | {"seed": seed, "checkpoint_every": every, "steps": every * scored[-1]}
    flags = unflat(train_rl.Flags, settings | (common.QUICK if quick else {}))
    with tempfile.TemporaryDirectory() as folder:
        changed = settings | {"change": lambda: grows(every)}
        common.train_run(f"{folder}/run", changed, quick)
        for number in scored:
            window = flags.growth.limits[number - 1]
            step = f"{folder}/run/step-{every * number:06d}"
            model = train_rl.load_model(flags, step, None, settings.get("device", "cpu"))
            for limit in budgets:
                how = flags.limits() | {"think_budget": limit}
                rollout, scores = experience.respond(
                    model, Tokenizer.byte(), flags.held_out, seed, 4, **how
                )
                row = {"seed": seed, "window": window, "budget": limit}
                row["accuracy"] = f"{fmean(score.correct for score in scores):.4f}"
                row["tokens"] = f"{float(rollout.lengths.float().mean()):.3f}"
                rows.append(row | {"us": f"{rollout.seconds / len(scores) * 1e6:.4g}"})
    return rows


def spend_budgets(preset, quick):
    """Rows of budget.csv: seed, window, budget, accuracy, tokens and time of a response."""
    jobs = [(preset, seed, quick) for seed in common.SEEDS[: 1 if quick else None]]
    return common.in_processes(spend, jobs, "runs", 2 if preset == "base" else None)


@dataclass(frozen=True)
class BudgetFlags(common.Flags):
    """Of all studies, and:"""

    preset: Literal["tiny", "base"] = "tiny"
    """base: 649 M parameters on one GPU, into budget-base.csv"""


def study(flags):
    """Run it, or read it; picture and table."""
    name = "budget" + "-base" * (flags.preset == "base")
    rows, table = common.recorded(flags, name, partial(spend_budgets, flags.preset)), []
    windows = common.by(rows, "window")
    title = "thinking longer buys accuracy, for a model that has learnt to"
    title += " (median and range of 5 seeds)"
    with common.picture(flags, name, 3, (11, 3.6), title) as axes:
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


main = common.script(study, __doc__, BudgetFlags)

if __name__ == "__main__":
    main()
