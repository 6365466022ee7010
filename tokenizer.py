"""Text to tokens and back, conversations to text: byte and M1 tokenizers, the chat template.

1. Tokenizer         Tokenizer, m1_encoding
2. Conversations     chat_prompt, chat_pieces, parse_tool_calls
"""

import json
import re
from pathlib import Path

import tiktoken

from cli import fits, read_json, read_text, short

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
MOST_BLANKS = 500_000  # tiktoken's regular expressions break at a million
FILES = "tokenizer.json vocab.json merges.txt tokenizer_config.json chat_template.jinja".split()


class Tokenizer:
    """Text <-> token ids, around a tiktoken.Encoding.

    special: {name: id}; has_turns: its model chats, so a prompt is a user's turn; files: {name:
    bytes} of what its directory has of it.
    """

    def __init__(self, encoding, files=None):
        self.encoding, self.special = encoding, encoding._special_tokens
        self.has_turns, self.files = encoding.name == "m1", files or {}
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
        files = {name: Path(path, name) for name in FILES}
        files = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
        return cls(m1_encoding(Path(path), config.vocab_size), files)

    def encode(self, text, specials=False):
        """Token ids of a text; special tokens that it spells stay text unless specials=True."""
        blanks = re.finditer(r"\s+", text) if len(text) > MOST_BLANKS else ()
        if any(run.end() - run.start() > MOST_BLANKS for run in blanks):
            raise ValueError(f"a text may have {MOST_BLANKS:,} blanks in a row at most; cut them")
        if specials:
            return self.encoding.encode(text, allowed_special="all")
        return self.encoding.encode_ordinary(text)

    def encode_chat(self, pieces):
        """Token ids of chat_pieces: what a user wrote cannot spell the token that ends a turn."""
        return [i for special, text in pieces for i in (self.special[special], *self.encode(text))]

    def decode(self, ids):
        """The text of token ids; invalid UTF-8 becomes U+FFFD."""
        try:
            text = self.encoding.decode_bytes(ids)
        except KeyError:
            text = b"".join(map(self.token_bytes, ids))
        return text.decode("utf-8", "replace")

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

    tokenizer.json gives every id, as vocab.json does beside merges.txt. Without it M1's rule does:
    byte b has id b, the merge of rank r (from 0) id 256 + r, special tokens M1_SPECIALS. tiktoken
    joins the pair whose result has the smallest id, so ids must rise with rank. ValueError if a
    file is missing, malformed, or does not fit a model of vocab_size tokens.
    """
    files = [folder / name for name in ("tokenizer.json", "merges.txt")]
    file = next(filter(Path.is_file, files), None)
    if file is None:
        raise ValueError(f"{folder} has no tokenizer: put its tokenizer.json or merges.txt there")
    byte_of, added = {letter: b for b, letter in enumerate(byte_letters())}, {}
    try:
        if file.suffix == ".json":
            stored = read_json(file)
            check_pipeline(stored)
            vocab, merges = stored["model"]["vocab"], stored["model"]["merges"]
            added = {x["content"]: x["id"] for x in stored.get("added_tokens") or []}
            if not fits([*added], list[str]) or "" in added:
                raise ValueError("an added token has no text")
        else:
            lines, table = read_text(file).split("\n"), folder / "vocab.json"
            vocab, merges = None, filter(None, lines[lines[0].startswith("#version") :])
            if table.is_file():
                vocab, file = read_json(table), f"{table} with {file.name}"
        pairs = [m.split(" ") if isinstance(m, str) else m for m in merges]
        merged = [a + b for a, b in pairs]
        tokens = [*byte_of, *merged]
        if vocab is None:
            vocab = {token: i for i, token in enumerate(tokens)}
        special = {name: vocab.get(name, i) for name, i in M1_SPECIALS.items()} | added
        ranks = {bytes(byte_of[letter] for letter in token): vocab[token] for token in tokens}
        ids, rising = [*ranks.values(), *special.values()], [vocab[token] for token in merged]
        if not fits(ids, list[int]) or len(ranks) < len(tokens) or len(set(ids)) < len(ids):
            raise ValueError("its tokens must be distinct, and their ids distinct whole numbers")
        if rising != sorted(rising):
            raise ValueError("ids must rise from merge to merge")
        check_merges(pairs)
        if min(ids) < 0 or max(ids) >= vocab_size:
            has = f"it has ids from {min(ids)} to {max(ids)}"
            raise ValueError(f"{has}, the model a vocabulary of {vocab_size}")
        return tiktoken.Encoding("m1", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
    except KeyError as error:
        lacks = short(error.args[0])
        raise ValueError(f"{file} is not a byte-level BPE: it lacks {lacks}") from None
    except (ValueError, TypeError, AttributeError) as error:
        what = str(error)[:300]
        raise ValueError(f"{file} cannot be this model's tokenizer: {what}") from None


def check_merges(pairs):
    """ValueError unless every merge is reached by the merges before it.

    tiktoken joins any two neighbours whose text is a token, BPE by definition only the pairs of the
    list. Where all are reached, both are the same. A merge (a, b) is missed where an earlier one
    reaches across: goes back in time from a | b to what then touched there, letter by letter.
    """
    rank = {tuple(pair): i for i, pair in enumerate(pairs)}
    made = {a + b: i for i, (a, b) in enumerate(pairs)}
    for i, (a, b) in enumerate(pairs):
        missed = max(made[x] if len(x) > 1 else -1 for x in (a, b)) >= i
        while not missed and len(a + b) > 2:
            if made.get(a, -1) > made.get(b, -1):
                last = made[a]
                a = pairs[last][1]
                missed = rank.get((a, b), last) < last
            else:
                last = made[b]
                b = pairs[last][0]
                missed = rank.get((a, b), last + 1) <= last  # of equal ones the left one is first
        if missed:
            raise ValueError(f"the merges before {short(pairs[i])} do not lead to it")


def check_pipeline(stored):
    """ValueError if a tokenizer.json asks for steps around its merges that M1 does not have."""
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    trims = ({}, {"trim_offsets": True}, {"trim_offsets": False})  # which change no id
    parts = ([split, letters | trim] for trim in trims)
    sequences = [{"type": "Sequence", "pretokenizers": both} for both in parts]
    steps = {"pre_tokenizer": (None, *sequences), "normalizer": (None,)}
    steps |= {"truncation": (None,), "padding": (None,)}
    options = {"type": (None, "BPE"), "dropout": (None, 0), "unk_token": (None,)}
    options |= {"ignore_merges": (None, False), "byte_fallback": (None, False)}
    options |= {"continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
    for part, known in ((stored, steps), (stored["model"], options)):
        for name, allowed in known.items():
            if part.get(name) not in allowed:
                raise ValueError(f"its {name} is not M1's: {short(part[name])}")


def byte_letters():
    """GPT-2's 256 letters for bytes: a printable byte's is its own, the others' U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(b if b in printable else next(others)) for b in range(256)]


# ============================================================================
# 2. Conversations                                        (released template)
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
    {"role": "tool", "content": [{"name": ..., "text": ...}, ...]}; see message_text for more forms.
    System messages are joined and come first, then tools (a list of JSON objects with name,
    description, parameters), then the turns; an assistant's with all that it thought.
    """
    return "".join(special + text for special, text in chat_pieces(messages, tools))


def chat_pieces(messages, tools=None):
    """chat_prompt as pairs, a special token and the text that follows it."""
    if not fits(messages, list[dict]):
        raise ValueError(f"a conversation is a list of messages, found {short(messages)}")
    if tools and (not fits(tools, list[dict]) or not all(fits(t.get("name"), str) for t in tools)):
        raise ValueError(f"tools are a list of objects, each with a name, found {short(tools)}")
    said = [(m.get("role"), message_text(m)) for m in messages]
    system = "".join(text for role, text in said if role == "system")
    turns = [("system", system)] if system else []
    if tools:
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        turns.append(("tools", TOOL_TEXT.format(tools=listed)))
    turns += [(role, text) for role, text in said if role != "system"]

    pieces = [("<begin_of_document>", "")]
    for role, text in turns:
        pieces += [("<beginning_of_sentence>", f"{HEADERS[role]}\n{text}"), END_OF_TURN]
    return [*pieces, ("<beginning_of_sentence>", f"{HEADERS['assistant']}\n")]


def message_text(message):
    """The text of one message; ValueError for what the template has no place for.

    content: a text, or a list of {"type": "text", "text": ...}; of a tool, a list of results
    {"name": ..., "text": ...}, or one result as a text beside the message's "name".
    """
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant", "tool"):
        known = "system, user, assistant, tool"
        raise ValueError(f"unknown role {short(role)}; choose from {known}")
    if message.get("tool_calls"):
        raise ValueError("write an assistant's tool_calls as a <tool_calls> block into its content")
    if role == "tool":
        results = [{"name": message.get("name"), "text": content}]
        results = content if isinstance(content, list) else results
        if not fits(results, list[dict]) or not all(
            fits(r.get("name"), str) and fits(r.get("text"), str) for r in results
        ):
            needed = 'a list of {"name": ..., "text": ...}, or a text beside a "name"'
            raise ValueError(
                f"the content of a tool's message must be {needed}, found {short(content)}"
            )
        return "".join(f"tool name: {r['name']}\ntool result: {r['text']}\n\n" for r in results)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    if not all(
        fits(x, dict) and x.get("type") == "text" and fits(x.get("text"), str) for x in parts
    ):
        needed = 'a text or a list of {"type": "text", "text": ...}'
        raise ValueError(f"the content of a message must be {needed}, found {short(content)}")
    return "".join(part["text"] for part in parts)


def parse_tool_calls(text):
    """The calls in a response: [{"name": ..., "arguments": {...}}, ...].

    JSON objects in <tool_calls> blocks after the thinking; ValueError names a bad one. Thinking
    that <think> opens ends at the first </think>. Where the prompt opened it, it ends at the first
    </think> outside of a block's JSON.
    """
    answer, thinking, calls, at = text, True, [], 0
    if text.lstrip().startswith("<think>"):
        answer, thinking = text.partition("</think>")[2], False
    while tag := re.compile(r"</think>|<tool_calls>").search(answer, at):
        at = tag.end()
        if tag[0] == "<tool_calls>":
            mentioned = not re.compile(r"\s*(\{|</tool_calls>)").match(answer, at)
            if mentioned and thinking and "</think>" in answer[at:]:
                continue
            block, at = _read_block(answer, at)
            calls += block
        elif thinking:
            calls, thinking = [], False
    return calls


def _read_block(text, at):
    """The calls from `at` on to </tool_calls>, and where the text goes on."""
    calls, space, end = [], re.compile(r"\s*"), "</tool_calls>"
    while not text.startswith(end, at := space.match(text, at).end()):
        start, call = at, None
        try:
            call, at = json.JSONDecoder().raw_decode(text, at)
        except (ValueError, RecursionError):
            if end not in text[at:]:
                raise ValueError("the response ended inside its <tool_calls> block") from None
        call = call if fits(call, dict) else {}
        if not fits(call.get("name"), str) or not fits(call.get("arguments"), dict):
            need, found = '{"name": ..., "arguments": {...}}', text[start:].partition("\n")[0]
            raise ValueError(f"a tool call is one line {need}, found {short(found)}")
        calls.append({"name": call["name"], "arguments": call["arguments"]})
    return calls, at + len(end)
