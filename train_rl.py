"""Cold start, then CISPO: a small MiniMax-M1 learns to think before it answers.

    python train_rl.py                          the main job: a few minutes on two CPU cores
    python train_rl.py --eval runs/NAME         score a finished run again
    python train_rl.py --help                   every flag

One RL step:
    problems -> sample.generate -> rewards -> cispo.group_advantages -> k times: log-probs -> cispo.policy_loss -> AdamW

    1. Flags                 Flags
    2. Data                  Batch, demonstrations
    3. Evaluation            evaluate, chain_skill
    4. Cold start            cold_start
    5. Reinforcement         collect, update
    6. The run               RunFolder, train, main

Dimension key: N sequences, L tokens of the longest, T trained tokens in one row after another.
"""

import csv
import dataclasses
import json
import math
import os
import platform
import random
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import cispo
import tasks
from model import (
    M1Config,
    MiniMaxM1,
    checkpoint_dir,
    command_line,
    count_parameters,
    flag,
    load_pretrained,
    parse_flags,
    save_pretrained,
)
from sample import Tokenizer, generate, left_pad, pick_device

# ============================================================================
# 1. Flags
# ============================================================================


@dataclass(frozen=True)
class Flags:
    """Every setting of a run. Defaults are the main job."""

    seed: int = flag(0, "same seed, same log on the same machine", "run")
    out: str = flag(None, "run folder; none = the next free runs/PRESET-ALGO-NNN", "run")
    device: str = flag("auto", "cpu, cuda, or auto: a GPU if there is one", "run")
    eval: str = flag(None, "score this run or model directory and stop", "run")

    preset: str = flag(None, "model size: tiny, small or base; none = tiny on a CPU, small on a GPU", "model")
    init: str = flag(None, "start RL from this run or model directory instead of a cold start", "model")

    task: str = flag("mod,walk,cups", "tasks to mix evenly, separated by commas", "problems")
    moves: int = flag(6, "difficulty: steps per problem", "problems")

    sft_steps: int = flag(2000, "most cold-start steps; it ends when chains are learnt", "cold start")
    sft_skill: float = flag(0.95, "chains are learnt when this share of forced chains ends right", "cold start")
    sft_batch: int = flag(48, "demonstrations per step", "cold start")
    sft_lr: float = flag(None, "learning rate; none = 3e-3 * 64 / model width", "cold start")
    fork_prior: float = flag(0.1, "how often demonstrations choose to think", "cold start")

    steps: int = flag(40, "RL steps; 0 stops after the cold start", "reinforcement")
    prompts: int = flag(32, "prompts per step", "reinforcement")
    group_size: int = flag(8, "G, responses per prompt", "reinforcement")
    updates_per_rollout: int = flag(4, "optimizer steps per batch of rollouts; the report's is 16", "reinforcement")
    lr: float = flag(None, "learning rate; none = 2e-4 * 64 / model width", "reinforcement")
    warmup: int = flag(5, "RL steps over which the learning rate rises", "reinforcement")
    temperature: float = flag(1.0, "of rollouts and of the log-probs trained on", "reinforcement")
    max_new_tokens: int = flag(None, "longest response; none = moves + 10", "reinforcement")
    min_groups: int = flag(
        4, "dynamic sampling: fewest prompts with unequal rewards that make an update", "reinforcement"
    )
    resample: int = flag(2, "dynamic sampling: how often to draw more prompts when there are too few", "reinforcement")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", "reinforcement")

    algo: str = flag("cispo", f"loss: {', '.join(cispo.ALGORITHMS)}", "loss")
    eps_high: float = flag(4.0, "CISPO's ratio is capped at 1 + this; none = no cap", "loss")
    eps_low: float = flag(None, "CISPO's ratio is at least 1 - this; none = no lower bound", "loss")
    clip_low: float = flag(0.2, "trust region below 1 (grpo: on both sides)", "loss")
    clip_high: float = flag(0.28, "trust region above 1", "loss")
    token_weights: str = flag("batch", f"normaliser: {', '.join(cispo.WEIGHT_MODES)}", "loss")
    overlong_buffer: int = flag(0, "soft penalty over the last so many tokens of max_new_tokens; 0 = off", "loss")

    eval_every: int = flag(5, "RL steps between evaluations", "evaluation")
    eval_problems: int = flag(300, "held-out problems", "evaluation")
    eval_samples: int = flag(8, "responses to each, for pass@1 and pass@k", "evaluation")

    def __post_init__(self):
        """Refuse what cannot work before anything is written or computed."""
        for name in ("moves", "sft_batch", "prompts", "min_groups", "updates_per_rollout",
                     "eval_every", "eval_problems", "eval_samples"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, found {getattr(self, name)}")
        for name in ("lr", "sft_lr", "temperature", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, found {getattr(self, name)}")
        if self.group_size < 2:
            raise ValueError(f"--group-size must be at least 2, to have something to compare; found {self.group_size}")
        if self.token_weights not in cispo.WEIGHT_MODES:
            modes = ", ".join(cispo.WEIGHT_MODES)
            raise ValueError(f"unknown --token-weights {self.token_weights!r}; choose from {modes}")
        cispo.weight_range(self.algo, self.eps_low, self.eps_high)
        tasks.draw(random.Random(0), 1, self.task_names, self.moves)

    @property
    def task_names(self):
        return [name.strip() for name in self.task.split(",")]

    @property
    def longest(self):
        """Longest response in tokens."""
        return self.max_new_tokens or self.moves + 10


def substream(seed, *names):
    """A seed of its own for every use of randomness, so that changing one leaves the others alone."""
    return zlib.crc32(repr((seed, *names)).encode())


# ============================================================================
# 2. Data
# ============================================================================


class Batch(NamedTuple):
    """Prompts with their responses, padded on the left. Position t of the last three belongs to the prediction of
    tokens[:, t + 1].
    """

    tokens: torch.Tensor  # (N, L) int64
    mask: torch.Tensor  # (N, L) bool: real tokens
    trained: torch.Tensor  # (N, L - 1) bool: predictions that carry loss

    def rows(self, index):
        """The sequences of this index (slice or tensor), same width."""
        return Batch(*(x[index] for x in self))


def make_batch(prompts, responses, learned, device):
    """Lists of N prompts, N responses (token ids) and N masks over the responses (True = carries loss) -> Batch."""
    tokens, mask = left_pad([[*p, *r] for p, r in zip(prompts, responses)], 0, device)
    trained, _ = left_pad([[0] * (len(p) - 1) + list(m) for p, m in zip(prompts, learned)], 0, device)
    return Batch(tokens, mask, trained.bool())


def trained_logp(model, batch, temperature=1.0, with_entropy=False):
    """Log-probs (T,) of a batch's trained tokens, row after row (or (logp, entropy)), and the model's Aux."""
    hidden, aux = model.hidden(batch.tokens[:, :-1], mask=batch.mask[:, :-1])
    return model.target_logp(hidden[batch.trained], batch.tokens[:, 1:][batch.trained], temperature, with_entropy), aux


def demonstrations(flags, rng, tokenizer, n, device):
    """n cold-start demonstrations as a Batch. A fork that is not learned from stays visible as input."""
    problems = tasks.draw(rng, n, flags.task_names, flags.moves)
    texts = [tasks.demonstration(p, rng, flags.fork_prior) for p in problems]
    prompts = [tokenizer.encode(p.prompt) for p in problems]
    responses = [[*tokenizer.encode(text, specials=True), tokenizer.eos_id] for text, _ in texts]
    learned = [[i >= skip for i in range(len(r))] for r, (_, skip) in zip(responses, texts)]
    return make_batch(prompts, responses, learned, device)


# ============================================================================
# 3. Evaluation
# ============================================================================


def respond(model, tokenizer, problems, flags, seed, group_size=1, temperature=1.0):
    """Responses to problems and their scores: (Rollout, [Score] * N)."""
    prompts = [tokenizer.encode(p.prompt) for p in problems]
    rollout = generate(
        model, prompts, group_size=group_size, max_new_tokens=flags.longest, temperature=temperature, seed=seed,
        eos_id=tokenizer.eos_id, pad_id=tokenizer.pad_id, think_end_id=tokenizer.think_end_id,
    )  # fmt: skip
    return rollout, [
        tasks.score(problems[i // group_size], text, rollout.ended[i] in ("eos", "budget"))
        for i, text in enumerate(response_texts(tokenizer, rollout))
    ]


def response_texts(tokenizer, rollout):
    """The N response texts, without the end token."""
    rows = (row[:n] for row, n in zip(rollout.tokens.tolist(), rollout.lengths.tolist()))
    return [tokenizer.decode([i for i in row if i != tokenizer.eos_id]) for row in rows]


def evaluate(model, tokenizer, flags):
    """Score a model on held-out problems, the same for every seed.

    accuracy = pass@1: the mean over eval_samples responses at temperature 1 to each problem; pass_k: at least one of
    them is right; greedy: the likeliest response is; fork_rate and length (tokens) are of the sampled responses.
    """
    problems = tasks.draw(random.Random("held-out"), flags.eval_problems, flags.task_names, flags.moves, held_out=True)
    k, correct, forked, length, greedy = flags.eval_samples, [], [], [], []
    for start in range(0, len(problems), 64):  # in pieces: larger batches fall out of a CPU's cache
        piece = problems[start : start + 64]
        rollout, scores = respond(model, tokenizer, piece, flags, substream(flags.seed, "eval", start), k)
        correct += [s.correct for s in scores]
        forked += [s.forked for s in scores]
        length += rollout.lengths.tolist()
        greedy += [s.correct for s in respond(model, tokenizer, piece, flags, 0, temperature=0)[1]]
    return {
        "accuracy": mean(correct),
        "pass_k": mean(any(correct[i : i + k]) for i in range(0, len(correct), k)),
        "greedy": mean(greedy),
        "fork_rate": mean(forked),
        "length": mean(length),
    }


def mean(values):
    """Mean of any iterable of numbers."""
    values = list(values)
    return sum(values) / len(values)


def chain_skill(model, tokenizer, flags, n=96):
    """Share of training problems solved when the fork is set and the likeliest chain follows."""
    problems = tasks.draw(random.Random("skill"), n, flags.task_names, flags.moves)
    forced = [dataclasses.replace(p, prompt=p.prompt + tasks.FORK) for p in problems]
    return mean(s.correct for s in respond(model, tokenizer, forced, flags, 0, temperature=0)[1])


# ============================================================================
# 4. Cold start
# ============================================================================


def make_optimizer(model, lr):
    """AdamW as in the report (sec. 3.2): gradients go down to 1e-18, and an eps of 1e-8 would swallow them."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0, fused=True)


def optimizer_step(model, optimizer, lr, max_grad_norm):
    """Clip, step, clear; returns the gradient norm before clipping. Stops the run when it is not finite."""
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))
    if not math.isfinite(norm):
        raise ValueError(f"the gradient norm is {norm}; lower the learning rate")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def cold_start(model, tokenizer, flags):
    """Imitate demonstrations until forced chains are right, then cool the learning rate down over 100 steps.

    The moment at which chains click differs from seed to seed, so the gate is skill, not a number of steps, and the
    learning rate stays high until then (a fast decay freezes them unlearnt). Returns {steps, skill, loss}.
    """
    rng = random.Random(substream(flags.seed, "demonstrations"))
    top_lr = flags.sft_lr or 3e-3 * 64 / model.config.hidden_size
    optimizer = make_optimizer(model, top_lr)
    warmup, cooldown, every = 30, 100, 50
    skill, stop = 0.0, flags.sft_steps
    bar = tqdm(total=flags.sft_steps, desc="cold start", unit="step", disable=None)
    for step in range(1, flags.sft_steps + 1):
        batch = demonstrations(flags, rng, tokenizer, flags.sft_batch, model.device)
        logp, aux = trained_logp(model, batch)
        loss = -logp.mean()
        (loss + model.config.router_aux_loss_coef * aux.router_loss).backward()
        lr = top_lr * min(step / warmup, 1, (stop - step + 1) / cooldown)
        optimizer_step(model, optimizer, lr, flags.max_grad_norm)
        bar.update()
        if step % every == 0 or step == stop:
            skill = chain_skill(model, tokenizer, flags)
            bar.set_postfix(loss=f"{loss.item():.3f}", chains=f"{skill:.2f}")
            if skill >= flags.sft_skill:
                stop = min(stop, step + cooldown)
            elif step == stop:  # unlearnt while cooling down: go on at the full rate
                stop = flags.sft_steps
        if step == stop:
            break
    bar.close()
    return {"steps": step, "skill": skill, "loss": loss.item()}


# ============================================================================
# 5. Reinforcement
# ============================================================================


class Experience(NamedTuple):
    """The groups kept from one step's rollouts and what was seen in all of them."""

    batch: Batch  # N = kept groups x G sequences
    rewards: torch.Tensor  # (N,) fp32
    infer_logp: torch.Tensor  # (T,) log-probs that the sampler recorded for the trained tokens
    seen: dict  # means over everything sampled, dropped groups included


def collect(model, tokenizer, flags, rng, step):
    """Sample groups of responses, score them and keep the groups with unequal rewards (dynamic sampling, DAPO).

    More prompts are drawn while fewer than min_groups are kept, at most `resample` times. Returns an Experience, or
    one whose batch is None when even then there are too few.
    """
    prompts, responses, learned, rewards, infer, scores, lengths, rounds = [], [], [], [], [], [], [], 0
    while len(rewards) < flags.min_groups * flags.group_size and rounds <= flags.resample:
        problems = tasks.draw(rng, flags.prompts, flags.task_names, flags.moves)
        seed = substream(flags.seed, "rollout", step, rounds)
        rollout, new_scores = respond(model, tokenizer, problems, flags, seed, flags.group_size, flags.temperature)
        reward = torch.tensor([s.reward for s in new_scores])
        if flags.overlong_buffer:
            reward += cispo.overlong_penalty(rollout.lengths.cpu(), flags.longest, flags.overlong_buffer)
        kept = cispo.informative_groups(reward, flags.group_size).repeat_interleave(flags.group_size)
        for i in kept.nonzero()[:, 0].tolist():
            n = int(rollout.lengths[i])
            prompts.append(tokenizer.encode(problems[i // flags.group_size].prompt))
            responses.append(rollout.tokens[i, :n].tolist())
            learned.append(rollout.mask[i, :n].tolist())
            rewards.append(float(reward[i]))
            infer.append(rollout.logp[i][rollout.mask[i]])
        scores += new_scores
        lengths += rollout.lengths.tolist()
        rounds += 1
    seen = {
        "reward": mean(s.reward for s in scores),
        "correct": mean(s.correct for s in scores),
        "well_formed": mean(s.well_formed for s in scores),
        "fork_rate": mean(s.forked for s in scores),
        "length": mean(lengths),
        "groups": len(rewards) // flags.group_size,
        "sampled_groups": rounds * flags.prompts,
    }
    if seen["groups"] < flags.min_groups:
        return Experience(None, None, None, seen)
    return Experience(
        make_batch(prompts, responses, learned, model.device), torch.tensor(rewards), torch.cat(infer), seen
    )


def update(model, optimizer, experience, flags, lr):
    """Train on one step's experience: k minibatches of whole groups, one optimizer step each. Returns what to log.

    The old log-probs come from the same minibatches in the same mode as the new ones, so that at the first update the
    ratio is 1 to the last bit. The sampler's own log-probs only measure how far training and generation disagree.
    """
    batch, G = experience.batch, flags.group_size
    advantages = cispo.group_advantages(experience.rewards, G).to(model.device)
    groups = torch.arange(len(experience.rewards) // G)
    pieces = [
        slice(int(g[0]) * G, int(g[-1] + 1) * G)
        for g in groups.tensor_split(min(flags.updates_per_rollout, len(groups)))
    ]
    with torch.no_grad():
        old = [trained_logp(model, batch.rows(rows), flags.temperature, with_entropy=True)[0] for rows in pieces]
    logs = []
    for rows, (old_logp, _) in zip(pieces, old):
        part = batch.rows(rows)
        logp, aux = trained_logp(model, part, flags.temperature)
        loss, stats = cispo.policy_loss(
            logp,
            old_logp,
            advantages[rows, None].expand(part.trained.shape)[part.trained],
            cispo.token_weights(part.trained, flags.token_weights, G)[part.trained],
            algo=flags.algo, eps_low=flags.eps_low, eps_high=flags.eps_high,
            clip_low=flags.clip_low, clip_high=flags.clip_high,
        )  # fmt: skip
        (loss + model.config.router_aux_loss_coef * aux.router_loss).backward()
        grad_norm = optimizer_step(model, optimizer, lr, flags.max_grad_norm)
        busiest = float(aux.expert_load.max()) / model.config.num_experts_per_tok
        logs.append(
            {
                **stats,
                "loss": loss.item(),
                "grad_norm": grad_norm,
                "router_loss": aux.router_loss.item(),
                "busiest_expert": busiest,
            }
        )
    reduce = {"ratio_min": min, "ratio_max": max, "busiest_expert": max}
    train_logp, entropy = (torch.cat(x) for x in zip(*old))
    return {
        **{name: reduce.get(name, mean)([log[name] for log in logs]) for name in logs[0]},
        "updates": len(pieces),
        "entropy": float(entropy.mean()),
        "prob_corr": cispo.prob_correlation(
            train_logp, experience.infer_logp, torch.ones_like(train_logp, dtype=torch.bool)
        ),
        "logp_gap": float((train_logp - experience.infer_logp).abs().max()),
    }


# ============================================================================
# 6. The run
# ============================================================================

COLUMNS = [
    "step", "accuracy", "pass_k", "greedy", "eval_fork_rate", "eval_length",  # held-out; empty between evaluations
    "reward", "correct", "well_formed", "fork_rate", "length", "groups", "sampled_groups",  # rollouts
    "updates", "loss", "grad_norm", "lr", "entropy", "ratio_mean", "ratio_min", "ratio_max",
    "weight_clip_frac_high", "weight_clip_frac_low", "ppo_would_drop_frac", "kl_k1", "kl_k3", "ess",
    "prob_corr", "logp_gap", "router_loss", "busiest_expert", "seconds",
]  # fmt: skip


def new_folder(flags):
    """The folder of a new run. A given --out must be new or empty, so that no run is ever overwritten."""
    if flags.out:
        folder = Path(flags.out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out {folder} exists and is not empty; remove it or choose another name")
    else:
        number = 1
        while (folder := Path("runs") / f"{flags.preset}-{flags.algo}-{number:03d}").exists():
            number += 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_file(path, text):
    """Write a text file so that at any moment the old or the new content is there, never half of one."""
    draft = path.with_name(f".{path.name}.writing")
    draft.write_text(text)
    os.replace(draft, path)


def save_step(model, folder, step):
    """A checkpoint in the published layout; `latest` then names it."""
    save_pretrained(model, folder / f"step-{step:06d}")
    write_file(folder / "latest", f"step-{step:06d}\n")


def show_samples(model, tokenizer, flags, n=6):
    """A few held-out problems with one sampled response each, as text."""
    problems = tasks.draw(random.Random("held-out"), n, flags.task_names, flags.moves, held_out=True)
    rollout, scores = respond(model, tokenizer, problems, flags, substream(flags.seed, "samples"))
    rows = zip(problems, response_texts(tokenizer, rollout), scores)
    return "\n".join(f"  {p.prompt}{text:<30}  answer {p.answer}  reward {s.reward:.1f}" for p, text, s in rows)


def print_banner(flags, model, folder):
    """What is about to happen, before anything slow happens."""
    n = count_parameters(model.config)
    low, high = cispo.weight_range(flags.algo, flags.eps_low, flags.eps_high)
    drops = "tokens outside the trust region are dropped" if cispo.ALGORITHMS[flags.algo].masked else "no token dropped"
    step = f"{flags.prompts} prompts x {flags.group_size} responses, {flags.updates_per_rollout} updates"
    print(f"device    {model.device} ({torch.get_num_threads()} threads), fp32, torch {torch.__version__}")
    print(f"model     {flags.preset}: {n['total']:,} parameters, {n['active_with_head']:,} active per token")
    print("attention chunk, in PyTorch (the only fast form so far)")
    print(f"problems  {flags.task}, {flags.moves} moves; scored on {flags.eval_problems} held-out problems")
    print(f"loss      {flags.algo}: IS weight in {'[' if low else '('}{low:g}, {high:g}], {drops}")
    print(f"steps     {flags.steps}, each {step}")
    print(f"folder    {folder}")
    if dataclasses.replace(flags, seed=0, out=None, device="auto") == Flags(preset="tiny"):
        print("expect    1 to 3 minutes on two CPU cores, under 1 GB of memory")


def train(flags):
    """The whole run: cold start, RL, evaluation, files. Returns the summary."""
    start = time.perf_counter()
    device = pick_device(flags.device)
    flags = dataclasses.replace(flags, preset=flags.preset or ("tiny" if device == "cpu" else "small"))
    torch.manual_seed(flags.seed)
    if flags.init:
        model = load_pretrained(flags.init, device, torch.float32)
    else:
        model = MiniMaxM1(M1Config.preset(flags.preset, eos_token_id=EOS_ID, pad_token_id=PAD_ID)).to(device)
    tokenizer = Tokenizer.of(model.config)
    folder = new_folder(flags)
    write_file(folder / "run.json", json.dumps(describe(flags, model), indent=2) + "\n")
    print_banner(flags, model, folder)

    if not flags.init:
        learnt = cold_start(model, tokenizer, flags)
        print("cold start: {steps} steps, loss {loss:.3f}, forced chains right {skill:.2f}".format(**learnt))
        if learnt["skill"] < flags.sft_skill:
            print("warning: chains are not learnt, so RL will make responses longer, not right; raise --sft-steps")
    before = show_samples(model, tokenizer, flags)
    save_step(model, folder, 0)

    lr = flags.lr or 2e-4 * 64 / model.config.hidden_size
    optimizer, rng = make_optimizer(model, lr), random.Random(substream(flags.seed, "problems"))
    log = []
    with open(folder / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for step in tqdm(range(flags.steps + 1), desc="RL", unit="step", disable=None):
            clock, row = time.perf_counter(), {"step": step}
            if step > 0:
                row["lr"] = lr * min(step / max(flags.warmup, 1), 1)
                experience = collect(model, tokenizer, flags, rng, step)
                row.update(experience.seen)
                if experience.batch is not None:
                    row.update(update(model, optimizer, experience, flags, row["lr"]))
            if step % flags.eval_every == 0 or step == flags.steps:
                held_out = evaluate(model, tokenizer, flags)
                held_out["eval_fork_rate"], held_out["eval_length"] = held_out.pop("fork_rate"), held_out.pop("length")
                row.update(held_out)
            row["seconds"] = time.perf_counter() - clock
            writer.writerow({name: round(x, 6) if isinstance(x, float) else x for name, x in row.items()})
            file.flush()
            tqdm.write(step_line(row, flags))
            log.append(row)

    if flags.steps:
        save_step(model, folder, flags.steps)
    after = show_samples(model, tokenizer, flags)
    write_file(folder / "samples.txt", f"after the cold start\n{before}\n\nafter {flags.steps} RL steps\n{after}\n")
    draw_curves(log, folder / "curves.png", f"{flags.algo}, seed {flags.seed}")
    names = ("accuracy", "pass_k", "greedy", "eval_fork_rate", "eval_length")
    summary = {
        f"{n.removeprefix('eval_')}_{when}": row[n]
        for when, row in (("start", log[0]), ("end", log[-1]))
        for n in names
    }
    summary |= {"seconds": round(time.perf_counter() - start, 1), "seed": flags.seed, "steps": flags.steps}
    write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"held-out accuracy {summary['accuracy_start']:.3f} -> {summary['accuracy_end']:.3f}, ", end="")
    print(f"fork rate {summary['fork_rate_start']:.2f} -> {summary['fork_rate_end']:.2f}, ", end="")
    print(f"length {summary['length_start']:.1f} -> {summary['length_end']:.1f} tokens, {summary['seconds']:.0f} s")
    print(f"see {folder}/samples.txt and {folder}/curves.png")
    return summary


def describe(flags, model):
    """What run.json holds: enough to repeat the run."""
    return {
        "flags": dataclasses.asdict(flags),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": platform.platform(),
    }


def step_line(row, flags):
    """One aligned line per step."""
    line = f"step {row['step']:3d}/{flags.steps}"
    if row["step"]:
        line += "  correct {correct:.3f}  fork {fork_rate:.3f}  length {length:5.2f}  groups {groups:2d}".format(**row)
        if "loss" in row:
            line += (
                "  ratio {ratio_min:.2f}-{ratio_max:5.2f}  ppo drops {ppo_would_drop_frac:5.1%}  kl {kl_k3:.4f}".format(
                    **row
                )
            )
        else:
            line += f"  fewer than {flags.min_groups} groups: no update"
    if "accuracy" in row:
        line += "  | held-out {accuracy:.3f}  pass@{k} {pass_k:.3f}  greedy {greedy:.3f}".format(
            k=flags.eval_samples, **row
        )
    return f"{line}  {row['seconds']:.1f} s"


def draw_curves(log, path, title):
    """Accuracy, fork rate and response length over RL steps: the report's Figure 4 in miniature."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    panels = (
        ("accuracy", "correct", "accuracy"),
        ("eval_fork_rate", "fork_rate", "fork rate"),
        ("eval_length", "length", "response length, tokens"),
    )
    for axis, (held_out, rollout, label) in zip(axes, panels):
        for name, style, legend in ((rollout, "-", "rollouts"), (held_out, "o-", "held-out")):
            rows = [row for row in log if name in row]
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], style, ms=3, lw=1, label=legend)
        axis.set(xlabel="RL step", ylabel=label)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


EOS_ID, PAD_ID = Tokenizer.byte().eos_id, Tokenizer.byte().pad_id


@command_line
def main(argv=None):
    """Train, or score a finished run with --eval. Returns the summary."""
    flags = parse_flags(Flags, argv, __doc__.splitlines()[0])
    if not flags.eval:
        return train(flags)
    stored = Path(flags.eval) / "run.json"
    if stored.exists():  # the run's own settings, unless a flag says otherwise
        defaults = json.loads(stored.read_text())["flags"]
        flags = parse_flags(Flags, argv, __doc__.splitlines()[0], defaults)
    model = load_pretrained(flags.eval, pick_device(flags.device), torch.float32)
    scores = evaluate(model, Tokenizer.of(model.config), flags)
    print(f"{checkpoint_dir(flags.eval)}: " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return scores


if __name__ == "__main__":
    main()
