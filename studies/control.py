"""Does CISPO help where no fork was planted? Every response is a chain, learnt in part.

python -m studies.control (9 minutes)
"""

from studies.algos import ALGORITHMS
from studies.common import Comparison, Study, script

PLAN = Study(
    "control",
    "no planted fork: every response is a chain, learnt in part",
    ALGORITHMS,
    {"fork_prior": 1.0, "sft_skill": 1.0, "sft_steps": 200},
    ("accuracy", "entropy", "ess"),
)

main = script(PLAN.show, __doc__, Comparison)

if __name__ == "__main__":
    main()
