"""How far does a hybrid recall, and what does that cost (multi-round coreference in miniature)?

python -m studies.recall            (a GPU: `small`, 64 to 65,536 tokens)
python -m studies.recall --device cpu   (`tiny`, 64 to 256 tokens)

Four names stand twice each in random letters, each time with a digit: `..C7..A1..C3..`. At the end
all eight digits are asked for, first or second (`!C7?C3`). One model of each mixture of layers and
seed learns at growing lengths, as many tokens in a step of each; chance is 0.1, and 0.55 for who
knows both digits of a name but not their order.
"""

import itertools
import time
from dataclasses import dataclass
from statistics import median
from typing import Literal

import train_rl
from cli import model as m1
from cli import pick_device, torch
from studies import common

MIXTURES = {0: "all lightning", 8: "7 : 1 (M1)", 1: "all softmax"}
KEYS = 4
LENGTHS = {"cuda": [2**6, 2**8, 2**10, 2**12, 2**14, 2**16], "cpu": [64, 128, 256]}
STEPS, LATER = 800, 150  # at the first length, where recall is learnt; at each later one
SEEDS = range(3)


def texts(n, length, device):
    """n random texts: tokens (n, length), and which of them are digits asked for, bool."""
    names = torch.arange(2 * KEYS, device=device) % KEYS
    order = torch.rand(n, 2 * KEYS, device=device).argsort(1)
    names, digits = names[order], torch.randint(10, order.shape, device=device)
    before = names[:, :, None] == names[:, None, :]  # (n, this one, another)
    again = before.tril(-1).any(2)
    tail, slots = 3 * 2 * KEYS, (length - 6 * KEYS) // 2
    places = torch.rand(n, slots, device=device).argsort(1)[:, : 2 * KEYS].sort(1).values * 2
    tokens = torch.randint(ord("a"), ord("z") + 1, (n, length), device=device)
    tokens.scatter_(1, places, ord("A") + names)
    tokens.scatter_(1, places + 1, ord("0") + digits)
    asked = torch.rand(n, 2 * KEYS, device=device).argsort(1)
    kind = torch.where(again, ord("?"), ord("!"))
    question = torch.stack([kind, ord("A") + names, ord("0") + digits], 2)
    rows = asked[:, :, None].expand(-1, -1, 3)
    tokens[:, -tail:] = question.gather(1, rows).flatten(1)
    wanted = torch.zeros_like(tokens, dtype=torch.bool)
    wanted[:, 2 - tail :: 3] = True
    return tokens, wanted


def answers(model, tokens, wanted):
    """Log-probs (n, 2 KEYS) of the digits asked for, and whether each is the likeliest token."""
    ends = torch.arange(len(tokens) + 1, device=tokens.device) * tokens.shape[1]
    if tokens.is_cuda:
        hidden, aux = model.hidden(tokens.view(1, -1), cu_seqlens=ends.int())
    else:
        hidden, aux = model.hidden(tokens)
    hidden = hidden.view(*tokens.shape, -1)[:, :-1][wanted[:, 1:]]
    logits = model.head(hidden).view(len(tokens), 2 * KEYS, -1)
    right = tokens[wanted].view(len(tokens), -1, 1)
    logp = logits.log_softmax(-1).gather(2, right)
    return logp[..., 0], logits.argmax(-1) == right[..., 0], aux


def untrained(every, device):
    """A model in which every so many layers have softmax attention."""
    preset = "small" if device == "cuda" else "tiny"
    layers = range(m1.PRESETS[preset]["num_hidden_layers"])
    types = [int(every > 0 and (l + 1) % every == 0) for l in layers]
    changes = {"attn_type_list": types, "max_position_embeddings": 2**17}
    with torch.device(device):
        model = m1.MiniMaxM1(m1.M1Config.preset(preset, **changes))
    model.compute = torch.bfloat16 if device == "cuda" else None
    model.recompute = device == "cuda"
    return model


def learn(every, seed, device, quick):
    """Rows of recall.csv of one model, one for each length."""
    torch.manual_seed(seed)
    model, budget = untrained(every, device), 2**16 if device == "cuda" else 2**12
    top = 1e-3 * 64 / model.config.hidden_size  # at 3e-3 all softmax learns no order
    optimizer, rows, steps = train_rl.make_optimizer(model), [], STEPS
    for length in LENGTHS[device][: 1 if quick else None]:
        n, started, done = budget // length, time.perf_counter(), 3 if quick else steps
        for step in range(1, done + 1):
            logp, right, aux = answers(model, *texts(n, length, device))
            loss = -logp.mean() + model.config.router_aux_loss_coef * aux.router_loss
            loss.backward()
            train_rl.clip(model, 1.0)
            optimizer.param_groups[0]["lr"] = top * min(step / 30, 1, (done - step + 1) / 100)
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - started
        with torch.no_grad():
            found = [answers(model, *texts(n, length, device))[1] for _ in range(8)]
        accuracy = float(torch.cat(found).float().mean())
        row = {"softmax_every": every, "seed": seed, "tokens": length, "steps": done}
        rows.append(row | {"accuracy": f"{accuracy:.4f}", "train_s": f"{seconds:.1f}"})
        print(*rows[-1].values(), flush=True)
        steps = LATER
    return rows


def reading(every, device, quick):
    """{length: milliseconds to read one text}, alone on the device."""
    model, spent = untrained(every, device), {}
    for length in LENGTHS[device][: 1 if quick else None]:
        text, times = texts(1, length, device), []
        for _ in range(7):
            begun = time.perf_counter()
            with torch.no_grad():
                float(answers(model, *text)[0].sum())
            times.append(time.perf_counter() - begun)
        spent[length] = f"{median(times[2:]) * 1e3:.4g}"
    return spent


@dataclass(frozen=True)
class Flags(common.Flags):
    """How the study runs."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """a GPU reads longer texts"""


def study(flags):
    """Run it, or read it; picture and table."""
    device = pick_device(flags.device)

    def measure(quick):
        jobs = itertools.product(MIXTURES, SEEDS[: 1 if quick else None], [device], [quick])
        rows = common.in_processes(learn, [*jobs], "models")
        ms = {every: reading(every, device, quick) for every in MIXTURES}
        return [row | {"read_ms": ms[row["softmax_every"]][row["tokens"]]} for row in rows]

    name = "recall" if device == "cuda" else "recall-tiny"
    rows = common.recorded(flags, name, measure)
    table = []
    with common.picture(flags, name, 2, (9, 3.6), "recall across a long text") as axes:
        for every, runs in common.by(rows, "softmax_every").items():
            line = {"layers": MIXTURES[every]}
            for length, seeds in common.by(runs, "tokens").items():
                x = [run["accuracy"] for run in seeds]
                line[f"{length:,.0f} tokens"] = f"{median(x):.2f} [{min(x):.2f}, {max(x):.2f}]"
            table.append(line)
            for axis, column in zip(axes, ("accuracy", "read_ms")):
                common.draw_median(
                    axis, [*common.by(runs, "seed").values()], "tokens", column, MIXTURES[every]
                )
        axes[0].set(xscale="log", xlabel="tokens", ylabel="digits right")
        axes[1].set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms to read one text")
        axes[0].legend()
    common.print_table(table)


main = common.script(study, __doc__, Flags)

if __name__ == "__main__":
    main()
