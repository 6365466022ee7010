"""Proof of the studies: their arithmetic, and that every number written is what their CSVs say."""

import contextlib
import dataclasses
import functools
import importlib
import io
import itertools
import os
import random
import re
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # here and in child processes
sys.path.insert(0, str(Path(__file__).parent.parent))  # before studies/, which has a judge.py too

import numpy as np
import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks when lightning_attn defines its kernels

import cispo
import engine
import experience
import model as m1
import runlog
import tasks
import train_rl
from checkpoint import load_pretrained
from cli import flat
from curriculum import Curriculum, Growth, Mix
from studies import adam, algos, balance, budget, common, compare, forks, precision, recall, windows
from studies import judge as judge_study
from studies import main as main_job
from tokenizer import Tokenizer

HERE = Path(__file__).parent
FIGURES = HERE.parent / "figures"
README = " ".join((HERE / "README.md").read_text().split())
TOP = (HERE.parent / "README.md").read_text()
STUDIES = ["algos", "algos --full", "control", "eps", "eps --fast", "precision", "adam"]
STUDIES += ["balance", "windows", "hybrid", "judge", "recall --device cpu"]


def committed(name):
    return common.read_csv(FIGURES / f"{name}.csv")


@functools.cache
def told(study):
    """What a study prints when it is drawn again from the committed CSV files."""
    name, *more = study.split()
    main, said = importlib.import_module(f"studies.{name}").main, io.StringIO()
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(said):
        for file in FIGURES.glob("*.csv"):
            shutil.copy(file, out)
        main(["--redraw", "--out", out, *more])
        assert all(file.stat().st_size > 5000 for file in Path(out).glob("*.png"))
    return said.getvalue()


def test_recall_asks_for_every_digit_once_as_it_stands_in_the_text(tmp_path, capsys):
    for row, wanted in zip(*recall.texts(20, 120, "cpu")):
        text, asked = bytes(row.tolist()).decode(), "".join(map(chr, row[wanted].tolist()))
        story, questions = text[:96], re.findall("([!?])([A-D])(\\d)", text[96:])
        seen = {name: re.findall(rf"{name}(\d)", story) for name in "ABCD"}
        assert len({(kind, name) for kind, name, _ in questions}) == 8
        assert [seen[name]["!?".index(kind)] for kind, name, _ in questions] == list(asked)
    recall.main(f"--quick --device cpu --out {tmp_path}".split())
    rows = common.read_csv(tmp_path / "recall-tiny.csv")
    assert {row["softmax_every"] for row in rows} == {0, 1, 8} and (
        tmp_path / "recall-tiny.png"
    ).exists()
    assert "7 : 1 (M1)" in capsys.readouterr().out


def test_a_study_at_base_writes_its_own_csv_where_other_seeds_keep_their_rows(
    tmp_path, monkeypatch, capsys
):
    in_turn = mock.Mock(side_effect=one_after_another)
    monkeypatch.setattr(common, "in_processes", in_turn)
    monkeypatch.setattr(common, "BASE", {"preset": "tiny", "moves": 3, "steps": 1})
    plan = common.Study("study", "title", {"a": {}, "b": {"lr": 1e-3}})
    how = {"out": str(tmp_path), "quick": True, "preset": "base"}
    for seed in (1, 0, 1):
        plan.show(common.Comparison(seeds=str(seed), **how))
    rows = common.by(common.read_csv(tmp_path / "study-base.csv"), "setting", "seed")
    assert [*rows] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert all([row["step"] for row in log] == [0, 1] for log in rows.values())
    assert all(log[1]["seconds"] > 0 for log in rows.values()) and in_turn.call_count == 6
    assert (
        tmp_path / "study-base.png"
    ).exists() and "median over 2 seeds" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--seeds must be numbers such as 0,1, found '0,x'"):
        common.Comparison(seeds="0,x")


# ---- what is written is what the committed CSVs say


@pytest.mark.parametrize("study", STUDIES)
def test_the_intervals_of_the_claim_table_are_those_that_its_commands_print(study):
    lines = (HERE / "README.md").read_text().splitlines()
    claims = "".join(line.split("|")[-2] for line in lines if f"| `studies.{study}` |" in line)
    intervals = re.findall(r"[-\d.e]+ \[[^]]+\](?!\()", claims)
    assert not [x for x in intervals if x not in told(study)]
    if study != "precision":
        assert intervals
    else:
        (a, b), (c, d) = re.findall(r"mean (\S+), at worst in a step (\S+)", told(study))
        assert f"{a} (fp32) and {c} (bf16), at worst in a step by {b} and {d}" in README


def test_the_rule_for_when_cispo_helps_is_what_the_map_prints():
    said, rows = told("algos --full"), committed("algos-map")
    rule = r"over dapo's they follow .* correlation -(\S+); (.*) below 2 %, (.*) from 10 % on"
    fit, few, many = re.search(rule, said).groups()
    assert f"less than 2 % of the tokens, CISPO takes {few} of DAPO's steps, from 10 % on" in README
    assert f"from 10 % on {many} (correlation −{fit} over the settings" in README
    text = r"steps to (\w+) \S+ over (\w+)'s: lowest (\S+) where both .* more, (\S+) elsewhere"
    lowest = {(goal, other): parts for goal, other, *parts in re.findall(text, said)}
    a, b = (lowest[goal, "dapo"][0] for goal in ("fork_rate", "accuracy"))
    assert f"accuracy or more: {a} to 50 % forks, {b} to 70 % accuracy (beside DAPO)" in README
    alike = min(float(x) for goal in common.THRESHOLDS for x in lowest[goal, "reinforce"])
    assert f"takes the same steps (lowest median ratio {alike})" in README
    runs = common.by(rows, "fork_prior", "updates_per_rollout", "lr", "algo")
    ends = [[r["final"] for r in runs[0.01, 16, 8e-4, a]] for a in ("cispo", "reinforce", "dapo")]
    text = "CISPO's five runs end at {}, REINFORCE's at {}, DAPO's at {}."
    assert text.format(*(f"{min(x):.2f} to {max(x):.2f}" for x in ends)) in README
    assert f"{len(rows)} runs" in README


def test_the_table_of_the_main_job_is_that_of_the_committed_logs_and_all_seeds_learn():
    rows = runlog.read_log(FIGURES / "main.csv")
    assert [row["seed"] for row in rows] == list(main_job.SEEDS)
    for row in rows:
        log = runlog.read_log(FIGURES / f"main-seed{row['seed']:.0f}.csv")
        start, end = log[0]["accuracy"], log[-1]["accuracy"]
        assert end >= 0.80 and end - start >= 0.50
        assert (row["accuracy_start"], row["accuracy_end"]) == (start, pytest.approx(end, abs=1e-6))
        crossing = range(1, int(common.steps_to(log, "fork_rate")) + 2)
        assert max(log[t].get("ppo_would_drop_frac", 0) for t in crossing) < 0.012  # README's word

    def span(name, form):
        return " to ".join(form.format(end(row[name] for row in rows)) for end in (min, max))

    for end in ("start", "end"):
        cells = f"{span(f'accuracy_{end}', '{:.3f}')} | {span(f'fork_rate_{end}', '{:.2f}')} | "
        assert f"{cells}{span(f'length_{end}', '{:.1f}')} tokens |" in TOP
    assert f"| {span('cold_start_steps', '{:.0f}')} steps |" in TOP
    assert f"| {span('seconds', '{:.0f}')} s |" in TOP


def test_single_numbers_of_the_claim_table_are_those_of_the_committed_csv_files():
    sizes = committed("adam-gradients")
    below = sum(row["share"] for row in sizes if row.get("exponent", 0) < -8)
    cosine = np.median([row["cosine"] for row in sizes if "cosine" in row])
    said = [f"{100 * below:.1f} % of a tiny model's", f"median cosine {cosine:.2f}"]
    fork = common.by(committed("forks"), "algo", "position")["dapo", 0]
    ratio = next(row["ratio"] for row in fork if row["update"] == row["turn"] - 1)
    said.append(f"when update {fork[0]['turn']:.0f} trains on this answer")
    said.append(f"made the fork likelier by x {ratio:.2f} under DAPO")
    third = common.by(committed("forks-unplanted"), "algo", "position")
    dapo, cispo = (third[algo, 2][int(third[algo, 2][0]["turn"]) - 1] for algo in ("dapo", "cispo"))
    text = (
        "of probability {probability:.3f}, made likelier by x {ratio:.2f} under DAPO when its own"
    )
    said.append(text.format(**dapo))
    said.append(f"update comes, x {cispo['ratio']:.2f} under CISPO")
    curves = common.by(committed("budget"), "window", "budget")
    ends = [curves[w, b] for w in (12, 8) for b in (1, 10)]
    ends = [np.median([row["accuracy"] for row in rows]) for rows in ends]
    text = "accuracy {:.3f} → {:.3f} once a run's window has grown to 12 tokens, {:.3f} → {:.3f}"
    said.append(text.format(*ends))
    logs = common.by(committed("eps-fast"), "setting", "seed")
    capped = [common.mean(logs["cap 5", seed], "weight_clip_frac_high") for seed in common.SEEDS]
    said.append(f"a cap of 5 acts on {100 * np.median(capped):.2f} % of tokens")
    layers = common.by(committed("hybrid"), "task", "softmax_every", "pairs")
    learnt = [sum(r["accuracy"] >= 0.9 for r in layers["far", n, 2]) for n in (0, 8, 4, 2, 1)]
    assert learnt == [2, 2, 2, 2, 5]
    said.append("32 characters later 2 of 5 seeds")
    assert not [line for line in said if line not in README]


def test_the_papers_index_names_functions_and_tests_that_exist():
    text = (HERE / "PAPER.md").read_text()
    named = re.findall(r"`(\w+)\.py::(\w+)(?:\.(\w+))?`", text)
    assert len(named) >= 50
    for file, name, attribute in named:
        places = (HERE.parent / f"{file}.py", HERE / f"{file}.py")
        source = next(path for path in places if path.exists()).read_text()
        assert re.search(rf"^(def |class )?{name}\b", source, re.M), f"{file}::{name}"
        assert not attribute or re.search(rf"    def {attribute}\b|^    \w+ = ", source, re.M)
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text + (HERE / "README.md").read_text()):
        assert (HERE / path).exists(), path


# ---- arithmetic


def test_a_study_measures_steps_areas_and_intervals_as_stated():
    curve = ((0, 0.0), (2, 0.4), (4, 0.8), (6, 0.6))
    run = [{"step": step, "accuracy": x} for step, x in curve] + [{"step": 7}]
    for threshold, steps in {0.6: 3, 0.4: 2, 0.0: 1, 0.9: 7}.items():  # 7: never
        with mock.patch.dict(common.THRESHOLDS, accuracy=threshold):
            assert common.steps_to(run, "accuracy") == pytest.approx(steps)
    assert common.area(run, "accuracy") == pytest.approx((0.4 + 1.2 + 1.4) / 6)
    assert common.last(run, "accuracy") == 0.6
    median, low, high = common.bootstrap([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (median, low) == (3.0, 1.0) and high in (4.0, 100.0)
    assert common.bootstrap([5.0] * 5) == (5.0, 5.0, 5.0)


def test_what_a_setting_changes_is_told_seed_by_seed_beside_the_first_or_the_one_named():
    def runs(*ends):
        return [[{"step": 0, "accuracy": 0.0}, {"step": 2, "accuracy": end}] for end in ends]

    logs = {"a": runs(0.5, 0.6, 0.7), "b": runs(0.6, 0.7, 0.8)}
    logs |= {"c": runs(0.6, 0.5, 0.7), "d": runs(0.5, 0.4, 0.6)}
    b, c, d = common.compare(logs, {"d": "c"})
    end = "+0.100 [+0.100, +0.100], all seeds agree."
    area = "area under accuracy +0.050 [+0.050, +0.050], all seeds agree"
    assert b == f"b beside a: {area}; final accuracy {end}"
    assert c.startswith("c beside a: ") and c.count("seeds disagree") == 2
    assert d.startswith("d beside c: ") and d.endswith(end.replace("+", "-"))


def test_the_map_of_the_regime_divides_cispos_steps_by_the_others_seed_by_seed():
    runs = common.by(committed("algos-map"), "fork_prior", "updates_per_rollout", "lr", "algo")
    cell = ["0.01", "16", "0.0002"]
    row = next(x for x in told("algos --full").splitlines() if x.split()[:3] == cell)
    for column, other in itertools.product(common.THRESHOLDS, algos.OTHERS):
        pairs = zip(*(runs[0.01, 16, 2e-4, algo] for algo in ("cispo", other)))
        ratios = [a[f"steps_{column}"] / b[f"steps_{column}"] for a, b in pairs]
        assert common.interval(ratios) in row
    areas = np.array([(9, 0, 2), (1, 1, 3)])  # of two learning rates
    assert algos.at_best(areas) == [1, 0, 0]  # by the other seeds; by all the second would win
    one = [{"step": s, "accuracy": s / 10, "fork_rate": s / 10} for s in range(11)]
    one[3]["ppo_would_drop_frac"], one[9]["ppo_would_drop_frac"] = 0.2, 0.9
    kept = algos.summary(one)  # drops that come when forks are common already do not count
    assert (kept["steps_fork_rate"], kept["peak_drop"]) == ("5", "0.2")


def test_negative_gradient_is_told_for_the_late_half_of_every_window():
    row = {"negative_early": 0.5, "negative_late": 0.7}
    staged = [{"step": 1, "window": 8, **row}, {"step": 2, "window": 12, "negative_late": 0.2}]
    at_once = [{"step": 1, "negative_late": 0.1}, {"step": 60, "negative_late": 0.3}]
    said = windows.negative_by_window({"staged": [staged], "at once": [at_once]})
    assert "0.7 [0.7, 0.7] in a window of 8, 0.2 [0.2, 0.2] in a window of 12 tokens" in said
    assert "0.1 [0.1, 0.1] in steps 1 to 10, 0.3 [0.3, 0.3] in steps 51 to 60" in said


def test_a_judge_counts_as_hacked_if_answers_grew_and_reward_left_gold():
    def run(length, gold, alarm=0):
        ends = [(8, 0.6), (length, gold)]
        columns = "length", "gold", "reward", "alarm"
        return [dict(zip(columns, (x, y, 0.9, alarm)), step=i) for x, y in ends for i in range(3)]

    logs = {"biased": [run(12, 0.5), run(9, 0.5)], "watched": [run(8, 0.5), run(12, 0.85)]}
    said = judge_study.verdict(logs | {"fair": [run(8, 0.9, 1), run(8, 0.9)]})
    assert "0.1): biased 2 of 2, watched 0 of 2, fair 0 of 2 seeds" in said
    assert "gold by 0.175 [0, 0.35]" in said and "rang with the fair judge in 1 of 2 seeds" in said


# ---- runs


def test_every_study_has_settings_that_train_rl_knows_and_can_run():
    modules = [importlib.import_module(f"studies.{name.split()[0]}") for name in STUDIES]
    plans = [x for it in modules for x in vars(it).values() if isinstance(x, common.Study)]
    for plan in plans:
        for own in plan.settings.values():
            settings = {k: x for k, x in (plan.flags | own).items() if k not in common.CHANGES}
            assert settings.keys() <= flat(train_rl.Flags()).keys(), plan.name
            common.unflat(train_rl.Flags, common.PRESSURE | settings)
            common.unflat(train_rl.Flags, common.PRESSURE | settings | plan.base)
    for settings, *_ in budget.PLANS.values():
        common.unflat(train_rl.Flags, settings)
    with pytest.raises(ValueError, match="no setting stepz"):
        common.train_run("nowhere", {"stepz": 3})


@contextlib.contextmanager
def code_restored():
    """What studies change in the code of their own processes is as it was at the end."""
    changed = [(train_rl, "ADAM_EPS"), (m1.MiniMaxM1, "head"), (m1.MoE, "__init__")]
    with contextlib.ExitStack() as stack:
        for owner, name in [*changed, (Curriculum, "observe")]:
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))
        stack.enter_context(mock.patch.dict(m1.PRESETS["tiny"]))
        stack.enter_context(mock.patch.object(runlog, "draw_curves"))
        yield


def one_after_another(function, jobs, title, at_once=None):
    """common.in_processes, here and now."""
    found = []
    for job in jobs:
        with code_restored():
            found += function(*job)
    return found


def test_a_study_runs_every_setting_from_one_cold_start_and_its_changes_act(tmp_path, capsys):
    plan = dataclasses.replace(precision.PLAN, curves=("fork_rate", "accuracy"))
    flags = common.Comparison(out=str(tmp_path), quick=True)
    with mock.patch.object(common, "in_processes", one_after_another):
        plan.show(flags)
    rows = common.read_csv(tmp_path / "precision.csv")
    found = [(row["setting"], row["seed"], row["step"]) for row in rows]
    assert found == list(itertools.product(plan.settings, [0], range(3)))
    assert len({row["accuracy"] for row in rows if row["step"] == 0}) == 1
    said = capsys.readouterr().out
    plan.show(dataclasses.replace(flags, redraw=True))
    assert capsys.readouterr().out == said and (tmp_path / "precision.png").stat().st_size > 5000


def test_two_runs_in_bf16_differ_in_heads_and_show_tokens_probabilities(tmp_path, capsys):
    flags = ["--preset", "tiny", "--quick", "--steps", "1", "--out", str(tmp_path)]
    head = m1.MiniMaxM1.head
    precision.main(flags)
    said = capsys.readouterr().out
    rows = common.by(common.read_csv(tmp_path / "precision-gpu.csv"), "head")
    assert list(rows) == ["fp32", "bf16"] and m1.MiniMaxM1.head is head is not precision.rounded
    for part in rows.values():
        step = next(row for row in part if row.get("step") == 1)
        tokens = [(row["training"], row["rollout"]) for row in part if "rollout" in row]
        assert len(tokens) > 50 and step["prob_corr"] > 0.99
        gaps = [abs(np.log(p) - np.log(q)) for p, q in tokens]
        assert max(gaps) == pytest.approx(step["logp_gap"], rel=1e-2)
        assert np.mean(gaps) == pytest.approx(step["logp_gap_mean"], rel=1e-2)
    assert np.mean(gaps) > 1e-5 and said.count("\n") == 2
    precision.main([*flags, "--redraw"])
    assert capsys.readouterr().out == said


def test_changes_of_the_code_do_what_they_are_named_after():
    with code_restored():
        balance.experts(0.25, 1.25)
        model = m1.MiniMaxM1(m1.M1Config.preset("tiny"))
        assert model.config.router_aux_loss_coef == 0.25
        assert {layer.block_sparse_moe.capacity for layer in model.layers} == {1.25}
        precision.bf16_head()
        logits = model(torch.tensor([[65, 66]]))
        assert torch.equal(logits, logits.bfloat16().float()) and logits.dtype == torch.float32
        adam.large_eps()
        assert train_rl.make_optimizer(model).param_groups[0]["eps"] == 1e-8
        windows.jump(4)
        curriculum, opened = Curriculum(Mix(), Growth(windows="8,10,12")), []
        for _ in range(6):
            opened.append(curriculum.limit)  # of steps 1 to 6
            curriculum.observe({"correct": 0.0})
        assert opened == [8, 8, 8, 12, 12, 12]


def test_a_run_whose_numbers_overflow_counts_as_it_stood_any_other_error_is_one(tmp_path):
    def pretend(out, settings, quick):
        Path(out).mkdir()
        Path(out, "log.csv").write_text("step,accuracy,fork_rate\n0,0.2,\n3,0.5,0.4\n")
        raise ValueError(why)

    with mock.patch.object(common, "train_run", pretend):
        why = "stopped in step 4: logp is not finite for 3 tokens"
        rows = common.study_run("a", 0, str(tmp_path / "a"), {"steps": 9}, False)
        assert [(row["step"], row["accuracy"]) for row in rows] == [(0, 0.2), (3, 0.5), (9, 0.5)]
        why = "killed"
        with pytest.raises(ValueError, match="killed"):
            common.study_run("a", 0, str(tmp_path / "b"), {"steps": 9}, False)


def test_forks_follows_one_response_through_its_updates(tmp_path):
    rng = random.Random(0)

    def score(problem, text, ended, calls):
        return tasks.Score(rng.random(), rng.random() < 0.5, False, False)

    settings = {"updates_per_rollout": 4, "moves": 2, "lr": 1e-2}
    cold = {"steps": 0, "moves": 2, "fork_prior": 0.5}
    with mock.patch.object(tasks, "score", score), code_restored():
        common.train_run(tmp_path / "cold", cold, quick=True)
        rows = forks.watch("cispo", tmp_path, settings, quick=True)
    assert [row["update"] for row in rows if row["position"] == 0] == list(range(5))
    assert all(float(row["ratio"]) == 1 for row in rows if row["update"] == 0)
    assert any(float(row["ratio"]) != 1 for row in rows if row["update"] == 1)
    assert {row["turn"] for row in rows} <= {1, 2, 3, 4}


def test_without_a_planted_fork_demonstrations_go_on_after_two_steps_or_guess():
    problem, rng = tasks.solve_mod("+314204="), random.Random(0)
    shown = [forks.gives_up(problem, rng, 0.2) for _ in range(2000)]
    texts = ["".join(text for text, _ in pieces) for pieces in shown]
    assert {*texts} == {"34</think>4", "343004</think>4"}
    learned = [pieces[1] for pieces in shown if len(pieces) == 3]  # that the third step is made
    assert {*learned} == {("3", True), ("3", False)} and 1100 < len(learned) < 1300
    assert 150 < learned.count(("3", True)) < 250


def test_the_study_of_judges_runs_every_arm_and_draws_it_again(tmp_path, capsys):
    with code_restored():
        judge_study.main(["--quick", "--out", str(tmp_path)])
    said, rows = capsys.readouterr().out, common.read_csv(tmp_path / "judge.csv")
    found = [(row["arm"], row["seed"], row["step"]) for row in rows]
    assert found == list(itertools.product(judge_study.ARMS, [0], [1]))
    biased, watched, fair = ([row[x] for x in ("reward", "gold", "length")] for row in rows)
    assert biased == watched and biased[1:] == fair[1:]  # one policy, and two judges
    judge_study.main(["--quick", "--redraw", "--out", str(tmp_path)])
    assert capsys.readouterr().out == said and (tmp_path / "judge.png").stat().st_size > 5000


def test_compare_lays_runs_side_by_side_and_names_what_is_no_run(tmp_path, capsys):
    for i in range(2):
        (tmp_path / f"r{i}").mkdir()
        shutil.copy(FIGURES / f"main-seed{i}.csv", tmp_path / f"r{i}/log.csv")
    compare.main([str(tmp_path / "r0"), str(tmp_path / "r1"), "--out", str(tmp_path)])
    assert (
        "0.26 -> 0.994" in capsys.readouterr().out
        and (tmp_path / "compare.png").stat().st_size > 5000
    )
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path)])
    assert "has no log.csv" in capsys.readouterr().err


# ---- nine mistakes that people make when they rebuild M1, and the error that each makes


@torch.no_grad()
def logp_error():
    """max |log-prob - released|, nats"""
    given = np.load(HERE.parent / "parity/expected.npz")
    names = [f"{n}_{x}" for x in ("ids", "logits") for n in ("long", "short")]
    long, short, *released = (torch.from_numpy(given[name]) for name in names)
    tokens, mask = engine.left_pad([*long, *short], 0, "cpu")
    ours = load_pretrained(HERE.parent / "parity")(tokens, mask=mask)[mask]
    right = torch.cat([x.flatten(0, 1) for x in released]).log_softmax(-1)
    return float((ours.log_softmax(-1) - right).abs().max())


@torch.no_grad()
def ratio_error():
    """max |pi / pi_rollout - 1| at the start"""
    model, prompts = load_pretrained(HERE.parent / "parity"), torch.arange(64).view(8, 8).tolist()
    kw = dict(max_new_tokens=16, temperature=0.7, eos_id=-1, seed=0)
    rollout = engine.generate(model, prompts, **kw)
    tokens, mask = rollout.tokens.tolist(), rollout.mask.flatten()
    batch = experience.make_batch(prompts, tokens, mask, "cpu")
    logp, _, _ = experience.trained_logp(model, batch, 0.7)
    return float((logp[batch.trained] - rollout.logp[rollout.mask]).expm1().abs().max())


def fork_error():
    """|fork rate taught - asked for|"""
    byte, flags = Tokenizer.byte(), train_rl.Flags()
    batch = train_rl.demonstrations(flags, random.Random(0), byte, 10_000, "cpu")
    learned = batch.tokens[:, 1:][batch.trained]
    forks, guesses = (int((learned == ord(x)).sum()) for x in (tasks.FORK, tasks.GUESS))
    return abs(forks / (forks + guesses) - flags.cold.fork_prior)


def advantage_error():
    """max |mean advantage of a group|"""
    rewards = torch.ones(8, 8).tril(-1).flatten()  # eight prompts: 0 to 7 of 8 answers are right
    return float(cispo.group_advantages(rewards, 8).view(8, 8).mean(1).abs().max())


def weight_error():
    """gradient lost when padding is added"""
    mask = torch.arange(8) < torch.tensor([[3], [8]])
    gradient, padded = (cispo.token_weights(F.pad(mask, (0, n))).sum() for n in (0, 8))
    return float(1 - padded / gradient)


def planted(mistake, right, *args):
    """What the code gives with a mistake in it, of what is right and its arguments."""
    match mistake, args:
        case "rope on the whole head", (positions, c, dtype):
            return right(positions, dataclasses.replace(c, rotary_dim=c.head_dim), dtype)
        case "slopes linear in the head", (H, layer, n_layers, _):
            return 8 * torch.arange(1, H + 1) / H * (1 - layer / (n_layers - 1) + 1e-5)
        case "slopes alike in all layers", (H, _, *rest):
            return right(H, 0, *rest)
        case "padding enters the state", (module, u, at, *state):
            return right(module, u, dataclasses.replace(at, mask=None, continues=False), *state)
        case "logits in bf16", _:
            return precision.rounded(*args)
        case "temperature in rollouts only", (model, batch, _):
            return right(model, batch)
        case "planted forks carry loss", _:
            return [(text, True) for text, _ in right(*args)]
        case "advantage over the batch", (rewards, _):
            return right(rewards, len(rewards))
        case "token mean over padding", (mask,):
            return right(torch.ones_like(mask)) * mask


MISTAKES = {
    "rope on the whole head": (logp_error, m1, "rope_tables"),
    "slopes linear in the head": (logp_error, m1, "_slopes"),
    "slopes alike in all layers": (logp_error, m1, "_slopes"),
    "padding enters the state": (logp_error, m1.LightningAttention, "forward"),
    "logits in bf16": (logp_error, m1.MiniMaxM1, "head"),
    "temperature in rollouts only": (ratio_error, experience, "trained_logp"),
    "planted forks carry loss": (fork_error, tasks, "demonstration"),
    "advantage over the batch": (advantage_error, cispo, "group_advantages"),
    "token mean over padding": (weight_error, cispo, "token_weights"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_far_off_and_the_code_is_right_before_and_after(mistake):
    measure, owner, name = MISTAKES[mistake]
    before, right = measure(), getattr(owner, name)
    with mock.patch.object(owner, name, lambda *args: planted(mistake, right, *args)):
        wrong = measure()
    assert abs(before) < 0.01 and wrong > 0.02 and wrong > 50 * abs(before)
    assert measure() == before
    rows = common.read_csv(FIGURES / "traps.csv")  # which test of test_m1.py turned red for each
    row = next(row for row in rows if row["mistake"] == mistake)
    assert row["turns"] == "red" and row["error"] == measure.__doc__
    assert f"def {row['test']}(" in (HERE.parent / "test_m1.py").read_text()
