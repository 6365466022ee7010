"""Cold start, then CISPO: a small MiniMax-M1 learns to think before it answers.

    python train_rl.py                          the main job: a few minutes on two CPU cores
    python train_rl.py --resume runs/NAME       go on where a run stopped, to the same bits
    python train_rl.py --eval runs/NAME         score a finished run again
    python train_rl.py --help                   every flag

One RL step:
    problems -> sample.generate -> rewards -> cispo.group_advantages -> k times: log-probs -> cispo.policy_loss -> AdamW
Curriculum decides how long responses may be and how hard problems are, step by step.

    1. Flags                 Flags
    2. Data                  Batch, demonstrations
    3. Evaluation            evaluate, chain_skill
    4. Cold start            cold_start
    5. Reinforcement         Curriculum, filter_problems, collect, update
    6. The run folder        new_folder, save_checkpoint, reopen, is_it_normal
    7. The run               train, main

Dimension key: N sequences, L tokens of the longest, T trained tokens in one row after another.
"""

import csv
import dataclasses
import functools
import json
import math
import os
import pickle
import platform
import random
import shutil
import signal
import statistics
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import cispo
import tasks
from lightning_attn import choose_impl
from model import PRESETS, M1Config, MiniMaxM1, check_sums, checkpoint_dir, count_parameters, read_json
from model import check_flags, command_line, flag, load_pretrained, parse_flags, save_pretrained
from sample import Tokenizer, generate, left_pad, pick_device

# ============================================================================
# 1. Flags
# ============================================================================


@dataclass(frozen=True)
class Flags:
    """Every setting of a run. Defaults are the main job."""

    seed: int = flag(0, "same seed, same log on the same machine", "run")
    out: str = flag(None, "run folder; none = the next free runs/PRESET-ALGO-NNN", "run")
    device: str = flag(
        "auto", "auto = cpu for tiny, else a GPU if there is one", "run", choices=("auto", "cpu", "cuda")
    )
    eval: str = flag(None, "score this run or model directory and stop", "run")
    resume: str = flag(None, "go on with this run folder; --steps, --keep, --device and checkpoints may change", "run")
    checkpoint_every: int = flag(5, "RL steps between checkpoints", "run", at_least=1)
    checkpoint_minutes: float = flag(None, "a checkpoint also every so many minutes (ours)", "run", above=0)
    keep: int = flag(2, "newest checkpoints to keep, besides the one after the cold start", "run", at_least=1)

    preset: str = flag(None, "tiny, small or base; none = tiny, or the size of --init", "model", choices=tuple(PRESETS))
    softmax_every: int = flag(8, "every n-th layer has softmax attention: 1 = all, 0 = none", "model", at_least=0)
    init: str = flag(None, "start RL from this run or model directory instead of a cold start", "model")

    task: str = flag("mod,walk,cups", "tasks to mix evenly, separated by commas", "problems")
    moves: int = flag(6, "difficulty: steps per problem", "problems", at_least=1)
    min_moves: int = flag(
        None, "fewest steps per problem; they vary from this to --moves. none = all have --moves", "problems",
        at_least=1,
    )  # fmt: skip

    sft_steps: int = flag(2000, "most steps; it ends when chains are learnt", "cold start", at_least=1)
    sft_skill: float = flag(0.95, "learnt: this share of forced chains is right", "cold start", at_least=0, at_most=1)
    sft_batch: int = flag(48, "demonstrations per step", "cold start", at_least=1)
    sft_lr: float = flag(None, "learning rate; none = 3e-3 * 64 / model width", "cold start", above=0)
    fork_prior: float = flag(0.1, "how often demonstrations choose to think", "cold start", at_least=0, at_most=1)

    steps: int = flag(40, "RL steps; 0 stops after the cold start", "reinforcement", at_least=0)
    prompts: int = flag(32, "prompts per step", "reinforcement", at_least=1)
    group_size: int = flag(8, "G, responses per prompt, compared with each other", "reinforcement", at_least=2)
    updates_per_rollout: int = flag(4, "updates per batch of rollouts; the report's: 16", "reinforcement", at_least=1)
    lr: float = flag(None, "learning rate; none = 2e-4 * 64 / model width", "reinforcement", above=0)
    warmup: int = flag(5, "RL steps over which the learning rate rises", "reinforcement", at_least=0)
    temperature: float = flag(1.0, "of rollouts and of the log-probs trained on", "reinforcement", at_least=0.01)
    max_new_tokens: int = flag(None, "longest response; none = longest right one + 6", "reinforcement", at_least=1)
    repetition_stop: int = flag(
        3000, "tokens in a row of p > 0.99 that end a response; 0 = off (report sec. 3.2)", "reinforcement", at_least=0
    )
    min_groups: int = flag(4, "fewest prompts with unequal rewards that make an update", "reinforcement", at_least=1)
    resample: int = flag(
        2, "dynamic sampling (DAPO): how often to draw more prompts when there are too few", "reinforcement", at_least=0
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", "reinforcement", above=0)
    adam_eps: float = flag(1e-15, "of AdamW (report sec. 3.2: gradients go down to 1e-18)", "reinforcement", above=0)
    router_coef: float = flag(
        None, "weight of the experts' load-balancing loss, cold start included; none = the model's", "model", at_least=0
    )
    capacity: float = flag(
        None, "token drop in training, not in rollouts: an expert takes at most this many times an even load "
        "(MiniMax-01; its factor was not published); none = no drop", "model", above=0,
    )  # fmt: skip
    head: str = flag("fp32", "output head; bf16 shows why not (report Fig. 3)", "model", choices=("fp32", "bf16"))

    algo: str = flag("cispo", "which loss", "loss", choices=tuple(cispo.ALGORITHMS))
    eps_high: float = flag(
        4.0, "cispo, unified: the ratio is capped at 1 + this (report eq. 5; its value was not published); "
        "none = no cap", "loss", optional=True,
    )  # fmt: skip
    eps_low: float = flag(None, "cispo, unified: the ratio is at least 1 - this; none = no lower bound", "loss")
    clip_low: float = flag(
        0.2, "dapo, unified, grpo (on both sides): trust region below 1; others only log it", "loss", at_least=0
    )
    clip_high: float = flag(0.28, "dapo, unified: trust region above 1 (DAPO)", "loss", at_least=0)
    token_weights: str = flag(
        "batch", "normaliser: one mean over the batch (DAPO), over each group (report eq. 4), over each response "
        "(GRPO), or batch and response combined (report sec. 5)", "loss", choices=cispo.WEIGHT_MODES,
    )  # fmt: skip
    overlong_buffer: int = flag(
        0,
        "soft penalty over the last so many tokens of a response (DAPO, report sec. 3.1); 0 = off",
        "loss",
        at_least=0,
    )
    truncated: str = flag(
        "score", "a response cut by its length: score = earns nothing; mask = carries no loss, its reward still counts "
        "(DAPO's overlong filtering); penalise = earns 1 less (ours)", "loss", choices=("score", "mask", "penalise"),
    )  # fmt: skip

    windows: str = flag(None, "longest response in tokens, in stages such as 40,48,56 (report sec. 5)", "curriculum")
    jump_at: int = flag(
        None,
        "the control, without the rule: at this RL step from the first window to the last (ours)",
        "curriculum",
        at_least=2,
    )
    window_decay: float = flag(
        1.0, "each new window multiplies max_grad_norm and eps_high (report sec. 5)", "curriculum", above=0, at_most=1
    )
    max_moves: int = flag(
        None, "moves rise to this as rollouts get right (report sec. 4); the cold start has all", "curriculum",
        at_least=1,
    )  # fmt: skip
    filter_problems: int = flag(
        0,
        "draw so many problems before RL and train on those right in 1 to 8 of 10 tries; 0 = off (report sec. 4)",
        "curriculum",
        at_least=0,
    )

    eval_every: int = flag(5, "RL steps between evaluations", "evaluation", at_least=1)
    eval_problems: int = flag(300, "held-out problems", "evaluation", at_least=1)
    eval_samples: int = flag(8, "responses to each, for pass@1 and pass@k", "evaluation", at_least=1)

    def __post_init__(self):
        """Refuse what cannot work before anything is written or computed."""
        check_flags(self)
        cispo.weight_range(self.algo, self.eps_low, self.eps_high)
        limits = self.window_limits
        refused = {
            "--init brings its own model size: leave out --preset": self.init and self.preset,
            f"--windows must be rising numbers of tokens such as 40,48,56, found {self.windows!r}":
                self.windows is not None and not (limits and [0, *limits] == sorted({0, *limits})),
            f"overlong_buffer {self.overlong_buffer} is more than the first of windows {self.windows}; lower it":
                limits and limits[0] < self.overlong_buffer,
            "--windows sets the longest response: leave out --max-new-tokens": limits and self.max_new_tokens,
            "--jump-at and --window-decay need --windows": not limits and (self.jump_at or self.window_decay < 1),
            f"--moves {self.moves} is more than --max-moves {self.max_moves}":
                self.max_moves and self.max_moves < self.moves,
            f"--min-moves {self.min_moves} is more than --moves {self.moves}":
                self.min_moves and self.min_moves > self.moves,
            "--filter-problems is for one difficulty: leave out --max-moves": self.filter_problems and self.max_moves,
            "--truncated penalise and --overlong-buffer lower the same rewards: leave out one":
                self.truncated == "penalise" and self.overlong_buffer,
        }  # fmt: skip
        for message, applies in refused.items():
            if applies:
                raise ValueError(message)
        if self.max_moves:
            self.draw(random.Random(0), len(self.task_names), self.max_moves)  # or says why not
        for a, b in (("prompts", "updates_per_rollout"), ("prompts", "min_groups"), ("longest", "overlong_buffer")):
            if getattr(self, a) < getattr(self, b):
                raise ValueError(f"{b} {getattr(self, b)} is more than there are {a}, {getattr(self, a)}; lower it")

    @property
    def task_names(self):
        """The tasks as a list."""
        return [name.strip() for name in self.task.split(",")]

    @functools.cached_property
    def held_out(self):
        """The problems of every evaluation, the same for all seeds."""
        return self.draw(random.Random("held-out"), self.eval_problems, held_out=True)

    def draw(self, rng, n, moves=None, held_out=False):
        """n problems of this run, or as hard as `moves` says. rng: random.Random."""
        return tasks.draw(rng, n, self.task_names, moves or self.moves, self.min_moves, held_out)

    @functools.cached_property
    def window_limits(self):
        """--windows as a list of tokens; empty without windows, or where one is no number."""
        parts = (self.windows or "").split(",")
        return [int(part) for part in parts] if all(part.strip().isdecimal() for part in parts) else []

    @functools.cached_property
    def longest(self):
        """Longest response in tokens."""
        if self.window_limits:
            return self.window_limits[-1]  # of the run as a whole, and so of its evaluations
        hardest = tasks.draw(random.Random(0), len(self.task_names), self.task_names, self.moves)
        worked = max(len((p.chain + p.answer).encode()) for p in self.held_out + hardest) + 3  # fork, </think>, end
        return worked + 6 if self.max_new_tokens is None else self.max_new_tokens


def substream(seed, *names):
    """A seed of its own for every use of randomness, so that changing one leaves the others alone."""
    return zlib.crc32(repr((seed, *names)).encode())


# ============================================================================
# 2. Data
# ============================================================================


class Batch(NamedTuple):
    """Prompts with their responses, padded on the left."""

    tokens: torch.Tensor  # (N, L) int64
    mask: torch.Tensor  # (N, L) bool: real tokens
    trained: torch.Tensor  # (N, L - 1) bool: entry t says whether the prediction of tokens[:, t + 1] carries loss

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
    moves = rng.randint(flags.moves, flags.max_moves) if flags.max_moves else flags.moves
    problems = flags.draw(rng, n, moves)
    texts = [tasks.demonstration(p, rng, flags.fork_prior) for p in problems]
    prompts = [tokenizer.encode(p.prompt) for p in problems]
    responses = [[*tokenizer.encode(text, specials=True), tokenizer.eos_id] for text, _ in texts]
    learned = [[i >= skip for i in range(len(r))] for r, (_, skip) in zip(responses, texts)]
    return make_batch(prompts, responses, learned, device)


# ============================================================================
# 3. Evaluation
# ============================================================================


def respond(model, tokenizer, problems, flags, seed, group_size=1, temperature=1.0, think_budget=None):
    """Responses to problems and their scores: (Rollout, [Score] * N). Where a verifier raises, the score is CRASHED."""
    rollout = generate(
        model, [tokenizer.encode(p.prompt) for p in problems], **tokenizer.ids(), group_size=group_size, seed=seed,
        max_new_tokens=flags.longest, temperature=temperature, think_budget=think_budget,
        repetition_stop=flags.repetition_stop or math.inf,
    )  # fmt: skip
    scores = []
    for i, text in enumerate(response_texts(tokenizer, rollout)):
        closed = int((rollout.tokens[i] == tokenizer.think_end_id).sum())
        spelled = text.count(tasks.THINK_END) != closed  # byte by byte it is not the token, and no budget would see it
        ended = rollout.ended[i] in ("eos", "budget") and not spelled
        problem = problems[i // group_size]
        try:
            scores.append(tasks.score(problem, text, ended))
        except Exception as error:  # a verifier's bug costs this reward, not the run
            tqdm.write(f"the verifier crashed on {problem.prompt!r} ({problem.task}), which earns nothing: {error!r}")
            scores.append(CRASHED)
    return rollout, scores


CRASHED = tasks.Score(0.0, False, False, False)  # told from an equal score by its identity


def response_texts(tokenizer, rollout):
    """The N response texts, without the end token."""
    rows = (row[:n] for row, n in zip(rollout.tokens.tolist(), rollout.lengths.tolist()))
    return [tokenizer.decode([i for i in row if i != tokenizer.eos_id]) for row in rows]


def score_samples(model, tokenizer, problems, flags, name, n=1, temperature=1.0):
    """n responses to each problem, problem after problem: ([Score], [length in tokens]). `name` seeds the sampling."""
    scores, lengths = [], []
    for start in range(0, len(problems), 64):  # in pieces: larger batches fall out of a CPU's cache
        seed, piece = substream(flags.seed, name, start), problems[start : start + 64]
        rollout, new_scores = respond(model, tokenizer, piece, flags, seed, n, temperature)
        scores += new_scores
        lengths += rollout.lengths.tolist()
    return scores, lengths


def evaluate(model, tokenizer, flags):
    """Score a model on held-out problems, the same for every seed.

    accuracy = pass@1: the mean over eval_samples responses at temperature 1 to each problem; pass_k: at least one of
    them is right; greedy: the likeliest response is; eval_fork_rate and eval_length (tokens): of those responses.
    """
    k = flags.eval_samples
    scores, lengths = score_samples(model, tokenizer, flags.held_out, flags, "eval", k)
    greedy, _ = score_samples(model, tokenizer, flags.held_out, flags, "greedy", temperature=0)
    correct = [s.correct for s in scores]
    return {
        "accuracy": mean(correct),
        "pass_k": mean(any(correct[i : i + k]) for i in range(0, len(correct), k)),
        "greedy": mean(s.correct for s in greedy),
        "eval_fork_rate": mean(s.forked for s in scores),
        "eval_length": mean(lengths),
    }


def mean(values):
    """Mean of any iterable of numbers."""
    values = list(values)
    return sum(values) / len(values)


def chain_skill(model, tokenizer, flags, n=96):
    """Share of training problems, the hardest of a run, solved when the fork is set and the likeliest chain follows."""
    flags = dataclasses.replace(flags, moves=flags.max_moves or flags.moves, max_moves=None, min_moves=None)
    problems = flags.draw(random.Random("skill"), n)
    forced = [dataclasses.replace(p, prompt=p.prompt + tasks.FORK) for p in problems]
    return mean(s.correct for s in respond(model, tokenizer, forced, flags, 0, temperature=0)[1])


# ============================================================================
# 4. Cold start
# ============================================================================


def make_optimizer(model, lr, eps=1e-15):
    """AdamW as in the report (sec. 3.2): gradients go down to 1e-18, and an eps of 1e-8 would swallow them."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.0, fused=True)


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
            if bar.disable:  # no terminal
                print(f"cold start step {step}  loss {loss.item():.3f}  forced chains right {skill:.2f}", flush=True)
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


@dataclass
class Curriculum:
    """What changes as a run learns: how long responses may be, how hard problems are, which of them there are.

    Windows (report sec. 5): a run moves to the next one after a step at which both hold (n = STEPS),
      - the outputs' perplexity has converged: in this window, its mean over the last n steps differs by at most
        CONVERGED, relatively, from its mean over the n steps before;
      - their length nears the limit: its 99th percentile in this step is at least NEAR times the window.
    --jump-at takes the place of this rule. Window number w = 0, 1, ... scales clipping by window_decay ** w.
    Moves (report sec. 4): one more after n steps at this difficulty in which on average EASY responses were right. The
    longest response follows unless --windows or --max-new-tokens fixes it.
    Evaluations know none of this: they keep the run's held-out problems and longest response. The numbers are ours.
    """

    STEPS, CONVERGED, NEAR, EASY = 5, 0.02, 0.9, 0.8

    flags: Flags
    window: int = 0
    extra_moves: int = 0
    perplexity: list = dataclasses.field(default_factory=list)  # the last 2 n steps' in this window
    correct: list = dataclasses.field(default_factory=list)  # the last n steps' at this difficulty
    kept: list = None  # what filter_problems returned

    @property
    def state(self):
        """What a checkpoint holds: Curriculum(flags, **state) goes on from there."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}

    @property
    def now(self):
        """The flags of the coming step: the run's own at this window and difficulty."""
        flags, limits = self.flags, self.flags.window_limits
        if not (limits or self.extra_moves):
            return flags
        scale = flags.window_decay**self.window
        return dataclasses.replace(
            flags, windows=None, jump_at=None, window_decay=1.0, max_moves=None, moves=flags.moves + self.extra_moves,
            max_new_tokens=limits[self.window] if limits else flags.max_new_tokens,
            max_grad_norm=flags.max_grad_norm * scale, eps_high=flags.eps_high and flags.eps_high * scale,
        )  # fmt: skip

    @functools.cached_property
    def pool(self):
        """The list of problems that RL draws from, None without --filter-problems."""
        return self.kept and [p for p, keep in zip(candidates(self.flags), self.kept) if keep]

    def observe(self, step, seen):
        """Take in what was seen in a step's rollouts (see collect), once per step, and decide about the next step."""
        flags, n, last = self.flags, self.STEPS, len(self.flags.window_limits) - 1
        self.perplexity = [*self.perplexity, seen["perplexity"]][-2 * n :]
        self.correct = [*self.correct, seen["correct"]][-n:]
        if flags.jump_at:
            self.window = last if step + 1 >= flags.jump_at else 0
        elif self.window < last and len(self.perplexity) == 2 * n:
            converged = abs(mean(self.perplexity[n:]) / mean(self.perplexity[:n]) - 1) <= self.CONVERGED
            if converged and seen["length_p99"] >= self.NEAR * flags.window_limits[self.window]:
                self.window, self.perplexity = self.window + 1, []
        room = (flags.max_moves or 0) - flags.moves - self.extra_moves
        if room > 0 and len(self.correct) == n and mean(self.correct) >= self.EASY:
            self.extra_moves, self.correct = self.extra_moves + 1, []


def candidates(flags):
    """The --filter-problems training problems that are tried, the same ones whenever asked."""
    return flags.draw(random.Random(substream(flags.seed, "filter")), flags.filter_problems)


def filter_problems(model, tokenizer, flags):
    """Which candidates to train on, a list of bools: 1 to 8 of 10 responses of this model are right (report sec. 4).

    Prints how many are kept and dropped; raises ValueError when none is kept.
    """
    scores, _ = score_samples(model, tokenizer, candidates(flags), flags, "filter", 10, flags.temperature)
    right = [sum(s.correct for s in scores[i : i + 10]) for i in range(0, len(scores), 10)]
    kept, easy = [0 < n < 9 for n in right], sum(n >= 9 for n in right)
    print(f"filter: {len(kept)} problems, {sum(kept)} kept, {right.count(0)} never right, {easy} too easy", flush=True)
    if not any(kept):
        raise ValueError("--filter-problems keeps none; take more of them or another --moves")
    return kept


class Experience(NamedTuple):
    """The groups kept from one step's rollouts and what was seen in all of them."""

    batch: Batch  # N = kept groups x G sequences
    rewards: torch.Tensor  # (N,) fp32
    infer_logp: torch.Tensor  # (T,) log-probs that the sampler recorded for the trained tokens
    seen: dict  # means over everything sampled, dropped groups included


def collect(model, tokenizer, flags, step, pool=None):
    """Sample groups of responses, score them and keep the groups with unequal rewards (dynamic sampling, DAPO).

    More prompts are drawn while fewer than min_groups are kept, at most `resample` times. Returns an Experience, or
    one whose batch is None when even then there are too few. Problems come from the list `pool`, None = new ones.
    """
    start, rollout_s, rows = time.perf_counter(), 0.0, []  # rows: the sequences kept
    scores, lengths, all_rewards, all_logp = [], [], [], []  # of everything sampled
    rng = random.Random(substream(flags.seed, "problems", step))
    for attempt in range(1 + flags.resample):
        problems = rng.choices(pool, k=flags.prompts) if pool else flags.draw(rng, flags.prompts)
        seed = substream(flags.seed, "rollout", step, attempt)
        rollout, new_scores = respond(model, tokenizer, problems, flags, seed, flags.group_size, flags.temperature)
        reward = torch.tensor([s.reward for s in new_scores])
        if flags.overlong_buffer:
            reward += cispo.overlong_penalty(rollout.lengths.cpu(), flags.longest, flags.overlong_buffer)
        cut = torch.tensor([why == "length" for why in rollout.ended])
        reward -= (cut & (flags.truncated == "penalise")).float()
        learn = rollout.mask & ~(cut & (flags.truncated == "mask")).to(rollout.mask.device)[:, None]
        kept = cispo.informative_groups(reward, flags.group_size).repeat_interleave(flags.group_size)
        for i in kept.nonzero()[:, 0].tolist():
            prompt, n = tokenizer.encode(problems[i // flags.group_size].prompt), int(rollout.lengths[i])
            response, learned = rollout.tokens[i, :n].tolist(), learn[i, :n].tolist()
            rows.append((prompt, response, learned, float(reward[i]), rollout.logp[i][learn[i]]))
        scores += new_scores
        all_rewards += reward.tolist()
        lengths += rollout.lengths.tolist()
        all_logp.append(rollout.logp[rollout.mask])
        rollout_s += rollout.seconds
        if len(rows) >= flags.min_groups * flags.group_size:
            break
    seen = {
        "reward": mean(all_rewards),
        "correct": mean(s.correct for s in scores),
        "well_formed": mean(s.well_formed for s in scores),
        "fork_rate": mean(s.forked for s in scores),
        "length": mean(lengths),
        "length_p99": sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1],
        "perplexity": math.exp(-float(torch.cat(all_logp).mean())),
        "window": flags.longest,
        "moves": flags.moves,
        "crashes": sum(s is CRASHED for s in scores),
        "groups": len(rows) // flags.group_size,
        "sampled_groups": len(scores) // flags.group_size,
        "rollout_s": rollout_s,
        "reward_s": time.perf_counter() - start - rollout_s,
    }
    if seen["groups"] < flags.min_groups:
        return Experience(None, None, None, seen)
    prompts, responses, learned, rewards, infer_logp = zip(*rows)
    batch = make_batch(prompts, responses, learned, model.device)
    return Experience(batch, torch.tensor(rewards), torch.cat(infer_logp), seen)


CAPACITY = 1.25  # times an even load: what is logged as beyond an expert's capacity where --capacity names none


def minibatches(experience, flags):
    """Which rows each update trains on, k slices of whole groups."""
    groups = torch.arange(len(experience.rewards) // flags.group_size)
    parts = groups.tensor_split(min(flags.updates_per_rollout, len(groups)))
    return [slice(int(part[0]) * flags.group_size, int(part[-1] + 1) * flags.group_size) for part in parts]


def updates(model, optimizer, experience, flags, lr):
    """Train on one step's experience: k minibatches of whole groups, one optimizer step each, so that every response is
    trained on once. Fewer than k where fewer groups are kept. Yields after each update.

    The old log-probs come from the same minibatches in the same mode as the new ones; the first minibatch has them from
    its own update's pass, so the ratio is 1 to the last bit there. The sampler's own log-probs only measure how far
    training and generation disagree.
    Yields (what to log of this update, [(token id, its old probability, its ratio) that PPO's clip drops]).
    """
    batch, G = experience.batch, flags.group_size
    advantages = cispo.group_advantages(experience.rewards, G).to(model.device)
    pieces = minibatches(experience, flags)
    first, aux = trained_logp(model, batch.rows(pieces[0]), flags.temperature, with_entropy=True)
    logp, old = first[0], [[x.detach() for x in first]]
    with torch.no_grad():
        old += [trained_logp(model, batch.rows(rows), flags.temperature, with_entropy=True)[0] for rows in pieces[1:]]
    train_logp, entropy = (torch.cat(x) for x in zip(*old))
    gap = (train_logp - experience.infer_logp).abs()
    seen = {
        "entropy": float(entropy.mean()),
        "prob_corr": cispo.prob_correlation(train_logp, experience.infer_logp),
        "logp_gap": float(gap.max()),
        "logp_gap_mean": float(gap.mean()),
    }
    late = batch.trained.cumsum(1) > flags.longest / 2  # half of the allowed length, not of the response's own
    for half, here in (("early", batch.trained & ~late), ("late", batch.trained & late)):
        size = advantages.abs() * here.sum(1)
        if total := float(size.sum()):
            seen[f"negative_{half}"] = float(size[advantages < 0].sum()) / total
    for rows, (old_logp, _) in zip(pieces, old):
        part = batch.rows(rows)
        if rows is not pieces[0]:
            logp, aux = trained_logp(model, part, flags.temperature)
        advantage = advantages[rows, None].expand(part.trained.shape)[part.trained]
        loss, stats = cispo.policy_loss(
            logp, old_logp, advantage, cispo.token_weights(part.trained, flags.token_weights, G)[part.trained],
            algo=flags.algo, eps_low=flags.eps_low, eps_high=flags.eps_high,
            clip_low=flags.clip_low, clip_high=flags.clip_high,
        )  # fmt: skip
        (loss + model.config.router_aux_loss_coef * aux.router_loss).backward()
        grad_norm = optimizer_step(model, optimizer, lr, flags.max_grad_norm)
        ratio = (logp.detach() - old_logp).exp()
        drops = cispo.outside_trust_region(ratio, advantage, flags.algo, flags.clip_low, flags.clip_high)
        stats |= {"loss": loss.item(), "grad_norm": grad_norm, "router_loss": aux.router_loss.item()}
        load = aux.expert_load / model.config.num_experts_per_tok  # (layers, E), a row sums to 1
        stats["busiest_expert"] = float(load.max())
        capacity = (flags.capacity or CAPACITY) / load.shape[1]
        stats["over_capacity"] = float((load - capacity).clamp(min=0).sum(1).mean())
        tokens = part.tokens[:, 1:][part.trained]
        yield stats | seen, list(zip(*(x[drops].tolist() for x in (tokens, old_logp.exp(), ratio))))


def update(model, optimizer, experience, flags, lr):
    """All updates of one step. Returns (what to log, the tokens that PPO's clip would have dropped), see updates."""
    logs, drops = zip(*updates(model, optimizer, experience, flags, lr))
    reduce = {"ratio_min": min, "ratio_max": max, "busiest_expert": max}
    row = {name: reduce.get(name, mean)([log[name] for log in logs]) for name in logs[0]}
    return row | {"updates": len(logs)}, [token for drop in drops for token in drop]


# ============================================================================
# 6. The run folder
# ============================================================================

COLUMNS = [
    # on held-out problems, empty between evaluations: see evaluate
    "step", "accuracy", "pass_k", "greedy", "eval_fork_rate", "eval_length",
    # means over this step's rollouts; length in tokens; groups = prompts with unequal rewards, of sampled_groups
    "reward", "correct", "well_formed", "fork_rate", "length", "groups", "sampled_groups",
    # the updates; entropy in nats per token, grad_norm before clipping
    "updates", "loss", "grad_norm", "lr", "entropy",
    # see cispo.policy_loss: means over the updates, extremes for ratio_min and ratio_max
    "ratio_mean", "ratio_min", "ratio_max", "weight_clip_frac_high", "weight_clip_frac_low", "ppo_would_drop_frac",
    "kl_k1", "kl_k3", "ess",
    # training against rollout: correlation of probabilities, largest and mean difference of log-probs
    "prob_corr", "logp_gap", "logp_gap_mean",
    # negative gradient by position: share of sum |A| over tokens that is negative, in either half of the response
    # allowed; late in a window long wrong answers pile it up on the tail (report sec. 5)
    "negative_early", "negative_late",
    # see Curriculum: longest response allowed and 99th percentile of lengths, tokens; exp of minus the mean log-prob of
    # all sampled tokens; steps per problem. Responses whose verifier crashed
    "window", "length_p99", "perplexity", "moves", "crashes",
    # experts: load-balancing loss (2 = balanced), share of choices that the busiest one got, share that is beyond
    # --capacity (or CAPACITY) times an even load, which a token drop drops
    "router_loss", "busiest_expert", "over_capacity",
    # seconds of the step, and of its parts
    "seconds", "rollout_s", "reward_s", "update_s", "eval_s",
]  # fmt: skip
DROPPED = ["step", "token", "rose", "count", "probability", "ratio"]  # probability before the updates; means


def new_folder(flags):
    """The folder of a new run. A given --out must be new or empty, so that no run is ever overwritten."""
    if flags.out:
        folder = Path(flags.out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out {folder} exists and is not empty; remove it or choose another name")
    else:
        number = 1
        while (folder := Path("runs") / f"{flags.preset or 'init'}-{flags.algo}-{number:03d}").exists():
            number += 1
    folder.mkdir(parents=True, exist_ok=bool(flags.out))
    return folder


def write_file(path, text):
    """Write a text file so that at any moment the old or the new content is there, never half of one."""
    draft = path.with_name(f".{path.name}.writing")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def save_checkpoint(model, optimizer, curriculum, folder, step, keep, seconds):
    """Model (published layout), optimizer and curriculum as one new directory; `latest` then names it; older ones go.

    Nothing else needs saving: every random draw comes from a seed of its own (substream), never from what ran before.
    """
    name = f"step-{step:06d}"
    state = {"step": step, "seconds": seconds, "optimizer": optimizer.state_dict(), "curriculum": curriculum.state}
    save_pretrained(model, folder / name, trainer_state=state)
    write_file(folder / "latest", name + "\n")
    for old in sorted(folder.glob("step-*"))[1:-keep]:  # the first is the cold start's
        shutil.rmtree(old)


def reopen(folder, optimizer, device, last_step):
    """Make a run folder what it was at its newest checkpoint: its step, the seconds run, the state of its Curriculum.

    Loads the optimizer, then cuts log.csv and dropped.csv back and removes what was being written when the run stopped.
    Changes nothing when the checkpoint or one of these files is damaged, or the checkpoint beyond last_step.
    """
    checkpoint = checkpoint_dir(folder)
    trainer = checkpoint / "trainer.pt"
    check_sums(checkpoint, [trainer.name])
    try:
        state = torch.load(trainer, map_location=device, weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, curriculum = int(state["step"]), float(state["seconds"]), dict(state["curriculum"])
    except (pickle.UnpicklingError, RuntimeError, LookupError, EOFError, ValueError, TypeError, AttributeError):
        raise ValueError(f"{trainer} is damaged; point {folder}/latest at an older checkpoint") from None
    if step > last_step:
        raise ValueError(f"{checkpoint} is already past --steps {last_step}; give --steps {step} or more")
    cut = {}
    for file in ("log.csv", "dropped.csv"):
        header, *lines = (folder / file).read_text().splitlines(keepends=True) or [""]
        try:
            kept = [line for line in lines if int(line.partition(",")[0]) <= step and line.endswith("\n")]
        except ValueError:
            where = f"{folder / file} has a line that does not begin with its step"
            raise ValueError(f"{where}; mend or remove it") from None
        cut[folder / file] = header + "".join(kept)
    newer = [other for other in folder.glob("step-*") if other.name > f"step-{step:06d}"]
    for leftover in [*folder.glob(".*.writing*"), *newer]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for path, text in cut.items():
        write_file(path, text)
    return step, seconds, curriculum


def read_log(path):
    """log.csv as one dict of numbers per step; what was not measured is absent."""
    with open(path, newline="") as file:
        return [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]


CURVES = {  # column on held-out problems: (the same in rollouts, label)
    "accuracy": ("correct", "held-out accuracy (pass@1)"),
    "eval_fork_rate": ("fork_rate", "fork rate: thinks first"),
    "eval_length": ("length", "response length, tokens"),
}


def reference_band(column, at_least):
    """{step: (low, high)}: where a further run of the main job falls with 95 % probability, from the committed seeds.

    mean +- t s sqrt(1 + 1/n) with n seeds and their standard deviation s, taken as at_least where they hardly differ.
    """
    logs = [read_log(file) for file in sorted((Path(__file__).parent / "figures").glob("main-seed*.csv"))]
    values = {row["step"]: [log[int(row["step"])][column] for log in logs] for row in logs[0] if column in row}
    t = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}[len(logs)]  # Student's t at 97.5 %, n - 1 degrees of freedom
    band = {}
    for step, x in values.items():
        spread = t * math.sqrt(1 + 1 / len(x)) * max(statistics.stdev(x), at_least)
        band[step] = (mean(x) - spread, mean(x) + spread)
    return band


def is_it_normal(log, bands):
    """One line: at how many evaluations each quantity lay inside its reference band. Inside = at 4 of 5 or more."""
    verdicts, normal = [], True
    for column, band in bands.items():
        points = [(row[column], *band[row["step"]]) for row in log if column in row and row["step"] in band]
        inside = [low <= value <= high for value, low, high in points]
        normal &= mean(inside) >= 0.8
        verdicts.append(f"{column} {sum(inside)}/{len(inside)}")
    where = "inside" if normal else "OUTSIDE"
    return f"is it normal? {where} the band of the reference seeds: {', '.join(verdicts)} evaluations inside"


def pyplot():
    """matplotlib without a screen; imported late, so that nothing waits for it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_curves(log, path, title, bands):
    """Accuracy, fork rate and response length over RL steps: the report's Figure 4 in miniature."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axis, (held_out, (rollout, label)) in zip(axes, CURVES.items()):
        if band := bands.get(held_out):
            low, high = zip(*band.values())
            axis.fill_between(list(band), low, high, alpha=0.15, lw=0, color="gray", label="other seeds, 95 %")
        for column, style, legend in ((rollout, "-", "rollouts"), (held_out, "o-", "held-out")):
            rows = [row for row in log if column in row]
            axis.plot([row["step"] for row in rows], [row[column] for row in rows], style, ms=3, lw=1, label=legend)
        axis.set(xlabel="RL step", ylabel=label)
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def describe(flags, model):
    """What run.json holds: enough to repeat the run."""
    return {
        "flags": dataclasses.asdict(dataclasses.replace(flags, out=None, resume=None, eval=None)),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": platform.platform(),
    }


def show_samples(model, tokenizer, flags, n=6):
    """A few held-out problems with one sampled response each, as text."""
    problems = flags.held_out[:n]
    rollout, scores = respond(model, tokenizer, problems, flags, substream(flags.seed, "samples"))
    rows = zip(problems, response_texts(tokenizer, rollout), scores)
    return "".join(f"  {p.prompt}{text:<30}  answer {p.answer}  reward {s.reward:.1f}\n" for p, text, s in rows)


def summarize_drops(drops, tokenizer, step):
    """[(token id, probability, ratio)] -> rows of dropped.csv, the token dropped most often first.

    rose: the token was wanted (A > 0) and had risen above the trust region; otherwise unwanted and below it.
    """
    groups = {}
    for token, probability, ratio in drops:
        groups.setdefault((token, ratio > 1), []).append((probability, ratio))
    rows = []
    for (token, rose), seen in sorted(groups.items(), key=lambda item: -len(item[1])):
        probability, ratio = (f"{mean(x):.3g}" for x in zip(*seen))
        text = tokenizer.decode([token])
        text = f"<{token}>" if "\ufffd" in text else json.dumps(text)  # half of a character
        rows.append(dict(zip(DROPPED, (step, text, "yes" if rose else "no", len(seen), probability, ratio))))
    return rows


def show_drops(path, n=8):
    """The n tokens that PPO's clip would have dropped most often, from dropped.csv, as text."""
    groups = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault((row["token"], row["rose"]), []).append([float(row[x]) for x in DROPPED[3:]])
    text = "\ntokens that PPO's clip would have dropped (probability and ratio: means)\n"
    for (token, rose), seen in sorted(groups.items(), key=lambda item: -sum(x[0] for x in item[1]))[:n]:
        count = sum(x[0] for x in seen)
        p, r = (sum(x[0] * x[i] for x in seen) / count for i in (1, 2))
        why = "wanted, had risen" if rose == "yes" else "unwanted, had fallen"
        text += f"  {token:<12} {count:6.0f} times  probability {p:.3f}  ratio {r:.2f}  {why}\n"
    return text if groups else text + "  none\n"


# ============================================================================
# 7. The run
# ============================================================================


def print_banner(flags, model, folder):
    """What is about to happen, before anything slow happens."""
    low, high = cispo.weight_range(flags.algo, flags.eps_low, flags.eps_high)
    drops = "tokens outside the trust region are dropped" if cispo.ALGORITHMS[flags.algo].masked else "no token dropped"
    print(f"device    {model.device} ({torch.get_num_threads()} threads), fp32, torch {torch.__version__}")
    size = "{total:,} parameters, {active_with_head:,} active per token".format(**count_parameters(model.config))
    print(f"model     {flags.preset or flags.init}: {size}")
    head = torch.empty(model.config.head_dim, device=model.device, dtype=model.dtype)
    print("attention impl={}: {}".format(*choose_impl(head, head)))
    moves = "-".join(str(n) for n in (flags.min_moves, flags.moves) if n)
    print(f"problems  {flags.task}, {moves} moves; scored on {flags.eval_problems} held-out problems")
    print(f"loss      {flags.algo}: IS weight in {'[' if low else '('}{low:g}, {high:g}], {drops}")
    step = f"{flags.prompts} prompts x {flags.group_size} responses, {flags.updates_per_rollout} updates"
    print(f"steps     {flags.steps}, each {step}")
    print(f"folder    {folder}")
    if dataclasses.replace(flags, seed=0, out=None, device="auto") == Flags(preset="tiny"):
        print("expect    1 to 3 minutes on two idle CPU cores, under 1 GB of memory", flush=True)


def step_line(row, flags, drops=()):
    """One aligned line per step; after `ppo drops` the tokens it would drop most often."""
    line = f"step {row['step']:3d}/{flags.steps}"
    if row["step"]:
        line += "  correct {correct:.3f}  fork {fork_rate:.3f}  length {length:5.2f}  groups {groups:2d}".format(**row)
    if "loss" in row:
        line += "  ratio {ratio_min:.2f}-{ratio_max:5.2f}  ppo drops {ppo_would_drop_frac:5.1%}".format(**row)
        line += " {:<14}".format(" ".join("{token} x{count}".format(**drop) for drop in drops[:2]))
    elif row["step"]:
        line += f"  fewer than {flags.min_groups} groups: no update"
    if "accuracy" in row:
        line += "  | held-out {accuracy:.3f}  pass@k {pass_k:.3f}  greedy {greedy:.3f}".format(**row)
    if row["step"] and (flags.windows or flags.max_moves):
        line += "  window {window} moves {moves}".format(**row)
    return f"{line}  {row['seconds']:.1f} s"


class StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a wish: the current step is finished and saved first. The next kills."""

    def __enter__(self):
        self.made, self.handlers = False, {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.made:
            raise KeyboardInterrupt
        self.made = True
        tqdm.write("stopping after this step (again: at once)")

    def __exit__(self, *_):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def choose_device(flags, stored=None):
    """--device, where auto means the CPU for `tiny`, whose operations are too small for a GPU. stored: a checkpoint."""
    width = M1Config.from_json(checkpoint_dir(stored)).hidden_size if stored else PRESETS[flags.preset]["hidden_size"]
    tiny = width <= PRESETS["tiny"]["hidden_size"]
    return "cpu" if tiny and flags.device == "auto" else pick_device(flags.device)


def new_model(flags):
    """An untrained model of --preset and --softmax-every that speaks bytes."""
    byte, layers = Tokenizer.byte(), range(PRESETS[flags.preset]["num_hidden_layers"])
    kinds = [int(flags.softmax_every > 0 and (l + 1) % flags.softmax_every == 0) for l in layers]
    ids = dict(eos_token_id=byte.eos_id, pad_token_id=byte.pad_id)
    return MiniMaxM1(M1Config.preset(flags.preset, attn_type_list=kinds, **ids))


def apply_flags(model, flags):
    """Give a model what flags change about it: the output head, the weight of the load-balancing loss, token drop."""
    if flags.router_coef is not None:
        model.config.router_aux_loss_coef = flags.router_coef
    for layer in model.layers:
        layer.block_sparse_moe.capacity = flags.capacity
    if flags.head == "bf16":
        model.head = functools.partial(bf16_head, model)


def bf16_head(model, hidden):
    """The mistake that the report found (sec. 3.2): logits rounded to bf16, in training and in rollouts."""
    return F.linear(hidden.bfloat16(), model.lm_head.weight.bfloat16()).to(hidden.dtype)


def rl_step(model, tokenizer, optimizer, flags, step, curriculum):
    """One step: experience, updates, now and then an evaluation. Step 0 is only evaluated.

    Returns its log row and the tokens that PPO's clip would have dropped, see updates.
    """
    clock, row, drops = time.perf_counter(), {"step": step}, []
    if step > 0:
        lr = flags.lr or 2e-4 * 64 / model.config.hidden_size
        row["lr"] = lr * min(step / max(flags.warmup, 1), 1)
        now = curriculum.now
        experience = collect(model, tokenizer, now, step, curriculum.pool)
        row |= experience.seen
        curriculum.observe(step, experience.seen)
        if experience.batch is not None:
            start = time.perf_counter()
            learnt, drops = update(model, optimizer, experience, now, row["lr"])
            row |= learnt | {"update_s": time.perf_counter() - start}
    if step % flags.eval_every == 0 or step == flags.steps:
        start = time.perf_counter()
        row |= evaluate(model, tokenizer, flags)
        row["eval_s"] = time.perf_counter() - start
    row["seconds"] = time.perf_counter() - clock
    return {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in row.items()}, drops


def begin(model, tokenizer, flags, folder, curriculum):
    """What comes before step 0: the cold start, unless --init, the choice of problems, the first files."""
    if not flags.init:
        learnt = cold_start(model, tokenizer, flags)
        record = read_json(folder / "run.json") | {"cold_start": learnt}
        write_file(folder / "run.json", json.dumps(record, indent=2) + "\n")
        print("cold start: {steps} steps, loss {loss:.3f}, forced chains right {skill:.2f}".format(**learnt))
        if learnt["skill"] < flags.sft_skill:
            print("warning: chains are not learnt, and RL would make responses longer, not right; raise --sft-steps")
    if flags.filter_problems:
        curriculum.kept = filter_problems(model, tokenizer, flags)
    write_file(folder / "samples.txt", f"after the cold start\n{show_samples(model, tokenizer, flags)}")
    write_file(folder / "log.csv", ",".join(COLUMNS) + "\n")
    write_file(folder / "dropped.csv", ",".join(DROPPED) + "\n")


def append_rows(path, rows):
    """Add rows, dicts, to a CSV file, in the columns that its first line names."""
    with open(path, "r+", newline="") as file:
        columns = file.readline().rstrip().split(",")
        file.seek(0, os.SEEK_END)
        csv.DictWriter(file, columns, restval="", extrasaction="ignore", lineterminator="\n").writerows(rows)


def train(flags):
    """The whole run: cold start, RL, evaluation, files. Returns the summary."""
    start = time.perf_counter()
    if not flags.init and not flags.preset:
        flags = dataclasses.replace(flags, preset="tiny")
    torch.manual_seed(flags.seed)
    folder = Path(flags.resume) if flags.resume else None
    saved = sorted(folder.glob("step-*")) if folder else []
    if saved and not (folder / "latest").exists():  # killed just before its first checkpoint was named
        write_file(folder / "latest", saved[-1].name + "\n")
    stored = folder if saved else flags.init
    device = choose_device(flags, stored)
    model = load_pretrained(stored, device, torch.float32) if stored else new_model(flags).to(device)
    apply_flags(model, flags)
    tokenizer, optimizer = Tokenizer.of(model.config), make_optimizer(model, 0.0, flags.adam_eps)
    folder = folder or new_folder(flags)
    step, earlier, state = reopen(folder, optimizer, device, flags.steps) if saved else (-1, 0.0, {})  # 0 is next
    curriculum = Curriculum(flags, **state)
    record = (read_json(folder / "run.json") if saved else {}) | describe(flags, model)  # how a cold start ended stays
    write_file(folder / "run.json", json.dumps(record, indent=2) + "\n")
    print_banner(flags, model, folder)
    try:
        if not saved:
            begin(model, tokenizer, flags, folder, curriculum)
        saved_at = time.perf_counter()
        bar = tqdm(total=flags.steps, initial=max(step, 0), desc="RL", unit="step", disable=None)
        with StopRequest() as stop, bar:
            while step < flags.steps and not stop.made:
                step += 1
                row, drops = rl_step(model, tokenizer, optimizer, flags, step, curriculum)
                drops = summarize_drops(drops, tokenizer, step)
                append_rows(folder / "dropped.csv", drops)
                append_rows(folder / "log.csv", [row])
                tqdm.write(step_line(row, flags, drops))
                sys.stdout.flush()
                bar.update(step > 0)
                due = time.perf_counter() - saved_at >= 60 * (flags.checkpoint_minutes or math.inf)
                if due or step % flags.checkpoint_every == 0 or step == flags.steps or stop.made:
                    saved_at = time.perf_counter()
                    save_checkpoint(model, optimizer, curriculum, folder, step, flags.keep, earlier + saved_at - start)
        if step < flags.steps:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; go on with: python train_rl.py --resume {folder}") from None
    except (ValueError, OSError) as error:
        last = checkpoint_dir(folder) if (folder / "latest").exists() else "none yet"
        raise ValueError(f"stopped in step {max(step, 0)}: {error}; last good checkpoint: {last}") from error
    return finish(model, tokenizer, flags, folder, earlier + time.perf_counter() - start)


def finish(model, tokenizer, flags, folder, seconds):
    """samples.txt, curves.png and summary.json of a finished run; prints and returns the summary."""
    before = (folder / "samples.txt").read_text(encoding="utf-8").split("\nafter ")[0]
    after = f"\nafter {flags.steps} RL steps\n{show_samples(model, tokenizer, flags)}"
    write_file(folder / "samples.txt", before + after + show_drops(folder / "dropped.csv"))
    log, first = read_log(folder / "log.csv"), Flags(preset="tiny")
    free = {"seed", "out", *CHANGEABLE} - {"steps"}
    default = dataclasses.replace(flags, **{name: getattr(first, name) for name in free}) == first
    bands = {c: reference_band(c, 0.2 if "length" in c else 0.01) for c in CURVES} if default else {}
    draw_curves(log, folder / "curves.png", f"{flags.algo}, seed {flags.seed}", bands)
    summary = {"seed": flags.seed, "steps": flags.steps, "seconds": round(seconds, 1)}
    for name in ("accuracy", "pass_k", "greedy", "eval_fork_rate", "eval_length"):
        short = name.removeprefix("eval_")
        summary |= {f"{short}_start": log[0][name], f"{short}_end": log[-1][name]}
    parts = {part: sum(row.get(part, 0) for row in log) for part in ("rollout_s", "reward_s", "update_s", "eval_s")}
    parts["other_s"] = seconds - sum(parts.values())  # the cold start above all, and files
    summary |= {part: round(spent, 1) for part, spent in parts.items()}
    write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print("held-out accuracy {accuracy_start:.3f} -> {accuracy_end:.3f}, fork rate {fork_rate_start:.2f} -> "
          "{fork_rate_end:.2f}, length {length_start:.1f} -> {length_end:.1f} tokens, {seconds:.0f} s\n"
          "time: rollouts {rollout_s} s, rewards and batches {reward_s} s, updates {update_s} s, "
          "evaluations {eval_s} s, cold start and files {other_s} s".format(**summary))  # fmt: skip
    print(f"see {folder}/samples.txt and {folder}/curves.png")
    if bands:
        print(is_it_normal(log, bands))
    return summary


CHANGEABLE = ("steps", "keep", "checkpoint_every", "checkpoint_minutes", "device", "resume")  # what --resume may change


def stored_flags(path):
    """The flags that a run folder, or the folder above a checkpoint, keeps in run.json; {} where there is none."""
    for file in (Path(path, "run.json"), Path(path).parent / "run.json") if path else ():
        if file.is_file():
            stored = read_json(file)
            flags = stored.get("flags") if isinstance(stored, dict) else None
            if not isinstance(flags, dict) or flags.keys() - {f.name for f in dataclasses.fields(Flags)}:
                raise ValueError(f"{file} does not hold this version's flags; give them on the command line and --init")
            return flags
    return {}


@command_line
def main(argv=None):
    """Train, or score a finished run with --eval. Returns the summary."""
    title = __doc__.splitlines()[0]
    flags = parse_flags(Flags, argv, title)
    earlier = stored_flags(flags.eval or flags.resume)
    if flags.resume and (flags.eval or flags.out):
        raise ValueError("--resume goes on in its own folder: leave out --eval and --out")
    if flags.resume and not (Path(flags.resume) / "run.json").is_file():
        raise ValueError(f"--resume {flags.resume}: no run.json there; give a run folder such as runs/tiny-cispo-001")
    flags = parse_flags(Flags, argv, title, earlier)  # the run's own settings, where argv says nothing else
    stored = {f.name: earlier.get(f.name, f.default) for f in dataclasses.fields(Flags) if f.name not in CHANGEABLE}
    changed = [name for name, x in stored.items() if getattr(flags, name) != x]
    if flags.resume and changed:
        raise ValueError(f"--resume keeps a run's settings, {', '.join(changed)} would change; use --init instead")
    if not flags.eval:
        return train(flags)
    model = load_pretrained(flags.eval, choose_device(flags, flags.eval), torch.float32)
    apply_flags(model, flags)
    scores = evaluate(model, Tokenizer.of(model.config), flags)
    print(f"{checkpoint_dir(flags.eval)}: " + "  ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return scores


if __name__ == "__main__":
    main()
