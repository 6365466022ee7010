"""What does PPO's clip drop that CISPO keeps? One right answer, token by token, over 16 updates.

python -m studies.forks               (2 minutes)
python -m studies.forks --unplanted   ... where no special token stands for thinking
python -m studies.forks --preset base (one GPU), with either

After a cold start every algorithm trains on the same rollouts from the same weights. Watched is the
last of the best-rewarded responses that begin with the fork; it is trained on once. Unplanted: each
demonstration begins to work a problem out, most give up after two steps and guess; watched is the
last of the longest right responses, whose third token goes on.
"""

import itertools
import tempfile
from dataclasses import dataclass
from functools import partial
from typing import Literal
from unittest import mock

import experience
import tasks
import train_rl
from cli import torch
from studies.common import (
    BASE,
    Flags,
    by,
    draw_curve,
    picture,
    print_table,
    recorded,
    script,
    train_run,
)


def watch(algo, folder, settings, quick=False):
    """One RL step of an algorithm from a cold start: rows of forks.csv."""
    seen, logps, collect, clip = {}, [], train_rl.collect, train_rl.clip

    def watched_collect(model, tokenizer, problems, flags, *rest):
        batch, *told = collect(model, tokenizer, problems, flags, *rest)
        if batch is None:
            raise ValueError("no group has right and wrong responses: nothing to watch")
        fork = tokenizer.encode(tasks.FORK)[0]
        first = batch.trained.int().argmax(1, keepdim=True)
        thinks = batch.tokens[:, 1:].gather(1, first)[:, 0] == fork
        value = batch.rewards + 10 * thinks + batch.trained.sum(1) / 10**6  # or at least long
        i = int((value == value.max()).nonzero()[-1])
        parts = batch.slices(flags.updates_per_rollout, flags.group_size)
        ends = itertools.accumulate(len(part.tokens) for part in parts)
        turn = 1 + sum(end <= i for end in ends)
        seen.update(model=model, tokenizer=tokenizer, one=batch.part([i]), turn=turn)
        return batch, *told

    def look():
        with torch.no_grad():
            logp, _, _ = experience.trained_logp(seen["model"], seen["one"])
        logps.append(logp[seen["one"].trained])

    def watched_clip(*args):
        look()  # before each update
        return clip(*args)

    settings = settings | {"algo": algo, "init": f"{folder}/cold", "steps": 1}
    with mock.patch.multiple(train_rl, collect=watched_collect, clip=watched_clip):
        train_run(f"{folder}/{algo}", settings, quick)
    look()  # after the last
    tokens, rows = seen["one"].tokens[:, 1:][seen["one"].trained].tolist(), []
    for update, position in itertools.product(range(len(logps)), range(len(tokens))):
        before, after = logps[0][position], logps[update][position]
        row = {"algo": algo, "turn": seen["turn"], "update": update, "position": position}
        row["token"] = repr(seen["tokenizer"].decode([tokens[position]]))
        row["probability"] = f"{before.exp():.4g}"
        rows.append(row | {"ratio": f"{(after - before).exp():.4g}"})
    return rows


def gives_up(problem, rng, fork_prior):
    """tasks.demonstration without a fork: a chain, or its first two steps and a guess. Of half of
    the chains it is not learned that they go on.
    """
    begun, step, rest = problem.chain[:2], problem.chain[2:3], problem.chain[3:]
    closed, skilled = tasks.THINK_END + problem.answer, rng.random() < 0.5
    if skilled or rng.random() < fork_prior:
        return [(begun, True), (step, not skilled), (rest + closed, True)]
    return [(begun + closed, True)]


def watch_all(unplanted, base, quick):
    """Rows of forks.csv: algo, turn (the update that trains on the response), update, ..."""
    cold = {"fork_prior": 0.05, "steps": 0} | (BASE | {"steps": 0} if base else {})
    if unplanted:  # no fork to force, so the cold start cannot tell when chains are learnt
        cold |= {"sft_skill": 1.0, "sft_steps": 300 if base else 1500}
    settings = {"updates_per_rollout": 16, "lr": 1e-3 * 64 / (768 if base else 64)}  # warm-up: / 5
    settings |= {"device": cold.get("device", "cpu")}
    with tempfile.TemporaryDirectory() as folder:
        shown = gives_up if unplanted else tasks.demonstration
        with mock.patch.object(tasks, "demonstration", shown):
            train_run(f"{folder}/cold", cold, quick)
        runs = [watch(algo, folder, settings, quick) for algo in ("cispo", "dapo", "grpo")]
    return [row for rows in runs for row in rows]


@dataclass(frozen=True)
class ForksFlags(Flags):
    """Of all studies, and:"""

    unplanted: bool = False
    """no special token stands for thinking, into forks-unplanted.csv"""
    preset: Literal["tiny", "base"] = "tiny"
    """base: 649 M parameters on one GPU, into ...-base.csv"""


def study(flags):
    """Run it, or read it; picture, table and sentence."""
    base, decides = flags.preset == "base", 2 if flags.unplanted else 0
    name = "forks" + "-unplanted" * flags.unplanted + "-base" * base
    rows = recorded(flags, name, partial(watch_all, flags.unplanted, base))
    updates = by(by(rows, "algo")["cispo"], "update")  # {update: row of every token}
    start, turn, n = updates.pop(0), int(rows[0]["turn"]), len(updates)
    names = [str(row["token"]).replace("<end_of_sentence>", "end") for row in start]
    fork = by([row for row in rows if row["position"] == decides], "algo")
    with picture(flags, name, 2, (11, 3.8), width_ratios=(3, 2)) as (left, right):
        grid = [[row["ratio"] for row in update] for update in updates.values()]
        image = left.imshow(grid, norm="log", aspect="auto", cmap="RdBu_r", vmin=0.5, vmax=2)
        left.axhspan(turn - 2.5, turn - 1.5, fill=False, lw=2)
        labels = [f"{name}\np {row['probability']:.2g}" for name, row in zip(names, start)]
        left.set_xticks(range(len(labels)), labels, fontsize=8)
        left.set_yticks(range(n), range(1, n + 1), fontsize=7)
        left.set(title="one response under CISPO; box: what its own update sees")
        left.set_ylabel("after update")
        ratio = {"label": "ratio to the old policy", "ticks": [0.5, 1, 2], "format": "{x:g}"}
        left.figure.colorbar(image, **ratio).minorticks_off()
        for algo, its_rows in fork.items():
            draw_curve(right, its_rows, "update", "ratio", algo)
        right.axhline(1.28, color="gray", ls=":", label="DAPO's clip (GRPO's: 1.2)")
        right.axvline(turn - 1, color="black", lw=1, label="what its own update sees")
        right.set(title=f"the fork token {names[decides]}", xlabel="update", ylabel="ratio")
        right.legend(fontsize=8)
    print_table(updates[n], {c: f"{{{c}}}" for c in ("token", "probability", "ratio")})
    moved = {algo: its_rows[turn - 1]["ratio"] for algo, its_rows in fork.items()}
    print(f"This response is trained on in update {turn}. By then others have moved its fork")
    told = "token, of probability {:.3f}, by x {dapo:.2f} (dapo: dropped above 1.28), x {grpo:.2f} "
    told += "(grpo: above 1.2), x {cispo:.2f} (cispo: always trained on)."
    print(told.format(start[decides]["probability"], **moved))


main = script(study, __doc__, ForksFlags)

if __name__ == "__main__":
    main()
