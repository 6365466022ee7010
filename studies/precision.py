"""Does a bf16 output head break RL (report, Figure 3)?

python -m studies.precision (4 minutes)
python -m studies.precision --preset base (one GPU): products and rollouts in bf16, as in Figure 3

The head rounds logits to bf16 in training and in rollouts alike, as in the report's first runs.
"""

import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Literal
from unittest import mock

import cispo
import train_rl
from cli import model as m1
from cli import torch
from studies import common
from studies.common import curve, mean, train_run


def rounded(model, hidden):
    """MiniMaxM1.head with logits that pass through bf16."""
    weight = model.lm_head.weight.bfloat16()
    return torch.nn.functional.linear(hidden.bfloat16(), weight).to(hidden.dtype)


def bf16_head():
    """Change MiniMaxM1 so that its logits pass through bf16."""
    m1.MiniMaxM1.head = rounded


def gaps(logs):
    """The gap between training and rollout in numbers."""
    told = []
    for name, runs in logs.items():
        found = curve([row for run in runs for row in run], "logp_gap_mean")[1] or [0.0]
        average, worst = sum(found) / len(found), max(found)
        text = f"mean {average:.1e}, at worst in a step {worst:.1e}"
        told.append(f"{name}: |log-prob, training - rollout|: {text}")
    return "\n".join(told)


PLAN = common.Study(
    "precision",
    "output head in fp32 and in bf16, training against rollout",
    {"fp32": {}, "bf16": {"change": bf16_head}},
    curves=("prob_corr", "logp_gap_mean", "accuracy"),
    verdict=gaps,
)

# ---- two runs in bf16, on a GPU

KEPT = ("step", "prob_corr", "logp_gap_mean", "logp_gap", "correct", "accuracy")


@dataclass(frozen=True)
class Flags(common.Comparison):
    """The study; with --preset or --init instead two runs whose products and rollouts are bf16."""

    preset: Literal["tiny", "small", "base"] | None = None
    """two runs of this size, from a cold start made here; all but tiny need a GPU"""
    init: str | None = None
    """... or from this cold start, e.g. runs/NAME/step-000000"""
    steps: int = 10
    """RL steps of the two runs"""


def train_both(flags, quick):
    """Rows of precision-gpu.csv: steps of a run with each head, and of the first of them up to
    1,000 tokens: their probabilities in training and in rollouts.
    """
    how = {"dtype": "bf16", "device": "cuda" if flags.preset in ("small", "base") else "auto"}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        start = flags.init or f"{folder}/cold"
        if not flags.init:
            cold = {"preset": flags.preset, "moves": 10 if flags.preset == "base" else 6}
            train_run(start, how | cold | {"steps": 0}, quick)
        old = train_rl.stored_flags(start)
        how |= {name: old[name] for name in ("task", "moves", "min_moves") if name in old}
        how |= {"init": start, "preset": flags.init and flags.preset, "steps": flags.steps}
        for name, head in {"fp32": m1.MiniMaxM1.head, "bf16": rounded}.items():
            watched = mock.patch.object(cispo, "prob_correlation", wraps=cispo.prob_correlation)
            with mock.patch.object(m1.MiniMaxM1, "head", head), watched as correlation:
                log = train_run(f"{folder}/{name}", how, quick)
            rows += [{"head": name} | {c: row[c] for c in KEPT if c in row} for row in log]
            for step in correlation.call_args_list[:1]:  # of log-probs in training and in rollouts
                pairs = zip(*(logp[:1000].exp().tolist() for logp in step.args))
                rows += [{"head": name, "training": p, "rollout": q} for p, q in pairs]
    return rows


def show_both(flags):
    """Both runs in numbers; tokens' probabilities as in Figure 3, and the gaps step by step."""
    rows = common.recorded(flags, "precision-gpu", partial(train_both, flags))
    title = "bf16, training against rollout: tokens of the first step; gaps by step"
    told = "{} head: correlation of p {:.6f}, |log-prob, training - rollout| {:.2e}, at most "
    told += "{:.2e}; accuracy {:.3f} to {:.3f}"
    with common.picture(flags, "precision-gpu", 3, (12, 4), title) as (*squares, right):
        for square, (name, part) in zip(squares, common.by(rows, "head").items()):
            tokens = [(row["rollout"], row["training"]) for row in part if "rollout" in row]
            square.plot(*zip(*tokens), ".", ms=3)
            square.set(title=f"{name} head", xlabel="p in rollouts", ylabel="p in training")
            common.draw_curve(right, part, "step", "logp_gap_mean", f"{name} head")
            means = (mean(part, x) for x in ("prob_corr", "logp_gap_mean"))
            worst, accuracy = (curve(part, x)[1] for x in ("logp_gap", "accuracy"))
            print(told.format(name, *means, max(worst, default=0.0), accuracy[0], accuracy[-1]))
        right.set(xlabel="RL step", ylabel="mean |log-prob, training - rollout|", yscale="log")
        right.legend()


def study(flags):
    """The study, or the two runs in bf16."""
    return show_both(flags) if flags.preset or flags.init else PLAN.show(flags)


main = common.script(study, __doc__, Flags)

if __name__ == "__main__":
    main()
