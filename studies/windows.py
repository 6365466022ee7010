"""Should responses be allowed to grow in stages, and does negative gradient pile up late (sec. 5)?

python -m studies.windows (8 minutes)

Staged: windows of 8, 10, 12 tokens that open by the report's rule. Beside it the whole window at
once, and a forced jump from the first to the last before step 10, whatever the outputs look like.
"""

from functools import partial

from curriculum import Curriculum
from studies.common import BASE, MIXED, Comparison, Study, interval, mean, script


def jump(step):
    """Change the curriculum: from this RL step on the last window, before it the first."""

    def observe(self, seen):
        self.correct = [*self.correct, seen["correct"]]  # a value a step
        last = len(self.growth.limits) - 1
        self.window = last if len(self.correct) + 1 >= step else 0

    Curriculum.observe = observe


def negative_by_window(logs):
    """How much of sum |A| over the tokens of a window's late half is negative: while each window of
    the staged runs is open, and at the beginning and the end of runs that have all at once.
    """

    def share(name, column, low, high):
        parts = [[row for row in run if low <= row.get(column, 0) <= high] for run in logs[name]]
        return interval(mean(part, "negative_late") for part in parts)

    windows = sorted({row["window"] for run in logs["staged"] for row in run if "window" in row})
    told = [f"{share('staged', 'window', n, n)} in a window of {n:g}" for n in windows]
    early, late = share("at once", "step", 0, 10), share("at once", "step", 51, 60)
    return (
        f"Negative share of the late half, staged: {', '.join(told)} tokens. At once: {early} in "
        f"steps 1 to 10, {late} in steps 51 to 60."
    )


PLAN = Study(
    "windows",
    "responses may grow in stages, at once, or by a forced jump",
    {
        "staged": {"windows": "8,10,12"},
        "at once": {"max_new_tokens": 12},
        "forced jump": {"windows": "8,10,12", "change": partial(jump, 10)},
    },
    MIXED | {"updates_per_rollout": 4, "steps": 60},
    ("length_p99", "negative_early", "negative_late", "accuracy"),
    verdict=negative_by_window,
    base=BASE | {"moves": MIXED["moves"], "steps": 60},
)

main = script(PLAN.show, __doc__, Comparison)

if __name__ == "__main__":
    main()
