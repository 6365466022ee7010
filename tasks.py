"""Problems in, rewards out: what the small models learn by reinforcement. Plain Python, no tensors.

A response is a guess, `.</think>ANSWER`, or a worked answer, `~CHAIN</think>ANSWER`. The first token decides: `~`
stands for "wait, let me work it out", the report's fork token. A small model that guesses stays near chance however
long it is trained; a chain writes the steps down one by one and is nearly always right. Before RL the model can do
both but rarely starts a chain: what RL teaches is to think first, and responses grow longer as they get better
(MiniMax-M1 report, Fig. 4, in miniature).

To add a task, write one function (random, n_moves) -> Problem and name it in TASKS. Nothing else needs to change.

    1. Problems            Problem, the tasks, TASKS, draw
    2. Demonstrations      demonstration: what the cold start imitates
    3. Rewards             score
    4. See it run          main: `python tasks.py`, a problem of each task and what responses to it earn
"""

import argparse
import hashlib
import random
from dataclasses import dataclass

FORK, GUESS, THINK_END = "~", ".", "</think>"

# ============================================================================
# 1. Problems
# ============================================================================


@dataclass(frozen=True)
class Problem:
    """One problem: its prompt, the steps that solve it and the answer. Override `check` where answers vary."""

    task: str
    prompt: str
    chain: str
    answer: str

    def check(self, answer):
        """Whether a model's answer is right. Must accept any string."""
        return answer == self.answer


def mod(rng, n_moves):
    """The running sum modulo 5 of digits 0 to 4: `+314204=` -> chain 343004, answer 4."""
    digits = [rng.randrange(5) for _ in range(n_moves)]
    chain = "".join(str(sum(digits[: i + 1]) % 5) for i in range(n_moves))
    return Problem("mod", f"+{''.join(map(str, digits))}=", chain, chain[-1])


def walk(rng, n_moves):
    """A walk on a 3 x 3 torus, cells 1 to 9 in reading order: from 5, `5rulldr=` -> chain 632145, answer 5."""
    step = {"l": (0, -1), "r": (0, 1), "u": (-1, 0), "d": (1, 0)}
    row, column = rng.randrange(3), rng.randrange(3)
    moves = [rng.choice("lrud") for _ in range(n_moves)]
    prompt, chain = f"{3 * row + column + 1}{''.join(moves)}=", ""
    for move in moves:
        row, column = (row + step[move][0]) % 3, (column + step[move][1]) % 3
        chain += str(3 * row + column + 1)
    return Problem("walk", prompt, chain, chain[-1])


def cups(rng, n_moves):
    """A ball under cup 1 to 4; a, b, c swap cups 1-2, 2-3, 3-4: `2abcacb=` -> chain 111223, answer 3."""
    cup = rng.randrange(4)
    swaps = [rng.randrange(3) for _ in range(n_moves)]
    prompt, chain = f"{cup + 1}{''.join('abc'[s] for s in swaps)}=", ""
    for s in swaps:
        cup = {s: s + 1, s + 1: s}.get(cup, cup)
        chain += str(cup + 1)
    return Problem("cups", prompt, chain, chain[-1])


def recall(rng, n_moves, filler=0):
    """Associative recall of n_moves pairs: `f3k7a1?k=` -> chain a1f3k7, answer k7. For bench.py hybrid: a guess needs
    only memory, and chains, all pairs in any order, train that memory at every pair.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    if n_moves > len(letters):
        raise ValueError(f"recall has {len(letters)} keys, so at most as many moves, found {n_moves}")
    pairs = [key + str(rng.randrange(10)) for key in rng.sample(letters, n_moves)]
    answer = rng.choice(pairs)
    prompt, chain = "".join(pairs) + "-" * filler + f"?{answer[0]}=", "".join(rng.sample(pairs, n_moves))
    return Problem("far" if filler else "recall", prompt, chain, answer)


def far(rng, n_moves):
    """recall across 32 characters of filler."""
    return recall(rng, n_moves, filler=32)


TASKS = {"mod": mod, "walk": walk, "cups": cups, "recall": recall, "far": far}


def is_held_out(prompt):
    """One prompt in eight is never trained on. Decided by the text alone, so the two sets cannot overlap, and by a
    cryptographic hash: a checksum such as CRC32 is linear and held out some answers three times as often as others.
    """
    return hashlib.sha256(prompt.encode()).digest()[0] % 8 == 0


def draw(rng, n, names, n_moves, min_moves=None, held_out=False):
    """n problems, the tasks `names` in turn, all from the training or all from the held-out side.

    rng: random.Random. n_moves: the difficulty, steps per chain; with min_moves every problem has a number of its own
    between the two. Held-out problems are distinct, so of easy ones there may be fewer; ValueError if they run out.
    """
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"unknown task {', '.join(unknown) or '(none given)'}; choose from {', '.join(TASKS)}")
    if n_moves < 1:
        raise ValueError(f"a problem needs at least 1 move, found {n_moves}")
    problems, seen, tries = [], set(), 0
    while len(problems) < n:
        steps = rng.randint(min_moves, n_moves) if min_moves else n_moves
        problem = TASKS[names[len(problems) % len(names)]](rng, steps)
        fits = is_held_out(problem.prompt) == held_out and not (held_out and problem.prompt in seen)
        tries = 0 if fits else tries + 1
        if tries > 20_000:
            kind = f"{'held-out' if held_out else 'training'} problems"
            raise ValueError(
                f"{n_moves} moves give only {len(seen)} {kind}, not {n}; take more moves or fewer problems"
            )
        if fits:
            problems.append(problem)
            seen.add(problem.prompt)
    return problems


# ============================================================================
# 2. Demonstrations
# ============================================================================


def demonstration(problem, rng, fork_prior):
    """One response to imitate in the cold start: (text, n_unlearned), the first n_unlearned characters carry no loss.

    Half of the demonstrations are chains whose fork is not learned from: they teach how to work a problem out, not to
    start doing so. The other half fork with probability fork_prior and guess otherwise: they set how often a model
    starts. So skill and habit are two knobs.
    """
    worked, guess = FORK + problem.chain + THINK_END + problem.answer, GUESS + THINK_END + problem.answer
    if rng.random() < 0.5:
        return worked, len(FORK)
    return (worked if rng.random() < fork_prior else guess), 0


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


def score(problem, text, ended=True):
    """Score a response text; `ended` says whether the model ended it itself.

    Well-formed: ended, with exactly one </think>, some thinking before it and an answer after it. Only well-formed
    responses can be correct. The thinking itself is not judged.
    """
    thinking, _, answer = text.partition(THINK_END)
    well_formed = ended and text.count(THINK_END) == 1 and thinking != "" and answer != ""
    correct = well_formed and problem.check(answer)
    return Score(correct + FORMAT_REWARD * well_formed, correct, well_formed, text.startswith(FORK))


# ============================================================================
# 4. See it run
# ============================================================================


def main(argv=None):
    """Print one problem of each task and the rewards of a right, a wrong and a malformed response."""
    argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False).parse_args(argv)
    print(f"{'task':8}{'prompt':18}{'response':28}reward   correct   well-formed   forked")
    for name in TASKS:
        problem = draw(random.Random(0), 1, [name], 6)[0]
        wrong = next(guess for guess in "123456789" if not problem.check(guess))
        worked = FORK + problem.chain
        for response in (worked + THINK_END + problem.answer, GUESS + THINK_END + wrong, worked + problem.answer):
            s = score(problem, response)
            marks = ("yes" if mark else "no" for mark in (s.correct, s.well_formed, s.forked))
            prompt = problem.prompt if len(problem.prompt) < 18 else problem.prompt[:6] + "..." + problem.prompt[-6:]
            print(f"{name:8}{prompt:18}{response:28}{s.reward:6.1f}" + "{:>10}{:>14}{:>9}".format(*marks))
    print(f"\n{FORK} starts a chain, {GUESS} a guess; without {THINK_END} a response has no answer and earns nothing.")


if __name__ == "__main__":
    main()
