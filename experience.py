"""What the loop trains on: problems answered, scored, gathered in groups and made into batches.

    1. Batches           Batch, make_batch, trained_logp, passes, Imitation
    2. Answers           prompt_ids, respond, Environment, scored, evaluate
    3. Experience        solvable, collect
    4. Only watched      measure, by_family, summed

Everywhere `flags` is a train_rl.Flags, of which group sizes, limits and seeds are read.
Dimension key: N sequences, L tokens of the longest, G responses per prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
import zlib
from collections import Counter
from statistics import fmean
from typing import NamedTuple

from tqdm import tqdm

import cispo
import engine
import environments
import parallel
import sandbox
import tasks
from cli import model as m1
from cli import short, torch
from tokenizer import END_OF_TURN, chat_pieces, parse_tool_calls


def substream(seed, *names):
    """A seed for every use of randomness, so that changing one use leaves the others alone."""
    return zlib.crc32(repr((seed, *names)).encode())


# ============================================================================
# 1. Batches
# ============================================================================


class Batch(NamedTuple):
    """Prompts with responses, padded on the left. Column t of (N, L - 1) is tokens[:, t + 1]."""

    tokens: torch.Tensor  # (N, L) int64
    mask: torch.Tensor  # (N, L) bool: real tokens
    trained: torch.Tensor  # (N, L - 1) bool: carries loss
    rewards: torch.Tensor = None  # (N,) fp32
    infer_logp: torch.Tensor = None  # (N, L - 1) fp32: what the sampler recorded
    advantages: torch.Tensor = None  # (N,) fp32

    def part(self, rows):
        """These rows of it."""
        return Batch(*(x if x is None else x[rows] for x in self))

    def slices(self, k, group_size):
        """k Batches of whole groups, as many as there are groups at most."""
        groups = torch.arange(len(self.tokens)).view(-1, group_size)
        parts = groups.tensor_split(min(k, len(groups)))
        return [self.part(slice(int(g[0, 0]), int(g[-1, -1]) + 1)) for g in parts]

    def pieces(self, most, least=1):
        """Slices of rows that hold `most` real tokens each, or `least` rows, where a number is
        given; None: one slice of all.
        """
        start, held, cuts = 0, 0, []
        for i, n in enumerate(self.mask.sum(1).tolist() if most else ()):
            if held + n > most and i >= start + least and i <= len(self.tokens) - least:
                cuts.append(slice(start, i))
                start, held = i, 0
            held += n
        return [*cuts, slice(start, len(self.tokens))]


def make_batch(prompts, responses, learned, device, rewards=None, infer_logp=None):
    """N prompts and responses (lists of token ids) -> Batch. learned and infer_logp hold a value
    for every token of all responses in a row: whether it carries loss, what the sampler recorded.
    """

    def align(values):  # (N, L - 1), zeros at prompts and padding
        flat = torch.as_tensor(values)
        if len(flat) != sum(lengths):
            raise ValueError("every token of a response needs one value")
        return flat.new_zeros(here.shape).masked_scatter(here, flat).to(device)

    tokens, mask = engine.left_pad([[*p, *r] for p, r in zip(prompts, responses)], 0, device)
    lengths, width = [*map(len, responses)], tokens.shape[1] - 1
    here = torch.arange(width) >= width - torch.tensor(lengths)[:, None]  # they end on the right
    if rewards is None:
        return Batch(tokens, mask, align(learned))
    rewards = torch.as_tensor(rewards, device=device)
    return Batch(tokens, mask, align(learned), rewards, align(infer_logp))


def trained_logp(model, batch, temperature=1.0):
    """Of a batch's trained tokens: log-probs and entropies (N, L - 1), 0 elsewhere; and Aux."""
    tokens, mask, targets = batch.tokens[:, :-1], batch.mask[:, :-1], batch.tokens[:, 1:]
    own = parallel.own_tokens(mask)
    here = batch.trained & own  # the head sees these positions only
    if m1.has_flash(model) or parallel.sp() > 1:  # real tokens only
        ends = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        part = parallel.part(ends)
        hidden, aux = model.hidden(tokens[own][None], cu_seqlens=ends, part=part)
        hidden = hidden[0, here[own]]
    else:
        hidden, aux = model.hidden(tokens, mask=mask)
        hidden = hidden[here]
    found = model.target_logp(hidden, targets[here], temperature, with_entropy=True)
    logp, entropy = (x.new_zeros(here.shape).masked_scatter(here, x) for x in found)
    return logp, entropy.detach(), aux


class Pass(NamedTuple):
    """A forward pass over some rows of a batch: what trained_logp gives."""

    rows: slice
    trained: torch.Tensor  # (rows, L - 1) bool: which of these tokens this process has
    logp: torch.Tensor
    entropy: torch.Tensor
    aux: m1.Aux


def passes(model, batch, temperature=1.0, most=None):
    """trained_logp of all rows, in passes of at most `most` real tokens (None: one pass); of
    several processes each has its share of every pass.

    Where gradients are recorded, the router losses of several add up to that of the whole batch: a
    first round without gradients counts the whole batch's expert loads.
    """
    size, load = parallel.size() // parallel.sp(), None
    pieces = batch.pieces(most and most * size, least=size)
    n_tokens = [int(batch.mask[rows, :-1].sum()) for rows in pieces]
    share = [n / sum(n_tokens) for n in n_tokens]
    if len(pieces) > 1 and torch.is_grad_enabled():
        with torch.no_grad():
            loads = [p.aux.expert_load for p in passes(model, batch, temperature, most)]
        load = sum(fraction * own for fraction, own in zip(share, loads))
    for piece, fraction in zip(pieces, share):
        rows = parallel.share(piece.stop - piece.start, piece.start, parallel.sp())
        part = batch.part(rows)
        logp, entropy, aux = trained_logp(model, part, temperature)
        if load is not None:
            aux = aux._replace(router_loss=fraction * aux.loss_at(load), expert_load=load)
        trained = part.trained & parallel.own_tokens(part.mask[:, :-1])
        yield Pass(rows, trained, logp, entropy, aux)


class Imitation:
    """The loss on a batch of demonstrations and its gradients, in place of earlier ones.

    On one GPU a call replays one CUDA graph: a step of `base` is 2,400 small kernels, which Python
    starts in 100 ms and the GPU does in 34. Batches, all of as many rows, are packed to one size;
    what fills them up counts in the router's loss (0.001 times), so only there a step differs.
    """

    def __init__(self, model):
        self.model, self.inputs, self.graph, self.loss = model, None, None, None

    def __call__(self, batch):
        n_tokens = int(batch.mask[:, :-1].sum())
        if parallel.size() > 1 or not capturable(self.model, n_tokens):
            return self._plain(batch)
        if self.graph is None or n_tokens >= len(self.inputs[0]):
            self.graph, self.inputs = None, packed(batch, n_tokens * 5 // 4 + 1)
            self.graph = engine.captured(self._learn, self._rehearse, self.model.device)
        for x, new in zip(self.inputs, packed(batch, len(self.inputs[0]))):
            x.copy_(new)
        self.graph.replay()
        return self.loss

    def _plain(self, batch):
        self.model.zero_grad()
        rows = parallel.share(len(batch.tokens), sp=parallel.sp())
        n, batch = batch.trained.sum(), batch.part(rows)
        logp, _, aux = trained_logp(self.model, batch)
        return self._backward(-logp[batch.trained].sum() / n, aux)

    def _learn(self):
        self.model.zero_grad()
        tokens, targets, learned, ends = self.inputs
        hidden, aux = self.model.hidden(tokens[None], cu_seqlens=ends)
        logp = self.model.target_logp(hidden[0], targets)
        self.loss = self._backward(-(logp * learned).sum() / learned.sum(), aux)

    def _rehearse(self):
        self._learn()
        self.model.zero_grad()

    def _backward(self, loss, aux):
        (loss + self.model.config.router_aux_loss_coef * aux.router_loss).backward()
        return loss.detach()


def capturable(model, n_tokens):
    """Whether a training step of so many tokens asks the device nothing, so a graph can hold it."""
    from lightning_attn import choose_impl

    if not m1.has_flash(model):
        return False
    head = torch.empty(model.config.head_dim, dtype=model.dtype, device=model.device)
    return choose_impl(head, head)[0] == "triton" and engine.takes_graphs(model, n_tokens)


def packed(batch, size):
    """A batch's real tokens as one row: tokens, targets, which are learned (size,), and where N + 1
    sequences begin and end (N + 2,) int32. The last one fills the row with tokens from its
    beginning, of which none is learned, though routers count them.
    """
    here, again = batch.mask[:, :-1], torch.arange(size, device=batch.tokens.device)
    ends = here.sum(1).cumsum(0)
    row = here.flatten().nonzero()[:, 0][again % ends[-1]]
    columns = batch.tokens[:, :-1], batch.tokens[:, 1:], batch.trained
    tokens, targets, learned = (x.flatten()[row] for x in columns)
    ends = torch.cat([ends.new_zeros(1), ends, ends.new_tensor([size])])
    return tokens, targets, learned & (again < ends[-2]), ends.int()


# ============================================================================
# 2. Answers
# ============================================================================


def prompt_ids(tokenizer, problem):
    """A problem as tokens: its prompt, or for a chat model a conversation, rules and prompt."""
    if not tokenizer.has_turns:
        return tokenizer.encode(problem.prompt)
    turns = ("system", tasks.rules(problem)), ("user", problem.prompt)
    turns = [{"role": role, "content": text} for role, text in turns]
    return tokenizer.encode_chat(chat_pieces(turns, [*map(environments.described, problem.tools)]))


def respond(model, tokenizer, problems, seed, group_size=1, judge=None, **how):
    """group_size responses to each problem and their scores: (a Rollout on the CPU, N tasks.Score).

    how: max_new_tokens and further arguments of engine.generate. Where a verifier raises or hangs,
    the score is tasks.crashed. A judge.Judge grades what no rule pays. Of several processes each
    answers its share, and all get all answers.
    """
    mine, weights, found = parallel.share(len(problems)), engine.rollout_weights(model), []
    asked = problems[mine] or problems[: engine.in_step(weights)]  # for nothing, if others need it
    if asked:
        how |= {"group_size": group_size, "seed": seed, "first": mine.start * group_size}
        found = [_respond(weights, tokenizer, asked, group_size, judge, how)]
        found = found[: len(problems[mine])]
    if parallel.size() == 1:
        return found[0]
    rollouts, scores = zip(*parallel.together(found))
    return engine.Rollout.joined(rollouts), [x for own in scores for x in own]


def _respond(model, tokenizer, problems, group_size, judge, how):
    prompts = [prompt_ids(tokenizer, p) for p in problems]
    environment, scores = Environment(tokenizer, problems, group_size), []
    how |= environment.arguments() | tokenizer.ids()
    rollout = engine.generate(model, prompts, **how).to("cpu")
    closed = rollout.tokens == (tokenizer.think_end_id or -1)
    closed &= torch.arange(closed.shape[1]) >= rollout.begun[:, None]
    closed, texts = closed.sum(1).tolist(), response_texts(tokenizer, rollout, rollout.begun)
    score = tasks.score_chat if tokenizer.has_turns else tasks.score
    for i, text in enumerate(texts):
        ended = rollout.ended[i] in ("eos", "budget")
        if not tokenizer.has_turns:  # byte by byte </think> is not the token
            ended = ended and text.count(tasks.THINK_END) == closed[i]
        problem, calls = problems[i // group_size], environment.calls[i]
        started = time.perf_counter()
        try:
            with bounded(problem):
                found = score(problem, text, ended, calls)
        except (Exception, SystemExit) as error:  # a verifier's bug costs a reward, not the run
            tell_crash("verifier", problem, error, "earns nothing")
            found = tasks.crashed(calls)
        scores.append(dataclasses.replace(found, seconds=time.perf_counter() - started))
    if judge:
        asked = [p for p in problems for _ in range(group_size)]
        scores = judge.scores(asked, texts, scores)
    return rollout, scores


class Environment:
    """What answers the calls of problems' responses, group_size each: MOST calls of a response.

    A small model calls the first tool, [ARGUMENT]. A chat model calls any, as M1 does, at the end
    of a turn; then the results are a turn, and another turn of its own begins.
    """

    MOST = 4

    def __init__(self, tokenizer, problems, group_size):
        self.tokenizer, self.problems, self.group_size = tokenizer, problems, group_size
        self.calls = Counter()  # of each response, but for those beyond MOST

    def arguments(self):
        """What engine.generate needs; nothing where there is nothing to call."""
        if not any(p.tools for p in self.problems):
            return {}
        [end] = self.tokenizer.encode(environments.CALL_END)
        call_id = self.tokenizer.eos_id if self.tokenizer.has_turns else end
        return {"call_id": call_id, "reply": self.reply}

    def reply(self, number, tokens):
        """The tokens that answer a response's call, which is the end of `tokens`; none if it called
        nothing, has no call left, or the tool crashed.
        """
        problem, left = self.problems[number // self.group_size], self.MOST - self.calls[number]
        if not problem.tools or not left:
            return []
        try:
            with bounded(problem):
                if self.tokenizer.has_turns:
                    return self._turn(problem, number, tokens, left)
                self.calls[number] += 1
                return self.tokenizer.encode(problem.reply(self.tokenizer.decode(tokens)))
        except (Exception, SystemExit) as error:
            tell_crash("tool", problem, error, "answers nothing")
            return []

    def _turn(self, problem, number, tokens, left):
        try:
            calls, said = parse_tool_calls(self.tokenizer.decode(tokens[:-1]))[:left], []
        except ValueError as error:
            calls, said = [], [("error", str(error))]
        self.calls[number] += len(calls) + len(said)
        said += ((call["name"], problem.use(**call)) for call in calls)
        if not said:
            return []
        results = [{"name": name[:100], "text": text} for name, text in said]
        pieces = chat_pieces([{"role": "tool", "content": results}])[1:]
        return self.tokenizer.encode(END_OF_TURN[1]) + self.tokenizer.encode_chat(pieces)


_hung = Counter()  # how often functions of a task did


@contextlib.contextmanager
def bounded(problem):
    """sandbox.bounded; a task that has hung gets less time, so that a step comes to an end."""
    try:
        with sandbox.bounded(20 / (1 + _hung[problem.task])):
            yield
    except TimeoutError:
        _hung[problem.task] += 1
        raise


def tell_crash(what, problem, error, so):
    """One line about a bug of a task, which costs a reward and not the run."""
    where = f"the {what} crashed on {problem.prompt!r} ({problem.task})"
    said = f"{where}, which {so}: {short(error)}"
    tqdm.write(said, file=None if parallel.first() else sys.stderr)


def response_texts(tokenizer, rollout, begun=0):
    """The N response texts, each from a token `begun` (N,) on, without the end token."""
    rows = (row[i:] for row, i in zip(rollout.ids(), (rollout.begun * 0 + begun).tolist()))
    return [tokenizer.decode([i for i in row if i != tokenizer.eos_id]) for row in rows]


def scored(model, tokenizer, problems, seeds, group_size=1, **how):
    """respond in pieces of 64 problems, each with a seed of its own, made of `seeds`:
    ([Score], [tokens]).
    """
    model = engine.rollout_weights(model)
    scores, lengths, size = [], [], 64  # larger batches fall out of a CPU's cache
    for start in range(0, len(problems), size):
        piece, seed = problems[start : start + size], substream(*seeds, start)
        rollout, new = respond(model, tokenizer, piece, seed, group_size, **how)
        scores += new
        lengths += rollout.lengths.tolist()
    return scores, lengths


def evaluate(model, tokenizer, flags):
    """Score a model on held-out problems, the same for every seed: (a row, rows by_family).

    accuracy = pass@1: the mean over k = eval_samples responses at temperature 1 to each problem;
    pass_k: at least one of them is right; greedy: the likeliest response is; eval_fork_rate,
    eval_length (tokens), eval_guess_right (share of those that did not fork): of the k.
    """
    start, k, how = time.perf_counter(), flags.eval_samples, flags.limits()
    ask = functools.partial(scored, model, tokenizer, flags.held_out, **how)
    scores, lengths = ask((flags.seed, "eval"), k)
    greedy, _ = ask((flags.seed, "greedy"), temperature=0)
    correct = [s.correct for s in scores]
    guesses = [s.correct for s in scores if not s.forked]
    row = {"eval_guess_right": fmean(guesses)} if guesses else {}
    row |= {
        "accuracy": fmean(correct),
        "pass_k": fmean(any(correct[i : i + k]) for i in range(0, len(correct), k)),
        "greedy": fmean(s.correct for s in greedy),
        "eval_fork_rate": fmean(s.forked for s in scores),
        "eval_length": fmean(lengths),
        "eval_s": time.perf_counter() - start,
    }
    return row, by_family("held-out", flags.held_out, k, scores, lengths)


# ============================================================================
# 3. Experience
# ============================================================================


def solvable(model, tokenizer, flags, candidates):
    """Which candidates to train on: 1 to 8 of 10 responses of this model are right (report sec. 4).

    Returns a list of bools; prints how many are kept and dropped; ValueError when none is kept.
    """
    how = flags.limits() | {"temperature": flags.sampling.temperature}
    scores, _ = scored(model, tokenizer, candidates, (flags.seed, "filter"), 10, **how)
    right = [sum(s.correct for s in scores[i : i + 10]) for i in range(0, len(scores), 10)]
    kept, easy = [0 < n < 9 for n in right], sum(n >= 9 for n in right)
    found = f"{sum(kept)} kept, {right.count(0)} never right, {easy} too easy"
    print(f"filter: {len(kept)} problems, {found}", flush=True)
    left = Counter(p.family for p, keep in zip(candidates, kept) if keep)
    if len(families := {p.family for p in candidates}) > 1:
        print(f"kept: {', '.join(f'{left[family]} {family}' for family in sorted(families))}")
    if not any(kept):
        raise ValueError("--filter-problems keeps none; take more of them or another --moves")
    return kept


def collect(model, tokenizer, problems, flags, sampling, step, judge=None):
    """Sample G answers to each problem, score them, keep the groups in which Score.value differs:
    some are right and some wrong, or cost more calls (DAPO). Form and length decide nothing.

    problems: a function that draws n of them. While fewer than min_groups are kept, more prompts
    are drawn, twice at most. Returns a Batch of the kept groups, None if there are still too few;
    means over everything sampled, dropped groups included; and rows by_family.
    """
    start, rollout_s, tried = time.perf_counter(), 0.0, []
    scores, lengths, rewards, logp = [], [], [], []  # of everything sampled
    prompts, responses, parts = [], [], []  # of what is kept
    G, buffer, how = flags.group_size, flags.recipe.overlong_buffer, dataclasses.asdict(sampling)
    how |= {"judge": judge} if judge else {}
    for attempt in range(3):
        asked, seed = problems(flags.prompts), substream(flags.seed, "rollout", step, attempt)
        rollout, new = respond(model, tokenizer, asked, seed, G, **how)
        earned = torch.tensor([s.reward for s in new])
        if buffer:
            earned += cispo.overlong_penalty(rollout.lengths, sampling.max_new_tokens, buffer)
        kept = torch.tensor([s.value for s in new])
        kept = cispo.informative_groups(kept, G).repeat_interleave(G)
        tried += asked
        scores += new
        rewards += earned.tolist()
        lengths += rollout.lengths.tolist()
        logp.append(rollout.logp[rollout.mask])
        rollout_s += rollout.seconds
        begun, answers = [prompt_ids(tokenizer, p) for p in asked], rollout.ids()
        for i in kept.nonzero()[:, 0].tolist():
            prompts.append(begun[i // G])
            responses.append(answers[i])
        here = torch.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
        here &= kept[:, None]
        cut = torch.tensor([flags.mask_truncated and why == "length" for why in rollout.ended])
        learned = rollout.mask & ~cut[:, None]
        parts.append((learned[here], rollout.logp[here], earned[kept]))
        if len(prompts) >= flags.min_groups * G:
            break
    seen = {
        "reward": fmean(rewards),
        "correct": fmean(s.correct for s in scores),
        "well_formed": fmean(s.well_formed for s in scores),
        "fork_rate": fmean(s.forked for s in scores),
        "length": fmean(lengths),
        "length_p99": sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1],
        "perplexity": math.exp(-float(torch.cat(logp).mean())),
        "crashes": sum(s.crashed for s in scores),
        "groups": len(prompts) // G,
        "sampled_groups": len(scores) // G,
        "rollout_s": rollout_s,
        "reward_s": time.perf_counter() - start - rollout_s,
    }
    families, batch = by_family("rollouts", tried, G, scores, lengths), None
    if seen["groups"] >= flags.min_groups:
        learned, recorded, earned = map(torch.cat, zip(*parts))
        batch = make_batch(prompts, responses, learned, model.device, earned, recorded)
    return batch, seen, families


# ============================================================================
# 4. What is only watched
# ============================================================================

CAPACITY = 1.25  # times an even load: what is logged as beyond an expert's


def measure(slices, old, watched, recipe, longest):
    """What is only watched of a step's updates: (columns of log.csv, what PPO's clip drops).

    slices: Batches; old: the passes of each; watched: of each update (gradient norm, [(loss,
    log-ratio, dropped, Aux) of each pass]). What is dropped: (token id, old probability, ratio).
    """
    trained, A = (torch.cat([getattr(p, x) for p in slices]) for x in ("trained", "advantages"))
    infer_logp = torch.cat([part.infer_logp for part in slices])[trained]
    done = [pair for before, (_, parts) in zip(old, watched) for pair in zip(before, parts)]
    told = [(was.logp, was.entropy, ratio, lost) for was, (_, ratio, lost, _) in done]
    told = parallel.rows([x for column in zip(*told) for x in column])  # in one exchange
    n = len(done)
    logp, entropy, log_ratio, dropped = (torch.cat(told[i * n : i * n + n]) for i in range(4))
    old_logp, entropy = logp[trained], entropy[trained]
    gap = (old_logp - infer_logp).abs()
    row = {
        "entropy": float(entropy.mean()),
        "prob_corr": cispo.prob_correlation(old_logp, infer_logp),
        "logp_gap": float(gap.max()),
        "logp_gap_mean": float(gap.mean()),
        "updates": len(slices),
    }
    late = trained.cumsum(1) > longest / 2  # half of what is allowed, not of the response's own
    for half, tokens in (("early", trained & ~late), ("late", trained & late)):
        size = A.abs() * tokens.sum(1)
        if total := float(size.sum()):
            row[f"negative_{half}"] = float(size[A < 0].sum()) / total

    logs, drops = [], []
    sizes = [len(part.tokens) for part in slices]
    split = zip(*(x.split(sizes) for x in (logp, log_ratio, dropped)))
    for part, (logp, log_ratio, dropped), (norm, parts) in zip(slices, split, watched):
        losses, _, _, auxs = zip(*parts)
        aux = auxs[-1]  # the loads of all passes are the whole slice's; a layer's sum is k
        load = aux.expert_load / aux.expert_load.sum(1, keepdim=True).round()  # (layers, E)
        beyond = (load - CAPACITY / load.shape[1]).clamp(min=0).sum(1).mean()
        router_loss = summed(sum(aux.router_loss for aux in auxs))
        own = {"loss": summed(sum(losses)), "grad_norm": norm, "router_loss": router_loss}
        own |= {"busiest_expert": float(load.max()), "over_capacity": float(beyond)}
        logs.append(own | cispo.statistics(log_ratio, dropped, part.trained, recipe))
        lost = (part.tokens[:, 1:], logp.exp(), log_ratio.exp())
        drops += zip(*(x[dropped].tolist() for x in lost))
    reduce = {"ratio_min": min, "ratio_max": max, "busiest_expert": max}
    row |= {name: reduce.get(name, fmean)([log[name] for log in logs]) for name in logs[0]}
    return row, drops


def by_family(part, problems, group_size, scores, lengths):
    """Rows of families.csv: how the families of these problems went."""
    found = {}
    for i, (score, length) in enumerate(zip(scores, lengths)):
        own = found.setdefault(problems[i // group_size].family, [])
        own.append((score.correct, score.reward, score.forked, score.calls, length, score.seconds))
    rows = []
    for family, own in sorted(found.items()):
        *columns, seconds = zip(*own)
        means = zip(("correct", "reward", "forked", "calls", "length"), map(fmean, columns))
        row = {"part": part, "family": family, "responses": len(own), **dict(means)}
        rows.append(row | {"check_s": sum(seconds)})
    return rows


def summed(x):
    """A number of all processes, each of which has its share as a tensor."""
    return float(parallel.totals(x.detach().view(1))[0])
