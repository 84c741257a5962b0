"""Sweeps: the runs that a file stands for, training them in processes that may die, and the tables of what came out."""

import csv
import json
import math
import os
import re
import shlex
import statistics
import sys

import pytest
import torch
import yaml
from helpers import ROOT, TINY
from test_tools import tool  # noqa: F401

from bnnfree.errors import BnnfreeError
from bnnfree.models import MODELS
from bnnfree.nn import NORMS
from bnnfree.recipe.read import RecipeError
from bnnfree.sweep import workers
from bnnfree.sweep.file import MOST, SweepError, read_sweep
from bnnfree.sweep.formula import ExpressionError, compute
from bnnfree.sweep.run_folder import Entry, Outcome, OutcomeError, differing, read_run
from bnnfree.sweep.tables import cell, draw_sweep, markdown, sweep_csv, sweep_rows
from bnnfree.sweep.workers import Job, Place, places_of, run_all, train_one
from bnnfree.train import fit, load_recipe
from bnnfree.train.report import Report
from bnnfree.train.run import Run

SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
BASE = ROOT / "recipes" / "cifar10_reactnet20.yaml"
RECIPE = {**TINY, "model": {**TINY["model"], "width": 0.25}, "stages": [{"epochs": 1}]}
SWEEP = {
    "recipe": "base.yaml",
    "constants": {"gradient_batch": 32},
    "set": {"accumulate": "= gradient_batch / data.batch_size"},
    "grid": {
        "norm": {"every": "model.norm", "bn": {"model": {"norm": "bn"}, "optimizer.lr": 2e-3}, "kn": None},
        "data.batch_size": [4, 16],
    },
    "seeds": [7, 3],
    "scale": "small",
    "scales": {
        "small": {"about": "a moment", "grid": {"norm": ["bn", "free"]}},
        "large": {"set": {"stages.0.epochs": 9}, "constants": {"gradient_batch": 64}, "seeds": 3},
    },
}


@pytest.fixture
def sweep_file(tmp_path):
    """Writes a sweep file, by itself SWEEP with changes, beside its recipe; returns its path."""

    def write(tree=None, **changes):
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(RECIPE))
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump({**SWEEP, **changes} if tree is None else tree, sort_keys=False))
        return path

    return write


def write_run(folder, recipe=None, **result):
    """A finished run that nobody trained."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump((recipe or load_recipe_of(RECIPE)).model_dump()))
    plain = {"test_top1": 50.0, "val_top1": 40.0, "test_loss": 1.5, "seconds": 90.0, "best_epoch": 2}
    plain |= {"device": "cpu", "threads": 1, "machine": {"processor": "some"}}
    (folder / "result.json").write_text(json.dumps({**plain, **result}))
    lines = [{"stage": "a", "epoch": e, "loss": 2.0, "top1": 10.0, "val_top1": 10.0 * e} for e in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def load_recipe_of(tree, *overrides):
    from bnnfree.recipe.read import parse_recipe

    return parse_recipe(tree, "test", MODELS, overrides)


# -- what a file stands for


def test_the_grid_is_a_product_seed_by_seed_with_labels_in_order(sweep_file):
    sweep = read_sweep(sweep_file(), models=MODELS)
    labels = [("bn", "4"), ("bn", "16"), ("free", "4"), ("free", "16")]
    assert [(*run.point.values(), run.seed) for run in sweep.runs] == [(*p, s) for s in (7, 3) for p in labels]
    assert [run.recipe.seed for run in sweep.runs] == [7] * 4 + [3] * 4
    assert sweep.runs[1].folder == "norm=bn,batch_size=16,seed=7" and sweep.about == "a moment"
    assert {run.recipe.optimizer.lr for run in sweep.runs if run.point["norm"] == "bn"} == {2e-3}


def test_every_name_of_a_table_is_a_variant_unless_it_is_left_out(sweep_file):
    sweep = read_sweep(sweep_file(), ["scale=large"], MODELS)
    names = list(dict.fromkeys(run.point["norm"] for run in sweep.runs))
    assert sorted(names) == sorted(set(NORMS) - {"kn"})
    assert all(run.recipe.model.norm == run.point["norm"] for run in sweep.runs)
    assert {run.recipe.stages[0].epochs for run in sweep.runs} == {9} and sweep.seeds == [0, 1, 2]


@pytest.mark.parametrize(("scale", "gradient_batch"), [("small", 32), ("large", 64)])
def test_the_gradient_batch_stays_when_the_statistics_batch_moves(sweep_file, scale, gradient_batch):
    for run in read_sweep(sweep_file(), [f"scale={scale}"], MODELS).runs:
        assert type(run.recipe.accumulate) is int
        assert run.recipe.accumulate * run.recipe.data.batch_size == gradient_batch


def test_the_command_line_changes_the_sweep_or_every_recipe(sweep_file):
    asked = ["seeds=1", "grid.data.batch_size=[2]", "grid.norm=[none]", "model.width=0.5", "constants.gradient_batch=8"]
    (run,) = read_sweep(sweep_file(), asked, MODELS).runs
    assert (run.recipe.model.width, run.recipe.model.norm, run.recipe.accumulate, run.seed) == (0.5, "none", 4, 0)
    both = read_sweep(sweep_file(), ["accumulate=1", "optimizer.lr== 0.001 * sqrt(data.batch_size)"], MODELS).runs
    assert {(r.recipe.accumulate, r.recipe.optimizer.lr) for r in both} == {(1, 0.002), (1, 0.004)}


def test_a_run_is_what_its_own_command_line_gives(sweep_file):
    path = sweep_file()
    for run in read_sweep(path, models=MODELS).runs:
        assert load_recipe(path.parent / "base.yaml", run.overrides, MODELS) == run.recipe


def test_a_whole_list_takes_the_place_of_what_was_set_within_it(sweep_file):
    stages = [{"name": "both", "epochs": "= 2 * 3"}]
    path = sweep_file(grid={"way": {"two": {}, "one": {"stages": stages}}}, scales={}, scale=None,
                      set={"stages.0.epochs": 4})  # fmt: skip
    runs = read_sweep(path, models=MODELS).runs
    assert {run.point["way"]: run.recipe.stages[0].epochs for run in runs} == {"two": 4, "one": 6}


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"gird": {}}, [], r"'gird': unknown key\. Did you mean 'grid'\?"),
        ({"grid": {}, "scales": {"small": {}}}, [], "grid: got no axis"),
        ({"grid": {"data.batch_size": []}, "scales": {"small": {}}}, [], r"grid\.data\.batch_size: got \[\]"),
        ({"grid": {"data.batch_size": 4}, "scales": {"small": {}}}, [], "got 4, expected a list of values"),
        ({"grid": [1]}, [], r"grid: got \[1\], expected keys with values"),
        ({"grid": {"norm": {"every": "model.nrom"}}}, [], r"every: got 'model.nrom'.*Did you mean 'model.norm'\?"),
        ({"grid": {"norm": {True: {}}}, "scales": {"small": {}}}, [], "label True, expected a text: quote it"),
        ({"grid": {"norm": {"a": 3}}, "scales": {"small": {}}}, [], r"grid\.norm\.a: got 3, expected changes"),
        ({"grid": {"data.batch_size": [2, 2]}, "scales": {"small": {}}}, [], "got 2 twice"),
        ({"grid": {"data.batchsize": [2]}, "scales": {"small": {}}}, [],
         r"data\.batchsize=2: .*unknown key\. Did you mean 'data.batch_size'\?"),
        ({"grid": {"data.batch_size": ["x"]}, "scales": {"small": {}}, "set": {}}, [],
         r"data\.batch_size: got 'x' \(str\), expected a valid integer"),
        ({"grid": {"data.batch_size": [3]}, "scales": {"small": {}}}, [], r"accumulate: got 10\.6.*valid integer"),
        ({"grid": {"a": {"x": {"seed": 1}}}, "scales": {"small": {}}, "seeds": 1}, ["seed=4"], "Use seeds="),
        ({"grid": {"a": {"x": {}, "y": {}}}, "scales": {"small": {}}, "set": {}}, [], "a=y: is the same recipe as x"),
        ({"grid": {"a": {"x": {"model.width": 1}}, "model.width": [2]}, "scales": {"small": {}}, "set": {}}, [],
         r"model\.width is set by two axes"),
        ({"seeds": 0}, [], "seeds: got 0"),
        ({"seeds": [1, 1]}, [], "each once"),
        ({"seeds": ["a"]}, [], r"seeds: got \['a'\]"),
        ({"seeds": MOST}, [], f"runs, expected up to {MOST}"),
        ({"scale": "smal"}, [], r"scale: got 'smal', expected one of small, large\. Did you mean 'small'\?"),
        ({"scales": {"small": {"sets": {}}}}, [], r"scales\.small: 'sets': unknown key\. Did you mean 'set'\?"),
        ({"scales": {"small": 3}}, [], r"scales\.small: got 3"),
        ({"constants": {"a": "b"}}, [], r"constants\.a: got 'b', expected a number"),
        ({"set": {"accumulate": "= gradient_bach / 2"}}, [], r"no constant or recipe.*Did you mean 'gradient_batch'\?"),
        ({"plot": {"x": "batch"}}, [], r"plot\.x: got 'batch', expected one of norm, data\.batch_size"),
        ({"recipe": 3}, [], "recipe: got 3, expected the path"),
        ({"recipe": "bse.yaml"}, [], r"no such file\. Did you mean '.*/base\.yaml'\?"),
        ({}, ["data.batch_size=2"], r"is an axis of the grid\. Use grid\.data\.batch_size=\[\.\.\.\]"),
        ({}, ["grid.norm=[bm]"], r"grid\.norm: got 'bm', expected one of .*Did you mean 'bn'\?"),
        ({}, ["grid.nrom=[bn]"], r"grid: got 'nrom', expected one of norm, .*Did you mean 'norm'\?"),
        ({}, ["scale"], "expected key=value"),
        ({}, ["seeds.0=1"], "seeds has no keys"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_one_named_error(sweep_file, changes, overrides, said):
    with pytest.raises((SweepError, RecipeError, ExpressionError, BnnfreeError)) as caught:
        read_sweep(sweep_file(**changes), overrides, MODELS)
    assert re.search(said, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "3", "[1, 2]", "a: [", "recipe: base.yaml\nrecipe: b", "grid: &g {a: *g}"])
def test_a_file_that_is_no_sweep_is_an_error(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(BnnfreeError, match=r"bad\.yaml"):
        read_sweep(tmp_path / "bad.yaml", (), MODELS)


def test_formulas():
    names = {"a": 6, "b.c": 4, "t": "text", "yes": True}
    values = {"= a / b.c": 1.5, "=2*(a - 1)": 10, "= -a + sqrt(b.c)": -4, "= max(1, round(a / 4))": 2}
    for text, value in values.items():
        assert compute(text, names, "x") == value
    assert type(compute("= a / 2", names, "x")) is int
    hostile = ["=", "= a +", "= d", "= t", "= yes", "= 1 / 0", "= 1e308 * 10", "= sqrt(-1)", "= sqrt()", "= a ** 9",
               "= __import__('os')", "= (lambda: 1)()", "= a if a else 1", "= 'x' * 9", "= max(a=1)", "= [1][0]",
               "= " + "(" * 999 + "1", "= " + "9" * 400 + " * 1.0", "= a\0", "= round(1, -999999999999)",
               "= round(a, 16)", "= round(a, 1.5)", "= " + "-" * 99999 + "1", "= " + "1 * " * 999 + "1",
               "= " + " * ".join(["9" * 200] * 4)]  # fmt: skip
    for text in hostile:
        with pytest.raises(ExpressionError, match="^x: "):
            compute(text, names, "x")


def test_formulas_that_name_each_other_are_computed_once_and_bounded(sweep_file):
    chain = {f"k{i}": f"= k{i + 1} + k{i + 1}" for i in range(60)} | {"k60": 1}
    with pytest.raises(RecipeError, match="k0: unknown key"):  # computed first: 2^60 sums would not end
        read_sweep(sweep_file(set=chain), (), MODELS)
    squares = {f"k{i}": f"= k{i + 1} * k{i + 1}" for i in range(60)} | {"k60": 9}
    with pytest.raises(ExpressionError, match="it is not finite"):
        read_sweep(sweep_file(set=squares), (), MODELS)


# -- running one


CASES = {
    "free": {},
    "bn": {"model.norm": "bn"},
    "diverges": {"optimizer.lr": 1e30, "model.norm": "none"},
    "fails": {"loss.name": "distribution", "loss.teacher": "nowhere.pt"},
}


def test_a_sweep_runs_goes_on_and_survives_what_diverges_or_fails(sweep_file, tool, tmp_path):  # noqa: F811
    tree = {"recipe": "base.yaml", "set": {"data.samples": 24}, "grid": {"case": CASES}, "seeds": 2}
    path, out = sweep_file(tree), tmp_path / "out"
    code, text, errors = tool("sweep", path, "--threads", 1, "--out", out)
    assert code == 0, errors
    assert text.splitlines()[-1] == str(out)
    assert len(re.findall(r"^\[\d/8\] case=.* left$", text, re.M)) == 8
    assert len(re.findall(r"diverged: stage 0 epoch 1.*not finite", text)) == 2
    assert len(re.findall(r"failed: .*nowhere\.pt", text)) == 2
    results = sorted(out.glob("*/result.json"))
    assert [path.parent.name for path in results] == [f"case={c},seed={s}" for c in ("bn", "free") for s in (0, 1)]
    assert not list(out.glob("case=free*/last.pt")) and len(list(out.glob("case=free*/best.pt"))) == 2
    table = check_table(out)

    before = {path: path.stat().st_mtime_ns for path in [*results, *out.glob("case=diverges*/failure.json")]}
    assert len(before) == 6
    code, text, errors = tool("sweep", path, "grid.case=[free,bn,diverges]", "--out", out)
    assert code == 0 and "6 runs, 6 of them over" in text, errors
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "8 runs, 6 of them over" in tool("sweep", path, "--dry-run", "--out", out)[1], "failures are tried again"
    assert tool("sweep", path, "--table", "--out", out)[0] == 0 and check_table(out) == table


def check_table(out):
    """table.csv against the runs' own results; returns table.md."""
    with open(out / "table.csv", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["free", "bn", "diverges", "fails"]
    for case in ("free", "bn"):
        results = [json.loads((out / f"case={case},seed={s}" / "result.json").read_text()) for s in (0, 1)]
        for figure in ("test_top1", "val_top1", "test_loss"):
            a, b = (result[figure] for result in results)
            assert float(rows[case][f"{figure}_mean"]) == pytest.approx((a + b) / 2)
            assert float(rows[case][f"{figure}_deviation"]) == pytest.approx(abs(a - b) / math.sqrt(2))
    assert (rows["diverges"]["diverged"], rows["diverges"]["test_top1_mean"]) == ("2", "")
    assert (rows["fails"]["failed"], rows["fails"]["done"]) == ("2", "0")
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG")
    text = (out / "table.md").read_text()
    assert "0 of 2, 2 diverged" in text and "nowhere.pt" in text
    return text


def test_a_dry_run_lists_and_writes_nothing(sweep_file, tool, tmp_path):  # noqa: F811
    code, text, _ = tool("sweep", sweep_file(), "--dry-run", "--out", tmp_path / "none")
    assert code == 0 and not (tmp_path / "none").exists()
    assert text.splitlines()[0] == "8 runs, 0 of them over; a moment"
    assert len(re.findall(r"^new +norm=", text, re.M)) == 8
    overrides = shlex.split(text.splitlines()[-1].partition("tools/train.py ")[2])
    assert load_recipe(overrides[0], overrides[1 : overrides.index("--out")], MODELS).accumulate == 8


def test_a_table_of_what_is_there_can_be_made_at_any_time(sweep_file, tool, tmp_path):  # noqa: F811
    path, out = sweep_file(), tmp_path / "out"
    run = read_sweep(path, models=MODELS).runs[0]
    write_run(out / run.folder, run.recipe, test_top1=12.5)
    code, text, errors = tool("sweep", path, "--table", "--out", out)
    assert code == 0 and re.search(r"bn +\| 4 +\| +12\.50 .* 1 of 2 \|", text), text + errors
    assert text.splitlines()[-1] == str(out)
    run = read_sweep(path, ["optimizer.eps=1e-7"], MODELS).runs[0]
    code, _, errors = tool("sweep", path, "optimizer.eps=1e-7", "--table", "--out", out)
    assert code == 2 and "another recipe: optimizer.eps (1e-08, now 1e-07)" in errors


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--jobs", "0"], "--jobs: got 0"), (["--threads", "-1"], "--threads: got -1"),
     (["--devices", "gpu0"], "--devices: got 'gpu0', expected cpu or cuda:0"),
     (["data.name=image_folder", "data.root=nowhere"], "nowhere")],
)  # fmt: skip
def test_what_is_wrong_with_the_command_is_one_error_before_anything_runs(sweep_file, tool, tmp_path, arguments, said):  # noqa: F811
    code, _, errors = tool("sweep", sweep_file(), *arguments, "--out", tmp_path / "out")
    assert code == 2 and said in errors and len(errors.strip().splitlines()) == 1
    assert not list((tmp_path / "out").glob("norm=*"))


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Report, "draw", lambda self: None)
    recipe = load_recipe_of(RECIPE)

    def stop(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_finish", stop)
        fit(recipe, MODELS, tmp_path / "run", quiet=True)
    assert read_run(tmp_path / "run", recipe).state == "interrupted"
    steps = []
    monkeypatch.setattr("bnnfree.train.loop.Stage._take_step", lambda *_: steps.append(1))
    train_one(recipe.model_dump(), MODELS, tmp_path / "run")
    assert read_run(tmp_path / "run", recipe).state == "done" and not steps


def test_any_exception_of_a_run_is_recorded_with_its_last_line(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("two\nlines")

    monkeypatch.setattr(workers, "fit", broken)
    train_one(load_recipe_of(RECIPE).model_dump(), MODELS, tmp_path / "run")
    outcome = read_run(tmp_path / "run")
    assert (outcome.state, outcome.error) == ("failed", "ValueError: two lines")
    assert "in broken" in json.loads((tmp_path / "run" / "failure.json").read_text())["traceback"]


@pytest.mark.parametrize(
    ("code", "said"),
    [("os._exit(3)", "exit code 3"), ("os.kill(os.getpid(), 9)", "signal 9"), ("1 / 0", "exit code 1")],
)
def test_a_worker_that_dies_takes_only_its_run_with_it(tmp_path, code, said):
    jobs = [Job(f"job{i}", {}, tmp_path / f"job{i}") for i in range(3)]
    command = [sys.executable, "-S", "-c", f"import os, sys; sys.stdin.readline(); {code}"]
    over = list(run_all(jobs, command, [Place(), Place()], tmp_path / "log"))
    assert sorted(job.name for job in over) == ["job0", "job1", "job2"]
    assert all(said in read_run(job.folder).error for job in jobs)


def test_a_command_that_is_none_is_an_error_and_no_endless_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with pytest.raises(BnnfreeError, match="cannot be started"):
        list(run_all([Job("a", {}, tmp_path / "a")], ["/no/such/program"], [Place()], tmp_path / "log"))


def test_workers_end_with_the_sweep(tmp_path):
    """A worker answers the first job, then sleeps, whatever it is told: leaving the loop ends it."""
    pid = tmp_path / "pid"
    script = (
        "import os, pathlib, sys, time; sys.stdin.readline(); "
        f"pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); print('done', flush=True); time.sleep(600)"
    )
    jobs = [Job(f"job{i}", {}, tmp_path / f"job{i}") for i in range(2)]
    running = run_all(jobs, [sys.executable, "-S", "-c", script], [Place()], tmp_path / "log")
    next(running)
    running.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_formula_may_need_another_and_a_circle_is_an_error(tmp_path):
    settings = "accumulate: = 16 / data.batch_size, optimizer.lr: = 1e-3 * accumulate"
    path = tmp_path / "s.yaml"
    path.write_text(f"recipe: {BASE}\nset: {{{settings}}}\ngrid: {{data.batch_size: [4, 8]}}\n", encoding="utf-8")
    found = [(run.recipe.accumulate, run.recipe.optimizer.lr) for run in read_sweep(path, (), MODELS).runs]
    assert found == [(4, pytest.approx(4e-3)), (2, pytest.approx(2e-3))]
    with pytest.raises(SweepError, match="lr needs accumulate needs optimizer.lr: expected formulas without"):
        read_sweep(path, ["accumulate== optimizer.lr * 2"], MODELS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("set: {seed: 5}", "seed is set by seeds"),
        ("grid: {case: {x: {seed: 1}, y: {model.norm: bn}}}", "seed is set by seeds"),
        (f"grid: {{case: {{{'long' * 60}: {{model.norm: bn}}}}}}", "a name of more than 200 bytes"),
    ],
)
def test_a_seed_of_its_own_and_a_label_too_long_are_errors(tmp_path, change, said):
    path = tmp_path / "s.yaml"
    grid = "" if change.startswith("grid") else "grid: {model.norm: [bn, ln]}\n"
    path.write_text(f"recipe: {BASE}\n{grid}{change}\n", encoding="utf-8")
    with pytest.raises(SweepError, match=said):
        read_sweep(path, (), MODELS)


def test_places_are_spread_over_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    three = places_of(["cuda:1", "cpu"], 3, 4)
    assert [place.device for place in three] == ["cuda", "cpu", "cuda"]
    assert [place.environment.get("CUDA_VISIBLE_DEVICES") for place in three] == ["1", None, "1"]
    assert all(place.environment["OMP_NUM_THREADS"] == "4" for place in three)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert places_of(["cuda:1"], 1, 1)[0].environment["CUDA_VISIBLE_DEVICES"] == "7"
    with pytest.raises(BnnfreeError, match="'cuda:2'"):
        places_of(["cuda:2"], 1, 1)


# -- what came out


def entry(*results, name="a", **point):
    return Entry(name, [Outcome("done", {"test_top1": value, "seconds": 60.0}) for value in results], point)


def test_means_and_deviations_are_over_the_runs_that_are_done():
    row = entry(10.0, 12.0, 17.0)
    row.outcomes.append(Outcome("diverged", {"test_top1": 100.0}, "not finite"))
    assert row.mean("test_top1") == 13.0 and row.deviation("test_top1") == pytest.approx(statistics.stdev([10, 12, 17]))
    assert cell(row, "test_top1", 2) == "13.00 ± 3.61" and cell(row, "minutes", 1) == "1.0 ± 0.0"
    assert row.runs == "3 of 4, 1 diverged" and row.mean("val_top1") is None and cell(row, "val_top1", 2) == ""
    assert cell(entry(10.0), "test_top1", 2) == "10.00"
    assert sweep_csv([entry(1.0, 2.0, norm="a,b")], ["norm"]).splitlines()[1].startswith('"a,b",1.5,0.7071')


def test_a_loss_that_is_not_finite_is_a_divergence_whatever_the_accuracy_says(tmp_path):
    """Comparisons with NaN are false, and so a network of NaN would count as always right."""
    outcome = read_run(write_run(tmp_path / "run", test_loss=float("nan"), test_top1=100.0))
    assert outcome.state == "diverged" and outcome.over and outcome.figure("test_top1") is None


def test_a_run_of_another_recipe_is_refused_but_it_may_have_moved(tmp_path):
    recipe = load_recipe_of(RECIPE)
    write_run(tmp_path / "run", recipe)
    assert read_run(tmp_path / "run", load_recipe_of(RECIPE, "data.cache=elsewhere", "device=cpu")).state == "done"
    with pytest.raises(OutcomeError, match=r"stages\.0\.epochs \(1, now 2\)"):
        read_run(tmp_path / "run", load_recipe_of(RECIPE, "stages.0.epochs=2"))
    (tmp_path / "run" / "result.json").write_text("[")
    with pytest.raises(OutcomeError, match=r"result\.json: cannot be read"):
        read_run(tmp_path / "run")


def test_differing_keys_are_those_that_are_not_the_same_in_all():
    changes = ["optimizer.eps=1", "device=cpu", "stages.0.lr=2"]
    one, two = (load_recipe_of(RECIPE, *overrides).model_dump() for overrides in ([], changes))
    assert differing([one, two]) == {"stages.0.lr": [None, 2], "optimizer.eps": [1e-8, 1]}
    assert differing([one, one]) == {}


def test_a_cell_cannot_break_a_table():
    lines = markdown([["a", "b"], ["x|y", "1\n2"]]).splitlines()
    assert len(lines) == 3 and "x\\|y" in lines[2] and len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("values", [[1, 2, 128], [None, 0.1, 0.01], ["a", "b"], [5]])
def test_a_picture_is_drawn_of_any_axis(tmp_path, sweep_file, values):
    key = "model.norm" if values == ["a", "b"] else "agc.clip" if None in values else "data.batch_size"
    values = ["bn", "free"] if values == ["a", "b"] else values
    axes = read_sweep(sweep_file(grid={key: values, "k": {"u": {}}}, scales={}, scale=None, set={}), (), MODELS).axes
    entries = [entry(1.0 * i, 2.0, **{key: label, "k": "u"}) for i, label in enumerate(axes[0].points)]
    draw_sweep(tmp_path / "a.png", entries, axes, None, "title")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_compare_puts_runs_side_by_side(tmp_path, tool):  # noqa: F811
    one = write_run(tmp_path / "one", test_top1=41.25)
    two = write_run(tmp_path / "two", load_recipe_of(RECIPE, "model.norm=bn", "optimizer.lr=0.25"), best_epoch=1)
    code, text, errors = tool("compare", one, two, "--out", tmp_path / "out")
    assert code == 0, errors
    head, _, *rows = (re.split(r" *\| *", line)[1:-1] for line in text.splitlines()[:4])
    assert head[:4] == ["", "test top-1, %", "validation top-1, %", "test loss"]
    assert head[4:] == ["minutes", "best epoch", "runs", "norm", "lr"]
    assert rows[0] == ["one", "41.25", "40.00", "1.500", "1.5", "2", "1", "free", "0.004"]
    assert rows[1][-4:] == ["1", "1", "bn", "0.25"]
    assert (tmp_path / "out" / "compare.png").exists() and text.splitlines()[-1] == str(tmp_path / "out")


def test_compare_takes_a_sweep_as_its_points(tmp_path, tool, sweep_file):  # noqa: F811
    path, out = sweep_file(), tmp_path / "out"
    runs = read_sweep(path, models=MODELS).runs
    for run in runs[:1] + runs[4:5]:
        write_run(out / run.folder, run.recipe, test_top1=10.0 + run.seed)
    assert tool("sweep", path, "--table", "--out", out)[0] == 0
    code, text, errors = tool("compare", out, write_run(tmp_path / "lone"), "--out", tmp_path / "cmp")
    assert code == 0, errors
    assert re.search(r"out: bn, 4 .* 15\.00 ± 2\.83 .*\| +2 \|.* 7, 3 ", text) and re.search(r"lone +\| +50\.00", text)


def test_compare_puts_benchmarks_side_by_side(tmp_path, tool):  # noqa: F811
    for name, ms in (("old", 4.0), ("new", 3.0)):
        report = {"machine": {"cpu": "c", "threads": 1}, "source": name}
        report["engine"] = {"backend": "numpy", "median_ms": ms}
        report["peers"] = {"other": {"median_ms": 8.0}} if name == "new" else {}
        report["kernels"] = [{"op": "conv2d", "shape": "3x3", "isa": "avx2", "ms": ms / 8}]
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    code, text, errors = tool("compare", tmp_path / "old.json", tmp_path / "new.json", "--out", tmp_path / "out")
    assert code == 0, errors
    assert re.search(r"engine, ms +\| +4 \| +3 \| +0\.750 \|", text)
    assert re.search(r"conv2d 3x3 avx2, ms +\| +0\.5 \| +0\.375 \| +0\.750 \|", text)
    assert re.search(r"other, ms +\| +\| +8 \| +\|", text)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"machine": 1}', '{"machine": {"cpu": "c", "threads": 1}}',
                                     '{"machine": {}, "engine": {"backend": "x", "median_ms": "1"}}'])  # fmt: skip
def test_compare_names_a_file_that_is_no_benchmark(tmp_path, tool, content):  # noqa: F811
    (tmp_path / "a.json").write_text(content)
    code, _, errors = tool("compare", tmp_path / "a.json")
    assert code == 2 and "a.json: expected a file that tools/bench.py --json wrote" in errors


def test_compare_names_what_it_cannot_compare(tmp_path, tool):  # noqa: F811
    run, file = write_run(tmp_path / "run"), tmp_path / "a.json"
    file.write_text("{}")
    (tmp_path / "empty").mkdir()
    for arguments, said in (([run, file], "got a file and no file"), ([tmp_path / "rum"], f"mean '{tmp_path}/run'?"),
                            ([tmp_path / "empty"], "holds no run")):  # fmt: skip
        code, _, errors = tool("compare", *arguments, "--out", tmp_path / "out")
        assert code == 2 and said in errors


# -- those that come with the project


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_is_valid_at_every_scale_and_its_commands_too(path):
    tree = yaml.safe_load(re.sub(r"= [^,}\n]*", "0", path.read_text(encoding="utf-8")))
    assert {"cpu", "gpu"} <= set(tree["scales"])
    for scale in tree["scales"]:
        sweep = read_sweep(path, [f"scale={scale}"], MODELS)
        assert sweep.about and all(run.recipe.stages[-1].binarize in (None, "both") for run in sweep.runs)
        epochs = {sum(stage.epochs for stage in run.recipe.stages) for run in sweep.runs}
        assert len(epochs) == 1, "equal samples seen"
    header = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    commands = [shlex.split(line)[2:] for line in header if line.startswith("python tools/sweep.py")]
    assert commands and all(ROOT / file == path for file, *_ in commands)
    for _, *words in commands:
        read_sweep(path, [word for word in words if "=" in word], MODELS)


def test_the_batch_size_sweep_has_every_normaliser_and_one_gradient_batch():
    sweep = read_sweep(ROOT / "recipes" / "sweeps" / "batch_size.yaml", ["scale=gpu"], MODELS)
    assert {run.point["norm"] for run in sweep.runs} == {*NORMS, "bnp"}
    assert {run.recipe.data.batch_size for run in sweep.runs} == {1, 2, 4, 8, 32, 128}
    assert {run.recipe.data.batch_size * run.recipe.accumulate for run in sweep.runs} == {128}
    assert {run.recipe.optimizer.precondition for run in sweep.runs if run.point["norm"] == "bnp"} == {"bnp"}


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the tests from competing with each other for cores."""
    torch.set_num_threads(1)
    os.environ.setdefault("MPLBACKEND", "Agg")


def test_axes_whose_last_words_are_the_same_stand_whole_in_the_table():
    point = {"model.name": "a", "optimizer.name": "b", "model.norm": "c"}
    assert sweep_rows([Entry("", [Outcome("new")], point)], list(point))[0][:3] == [
        "model.name",
        "optimizer.name",
        "norm",
    ]


def test_the_command_line_chooses_among_variants_that_a_scale_brings(tmp_path):
    path = tmp_path / "s.yaml"
    scales = "{a: {grid: {case: {x: {model.norm: bn}, y: {model.norm: ln}}}}}"
    path.write_text(f"recipe: {BASE}\nscale: a\nscales: {scales}\n", encoding="utf-8")
    assert [run.recipe.model.norm for run in read_sweep(path, ["grid.case=[y]"], MODELS).runs] == ["ln"]
