"""Cold start, then CISPO: a small MiniMax-M1 learns to think before it answers.

    python train_rl.py                          the main job: a few minutes on two CPU cores
    python train_rl.py --resume runs/NAME       go on where a run stopped, to the same bits
    python train_rl.py --eval runs/NAME         score a finished run again
    python train_rl.py --help                   every flag

    1. Settings          ColdStart, Flags
    2. Cold start        demonstrations, cold_start
    3. THE LOOP          train
    4. Around it         begin, banner, step_line, read_flags, main

Where this differs from the textbook: there is no value function and no KL term; groups whose
answers are all worth the same are dropped; log-probs before the updates are computed anew, by the
pass that the updates use.

Dimension key: N sequences, L tokens of the longest, G responses per prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

from tqdm import tqdm
from tyro.conf import Fixed

import cispo
import engine
import judge
import parallel
import runlog
import tasks
from cli import (
    check,
    checkpoint,
    command_line,
    fits,
    flat,
    parse,
    pick_device,
    read_json,
    torch,
    unflat,
)
from cli import model as m1
from curriculum import Curriculum, Growth, Mix
from experience import (
    Imitation,
    collect,
    evaluate,
    make_batch,
    measure,
    passes,
    prompt_ids,
    respond,
    response_texts,
    solvable,
    substream,
    summed,
)
from tokenizer import Tokenizer

# ============================================================================
# 1. Settings                     (Fixed: no flag; studies and tests set it)
# ============================================================================


@dataclass(frozen=True)
class ColdStart:
    """Imitation before RL."""

    sft_steps: int = 2000
    """most steps of the cold start; it ends when chains are learnt"""
    fork_prior: float = 0.1
    """how often demonstrations choose to think"""
    sft_skill: Fixed[float] = 0.95
    """learnt: this share of forced chains is right"""

    def __post_init__(self):
        check(self, sft_steps=(1, 10**6), fork_prior=(0, 1), sft_skill=(0, 1))


@dataclass(frozen=True)
class Flags:
    """Every setting of a run. Defaults are the main job."""

    mix: Mix = field(default_factory=Mix)
    cold: ColdStart = field(default_factory=ColdStart)
    sampling: engine.Sampling = field(default_factory=engine.Sampling)
    recipe: cispo.Recipe = field(default_factory=cispo.Recipe)
    growth: Growth = field(default_factory=Growth)

    preset: Literal["tiny", "small", "base"] | None = None
    """model size; None = tiny, or that of --init"""
    softmax_every: int | None = None
    """every n-th layer has softmax attention: 1 = all, 0 = none; None = 8 (M1), or as --init"""
    init: str | None = None
    """start RL from this run, with its tasks and moves, or from a published directory, M1's say;
    without a cold start"""
    resume: str | None = None
    """go on with this run folder; --steps, --device, --checkpoint-every and what saves memory may
    change"""
    eval: str | None = None
    """score this run or model directory and stop"""
    judge: str | None = None
    """the model that grades answers of `--task judge`: a directory that judge.py wrote"""
    seed: int = 0
    """same seed, same log on the same machine"""
    out: str | None = None
    """run folder; None = the next free runs/PRESET-ALGO-NNN"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cpu for tiny, else a GPU if there is one"""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """of matrix products and rollouts; weights stay fp32; auto = bf16 on a GPU, fp32 on a CPU"""
    steps: int = 40
    """RL steps; 0 stops after the cold start"""
    prompts: int = 32
    """prompts per step"""
    group_size: int = 8
    """G, responses per prompt, compared with each other"""
    updates_per_rollout: int = 4
    """updates per batch of rollouts; the report's: 16"""
    lr: float | None = None
    """learning rate of RL; None = 2e-4 * 64 / model width"""
    sp: int = 1
    """processes of torchrun that share the tokens of an update, for long responses"""
    micro_tokens: int | None = None
    """most tokens of a pass, in whole responses; gradients add up, at the cost of one more pass"""
    recompute: bool = False
    """compute activations again when going backward: less memory, a quarter more time"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    eval_every: int = 5
    """RL steps between evaluations"""
    eval_problems: int = 300
    """held-out problems of an evaluation"""
    checkpoint_every: int = 5
    """RL steps between checkpoints; fewer are made where they would take a tenth of the time"""

    eval_samples: Fixed[int] = 8
    """responses to each held-out problem, for pass@1 and pass@k"""
    min_groups: Fixed[int] = 4
    """fewest prompts whose answers' values differ that make an update; else draw more, twice"""
    mask_truncated: Fixed[bool] = False
    """a response cut by its length carries no loss, though its reward counts (DAPO)"""

    def __post_init__(self):
        """Refuse what cannot work before anything is written or computed."""
        many, limits, hardest = (1, 10**6), self.growth.limits, self.growth.max_moves
        check(self, softmax_every=(0, 1000), seed=(0, 2**62), steps=(0, 999_999), prompts=many)
        check(self, group_size=(2, max(2, 10**6 // self.prompts)), max_grad_norm=(1e-9, 10**9))
        check(self, eval_every=many, eval_problems=(1, 10**5), checkpoint_every=many)
        check(self, updates_per_rollout=(1, self.prompts), min_groups=(1, self.prompts))
        check(self, micro_tokens=(1, 10**9), lr=(1e-12, 10), eval_samples=(1, 1000), sp=(1, 1000))
        shape = self.preset or self.softmax_every is not None
        harder = hardest and hardest < self.mix.moves
        slow = self.mix.moves * self.eval_problems > 10**7
        buffer, shortest = self.recipe.overlong_buffer, limits[0] if limits else self.longest()
        refused = [
            (self.init and shape, "--init brings its model: no --preset, no --softmax-every"),
            (self.init and self.cold != ColdStart(), "--init: no --sft-steps, no --fork-prior"),
            (limits and self.sampling.max_new_tokens, "--windows: leave out --max-new-tokens"),
            (slow, "--moves times --eval-problems must be at most 10^7"),
            (harder, f"--moves {self.mix.moves} is more than --max-moves {hardest}"),
            (hardest and self.growth.filter_problems, "--filter-problems: leave out --max-moves"),
            (buffer > shortest, f"--overlong-buffer {buffer} is more than a response, {shortest}"),
        ]
        for applies, message in refused:
            if applies:
                raise ValueError(message)
        drawn = self.mix.draw(random.Random(0), len(self.mix.names), hardest)  # or says why not
        if any(problem.judged for problem in drawn):
            self._check_judged()
        _held_out(self.mix, self.eval_problems)

    def _check_judged(self):
        if not self.judge:
            raise ValueError("--task judge: no rule pays its answers; give --judge DIR (judge.py)")
        if self.growth.max_moves or self.growth.filter_problems:
            raise ValueError(
                "--task judge: no --max-moves, no --filter-problems, which need a rule"
            )

    @property
    def held_out(self):
        """The problems of every evaluation, the same for all seeds."""
        return _held_out(self.mix, self.eval_problems)

    def longest(self, moves=None):
        """Longest response in tokens, for problems of up to `moves` steps (None: the run's)."""
        if self.growth.limits or self.sampling.max_new_tokens:  # of all windows the last
            return [self.sampling.max_new_tokens, *self.growth.limits][-1]
        mix = dataclasses.replace(self.mix, moves=moves or self.mix.moves)
        hardest = tasks.draw(random.Random(0), 32 * len(mix.names), mix.names, mix.moves)
        shown = [*hardest, *_held_out(mix, self.eval_problems)]
        right = max(len((p.opening + p.chain + p.answer).encode()) for p in shown)
        return right + 3 + 6  # fork, </think>, end; and room for detours

    def limits(self, moves=None):
        """What ends the responses of evaluations: arguments of engine.generate."""
        same = {name: getattr(self.sampling, name) for name in ("repetition_stop", "max_rows")}
        return same | {"max_new_tokens": self.longest(moves)}


@functools.lru_cache(maxsize=64)
def _held_out(mix, n):
    return mix.draw(random.Random("held-out"), n, held_out=True)


# ============================================================================
# 2. Cold start
# ============================================================================


def demonstrations(flags, rng, tokenizer, n, device):
    """A Batch of n demonstrations. What is not learned from, a fork say, stays visible as input."""
    least, most = flags.mix.moves, flags.growth.max_moves
    problems = flags.mix.draw(rng, n, rng.randint(least, most) if most else least)
    prompts = [tokenizer.encode(p.prompt) for p in problems]
    responses, learned = [], []
    for problem in problems:
        pieces = tasks.demonstration(problem, rng, flags.cold.fork_prior)
        ids = [tokenizer.encode(text, specials=own) for text, own in pieces]
        marks = [[own] * len(i) for i, (_, own) in zip(ids, pieces)]
        responses.append([*itertools.chain(*ids), tokenizer.eos_id])
        learned += [*itertools.chain(*marks), True]
    return make_batch(prompts, responses, learned, device)


DEMONSTRATIONS = 48  # of a step
ADAM_EPS = 1e-15  # report sec. 3.2: gradients go down to 1e-18, and 1e-8 would swallow them


def make_optimizer(model, lr=0.0):
    """AdamW as in the report (sec. 3.2)."""
    how = dict(betas=(0.9, 0.95), eps=ADAM_EPS, weight_decay=0.0, fused=True)
    return torch.optim.AdamW(model.parameters(), lr=lr, **how)


def clip(model, max_norm):
    """Clip the gradients; returns their norm before. Stops the run when it is not finite."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = float(parallel.whole(norm))  # over all ranks
    if not math.isfinite(norm):
        raise ValueError(f"the gradient norm is {norm}; lower the learning rate")
    return norm


def cold_start(model, tokenizer, flags, batch_size=DEMONSTRATIONS):
    """Imitate demonstrations until forced chains are right, then cool the learning rate down.

    The moment at which chains click differs from seed to seed, so the gate is skill, not a number
    of steps, and the learning rate stays high until then (a fast decay freezes them unlearnt); then
    it falls over 100 steps. Returns {steps, skill, loss}.
    """
    rng = random.Random(substream(flags.seed, "demonstrations"))
    top_lr, imitate = 3e-3 * 64 / model.config.hidden_size, Imitation(model)
    optimizer, warmup, cooldown, every = make_optimizer(model), 30, 100, 50
    skill, stop = 0.0, flags.cold.sft_steps
    bar = tqdm(total=stop, desc="cold start", unit="step", disable=parallel.no_bar())
    for step in range(1, flags.cold.sft_steps + 1):
        batch = demonstrations(flags, rng, tokenizer, batch_size, model.device)
        loss = imitate(batch)
        clip(model, flags.max_grad_norm)
        lr = top_lr * min(step / warmup, 1, (stop - step + 1) / cooldown)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        bar.update()
        if step % every == 0 or step == stop:
            skill = chain_skill(model, tokenizer, flags)
            told = f"loss {summed(loss):.3f}  forced chains right {skill:.2f}"
            bar.set_postfix_str(told)
            if bar.disable:  # no terminal
                print(f"cold start step {step}  {told}", flush=True)
            if skill >= flags.cold.sft_skill:
                stop = min(stop, step + cooldown)
            elif step == stop:  # unlearnt while cooling down: go on at the full rate
                stop = flags.cold.sft_steps
        if step == stop:
            break
    bar.close()
    optimizer.zero_grad()
    return {"steps": step, "skill": skill, "loss": summed(loss)}


def chain_skill(model, tokenizer, flags, n=96):
    """Share of the hardest training problems solved when the fork is set, all else greedy."""
    moves = flags.growth.max_moves or flags.mix.moves
    problems = tasks.draw(random.Random("skill"), n, flags.mix.names, moves)
    begun = (p.prompt + p.opening + tasks.FORK for p in problems)
    forced = [dataclasses.replace(p, prompt=prompt) for p, prompt in zip(problems, begun)]
    how = flags.limits(moves) | {"temperature": 0}
    return fmean(s.correct for s in respond(model, tokenizer, forced, 0, **how)[1])


# ============================================================================
# 3. THE LOOP
# ============================================================================

WARMUP = 5  # RL steps over which the learning rate rises


def train(flags):
    """A whole run: cold start, then RL. Returns the summary."""
    grader = judge.Judge.load(flags.judge) if flags.judge else None
    run, model, tokenizer, optimizer, curriculum = begin(flags)
    G, recipe, temperature = flags.group_size, flags.recipe, flags.sampling.temperature
    weighting, most = recipe.part("token_weights"), flags.micro_tokens
    coef = model.config.router_aux_loss_coef
    top_lr = flags.lr or 2e-4 * 64 / model.config.hidden_size
    with run:
        if run.step < 0:
            before_rl(run, model, tokenizer, flags, curriculum)
        for step in run.steps(flags.steps):  # step 0 is only evaluated
            row, families, drops, batch = {"step": step}, [], [], None
            if step > 0:  # experience: G answers to each problem; groups that differ are kept
                seed = substream(flags.seed, "problems", step)
                problems = curriculum.problems(seed, step / flags.steps)
                longest = curriculum.limit or flags.longest(curriculum.moves)
                sampling = dataclasses.replace(flags.sampling, max_new_tokens=longest)
                row |= {"window": longest, "moves": curriculum.moves}
                answered = collect(model, tokenizer, problems, flags, sampling, step, grader)
                batch, seen, families = answered
                row |= seen | {"lr": top_lr * min(step / WARMUP, 1)}
                curriculum.observe(seen)
            if batch is not None:
                started, watched = time.perf_counter(), []
                advantages = cispo.group_advantages(batch.rewards, G)
                batch = batch._replace(advantages=advantages)
                slices = batch.slices(flags.updates_per_rollout, G)
                forward = functools.partial(passes, model, temperature=temperature, most=most)
                with torch.no_grad():  # by the same passes: the first ratio is exactly 1
                    old = [list(forward(part)) for part in slices]
                for part, before in zip(slices, old):
                    weights, parts = cispo.token_weights(part.trained, weighting, G), []
                    for now, was in zip(forward(part), before):
                        A, w = part.advantages[now.rows], weights[now.rows] * now.trained
                        loss, *told = cispo.policy_loss(now.logp, was.logp, A, w, recipe)
                        (loss + coef * now.aux.router_loss).backward()
                        parts.append((loss.detach(), *told, now.aux))
                    norm = clip(model, flags.max_grad_norm)
                    optimizer.param_groups[0]["lr"] = row["lr"]
                    optimizer.step()
                    optimizer.zero_grad()
                    watched.append((norm, parts))
                learnt, drops = measure(slices, old, watched, recipe, longest)
                row |= learnt | {"update_s": time.perf_counter() - started}
            if step % flags.eval_every == 0 or step == flags.steps:
                scores, by_family = evaluate(model, tokenizer, flags)
                row, families = row | scores, families + by_family
            drops = runlog.summarize_drops(drops, tokenizer, step)
            run.log(row, drops, families, step_line(row, flags, drops))
            due = step % flags.checkpoint_every == 0 and run.rested
            if parallel.somewhere(due or step == flags.steps or run.stopping):
                run.save(model, optimizer, curriculum, step, tokenizer.files)
    return runlog.finish(run, show_samples(model, tokenizer, flags), *named(flags))


# ============================================================================
# 4. Around it
# ============================================================================


def begin(flags):
    """(Run, model, tokenizer, optimizer, Curriculum) of a new run, or of one that goes on."""
    torch.manual_seed(flags.seed)
    run = runlog.Run(flags.resume) if flags.resume else None
    resumed = run and runlog.last_saved(run.folder)
    stored = run.folder if resumed else flags.init
    config = model_config(flags, stored)
    device = parallel.start(choose_device(flags, config), flags.sp)
    check_processes(flags)
    tokenizer = load_tokenizer(flags, stored, config)
    check_lengths(flags, tokenizer, config.max_position_embeddings)
    model = load_model(flags, stored, config, device)
    optimizer, curriculum = make_optimizer(model), Curriculum(flags.mix, flags.growth)
    if resumed:
        runlog.reopen(run, optimizer, curriculum, device, flags.steps)
    if not run:
        size = "init" if flags.init else flags.preset or "tiny"
        run = runlog.Run.new(flags.out, f"{size}-{flags.recipe.algo}")
    told = dataclasses.replace(flags, out=None, resume=None, eval=None)
    run.describe(flags=flat(told), **runlog.machine(device))
    print(banner(flags, model, run.folder), flush=True)
    return run, model, tokenizer, optimizer, curriculum


def model_config(flags, stored):
    """The configuration of a run or directory, or of a new model of --preset and --softmax-every
    that speaks bytes.
    """
    if stored:
        return m1.M1Config.from_json(checkpoint.checkpoint_dir(stored))
    byte, preset, every = Tokenizer.byte(), flags.preset or "tiny", flags.softmax_every
    changes = dict(eos_token_id=byte.eos_id, pad_token_id=byte.pad_id)
    if every is not None:
        layers = range(m1.PRESETS[preset]["num_hidden_layers"])
        changes["attn_type_list"] = [int(every > 0 and (l + 1) % every == 0) for l in layers]
    return m1.M1Config.preset(preset, **changes)


def load_tokenizer(flags, stored, config):
    """The tokenizer of a model, which a chat model's directory holds."""
    tokenizer = Tokenizer.of(config, stored and checkpoint.checkpoint_dir(stored))
    if tokenizer.has_turns and not (flags.sampling.max_new_tokens or flags.growth.limits):
        what = f"{stored} is a chat model, and how long it may think is not said"
        raise ValueError(f"{what}; give --max-new-tokens, 4096 say")
    return tokenizer


def load_model(flags, stored, config, device):
    """The model of a run or directory, or a new one: fp32 weights, activations of --dtype; on
    several processes in parts.
    """
    if stored:
        model = checkpoint.load_pretrained(stored, device, torch.float32, parts=True)
    else:
        with torch.device(device):
            model = m1.MiniMaxM1(config)
        model = parallel.shard(model, device)
    if flags.dtype == "bf16" or (flags.dtype == "auto" and device.startswith("cuda")):
        model.compute = torch.bfloat16
    model.recompute = flags.recompute
    return model


def check_processes(flags):
    """ValueError unless all processes have the same flags and each a row of every group."""
    n = parallel.size() // flags.sp
    if n > DEMONSTRATIONS:
        raise ValueError(f"{n} processes are more than the {DEMONSTRATIONS} that can share a batch")
    if n > flags.group_size:
        found = f"--group-size {flags.group_size}"
        raise ValueError(f"{n} shares need a group of at least {n} responses, found {found}")
    asked = parallel.together([repr(flags)])
    if other := [i for i, x in enumerate(asked) if x != asked[0]]:
        raise ValueError(f"process {other[0]} was started with other flags than process 0")


def check_lengths(flags, tokenizer, limit):
    """ValueError if prompts with their responses are longer than the model can take."""
    hardest = flags.growth.max_moves or flags.mix.moves
    problems = tasks.draw(random.Random(0), 32 * len(flags.mix.names), flags.mix.names, hardest)
    prompt = max(len(prompt_ids(tokenizer, p)) for p in problems)
    longest = max(flags.longest(), flags.longest(hardest))
    if prompt + longest > limit:
        found = f"a prompt of {prompt} tokens and a response of up to {longest}"
        raise ValueError(f"{found} exceed the model's {limit}: lower --max-new-tokens or --windows")


def choose_device(flags, config):
    """--device, where auto means the CPU for `tiny`, whose operations are too small for a GPU."""
    tiny = config.hidden_size <= m1.PRESETS["tiny"]["hidden_size"]
    return "cpu" if tiny and flags.device == "auto" else pick_device(flags.device)


def before_rl(run, model, tokenizer, flags, curriculum):
    """The cold start, unless --init; the choice of problems; the first files."""
    if not flags.init:
        learnt = cold_start(model, tokenizer, flags)
        run.describe(cold_start=learnt)
        told = "cold start: {steps} steps, loss {loss:.3f}, forced chains right {skill:.2f}"
        print(told.format(**learnt))
        if learnt["skill"] < flags.cold.sft_skill:
            print("warning: chains are not learnt: RL would make responses longer, not right;")
            print("    raise --sft-steps or lower --moves")
    if flags.growth.filter_problems:
        seed = substream(flags.seed, "filter")
        tried = curriculum.candidates(seed)
        curriculum.kept = seed, solvable(model, tokenizer, flags, tried)
    run.begin(show_samples(model, tokenizer, flags))


def show_samples(model, tokenizer, flags, n=6):
    """A few held-out problems with one sampled response each, as text."""
    problems, seed = flags.held_out[:n], substream(flags.seed, "samples")
    rollout, scores = respond(model, tokenizer, problems, seed, **flags.limits())
    texts = ("\\n".join(x.splitlines()) for x in response_texts(tokenizer, rollout))
    rows = zip(problems, texts, scores)
    line = "  {}{:<30}  answer {}  reward {:.1f}\n"
    return "".join(line.format(p.prompt, text, p.answer, s.reward) for p, text, s in rows)


def named(flags):
    """A run's title, and whether it has the settings of the reference seeds."""
    free = dict(preset=None, seed=0, out=None, device="auto", resume=None, checkpoint_every=5)
    is_main = flags.preset in (None, "tiny") and dataclasses.replace(flags, **free) == Flags()
    return f"{flags.recipe.algo}, seed {flags.seed}", is_main


def banner(flags, model, folder):
    """What is about to happen, before anything slow happens."""
    from lightning_attn import choose_impl

    mix, recipe, count = flags.mix, flags.recipe, m1.count_parameters(model.config)
    head = torch.empty(model.config.head_dim, device=model.device, dtype=model.dtype)
    (low, high), masked = recipe.bounds, recipe.part("masked")
    size = "{total:,} parameters, {active_with_head:,} active per token".format(**count)
    moves = "-".join(str(n) for n in (mix.min_moves, mix.moves) if n)
    rhat = f"IS weight in {'[' if low else '('}{low:g}, {high:g}]"
    clip = f"tokens outside the trust region are {'dropped' if masked else 'kept'}"
    several = f", one of {parallel.size()} processes" if parallel.size() > 1 else ""
    each = f"{flags.prompts} prompts x {flags.group_size} responses"
    return f"""\
device    {model.device} ({torch.get_num_threads()} threads), torch {torch.__version__}{several}
model     {flags.init or flags.preset or "tiny"}: {size}
weights   fp32, products and rollouts {str(model.dtype).removeprefix("torch.")}
attention {": ".join(choose_impl(head, head))}
problems  {mix.task}, {moves} moves; {flags.eval_problems} held out
loss      {recipe.algo}: {rhat}, {clip}, a mean over each {recipe.part("token_weights")}
steps     {flags.steps}, each {each}, {flags.updates_per_rollout} updates
folder    {folder}"""


def step_line(row, flags, drops=()):
    """One aligned line per step; after `ppo drops` the tokens it would drop most often."""
    line = "step {step:3d}/" + str(flags.steps)
    if row["step"]:
        line += "  correct {correct:.3f}  fork {fork_rate:.3f}  length {length:5.2f}"
        line += "  groups {groups:2d}"
    if "loss" in row:
        line += "  corr {prob_corr:.4f}  ratio {ratio_min:.2f}-{ratio_max:5.2f}"
        line += "  ppo drops {ppo_would_drop_frac:5.1%} {often:<14}"
    elif row["step"]:
        line += f"  fewer than {flags.min_groups} groups: no update"
    if "accuracy" in row:
        line += "  | held-out {accuracy:.3f}  pass@k {pass_k:.3f}  greedy {greedy:.3f}"
    if row["step"] and (flags.growth.windows or flags.growth.max_moves):
        line += "  window {window} moves {moves}"
    if not row["step"] and row.get("eval_guess_right", 0) > 0.5:
        line += "\nwarning: {eval_guess_right:.0%} of guesses are right, so thinking helps little"
        line += " and RL has little to teach; see the top of tasks.py"
    often = " ".join("{token} x{count}".format(**drop) for drop in drops[:2])
    return line.format(**row, often=often)


# what --resume and --eval may change
CHANGEABLE = "steps checkpoint_every device sp micro_tokens recompute max_rows resume".split()
SCORED = "eval eval_problems task moves min_moves max_new_tokens max_rows seed device dtype".split()


def stored_flags(path):
    """The flags that a run folder, or the folder above a checkpoint, keeps in run.json; or {}."""
    for file in (Path(path, "run.json"), Path(path).parent / "run.json"):
        if file.is_file():
            stored = read_json(file)
            flags, learnt = stored.get("flags"), stored.get("cold_start", {"steps": 0})
            same = fits(flags, dict) and flags.keys() == flat(Flags()).keys()
            if not same or not fits(learnt, dict[str, float]) or "steps" not in learnt:
                raise ValueError(f"{file} does not hold this version's flags: train that run anew")
            try:
                return flat(unflat(Flags, flags))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from None
    return {}


def read_flags(argv):
    """argv -> Flags; what it leaves out comes from the run of --resume, --eval or --init."""
    title, first = __doc__.splitlines()[0], argparse.ArgumentParser(add_help=False)
    for name in ("resume", "eval", "init", "out"):
        first.add_argument(f"--{name}", nargs="?")
    paths = vars(first.parse_known_args(argv)[0])
    if "" in paths.values():
        raise ValueError("--resume, --eval, --init and --out need a folder, found an empty text")
    given = [name for name, path in paths.items() if path]
    starts = [name for name in given if name != "out"]
    if len(starts) > 1 or {"resume", "out"} <= set(given):
        raise ValueError("--resume, --eval, --init exclude each other, and --resume --out")
    if not starts:
        return parse(Flags, argv, title)
    kind, path = starts[0], paths[starts[0]]
    if kind == "resume" and not Path(path, "run.json").is_file():
        example = "give a run folder such as runs/tiny-cispo-001"
        raise ValueError(f"--resume {path}: no run.json there; {example}")
    old = stored_flags(path)
    old |= {"sp": 1} if old else {}  # asked anew, as the number of processes is
    if kind == "init":
        kept = ("task", "moves", "min_moves", "eval_problems", "judge")
        own = unflat(Flags, {name: x for name, x in old.items() if name in kept})
        return parse(Flags, argv, title, own)
    flags = parse(Flags, argv, title, unflat(Flags, old))
    may = CHANGEABLE if kind == "resume" else SCORED
    old = old or flat(Flags())
    moving = len(flags.mix.names) > 1 and flags.mix.shares(0) != flags.mix.shares(1)
    if kind == "resume" and moving and flags.steps != old["steps"]:
        raise ValueError(
            f"--resume: other --steps would move the weights of --task {flags.mix.task}"
        )
    changed = [name for name, x in flat(flags).items() if x != old[name] and name not in may]
    if changed:
        raise ValueError(f"--{kind}: {', '.join(changed)} would change; only {', '.join(may)} may")
    return flags


@command_line
def main(argv=None):
    """Train, or score a finished run with --eval. Returns the summary."""
    flags = read_flags(argv)
    if flags.eval is None:
        summary = train(flags)
        parallel.finish()
        return summary
    config = model_config(flags, flags.eval)
    device = parallel.start(choose_device(flags, config))
    model = load_model(flags, flags.eval, config, device)
    scores, families = evaluate(model, load_tokenizer(flags, flags.eval, config), flags)
    told = "  ".join(f"{name} {value:.4f}" for name, value in scores.items())
    print(f"{checkpoint.checkpoint_dir(flags.eval)}: {told}")
    if len(families) > 1:
        print("  ".join("{family} {correct:.4f}".format(**row) for row in families))
    parallel.finish()
    return scores


if __name__ == "__main__":
    main()
