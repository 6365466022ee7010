"""Text to tokens to model and back: tokenizers, the generation engine that RL uses too, chat.

    python sample.py --model runs/tiny-cispo-001 --prompt "+314204="       one request
    python sample.py --model DIR          on a terminal: a chat, its history kept

    1. Tokenizer         Tokenizer, m1_encoding
    2. Generation        Rollout, Sampling, Request, sample_tokens, generate
    3. Chat              chat_prompt, parse_tool_calls, Chat
    4. Command line      Flags, stream, judged, talk, main

Dimension key: P prompts, G responses per prompt, N = P * G responses, T tokens, W vocabulary.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import random
import re
import sys
import time
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

import tiktoken

import tasks
from cli import checkpoint, command_line, parse, ranges, torch, unflat
from cli import model as m1

# ============================================================================
# 1. Tokenizer
# ============================================================================

SPECIALS = (
    "<pad> <end_of_sentence> <beginning_of_sentence> <begin_of_document> <end_of_document> "
    "<think> </think> <tools> </tools> <tool_calls> </tool_calls> "
    "<reserved_0> <reserved_1> <reserved_2> <reserved_3> <reserved_4>"
).split()

M1_SPECIALS = {
    "<beginning_of_sentence>": 200019,
    "<end_of_sentence>": 200020,  # released; the others are inferred from a sibling model's table
    "<end_of_document>": 200021,
    "<begin_of_document>": 200034,
}

# how M1's text is cut before merging: o200k's pattern (inferred from M1's tokens)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START, END = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT = (
    f"{START}{UPPER}*{LOWER}+{END}|{START}{UPPER}+{LOWER}*{END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Tokenizer:
    """Text <-> token ids, around a tiktoken.Encoding. special: {name: id}."""

    def __init__(self, encoding):
        self.encoding, self.special = encoding, encoding._special_tokens
        self.eos_id = self.special["<end_of_sentence>"]
        self.pad_id = self.special.get("<pad>", self.eos_id)  # M1 has none: any id would do
        self.think_end_id = self.special.get("</think>")  # None for M1: it takes several tokens

    @classmethod
    def byte(cls):
        """256 bytes and 16 special tokens of M1's chat format: 272 ids, nothing to download."""
        ranks = {bytes([i]): i for i in range(256)}
        special = {name: 256 + i for i, name in enumerate(SPECIALS)}
        made = dict(pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)
        return cls(tiktoken.Encoding("byte", **made))

    @classmethod
    def of(cls, config, path=None):
        """What a model's config names: "byte", or "m1", read from the model's directory `path`."""
        if config.tokenizer == "byte":
            return cls.byte()
        if config.tokenizer != "m1":
            raise ValueError(f"unknown tokenizer {config.tokenizer!r}; choose from byte, m1")
        if path is None:
            raise ValueError("the 'm1' tokenizer is read from the model's directory: pass its path")
        return cls(m1_encoding(Path(path), config.vocab_size))

    def encode(self, text, specials=False):
        """Token ids of a text; special tokens that it spells stay text unless specials=True."""
        if specials:
            return self.encoding.encode(text, allowed_special="all")
        return self.encoding.encode_ordinary(text)

    def encode_chat(self, pieces):
        """Token ids of chat_pieces: what a user wrote cannot spell the token that ends a turn."""
        return [i for special, text in pieces for i in (self.special[special], *self.encode(text))]

    def decode(self, ids):
        """The text of token ids; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i):
        """The bytes of one token; U+FFFD for an id that only the model has (M1 has some)."""
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return "\ufffd".encode()

    def ids(self):
        """The token ids that generate needs, by its names for them."""
        return dict(eos_id=self.eos_id, pad_id=self.pad_id, think_end_id=self.think_end_id)


def m1_encoding(folder, vocab_size):
    """Byte-level BPE from the tokenizer.json of a published directory, or else its merges.txt.

    tokenizer.json gives every id. merges.txt leaves them to M1's rule: byte b has id b, the merge
    of rank r (from 0) id 256 + r, special tokens M1_SPECIALS. tiktoken joins the pair whose result
    has the smallest id, so ids must rise with rank. ValueError if a file is missing, malformed, or
    does not fit a model of vocab_size tokens.
    """
    files = [folder / name for name in ("tokenizer.json", "merges.txt")]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        raise ValueError(f"{folder} has no tokenizer: put its tokenizer.json or merges.txt there")
    byte_of, special = {letter: b for b, letter in enumerate(byte_letters())}, dict(M1_SPECIALS)
    try:
        if file.suffix == ".json":
            stored = m1.read_json(file)
            vocab, merges = stored["model"]["vocab"], stored["model"]["merges"]
            special |= {name: vocab[name] for name in special if name in vocab}
            special |= {token["content"]: token["id"] for token in stored.get("added_tokens", ())}
        else:
            lines = file.read_text(encoding="utf-8").split("\n")
            vocab, merges = None, filter(None, lines[lines[0].startswith("#version") :])
        merged = [a + b for a, b in (m.split(" ") if isinstance(m, str) else m for m in merges)]
        tokens = [*byte_of, *merged]
        if vocab is None:
            vocab = {token: i for i, token in enumerate(tokens)}
        ranks = {bytes(byte_of[letter] for letter in token): vocab[token] for token in tokens}
        ids, rising = [*ranks.values(), *special.values()], [vocab[token] for token in merged]
        if rising != sorted(rising) or len(set(ids)) < len(ids):
            raise ValueError("ids must be distinct and rise from merge to merge")
        if max(ids) >= vocab_size:
            raise ValueError(f"it has ids up to {max(ids)}, the model a vocabulary of {vocab_size}")
        return tiktoken.Encoding("m1", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
    except KeyError as error:
        raise ValueError(f"{file} is not a byte-level BPE: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be this model's tokenizer: {error}") from None


def byte_letters():
    """GPT-2's 256 letters for bytes: a printable byte's is its own, the others' U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


# ============================================================================
# 2. Generation
# ============================================================================


class Rollout(NamedTuple):
    """N responses, those of a prompt contiguous, padded on the right to the longest."""

    tokens: torch.Tensor  # (N, T) int64
    logp: torch.Tensor  # (N, T) fp32: under the distribution that each token was drawn from
    mask: torch.Tensor  # (N, T) bool: drawn by the model, so no padding, no </think> of the budget
    lengths: torch.Tensor  # (N,) int64: tokens of each response, the end token included
    ended: list  # N of ENDED: why; or "context", in a full Chat
    seconds: float = 0.0  # that generating took


ENDED = ("length", "eos", "repetition", "budget")  # budget: closed its thinking, then eos
LENGTH, EOS, REPETITION, BUDGET = range(4)


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn in RL and when they end: arguments of generate."""

    temperature: float = 1.0
    """of rollouts, and of the log-probs that are trained on"""
    max_new_tokens: int | None = None
    """longest response in tokens; None = longest right one + 6"""
    repetition_stop: int = 3000
    """tokens in a row of p > 0.99 that end a response; 0 = off (report sec. 3.2)"""

    def __post_init__(self):
        ranges(self, temperature=(0.01, 100), max_new_tokens=(1, 10**7), repetition_stop=(0, 10**7))


@dataclass(frozen=True)
class Request:
    """What generate is asked for: its arguments beside the prompts."""

    max_new_tokens: int  # the longest response
    eos_id: int  # ends a response
    seed: int  # the same seed on the same machine gives the same responses
    group_size: int = 1  # responses to each prompt
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # draw from the likeliest tokens that hold it
    pad_id: int = 0
    think_end_id: int | None = None  # </think>
    think_budget: int | None = None  # unclosed thinking gets think_end_id after so many tokens
    repetition_stop: int = 3000  # a loop ends after so many tokens of p > 0.99 in a row; 0 = never

    def __post_init__(self):
        ranges(self, max_new_tokens=(1, inf), group_size=(1, inf), temperature=(0, inf))
        ranges(self, top_p=(1e-9, 1), think_budget=(0, inf), repetition_stop=(0, inf))
        if 0 < self.temperature < 0.01:
            raise ValueError(f"need temperature 0 or >= 0.01, found {self.temperature}")
        if self.think_budget is not None and self.think_end_id is None:
            raise ValueError("think_budget needs think_end_id")

    def check(self, model, prompts, cache):
        """ValueError for prompts that the model, or the conversation in the cache, cannot take."""
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("need at least one prompt, each of at least one token")
        W, limit = model.config.vocab_size, model.config.max_position_embeddings
        bad = [i for p in prompts for i in p if not 0 <= i < W]
        if bad:
            raise ValueError(f"token id {bad[0]} is outside the model's vocabulary of {W}")
        room = f"model's {limit}"
        if cache is not None:
            if len(prompts) * self.group_size != 1:
                raise ValueError(f"a cache continues one conversation, found {len(prompts)}")
            limit = min(limit, cache.max_len) - int(cache.position)
            room = f"{limit} that are left in the cache"
        longest, new = max(map(len, prompts)), self.max_new_tokens
        if longest + new > limit:
            raise ValueError(f"a prompt of {longest} tokens plus {new} new ones exceeds the {room}")


def sample_tokens(logits, temperature, top_p, generator):
    """Draw a token per row of logits (N, W): tokens (N,), log-probs under what they are drawn from.

    Temperature first, then the smallest set of tokens with probability >= top_p, renormalised.
    Temperature 0 is greedy: the distribution is a single token and the log-prob 0.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = logp.exp().sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays inside
        logp = logp.masked_fill(outside.scatter(-1, order, outside), -torch.inf).log_softmax(-1)
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)  # one draw a row; torch.multinomial makes W
    u = torch.rand(len(cdf), 1, dtype=torch.float64, device=cdf.device, generator=generator)
    token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=logp.shape[-1] - 1)
    drawn = logp.gather(-1, token)[:, 0]
    if not drawn.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged or diverged")
    return token[:, 0], drawn


def left_pad(sequences, pad_id, device):
    """Lists of ids -> tokens (B, L) int64, padded on the left, and mask (B, L), True = real."""
    sequences = [torch.as_tensor(s, dtype=torch.int64) for s in sequences]
    pad = torch.nn.utils.rnn.pad_sequence
    tokens = pad(sequences, batch_first=True, padding_value=pad_id, padding_side="left")
    lengths = torch.tensor([len(s) for s in sequences])
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
    return tokens.to(device), mask.to(device)


def _read_prompts(model, prompts, ask, cache):
    """Read each prompt once: the cache and logits (N, W) of N responses, the prompt of each."""
    tokens, mask = left_pad(prompts, ask.pad_id, model.device)
    cache = cache or model.new_cache(len(prompts), tokens.shape[1] + ask.max_new_tokens)
    logits = model(tokens, mask=mask, cache=cache, last_only=True)[:, 0]
    group = torch.arange(len(prompts) * ask.group_size, device=model.device) // ask.group_size
    if ask.group_size > 1:
        cache, logits = cache.select(group), logits[group]
    return cache, logits, group


def generate(model, prompts, *, on_tokens=None, cache=None, **request):
    """Responses to prompts (lists of token ids), as a Rollout. request: the fields of Request.

    Prompts are padded on the left and read once; a group starts from copies of its prompt's cache.
    Rows that have ended leave the batch once they are a quarter of it. on_tokens(responses, tokens)
    is called after each step with the numbers and new tokens of those that still run. cache: that
    of one conversation so far. The one prompt is what comes next, and the cache then holds it and
    the response but for the response's last token, which no step has read.
    """
    ask, start, device = Request(**request), time.perf_counter(), model.device
    ask.check(model, prompts, cache)
    N, T = len(prompts) * ask.group_size, ask.max_new_tokens
    stop, generator = ask.repetition_stop or inf, torch.Generator(device).manual_seed(ask.seed)
    cache, logits, group = _read_prompts(model, prompts, ask, cache)
    tokens = torch.full((N, T), ask.pad_id, device=device)
    logps = torch.zeros(N, T, device=device)
    drawn = torch.zeros(N, T, dtype=torch.bool, device=device)
    lengths, cause = torch.zeros(2, N, dtype=torch.int64, device=device)

    row = torch.arange(N, device=device)  # the response that each row of the cache belongs to
    alive, streak = torch.ones_like(row, dtype=torch.bool), torch.zeros_like(row)
    thinking = torch.tensor([p[-1] != ask.think_end_id for p in prompts], device=device)[group]
    for t in range(T):
        token, logp = sample_tokens(logits, ask.temperature, ask.top_p, generator)
        forced = alive & thinking & (token != ask.think_end_id) & (t == ask.think_budget)
        if t == ask.think_budget:
            token = token.masked_fill(forced, ask.think_end_id)
        tokens[row, t] = token.where(alive, ask.pad_id)
        logps[row, t] = logp.float().masked_fill(forced | ~alive, 0.0)
        drawn[row, t] = alive & ~forced
        lengths[row] += alive
        if on_tokens:
            on_tokens(row[alive], token[alive])

        thinking &= token != ask.think_end_id
        if stop <= T:
            sure = logits.softmax(-1).gather(1, token[:, None])[:, 0] > 0.99
            streak = (streak + 1) * sure
        looped = torch.where(streak >= stop, REPETITION, LENGTH)
        code = torch.where(token == ask.eos_id, EOS, looped)
        cause[row] = torch.where(alive, code, cause[row])
        alive &= code == LENGTH
        n_alive = int(alive.sum())
        if n_alive == 0 or t + 1 == T:
            break
        if n_alive <= 0.75 * len(row):
            keep = alive.nonzero()[:, 0]
            kept = (x[keep] for x in (row, alive, thinking, streak, token))
            row, alive, thinking, streak, token = kept
            cache = cache.select(keep)
        logits = model(token[:, None], cache=cache)[:, 0]

    cause[(cause == EOS) & (drawn.sum(1) < lengths)] = BUDGET
    ended = [ENDED[c] for c in cause.tolist()]
    tokens, logps, drawn = (x[:, : t + 1] for x in (tokens, logps, drawn))
    return Rollout(tokens, logps, drawn, lengths, ended, time.perf_counter() - start)


# ============================================================================
# 3. Chat                                                 (released template)
# ============================================================================

TOOL_TEXT = """\
You are provided with these tools:
<tools>
{tools}
</tools>

If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide \
tool-name and json-object of arguments, following the format below:
<tool_calls>
{{"name": <tool-name-1>, "arguments": <args-json-object-1>}}
...
</tool_calls>"""

HEADERS = {
    "system": "system ai_setting=assistant",
    "tools": "system tool_setting=tools",
    "user": "user name=user",
    "assistant": "ai name=assistant",
    "tool": "tool name=tools",
}
END_OF_TURN = ("<end_of_sentence>", "\n")


def chat_prompt(messages, tools=None):
    """The text that M1 continues: a conversation, open for the assistant's next turn.

    messages: {"role": "system", "user" or "assistant", "content": text}, or results of tools:
    {"role": "tool", "content": [{"name": ..., "text": ...}, ...]}. System messages are joined and
    come first, then tools (a list of JSON objects with name, description, parameters), then the
    turns; an assistant's with all that it thought.
    """
    return "".join(special + text for special, text in chat_pieces(messages, tools))


def chat_pieces(messages, tools=None):
    """chat_prompt as pairs, a special token and the text that follows it."""
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    turns = [("system", system)] if system else []
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        turns.append(("tools", TOOL_TEXT.format(tools=listed)))
    for role, content in ((m["role"], m["content"]) for m in messages if m["role"] != "system"):
        if role not in ("user", "assistant", "tool"):
            raise ValueError(f"unknown role {role!r}; choose from system, user, assistant, tool")
        if role == "tool":
            results = (f"tool name: {r['name']}\ntool result: {r['text']}\n\n" for r in content)
            content = "".join(results)
        turns.append((role, content))

    pieces = [("<begin_of_document>", "")]
    for role, content in turns:
        pieces += [("<beginning_of_sentence>", f"{HEADERS[role]}\n{content}"), END_OF_TURN]
    return [*pieces, ("<beginning_of_sentence>", f"{HEADERS['assistant']}\n")]


def parse_tool_calls(text):
    """The calls in a response: [{"name": ..., "arguments": {...}}, ...].

    One JSON object per line of a <tool_calls> block after the thinking; ValueError names a bad one.
    """
    calls, answer = [], text.rpartition("</think>")[2]
    for block, end in re.findall(r"<tool_calls>(.*?)(</tool_calls>|\Z)", answer, re.DOTALL):
        if not end:
            raise ValueError("the response ended inside its <tool_calls> block")
        for line in filter(None, map(str.strip, block.split("\n"))):
            try:
                call = json.loads(line)
                name, arguments = call["name"], call["arguments"]
            except (ValueError, KeyError, TypeError, RecursionError):
                name = arguments = None
            if not isinstance(name, str) or not isinstance(arguments, dict):
                need = 'a tool call is one line {"name": ..., "arguments": {...}}'
                raise ValueError(f"{need}, found {line!r}")
            calls.append({"name": name, "arguments": arguments})
    return calls


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
# 4. Command line
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
        ranges(self, n=(1, 10**6), max_new_tokens=(1, 10**7), think_budget=(0, 10**7))
        ranges(self, temperature=(0, 100), top_p=(1e-6, 1), seed=(0, 2**62), context=(1, 10**7))


def pick_device(name):
    """The device that --device names; ValueError for one that this machine does not have."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; choose from auto, cpu, cuda")
    if name != "cpu" and torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    return "cpu"


def read_tools(path):
    """The tools of a JSON file: a list of objects, each with a name."""
    tools = m1.read_json(Path(path)) if Path(path).is_file() else None
    if not isinstance(tools, list) or not all(isinstance(t, dict) and "name" in t for t in tools):
        raise ValueError(f"--tools {path}: need a JSON list of tools, each with a name at least")
    return tools


def run_problems(folder):
    """The tasks.Mix that a checkpoint's run learnt; None without a run, or with tasks not here."""
    file = Path(folder).parent / "run.json"
    flags = m1.read_json(file).get("flags", {}) if file.is_file() else {}
    if flags.get("max_moves"):  # moves rose during the run
        least = flags.get("min_moves") or flags["moves"]
        flags |= {"min_moves": least, "moves": flags["max_moves"]}
    problems = unflat(tasks.Mix, flags)
    return problems if flags and set(problems.names) <= set(tasks.TASKS) else None


def judged(problems, prompt, text, ended):
    """What a run's own problems say about a response: right, wrong, or that nobody asked that."""
    problem = problems.solve(prompt)
    if problem is None:
        return f"no problem of {problems.task} that tasks.py can solve; this run learnt no other"
    right = tasks.score(problem, text, ended).correct
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
    text, ended = "".join(said), rollout.ended[0]
    verdict = judged(problems, content, text, ended in ("eos", "budget")) if problems else ""
    print(f"   [{int(rollout.lengths[0])} tokens, ended by {ended}]  {verdict}".rstrip())
    return text


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
    tokenizer, has_turns = Tokenizer.of(config, folder), config.tokenizer == "m1"
    if not has_turns and (flags.system or flags.tools):
        raise ValueError("--system and --tools need a chat; this model was trained on raw prompts")
    if flags.think_budget is not None and tokenizer.think_end_id is None:
        raise ValueError("--think-budget needs </think> to be one token; here it is several")
    tools = read_tools(flags.tools) if flags.tools else None
    model = checkpoint.load_pretrained(folder, pick_device(flags.device))
    chat_flags = dict(system=flags.system, tools=tools, context=flags.context)
    chat = Chat(model, tokenizer, **chat_flags) if has_turns else None
    problems = None if has_turns else run_problems(folder)

    def solve(prompt, role, **request):
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
