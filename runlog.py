"""A run on disk: its folder, log, checkpoints, resume, samples and curves. It knows no flags, only
dicts and texts.

A run folder explains itself: run.json (settings, versions), log.csv (a row a step), families.csv,
dropped.csv, samples.txt, curves.png, summary.json, step-000040/ (published layout plus trainer.pt)
and `latest`, which names the newest. Every file is written beside its place and moved there, so a
reader never meets half of one.

    1. Columns            COLUMNS, DROPPED, FAMILIES
    2. Files              new_folder, write_file, read_log
    3. A run              Run: steps, log, save; reopen
    4. What is shown      summarize_drops, show_drops, finish, reference, draw_curves
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import platform
import shutil
import signal
import statistics
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

import parallel
from cli import checkpoint, read_json, read_text, torch, write_file, writing

try:
    import fcntl
except ImportError:  # not on Windows: nothing is locked there
    fcntl = None

# ============================================================================
# 1. Columns
# ============================================================================

TABLE = """
step
accuracy pass_k greedy                         # on held-out problems, empty between evaluations:
eval_fork_rate eval_length eval_guess_right    # see experience.evaluate
reward correct well_formed fork_rate length    # means over the step's rollouts; length in tokens
groups sampled_groups                          # prompts whose answers' values differ, of all
updates loss grad_norm lr entropy              # norm before clipping; nats per token
ratio_mean ratio_min ratio_max ess kl_k1 kl_k3 # see cispo.statistics: means over the updates, but
weight_clip_frac_high weight_clip_frac_low     #   extremes for ratio_min and ratio_max
ppo_would_drop_frac
prob_corr logp_gap logp_gap_mean               # training against rollout: largest, mean gap in nats
negative_early negative_late                   # share of sum |A| that is negative, in either half
                                               #   of the response allowed (report sec. 5)
window length_p99 perplexity moves crashes     # longest allowed, 99th percentile; of all sampled
                                               #   tokens; steps per problem; verifier crashed
router_loss busiest_expert over_capacity       # 2 = balanced; share of choices of the busiest, and
                                               #   beyond 1.25 times an even load
seconds rollout_s reward_s update_s eval_s     # of the step, and of its parts
"""
COLUMNS = [name for line in TABLE.splitlines() for name in line.partition("#")[0].split()]
DROPPED = ["step", "token", "rose", "count", "probability", "ratio"]  # before the updates; means
FAMILIES = "step part family responses correct reward forked calls length check_s".split()  # means,
#   but for responses and the seconds that judging took; part: rollouts, or held-out problems
MEASURED = ("accuracy", "pass_k", "greedy", "eval_fork_rate", "eval_length")  # at step 0 and last
TIMES = ("rollout_s", "reward_s", "update_s", "eval_s")

# ============================================================================
# 2. Files
# ============================================================================


def new_folder(out, name):
    """The folder of a new run: `out`, which must be new or empty, or the next runs/NAME-001."""
    if out:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out {folder} exists and is not empty; choose another name")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for number in itertools.count(1):
        folder = Path("runs") / f"{name}-{number:03d}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def read_log(path):
    """log.csv as one dict of numbers per step; what was not measured is absent."""
    try:
        rows = csv.DictReader(read_text(path).splitlines())
        return [{name: float(x) for name, x in row.items() if x} for row in rows]
    except (TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no log of a run: {error}") from None


def _until(path, columns, step, goes_on):
    """What a CSV file of a run held after a step, as text; ValueError names a bad line.

    goes_on(row, at): whether a row, texts by column, can follow one of step `at` (-1: the first);
    ValueError for no number. What comes later, half a line perhaps, is not looked at.
    """
    header, *lines = read_text(path).split("\n")
    if header.split(",") != columns:
        raise ValueError(f"{path} has another header than this version's; mend or remove it")
    kept, at = [header], -1
    for line in lines[:-1]:
        if columns == COLUMNS and at == step:
            break
        try:
            row = dict(zip(columns, next(csv.reader([line])), strict=True))
            if float(row["step"]) > step:
                break
            if not goes_on(row, at):
                raise ValueError
        except (ValueError, OverflowError, StopIteration, csv.Error):
            where, mend = f"line {len(kept) + 1} of {path}", "mend or remove it"
            raise ValueError(f"{where} does not go on from step {at}; {mend}") from None
        at = int(float(row["step"]))
        kept.append(line)
    if columns == COLUMNS and at != step:
        raise ValueError(f"{path} ends at step {at}, before {step}; mend or remove it")
    return "\n".join([*kept, ""])


def _log_goes_on(row, at):
    """One row a step, in numbers; step 0 is evaluated."""
    numbers = {name: float(x) for name, x in row.items() if x}
    return numbers["step"] == at + 1 and (at >= 0 or numbers.keys() >= {*MEASURED})


def _drops_go_on(row, at):
    """Any number of rows a step."""
    return _several_go_on(row, at, DROPPED[3:]) and row["rose"] in ("yes", "no")


def _families_go_on(row, at):
    return _several_go_on(row, at, FAMILIES[3:]) and row["part"] in ("rollouts", "held-out")


def _several_go_on(row, at, columns):
    step, count, *rest = (float(row[name]) for name in ("step", *columns))
    fine = step == int(step) >= max(at, 0) and count >= 1
    return fine and all(map(math.isfinite, (count, *rest)))


def _rounded(row):
    return {k: float(f"{x:.6g}") if isinstance(x, float) else x for k, x in row.items()}


def _append(path, columns, rows):
    """Add rows, dicts, to a CSV file."""
    with writing(path), open(path, "a", newline="") as file:
        how = dict(restval="", extrasaction="ignore", lineterminator="\n")
        csv.DictWriter(file, columns, **how).writerows(rows)


# ============================================================================
# 3. A run
# ============================================================================


class Run:
    """One run's folder while it trains. As a context it turns what ends a run into one clear line.

    step: the last one finished, -1 before the first. The first Ctrl-C or SIGTERM is a wish: the
    step is finished and saved first; the next one kills. The folder is this process's alone.
    """

    def __init__(self, folder, step=-1):
        self.folder, self.step, self.earlier = Path(folder), step, 0.0
        self.start, self.step_start = time.perf_counter(), None
        self.stopping, self.handlers = False, {}
        self.saved, self.save_s = -math.inf, 0.0  # when and how long
        self.lock = _lock(self.folder / ".lock") if parallel.first() else contextlib.nullcontext()

    @classmethod
    def new(cls, out, name):
        """The run of a new folder, see new_folder; of several processes the first makes it."""
        folder = []
        if parallel.first():
            try:
                folder = [new_folder(out, name)]
            except (ValueError, OSError) as error:
                folder = [error]
        [folder] = parallel.together(folder)
        if isinstance(folder, Exception):
            raise folder
        return cls(folder)

    @property
    def seconds(self):
        """Since the run began, over all its parts."""
        return self.earlier + time.perf_counter() - self.start

    @property
    def rested(self):
        """Whether a checkpoint now leaves nine tenths of the time to training, or is quick."""
        return self.save_s < 1 or time.perf_counter() - self.saved > 9 * self.save_s

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM)
            self.handlers = {n: signal.signal(n, self._ask) for n in signals}
        return self

    def _ask(self, number, frame):
        if self.stopping or self.step_start is None:  # asked twice, or still in the cold start
            raise KeyboardInterrupt
        self.stopping = True
        tqdm.write("stopping after this step (again: at once)")

    def __exit__(self, kind, error, trace):
        if parallel.first():
            self.lock.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt):
            again = f"go on with: python train_rl.py --resume {self.folder}"
            raise KeyboardInterrupt(f"stopped; {again}") from None
        if isinstance(error, (ValueError, OSError)):
            named = (self.folder / "latest").exists()
            last = checkpoint.checkpoint_dir(self.folder) if named else "none yet"
            where = f"stopped in step {self.step + 1}: {error}"
            raise ValueError(f"{where}; last good checkpoint: {last}") from error

    def steps(self, last):
        """The numbers of the steps to do, up to `last`; KeyboardInterrupt when asked to stop."""
        how = dict(desc="RL", unit="step", disable=parallel.no_bar())
        bar = tqdm(total=last, initial=max(self.step, 0), **how)
        with bar:
            while self.step < last:
                if parallel.somewhere(self.stopping):
                    raise KeyboardInterrupt
                self.step_start = time.perf_counter()
                yield self.step + 1
                self.step += 1
                bar.update(self.step > 0)

    @parallel.by_first
    def begin(self, samples):
        """The files that steps add to. samples: text."""
        write_file(self.folder / "samples.txt", f"after the cold start\n{samples}")
        write_file(self.folder / "log.csv", ",".join(COLUMNS) + "\n")
        write_file(self.folder / "dropped.csv", ",".join(DROPPED) + "\n")
        write_file(self.folder / "families.csv", ",".join(FAMILIES) + "\n")

    @parallel.by_first
    def describe(self, **facts):
        """Put facts into run.json, beside those that are there."""
        file = self.folder / "run.json"
        record = read_json(file) if file.exists() else {}
        write_file(file, json.dumps(record | facts, indent=2) + "\n")

    @parallel.by_first
    def log(self, row, drops=(), families=(), line=""):
        """A step's row for log.csv, rows of dropped.csv and families.csv, and the line to print."""
        row = row | {"seconds": time.perf_counter() - self.step_start}
        _append(self.folder / "dropped.csv", DROPPED, drops)
        step = {"step": row["step"]}
        _append(self.folder / "families.csv", FAMILIES, [step | _rounded(x) for x in families])
        _append(self.folder / "log.csv", COLUMNS, [_rounded(row)])
        tqdm.write(f"{line}  {row['seconds']:.1f} s")
        sys.stdout.flush()

    def save(self, model, optimizer, curriculum, step, files, keep=2):
        """Model (published layout), optimizer and curriculum as one directory, named by `latest`.
        files: a tokenizer's, see checkpoint.save_pretrained.

        Kept are the newest `keep` and the one after the cold start. Nothing else needs saving:
        every random draw has a seed of its own (experience.substream), whatever ran before.
        """
        began, name = time.perf_counter(), f"step-{step:06d}"
        state = {"step": step, "seconds": self.seconds}
        state |= {"optimizer": optimizer.state_dict(), "curriculum": curriculum.state_dict()}
        model, state = checkpoint.whole(model), parallel.on_first(state)
        if parallel.first():
            checkpoint.save_pretrained(model, self.folder / name, trainer_state=state, files=files)
            write_file(self.folder / "latest", name + "\n")
            for old in checkpoint.saved_steps(self.folder)[1:-keep]:
                shutil.rmtree(old)
        self.saved = time.perf_counter()
        self.save_s = self.saved - began


def machine(device):
    """What run.json says of where a run happened."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    where = {"device": str(device), "threads": torch.get_num_threads()}
    return where | {"versions": versions, "machine": platform.platform()}


def last_saved(folder):
    """Whether a run has a checkpoint; writes `latest` where a kill came before that."""
    saved, log = checkpoint.saved_steps(folder), Path(folder, "log.csv")
    begun = log.exists() and len(read_text(log).splitlines()) > 2  # more than step 0 (and header)
    if not saved and (begun or (Path(folder) / "latest").exists()):
        raise ValueError(f"{folder} has lost its checkpoints, step-000000 and so on; put them back")
    if saved and not (Path(folder) / "latest").exists():
        write_file(Path(folder) / "latest", saved[-1].name + "\n")
    return bool(saved)


def reopen(run, optimizer, curriculum, device, last_step):
    """Make a run's folder what it was at its newest checkpoint; load optimizer and curriculum.

    Cuts its CSV files back and removes newer checkpoints. Changes nothing when the checkpoint or
    any file that the run will need is damaged, or the checkpoint beyond last_step.
    """
    folder, newest = run.folder, checkpoint.checkpoint_dir(run.folder)
    step, seconds = checkpoint.load_trainer(newest, optimizer, curriculum, device)
    if step > last_step:
        need = f"give --steps {step} or more"
        raise ValueError(f"{newest} is already past --steps {last_step}; {need}")
    files = {"log.csv": (COLUMNS, _log_goes_on), "dropped.csv": (DROPPED, _drops_go_on)}
    files["families.csv"] = FAMILIES, _families_go_on
    cut = {name: _until(folder / name, x, step, goes_on) for name, (x, goes_on) in files.items()}
    read_text(folder / "samples.txt")
    parallel.together([])  # all have read
    if parallel.first():
        for newer in checkpoint.saved_steps(folder):
            if newer.name > newest.name:
                shutil.rmtree(newer)
        for name, text in cut.items():
            write_file(folder / name, text)
    run.step, run.earlier = step, seconds


def _lock(path):
    """An open file that no other process can open in this way; ValueError if one has."""
    file = open(path, "a+")  # a pipe of that name does not block
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"another process is writing to {path.parent}; wait for it") from None
    for draft in path.parent.glob(".*.writing*"):  # of a process that was killed
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink()
    return file


# ============================================================================
# 4. What is shown
# ============================================================================


def summarize_drops(drops, tokenizer, step):
    """[(token id, probability, ratio)] -> rows of dropped.csv, the token dropped most often first.

    rose: the token was wanted (A > 0) and had risen above the trust region; otherwise it was
    unwanted and below it.
    """
    groups = {}
    for token, probability, ratio in drops:
        groups.setdefault((token, ratio > 1), []).append((probability, ratio))
    rows = []
    for (token, rose), seen in sorted(groups.items(), key=lambda item: -len(item[1])):
        probability, ratio = (f"{statistics.fmean(x):.3g}" for x in zip(*seen))
        text = tokenizer.decode([token])
        text = f"<{token}>" if "\ufffd" in text else json.dumps(text)  # half of a character
        values = (step, text, "yes" if rose else "no", len(seen), probability, ratio)
        rows.append(dict(zip(DROPPED, values)))
    return rows


def show_drops(path, n=8):
    """The tokens of dropped.csv that were dropped most often over the whole run, as text."""
    groups = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            seen = [float(row[name]) for name in ("count", "probability", "ratio")]
            groups.setdefault((row["token"], row["rose"]), []).append(seen)
    totals = {key: sum(count for count, *_ in seen) for key, seen in groups.items()}
    text = "\ntokens that PPO's clip would have dropped most often (probability and ratio: means)\n"
    for key in sorted(groups, key=totals.get, reverse=True)[:n]:
        p, ratio = (sum(x[0] * x[i] for x in groups[key]) / totals[key] for i in (1, 2))
        why = "wanted, had risen" if key[1] == "yes" else "unwanted, had fallen"
        often = f"  {key[0]:<12} {totals[key]:6.0f} times"
        text += f"{often}  probability {p:.3f}  ratio {ratio:.2f}  {why}\n"
    return text if groups else text + "  none\n"


@parallel.by_first
def finish(run, samples, title, compare):
    """samples.txt, curves.png and summary.json of a finished run; prints and returns the summary.

    samples: text after the last step. compare: whether the run has the settings of the reference
    seeds.
    """
    folder, log = run.folder, read_log(run.folder / "log.csv")
    before = read_text(folder / "samples.txt").split("\nafter ")[0]
    after = f"\nafter {run.step} RL steps\n{samples}" + show_drops(folder / "dropped.csv")
    write_file(folder / "samples.txt", before + after)
    others = reference_logs() if compare else []
    families = list(csv.DictReader(read_text(folder / "families.csv").splitlines()))
    draw_curves(log, folder / "curves.png", title, others, families)
    record = read_json(folder / "run.json")
    spent = run.seconds
    summary = {"seed": record["flags"]["seed"], "steps": int(log[-1]["step"])}
    measured = [row for row in log if row.keys() >= {*MEASURED}]
    summary["seconds"] = round(spent, 1)
    if "cold_start" in record:
        summary["cold_start_steps"] = record["cold_start"]["steps"]
    for name in MEASURED:
        short = name.removeprefix("eval_")
        summary |= {f"{short}_start": measured[0][name], f"{short}_end": measured[-1][name]}
    parts = {part: sum(row.get(part, 0) for row in log) for part in TIMES}
    parts["other_s"] = spent - sum(parts.values())  # the cold start above all, and files
    summary |= {part: round(seconds, 1) for part, seconds in parts.items()}
    write_file(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    told = "held-out accuracy {accuracy_start:.3f} -> {accuracy_end:.3f}, fork rate "
    told += "{fork_rate_start:.2f} -> {fork_rate_end:.2f}, length {length_start:.1f} -> "
    told += "{length_end:.1f} tokens, {seconds:.0f} s\ntime: rollouts {rollout_s} s, rewards and "
    told += "batches {reward_s} s, updates {update_s} s, evaluations {eval_s} s, cold start and "
    print((told + "files {other_s} s").format(**summary))
    if others:
        print(reference(others))
    print(f"see {folder}/samples.txt and {folder}/curves.png")
    return summary


CURVES = {  # column on held-out problems: (the same in rollouts, label)
    "accuracy": ("correct", "held-out accuracy (pass@1)"),
    "eval_fork_rate": ("fork_rate", "fork rate: thinks first"),
    "eval_length": ("length", "response length, tokens"),
}


def reference_logs():
    """The logs of the reference seeds of the main job, from figures/."""
    files = sorted((Path(__file__).parent / "figures").glob("main-seed*.csv"))
    return [read_log(file) for file in files]


def reference(logs):
    """One line: where the reference seeds of the main job began and ended, to lay beside one's
    own.
    """

    def span(row, column):
        values = [log[row][column] for log in logs]
        return f"{min(values):.2f}..{max(values):.2f}"

    names = {"accuracy": "accuracy", "eval_fork_rate": "fork rate", "eval_length": "length"}
    told = (f"{name} {span(0, c)} -> {span(-1, c)}" for c, name in names.items())
    return f"reference, {len(logs)} seeds of ours: {', '.join(told)}"


def draw_curves(log, path, title, others=(), families=()):
    """Accuracy, fork rate and response length over RL steps: the report's Figure 4 in miniature.

    others: logs of reference seeds, whose range is drawn as a band. families: rows of families.csv;
    where they tell of several, the accuracy of each is drawn, too.
    """
    plt, own = pyplot(), {}
    for row in families:
        if row["part"] == "held-out":
            own.setdefault(row["family"], []).append((int(row["step"]), float(row["correct"])))
    n = 3 + (len(own) > 1)
    figure, axes = plt.subplots(1, n, figsize=(3.7 * n, 3.2), layout="constrained")
    for axis, (held_out, (rollout, label)) in zip(axes, CURVES.items()):
        if others:
            at = [row["step"] for row in others[0] if held_out in row]
            values = [[row[held_out] for row in other if held_out in row] for other in others]
            low, high = (list(map(f, zip(*values))) for f in (min, max))
            axis.fill_between(
                at, low, high, alpha=0.15, lw=0, color="gray", label="reference seeds"
            )
        for column, style, legend in ((rollout, "-", "rollouts"), (held_out, "o-", "held-out")):
            rows = [row for row in log if column in row]
            x, y = ([row[name] for row in rows] for name in ("step", column))
            axis.plot(x, y, style, ms=3, lw=1, label=legend)
        axis.set(xlabel="RL step", ylabel=label)
    axes[0].legend()
    if len(own) > 1:
        for family, points in own.items():
            axes[3].plot(*zip(*points), "o-", ms=3, lw=1, label=family)
        axes[3].set(xlabel="RL step", ylabel="held-out accuracy of each family")
        axes[3].legend(fontsize=7)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pyplot():
    """matplotlib without a screen; imported late, so that nothing waits for it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
