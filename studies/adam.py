"""Must AdamW's eps be 1e-15, and do successive gradients correlate little (report sec. 3.2)?

python -m studies.adam (4 minutes)

The study itself, then one run of ten steps from inside: the sizes of all gradients, and the angle
between those of successive updates.
"""

import functools
import tempfile
from unittest import mock

import train_rl
from cli import torch
from studies.common import (
    PRESSURE,
    Study,
    bootstrap,
    picture,
    recorded,
    script,
    show_study,
    train_run,
)


def set_eps(eps):
    """Change AdamW's eps."""
    train_rl.ADAM_EPS = eps


PLAN = Study(
    "adam",
    "AdamW's eps",
    {"eps 1e-15": {}, "eps 1e-08": {}},
    PRESSURE | {"updates_per_rollout": 4},
    curves=("grad_norm", "fork_rate", "accuracy"),
    changes={"eps 1e-08": functools.partial(set_eps, 1e-8)},
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

    few = {"sft_steps": 40, "eval_problems": 6, "min_groups": 1} if quick else {}
    with tempfile.TemporaryDirectory() as folder:
        train_run(f"{folder}/cold", few | {"steps": 0})
        few.pop("sft_steps", None)
        run = few | {"init": f"{folder}/cold", "steps": 1 if quick else 10}
        with mock.patch.object(train_rl, "clip", watched):
            train_run(f"{folder}/run", run)
    sizes = torch.cat(gradients).abs()
    exponents, counts = sizes[sizes > 0].log10().floor().int().unique(return_counts=True)
    shares = zip(exponents.tolist(), (counts / counts.sum()).tolist())
    rows = [{"exponent": n, "share": f"{share:.4g}"} for n, share in shares]
    pairs, cosine = zip(gradients, gradients[1:]), torch.nn.functional.cosine_similarity
    angles = [float(cosine(a, b, dim=0)) for a, b in pairs]
    return rows + [{"update": i, "cosine": f"{x:.4f}"} for i, x in enumerate(angles, 1)]


def study(flags):
    """Run both, or read them; tables, sentences and pictures."""
    show_study(PLAN, flags)
    rows = recorded(flags, "adam-gradients", watch_gradients)
    sizes, updates = ([row for row in rows if name in row] for name in ("share", "cosine"))
    with picture(flags, "adam-gradients", 2, (10, 3.4)) as (left, right):
        x, y = ([row[name] for row in sizes] for name in ("exponent", "share"))
        left.bar(x, y, align="edge", width=0.9)
        left.set(title="sizes of gradients", xlabel="log10 |g|", ylabel="share of all")
        x, y = ([row[name] for row in updates] for name in ("update", "cosine"))
        right.plot(x, y, "o-", ms=3)
        right.set(title="gradients of successive updates", xlabel="update", ylabel="cosine")
    below = {n: sum(row["share"] for row in sizes if row["exponent"] < n) for n in (-14, -8, -5)}
    told = ", ".join(f"{share:.2g} below 1e{n}" for n, share in below.items())
    angle = bootstrap([row["cosine"] for row in updates])[0]
    print(f"Of all gradients but exact zeros a share of {told}.")
    print(f"Successive ones have a median cosine of {angle:.2f}.")


main = script(study, __doc__)

if __name__ == "__main__":
    main()
