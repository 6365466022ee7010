"""Prompts to responses: the generation engine, which a chat, the RL loop and the benchmarks use.

One loop in `generate` draws a token for every row of a batch, step by step, until all responses
have ended; nothing in a step waits for the device. On a GPU a step is one CUDA graph.

    1. What is asked, what comes back   Sampling, Request, Rollout
    2. A token                          streams of random numbers, sample_tokens, left_pad
    3. A step                           Rows, draw
    4. Steps, plain or as CUDA graphs   rollout_weights, Steps, captured, Graphs
    5. The loop                         generate

Dimension key: P prompts, G responses per prompt, N = P * G responses, B rows of the batch, T tokens
of a response, W vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import time
import types
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import parallel
from cli import check, fits, short, torch
from cli import model as m1

# ============================================================================
# 1. What is asked, what comes back
# ============================================================================


class Rollout(NamedTuple):
    """N responses, those of a prompt contiguous, padded on the right to the longest."""

    tokens: torch.Tensor  # (N, T) int64
    logp: torch.Tensor  # (N, T) fp32: under the distribution that each token was drawn from
    mask: torch.Tensor  # (N, T) bool: drawn by the model: no padding, reply, </think> of the budget
    lengths: torch.Tensor  # (N,) int64: tokens of each response, with replies and the end token
    begun: torch.Tensor  # (N,) int64: how many of them stand before and in the last reply
    ended: list  # N of ENDED: why; or "context", in a full Chat
    seconds: float = 0.0  # that generating took

    def to(self, device):
        """The same on another device."""
        return Rollout(*(x.to(device) if torch.is_tensor(x) else x for x in self))

    def ids(self):
        """The N responses as lists of token ids."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist())]

    @classmethod
    def joined(cls, rollouts):
        """Several, one after the other."""
        *columns, lengths, begun, ended, seconds = zip(*rollouts)
        longest = max(x.shape[1] for x in columns[0])
        pad = torch.nn.functional.pad
        columns = [[pad(x, (0, longest - x.shape[1])) for x in column] for column in columns]
        ended = [why for own in ended for why in own]
        return cls(*map(torch.cat, (*columns, lengths, begun)), ended, max(seconds))


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
    max_rows: int | None = None
    """responses at a time, in whole groups, to save memory; others wait for rows; None = all"""

    def __post_init__(self):
        check(self, temperature=(0.01, 100), max_new_tokens=(1, 10**7), repetition_stop=(0, 10**7))
        check(self, max_rows=(1, 10**7))


@dataclass(frozen=True)
class Request:
    """What generate is asked for: its arguments beside the prompts."""

    max_new_tokens: int  # the longest response, with replies
    eos_id: int  # ends a response
    seed: int  # the same seed on the same machine gives the same responses
    group_size: int = 1  # responses to each prompt
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # draw from the likeliest tokens that hold it
    pad_id: int = 0
    think_end_id: int | None = None  # </think>
    think_budget: int | None = None  # unclosed thinking gets think_end_id after so many tokens of
    #                                  its own, which begin anew behind a reply
    repetition_stop: int = 3000  # a loop ends after so many tokens of p > 0.99 in a row; 0 = never
    max_rows: int | None = None  # responses at a time, in whole groups; None = all
    call_id: int | None = None  # ends a call, which generate's `reply` answers
    first: int = 0  # number of the first response among those of all processes, see streams

    def __post_init__(self):
        long = (1, 2**40)
        check(self, False, max_new_tokens=long, group_size=(1, 10**7), temperature=(0, 100))
        check(self, False, top_p=(1e-9, 1), think_budget=(0, 2**40), repetition_stop=(0, 2**40))
        check(self, False, max_rows=(1, 2**40), seed=(-(2**63), 2**64 - 1), eos_id=(-1, 2**40))
        if 0 < self.temperature < 0.01:
            raise ValueError(f"need temperature 0 or >= 0.01, found {self.temperature}")
        if self.think_budget is not None and self.think_end_id is None:
            raise ValueError("think_budget needs think_end_id")

    def check(self, model, prompts, cache):
        """ValueError for prompts that the model, or the conversation in the cache, cannot take."""
        if not fits(prompts, list[list[int]]):
            raise ValueError(f"prompts must be lists of token ids, found {short(prompts)}")
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("need at least one prompt, each of at least one token")
        W, limit = model.config.vocab_size, model.config.max_position_embeddings
        own = [self.pad_id, self.think_end_id or 0]
        for p in [*prompts, own]:
            if not 0 <= min(p) <= max(p) < W:
                bad = max(p) if max(p) >= W else min(p)
                raise ValueError(f"token id {bad} is outside the model's vocabulary of {W}")
        if (size := len(prompts) * self.group_size * self.max_new_tokens) > 2**32:
            raise ValueError(f"{size:,} tokens in one batch are more than {2**32:,}")
        room = f"model's {limit}"
        if cache is not None:
            if len(prompts) * self.group_size != 1:
                found = f"{len(prompts)} x {self.group_size} responses"
                raise ValueError(f"a cache continues one conversation, found {found}")
            limit = min(limit, cache.max_len) - int(cache.position)
            room = f"{limit} that are left in the cache"
        longest, new = max(map(len, prompts)), self.max_new_tokens
        if longest + new > limit:
            raise ValueError(f"a prompt of {longest} tokens plus {new} new ones exceeds the {room}")


# ============================================================================
# 2. A token
# ============================================================================


def _mix(x):
    """splitmix64: from int64s others in which every bit depends on all bits."""
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * (factor - (factor >> 63 << 64))
    return x


def streams(seed, n, device, first=0):
    """(n,) int64: a stream of random numbers for n responses from `first` on; see uniforms."""
    number = torch.arange(first, first + n, device=device)
    return _mix(_mix(_mix(torch.tensor(seed % 2**63, device=device)) + number))


def uniforms(stream, step):
    """(N,) fp64 in [0, 1): number `step` of each stream, whatever else is drawn beside it."""
    return (_mix(stream + step) >> 11 & 2**53 - 1).double() * 2.0**-53


def sample_tokens(logits, temperature, top_p, uniform):
    """Draw a token per row of logits (N, W): tokens (N,), log-probs under what they are drawn from.

    Temperature first, then the smallest set of tokens with probability >= top_p, renormalised.
    Temperature 0 is greedy: the distribution is a single token and the log-prob 0. uniform: (N,)
    random numbers. Logits that are not finite give a log-prob that is not finite.
    """
    if temperature == 0:
        highest, token = logits.max(-1)  # a nan is the highest
        return token, highest - highest
    logp = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    if top_p < 1:
        ordered, order = logp.exp().sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays inside
        logp = logp.masked_fill(outside.scatter(-1, order, outside), -torch.inf).log_softmax(-1)
    cdf = logp.exp().cumsum(-1, dtype=torch.float64)
    at = uniform[:, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, at, right=True).clamp(max=logp.shape[-1] - 1)
    return token[:, 0], logp.gather(-1, token)[:, 0]


def left_pad(sequences, pad_id, device):
    """Lists of ids -> tokens (B, L) int64, padded on the left, and mask (B, L), True = real."""
    lengths = torch.tensor([len(s) for s in sequences])
    longest = int(lengths.max())
    mask = torch.arange(longest) >= longest - lengths[:, None]
    flat = torch.tensor([i for s in sequences for i in s], dtype=torch.int64)
    tokens = torch.full(mask.shape, pad_id).masked_scatter(mask, flat)
    return tokens.to(device), mask.to(device)


# ============================================================================
# 3. A step
# ============================================================================


@dataclass
class Rows:
    """The responses that a batch holds, a row each; all tensors (B,) are changed in place."""

    number: torch.Tensor  # of its response, 0 .. n - 1; n: an empty row, whose outputs nobody reads
    stream: torch.Tensor  # its random numbers
    step: torch.Tensor  # its tokens so far
    token: torch.Tensor  # the last one
    streak: torch.Tensor  # tokens in a row of p > 0.99
    given: torch.Tensor  # tokens of a reply that stand in the outputs and come next
    called: torch.Tensor  # bool: has just drawn the end of a call
    thinking: torch.Tensor  # bool: no </think> so far
    alive: torch.Tensor  # bool

    @classmethod
    def new(cls, number, streams, thinking, alive):
        """Rows without a token yet."""
        zeros = (torch.zeros_like(number) for _ in range(4))
        flags = torch.zeros_like(thinking), thinking, torch.full_like(thinking, alive)
        return cls(number, streams[number], *zeros, *flags)

    def select(self, keep):
        """New Rows of these."""
        return Rows(*(x[keep] for x in vars(self).values()))

    def put(self, slots, other):
        """Other Rows take the place of these."""
        for own, x in zip(vars(self).values(), vars(other).values()):
            own[slots] = x


def _outputs(n, T, pad_id, device):
    """Room for n responses of T tokens, and one response and one token that nobody reads."""
    zeros = functools.partial(torch.zeros, device=device)
    return types.SimpleNamespace(
        tokens=torch.full((n + 1, T + 1), pad_id, device=device),
        logp=zeros(n + 1, T + 1),
        mask=zeros(n + 1, T + 1, dtype=torch.bool),
        lengths=zeros(n + 1, dtype=torch.int64),
        begun=zeros(n + 1, dtype=torch.int64),
        forced=zeros(n + 1, dtype=torch.bool),
        cause=zeros(n + 1, dtype=torch.int64),
        broken=zeros(1, dtype=torch.bool),
    )


def draw(logits, rows, out, ask):
    """A token for every row, and all that follows from it; nothing here waits for the device."""
    alive, at = rows.alive, (rows.number, rows.step)
    uniform = uniforms(rows.stream, rows.step)
    token, logp = sample_tokens(logits, ask.temperature, ask.top_p, uniform)
    out.broken |= (~logp.isfinite() & alive).any()
    drawn = alive
    if ask.call_id is not None:
        drawn = alive & (rows.given == 0)
        token = token.where(rows.given == 0, out.tokens[at])
        rows.given.sub_(1).clamp_(min=0)
    if ask.think_budget is not None:
        forced = drawn & rows.thinking & (token != ask.think_end_id)
        forced &= rows.step - out.begun[rows.number] >= ask.think_budget
        token, drawn = token.masked_fill(forced, ask.think_end_id), drawn & ~forced
        out.forced[rows.number] |= forced
    out.tokens[at] = token.where(alive, ask.pad_id)
    out.logp[at] = logp.float().where(drawn, 0.0)
    out.mask[at] = drawn
    out.lengths[rows.number] += alive

    if ask.think_end_id is not None:
        rows.thinking &= token != ask.think_end_id
    code = torch.full_like(token, LENGTH)  # it goes on, or is cut
    if 0 < ask.repetition_stop <= ask.max_new_tokens:
        sure = logits.softmax(-1).gather(1, token[:, None])[:, 0] > 0.99
        streak = (rows.streak + 1) * sure
        rows.streak.copy_(streak if ask.call_id is None else streak.where(drawn, rows.streak))
        loops = (rows.streak >= ask.repetition_stop) & (token != ask.eos_id)
        code.masked_fill_(loops, REPETITION)
    rows.called.copy_(drawn & (token == (-1 if ask.call_id is None else ask.call_id)))
    ends = (token == ask.eos_id) & drawn
    if ask.call_id == ask.eos_id:  # answer_calls decides
        ends &= rows.step + 1 >= ask.max_new_tokens
    code.masked_fill_(ends, EOS)
    out.cause[rows.number] = code.where(alive, out.cause[rows.number])
    rows.token.copy_(token)
    rows.step += alive
    rows.alive &= (code == LENGTH) & (rows.step < ask.max_new_tokens)


def answer_calls(rows, out, ask, reply):
    """Write what reply(response, tokens since its last reply) says behind each call that has just
    ended. Rows then take it token by token, as they take what they draw, so that no row waits for
    another. A call that ends a turn and gets no reply ends the response.
    """
    for i in (rows.alive & rows.called).nonzero()[:, 0].tolist():
        number, step = int(rows.number[i]), int(rows.step[i])
        said = out.tokens[number, int(out.begun[number]) : step].tolist()
        ids = reply(number, said)[: ask.max_new_tokens - step]
        out.tokens[number, step : step + len(ids)] = torch.tensor(ids, dtype=torch.int64)
        rows.given[i] = len(ids)
        if ids:
            out.begun[number] = step + len(ids)
            rows.thinking[i] |= ask.call_id == ask.eos_id  # in its next turn
        elif ask.call_id == ask.eos_id:
            rows.alive[i], out.cause[number] = False, EOS
    rows.called.zero_()


def _read_prompts(model, prompts, ask, cache):
    """Read prompts once each: a cache of P rows, their logits (P, W), and whether they think."""
    tokens, mask = left_pad(prompts, ask.pad_id, model.device)
    cache = cache or model.new_cache(*tokens.shape)
    logits = model(tokens, mask=mask, cache=cache, last_only=True)[:, 0]
    thinking = [p[-1] != ask.think_end_id for p in prompts]
    return cache, logits, torch.tensor(thinking, device=model.device)


# ============================================================================
# 4. Steps, plain or as CUDA graphs
# ============================================================================


_copies = weakref.WeakKeyDictionary()
WHOLE = 0.5  # most of what training leaves free that copied experts may take, or stay in parts


def rollout_weights(model):
    """The model that generate reads: itself, or where its activations have another dtype than its
    weights, or its parameters lie in parts on several processes, a copy of that dtype (norms, gates
    and head aside), made equal anew by every call. It is whole, but for experts beyond WHOLE.
    """
    stored = model.embed_tokens.weight
    if model.compute in (None, stored.dtype) and not parallel.in_parts(stored):
        return model
    copied, compute = _copies.get(model), model.dtype
    if copied is None or (copied.dtype, copied.device) != (compute, model.device):
        with torch.device("meta"):
            _copies[model] = copied = m1.MiniMaxM1(model.config, model.which)
        apart = _experts_stay_apart(model)
        for name, p in model.named_parameters():
            wide = p.ndim == 1 or ".gate." in name or "lm_head" in name
            owner, _, leaf = name.rpartition(".")
            if apart and p.ndim == 3:
                x = p.detach().to(compute, copy=True)
            else:
                x = torch.empty(p.shape, dtype=p.dtype if wide else compute, device=model.device)
            setattr(copied.get_submodule(owner), leaf, torch.nn.Parameter(x, requires_grad=False))
        for own, layer in zip(copied.layers, model.layers):
            own.block_sparse_moe.form = layer.block_sparse_moe.form
    for own, p in zip(copied.parameters(), model.parameters()):
        own.data.copy_(p.data if parallel.in_parts(own) else parallel.whole(p.data))
    return copied


def _experts_stay_apart(model):
    """Whether each process holds some experts, of which one GPU could not hold all."""
    moe, device = model.layers[0].block_sparse_moe, model.device
    if not parallel.by_expert(moe.w1) or device.type != "cuda":
        return False
    size = 3 * len(model.layers) * moe.w1.numel() * model.dtype.itemsize
    trained = 16 * sum(p.numel() for p in model.parameters()) / parallel.size()  # bytes
    return size > WHOLE * (torch.cuda.get_device_properties(device).total_memory - trained)


def in_step(model):
    """Whether all processes must make as many passes, as each holds some of a model's experts."""
    return parallel.in_parts(model.layers[0].block_sparse_moe.w1)


def takes_graphs(model, n):
    """Whether generate replays CUDA graphs for n rows: on a GPU, if no step must ask the device."""
    x = torch.empty(n, 0, dtype=model.dtype, device=model.device)
    fixed = model.layers[0].block_sparse_moe.best_form(x) in ("dense", "grouped_mm")
    return x.is_cuda and fixed and not in_step(model)


class Steps:
    """The rows of a batch, what they remember, and steps of all of them, here as plain calls."""

    LOOK = 1  # steps between two looks at what has ended

    def __init__(self, model, ask, size, n, max_len, cache=None):
        self.look = self.LOOK if ask.call_id is None else 1  # who calls waits for a reply
        self.model, self.ask, self.max_len = model, ask, max_len
        self.rows, self.cache = self._room(size, n, cache)
        self.out = _outputs(n, ask.max_new_tokens, ask.pad_id, model.device)

    def _room(self, size, n, cache=None):
        """Empty rows and a cache for them."""
        number = torch.full((size,), n, device=self.model.device)
        nobody = torch.zeros_like(number, dtype=torch.bool)
        rows = Rows.new(number, number.new_zeros(n + 1), nobody, False)
        return rows, cache or self.model.new_cache(size, self.max_len)

    def begin(self, slots, rows, cache, origin, logits):
        """Responses take these slots, each from row `origin` of the cache that read the prompts."""
        draw(logits[origin], rows, self.out, self.ask)
        self.rows.put(slots, rows)
        if cache is not self.cache:
            self.cache.put(slots, cache, origin, cache.max_len)

    def shrink(self, n_alive, used):
        """Leave out rows that have ended once they are a quarter."""
        if n_alive <= 0.75 * len(self.rows.alive):
            keep = self.rows.alive.nonzero()[:, 0]
            self.rows, self.cache = self.rows.select(keep), self.cache.select(keep)

    def step(self, rows, cache, out, reach):
        """One token of every row."""
        cache.position.mul_(rows.alive)  # an ended row stands at 0, so it stays inside the cache
        draw(self.model.decode(rows.token, cache, reach), rows, out, self.ask)

    def run(self, used):
        """`look` steps; the longest row has used so many tokens."""
        self.step(self.rows, self.cache, self.out, used + 1)

    def idle(self):
        """A pass for nothing, in step with processes that need this one's experts."""
        token = torch.zeros(1, dtype=torch.int64, device=self.model.device)
        self.model.decode(token, self.model.new_cache(1, 1), 1)


def captured(function, rehearse, device, pool=None):
    """function() as a CUDA graph, which replay() does; on a CPU, for tests, replay is a plain call.

    rehearse() does the like first, on a stream aside: kernels are compiled and chosen there.
    """
    if device.type != "cuda":
        return types.SimpleNamespace(replay=function)
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        rehearse()
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph, pool=pool):
        function()
    return graph


class Graphs(Steps):
    """Steps as CUDA graphs: one launch instead of some hundred, on memory that stays.

    There is one graph for each size of batch (the first and its halves) and each reach (keys looked
    at, a power of two), recorded when it is first needed and kept with the model, whose weights may
    change where they lie.
    """

    LOOK, KEPT = 16, 6
    _of = weakref.WeakKeyDictionary()  # model -> {settings: Graphs}, the last KEPT

    def __init__(self, model, ask, size, n, max_len):
        super().__init__(weakref.proxy(model), ask, size, n, max_len)
        self.sizes, self.graphs, self.pool = {size: (self.rows, self.cache)}, {}, None

    @classmethod
    def of(cls, model, ask, size, n, max_len):
        """A model's graphs for requests like this one, whatever its seed, without responses."""
        kept, max_len = cls._of.setdefault(model, {}), cls._up(max_len)
        weights = tuple(p.data_ptr() for p in model.parameters())
        key = weights, dataclasses.replace(ask, seed=0, first=0), size, n, max_len
        kept[key] = graphs = kept.pop(key, None) or cls(model, ask, size, n, max_len)
        while len(kept) > cls.KEPT:
            kept.pop(next(iter(kept)))
        graphs.rows, graphs.cache = graphs.sizes[size]
        graphs.rows.alive.zero_()
        fresh = _outputs(n, ask.max_new_tokens, ask.pad_id, model.device)
        for name, x in vars(fresh).items():
            getattr(graphs.out, name).copy_(x)
        return graphs

    @classmethod
    def forget(cls, model):
        """Give the memory of a model's graphs, and of its rollout weights, back."""
        cls._of.pop(_copies.pop(model, model), None)

    @staticmethod
    def _up(n):
        return max(64, 1 << (n - 1).bit_length())

    def shrink(self, n_alive, used):
        """Move what still runs to the smallest batch that holds it."""
        size, n = len(self.rows.alive), len(self.out.cause) - 1
        while size // 2 >= n_alive:
            size //= 2
        if size == len(self.rows.alive):
            return
        if size not in self.sizes:
            self.sizes[size] = self._room(size, n)
        rows, cache = self.sizes[size]
        keep, slots = self.rows.alive.nonzero()[:, 0], slice(0, n_alive)
        rows.number.fill_(n)
        rows.alive.zero_()
        rows.put(slots, self.rows.select(keep))
        cache.put(slots, self.cache, keep, used)
        self.rows, self.cache = rows, cache

    def run(self, used):
        """`look` steps of all rows."""
        reach = min(self._up(used + self.look), self.max_len)
        graph = self._graph(self.rows, self.cache, reach)
        for _ in range(self.look):
            graph.replay()

    def _graph(self, rows, cache, reach):
        """What replays one step of a batch."""
        key = len(rows.alive), reach
        if key not in self.graphs:
            step = functools.partial(self.step, rows, cache, self.out, reach)

            def rehearse():
                every = torch.arange(key[0], device=rows.alive.device)
                out = {name: x.clone() for name, x in vars(self.out).items()}
                out = types.SimpleNamespace(**out)
                self.step(rows.select(every), cache.select(every), out, reach)

            if rows.alive.is_cuda:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.graphs[key] = captured(step, rehearse, rows.alive.device, self.pool)
        return self.graphs[key]


# ============================================================================
# 5. The loop
# ============================================================================


def generate(model, prompts, *, on_tokens=None, reply=None, cache=None, **request):
    """Responses to prompts (lists of token ids), as a Rollout. request: the fields of Request.

    Prompts are padded on the left and read once each, when the first of their group begins. At most
    max_rows responses run at a time: once a quarter of the rows has ended, those that wait begin
    there; when none waits, rows that have ended leave the batch.
    Every response draws from a stream of its own, made of seed and its number: in fp32 its tokens
    do not depend on those beside it (but for rounding, where two are as likely); in bf16 products
    round differently with the size of a batch. on_tokens(responses, tokens) is called after each
    step with the numbers and tokens of those that took one. reply(response, tokens since its last
    reply) is asked when one has drawn call_id; the tokens that it returns come next, see
    answer_calls. cache: that of one conversation so far. The one prompt is what comes next, and the
    cache then holds it and the response but for the response's last token, which no step has read.
    On a GPU steps are replayed from CUDA graphs (see Graphs), unless on_tokens or cache is given.
    """
    ask, start, model = Request(**request), time.perf_counter(), rollout_weights(model)
    ask.check(model, prompts, cache)
    if (reply is None) != (ask.call_id is None):
        raise ValueError("reply needs call_id, which ends a call, and call_id needs reply")
    G, device = ask.group_size, model.device
    n, size = len(prompts) * G, G * min(len(prompts), max((ask.max_rows or 2**40) // G, 1))
    shape, max_len = (model, ask, size, n), max(map(len, prompts)) + ask.max_new_tokens
    if cache is not None or on_tokens or not takes_graphs(model, size):
        steps = Steps(*shape, max_len, cache)
    else:
        steps = Graphs.of(*shape, max_len)
    numbers, begun = streams(ask.seed, n, device, ask.first), 0
    while True:
        rows = steps.rows
        state = torch.stack([rows.alive.sum(), steps.out.broken[0], steps.cache.position.max()])
        n_alive, broken, used = state.tolist()
        if broken:
            raise ValueError(
                "the model's logits are not finite: its weights are damaged or diverged"
            )
        free, done = len(rows.alive) - n_alive, begun == n and n_alive == 0
        if in_step(model) and parallel.somewhere(not done) and done:
            steps.idle()
            continue
        if begun < n and free >= max(G, len(rows.alive) // 4):
            last = min(begun + free // G * G, n)
            own, logits, thinking = _read_prompts(
                model, prompts[begun // G : last // G], ask, cache
            )
            number, slots = torch.arange(begun, last, device=device), (~rows.alive).nonzero()[:, 0]
            origin = (number - begun) // G
            fresh = Rows.new(number, numbers, thinking[origin], True)
            steps.begin(slots[: len(number)], fresh, own, origin, logits)
            begun, drew = last, number
        elif done:
            break
        else:
            if begun == n:
                steps.shrink(n_alive, used)
            drew = steps.rows.number[steps.rows.alive]
            steps.run(used)
        if on_tokens:
            on_tokens(drew, steps.out.tokens[drew, steps.out.lengths[drew] - 1])
        if reply:
            answer_calls(steps.rows, steps.out, ask, reply)

    out = steps.out
    out.cause[(out.cause == EOS) & out.forced] = BUDGET
    ended, done = [ENDED[c] for c in out.cause[:n].tolist()], int(out.lengths[:n].max())
    tokens, logp, mask = (x[:n, :done].clone() for x in (out.tokens, out.logp, out.mask))
    lengths, begun = out.lengths[:n].clone(), out.begun[:n].clone()
    return Rollout(tokens, logp, mask, lengths, begun, ended, time.perf_counter() - start)
