"""RL of the 456 B model on 512 GPUs, by arithmetic alone; run by bench.py, checked by bench_check.

    1. Assumptions      ASSUMED: every number that is not computed, with its source
    2. Memory           of a GPU, by item
    3. Traffic          bytes that come to a GPU over NVLink and InfiniBand
    4. Time             rooflines of an RL step; days, dollars, and what three weeks imply
    5. The plan         tables, plan

Everywhere c is an M1Config and a the assumptions. Bytes are of one GPU.
"""

from pathlib import Path
from types import SimpleNamespace

import parallel
from cli import model as m1
from studies.common import print_table, write_csv

# ============================================================================
# 1. Assumptions
# ============================================================================

ASSUMED = {  # name: (value, unit, source)
    "gpus": (512, "each keeps a part of every weight (FSDP)", "report, abstract: H800"),
    "days": (21, "days", "report, abstract"),
    "dollars": (534_700, "$", "report, abstract"),
    "expert_parallel": (32, "GPUs divide a layer's experts", "assumed: an expert each"),
    "sequence_parallel": (8, "GPUs divide a sequence", "assumed: a node"),
    "rollout_experts": (32, "GPUs divide experts in rollouts", "assumed: the fewest that fit"),
    "rollout_heads": (8, "GPUs divide heads and responses", "assumed: a node"),
    "recompute": (1, "1: activations computed again", "assumed"),
    "copy_stays": (0, "1: rollouts' copy stays in updates", "assumed"),
    "tokens": (10_000, "a GPU and pass", "assumed: the window over a node"),
    "problems": (158_000, "maths, logic, code, general", "report, sec. 4"),
    "epochs": (1, "times each problem", "assumed"),
    "prompts": (512, "an RL step", "assumed, as DAPO (arXiv:2503.14476)"),
    "group_size": (16, "responses a prompt", "assumed, as DAPO"),
    "updates": (16, "an RL step", "report, sec. 3.1"),
    "prompt": (1000, "tokens", "assumed"),
    "length": (20_000, "tokens of a response, mean", "assumed: a quarter of the window"),
    "spread": (1.0, "deviation of lengths / mean", "assumed"),
    "window": (80_000, "tokens of the longest", "report: the last window"),
    "node": (8, "GPUs", "assumed"),
    "card": (80e9, "bytes of memory", "H800"),
    "flops": (989e12, "FLOP/s, dense bf16", "H800, as H100"),
    "hbm": (3.35e12, "bytes/s", "H800, as H100"),
    "nvlink": (200e9, "bytes/s, each way", "H800: 400 GB/s both ways"),
    "infiniband": (50e9, "bytes/s of a GPU, each way", "assumed: 8 x 400 Gb/s a node"),
    "flops_used": (0.35, "share reached", "training in figures/model.csv"),
    "hbm_used": (0.8, "share reached", "decode in figures/model.csv"),
    "links_used": (0.8, "share reached", "DeepEP on H800: 160 of 200 GB/s"),
    "latency": (20e-6, "s of a collective in decoding", "assumed"),
    "gathered": (2, "bytes of a gathered weight", "assumed: bf16"),
    "compute": (2, "bytes of an activation", "bf16, as train_rl.py"),
    "exact": (4, "bytes of a weight, gradient, logit", "fp32, as train_rl.py"),
    "moments": (8, "bytes of two moments", "fp32, as train_rl.py"),
}


def assume(**changes):
    """The assumptions, some of them changed."""
    return SimpleNamespace(**{name: value for name, (value, *_) in ASSUMED.items()} | changes)


# ============================================================================
# 2. Memory
# ============================================================================


def sizes(c, a):
    """Parameters: embedding and head; a layer without experts; a GPU's experts of a layer; its part
    of all; its copy for rollouts.
    """
    n, L = m1.count_parameters(c), c.num_hidden_layers
    root, experts, dense = n["embedding"] + n["head"], n["experts"], n["total"] - n["experts"]
    copy = dense / a.rollout_heads + experts / a.rollout_experts
    return root, (dense - root) / L, experts / L / a.expert_parallel, n["total"] / a.gpus, copy


def width(c, a):
    """Numbers that a token leaves in a layer for the backward pass, the mean over layers."""
    inner, softmax = c.num_attention_heads * c.head_dim, sum(c.attn_type_list) / c.num_hidden_layers
    mixer = softmax * (2 * inner + 2 * c.num_key_value_heads * c.head_dim)  # q, out; k, v
    mixer += (1 - softmax) * 9 * inner  # q, k, v before and after silu; gate; out; out normed
    rows = 3 if a.expert_parallel > 1 else 1  # of outputs; travelling: also as they came and went
    experts = c.num_experts_per_tok * (2 * c.intermediate_size + rows * c.hidden_size)
    return mixer + experts + 6 * c.hidden_size  # two inputs, two normed, one in fp32 for the router


def cached(c, a):
    """Bytes of a sequence in rollouts: its states (fp32); keys and values of a token."""
    softmax, part = sum(c.attn_type_list), c.head_dim / a.rollout_heads
    states = (c.num_hidden_layers - softmax) * c.num_attention_heads * c.head_dim * 4
    return states * part, softmax * 2 * c.num_key_value_heads * a.compute * part


def memory(c, a):
    """{item: bytes in (updates, rollouts)}."""
    (root, dense, experts, own, copy), L = sizes(c, a), c.num_hidden_layers
    several, token = a.gpus > 1, width(c, a) * a.compute
    copy = copy * a.compute + c.vocab_size * c.hidden_size / a.rollout_heads * (a.exact - a.compute)
    layers = dense * several + experts * (a.gpus > a.expert_parallel)
    kept = c.hidden_size * a.compute if a.recompute else token
    work = a.tokens * token * (0.5 + a.recompute)  # a layer's activations; gradients of half
    rows, (states, kv) = a.prompts * a.group_size * a.rollout_heads / a.gpus, cached(c, a)
    return {
        "weights": (a.exact * own, a.exact * own),
        "AdamW's moments": (a.moments * own, a.moments * own),
        "copy of the weights for rollouts": (copy * a.copy_stays, copy),
        "embedding and head gathered, gradient": (root * (a.gathered + a.exact) * several, 0),
        "two layers gathered, one's gradient": (layers * (2 * a.gathered + a.exact), 0),
        "gradients": (a.exact * own, 0),
        "activations kept": (a.tokens * L * kept, 0),
        "a layer at work": (work + 2 * a.compute * (dense + experts), 0),  # its weights in bf16
        "logits": (4 * a.exact * min(a.tokens * c.vocab_size, 2**28), 0),  # see target_logp
        "lightning states": (0, rows * states),
        "keys and values": (0, rows * kv * (a.prompt + a.length)),
    }


def peaks(c, a, passes):
    """Most bytes in use in (updates, rollouts). In an update's first pass gradients grow while
    activations go; in later ones all gradients are there. Logits go before layers work.
    """
    items, passing = memory(c, a), ("gradients", "activations kept", "a layer at work", "logits")
    grown, kept, work, logits = (items[name][0] for name in passing)
    always = sum(update for name, (update, _) in items.items() if name not in passing)
    early = kept + max(logits, a.recompute * work) + grown * (passes > 1)
    return always + max(early, grown + work), sum(rollout for _, rollout in items.values())


# ============================================================================
# 3. Traffic
# ============================================================================


def ring(n_bytes, ranks, near):
    """Bytes over (NVLink, InfiniBand) that come to a GPU where `ranks` of them, `near` in a node,
    gather n_bytes, or sum as many and keep a part each: a ring enters a node once.
    """
    came = n_bytes * (1 - 1 / ranks)
    far = came / near if ranks > near else 0
    return came - far, far


def traffic(c, a, backward):
    """{(item, collective): (layers, a layer's bytes over NVLink, over InfiniBand)} that come to a
    GPU in a pass forward (backward 0), or forward and backward (1).
    """
    (root, dense, experts, *_), L, softmax = sizes(c, a), c.num_hidden_layers, sum(c.attn_type_list)
    near, group, again = min(a.node, a.gpus), a.expert_parallel, 1 + backward * (1 + a.recompute)
    every, twins, found = (a.gpus, near), (a.gpus // group, max(near // group, 1)), {}
    for item, layers, n, times, ranks in (
        ("embedding and head", 1, root, 1, every),
        ("layers without experts", L, dense, 1 + backward, every),
        ("experts", L, experts, 1 + backward, twins),
    ):
        found[item, "all-gather"] = layers, *ring(n * a.gathered * times, *ranks)
        found[item, "reduce-scatter"] = layers, *ring(n * a.exact * backward, *ranks)
    row, inside, others = c.hidden_size * a.compute, min(near, group), a.sequence_parallel - 1
    sent = 2 * again * a.tokens * c.num_experts_per_tok * row / group  # there and back
    state, heads = c.num_attention_heads * c.head_dim**2 * 4, 2 * c.num_attention_heads
    found["rows of experts", "all-to-all"] = L, sent * (inside - 1), sent * (group - inside)
    found["lightning states", "all-to-all"] = L - softmax, state * again * others, 0
    traded = (heads + 2 * c.num_key_value_heads) * c.head_dim * a.compute * a.tokens  # q, k, v; o
    traded *= again * others / a.sequence_parallel
    found["tokens for heads of softmax layers", "all-to-all"] = softmax, traded, 0
    return found


def renewal(c, a):
    """Bytes over (NVLink, InfiniBand) that come to a GPU to renew its copy for rollouts."""
    *_, own, copy = sizes(c, a)
    came = (copy - own) * a.gathered
    return (came, 0) if a.gpus <= a.node else (0, came)


# ============================================================================
# 4. Time
# ============================================================================

LIMITS = ("arithmetic", "hbm", "nvlink", "infiniband", "latency")


def forward_flops(c, n_tokens, squares):
    """FLOPs of a forward pass over n_tokens, head included; squares: sum of squared lengths."""
    softmax, inner = sum(c.attn_type_list), c.num_attention_heads * c.head_dim
    linear = (c.num_hidden_layers - softmax) * 4 * inner * c.head_dim
    linear += 2 * m1.count_parameters(c)["active_with_head"]
    return n_tokens * linear + squares * softmax * 2 * inner


def times(c, a):
    """{phase of an RL step: {"takes" or one of LIMITS: seconds}}; all but latency overlaps.

    All responses are decoded together, for `window` steps, each of which reads all weights; caches
    and hidden states on their way cost by the token.
    """
    N, L, n = a.prompts * a.group_size, c.num_hidden_layers, a.prompt + a.length
    rate, hbm, deviation = a.gpus * a.flops * a.flops_used, a.hbm * a.hbm_used, a.spread * a.length
    learn = forward_flops(c, N * n, N * (n**2 + deviation**2)) / rate
    read = forward_flops(c, a.prompts * a.prompt, a.prompts * a.prompt**2) / rate
    seen = a.prompt * a.length + (a.length**2 + deviation**2) / 2  # keys, by all of a response
    draw = forward_flops(c, N * a.length, N * 2 * seen) / rate
    rows, (states, kv) = N * a.rollout_heads / a.gpus, cached(c, a)
    weights = memory(c, a)["copy of the weights for rollouts"][1] * a.window / hbm
    caches = rows * (2 * states * a.length + kv * seen) / hbm
    hidden = 2 * rows * a.length * L * c.hidden_size * a.compute  # into layers and out of them
    rows_far = c.num_experts_per_tok * max(1 - a.node / a.rollout_experts, 0) / a.rollout_heads
    moved = hidden * (1 - 1 / a.rollout_heads), hidden * rows_far

    def links(nvlink, infiniband):
        return nvlink / a.nvlink / a.links_used, infiniband / a.infiniband / a.links_used

    def passes(backward):
        found, n_passes = traffic(c, a, backward).values(), N * n / a.gpus / a.tokens
        return links(*(n_passes * sum(x[0] * x[i] for x in found) for i in (1, 2)))

    phases = {  # seconds that each of LIMITS would take
        "copy of the weights": (0, 0, *links(*renewal(c, a)), 0),
        "prompts": (read, 0, 0, 0, 0),
        "decoding, by the step": (0, weights, 0, 0, a.window * 4 * L * a.latency),
        "decoding, by the token": (draw, caches, *links(*moved), 0),
        "log-probs before": (learn, 0, *passes(0), 0),
        "updates": ((3 + a.recompute) * learn, 0, *passes(1), 0),
    }
    return {name: {"takes": max(x[:4]) + x[4]} | dict(zip(LIMITS, x)) for name, x in phases.items()}


def results(c, a):
    """{what follows: its value}."""
    phases, N, span = times(c, a), a.prompts * a.group_size, a.days * 86_400
    steps, drawn = a.problems * a.epochs / a.prompts, N * a.length / a.gpus
    step, busy = (sum(x[limit] for x in phases.values()) for limit in ("takes", "arithmetic"))
    apart = sum(x[limit] for x in phases.values() for limit in LIMITS)
    update, before = phases["updates"]["takes"], phases["log-probs before"]
    rollouts, busy = step - update - before["takes"], busy - a.recompute * before["arithmetic"]
    return {
        "$ of a GPU hour, the report's cost over its hours": a.dollars / a.gpus / a.days / 24,
        "RL steps": steps,
        "minutes of one": step / 60,
        "... of which rollouts": rollouts / 60,
        "... if nothing overlapped": apart / 60,
        "days": steps * step / 86_400,
        "... if nothing overlapped ": steps * apart / 86_400,
        "$": steps * step / span * a.dollars,
        "tokens/s of a GPU in rollouts": drawn / rollouts,
        "tokens/s of a GPU in updates": drawn * (1 + a.prompt / a.length) / update,
        "share of the peak FLOP/s over a step": a.flops_used * busy / step,
        "RL steps that three weeks allow": span / step,
        "three weeks imply for the steps above: minutes of one": span / steps / 60,
        "... tokens/s of a GPU, drawn and learnt from": drawn * steps / span,
        "... share of the peak FLOP/s": a.flops_used * busy * steps / span,
    }


# ============================================================================
# 5. The plan
# ============================================================================

VARIANTS = {"as assumed": {}, "rollouts: experts over 16": {"rollout_experts": 16}}
VARIANTS |= {"rollouts: all heads on each": {"rollout_heads": 1}}
VARIANTS |= {"a sequence on one GPU": {"sequence_parallel": 1, "tokens": 80_000}}
VARIANTS |= {"no recompute": {"recompute": 0}, "the copy stays in updates": {"copy_stays": 1}}


def tables(c, a):
    """Tables of all that is told: lists of rows, of which the first column is the name."""
    n_passes = a.prompts * a.group_size * (a.prompt + a.length) / a.gpus / a.tokens
    moved, before, most = [], traffic(c, a, 0), {}
    for name, changes in VARIANTS.items():
        most[name] = peaks(c, assume(**vars(a) | changes), n_passes / a.updates)
    for (item, by), (layers, *came) in traffic(c, a, 1).items():
        row = {"traffic": item, "collective": by, "layers": layers}
        for link, x, first in zip(("NVLink", "InfiniBand"), came, before[item, by][1:]):
            row[f"{link}, MB a layer and pass"] = f"{x / 1e6:.0f}"
            row[f"{link}, GB an RL step"] = f"{(x + first) * layers * n_passes / 1e9:.0f}"
        moved.append(row)

    def table(columns, items, unit=1):
        cells = ((name, *(f"{x / unit:.1f}" for x in row)) for name, row in items.items())
        return [dict(zip(columns, row)) for row in cells]

    gb, what = ("updates, GB", "rollouts, GB"), ("assumed", "value", "unit", "source")
    told = ((name, f"{getattr(a, name):g}", *rest) for name, (_, *rest) in ASSUMED.items())
    seconds = {phase: x.values() for phase, x in times(c, a).items()}
    return [
        [dict(zip(what, row)) for row in told],
        table(("memory of a GPU", *gb), memory(c, a), 1e9),
        table((f"in use at most, of {a.card / 1e9:g} GB", *gb), most, 1e9),
        moved,
        table(("seconds", "takes", *LIMITS), seconds),
        [{"result": name, "value": f"{float(f'{x:.3g}'):g}"} for name, x in results(c, a).items()],
    ]


@parallel.by_first
def plan(flags):
    """RL of M1: memory, traffic, time, cost, and what three weeks imply: plan.csv."""
    numbers = []
    for rows in tables(m1.M1Config.preset("m1"), assume()):
        print_table(rows)
        print()
        table, *columns = rows[0]
        for row in rows:
            named = {"table": table, "row": row[table]}
            numbers += [named | {"column": x, "value": row[x]} for x in columns]
    write_csv(Path(flags.out) / "plan.csv", numbers)
    print("Left out: rewards, groups dropped, evaluations, checkpoints, failures, idle GPUs.")
