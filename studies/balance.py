"""Do experts need a load-balancing loss, and is token drop affordable (MiniMax-01)?

python -m studies.balance (8 minutes)

Weight and capacity act from the cold start on. Token drop acts in training only: an expert takes at
most 1.25 times an even share of a batch's choices, while rollouts drop nothing.
"""

from functools import partial

from cli import model as m1
from studies.common import Comparison, Study, script


def experts(coef, capacity=None):
    """Change the code: another weight of the load-balancing loss, token drop beyond capacity."""
    m1.PRESETS["tiny"]["router_aux_loss_coef"] = coef
    before = m1.MoE.__init__

    def init(moe, config):
        before(moe, config)
        moe.capacity = capacity

    m1.MoE.__init__ = init


SETTINGS = {f"weight {coef:g}": (coef,) for coef in (0.0, 0.001, 0.1)}
SETTINGS |= {f"weight {coef:g}, drop": (coef, 1.25) for coef in (0.0, 0.1)}
PLAN = Study(
    "balance",
    "load-balancing loss and token drop, in cold start and RL",
    {name: {"always": partial(experts, *how)} for name, how in SETTINGS.items()},
    curves=("over_capacity", "logp_gap_mean", "accuracy"),
    beside={"weight 0.1, drop": "weight 0.1"},
)

main = script(PLAN.show, __doc__, Comparison)

if __name__ == "__main__":
    main()
