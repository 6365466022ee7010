"""Must AdamW's eps be 1e-15, and do successive gradients correlate little (report sec. 3.2)?

python -m studies.adam (4 minutes)

The study itself, then one run of ten steps from inside: the sizes of all gradients, and the angle
between those of successive updates.
"""

import collections
import tempfile
from functools import partial
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


def watch_gradients(size, quick):
    """Rows of adam-gradients.csv: exponent and share of all non-zero gradients, then update and the
    cosine of the angle to the one before. size: flags of the cold start.
    """
    counts, cosines, last, clip = collections.Counter(), [], [], train_rl.clip

    def watched(model, max_norm):
        norm = clip(model, max_norm)
        now = torch.cat([p.grad.flatten() for p in model.parameters()])
        exponents = now[now != 0].abs().log10().floor().int().unique(return_counts=True)
        counts.update(dict(zip(*(x.tolist() for x in exponents))))
        cosines.extend(float(torch.nn.functional.cosine_similarity(now, x, dim=0)) for x in last)
        last[:] = [now]
        return norm

    with tempfile.TemporaryDirectory() as folder:
        cold = f"{folder}/cold"
        common.train_run(cold, size | {"steps": 0}, quick)
        how = {"init": cold, "steps": 10, "device": size.get("device", "cpu")}
        with mock.patch.object(train_rl, "clip", watched):
            common.train_run(f"{folder}/run", how, quick)
    total = counts.total()
    rows = [{"exponent": n, "share": f"{counts[n] / total:.4g}"} for n in sorted(counts)]
    for update, cosine in enumerate(cosines, 1):
        rows.append({"update": update, "cosine": f"{cosine:.4f}"})
    return rows


def study(flags):
    """Run both, or read them; tables, sentences and pictures."""
    PLAN.show(flags)
    name, size = "adam-gradients", {}
    if flags.preset == "base":
        name, size = f"{name}-base", common.BASE
    rows = common.recorded(flags, name, partial(watch_gradients, size))
    sizes = {row["exponent"]: row["share"] for row in rows if "share" in row}
    angles = {row["update"]: row["cosine"] for row in rows if "cosine" in row}
    with common.picture(flags, name, 2, (10, 3.4)) as (left, right):
        left.bar(*zip(*sizes.items()), align="edge", width=0.9)
        left.set(title="sizes of gradients", xlabel="log10 |g|", ylabel="share of all")
        right.plot(*zip(*angles.items()), "o-", ms=3)
        right.set(title="gradients of successive updates", xlabel="update", ylabel="cosine")
    below = {n: sum(share for size, share in sizes.items() if size < n) for n in (-14, -8, -5)}
    told = ", ".join(f"{share:.2g} below 1e{n}" for n, share in below.items())
    print(f"Of all gradients but exact zeros a share of {told}.")
    angle = common.bootstrap(angles.values())[0]
    print(f"Successive ones have a median cosine of {angle:.2f}.")


main = common.script(study, __doc__, common.Comparison)

if __name__ == "__main__":
    main()
