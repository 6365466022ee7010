"""Text to tokens to model and back: the tokenizer, the generation engine that RL uses too, and a command line.

    python sample.py --model runs/tiny-cispo-001 --prompt "+314204="

    1. Tokenizer         Tokenizer
    2. Generation        sample_tokens, generate, Rollout
    3. Command line

Dimension key: P prompts, G responses per prompt, N = P * G responses, T response tokens, W vocabulary.
"""

import codecs
from dataclasses import dataclass
from typing import NamedTuple

import tiktoken
import torch
from torch.nn.utils.rnn import pad_sequence

from model import M1Config, check_flags, checkpoint_dir, command_line, flag, load_pretrained, parse_flags

# ============================================================================
# 1. Tokenizer
# ============================================================================

SPECIALS = (
    "<pad>", "<end_of_sentence>", "<beginning_of_sentence>", "<begin_of_document>", "<end_of_document>",
    "<think>", "</think>", "<tools>", "</tools>", "<tool_calls>", "</tool_calls>",
    "<reserved_0>", "<reserved_1>", "<reserved_2>", "<reserved_3>", "<reserved_4>",
)  # fmt: skip


class Tokenizer:
    """Text <-> token ids, around a tiktoken.Encoding."""

    def __init__(self, encoding):
        self.encoding = encoding
        special = encoding._special_tokens
        self.pad_id = special["<pad>"]
        self.eos_id = special["<end_of_sentence>"]
        self.think_end_id = special["</think>"]

    @classmethod
    def byte(cls):
        """256 bytes and 16 special tokens of M1's chat format: 272 ids, nothing to download."""
        return cls(
            tiktoken.Encoding(
                "byte",
                pat_str=r"[\s\S]",
                mergeable_ranks={bytes([i]): i for i in range(256)},
                special_tokens={name: 256 + i for i, name in enumerate(SPECIALS)},
            )
        )

    @classmethod
    def of(cls, config):
        """The tokenizer that a model's config names."""
        if config.tokenizer != "byte":
            raise ValueError(f"this model's tokenizer is {config.tokenizer!r}; only 'byte' models can read text so far")
        return cls.byte()

    def encode(self, text, specials=False):
        """Token ids of a text. Special tokens spelled out in it stay plain text unless specials=True: a user's text
        must not be able to end a turn.
        """
        if specials:
            return self.encoding.encode(text, allowed_special="all")
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        """The text of token ids; invalid UTF-8 becomes U+FFFD."""
        return self.encoding.decode(ids)


# ============================================================================
# 2. Generation
# ============================================================================


class Rollout(NamedTuple):
    """N responses, those of a prompt contiguous, padded on the right to the longest."""

    tokens: torch.Tensor  # (N, T) int64
    logp: torch.Tensor  # (N, T) fp32: log-prob of each token under the distribution it was drawn from
    mask: torch.Tensor  # (N, T) bool: tokens that the model drew, so neither padding nor a </think> set by the budget
    lengths: torch.Tensor  # (N,) int64: tokens of each response, the end token included
    ended: list  # N of "eos", "length" (max_new_tokens), "repetition", "budget" (closed the thinking; then eos)


def sample_tokens(logits, temperature, top_p, generator):
    """Draw one token per row of logits (N, W); returns tokens (N,) and their log-probs under what was sampled from.

    Temperature first, then the smallest set of tokens with probability >= top_p, renormalised. Temperature 0 is
    greedy: the distribution is a single token and the log-prob 0.
    """
    if temperature == 0:
        return logits.argmax(-1), logits.new_zeros(len(logits))
    logp = (logits / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = logp.exp().sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays inside
        logp = logp.masked_fill(outside.scatter(-1, order, outside), -torch.inf).log_softmax(-1)
    token = torch.multinomial(logp.exp(), 1, generator=generator)
    return token[:, 0], logp.gather(-1, token)[:, 0]


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
    think_end_id=None, think_budget=None, repetition_stop=3000, on_tokens=None,
):  # fmt: skip
    """group_size responses to every prompt (a list of token ids each). Returns a Rollout on the model's device.

    Prompts are padded on the left and read once; the responses of a group start from copies of their prompt's cache.
    Rows that have ended are dropped from the batch once they are a quarter of it. A response ends
      - with eos_id, or after max_new_tokens;
      - after repetition_stop tokens in a row of probability > 0.99 each: it is looping (report sec. 3.2 uses 3,000).
    think_budget (needs think_end_id): a response that has not closed its thinking by itself after that many tokens
    gets think_end_id in place of the next one, and answers from there.
    on_tokens(responses, tokens): called after each step with the numbers and the new tokens of the running responses.
    The same seed on the same machine gives the same responses.
    """
    _check_request(model, prompts, group_size, max_new_tokens, temperature, top_p, think_budget, think_end_id)
    device, generator = model.device, torch.Generator(model.device).manual_seed(seed)
    tokens, mask = left_pad(prompts, pad_id, device)
    cache = model.new_cache(len(prompts), tokens.shape[1] + max_new_tokens)
    logits = model(tokens, mask=mask, cache=cache, last_only=True)[:, 0]
    N = len(prompts) * group_size
    group = torch.arange(N, device=device) // group_size
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
    return Rollout(tokens[:, : t + 1], logp[:, : t + 1], drawn[:, : t + 1], lengths, [ENDED[c] for c in cause.tolist()])


ENDED = ("length", "eos", "repetition", "budget")
LENGTH, EOS, REPETITION, BUDGET = range(4)


def _check_request(model, prompts, group_size, max_new_tokens, temperature, top_p, think_budget, think_end_id):
    if not prompts or min(len(p) for p in prompts) == 0:
        raise ValueError("need at least one prompt, each of at least one token")
    W, limit = model.config.vocab_size, model.config.max_position_embeddings
    bad = [i for p in prompts for i in p if not 0 <= i < W]
    if bad:
        raise ValueError(f"token id {bad[0]} in a prompt is outside the model's vocabulary of {W}")
    for name, value, least in (("group_size", group_size, 1), ("max_new_tokens", max_new_tokens, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    longest = max(len(p) for p in prompts)
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens plus {max_new_tokens} new ones exceeds the model's {limit}; shorten either"
        )
    if not (temperature == 0 or temperature >= 0.01) or not 0 < top_p <= 1:
        raise ValueError(f"need temperature 0 or >= 0.01, and 0 < top_p <= 1; found {temperature} and {top_p}")
    if think_budget is not None and (think_budget < 0 or think_end_id is None):
        raise ValueError(f"think_budget must be >= 0 and needs think_end_id, found {think_budget} and {think_end_id}")


# ============================================================================
# 3. Command line
# ============================================================================


@dataclass(frozen=True)
class Flags:
    """What to generate from, and how."""

    model: str = flag(None, "a run of train_rl (runs/NAME) or a directory in the published layout", "model")
    device: str = flag("auto", "cpu, cuda, or auto: a GPU if there is one", "model")
    prompt: str = flag(None, "the text to continue, e.g. +314204=", "request")
    n: int = flag(1, "how many responses", "request", at_least=1)
    max_new_tokens: int = flag(256, "longest response, in tokens", "request", at_least=1)
    think_budget: int = flag(None, "close the thinking after this many tokens", "request", at_least=0)
    temperature: float = flag(
        1.0, "0 is greedy; 1.0 with top-p 0.95 is what the report recommends", "request", at_least=0
    )
    top_p: float = flag(
        0.95, "sample from the likeliest tokens that hold this probability", "request", above=0, at_most=1
    )
    seed: int = flag(0, "same seed, same responses", "request", at_least=0)

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


@command_line
def main(argv=None):
    """Print responses to one prompt, token by token."""
    flags = parse_flags(Flags, argv, __doc__.splitlines()[0])
    if not flags.model or not flags.prompt:
        raise ValueError('--model and --prompt are needed, e.g. --model runs/tiny-cispo-001 --prompt "+314204="')
    tokenizer = Tokenizer.of(M1Config.from_json(checkpoint_dir(flags.model)))
    model = load_pretrained(flags.model, pick_device(flags.device))
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens

    def show(_, tokens):
        if int(tokens[0]) != tokenizer.eos_id:
            piece = tokenizer.encoding.decode_single_token_bytes(int(tokens[0]))
            print(text.decode(piece), end="", flush=True)

    for i in range(flags.n):
        print(flags.prompt, end="", flush=True)
        rollout = generate(
            model, [tokenizer.encode(flags.prompt)], max_new_tokens=flags.max_new_tokens, temperature=flags.temperature,
            top_p=flags.top_p, eos_id=tokenizer.eos_id, think_end_id=tokenizer.think_end_id, seed=flags.seed + i,
            think_budget=flags.think_budget, on_tokens=show,
        )  # fmt: skip
        print(f"   [{int(rollout.lengths[0])} tokens, ended by {rollout.ended[0]}]")


if __name__ == "__main__":
    main()
