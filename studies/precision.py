"""Does a bf16 output head break RL (report, Figure 3)?

python -m studies.precision (4 minutes)
python -m studies.precision --preset base (one GPU): products and rollouts in bf16, as in Figure 3

The head rounds logits to bf16 in training and in rollouts alike, as in the report's first runs.
"""

import functools
import statistics
import tempfile
from dataclasses import dataclass
from typing import Literal
from unittest import mock

import runlog
import train_rl
from cli import check, torch
from cli import model as m1
from studies import common
from studies.common import Study, draw_curve, points, recorded, script, show_study, train_run


def rounded(model, hidden):
    """MiniMaxM1.head with logits that pass through bf16."""
    weight = model.lm_head.weight.bfloat16()
    return torch.nn.functional.linear(hidden.bfloat16(), weight).to(hidden.dtype)


def bf16_head():
    """Change MiniMaxM1 so that its logits pass through bf16."""
    m1.MiniMaxM1.head = rounded


PLAN = Study(
    "precision",
    "output head in fp32 and in bf16, training against rollout",
    {"fp32": {}, "bf16": {}},
    curves=("prob_corr", "logp_gap_mean", "accuracy"),
    changes={"bf16": bf16_head},
)
KEPT = ("step", "prob_corr", "logp_gap_mean", "logp_gap", "correct", "accuracy")


@dataclass(frozen=True)
class Flags(common.Flags):
    """The study; with --preset or --init instead two runs whose products and rollouts are bf16."""

    preset: Literal["tiny", "small", "base"] | None = None
    """two runs of this size, from a cold start made here; all but tiny need a GPU"""
    init: str | None = None
    """... or from this cold start, e.g. runs/NAME/step-000000"""
    steps: int = 10
    """RL steps of the two runs"""

    def __post_init__(self):
        super().__post_init__()
        check(self, steps=(1, 10_000))


def train_both(flags, quick):
    """Rows of precision-gpu.csv: steps of a run with each head, and of the first of them up to
    1,000 tokens: their probabilities in training and in rollouts.
    """
    how = {"dtype": "bf16", "device": "cuda" if flags.preset in ("small", "base") else "auto"}
    how |= {"prompts": 16, "eval_problems": 6, "min_groups": 1} if quick else {}
    measure, rows = train_rl.measure, []
    with tempfile.TemporaryDirectory() as folder:
        start, moves = flags.init or f"{folder}/cold", 10 if flags.preset == "base" else 6
        if not flags.init:
            cold = {"preset": flags.preset, "moves": moves} | ({"sft_steps": 40} if quick else {})
            train_run(start, how | cold | {"steps": 0})
        old = train_rl.stored_flags(start)
        how |= {name: old[name] for name in ("task", "moves", "min_moves") if name in old}
        how |= {"init": start, "preset": flags.init and flags.preset, "steps": flags.steps}
        for name, head in {"fp32": m1.MiniMaxM1.head, "bf16": rounded}.items():
            out, tokens = f"{folder}/{name}", []

            def watched(slices, old, *rest, tokens=tokens):
                for part, before in () if tokens else zip(slices, old):
                    logp = torch.cat([p.logp for p in before])
                    pair = (x[part.trained].exp().tolist() for x in (logp, part.infer_logp))
                    tokens.extend(zip(*pair))
                return measure(slices, old, *rest)

            changed = mock.patch.object(m1.MiniMaxM1, "head", head)
            with changed, mock.patch.object(train_rl, "measure", watched):
                train_run(out, how)
            for row in runlog.read_log(f"{out}/log.csv"):
                rows.append({"head": name} | {c: row[c] for c in KEPT if c in row})
            rows += [{"head": name, "training": p, "rollout": q} for p, q in tokens[:1000]]
    return rows


def show_both(flags):
    """Both runs in numbers; tokens' probabilities as in Figure 3, and the gaps step by step."""
    rows = recorded(flags, "precision-gpu", functools.partial(train_both, flags))
    title = "bf16, training against rollout: tokens of the first step; gaps by step"
    told = "{} head: correlation of p {:.6f}, |log-prob, training - rollout| {:.2e}, at most "
    told += "{:.2e}; accuracy {:.3f} to {:.3f}"
    with common.picture(flags, "precision-gpu", 3, (12, 4), title) as (*squares, right):
        for square, (name, part) in zip(squares, common.by(rows, "head").items()):
            tokens = [(row["rollout"], row["training"]) for row in part if "rollout" in row]
            square.plot(*zip(*tokens), ".", ms=3)
            square.set(title=f"{name} head", xlabel="p in rollouts", ylabel="p in training")
            steps = [row for row in part if "step" in row]
            draw_curve(right, steps, "step", "logp_gap_mean", f"{name} head")
            means = (common.mean(steps, x) for x in ("prob_corr", "logp_gap_mean"))
            gaps, right_ones = ([x for _, x in points(steps, c)] for c in ("logp_gap", "accuracy"))
            print(told.format(name, *means, max(gaps, default=0.0), right_ones[0], right_ones[-1]))
        right.set(xlabel="RL step", ylabel="mean |log-prob, training - rollout|", yscale="log")
        right.legend()


def study(flags):
    """Run it, or read it; table, picture, and the gap between training and rollout in numbers."""
    if flags.preset or flags.init:
        return show_both(flags)
    logs = show_study(PLAN, flags)
    for name, runs in logs.items():
        gaps = [gap for run in runs for _, gap in points(run, "logp_gap_mean")] or [0.0]
        told = f"mean {statistics.fmean(gaps):.1e}, at worst in a step {max(gaps):.1e}"
        print(f"{name}: |log-prob, training - rollout|: {told}")


main = script(study, __doc__, Flags)

if __name__ == "__main__":
    main()
