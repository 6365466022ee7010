"""The plan's arithmetic beside real steps of train_rl.py's parts; run by bench.py.

    python bench.py plan-check                               one process
    torchrun --nproc_per_node=2 bench.py plan-check          two

Memory in use and bytes that collectives bring, of a model on this machine's GPUs, or of `tiny` on
its CPU, where nobody counts the allocator's peak. What processes do not divide evenly, FSDP2 fills
up: with 3 of them more travels than the arithmetic says.
"""

import bench_gpu
import engine
import experience
import parallel
import train_rl
from bench_plan import assume, memory, peaks, renewal, traffic
from cli import model as m1
from cli import pick_device, torch
from studies.common import print_table, recorded

HERE = {"sequence_parallel": 1, "rollout_experts": 1, "rollout_heads": 1, "gathered": 4}
HALF = bench_gpu.TRAINED | {"num_hidden_layers": 8}  # 2.7 B parameters


def check(flags):
    """Memory and traffic, predicted and measured: plan-check-N.csv, N processes."""
    rows = []
    if not flags.redraw:
        device, models = parallel.start(pick_device("auto")), {"tiny": m1.M1Config.preset("tiny")}
        if large := device != "cpu" and not flags.quick:
            models = {"base": m1.M1Config.preset("base"), "2.7 B": m1.M1Config(**HALF)}
        for name, config in models.items():
            for recompute in (0, 1):
                row = {"model": name, "recompute": recompute}
                found = measure(config, 2**14 if large else 2**8, recompute, device)
                rows += [row | own for own in found]
    parallel.by_first(tell)(flags, rows)
    parallel.finish()


def tell(flags, rows):
    """Print a table, and what is more than 15 % off."""
    rows = recorded(flags, f"plan-check-{parallel.size()}", lambda _: rows)
    columns = ("model", "recompute", "item", "predicted_mb", "measured_mb", "ratio")
    print_table(rows, {x: f"{{{x}}}" for x in columns})
    off = [row["item"] for row in rows if abs(row["ratio"] - 1) > 0.15]
    print("{processes:.0f} processes, {device}, torch {torch}:".format(**rows[0]), end=" ")
    print(f"more than 15 % off: {', '.join(off)}" if off else "all within 15 %")


def measure(config, n_tokens, recompute, device):
    """Rows of what a model holds and receives in its second RL step of one update on n_tokens: the
    mean of all processes, but the highest peak.
    """
    n, cuda = parallel.size(), device != "cpu"
    if cuda:
        bench_gpu.free()
    with torch.device(device):
        torch.manual_seed(parallel.rank())
        model = parallel.shard(m1.MiniMaxM1(config), device, apart=True)
        tokens = torch.randint(0, config.vocab_size, (8, n_tokens // 8 + 1))
    model.compute, model.recompute = torch.bfloat16 if cuda else None, bool(recompute)
    optimizer, real = train_rl.make_optimizer(model, 1e-6), torch.ones_like(tokens).bool()
    batch = experience.Batch(tokens, real, real[:, 1:])

    def step():
        optimizer.zero_grad()
        copy = engine.rollout_weights(model)
        with torch.no_grad():
            experience.trained_logp(model, batch)
        logp, _, aux = experience.trained_logp(model, batch)
        (config.router_aux_loss_coef * aux.router_loss - logp.mean()).backward()
        train_rl.clip(model, 1.0)
        optimizer.step()
        return [] if copy is model else list(copy.parameters())

    step()
    if cuda:
        bench_gpu.free()  # the peak counts from here
    with counter() as came:
        held = step()
    a = assume(**HERE, gpus=n, tokens=n_tokens, recompute=recompute, copy_stays=len(held) > 0)
    a.expert_parallel = n if config.num_local_experts % n == 0 else 1
    a.compute = model.dtype.itemsize
    for p in model.parameters():
        held += [p, p.grad, *(x for x in optimizer.state[p].values() if x.ndim)]
    lasting = ("weights", "AdamW's moments", "copy of the weights for rollouts", "gradients")
    predicted = {"weights, moments, copy, gradients": sum(memory(config, a)[x][0] for x in lasting)}
    measured = {"weights, moments, copy, gradients": sum(parallel.own(x).nbytes for x in held)}
    if cuda:
        predicted["allocator's peak"] = peaks(config, a, 1)[0]
        measured["allocator's peak"] = torch.cuda.max_memory_allocated()
    if n > 1:
        measured |= came
        predicted |= dict.fromkeys(came, 0) | {"all-gather": sum(renewal(config, a))}
        for backward in (0, 1):
            for (_, by), (layers, *links) in traffic(config, a, backward).items():
                predicted[by] += layers * sum(links)
    for item, expected in predicted.items():
        if not expected:
            continue  # rows travel nowhere where the processes do not divide the experts
        every = parallel.together([measured[item]])
        found = max(every) if "peak" in item else sum(every) / n
        row = {"item": item, "predicted_mb": f"{expected / 1e6:.5g}"}
        row |= {"measured_mb": f"{found / 1e6:.5g}", "ratio": f"{found / expected:.3f}"}
        row |= {"processes": n, "torch": torch.__version__}
        yield row | {"device": torch.cuda.get_device_name() if cuda else "CPU"}


def counter():
    """A context: {collective: bytes that come to this process from others}."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    came = {"all-gather": 0, "reduce-scatter": 0, "all-to-all": 0}

    class Counter(TorchDispatchMode):
        def __enter__(self):
            super().__enter__()
            return came

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if any(hasattr(kind, "full_tensor") for kind in types):
                return NotImplemented  # it lies in parts, on which it calls operators itself
            out, name = op(*args, **kwargs or {}), str(op).replace("_", "")
            if not name.startswith("c10d"):
                return out
            sizes = [x.nbytes for x in tree_leaves((args, out)) if torch.is_tensor(x)]
            if "gather" in name:
                came["all-gather"] += max(sizes) - min(sizes)
            elif "reducescatter" in name:
                came["reduce-scatter"] += max(sizes) - min(sizes)
            elif "alltoallsingle" in name:  # args: rows, how many come from each process, ...
                n_rows = sum(args[1]) - args[1][parallel.rank()]
                came["all-to-all"] += n_rows * args[0].shape[1] * args[0].itemsize
            return out

    return Counter()
