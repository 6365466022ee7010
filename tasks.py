"""Problems in, rewards out: what the small models learn by reinforcement. Plain Python, no tensors.

A response is a guess, `.</think>ANSWER`, or a worked answer, `~CHAIN</think>ANSWER`. The first
token decides: `~` stands for "wait, let me work it out", the report's fork token. A small model
that guesses stays near chance however long it is trained; a chain writes the steps down one by one
and is nearly always right. Before RL the model can do both but rarely starts a chain: what RL
teaches is to think first, and responses grow longer as they get better (MiniMax-M1 report, Fig. 4,
in miniature).

To add a task, write one function (random, n_moves) -> Problem and name it in TASKS. RL has
something to teach where only a chain helps:
  - a guess stays near chance, because the answer takes several steps that need each other (where
    chain and answer are the same text, digits backwards say, a guess does as well);
  - each step of the chain is one token, found at a constant distance from what it is made of;
  - there are at most some 40 facts to learn (a 5 x 5 table is 25) and 12 steps.
The first line of its docstring is what a chat model is told of it.

    1. Problems            Problem, the tasks, TASKS, draw, Mix
    2. Demonstrations      demonstration: what the cold start imitates
    3. Rewards             score, score_chat
    4. Curriculum          Growth, Curriculum: windows, difficulty, filtered problems
    5. See it run          main: `python tasks.py`, a problem of each task, what responses earn
"""

import argparse
import functools
import hashlib
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import sandbox
from cli import check, fits, short

FORK, GUESS, THINK, THINK_END = "~", ".", "<think>", "</think>"

# ============================================================================
# 1. Problems
# ============================================================================


@dataclass(frozen=True)
class Problem:
    """A prompt, the steps that solve it and the answer. Override `check` where answers vary."""

    judged = False  # True: no rule pays its answers, a judge does (judge.py)
    task: str
    prompt: str
    chain: str
    answer: str

    def check(self, answer):
        """Whether a model's answer is right, True or False. Must accept any string."""
        return answer == self.answer

    def shown(self, rng):
        """The answer that a demonstration gives."""
        return self.answer

    @property
    def rules(self):
        """What a chat model, which was never shown such problems, is told before the prompt."""
        told = (TASKS[self.task].draw.__doc__ or "").partition("\n")[0]
        return f"{told} Think first, then give the answer alone.".strip()


def mod(rng, n_moves):
    """The running sum modulo 5 of digits 0 to 4: `+314204=` -> chain 343004, answer 4."""
    return solve_mod(f"+{''.join(str(rng.randrange(5)) for _ in range(n_moves))}=")


def solve_mod(prompt):
    """The Problem that this prompt poses; None if it is no problem of `mod`."""
    if not re.fullmatch(r"\+[0-4]+=", prompt):
        return None
    digits = [int(digit) for digit in prompt[1:-1]]
    chain = "".join(str(total % 5) for total in itertools.accumulate(digits))
    return Problem("mod", prompt, chain, chain[-1])


def walk(rng, n_moves):
    """A walk on a 3 x 3 torus of cells 1 to 9, from 5: `5rulldr=` -> chain 632145, answer 5."""
    start = 3 * rng.randrange(3) + rng.randrange(3) + 1
    return solve_walk(f"{start}{''.join(rng.choice('lrud') for _ in range(n_moves))}=")


def solve_walk(prompt):
    """The Problem that this prompt poses; None if it is no problem of `walk`."""
    if not re.fullmatch(r"[1-9][lrud]+=", prompt):
        return None
    row, column, chain = *divmod(int(prompt[0]) - 1, 3), ""
    for move in prompt[1:-1]:
        down, right = {"l": (0, -1), "r": (0, 1), "u": (-1, 0), "d": (1, 0)}[move]
        row, column = (row + down) % 3, (column + right) % 3
        chain += str(3 * row + column + 1)
    return Problem("walk", prompt, chain, chain[-1])


def cups(rng, n_moves):
    """A ball under cup 1 to 4; a, b, c swap 1-2, 2-3, 3-4: `2abcacb=` -> chain 111223, answer 3."""
    start = rng.randrange(4) + 1
    return solve_cups(f"{start}{''.join('abc'[rng.randrange(3)] for _ in range(n_moves))}=")


def solve_cups(prompt):
    """The Problem that this prompt poses; None if it is no problem of `cups`."""
    if not re.fullmatch(r"[1-4][abc]+=", prompt):
        return None
    cup, chain = int(prompt[0]), ""
    for swap in prompt[1:-1]:
        left = "abc".index(swap) + 1
        cup = {left: left + 1, left + 1: left}.get(cup, cup)
        chain += str(cup)
    return Problem("cups", prompt, chain, chain[-1])


def recall(rng, n_moves, filler=0):
    """Associative recall of n_moves pairs: `f3k7a1?k=` -> chain a1f3k7, answer k7.

    For the study of hybrid attention: a guess needs only memory, and chains, all pairs in any
    order, train that memory at every pair.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    if n_moves > len(letters):
        raise ValueError(
            f"recall has {len(letters)} keys, so at most as many moves, found {n_moves}"
        )
    pairs = [key + str(rng.randrange(10)) for key in rng.sample(letters, n_moves)]
    answer = rng.choice(pairs)
    prompt = "".join(pairs) + "-" * filler + f"?{answer[0]}="
    chain = "".join(rng.sample(pairs, n_moves))
    return Problem("far" if filler else "recall", prompt, chain, answer)


def far(rng, n_moves):
    """recall across 32 characters of filler: `f3k7a1---?k=` -> chain a1f3k7, answer k7."""
    return recall(rng, n_moves, filler=32)


@dataclass(frozen=True)
class Repair(Problem):
    """A program with a fault, to be mended. What is right is decided by running it on inputs that
    the prompt does not show, in the sandbox.
    """

    code: str = ""  # with {} where the answer goes
    tests: tuple = ()  # (input, output)

    def check(self, answer):
        return _passes(self.code.replace("{}", answer), self.tests)


@functools.lru_cache(2**16)
def _passes(program, tests):
    inputs, right = zip(*tests)
    outputs = sandbox.run(program, [(x,) for x in inputs]).outputs
    return outputs is not None and sandbox.agree(outputs, [*right])


def repair(rng, n_moves):
    """Mend a program's last step, mod 5: `1<2:+2-1+0-2=`, 2 gives 1 -> chain +4-3+3>1, edit +3."""
    kinds, x = ["+0", "+1", "+2", "-1", "-2"], rng.randrange(5)
    steps, (wrong, right) = rng.choices(kinds, k=n_moves - 1), rng.sample(kinds, 2)
    y = (x + sum(map(int, [*steps, right]))) % 5
    return solve_repair(f"{y}<{x}:{''.join([*steps, wrong])}=")


def solve_repair(prompt):
    """The Problem that this prompt poses; None if it is no problem of `repair`."""
    if not re.fullmatch(r"[0-4]<[0-4]:([+-][0-4])+=", prompt):
        return None
    if why := sandbox.missing():
        raise ValueError(f"task repair runs programs: {why}")
    *steps, _ = map(int, re.findall(r"[+-]\d", prompt))
    y, x, code = int(prompt[0]), int(prompt[2]), prompt[4:-3]
    values = [total % 5 for total in itertools.accumulate(steps, initial=x)]
    mend = (y - values[-1]) % 5
    tests = tuple((z, (z + sum(steps) + mend) % 5) for z in (*range(5), 17, 1001) if z != x)
    chain = "".join(sign + str(value) for sign, value in zip(code[::2], values[1:])) + f">{y}"
    code = f"def solve(x):\n    return (x{code}{{}}) % 5"
    return Repair("repair", prompt, chain, f"+{mend}", code, tests)


PARTNERS = dict(zip("abcde", "31402"))


@dataclass(frozen=True)
class Open(Problem):
    """A general question, whose answers no rule pays: a judge does, and it can be fooled.

    gold is what a person sees who takes the time: for labels, evaluations and the study alone.
    """

    judged = True

    def gold(self, answer):
        """Grade 0 to 4, in quarters: items named with their partner, less what is said beyond that.
        Order and filler, `-`, are nothing.
        """
        pairs = re.findall(r"[a-e][0-4]", answer.replace("-", ""))
        right = Counter(x + PARTNERS[x] for x in self.chain) & Counter(pairs)
        excess = max(len(pairs) - len(self.chain), 0)
        return max(4 * (right.total() - excess) // len(self.chain), 0)

    def check(self, answer):
        return self.gold(answer) == 4

    def shown(self, rng, wrong=0.5, filler=0.03):
        """An answer whose partners are drawn anew at a rate, and with filler at another."""
        named = "".join(
            x + (rng.choice("01234") if rng.random() < wrong else PARTNERS[x]) for x in self.chain
        )
        return "".join(x + "-" * (rng.random() < filler) for x in named)


def judge(rng, n_moves):
    """Name the partner of each letter; a judge decides: `?cadb=` -> chain cadb, answer c4a3d0b1."""
    items = "".join(rng.choice([*PARTNERS]) for _ in range(n_moves))
    return Open("judge", f"?{items}=", items, "".join(x + PARTNERS[x] for x in items))


class Task(NamedTuple):
    """How to draw a problem and, where a person's own prompts can be checked, how to solve one."""

    draw: Callable  # (random.Random, n_moves) -> Problem
    solve: Callable = None  # prompt -> Problem, or None if the prompt is none of this task


TASKS = {
    "mod": Task(mod, solve_mod),
    "walk": Task(walk, solve_walk),
    "cups": Task(cups, solve_cups),
    "repair": Task(repair, solve_repair),
    "recall": Task(recall),
    "far": Task(far),
    "judge": Task(judge),
}


def is_held_out(prompt):
    """One prompt in eight is never trained on. Decided by the text alone, so that the two sets
    cannot overlap, by a cryptographic hash: a checksum such as CRC32 is linear and held out some
    answers three times as often as others.
    """
    return hashlib.sha256(prompt.encode()).digest()[0] % 8 == 0


def draw(rng, n, names, n_moves, min_moves=None, held_out=False):
    """n problems, the tasks `names` in turn, all from the training or all from the held-out side.

    rng: random.Random. n_moves: the difficulty, steps per chain; with min_moves every problem has a
    number of its own between the two. Held-out problems are distinct, so of easy ones there may be
    fewer; ValueError if they run out.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        what = ", ".join(unknown)[:200] or "(none given)"
        raise ValueError(f"unknown task {what}; choose from {', '.join(TASKS)}")
    if n_moves < 1:
        raise ValueError(f"a problem needs at least 1 move, found {n_moves}")
    problems, seen, tries = [], set(), 0
    while len(problems) < n:
        steps = rng.randint(min_moves, n_moves) if min_moves else n_moves
        problem = TASKS[names[len(problems) % len(names)]].draw(rng, steps)
        fits = is_held_out(problem.prompt) == held_out and not (held_out and problem.prompt in seen)
        tries = 0 if fits else tries + 1
        if tries > 20_000:
            kind = f"{'held-out' if held_out else 'training'} problems, not {n}"
            has = f"{n_moves} moves give only {len(seen)} {kind}"
            raise ValueError(f"{has}; take more moves or fewer problems")
        if fits:
            problems.append(problem)
            seen.add(problem.prompt)
    return problems


@dataclass(frozen=True)
class Mix:
    """Which problems a run is about."""

    task: str = "mod,walk,cups"
    """tasks to mix evenly, separated by commas"""
    moves: int = 6
    """difficulty: steps per problem"""
    min_moves: int | None = None
    """fewest steps per problem: they vary from this to --moves; None = all have --moves"""

    def __post_init__(self):
        check(self, moves=(1, 1000), min_moves=(1, 1000))
        if self.min_moves and self.min_moves > self.moves:
            raise ValueError(f"--min-moves {self.min_moves} is more than --moves {self.moves}")

    @property
    def names(self):
        """The tasks as a list."""
        return [name.strip() for name in self.task.split(",")]

    def draw(self, rng, n, moves=None, held_out=False):
        """n of these problems, or as hard as `moves` says. rng: random.Random."""
        return draw(rng, n, self.names, moves or self.moves, self.min_moves, held_out)

    def solve(self, prompt):
        """The Problem that a prompt poses, if it is one of these tasks that can be told."""
        solvers = (TASKS[name].solve for name in self.names if TASKS[name].solve)
        return next(filter(None, (solve(prompt) for solve in solvers)), None)


# ============================================================================
# 2. Demonstrations
# ============================================================================


def demonstration(problem, rng, fork_prior):
    """One response to imitate in the cold start: (text, n_unlearned).

    The first n_unlearned characters carry no loss. Half of the demonstrations are chains whose fork
    is not learned from: they teach how to work a problem out, not to start doing so. The other half
    fork with probability fork_prior and guess otherwise: they set how often a model starts. So
    skill and habit are two knobs.
    """
    answer = problem.shown(rng)
    worked = FORK + problem.chain + THINK_END + answer
    if rng.random() < 0.5:
        return worked, len(FORK)
    return (worked if rng.random() < fork_prior else GUESS + THINK_END + answer), 0


# ============================================================================
# 3. Rewards
# ============================================================================

FORMAT_REWARD = 0.1


@dataclass(frozen=True)
class Score:
    """What a response earned: reward = correct + FORMAT_REWARD * well_formed (report sec. 4)."""

    reward: float
    correct: bool
    well_formed: bool
    forked: bool
    crashed: bool = False  # the verifier did

    @property
    def grade(self):
        """What the answer alone earned, its form aside."""
        return self.reward - FORMAT_REWARD * self.well_formed


CRASHED = Score(0.0, False, False, False, crashed=True)


def score(problem, text, ended=True):
    """Score a response text; `ended` says whether the model ended it itself.

    Well-formed: ended, with exactly one </think>, some thinking before it and an answer after it.
    Only well-formed responses can be correct. The thinking itself is not judged.
    """
    thinking, _, answer = text.partition(THINK_END)
    well_formed = ended and text.count(THINK_END) == 1 and thinking != "" and answer != ""
    correct = well_formed and problem.check(answer)
    if not isinstance(correct, bool):
        raise TypeError(f"check must return True or False, found {short(correct)}")
    return Score(correct + FORMAT_REWARD * well_formed, correct, well_formed, text.startswith(FORK))


def score_chat(problem, text, ended=True):
    """score for a chat model, which forks with <think>; that tag and blanks at either end of
    thinking and answer are no part of them.
    """
    thinking, tag, answer = text.partition(THINK_END)
    thinking = thinking.strip()
    plain = thinking.removeprefix(THINK).strip() + tag + answer.strip()
    return replace(score(problem, plain, ended), forked=thinking.startswith(THINK))


# ============================================================================
# 4. Curriculum                                         (report sec. 4 and 5)
# ============================================================================


@dataclass(frozen=True)
class Growth:
    """How a run grows while it learns: see Curriculum."""

    windows: str | None = None
    """longest response in tokens, in stages such as 40,48,56 (report sec. 5)"""
    max_moves: int | None = None
    """moves rise to this as rollouts get right (report sec. 4); the cold start has all"""
    filter_problems: int = 0
    """draw so many problems first, train on those right in 1 to 8 of 10 tries (report sec. 4)"""

    def __post_init__(self):
        check(self, max_moves=(1, 1000), filter_problems=(0, 10**6))
        if [0, *self.limits] != sorted({0, *self.limits}):
            need = "rising numbers of tokens such as 40,48,56"
            raise ValueError(f"--windows must be {need}, found {short(self.windows)}")

    @property
    def limits(self):
        """--windows as a list of tokens; [0] where one is no number."""
        parts = [] if self.windows is None else self.windows.split(",")
        good = all(part.strip().isdecimal() and len(part) < 8 for part in parts)
        return [int(part) for part in parts] if good else [0]


class Curriculum:
    """What changes as a run learns: how long responses may be, how hard problems are, and which.

    Windows (report sec. 5): a run moves to the next one after a step at which both hold,
      - the outputs' perplexity has converged: its mean over the last STEPS steps in this window
        differs from that over the STEPS steps before by at most CONVERGED, relatively;
      - their length nears the limit: its 99th percentile in this step is at least NEAR of it.
    Moves (report sec. 4): one more after STEPS steps at this difficulty in which on average EASY
    responses were right. Evaluations know none of this: they keep the run's own problems and
    longest response. The numbers are ours.
    """

    STEPS, CONVERGED, NEAR, EASY = 5, 0.02, 0.9, 0.8

    STATE = {  # what a checkpoint holds
        "window": int,
        "extra": int,  # moves beyond the mix's own
        "perplexity": list[float],  # the last 2 STEPS steps' in this window
        "correct": list[float],  # the last STEPS steps' at this difficulty
        "kept": tuple[int, list[bool]] | None,  # (seed of candidates, which to train on)
    }

    def __init__(self, mix, growth):
        self.mix, self.growth, self.window, self.extra = mix, growth, 0, 0
        self.perplexity, self.correct, self.kept = [], [], None

    def state_dict(self):
        """What `load_state_dict` goes on from."""
        return {name: getattr(self, name) for name in self.STATE}

    def load_state_dict(self, state):
        """Go on from a state; ValueError if no run with these settings can have left it."""
        n, steps = self.STEPS, (self.growth.max_moves or self.mix.moves) - self.mix.moves
        right = fits(state, dict) and state.keys() == self.STATE.keys()
        right = right and all(fits(state[name], kind) for name, kind in self.STATE.items())
        if right:
            window, extra, perplexity, correct, kept = (state[name] for name in self.STATE)
            right = 0 <= window < max(len(self.growth.limits), 1) and 0 <= extra <= steps
            right = right and len(perplexity) <= 2 * n and all(0 < x < 1e300 for x in perplexity)
            right = right and len(correct) <= n and all(0 <= x <= 1 for x in correct)
            marks = kept[1] if kept else []
            right = right and len(marks) == self.growth.filter_problems and any([not kept, *marks])
        if not right:
            raise ValueError(f"a curriculum of this run cannot be {short(state)}")
        vars(self).update(state)

    @property
    def moves(self):
        """Steps per problem now."""
        return self.mix.moves + self.extra

    @property
    def limit(self):
        """The longest response allowed now, in tokens; None without windows."""
        return self.growth.limits[self.window] if self.growth.limits else None

    def candidates(self, seed):
        """The training problems that --filter-problems tries, the same ones whenever asked."""
        return self.mix.draw(random.Random(seed), self.growth.filter_problems)

    def problems(self, seed):
        """A function of n that draws n of a step's problems."""
        rng = random.Random(seed)
        if self.kept:
            filter_seed, marks = self.kept
            pool = [p for p, keep in zip(self.candidates(filter_seed), marks) if keep]
            return lambda n: rng.choices(pool, k=n)
        return lambda n: self.mix.draw(rng, n, self.moves)

    def observe(self, seen):
        """Take in what a step's rollouts showed (experience.collect) and decide about the next
        step.
        """
        n, limits = self.STEPS, self.growth.limits
        self.perplexity = [*self.perplexity, seen["perplexity"]][-2 * n :]
        self.correct = [*self.correct, seen["correct"]][-n:]
        if self.window < len(limits) - 1 and len(self.perplexity) == 2 * n:
            before, after = fmean(self.perplexity[:n]), fmean(self.perplexity[n:])
            converged = abs(after / before - 1) <= self.CONVERGED
            if converged and seen["length_p99"] >= self.NEAR * limits[self.window]:
                self.window, self.perplexity = self.window + 1, []
        room = (self.growth.max_moves or 0) - self.moves
        if room > 0 and len(self.correct) == n and fmean(self.correct) >= self.EASY:
            self.extra, self.correct = self.extra + 1, []


# ============================================================================
# 5. See it run
# ============================================================================


def main(argv=None):
    """Print one problem of each task and what a right, a wrong and a malformed response earn."""
    argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False).parse_args(argv)
    print(f"{'task':8}{'prompt':18}{'response':28}reward   correct   well-formed   forked")
    for name in TASKS:
        problem = draw(random.Random(0), 1, [name], 6)[0]
        wrong = next(guess for guess in "123456789" if not problem.check(guess))
        worked, long = FORK + problem.chain, len(problem.prompt) > 17
        prompt = problem.prompt[:6] + "..." + problem.prompt[-6:] if long else problem.prompt
        right = worked + THINK_END + problem.answer
        for response in (right, GUESS + THINK_END + wrong, worked + problem.answer):
            s = score(problem, response)
            marks = ("yes" if mark else "no" for mark in (s.correct, s.well_formed, s.forked))
            line = f"{name:8}{prompt:18}{response:28}{s.reward:6.1f}"
            print(line + "{:>10}{:>14}{:>9}".format(*marks))
    print(
        f"\n{FORK} starts a chain, {GUESS} a guess; without {THINK_END} there is no answer to pay."
    )


if __name__ == "__main__":
    main()
