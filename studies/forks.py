"""What does PPO's clip drop that CISPO keeps? One right answer, token by token, over 16 updates.

python -m studies.forks (2 minutes)

After a cold start every algorithm trains on the same rollouts from the same weights. Watched is the
last of the best-rewarded responses that begin with the fork; it is trained on once.
"""

import itertools
import tempfile
from unittest import mock

import experience
import tasks
import train_rl
from cli import torch
from studies.common import by, draw_curve, picture, print_table, recorded, script, train_run


def watch(algo, folder, settings, quick=False):
    """One RL step of an algorithm from a cold start: rows of forks.csv."""
    seen, logps, collect, clip = {}, [], train_rl.collect, train_rl.clip

    def watched_collect(model, tokenizer, problems, flags, *rest):
        batch, *told = collect(model, tokenizer, problems, flags, *rest)
        if batch is None:
            raise ValueError("no group has right and wrong responses: nothing to watch")
        fork = tokenizer.encode(tasks.FORK)[0]
        first = batch.trained.int().argmax(1, keepdim=True)
        value = batch.rewards + 10 * (batch.tokens[:, 1:].gather(1, first)[:, 0] == fork)
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


def watch_all(quick):
    """Rows of forks.csv: algo, turn (the update that trains on the response), update, ..."""
    settings = {"updates_per_rollout": 16, "lr": 1e-3}  # warm-up: lr / 5
    with tempfile.TemporaryDirectory() as folder:
        train_run(f"{folder}/cold", {"fork_prior": 0.05, "steps": 0}, quick)
        runs = [watch(algo, folder, settings, quick) for algo in ("cispo", "dapo", "grpo")]
    return [row for rows in runs for row in rows]


def study(flags):
    """Run it, or read it; picture, table and sentence."""
    rows = recorded(flags, "forks", watch_all)
    updates = by(by(rows, "algo")["cispo"], "update")  # {update: row of every token}
    start, turn, n = updates.pop(0), int(rows[0]["turn"]), len(updates)
    names = [str(row["token"]).replace("<end_of_sentence>", "end") for row in start]
    fork = by([row for row in rows if row["position"] == 0], "algo")
    with picture(flags, "forks", 2, (11, 3.8), width_ratios=(3, 2)) as (left, right):
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
        right.set(title=f"the fork token {names[0]}", xlabel="update", ylabel="ratio")
        right.legend(fontsize=8)
    print_table(updates[n], {c: f"{{{c}}}" for c in ("token", "probability", "ratio")})
    moved = {algo: its_rows[turn - 1]["ratio"] for algo, its_rows in fork.items()}
    print(f"This response is trained on in update {turn}. By then others have moved its fork")
    told = "token, of probability {:.3f}, by x {dapo:.2f} (dapo: dropped above 1.28), x {grpo:.2f} "
    told += "(grpo: above 1.2), x {cispo:.2f} (cispo: always trained on)."
    print(told.format(start[0]["probability"], **moved))


main = script(study, __doc__)

if __name__ == "__main__":
    main()
