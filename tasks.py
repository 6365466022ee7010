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

    1. Problems            the tasks, TASKS, rules, draw; what a Problem is: environments.py
    2. Demonstrations      demonstration: what the cold start imitates
    3. Rewards             score, score_chat
    4. See it run          main: `python tasks.py`, a problem of each task, what responses earn
"""

import argparse
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cli import short
from environments import PARTNERS, Lookup, Open, Problem, Program

FORK, GUESS, THINK, THINK_END = "~", ".", "<think>", "</think>"

# ============================================================================
# 1. Problems
# ============================================================================


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
    *steps, _ = map(int, re.findall(r"[+-]\d", prompt))
    y, x, code = int(prompt[0]), int(prompt[2]), prompt[4:-3]
    values = [total % 5 for total in itertools.accumulate(steps, initial=x)]
    mend = (y - values[-1]) % 5
    tests = tuple((z, (z + sum(steps) + mend) % 5) for z in (*range(5), 17, 1001) if z != x)
    chain = "".join(sign + str(value) for sign, value in zip(code[::2], values[1:])) + f">{y}"
    code = f"def solve(x):\n    return (x{code}{{}}) % 5"
    return Program("repair", prompt, chain, f"+{mend}", code, tests)


def program(rng, n_moves):
    """f(x) mod 5, a polynomial, by f(0), f(1), ...: `#140=` -> 0,41,133, 1+3*x+3*y, y=x(x-1)/2.

    The chain is a table of differences, from the last value to the first. A row is a value, then
    each time the number above less the number before. The last row is Newton's form of f; z is
    y(x-2)/3. Degree 1 takes 1 move, 2 takes 3, 3 takes 6.
    """
    values = (rng.randrange(5) for _ in range(2 + (n_moves >= 3) + (n_moves >= 6)))
    return solve_program(f"#{''.join(map(str, values))}=")


def solve_program(prompt):
    """The Problem that this prompt poses; None if it is no problem of `program`."""
    if not re.fullmatch(r"#[0-4]{2,4}=", prompt):
        return None
    rows = [[]]
    for value in map(int, reversed(prompt[1:-1])):
        less = itertools.accumulate([value, *rows[-1]], lambda before, above: (above - before) % 5)
        rows.append([*less])
    chain, newton = ",".join("".join(map(str, row)) for row in rows[1:]), rows[-1]
    answer = "+".join(f"{c}{of}" for c, of in zip(newton, ["", "*x", "*y", "*z"]))
    hidden = (*range(len(newton), 10), 17, 1001)  # each x mod 5
    right = (sum(c * math.comb(x, k) for k, c in enumerate(newton)) % 5 for x in hidden)
    names = "y = x * (x - 1) // 2\n    z = y * (x - 2) // 3"
    code = f"def solve(x):\n    {names}\n    return ({{}}) % 5"
    return Program("program", prompt, chain, answer, code, tuple(zip(hidden, right)))


def tool(rng, n_moves):
    """The sum mod 5 of digits, behind a key: `?40213=` call [40213] -> +33310=, chain 31400."""
    return solve_tool(f"{rng.choice('+?')}{''.join(rng.choices('01234', k=n_moves))}=")


def solve_tool(prompt):
    """The Problem that this prompt poses; None if it is no problem of `tool`."""
    if not re.fullmatch(r"[+?][0-4]+=", prompt):
        return None
    digits = key = prompt[1:-1]
    if prompt[0] == "?":  # the table that nobody sees
        drawn = (hashlib.sha256(f"{key} {i}".encode()).digest() for i in range(len(key)))
        digits = "".join(str(x[0] % 5) for x in drawn)
    known = solve_mod(f"+{digits}=")
    return Lookup("tool", prompt, known.chain, known.answer, digits)


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
    "program": Task(program, solve_program),
    "tool": Task(tool, solve_tool),
    "recall": Task(recall),
    "far": Task(far),
    "judge": Task(judge),
}


def rules(problem):
    """What a chat model, which was never shown such problems, is told before the prompt."""
    told = (TASKS[problem.task].draw.__doc__ or "").partition("\n")[0]
    return f"{told} Think first, then give the answer alone.".strip()


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


# ============================================================================
# 2. Demonstrations
# ============================================================================


def demonstration(problem, rng, fork_prior):
    """One response to imitate in the cold start, as pieces (text, whether it is learned from).

    Half of the demonstrations are chains whose fork is not learned from: they teach how to work a
    problem out, not to start doing so. The other half fork with probability fork_prior and guess
    otherwise: they set how often a model starts. So skill and habit are two knobs. Where there is
    something to call, every other one does, needed or not; one that needs it and does not guesses,
    which is learned. What a tool answered never is.
    """
    answer, skilled, pieces = problem.shown(rng), rng.random() < 0.5, []
    if problem.call and rng.random() < 0.5:
        call, asked = problem.call[:1], problem.call[1:]
        pieces = [(call, not skilled), (asked, True), (problem.reply(problem.call), False)]
    lost, closed = problem.needed and not pieces, THINK_END + answer
    if not lost and (skilled or rng.random() < fork_prior):
        return [*pieces, (FORK, not skilled), (problem.chain + closed, True)]
    return [*pieces, (GUESS + closed, True)]


# ============================================================================
# 3. Rewards
# ============================================================================

FORMAT_REWARD, CALL_COST = 0.1, 0.2


@dataclass(frozen=True)
class Score:
    """What a response earned (report sec. 4): reward = correct + FORMAT_REWARD * well_formed -
    CALL_COST * calls.
    """

    reward: float
    correct: bool
    well_formed: bool
    forked: bool
    crashed: bool = False  # the verifier did
    calls: int = 0
    seconds: float = field(default=0.0, compare=False)  # that checking took
    grade: float | None = None  # a judge's, 0 to 1, of what no rule pays

    @property
    def value(self):
        """What it earned but for its form: groups in which this differs teach."""
        earned = self.correct if self.grade is None else self.grade
        return earned - CALL_COST * self.calls


def crashed(calls):
    """What a response earns on which the verifier crashed."""
    return Score(-CALL_COST * calls, False, False, False, crashed=True, calls=calls)


def score(problem, text, ended=True, calls=0):
    """Score a response text; `ended` says whether the model ended it itself. After so many
    calls it is what came behind the last answer of a tool.

    Well-formed: ended, with exactly one </think>, some thinking before it and an answer after it.
    Only well-formed responses can be correct. The thinking itself is not judged.
    """
    thinking, _, answer = text.partition(THINK_END)
    well_formed = ended and text.count(THINK_END) == 1 and thinking != "" and answer != ""
    correct = well_formed and problem.check(answer)
    if not isinstance(correct, bool):
        raise TypeError(f"check must return True or False, found {short(correct)}")
    reward = correct + FORMAT_REWARD * well_formed - CALL_COST * calls
    return Score(reward, correct, well_formed, text.startswith(FORK), calls=calls)


def score_chat(problem, text, ended=True, calls=0):
    """score for a chat model, which forks with <think>; that tag and blanks at either end of
    thinking and answer are no part of them.
    """
    thinking, tag, answer = text.partition(THINK_END)
    thinking = thinking.strip()
    plain = thinking.removeprefix(THINK).strip() + tag + answer.strip()
    return replace(score(problem, plain, ended, calls), forked=thinking.startswith(THINK))


# ============================================================================
# 4. See it run
# ============================================================================


def main(argv=None):
    """Print one problem of each task and what a right, a wrong and a malformed response earn."""
    argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False).parse_args(argv)
    print(f"{'task':8}{'prompt':18}{'response':38}reward  correct  well-formed  forked")
    for name in TASKS:
        problem = draw(random.Random(0), 1, [name], 6)[0]
        wrong = next(guess for guess in "123456789" if not problem.check(guess))
        worked, long = FORK + problem.chain, len(problem.prompt) > 17
        prompt = problem.prompt[:6] + "..." + problem.prompt[-6:] if long else problem.prompt
        right = worked + THINK_END + problem.answer
        for response in (right, GUESS + THINK_END + wrong, worked + problem.answer):
            s = score(problem, response)
            marks = ("yes" if mark else "no" for mark in (s.correct, s.well_formed, s.forked))
            line = f"{name:8}{prompt:18}{response:38}{s.reward:6.1f}"
            print(line + "{:>9}{:>13}{:>8}".format(*marks))
    print(
        f"\n{FORK} starts a chain, {GUESS} a guess; without {THINK_END} there is no answer to pay."
    )


if __name__ == "__main__":
    main()
