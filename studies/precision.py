"""Does a bf16 output head break RL (report, Figure 3)?

python -m studies.precision (4 minutes)

The head rounds logits to bf16 in training and in rollouts alike, as in the report's first runs.
"""

import statistics

from cli import model as m1
from cli import torch
from studies.common import Study, points, script, show_study


def bf16_head():
    """Change MiniMaxM1 so that its logits pass through bf16."""

    def head(model, hidden):
        weight = model.lm_head.weight.bfloat16()
        return torch.nn.functional.linear(hidden.bfloat16(), weight).to(hidden.dtype)

    m1.MiniMaxM1.head = head


PLAN = Study(
    "precision",
    "output head in fp32 and in bf16, training against rollout",
    {"fp32": {}, "bf16": {}},
    curves=("prob_corr", "logp_gap_mean", "accuracy"),
    changes={"bf16": bf16_head},
)


def study(flags):
    """Run it, or read it; table, picture, and the gap between training and rollout in numbers."""
    logs = show_study(PLAN, flags)
    for name, runs in logs.items():
        gaps = [gap for run in runs for _, gap in points(run, "logp_gap_mean")] or [0.0]
        told = f"mean {statistics.fmean(gaps):.1e}, at worst in a step {max(gaps):.1e}"
        print(f"{name}: |log-prob, training - rollout|: {told}")


main = script(study, __doc__)

if __name__ == "__main__":
    main()
