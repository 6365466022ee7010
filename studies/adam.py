"""Must AdamW's eps be 1e-15, and do successive gradients correlate little (report sec. 3.2)?

python -m studies.adam (4 minutes)

The study itself, then one run of ten steps from inside: the sizes of all gradients, and the angle
between those of successive updates.
"""

import tempfile
from unittest import mock

import train_rl
from cli import torch
from studies import common


def large_eps():
    """Change AdamW's eps to the usual one."""
    train_rl.ADAM_EPS = 1e-8


PLAN = common.Study(
    "adam",
    "AdamW's eps",
    {"eps 1e-15": {}, "eps 1e-08": {"change": large_eps}},
    {"updates_per_rollout": 4},
    ("grad_norm", "fork_rate", "accuracy"),
)


def watch_gradients(quick):
    """Rows of adam-gradients.csv: exponent and share of all non-zero gradients, then update and the
    cosine of the angle to the one before.
    """
    gradients, clip = [], train_rl.clip

    def watched(model, max_norm):
        norm = clip(model, max_norm)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return norm

    with tempfile.TemporaryDirectory() as folder:
        cold = f"{folder}/cold"
        common.train_run(cold, {"steps": 0}, quick)
        with mock.patch.object(train_rl, "clip", watched):
            common.train_run(f"{folder}/run", {"init": cold, "steps": 10}, quick)
    sizes = torch.cat(gradients).abs()
    exponents, counts = sizes[sizes > 0].log10().floor().int().unique(return_counts=True)
    shares = zip(exponents.tolist(), (counts / counts.sum()).tolist())
    rows = [{"exponent": n, "share": f"{share:.4g}"} for n, share in shares]
    for update, pair in enumerate(zip(gradients, gradients[1:]), 1):
        cosine = float(torch.nn.functional.cosine_similarity(*pair, dim=0))
        rows.append({"update": update, "cosine": f"{cosine:.4f}"})
    return rows


def study(flags):
    """Run both, or read them; tables, sentences and pictures."""
    PLAN.show(flags)
    rows = common.recorded(flags, "adam-gradients", watch_gradients)
    sizes = {row["exponent"]: row["share"] for row in rows if "share" in row}
    angles = {row["update"]: row["cosine"] for row in rows if "cosine" in row}
    with common.picture(flags, "adam-gradients", 2, (10, 3.4)) as (left, right):
        left.bar(*zip(*sizes.items()), align="edge", width=0.9)
        left.set(title="sizes of gradients", xlabel="log10 |g|", ylabel="share of all")
        right.plot(*zip(*angles.items()), "o-", ms=3)
        right.set(title="gradients of successive updates", xlabel="update", ylabel="cosine")
    below = {n: sum(share for size, share in sizes.items() if size < n) for n in (-14, -8, -5)}
    told = ", ".join(f"{share:.2g} below 1e{n}" for n, share in below.items())
    print(f"Of all gradients but exact zeros a share of {told}.")
    angle = common.bootstrap(angles.values())[0]
    print(f"Successive ones have a median cosine of {angle:.2f}.")


main = common.script(study, __doc__)

if __name__ == "__main__":
    main()
