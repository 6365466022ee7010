"""Which cap on CISPO's weight? The report never gave its value; ours is 5.

python -m studies.eps           caps 2, 5, 8 and none (7 minutes)
python -m studies.eps --fast    ... at a learning rate of 8e-4, where a cap acts at all
"""

from dataclasses import dataclass

from studies.common import RARE_FORK, Comparison, Study, script

CAPS = {f"cap {cap}": {"eps_high": float(cap) - 1} for cap in (2, 5, 8)}
CAPS["cap none"] = {"eps_high": float("inf")}
PLAN = Study("eps", "the cap on CISPO's weight", CAPS, RARE_FORK)
FAST = Study(
    "eps-fast",
    "the cap on CISPO's weight, at a learning rate of 8e-4, where it acts",
    CAPS,
    RARE_FORK | {"lr": 8e-4},
    ("fork_rate", "accuracy", "ratio_max", "weight_clip_frac_high"),
)


@dataclass(frozen=True)
class EpsFlags(Comparison):
    """Of all studies, and:"""

    fast: bool = False
    """at a learning rate of 8e-4"""


main = script(lambda flags: (FAST if flags.fast else PLAN).show(flags), __doc__, EpsFlags)

if __name__ == "__main__":
    main()
