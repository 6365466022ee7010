"""Several processes, one model: torchrun --nproc_per_node=N train_rl.py takes the steps of one.

The only importer of torch.distributed. Alone, in a process that torchrun has not started, every
function here gives back what it got, and nothing changes to the bit.

    every rank   has all problems, responses, rewards and batches, which are small
    each rank    answers its share of the prompts, and learns from its share of a slice's rows
    over ranks   a parameter, its gradient and its moments lie in parts (FSDP2); a layer's are
                 gathered while it computes, and gradients of the parts are summed; experts stay
                 where they are, and rows travel to them (expert parallel); with --sp n, n ranks in
                 a row have a part each of the tokens that they learn from (sequence parallel)
    answers      are drawn from a whole copy of the weights on every rank

    1. Processes     rank, size, first, by_first, no_bar, start, finish
    2. Shares        share, together, rows, totals, somewhere
    3. Sequences     Part, part, lightning, by_heads, by_tokens
    4. A model       shard, in_parts, own, held, exchange, whole, on_first, part_like, clip
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import os
import sys
from datetime import timedelta
from typing import NamedTuple

from cli import torch

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
    """Meet the other processes, of which sp in a row share tokens: the device of this one. Those
    but the first say nothing from here, except why they fail.
    """
    global _group, _sp
    if sp < 1 or size() % sp:
        raise ValueError(f"--sp {sp} does not divide the {size()} processes: start more, or fewer")
    if size() == 1:
        return device
    import torch.distributed as dist

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
    _group, _sp = dist.new_subgroups(sp)[0], sp
    return device


def finish():
    """Leave the others; all of them do."""
    if size() > 1:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


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
    import torch.distributed as dist

    lists = [None] * size()
    dist.all_gather_object(lists, things)
    return [x for own in lists for x in own]


def rows(tensors):
    """[tensors (n, ...)] -> each with the rows of all ranks, in their order; without gradients. Of
    ranks that share tokens each has zeros at others' tokens.
    """
    if size() == 1:
        return tensors

    def joined(x, *parts):
        groups = (parts[i : i + _sp] for i in range(0, len(parts), _sp))
        return torch.cat([torch.stack(group).sum(0) for group in groups]).to(x)

    ranks = together([[x.detach().cpu() for x in tensors]])
    return [joined(*parts) for parts in zip(tensors, *ranks)]


def totals(x, n=0):
    """The sum of a tensor (E,) over all ranks, without gradients, and that of a number."""
    if size() == 1:
        return x, n
    import torch.distributed as dist

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
    gaps: list  # tokens between every part's end and here; inf where its last sequence is another
    begun: int  # tokens here of the sequence in which this part begins


def part(cu_seqlens):
    """This rank's Part of a row of packed sequences, (N + 1,) their boundaries; None where a rank
    has rows to itself.
    """
    if _sp == 1:
        return None
    i, ends = rank() % _sp, cu_seqlens.tolist()
    cuts = _cuts(ends[-1])
    begin, end = cuts[i : i + 2]
    first, *others = (bisect.bisect_right(ends, x) - 1 for x in (begin, *(x - 1 for x in cuts[1:])))
    gaps = [begin - cuts[j + 1] if j < i and x == first else math.inf for j, x in enumerate(others)]
    begun = min(end, ends[first + 1]) - begin
    inside = cu_seqlens.clamp(begin, end) - begin
    sizes = [y - x for x, y in itertools.pairwise(cuts)]
    return Part(slice(begin, end), sizes, inside, others[i], gaps, begun)


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
    states = _exchange(mine, ones, ones, _group)  # (parts, H, K, V)
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


def shard(model, device):
    """Cut every parameter into parts, one for each rank, all from the weights of the first; parts
    of a model on the meta device have no weights yet.

    model.layers are gathered one after the other, the rest of the parameters stays gathered from
    model.hidden to the end of the backward pass. Experts, where the ranks divide their number, stay
    where they are: rows travel, see exchange. Gradients are summed, not averaged: losses have their
    normalisers over all ranks.
    """
    if size() == 1:
        return model
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import Shard, distribute_tensor

    c = model.config
    if 1 in c.attn_type_list and (c.num_attention_heads % _sp or c.num_key_value_heads % _sp):
        found = f"{c.num_attention_heads} heads, {c.num_key_value_heads} of keys and values"
        raise ValueError(f"--sp {_sp} must divide the heads of softmax layers, found {found}")
    for p in model.parameters():
        if not p.is_meta:
            dist.broadcast(p.data, 0)
    mesh, experts = init_device_mesh(torch.device(device).type, (size(),)), set()
    if model.config.num_local_experts % size() == 0:
        for layer in model.layers:
            moe = layer.block_sparse_moe
            for name in ("w1", "w3", "w2"):
                p = distribute_tensor(getattr(moe, name).data, mesh, [Shard(0)], src_data_rank=None)
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


def held(x):
    """Which rows of a tensor this rank holds, as a slice."""
    if not in_parts(x):
        return slice(None)
    each = -(-len(x) // size())  # the last ranks may have fewer, or none
    return slice(*(min(each * at, len(x)) for at in (rank(), rank() + 1)))


def exchange(rows, ends):
    """Send rows (n, D), sorted by expert, which end at ends (E,), to the ranks of their experts.

    Returns the rows that came (m, D), which of this rank's experts each is for (m,), and a function
    that sends rows of theirs back, to where they were. Differentiable.
    """
    import torch.distributed as dist

    send = functools.partial(_exchange, group=dist.group.WORLD)
    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    coming = torch.empty_like(counts)
    dist.all_to_all_single(coming, counts)
    leaving, arriving = (x.view(size(), -1).sum(1).tolist() for x in (counts, coming))
    number = torch.arange(len(ends) // size(), device=rows.device).repeat(size())
    expert = number.repeat_interleave(coming, output_size=sum(arriving))
    return send(rows, arriving, leaving), expert, lambda y: send(y, leaving, arriving)


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
    if not in_parts(p):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def clip(parameters, max_norm):
    """Clip gradients to a norm over all ranks; returns the norm before."""
    return float(whole(torch.nn.utils.clip_grad_norm_(parameters, max_norm)))
