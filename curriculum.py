"""What a run is about and how that changes as it learns: which tasks, how hard, how long.

Mix          the tasks, their shares and difficulty
Growth       what may grow
Curriculum   windows, difficulty and filtered problems, decided by what rollouts show
"""

import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from statistics import fmean

import tasks
from cli import check, fits, short


@dataclass(frozen=True)
class Mix:
    """Which problems a run is about."""

    task: str = "mod,walk,cups"
    """tasks to mix, separated by commas; mod:2 twice as often, mod:0-1 rising over the steps"""
    moves: int = 6
    """difficulty: steps per problem"""
    min_moves: int | None = None
    """fewest steps per problem: they vary from this to --moves; None = all have --moves"""

    def __post_init__(self):
        check(self, moves=(1, 1000), min_moves=(1, 1000))
        if twice := [name for name in self.names if name and self.names.count(name) > 1]:
            raise ValueError(f"--task names {twice[0]} twice; give it a weight: {twice[0]}:2")
        if not all(sum(self.shares(at).values()) for at in (0, 1)):
            raise ValueError(f"--task {short(self.task)}: all weights are 0, at first or at last")
        if self.min_moves and self.min_moves > self.moves:
            raise ValueError(f"--min-moves {self.min_moves} is more than --moves {self.moves}")

    @property
    def names(self):
        """The tasks as a list."""
        return [name.partition(":")[0].strip() for name in self.task.split(",")]

    def shares(self, progress):
        """{task: weight} after this share of the run's steps."""
        weights = {}
        for name, text in zip(self.names, self.task.split(",")):
            found = re.fullmatch(r"[^:]*(?::([\d.]+)(?:-([\d.]+))?)?\s*", text)
            try:
                first, last = (float(x or 1) for x in (found[1], found[2] or found[1]))
            except (TypeError, ValueError):
                first = last = math.inf
            if max(first, last) > 1000:
                need = "a task, with a weight such as :2 or :0-1 if not 1, up to 1000"
                raise ValueError(f"--task: {short(text)} is not {need}")
            weights[name] = first + (last - first) * progress
        return weights

    def draw(self, rng, n, moves=None, held_out=False, progress=None):
        """n of these problems, or as hard as `moves` says, of all tasks in turn; where they have
        weights, each of a task drawn by those after this share of the steps. rng: random.Random.
        """
        names = self.names
        if progress is not None and ":" in self.task:
            weights = self.shares(progress)
            names = rng.choices([*weights], weights.values(), k=n)
        return tasks.draw(rng, n, names, moves or self.moves, self.min_moves, held_out)

    def solve(self, prompt):
        """The Problem that a prompt poses, if it is one of these tasks that can be told."""
        solvers = (tasks.TASKS[name].solve for name in self.names if tasks.TASKS[name].solve)
        return next(filter(None, (solve(prompt) for solve in solvers)), None)


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

    def problems(self, seed, progress=0.0):
        """A function of n that draws n of a step's problems, after this share of all steps."""
        rng = random.Random(seed)
        if not self.kept:
            return lambda n: self.mix.draw(rng, n, self.moves, progress=progress)
        filter_seed, marks = self.kept
        pool = [p for p, keep in zip(self.candidates(filter_seed), marks) if keep]
        shares, found = self.mix.shares(progress), Counter(p.task for p in pool)
        each = found if ":" not in self.mix.task else dict.fromkeys(found, 1)  # as many as are kept
        weights = [shares[p.task] * each[p.task] / found[p.task] for p in pool]
        return lambda n: rng.choices(pool, weights if any(weights) else None, k=n)

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
