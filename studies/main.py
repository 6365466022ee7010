"""Does accuracy rise with length (report, Figure 4)? The main job for ten seeds.

python -m studies.main (15 minutes on two CPU cores)

These logs are the reference that every main job prints beside its own result.
"""

import shutil
import tempfile
from pathlib import Path

import runlog
import train_rl
from studies.common import draw_median, picture, print_table, script, write_csv

SEEDS = range(10)


def study(flags):
    """main-seed0.csv ... (the runs' logs), main.csv (their summaries), main.png, table."""
    out = Path(flags.out)
    if not flags.redraw:
        summaries = []
        out.mkdir(parents=True, exist_ok=True)
        for seed in SEEDS[:1] if flags.quick else SEEDS:  # one after another, with all threads
            with tempfile.TemporaryDirectory() as folder:
                argv = ["--device", "cpu", "--seed", str(seed), "--out", f"{folder}/run"]
                summaries.append(train_rl.main(argv))
                shutil.copy(Path(folder, "run", "log.csv"), out / f"main-seed{seed}.csv")
        write_csv(out / "main.csv", summaries)
    rows = runlog.read_log(out / "main.csv")
    logs = [runlog.read_log(out / f"main-seed{row['seed']:.0f}.csv") for row in rows]
    title = "RL makes the model think first: accuracy rises with response length"
    title += f" (band: range of {len(logs)} seeds)"
    with picture(flags, "main", 3, (11, 3.4), title) as axes:
        for axis, (column, (_, label)) in zip(axes, runlog.CURVES.items()):
            draw_median(axis, logs, "step", column)
            axis.set(xlabel="RL step", ylabel=label)
    parts = {"accuracy": ".3f", "fork_rate": ".2f", "length": ".1f"}
    columns = {x: f"{{{x}_start:{f}}} -> {{{x}_end:{f}}}" for x, f in parts.items()}
    print_table(rows, {"seed": "{seed:.0f}", **columns, "seconds": "{seconds:.0f}"})


main = script(study, __doc__)

if __name__ == "__main__":
    main()
