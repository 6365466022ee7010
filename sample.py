"""Talk to a model: a chat whose history stays in the cache, and the command line.

python sample.py --model runs/tiny-cispo-001 --prompt "+314204="       one request
python sample.py --model DIR          on a terminal: a chat, its history kept

1. Chat              Chat
2. Command line      Flags, stream, judged, talk, main
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sandbox
import tasks
from cli import (
    check,
    checkpoint,
    command_line,
    fits,
    parse,
    pick_device,
    read_json,
    short,
    torch,
    unflat,
)
from cli import model as m1
from curriculum import Mix
from engine import generate
from experience import Environment, response_texts
from tokenizer import END_OF_TURN, Tokenizer, chat_pieces, parse_tool_calls

# ============================================================================
# 1. Chat
# ============================================================================


class Chat:
    """A conversation whose history stays in the cache: a turn costs its own tokens only.

    After every reply the cache is what one pass over self.tokens leaves: all turns, the last one
    closed. It is one row of at most `context` tokens.
    """

    def __init__(self, model, tokenizer, *, system="", tools=None, context=32_768):
        self.model, self.tokenizer, self.tools = model, tokenizer, tools
        self.opening = [{"role": "system", "content": system}] if system else []
        self.cache = model.new_cache(1, min(context, model.config.max_position_embeddings))
        self.reset()

    def reset(self):
        """Forget all turns but the system prompt and the tools."""
        self.cache.reset()
        self.tokens = []

    def reply(self, content, role="user", *, max_new_tokens, **request):
        """Answer a user's text, or tools' results (role "tool"). Returns the Rollout of the answer.

        request: more fields of Request. An answer is cut where the context is full; if not even one
        token of it would fit: ValueError, and the conversation is as before.
        """
        message = {"role": role, "content": content}
        opened = chat_pieces([message])[1:]
        if not self.tokens:
            opened = chat_pieces([*self.opening, message], self.tools)
        new, close = map(self.tokenizer.encode_chat, (opened, [END_OF_TURN]))
        most, used = self.cache.max_len, len(self.tokens)
        room = most - used - len(new) - len(close)
        if room < 1:
            why = f"{used} are used, this turn takes {len(new)} more; /reset or raise --context"
            raise ValueError(f"the context of {most} tokens is full: {why}")
        request |= dict(max_new_tokens=min(max_new_tokens, room), **self.tokenizer.ids())
        try:
            rollout = generate(self.model, [new], cache=self.cache, **request)
            answer = rollout.tokens[0].tolist()
            unread = close if answer[-1] == close[0] else [answer[-1], *close]
            self.model(torch.tensor([unread], device=self.model.device), cache=self.cache)
        except BaseException:  # interrupted half-way, the cache is no conversation any more
            self.reset()
            raise
        self.tokens += [*new, *answer[:-1], *unread]
        full = rollout.ended == ["length"] and room < max_new_tokens
        return rollout._replace(ended=["context"]) if full else rollout


# ============================================================================
# 2. Command line
# ============================================================================


@dataclass(frozen=True)
class Flags:
    """What to generate from, and how."""

    model: str | None = None
    """a run of train_rl (runs/NAME) or a directory in the published layout"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = a GPU if there is one"""
    prompt: str | None = None
    """the text to answer, e.g. +314204=; without it, a terminal starts a chat"""
    n: int = 1
    """how many responses to the prompt"""
    max_new_tokens: int = 256
    """longest response, in tokens"""
    think_budget: int | None = None
    """close the thinking after this many tokens"""
    temperature: float = 1.0
    """0 is greedy; the report recommends 1.0 with top-p 0.95"""
    top_p: float = 0.95
    """sample from the likeliest tokens that hold it"""
    seed: int = 0
    """same seed, same responses"""
    system: str | None = None
    """system prompt of a chat model"""
    tools: str | None = None
    """JSON file for a chat model: a list of tools with name, description, parameters"""
    context: int = 32_768
    """longest conversation of a chat model, in tokens (memory is taken at once)"""

    def __post_init__(self):
        check(self, n=(1, 10**6), max_new_tokens=(1, 10**7), think_budget=(0, 10**7))
        check(self, temperature=(0, 100), top_p=(1e-6, 1), seed=(0, 2**62), context=(1, 10**7))


def read_tools(path):
    """The tools of a JSON file: a list of objects, each with a name."""
    tools = read_json(path, object) if Path(path).is_file() else None
    if not fits(tools, list[dict]) or not all(fits(tool.get("name"), str) for tool in tools):
        raise ValueError(f"--tools {path}: need a JSON list of tools, each with a name at least")
    return tools


def run_problems(folder):
    """The Mix that a checkpoint's run learnt; None without a run, or with tasks not here."""
    file = Path(folder).parent / "run.json"
    flags = read_json(file).get("flags", {}) if file.is_file() else {}
    try:
        if not fits(flags, dict[str, object]):
            raise ValueError(f"flags are {short(flags)}")
        problems, most = unflat(Mix, flags), flags.get("max_moves")
        if most:  # moves rose during the run
            least = problems.min_moves or problems.moves
            problems = dataclasses.replace(problems, min_moves=least, moves=most)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return problems if flags and set(problems.names) <= set(tasks.TASKS) else None


def judged(problems, prompt, text, ended):
    """What a run's own problems say about a response: right, wrong, or that nobody asked that."""
    problem = problems.solve(prompt)
    if problem is None:
        return f"no problem of {problems.task} that tasks.py can solve; this run learnt no other"
    try:
        with sandbox.bounded():
            right = tasks.score(problem, text, ended).correct
    except Exception as error:
        return f"the verifier of {problem.task} crashed: {short(error)}"
    verdict = "right" if right else f"wrong: the answer is {problem.answer}"
    moves, least, most = len(problem.chain), problems.min_moves or problems.moves, problems.moves
    if not least <= moves <= most:
        learnt = f"{least} to {most}" if least < most else most
        verdict += f"; it has {moves} moves, this run learnt problems of {learnt} moves only"
    return verdict


def stream(tokenizer, answer, problems, content, role, **request):
    """Print a response as it grows, and what a run's problems say about it. Returns its text."""
    decoder, said = codecs.getincrementaldecoder("utf-8")("replace"), []

    def show(_, tokens):  # one character may take several
        if int(tokens[0]) != tokenizer.eos_id:
            said.append(decoder.decode(tokenizer.token_bytes(int(tokens[0]))))
            print(said[-1], end="", flush=True)

    rollout = answer(content, role, on_tokens=show, **request)
    print(decoder.decode(b"", final=True), end="")
    ended, verdict = rollout.ended[0], ""
    if problems:  # as in training: what came after a tool's last answer, closed by the token
        [answered] = response_texts(tokenizer, rollout, rollout.begun)
        n = rollout.ids()[0][int(rollout.begun[0]) :].count(tokenizer.think_end_id)
        closed = ended in ("eos", "budget") and answered.count(tasks.THINK_END) == n
        verdict = judged(problems, content, answered, closed)
    print(f"   [{int(rollout.lengths[0])} tokens, ended by {ended}]  {verdict}".rstrip())
    return "".join(said)


def typed(prompt):
    """The next line typed that is not blank; /exit is an end of the input, as Ctrl-D is."""
    while not (line := input(prompt).strip()):
        pass
    if line == "/exit":
        raise EOFError
    return line


def talk(tokenizer, answer, request, chat, problems):
    """Answer what is typed, in a chat or line by line. Results of a chat's tool calls are typed."""
    kind = "each line is a problem, no history"
    if chat:
        kind = f"chat of {chat.cache.max_len:,} tokens; /reset empties it"
    print(f"{kind}; /exit or Ctrl-D leaves")
    if problems:
        with contextlib.suppress(ValueError):  # of easy problems there may be too few
            drawn = problems.draw(random.Random(), max(3, len(problems.names)), held_out=True)
            print("problems of this run:", "  ".join(problem.prompt for problem in drawn))
    calls = []
    while True:
        try:
            lines = [typed(f"result of {json.dumps(call)}> ") for call in calls] or [typed("> ")]
        except EOFError:
            return print()
        if chat and "/reset" in lines:
            chat.reset()
            calls = []
            continue
        results = [{"name": call["name"], "text": line} for call, line in zip(calls, lines)]
        turn = (results, "tool") if results else (lines[0], "user")
        try:
            text = stream(tokenizer, answer, problems, *turn, **request)
            request, calls = {**request, "seed": request["seed"] + 1}, []
            if chat and chat.tools:
                calls = parse_tool_calls(text)
        except ValueError as error:  # a turn too long, a malformed call: the conversation goes on
            print(f"   [{error}]")


@command_line
def main(argv=None):
    """Print responses to one prompt, token by token; without a prompt, answer what is typed."""
    flags = parse(Flags, argv, __doc__.splitlines()[0])
    if not flags.model or not (flags.prompt or sys.stdin.isatty()):
        raise ValueError('--model and --prompt are needed, e.g. --model DIR --prompt "+314204="')
    folder = checkpoint.checkpoint_dir(flags.model)
    config = m1.M1Config.from_json(folder)
    tokenizer = Tokenizer.of(config, folder)
    if not tokenizer.has_turns and (flags.system or flags.tools):
        raise ValueError("--system and --tools need a chat; this model was trained on raw prompts")
    if flags.think_budget is not None and tokenizer.think_end_id is None:
        raise ValueError("--think-budget needs </think> to be one token; here it is several")
    tools = read_tools(flags.tools) if flags.tools else None
    model = checkpoint.load_pretrained(folder, pick_device(flags.device))
    chat_flags = dict(system=flags.system, tools=tools, context=flags.context)
    chat = Chat(model, tokenizer, **chat_flags) if tokenizer.has_turns else None
    problems = None if chat else run_problems(folder)

    def solve(prompt, role, **request):
        problem = problems and problems.solve(prompt)
        request |= Environment(tokenizer, [problem], 1).arguments() if problem else {}
        return generate(model, [tokenizer.encode(prompt)], **tokenizer.ids(), **request)

    answer = chat.reply if chat else solve
    names = ("max_new_tokens", "temperature", "top_p", "think_budget", "seed")
    request = {name: getattr(flags, name) for name in names}
    if not flags.prompt:
        return talk(tokenizer, answer, request, chat, problems)
    for i in range(flags.n):
        if chat:
            chat.reset()
        else:
            print(flags.prompt, end="", flush=True)
        request["seed"] = flags.seed + i
        stream(tokenizer, answer, problems, flags.prompt, "user", **request)


if __name__ == "__main__":
    main()
