"""CISPO needs half of DAPO's steps (report, Figure 2): does it, here?

    python -m studies.algos            five seeds, forks at 1 %, 16 updates per rollout (9 minutes)
    python -m studies.algos --full     the map: fork prior x updates x learning rate (hours)

Every algorithm is a complete recipe; "grpo, clip alone" differs from CISPO in the clip only. They
start from the same cold starts, and steps are compared seed by seed.
"""

import dataclasses
import math
from dataclasses import dataclass
from itertools import product

from cli import numpy as np
from studies import common
from studies.common import THRESHOLDS, area, bootstrap, by, interval, last, steps_to

ALGORITHMS = {
    "cispo": {"algo": "cispo"},
    "dapo": {"algo": "dapo"},
    "grpo": {"algo": "grpo"},
    "grpo, clip alone": {"algo": "grpo", "token_weights": "batch"},
    "reinforce": {"algo": "reinforce"},
}
OTHERS = list(ALGORITHMS)[1:]
CLIPPED = OTHERS[:3]  # reinforce drops nothing either


def saved(logs):
    """How many steps CISPO takes, as a part of what the others take, seed by seed."""
    told = []
    for (column, level), other in product(THRESHOLDS.items(), CLIPPED):
        pairs = zip(logs["cispo"], logs[other])
        parts = interval(steps_to(a, column) / steps_to(b, column) for a, b in pairs)
        told.append(f"CISPO takes {parts} of {other}'s steps to {column} {level}")
    return "\n".join([*told, "The report says 0.5 of DAPO's (32 B parameters, AIME)."])


TITLE = "16 updates per rollout, a fork of 1 %: who learns to think first"
PLAN = common.Study("algos", TITLE, ALGORITHMS, common.RARE_FORK, verdict=saved)

# ---- the map

PRIORS, UPDATES, RATES = (0.01, 0.05, 0.2), (4, 16), (1e-4, 2e-4, 4e-4, 8e-4, 1.6e-3)
PLACES, COLUMNS = list(product(PRIORS, UPDATES)), (*RATES, "its best")
NEVER = common.PRESSURE["steps"] + 1


def map_rows(quick):
    """Rows of algos-map.csv, one of every run: its setting, seed, area, steps to the thresholds,
    final accuracy, and the largest share of tokens that PPO's clip would have dropped in a step
    until forks crossed their threshold. With one update all algorithms are the same (algo "any").
    """
    settings, rows = {}, []
    for prior, k, lr in product(PRIORS, (1, *UPDATES), RATES):
        for name, algo in ALGORITHMS.items() if k > 1 else [("any", {})]:
            own = {"fork_prior": prior, "updates_per_rollout": k, "lr": lr}
            settings[prior, k, lr, name] = algo | own
    runs = by(dataclasses.replace(PLAN, settings=settings).run(quick), "setting", "seed")
    for (where, seed), log in runs.items():
        log = [{c: x for c, x in row.items() if x != ""} for row in log]
        row = dict(zip(("fork_prior", "updates_per_rollout", "lr", "algo"), where))
        rows.append(row | {"seed": seed} | summary(log))
    return rows


def summary(log):
    """What the map keeps of a run."""
    crossing = math.ceil(steps_to(log, "fork_rate"))
    drops = [r.get("ppo_would_drop_frac", 0) for r in log if r["step"] <= crossing]
    row = {"area": f"{area(log, 'accuracy'):.4g}"}
    row |= {f"steps_{column}": f"{steps_to(log, column):.4g}" for column in THRESHOLDS}
    return row | {"final": last(log, "accuracy"), "peak_drop": f"{max(drops):.4g}"}


def at_best(areas):
    """Areas (rates, seeds) -> of every seed the number of the rate with the largest median over the
    OTHER seeds, so that no run takes part in the choice of its own rate.
    """
    n = areas.shape[1]
    others = [np.delete(areas, seed, 1) if n > 1 else areas for seed in range(n)]
    return [int(np.median(other, 1).argmax()) for other in others]


def values(rows, algo, column, places=PLACES):
    """A column of an algorithm's runs: (places, learning rates and then its best, seeds)."""
    cells, found = by(rows, "algo", "fork_prior", "updates_per_rollout", "lr"), []
    for place in places:
        runs = [cells[algo, *place, lr] for lr in RATES]
        best = at_best(np.array([[run["area"] for run in its] for its in runs]))
        runs.append([runs[rate][seed] for seed, rate in enumerate(best)])
        found.append([[run[column] for run in its] for its in runs])
    return np.array(found)


def ratios(rows, column, other):
    """CISPO's steps over another's, seed by seed, but for seeds in which neither gets there:
    (places, rates, median and its interval).
    """
    mine, its = (values(rows, algo, f"steps_{column}") for algo in ("cispo", other))
    parts = np.where(np.minimum(mine, its) < NEVER, mine / its, np.nan)
    return np.apply_along_axis(bootstrap, 2, parts)


def show_map(flags):
    """Tables, sentences and picture of the map."""
    rows, table = common.recorded(flags, "algos-map", map_rows), []
    found = {pair: ratios(rows, *pair) for pair in product(THRESHOLDS, OTHERS)}
    drops = np.median(values(rows, "cispo", "peak_drop"), 2)
    for (i, (prior, k)), (j, lr) in product(enumerate(PLACES), enumerate(COLUMNS)):
        row = {"fork prior": prior, "updates": k, "learning rate": lr}
        for (column, other), part in found.items():
            row[f"{column}, / {other}"] = "{:.3g} [{:.3g}, {:.3g}]".format(*part[i, j])
        table.append(row | {"ppo drops, peak": f"{drops[i, j]:.1%}"})
    print(
        "CISPO's steps to a fork rate of 50 % and to an accuracy of 70 % over the others': median"
    )
    print("of seeds [95 % bootstrap interval]. ppo drops, peak: until forks are at 50 %. its best:")
    print("of each algorithm and seed the rate with the largest area over the other seeds.")
    common.print_table(table)
    for prior, k in product(PRIORS, (1, *UPDATES)):
        sweep = rows, "cispo" if k > 1 else "any"
        rate, steps = (values(*sweep, x, [(prior, k)])[0, -1] for x in ("lr", "steps_fork_rate"))
        told = f"steps to a fork rate of 50 % at a rate of {np.median(rate):g} ({NEVER}: never)"
        print(f"prior {prior:g}, {k} updates per rollout: CISPO takes {interval(steps)} {told}")
    middle = {pair: part[..., 0] for pair, part in found.items()}
    ends = {name: np.median(values(rows, name, "final"), 2) for name in ALGORITHMS}
    for (column, other), part in middle.items():
        sound = np.minimum(ends["cispo"], ends[other]) >= 0.7
        lowest = [np.nanmin(part[where], initial=np.inf) for where in (sound, ~sound)]
        told = "lowest {:.2f} where both end at 0.7 or more, {:.2f} elsewhere".format(*lowest)
        print(f"steps to {column} {THRESHOLDS[column]} over {other}'s: {told}")
    for other in CLIPPED:
        x, y = swept(middle, drops, other)
        few, many = (
            f"{min(part, default=np.nan):.3f} to {max(part, default=np.nan):.3f}"
            for part in (y[x < 0.02], y[x >= 0.1])
        )
        fit = f"correlation {np.corrcoef(x, y)[0, 1]:.2f}; {few} below 2 %, {many} from 10 % on"
        print(f"over {other}'s they follow what PPO's clip would drop at its peak: {fit}")
    draw(flags, middle, drops)


def swept(middle, drops, other):
    """What PPO's clip would drop and CISPO's steps to forks over another's, at every place and
    rate.
    """
    x, y = (grid[:, :-1].ravel() for grid in (drops, middle["fork_rate", other]))
    return x[y > 0], y[y > 0]


def draw(flags, middle, drops):
    """Maps of the ratios, rows of places and columns of rates; ratios against what a clip drops."""
    rates = [f"{1e4 * lr:g}" for lr in RATES] + ["best"]
    with common.picture(flags, "algos-map", 3, (13, 3.8)) as (*maps, right):
        for axis, other in zip(maps, CLIPPED):
            grid = middle["fork_rate", other]
            axis.imshow(grid, cmap="Greens_r", vmin=0.5, vmax=1.05, aspect="auto")
            for (y, x), ratio in np.ndenumerate(grid):
                axis.text(x, y, f"{ratio:.2f}", ha="center", va="center")
            axis.set_xticks(range(len(rates)), rates)
            axis.set_yticks(range(len(PLACES)), [f"{prior:g}, {k:g}" for prior, k in PLACES])
            title = f"CISPO's steps to 50 % forks / {other}'s"
            axis.set(title=title, xlabel="learning rate, 1e-4", ylabel="fork prior, updates")
            x, y = swept(middle, drops, other)
            right.plot(100 * x, y, "o", label=other)
        right.set(title="it saves where a clip would drop", ylabel="CISPO's steps / the other's")
        right.set(xlabel="tokens that PPO's clip would drop, peak, %")
        right.legend()


@dataclass(frozen=True)
class AlgosFlags(common.Comparison):
    """Of all comparisons, and:"""

    full: bool = False
    """the map over fork prior, updates per rollout and learning rate"""


def study(flags):
    """The comparison, or with --full the map."""
    return show_map(flags) if flags.full else PLAN.show(flags)


main = common.script(study, __doc__, AlgosFlags)

if __name__ == "__main__":
    main()
