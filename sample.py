"""Text to tokens to model and back: tokenizers, the generation engine that RL uses too, chat, and a command line.

    python sample.py --model runs/tiny-cispo-001 --prompt "+314204="       one request
    python sample.py --model DIR                                           on a terminal: a chat, its history kept

    1. Tokenizer         Tokenizer, m1_encoding
    2. Generation        sample_tokens, generate, Rollout
    3. Chat              chat_prompt, parse_tool_calls, Chat
    4. Command line

Dimension key: P prompts, G responses per prompt, N = P * G responses, T response tokens, W vocabulary.
"""

import codecs
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence

from model import M1Config, check_flags, checkpoint_dir, command_line, flag, load_pretrained, parse_flags, read_json

# ============================================================================
# 1. Tokenizer
# ============================================================================

SPECIALS = (
    "<pad>", "<end_of_sentence>", "<beginning_of_sentence>", "<begin_of_document>", "<end_of_document>",
    "<think>", "</think>", "<tools>", "</tools>", "<tool_calls>", "</tool_calls>",
    "<reserved_0>", "<reserved_1>", "<reserved_2>", "<reserved_3>", "<reserved_4>",
)  # fmt: skip

M1_SPECIALS = {
    "<beginning_of_sentence>": 200019,
    "<end_of_sentence>": 200020,  # released; the other three are inferred from a sibling model's table
    "<end_of_document>": 200021,
    "<begin_of_document>": 200034,
}

# how M1's text is cut before merging: o200k's pattern (inferred from M1's tokens)
SPLIT = "|".join((
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
))  # fmt: skip


class Tokenizer:
    """Text <-> token ids, around a tiktoken.Encoding. special: {name: id}."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.special = encoding._special_tokens
        self.eos_id = self.special["<end_of_sentence>"]
        self.pad_id = self.special.get("<pad>", self.eos_id)  # M1 has none; padding is masked, so any id would do
        self.think_end_id = self.special.get("</think>")  # None for M1, which spells it with ordinary tokens

    @classmethod
    def byte(cls):
        """256 bytes and 16 special tokens of M1's chat format: 272 ids, nothing to download."""
        ranks = {bytes([i]): i for i in range(256)}
        special = {name: 256 + i for i, name in enumerate(SPECIALS)}
        return cls(tiktoken.Encoding("byte", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special))

    @classmethod
    def of(cls, config, path=None):
        """The tokenizer that a model's config names: "byte", or "m1", read from the model's directory `path`."""
        if config.tokenizer == "byte":
            return cls.byte()
        if config.tokenizer != "m1":
            raise ValueError(f"config: unknown tokenizer {config.tokenizer!r}; choose from byte, m1")
        if path is None:
            raise ValueError("the 'm1' tokenizer is read from the model's directory; only 'byte' models do without one")
        return cls(m1_encoding(path, config.vocab_size))

    def encode(self, text, specials=False):
        """Token ids of a text. Special tokens spelled out in it stay plain text unless specials=True: a user's text
        must not be able to end a turn.
        """
        if specials:
            return self.encoding.encode(text, allowed_special="all")
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """The text of token ids; invalid UTF-8 becomes U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def token_bytes(self, i):
        """The bytes of one token; U+FFFD for an id that the model has and the tokenizer lacks (M1 has some)."""
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return "\ufffd".encode()

    def ids(self):
        """The token ids that generate needs, by its names for them."""
        return dict(eos_id=self.eos_id, pad_id=self.pad_id, think_end_id=self.think_end_id)

    def encode_chat(self, pieces):
        """Token ids of chat_pieces: special tokens by id, all other text as ordinary text, whatever it spells."""
        return [i for special, text in pieces for i in (self.special[special], *self.encode(text))]


def m1_encoding(path, vocab_size):
    """The tokenizer of a published directory: byte-level BPE from its tokenizer.json, or else its merges.txt.

    tokenizer.json gives every id. merges.txt leaves them to M1's rule: byte b has id b, the merge of rank r (from 0)
    id 256 + r, special tokens M1_SPECIALS. tiktoken joins the pair whose result has the smallest id, so ids must rise
    with rank. ValueError if a file is missing, malformed, or does not fit a model of vocab_size tokens.
    """
    files = [file for name in ("tokenizer.json", "merges.txt") if (file := Path(path) / name).is_file()]
    if not files:
        raise ValueError(f"{path} has no tokenizer: put the published model's tokenizer.json or merges.txt there")
    byte_of = {letter: b for b, letter in enumerate(byte_letters())}
    try:
        if files[0].suffix == ".json":
            stored = read_json(files[0])
            vocab, merges = stored["model"]["vocab"], stored["model"]["merges"]
            merged = [a + b for a, b in (m.split(" ") if isinstance(m, str) else m for m in merges)]
            added = {token["content"]: token["id"] for token in stored.get("added_tokens", ())}
        else:
            lines = files[0].read_text(encoding="utf-8").split("\n")
            lines = lines[lines[0].startswith("#version") :]
            merged = [a + b for a, b in (line.split(" ") for line in lines if line)]
            vocab, added = {token: i for i, token in enumerate((*byte_of, *merged))}, {}

        ranks = {bytes(byte_of[letter] for letter in token): vocab[token] for token in (*byte_of, *merged)}
        rising = [vocab[token] for token in merged]
        special = {**M1_SPECIALS, **{name: vocab[name] for name in M1_SPECIALS if name in vocab}, **added}
        ids = [*ranks.values(), *special.values()]
        if rising != sorted(rising) or len(set(ids)) < len(ids):
            raise ValueError("ids must be distinct and rise from merge to merge")
        if max(ids) >= vocab_size:
            raise ValueError(f"it has ids up to {max(ids)}, the model a vocabulary of {vocab_size}")
        return tiktoken.Encoding("m1", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
    except KeyError as error:
        raise ValueError(f"{files[0]} is not a byte-level BPE: it lacks {error}") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{files[0]} cannot be this model's tokenizer: {error}") from None


def byte_letters():
    """The 256 letters that stand for bytes in published vocabularies (GPT-2's map), as a list.

    A printable byte is its own Latin-1 letter; the others, in order, are U+0100, U+0101, ... (a space is U+0120).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


# ============================================================================
# 2. Generation
# ============================================================================


class Rollout(NamedTuple):
    """N responses, those of a prompt contiguous, padded on the right to the longest."""

    tokens: torch.Tensor  # (N, T) int64
    logp: torch.Tensor  # (N, T) fp32: log-prob of each token under the distribution it was drawn from
    mask: torch.Tensor  # (N, T) bool: tokens that the model drew, so neither padding nor a </think> set by the budget
    lengths: torch.Tensor  # (N,) int64: tokens of each response, the end token included
    ended: list  # N of "eos", "length" (max_new_tokens), "context" (of a chat), "repetition", "budget" (then eos)
    seconds: float = 0.0  # that generating took


def sample_tokens(logits, temperature, top_p, generator):
    """Draw one token per row of logits (N, W); returns tokens (N,) and their log-probs under what was sampled from.

    Temperature first, then the smallest set of tokens with probability >= top_p, renormalised. Temperature 0 is
    greedy: the distribution is a single token and the log-prob 0.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = logp.exp().sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays inside
        logp = logp.masked_fill(outside.scatter(-1, order, outside), -torch.inf).log_softmax(-1)
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)  # one random number a row, where torch.multinomial draws W of them
    u = torch.rand(len(cdf), 1, dtype=torch.float64, device=cdf.device, generator=generator)
    token = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).clamp(max=logp.shape[-1] - 1)
    drawn = logp.gather(-1, token)[:, 0]
    if not drawn.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged or its training diverged")
    return token[:, 0], drawn


def left_pad(sequences, pad_id, device):
    """Lists or 1-D tensors of ids -> tokens (B, L) int64, padded on the left, and mask (B, L) bool, True = real."""
    sequences = [torch.as_tensor(s, dtype=torch.int64) for s in sequences]
    tokens = pad_sequence(sequences, batch_first=True, padding_value=pad_id, padding_side="left")
    lengths = torch.tensor([len(s) for s in sequences])
    mask = torch.arange(tokens.shape[1]) >= tokens.shape[1] - lengths[:, None]
    return tokens.to(device), mask.to(device)


@torch.no_grad()
def generate(
    model, prompts, *, group_size=1, max_new_tokens, temperature=1.0, top_p=1.0, eos_id, seed, pad_id=0,
    think_end_id=None, think_budget=None, repetition_stop=3000, on_tokens=None, cache=None,
):  # fmt: skip
    """group_size responses to every prompt (a list of token ids each). Returns a Rollout on the model's device.

    Prompts are padded on the left and read once; the responses of a group start from copies of their prompt's cache.
    Rows that have ended are dropped from the batch once they are a quarter of it. A response ends
      - with eos_id, or after max_new_tokens;
      - after repetition_stop tokens in a row of probability > 0.99 each: it is looping (report sec. 3.2 uses 3,000).
    think_budget (needs think_end_id): a response that has not closed its thinking by itself after that many tokens
    gets think_end_id in place of the next one, and answers from there.
    on_tokens(responses, tokens): called after each step with the numbers and the new tokens of the running responses.
    cache: that of one conversation so far. The one prompt is what comes next; the cache then holds it and the response,
    but for the response's last token, which no step has read.
    The same seed on the same machine gives the same responses.
    """
    _check_request(model, prompts, group_size, max_new_tokens, temperature, top_p, think_budget, think_end_id, cache)
    start, device, generator = time.perf_counter(), model.device, torch.Generator(model.device).manual_seed(seed)
    tokens, mask = left_pad(prompts, pad_id, device)
    cache = cache or model.new_cache(len(prompts), tokens.shape[1] + max_new_tokens)
    logits = model(tokens, mask=mask, cache=cache, last_only=True)[:, 0]
    N = len(prompts) * group_size
    group = torch.arange(N, device=device) // group_size
    if group_size > 1:
        cache, logits = cache.select(group), logits[group]

    tokens = torch.full((N, max_new_tokens), pad_id, device=device)
    logp = torch.zeros(N, max_new_tokens, device=device)
    drawn = torch.zeros(N, max_new_tokens, dtype=torch.bool, device=device)
    lengths, cause = torch.zeros(2, N, dtype=torch.int64, device=device)
    cut = torch.zeros(N, dtype=torch.bool, device=device)  # thinking closed by the budget

    row = torch.arange(N, device=device)  # the response that each row of the cache belongs to
    alive = torch.ones_like(row, dtype=torch.bool)
    streak = torch.zeros_like(row)
    thinking = torch.tensor([p[-1] != think_end_id for p in prompts], device=device)[group]
    for t in range(max_new_tokens):
        token, token_logp = sample_tokens(logits, temperature, top_p, generator)
        forced = alive & thinking & (token != think_end_id) & (t == think_budget)
        if t == think_budget:
            token = token.masked_fill(forced, think_end_id)
            cut[row] |= forced
        tokens[row, t] = token.where(alive, pad_id)
        logp[row, t] = token_logp.float().masked_fill(forced | ~alive, 0.0)
        drawn[row, t] = alive & ~forced
        lengths[row] += alive
        if on_tokens:
            on_tokens(row[alive], token[alive])

        thinking &= token != think_end_id
        if repetition_stop <= max_new_tokens:
            sure = logits.softmax(-1).gather(1, token[:, None])[:, 0] > 0.99
            streak = (streak + 1) * sure
        code = torch.where(token == eos_id, EOS, torch.where(streak >= repetition_stop, REPETITION, LENGTH))
        cause[row] = torch.where(alive, code, cause[row])
        alive &= code == LENGTH
        n_alive = int(alive.sum())
        if n_alive == 0 or t + 1 == max_new_tokens:
            break
        if n_alive <= 0.75 * len(row):
            keep = alive.nonzero()[:, 0]
            row, alive, thinking, streak, token = (x[keep] for x in (row, alive, thinking, streak, token))
            cache = cache.select(keep)
        logits = model(token[:, None], cache=cache)[:, 0]

    cause[cut & (cause == EOS)] = BUDGET
    ended = [ENDED[c] for c in cause.tolist()]
    tokens, logp, drawn = (x[:, : t + 1] for x in (tokens, logp, drawn))
    return Rollout(tokens, logp, drawn, lengths, ended, time.perf_counter() - start)


ENDED = ("length", "eos", "repetition", "budget")
LENGTH, EOS, REPETITION, BUDGET = range(4)


def _check_request(model, prompts, group_size, max_new_tokens, temperature, top_p, think_budget, think_end_id, cache):
    if not prompts or min(len(p) for p in prompts) == 0:
        raise ValueError("need at least one prompt, each of at least one token")
    W, limit = model.config.vocab_size, model.config.max_position_embeddings
    bad = [i for p in prompts for i in p if not 0 <= i < W]
    if bad:
        raise ValueError(f"token id {bad[0]} in a prompt is outside the model's vocabulary of {W}")
    for name, value, least in (("group_size", group_size, 1), ("max_new_tokens", max_new_tokens, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    longest, room = max(len(p) for p in prompts), f"model's {limit}"
    if cache is not None:
        if len(prompts) * group_size != 1:
            raise ValueError(f"a cache continues one conversation, found {len(prompts)} prompts x {group_size}")
        limit = min(limit, cache.max_len) - int(cache.position)
        room = f"{limit} that are left in the cache"
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens plus {max_new_tokens} new ones exceeds the {room}; shorten either"
        )
    if not (temperature == 0 or temperature >= 0.01) or not 0 < top_p <= 1:
        raise ValueError(f"need temperature 0 or >= 0.01, and 0 < top_p <= 1; found {temperature} and {top_p}")
    if think_budget is not None and (think_budget < 0 or think_end_id is None):
        raise ValueError(f"think_budget must be >= 0 and needs think_end_id, found {think_budget} and {think_end_id}")


# ============================================================================
# 3. Chat                                                 (released template)
# ============================================================================

TOOL_TEXT = """\
You are provided with these tools:
<tools>
{tools}
</tools>

If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide tool-name and \
json-object of arguments, following the format below:
<tool_calls>
{{"name": <tool-name-1>, "arguments": <args-json-object-1>}}
...
</tool_calls>"""


HEADERS = {
    "system": "system ai_setting=assistant", "tools": "system tool_setting=tools", "user": "user name=user",
    "assistant": "ai name=assistant", "tool": "tool name=tools",
}  # fmt: skip


def chat_prompt(messages, tools=None):
    """The text that M1 continues: a conversation in its chat template, open for the assistant's next turn.

    messages: {"role": "system", "user" or "assistant", "content": text}, or results of tools: {"role": "tool",
    "content": [{"name": ..., "text": ...}, ...]}. System messages are joined and come first, then tools (a list of
    JSON objects with name, description, parameters), then the turns; an assistant's with all that it thought.
    """
    return "".join(special + text for special, text in chat_pieces(messages, tools))


def chat_pieces(messages, tools=None):
    """chat_prompt as pairs, a special token and the text that follows it: what Tokenizer.encode_chat takes."""
    system = "".join(m["content"] for m in messages if m["role"] == "system")
    turns = [("system", system)] if system else []
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        turns.append(("tools", TOOL_TEXT.format(tools=listed)))
    for role, content in ((m["role"], m["content"]) for m in messages if m["role"] != "system"):
        if role not in ("user", "assistant", "tool"):
            raise ValueError(f"unknown role {role!r}; choose from system, user, assistant, tool")
        if role == "tool":
            content = "".join(f"tool name: {r['name']}\ntool result: {r['text']}\n\n" for r in content)
        turns.append((role, content))

    pieces = [("<begin_of_document>", "")]
    for role, content in turns:
        pieces += [("<beginning_of_sentence>", f"{HEADERS[role]}\n{content}"), ("<end_of_sentence>", "\n")]
    return [*pieces, ("<beginning_of_sentence>", f"{HEADERS['assistant']}\n")]


def parse_tool_calls(text):
    """The calls in a response, [{"name": ..., "arguments": {...}}, ...]; none without a <tool_calls> block.

    One JSON object per line. A block inside the thinking is no call. ValueError names the line that is malformed.
    """
    calls = []
    for block, end in re.findall(r"<tool_calls>(.*?)(</tool_calls>|\Z)", text.rpartition("</think>")[2], re.DOTALL):
        if not end:
            raise ValueError("the response ended inside its <tool_calls> block")
        for line in filter(None, map(str.strip, block.split("\n"))):
            try:
                call = json.loads(line)
                name, arguments = call["name"], call["arguments"]
            except (ValueError, KeyError, TypeError, RecursionError):
                name = arguments = None
            if not isinstance(name, str) or not isinstance(arguments, dict):
                raise ValueError(f'a tool call is one line {{"name": ..., "arguments": {{...}}}}, found {line!r}')
            calls.append({"name": name, "arguments": arguments})
    return calls


class Chat:
    """A conversation whose history stays in the cache: a turn costs its own tokens, however long the history.

    After every reply the cache is what one pass over self.tokens leaves: all turns, the last one closed. It is one row
    of at most `context` tokens.
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

        request: further arguments of generate. An answer is cut where the context is full; if not even one token of it
        would fit: ValueError, and the conversation is as before.
        """
        message = {"role": role, "content": content}
        opened = chat_pieces([message])[1:] if self.tokens else chat_pieces([*self.opening, message], self.tools)
        new, close = map(self.tokenizer.encode_chat, (opened, [("<end_of_sentence>", "\n")]))
        room = self.cache.max_len - len(self.tokens) - len(new) - len(close)
        if room < 1:
            raise ValueError(
                f"the context of {self.cache.max_len} tokens is full: {len(self.tokens)} are used, this turn takes "
                f"{len(new)} more; /reset the chat earlier or start it with a larger --context"
            )
        request = dict(max_new_tokens=min(max_new_tokens, room), cache=self.cache, **self.tokenizer.ids(), **request)
        try:
            rollout = generate(self.model, [new], **request)
            answer = rollout.tokens[0].tolist()
            unread = close if answer[-1] == close[0] else [answer[-1], *close]
            with torch.no_grad():
                self.model(torch.tensor([unread], device=self.model.device), cache=self.cache, last_only=True)
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

    model: str = flag(None, "a run of train_rl (runs/NAME) or a directory in the published layout", "model")
    device: str = flag("auto", "cpu, cuda, or auto: a GPU if there is one", "model")
    prompt: str = flag(None, "the text to answer, e.g. +314204=; without it, a terminal starts a chat", "request")
    n: int = flag(1, "how many responses to the prompt", "request", at_least=1)
    max_new_tokens: int = flag(256, "longest response, in tokens", "request", at_least=1)
    think_budget: int = flag(None, "close the thinking after this many tokens", "request", at_least=0)
    temperature: float = flag(1.0, "0 is greedy; the report recommends 1.0 with top-p 0.95", "request", at_least=0)
    top_p: float = flag(0.95, "sample from the likeliest tokens that hold it", "request", above=0, at_most=1)
    seed: int = flag(0, "same seed, same responses", "request", at_least=0)
    system: str = flag(None, "system prompt of a chat model", "chat")
    tools: str = flag(None, "JSON file: a list of tools with name, description, parameters", "chat")
    context: int = flag(32_768, "longest conversation, in tokens (memory is taken at once)", "chat", at_least=1)

    def __post_init__(self):
        check_flags(self)


def pick_device(name):
    """ "auto" -> cuda if there is one, else cpu. ValueError for a device this machine does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}; choose from auto, cpu, cuda")
    return name


def read_tools(path):
    """The tools of a JSON file: a list of objects, each with a name."""
    tools = read_json(Path(path)) if Path(path).is_file() else None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and "name" in tool for tool in tools):
        raise ValueError(f"--tools {path}: need a JSON list of tools, each with name, description and parameters")
    return tools


def stream(tokenizer, answer, *args, **request):
    """Print the response that answer(*args, on_tokens=..., **request) generates as it grows; returns its text."""
    text, said = codecs.getincrementaldecoder("utf-8")("replace"), []  # a character may take several tokens

    def show(_, tokens):
        if int(tokens[0]) != tokenizer.eos_id:
            said.append(text.decode(tokenizer.token_bytes(int(tokens[0]))))
            print(said[-1], end="", flush=True)

    rollout = answer(*args, on_tokens=show, **request)
    print(text.decode(b"", final=True), end="")
    print(f"   [{int(rollout.lengths[0])} tokens, ended by {rollout.ended[0]}]")
    return "".join(said)


def typed(prompt):
    """The next line typed that is not blank; /exit is an end of the input, as Ctrl-D is."""
    while not (line := input(prompt).strip()):
        pass
    if line == "/exit":
        raise EOFError
    return line


def talk(tokenizer, answer, request, chat=None):
    """Answer what is typed, in a chat or line by line. When a chat's model calls tools, their results are typed."""
    kind = f"chat of {chat.cache.max_len:,} tokens; /reset empties it" if chat else "each line is a problem, no history"
    print(f"{kind}; /exit or Ctrl-D leaves")
    calls = []
    try:
        while True:
            lines = [typed(f"result of {json.dumps(call)}> ") for call in calls] or [typed("> ")]
            if chat and "/reset" in lines:
                chat.reset()
                calls = []
                continue
            results = [{"name": call["name"], "text": line} for call, line in zip(calls, lines)]
            try:
                text = stream(tokenizer, answer, results or lines[0], "tool" if results else "user", **request)
            except ValueError as error:  # too long, say: the conversation goes on
                print(f"   [{error}]")
                continue
            request, calls = {**request, "seed": request["seed"] + 1}, []
            if chat and chat.tools:
                try:
                    calls = parse_tool_calls(text)
                except ValueError as error:
                    print(f"   [{error}]")
    except EOFError:
        print()


@command_line
def main(argv=None):
    """Print responses to one prompt, token by token; without a prompt, answer what is typed."""
    flags = parse_flags(Flags, argv, __doc__.splitlines()[0])
    if not flags.model or not (flags.prompt or sys.stdin.isatty()):
        example = '--model runs/tiny-cispo-001 --prompt "+314204="'
        raise ValueError(f"--model and --prompt are needed, e.g. {example} (on a terminal, --model alone: a chat)")
    folder = checkpoint_dir(flags.model)
    config = M1Config.from_json(folder)
    tokenizer, has_turns = Tokenizer.of(config, folder), config.tokenizer == "m1"
    if not has_turns and (flags.system or flags.tools):
        raise ValueError("--system and --tools are for M1's chat template; this model was trained on raw prompts")
    if flags.think_budget is not None and tokenizer.think_end_id is None:
        raise ValueError("--think-budget needs </think> to be one token; in this model's vocabulary it is several")
    tools = read_tools(flags.tools) if flags.tools else None
    model = load_pretrained(folder, pick_device(flags.device))
    chat = Chat(model, tokenizer, system=flags.system, tools=tools, context=flags.context) if has_turns else None

    def solve(problem, role, **request):
        return generate(model, [tokenizer.encode(problem)], **tokenizer.ids(), **request)

    answer = chat.reply if chat else solve
    request = {key: getattr(flags, key) for key in ("max_new_tokens", "temperature", "top_p", "think_budget", "seed")}
    if not flags.prompt:
        return talk(tokenizer, answer, request, chat)
    for i in range(flags.n):
        if chat:
            chat.reset()
        else:
            print(flags.prompt, end="", flush=True)
        stream(tokenizer, answer, flags.prompt, "user", **{**request, "seed": flags.seed + i})


if __name__ == "__main__":
    main()
