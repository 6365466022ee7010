"""What a problem may bring beside its prompt: a check, hidden tests, tools, a gold grade.

    1. Problem     what is asked, what is right, what the environment replies; described
    2. Program     right if it does on hidden inputs what it should: run in the sandbox
    3. Lookup      what is asked for lies behind a key, which a call looks up
    4. Open        what no rule pays: a judge does

Plain Python, no tensors. Which problems of these kinds there are stands in tasks.py.
"""

import functools
import inspect
import re
from collections import Counter
from dataclasses import dataclass

import sandbox

CALL, CALL_END = "[", "]"
MOST_SAID = 2000  # characters of what a tool says

# ============================================================================
# 1. Problem
# ============================================================================


@dataclass(frozen=True)
class Problem:
    """A prompt, the steps that solve it and the answer. Override `check` where answers vary, and
    `tools` where a response may call some.
    """

    task: str
    prompt: str
    chain: str
    answer: str

    tools = ()  # functions of texts, whose names and docstrings a chat model is told
    call = ""  # what calls the first one in the way that helps, if there are some: [ARGUMENT]
    needed = False  # whether the problem cannot be solved without
    judged = False  # True: no rule pays its answers, a judge does (judge.py)

    def check(self, answer):
        """Whether a model's answer is right, True or False. Must accept any string."""
        return answer == self.answer

    def shown(self, rng):
        """The answer that a demonstration gives."""
        return self.answer

    def use(self, name, arguments):
        """What a tool says to a call, or what is wrong with the call."""
        tool = {x.__name__: x for x in self.tools}.get(name)
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError:
            known = "; ".join(f"{x.__name__}{inspect.signature(x)}" for x in self.tools)
            return f"! no call of {known}"[:MOST_SAID]
        return tool(**arguments)[:MOST_SAID]

    def reply(self, text):
        """What the environment writes after a text that ends in a call of the first tool. Ends in
        "=", as prompts do.
        """
        tool, asked = self.tools[0], text.rpartition(CALL)[2][:-1]
        arguments = dict.fromkeys(inspect.signature(tool).parameters, asked)
        return self.use(tool.__name__, arguments) + "="

    @property
    def opening(self):
        """What a response needs before its thinking: a call with its reply, or nothing."""
        return self.call + self.reply(self.call) if self.needed else ""

    @property
    def family(self):
        """The name under which a run tells how such problems go."""
        return self.task


def described(tool):
    """A tool as M1's chat template lists it."""
    names = [*inspect.signature(tool).parameters]
    properties = {name: {"type": "string"} for name in names}
    parameters = {"type": "object", "properties": properties, "required": names}
    return {"name": tool.__name__, "description": tool.__doc__, "parameters": parameters}


# ============================================================================
# 2. Program
# ============================================================================


@dataclass(frozen=True)
class Program(Problem):
    """A program to be mended or written. What is right is decided by running it on inputs that the
    prompt does not show, in the sandbox.
    """

    code: str = ""  # with {} where the answer goes
    tests: tuple = ()  # (input, output)

    def __post_init__(self):
        if why := sandbox.missing():
            raise ValueError(f"task {self.task} runs programs: {why}")

    def check(self, answer):
        return _passes(self.code.replace("{}", answer), self.tests)


@functools.lru_cache(2**16)
def _passes(program, tests):
    inputs, right = zip(*tests)
    outputs = sandbox.run(program, [(x,) for x in inputs]).outputs
    return outputs is not None and sandbox.agree(outputs, [*right])


# ============================================================================
# 3. Lookup
# ============================================================================


@dataclass(frozen=True)
class Lookup(Problem):
    """A running sum whose digits are shown (+), or lie behind a key (?) that a call looks up."""

    digits: str = ""

    def look(self, key):
        """The digits behind a key."""
        return f"+{self.digits}" if key == self.prompt[1:-1] else "!"

    @property
    def tools(self):
        return [self.look]

    @property
    def call(self):
        return CALL + self.prompt[1:-1] + CALL_END

    @property
    def needed(self):
        return self.prompt[0] == "?"

    @property
    def family(self):
        return self.task if self.needed else f"{self.task}, shown"


# ============================================================================
# 4. Open
# ============================================================================

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
