"""Two runs side by side: curves over each other, and a table of the first and the last of each.

python -m studies.compare runs/tiny-cispo-001 runs/init-grpo-001
"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

import runlog
from studies.common import curve, draw_curve, picture, print_table, script

CURVES = ("accuracy", "fork_rate", "length", "entropy", "ppo_would_drop_frac")


@dataclass(frozen=True)
class Flags:
    """Which runs."""

    runs: Positional[tuple[str, ...]] = ()
    """run folders"""
    out: str = "runs"
    """folder for compare.png"""

    def __post_init__(self):
        for run in self.runs:
            if not Path(run, "log.csv").is_file():
                raise ValueError(f"{run} has no log.csv: give run folders, runs/NAME")


def study(flags):
    """Draw and print them."""
    if not flags.runs:
        raise ValueError("give run folders: python -m studies.compare runs/A runs/B")
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    table = []
    with picture(flags, "compare", len(CURVES), (15, 3.2)) as axes:
        for run in flags.runs:
            log = runlog.read_log(Path(run, "log.csv"))
            row = {"run": run, "steps": f"{log[-1]['step']:.0f}"}
            for axis, column in zip(axes, CURVES):
                draw_curve(axis, log, "step", column, Path(run).name)
                axis.set(xlabel="RL step", ylabel=column)
                seen = curve(log, column)[1] or [float("nan")]
                row[column] = f"{seen[0]:.3g} -> {seen[-1]:.3g}"
            table.append(row | {"seconds": f"{sum(r['seconds'] for r in log):.0f}"})
        axes[0].legend(fontsize=7)
    print_table(table)
    print(f"see {Path(flags.out, 'compare.png')}")


main = script(study, __doc__, Flags)

if __name__ == "__main__":
    main()
