"""CISPO needs half of DAPO's steps (report, Figure 2): does it, here?

    python -m studies.algos            five seeds, forks at 1 %, 16 updates per rollout (9 minutes)
    python -m studies.algos --full     the map: fork prior x updates x learning rate (hours)

Every algorithm is a complete recipe; "grpo, clip alone" differs from CISPO in the clip only. They
start from the same cold starts, and steps are compared seed by seed.
"""

import dataclasses
import itertools
import math
import statistics
from dataclasses import dataclass

from studies.common import (
    PRESSURE,
    RARE_FORK,
    THRESHOLDS,
    Flags,
    Study,
    area,
    bootstrap,
    by,
    interval,
    last,
    picture,
    print_table,
    recorded,
    run_study,
    script,
    show_study,
    steps_to,
)

ALGORITHMS = {
    "cispo": {"algo": "cispo"},
    "dapo": {"algo": "dapo"},
    "grpo": {"algo": "grpo"},
    "grpo, clip alone": {"algo": "grpo", "token_weights": "batch"},
    "reinforce": {"algo": "reinforce"},
}
TITLE = "16 updates per rollout, a fork of 1 %: who learns to think first"
PLAN = Study("algos", TITLE, ALGORITHMS, cold=RARE_FORK)


def saved(logs):
    """How many steps CISPO takes, as a part of what the others take, seed by seed."""
    others = [name for name in logs if name not in ("cispo", "reinforce")]
    for (column, level), other in itertools.product(THRESHOLDS.items(), others):
        pairs = zip(logs["cispo"], logs[other])
        parts = [steps_to(a, column) / steps_to(b, column) for a, b in pairs]
        print(f"CISPO takes {interval(parts)} of {other}'s steps to {column} {level}")
    return "The report says 0.5 of DAPO's (32 B parameters, AIME)."


# ---- the map

PRIORS, UPDATES, RATES = (0.01, 0.05, 0.2), (4, 16), (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
BEST, NEVER = "its best", PRESSURE["steps"] + 1
OTHERS = ("dapo", "grpo", "grpo, clip alone", "reinforce")


def map_rows(quick):
    """Rows of algos-map.csv, one of every run: its setting, seed, area, steps to the thresholds,
    final accuracy, and the largest share of tokens that PPO's clip would have dropped in a step
    until forks crossed their threshold. With one update all algorithms are the same (algo "any").
    """
    cells = {}
    for prior, k, lr in itertools.product(PRIORS, (1, *UPDATES), RATES):
        for name, algo in ALGORITHMS.items() if k > 1 else [("any", {})]:
            own = algo | {"fork_prior": prior, "updates_per_rollout": k, "lr": lr}
            cells[f"{prior} {k} {lr} {name}"] = own, (prior, k, lr, name)
    plan = dataclasses.replace(PLAN, settings={cell: own for cell, (own, _) in cells.items()})
    rows = []
    for (cell, seed), log in by(run_study(plan, quick), "setting", "seed").items():
        log = [{c: x for c, x in row.items() if x != ""} for row in log]
        names = ("fork_prior", "updates_per_rollout", "lr", "algo")
        rows.append(dict(zip(names, cells[cell][1])) | {"seed": seed} | summary(log))
    return rows


def summary(log):
    """What the map keeps of a run."""
    crossing = math.ceil(steps_to(log, "fork_rate"))
    drops = [r.get("ppo_would_drop_frac", 0) for r in log if r["step"] <= crossing]
    row = {"area": f"{area(log, 'accuracy'):.4g}"}
    row |= {f"steps_{column}": f"{steps_to(log, column):.4g}" for column in THRESHOLDS}
    return row | {"final": last(log, "accuracy"), "peak_drop": f"{max(drops):.4g}"}


def at_best(rates):
    """{learning rate: [run of every seed]} -> [run of every seed], each at the rate with the
    largest median area over the OTHER seeds, so that no run takes part in the choice of its own
    rate.
    """
    n = len(next(iter(rates.values())))

    def height(lr, seed):
        areas = [run["area"] for i, run in enumerate(rates[lr]) if i != seed or n == 1]
        return statistics.median(areas)

    return [rates[max(rates, key=lambda lr: height(lr, i))][i] for i in range(n)]


def ratios(mine, its, column):
    """CISPO's steps over another's, seed by seed; without seeds in which neither gets there."""
    pairs = [[run[f"steps_{column}"] for run in pair] for pair in zip(mine, its)]
    return [a / b for a, b in pairs if min(a, b) < NEVER] or [math.nan]


def show_map(flags):
    """Tables, sentences and picture of the map."""
    runs = by(recorded(flags, "algos-map", map_rows), "fork_prior", "updates_per_rollout", "algo")
    runs = {where: by(rows, "lr") for where, rows in runs.items()}
    for sweep in runs.values():
        sweep[BEST] = at_best(sweep)
    places, cells, table = list(itertools.product(PRIORS, UPDATES)), {}, []
    for place, lr in itertools.product(places, (*RATES, BEST)):
        cell = cells[*place, lr] = {
            name: statistics.median(run["final"] for run in runs[*place, name][lr])
            for name in ALGORITHMS
        }
        cell["drops"] = statistics.median(r["peak_drop"] for r in runs[*place, "cispo"][lr])
        row = dict(zip(("fork prior", "updates", "learning rate"), (*place, lr)))
        for column, other in itertools.product(THRESHOLDS, OTHERS):
            parts = ratios(runs[*place, "cispo"][lr], runs[*place, other][lr], column)
            cell[column, other] = bootstrap(parts)[0]
            row[f"{column}, / {other}"] = interval(parts)
        table.append(row | {"ppo drops, peak": f"{cell['drops']:.1%}"})
    print(
        "CISPO's steps to a fork rate of 50 % and to an accuracy of 70 % over the others': median"
    )
    print(
        "of seeds [95 % bootstrap interval]. ppo drops, peak: until forks are at 50 %. its best: of"
    )
    print("each algorithm and seed the learning rate with the largest area over the other seeds.")
    print_table(table)
    for prior in PRIORS:
        sweeps = [runs[prior, 1, "any"]] + [runs[prior, k, "cispo"] for k in UPDATES]
        rates = [f"{statistics.median(run['lr'] for run in sweep[BEST]):g}" for sweep in sweeps]
        steps = [interval([run["steps_fork_rate"] for run in sweep[BEST]]) for sweep in sweeps]
        print(f"prior {prior:g}: at 1, 4, 16 updates per rollout and rates of {', '.join(rates)}")
        print(f"    CISPO takes {', '.join(steps)} steps to a fork rate of 50 % ({NEVER}: never)")
    tell(cells)
    draw(flags, places, cells)


def tell(cells):
    """Where CISPO saves most, and what its savings follow. cells: {(prior, updates, rate):
    medians}.
    """
    kinds = {True: "a setting at which both end at 0.7 or more", False: "any other"}
    for column, other, sound in itertools.product(THRESHOLDS, OTHERS, kinds):
        found = {
            where: cell[column, other]
            for where, cell in cells.items()
            if cell[column, other] > 0 and (min(cell["cispo"], cell[other]) >= 0.7) == sound
        }
        if found:
            where = min(found, key=found.get)
            place = "prior {:g}, {} updates, learning rate {}".format(*where)
            goal = f"steps to {column} {THRESHOLDS[column]} over {other}'s"
            print(f"{goal}, lowest in {kinds[sound]}: {found[where]:.2f} ({place})")
    for other in OTHERS[:3]:  # reinforce drops nothing, too
        swept = [c for (*_, lr), c in cells.items() if lr in RATES and c["fork_rate", other] > 0]
        x, y = zip(*((c["drops"], c["fork_rate", other]) for c in swept))
        few, many = (
            [b for a, b in zip(x, y) if low <= a < high] or [math.nan]
            for low, high in ((0, 0.02), (0.1, 1))
        )
        few, many = (f"{min(part):.3f} to {max(part):.3f}" for part in (few, many))
        fit = (
            f"correlation {statistics.correlation(x, y):.2f}; {few} below 2 %, {many} from 10 % on"
        )
        print(f"over {other}'s they follow what PPO's clip would drop at its peak: {fit}")


def draw(flags, places, cells):
    """Maps of the ratios, rows of places and columns of rates; ratios against what a clip drops."""
    rates, shown = (*RATES, BEST), OTHERS[:2]
    with picture(flags, "algos-map", 3, (13, 3.8)) as axes:
        for axis, other in zip(axes, shown):
            grid = [[cells[*place, lr]["fork_rate", other] for lr in rates] for place in places]
            axis.imshow(grid, cmap="Greens_r", vmin=0.5, vmax=1.05, aspect="auto")
            for y, x in itertools.product(range(len(places)), range(len(rates))):
                axis.text(x, y, f"{grid[y][x]:.2f}", ha="center", va="center")
            axis.set_xticks(range(len(rates)), [f"{1e4 * lr:g}" for lr in RATES] + ["best"])
            axis.set_yticks(range(len(places)), [f"{prior:g}, {k:g}" for prior, k in places])
            title = f"CISPO's steps to 50 % forks / {other}'s"
            axis.set(title=title, xlabel="learning rate, 1e-4", ylabel="fork prior, updates")
        for other in shown:
            swept = [cells[*place, lr] for place, lr in itertools.product(places, RATES)]
            x, y = zip(*((100 * c["drops"], c["fork_rate", other]) for c in swept))
            axes[-1].plot(x, y, "o", label=other)
        axes[-1].set(title="it saves where a clip would drop", ylabel="CISPO's steps / the other's")
        axes[-1].set(xlabel="tokens that PPO's clip would drop, peak, %")
        axes[-1].legend()


@dataclass(frozen=True)
class AlgosFlags(Flags):
    """Of all studies, and:"""

    full: bool = False
    """the map over fork prior, updates per rollout and learning rate"""


def study(flags):
    """The comparison, or with --full the map."""
    return show_map(flags) if flags.full else show_study(PLAN, flags, saved)


main = script(study, __doc__, AlgosFlags)

if __name__ == "__main__":
    main()
