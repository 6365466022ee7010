"""What further GPUs bring: steps of RL, and one long sequence; run by bench.py.

    python bench.py scale    starts everything with 1, 2, 4 ... of this machine's GPUs

A step of RL is one of train_rl.py's own, read from its log: prompts and rows are divided. Forward
and backward, layers computed again, of one sequence, divided among all processes (--sp), and of
many, where rows travel to experts, an equal share of them in each process.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

import bench_gpu
import parallel
from cli import model as m1
from cli import pick_device, torch
from runlog import read_log
from studies.common import print_table, recorded

BEGIN = "--preset base --moves 80 --sft-steps 100 --fork-prior 0.9 --steps 0 --eval-problems 8"
STEPS = "--prompts 512 --group-size 16 --max-rows 4096 --micro-tokens 131072 --recompute --steps 4"
QUICK = {"BEGIN": "--task mod --moves 3 --sft-steps 60 --steps 0 --eval-problems 2"}
QUICK |= {"STEPS": "--prompts 8 --group-size 4 --steps 3"}
PASSES = [("base", 1, 2**18, False), ("small", 1, 2**20, False), ("base", 64, 2**12, True)]


def scale(flags):
    """Time and memory with 1, 2, 4 ... processes: scale.csv."""
    if "RANK" in os.environ:  # one of them
        return tell_passes(flags.quick)
    rows = recorded(flags, "scale", measure)
    columns = {"job": "{job}", "processes": "{processes:.0f}", "seconds": "{seconds:.3g}"}
    columns |= {"times as fast as one": "{speedup:.2f}", "GB of a process": "{peak_gb:.3g}"}
    print_table(rows, columns)


def measure(quick):
    """Rows of scale.csv."""
    n, rows = 2 if quick else torch.cuda.device_count(), []
    if n < 2:
        raise ValueError(f"this benchmark compares GPUs of one machine and needs 2, found {n}")
    begin, steps = QUICK.values() if quick else (BEGIN, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder, "start")
        run(1, f"train_rl.py {begin} --out {start}")
        for processes in (2**i for i in range(n.bit_length())):
            out = Path(folder, str(processes))
            run(processes, f"train_rl.py --init {start} {steps} --eval-problems 8 --out {out}")
            log = read_log(out / "log.csv")[2:]  # the first step compiles
            for part in ("rollout_s", "reward_s", "update_s", "seconds"):
                job = "a step of RL" if part == "seconds" else f"... {part[:-2]}"
                apart = [row.get("eval_s", 0) if part == "seconds" else 0 for row in log]
                seconds = median(row[part] - x for row, x in zip(log, apart))
                rows.append({"job": job, "processes": processes, "seconds": f"{seconds:.4g}"})
            again = "bench.py scale" + f" --quick --out {folder}" * quick
            said = run(processes, again).splitlines()
            rows += [json.loads(line) for line in said if line.startswith("{")]
            print(f"{processes} processes", flush=True)
    alone = {row["job"]: float(row["seconds"]) for row in rows if row["processes"] == 1}
    for row in rows:
        row["speedup"] = f"{alone[row['job']] / float(row['seconds']):.3f}"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    machine = {"gpu": gpu, "torch": torch.__version__}
    return [{"peak_gb": None} | row | machine for row in rows]


def run(processes, command):
    """What a command says, started by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc_per_node={processes}", *command.split()]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    if done.returncode:
        raise ValueError(f"{' '.join(command[1:])} ended with exit code {done.returncode}")
    return done.stdout


def tell_passes(quick):
    """Print rows: forward and backward of n sequences, of one a part in each process."""
    for preset, n, length, apart in [("tiny", 1, 2**10, False)] if quick else PASSES:
        sp = 1 if apart else parallel.size()
        device = parallel.start(pick_device("cpu" if quick else "cuda"), sp)
        bench_gpu.free() if device != "cpu" else None
        own = n * sp // parallel.size()  # sequences of which this process has tokens
        with torch.device(device):
            model = m1.MiniMaxM1(m1.M1Config.preset(preset))
            tokens = torch.randint(256, (1, own * length))
            ends = torch.arange(own + 1, dtype=torch.int32) * length
        model.compute, model.recompute = None if quick else torch.bfloat16, True
        model, part = parallel.shard(model, device, apart), parallel.part(ends)
        here = slice(None) if part is None else part.here
        seconds = []
        for _ in range(3):
            model.zero_grad()
            started = perf_counter()
            hidden, _ = model.hidden(tokens[:, here], cu_seqlens=ends, part=part)
            loss = model.target_logp(hidden, tokens.roll(-1)[:, here]).sum() / -(n * length)
            loss.backward()
            parallel.somewhere(float(loss.detach()) < 0)  # all have finished
            seconds.append(perf_counter() - started)
        peak = 0 if device == "cpu" else torch.cuda.max_memory_allocated() / 1e9
        job = f"{n} x {length:,} tokens, {preset}" + ", experts apart" * apart
        row = {"job": job, "processes": parallel.size()}
        row |= {"seconds": f"{median(seconds[1:]):.4g}"}
        row["peak_gb"] = f"{max(parallel.together([peak])):.4g}"
        print(json.dumps(row), flush=True)
    parallel.finish()
