"""Several processes, one model: torchrun --nproc_per_node=N train_rl.py takes the steps of one.

The only user of torch.distributed. A process that torchrun has not started is alone: every function
here gives back what it got, to the bit.

    every rank   has all problems, responses, rewards and batches, which are small, and a copy of
                 the weights to draw answers from: whole, but for experts that no GPU could hold
    each rank    answers its share of the prompts, and learns from its share of a slice's rows
    over ranks   parameters, gradients and moments lie in parts: a layer's are gathered while it
                 computes (FSDP2), but large experts stay where they are, and rows travel to them;
                 with --sp n n ranks in a row have a part each of the tokens of their rows

    1. Processes     rank, size, first, by_first, no_bar, start, finish
    2. Shares        share, together, rows, totals, somewhere
    3. Sequences     Part, part, lightning, by_heads, by_tokens
    4. A model       shard, in_parts, own, by_expert, held, exchange, arrived, whole, on_first,
                     part_like
"""

from __future__ import annotations

import atexit
import bisect
import functools
import math
import os
import sys
from datetime import timedelta
from typing import NamedTuple

from cli import Late, torch

dist, dtensor = Late("torch.distributed"), Late("torch.distributed.tensor")

# ============================================================================
# 1. Processes
# ============================================================================


def rank():
    """The number of this process; 0 alone."""
    return int(os.environ.get("RANK", 0))


def size():
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


def first():
    """Whether this process writes files and prints."""
    return rank() == 0


def by_first(function):
    """Decorator: the first process does this; others do nothing, and get None."""
    return functools.wraps(function)(lambda *x, **how: function(*x, **how) if first() else None)


def no_bar():
    """tqdm's `disable`: True for all but the first process, whose bar needs a terminal (None)."""
    return None if first() else True


_group, _sp = None, 1  # the ranks that share tokens with this one, and how many they are


def sp():
    """How many ranks in a row share the tokens of their rows."""
    return _sp


def start(device, sp=1):
    """Join the other processes, of which sp in a row share tokens; returns this one's device. All
    but the first go silent, except in errors.
    """
    global _group, _sp
    if sp < 1 or size() % sp:
        raise ValueError(f"--sp {sp} does not divide the {size()} processes: start more, or fewer")
    if size() == 1:
        return device
    if not first():
        sys.stdout = open(os.devnull, "w")
    if device == "cuda":
        here = int(os.environ.get("LOCAL_RANK", 0))
        if here >= torch.cuda.device_count():
            found = f"{torch.cuda.device_count()} GPUs here"
            raise ValueError(f"process {here + 1} of this machine needs a GPU of its own, {found}")
        device = f"cuda:{here}"
        torch.cuda.set_device(here)
    if not dist.is_initialized():
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # for the slowest answer
    if len(set(together([sp]))) > 1:
        raise ValueError("the processes were started with different numbers for --sp")
    _group, _sp = dist.new_subgroups(sp)[0], sp
    return device


def finish():
    """Leave the others; all of them do."""
    if size() > 1 and dist.is_initialized():
        dist.destroy_process_group()
        atexit.register(_leave)


def _leave():
    """End at once: in PyTorch's own end what is left of a group aborts now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(hasattr(sys, "last_value")))  # 1 after an error


# ============================================================================
# 2. Shares
# ============================================================================


def share(n, begin=0, sp=1):
    """This rank's share of n things in a row from `begin` on, as a slice; sizes differ by 1. sp
    ranks in a row have the same.
    """
    i, of = rank() // sp, size() // sp
    return slice(begin + n * i // of, begin + n * (i + 1) // of)


def together(things):
    """The lists of all ranks as one, in the order of ranks."""
    if size() == 1:
        return things
    lists = [None] * size()
    dist.all_gather_object(lists, things)
    return [x for own in lists for x in own]


def rows(tensors):
    """[tensors (n, ...)] -> each with the rows of all ranks, in their order; without gradients. Of
    ranks that share tokens each has zeros at others' tokens.
    """
    if size() == 1:
        return tensors
    ranks = together([[x.detach().cpu() for x in tensors]])
    groups = [ranks[i : i + _sp] for i in range(0, size(), _sp)]
    groups = [[sum(parts) for parts in zip(*group)] for group in groups]
    return [torch.cat(parts).to(x) for x, *parts in zip(tensors, *groups)]


def totals(x, n=0):
    """The sum of a tensor (E,) over all ranks, without gradients, and that of a number."""
    if size() == 1:
        return x, n
    both = torch.cat([x.detach(), x.new_tensor([n])])
    dist.all_reduce(both)
    return both[:-1], both[-1]


def somewhere(flag):
    """Whether a flag is set on some rank."""
    return any(together([flag]))


# ============================================================================
# 3. Sequences                                                   (MiniMax-01 sec. 3.2, LASP+)
# ============================================================================
#
# Ranks of a group have consecutive parts of one row of packed sequences. In a lightning layer each
# sends one state (heads, K, V), whatever the length; in a softmax layer tokens travel, so that a
# rank has all tokens of some heads: a causal layer would give the last part most of the work.


class Part(NamedTuple):
    """A rank's part of a packed row of N sequences."""

    here: slice  # of the row
    sizes: list  # tokens of every rank's part
    cu_seqlens: torch.Tensor  # (N + 1,) int32: the sequences inside of this part, some empty
    last: int  # the sequence in which this part ends
    gaps: list  # tokens from every earlier part's end to here; inf: it ends in another sequence
    begun: int  # tokens here of the sequence in which this part begins


def part(cu_seqlens):
    """This rank's Part of a row of packed sequences, (N + 1,) their boundaries; None where a rank
    has rows to itself.
    """
    if _sp == 1:
        return None
    i, ends = rank() % _sp, cu_seqlens.tolist()
    begin, *cuts = _cuts(ends[-1])
    sizes = [cut - before for before, cut in zip((begin, *cuts), cuts)]
    begin, end = cuts[i] - sizes[i], cuts[i]
    first = bisect.bisect(ends, begin)  # the sequence of the first token here, counted from 1
    last = [bisect.bisect_left(ends, cut) for cut in cuts]  # ... of every part's last token
    gaps = [begin - cut if cut <= begin and x == first else math.inf for cut, x in zip(cuts, last)]
    inside = cu_seqlens.clamp(begin, end) - begin
    return Part(slice(begin, end), sizes, inside, last[i] - 1, gaps, min(end, ends[first]) - begin)


def _cuts(n):
    return [n * j // _sp for j in range(_sp + 1)]


def own_tokens(mask):
    """Which of a batch's real tokens (N, L) this rank has, bool: those of its Part of the row."""
    if _sp == 1:
        return mask
    number, i = mask.flatten().cumsum(0).view_as(mask), rank() % _sp
    begin, end = _cuts(int(mask.sum()))[i : i + 2]
    return mask & (begin < number) & (number <= end)


def _exchange(x, arriving, leaving, group):
    """Rows (n, ...) to the ranks of a group, so many to and from each. Differentiable."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    return all_to_all_single_autograd(x.contiguous(), arriving, leaving, group)


def lightning(q, k, v, slope, part):
    """lightning_attention's o over the whole row, of this part's tokens: q, k, v (1, T, H, K).

    Each part begins from an empty state. What is older is a sum of earlier parts' last states, each
    decayed by the tokens between, and adds lam^t q_t S to the first tokens here.
    """
    from lightning_attn import lightning_attention

    o, last = lightning_attention(q, k, v, slope, cu_seqlens=part.cu_seqlens)
    mine, ones, rate = last[part.last].expand(_sp, -1, -1, -1), [1] * _sp, slope.double()
    states = _exchange(mine, ones, ones, _group)  # (parts, H, K, V): one of each, gathered by all
    weight = torch.exp(-rate * rate.new_tensor(part.gaps)[:, None]).to(states.dtype)  # (parts, H)
    S = torch.einsum("ph,phkv->hkv", weight, states)
    t = torch.arange(1, part.begun + 1, device=q.device)
    fade = torch.exp(-t[:, None] * rate).to(q.dtype)[..., None]  # (t, H, 1)
    older = torch.einsum("thk,hkv->thv", q[0, : part.begun] * fade, S.to(q.dtype))
    o[:, : part.begun] += older
    return o


def by_heads(x, part):
    """Tokens of this part, all heads (1, T, H, K) -> the whole row, a share of the heads."""
    if part is None:
        return x
    heads = x[0].unflatten(1, (_sp, -1)).transpose(0, 1).flatten(0, 1)  # (group T, H / group, K)
    return _exchange(heads, part.sizes, [x.shape[1]] * _sp, _group)[None]


def by_tokens(x, part):
    """The way back."""
    if part is None:
        return x
    n = part.here.stop - part.here.start
    heads = _exchange(x[0], [n] * _sp, part.sizes, _group).unflatten(0, (_sp, n))
    return heads.transpose(0, 1).flatten(1, 2)[None]


# ============================================================================
# 4. A model
# ============================================================================


APART = 2**30  # bytes of a layer's experts: from here on rows travel to them, not they to rows


def shard(model, device, apart=None):
    """Cut every parameter into parts, one for each rank, all from the weights of the first; parts
    of a model on the meta device have no weights yet.

    model.layers are gathered one after the other, the rest of the parameters stays gathered from
    model.hidden to the end of the backward pass. Where a layer's experts are large (see APART, or
    say so with `apart`) and the ranks divide their number, they stay where they are: rows travel,
    see exchange. Gradients are summed, not averaged: losses have their normalisers over all ranks.
    """
    if size() == 1:
        return model
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    c = model.config
    if 1 in c.attn_type_list and (c.num_attention_heads % _sp or c.num_key_value_heads % _sp):
        found = f"{c.num_attention_heads} heads, {c.num_key_value_heads} of keys and values"
        raise ValueError(f"--sp {_sp} must divide the heads of softmax layers, found {found}")
    for p in model.parameters():
        if not p.is_meta:
            dist.broadcast(p.data, 0)
    mesh, experts = dist.init_device_mesh(torch.device(device).type, (size(),)), set()
    if apart is None:
        apart = 3 * model.layers[0].block_sparse_moe.w1.nbytes >= APART
    if apart and c.num_local_experts % size() == 0:
        for moe in (layer.block_sparse_moe for layer in model.layers):
            for name in ("w1", "w3", "w2"):
                p = _distribute(getattr(moe, name).data, mesh, [dtensor.Shard(0)])
                setattr(moe, name, torch.nn.Parameter(p))
                experts.add(getattr(moe, name))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, ignored_params=experts)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    register_fsdp_forward_method(model, "hidden")
    return model


def in_parts(x):
    """Whether a tensor is one that lies in parts."""
    return hasattr(x, "full_tensor")


def own(x):
    """What this rank holds of a tensor that lies in parts, for a product with it."""
    return x.to_local(grad_placements=x.placements) if in_parts(x) else x


def by_expert(w):
    """Whether the matrices w (E, ., .) of experts lie in parts of whole ones, see shard."""
    return in_parts(w) and len(w) % size() == 0


def held(x):
    """Which rows of a tensor this rank holds, as a slice."""
    if not in_parts(x):
        return slice(None)
    each = -(-len(x) // size())  # the last ranks may have fewer, or none
    return slice(*(min(each * at, len(x)) for at in (rank(), rank() + 1)))


def exchange(x, ends):
    """Send rows x (n, D), sorted by expert, which end at ends (E,), to the ranks of their experts.

    Returns the rows that came (m, D), which of this rank's experts each is for (m,), and a function
    that sends m rows back to where those came from. Differentiable.
    """
    send = functools.partial(_exchange, group=dist.group.WORLD)
    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    coming = torch.empty_like(counts)
    dist.all_to_all_single(coming, counts)
    leaving, arriving = (n.view(size(), -1).sum(1).tolist() for n in (counts, coming))
    number = torch.arange(len(ends) // size(), device=x.device).repeat(size())
    expert = number.repeat_interleave(coming, output_size=sum(arriving))
    return send(x, arriving, leaving), expert, lambda y: send(y, leaving, arriving)


def arrived(x):
    """A tensor that may still be on its way, for a kernel of ours; PyTorch's own wait for it."""
    return x.trigger_wait() if hasattr(x, "trigger_wait") else x


def whole(x):
    """A tensor, gathered if it lies in parts; all ranks ask for it."""
    return x.full_tensor() if in_parts(x) else x


def on_first(x):
    """A tensor that lies in parts, or dicts and lists of some, whole on the CPU of the first rank;
    all ranks ask for it. One tensor at a time is whole elsewhere.
    """
    if isinstance(x, dict):
        return {name: on_first(part) for name, part in x.items()}
    if isinstance(x, list):
        return [on_first(part) for part in x]
    if not in_parts(x):
        return x
    x = whole(x.detach())
    return x.cpu() if first() else None


def part_like(x, p):
    """This rank's part of a whole tensor, cut as p is, on p's device."""
    return _distribute(x.to(p.device), p.device_mesh, p.placements) if in_parts(p) else x


def _distribute(x, mesh, placements):  # every rank has all of x: nothing is sent
    return dtensor.distribute_tensor(x, mesh, placements, src_data_rank=None)
