"""A run folder belongs to one training at a time, and what the system refuses there is one line."""

import errno
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import ROOT, TINY, cut_at, metrics_of, train
from test_tools import tool  # noqa: F401

from bnnfree.errors import BnnfreeError, BnnfreeWarning
from bnnfree.train import load_checkpoint, report
from bnnfree.train.checkpoint import save_checkpoint
from bnnfree.train.run_folder import LOCK, open_folder, taken

HOLD = """
import sys, time
from pathlib import Path
from bnnfree.train.run_folder import taken
with taken(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run; it is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_training_gets_one_line_with_the_first_ones_number(tmp_path, holder, resume):
    with pytest.raises(BnnfreeError, match=rf"another training writes to it \(process {holder.pid}\)") as caught:
        train(tmp_path / "run", resume=resume)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


def test_the_lock_of_a_killed_process_stops_nobody(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    train(tmp_path / "run", "stages=[{epochs: 1}]")
    assert not (tmp_path / "run" / LOCK).exists()


def test_within_a_process_a_folder_is_held_once_too(tmp_path):
    with taken(tmp_path), pytest.raises(BnnfreeError, match=f"process {os.getpid()}"):
        train(tmp_path / ".." / tmp_path.name)
    with taken(tmp_path):
        pass


def _try_to_hold(folder, start, ended, answers):
    start.wait()
    try:
        with taken(folder):
            answers.put("held")
            ended.wait()
    except BnnfreeError as error:
        answers.put(str(error))


def test_of_many_that_start_together_one_holds(tmp_path):
    fork = multiprocessing.get_context("fork")
    start, ended, answers = fork.Event(), fork.Event(), fork.Queue()
    processes = [fork.Process(target=_try_to_hold, args=(tmp_path, start, ended, answers)) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    found = sorted(answers.get(timeout=60) for _ in processes)
    ended.set()
    for process in processes:
        process.join()
    assert found[0] == "held" and all("another training writes to it" in answer for answer in found[1:])


def test_torn_files_of_the_dead_are_deleted_and_those_of_the_living_are_not(tmp_path):
    process = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    dead, living = int(process.stdout), os.getppid()
    torn = [f".last.pt.{dead}.tmp", f".best.pt.{dead}.k3x_9.tmp", f".probe.png.{os.getpid()}.tmp"]
    kept = [f".last.pt.{living}.tmp", f".curves.png.{living}.ab12.tmp", f".notes.txt.{dead}.tmp", "last.pt.tmp"]
    for name in torn + kept:
        (tmp_path / name).touch()
    open_folder(tmp_path, False)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("place", ["file", "below", "/proc/none"])
def test_a_place_where_no_folder_can_be_is_one_line(tmp_path, place):
    (tmp_path / "file").touch()
    folder = {"file": tmp_path / "file", "below": tmp_path / "file" / "run"}.get(place, place)
    with pytest.raises(BnnfreeError, match="run folder .* cannot be written or read: ") as caught:
        train(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml", "result.json", "last.pt"])
def test_a_file_that_cannot_be_written_is_one_line_and_the_run_goes_on_later(tmp_path, monkeypatch, name):
    refused = os.replace

    def replace(source, target):
        if os.path.basename(target) == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return refused(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(BnnfreeError, match=f"{name}.* cannot be written.*: disk full") as caught:
            train(tmp_path / "run", "stages=[{epochs: 1}]")
    assert "\n" not in str(caught.value)
    begun = name != "recipe.yaml"  # which is the first of them
    assert train(tmp_path / "run", "stages=[{epochs: 1}]", resume=begun)["epochs"] == 1


def test_a_picture_that_cannot_be_drawn_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(report.Report, "draw", lambda self: 1 / 0)
    with pytest.warns(BnnfreeWarning, match=r"curves\.png: cannot be drawn \(division by zero\)"):
        train(tmp_path / "run", "stages=[{epochs: 1}]", curves=True)
    assert (tmp_path / "run" / "result.json").is_file()


def test_another_number_of_threads_is_said_on_resume(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        cut_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run")
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: before + 1)
    train(tmp_path / "run", resume=True, quiet=False)
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"threads: {before} -> {before + 1}: ") and "bits differ" in line for line in said)


def test_a_finished_run_goes_on_with_more_epochs(tmp_path, capsys):
    train(tmp_path / "run", "stages=[{epochs: 2}]")
    result = train(tmp_path / "run", "stages=[{epochs: 5}]", resume=True, quiet=False)
    said = capsys.readouterr().out.splitlines()
    assert result["epochs"] == 5
    lines = metrics_of(tmp_path / "run")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    train(tmp_path / "whole", "stages=[{epochs: 5}]")
    rates = [line["lr"] for line in metrics_of(tmp_path / "whole")]
    assert [line["lr"] for line in lines[2:]] == rates[2:] and lines[1]["lr"] < rates[1]
    assert any("goes on to 5 epochs: the learning rate is" in line for line in said)
    with pytest.raises(BnnfreeError, match=r"stages\.0\.epochs \(5 -> 4\)"):
        train(tmp_path / "run", "stages=[{epochs: 4}]", resume=True)


def test_the_lock_is_gone_after_an_error(tmp_path, monkeypatch):
    with pytest.raises(BnnfreeError, match="freeze: got"):
        train(tmp_path / "run", "freeze=['no.such.layer']")
    assert not (tmp_path / "run" / LOCK).exists()


# -- resuming, as a user meets it


def test_other_data_are_told_by_what_differs(tmp_path):
    train(tmp_path / "run", "stages=[{epochs: 1}]")
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    state["data"]["classes"][1], state["data"]["mean"] = "other", [0.25] * 3
    save_checkpoint(tmp_path / "run" / "last.pt", state)
    with pytest.raises(BnnfreeError, match=r"classes \(4 -> 4, such as 'other', 'class1'\); mean \(\[0\.25") as caught:
        train(tmp_path / "run", "stages=[{epochs: 1}]", resume=True)
    assert "\n" not in str(caught.value) and f"init={tmp_path / 'run'}" in str(caught.value)


def test_fewer_epochs_are_refused_with_what_can_be_done(tmp_path):
    train(tmp_path / "run", "stages=[{epochs: 2}]")
    with pytest.raises(BnnfreeError, match=r"stages\.0\.epochs \(2 -> 1\)\. More than 2 epochs go on") as caught:
        train(tmp_path / "run", "stages=[{epochs: 1}]", resume=True)
    assert f"tools/train.py {tmp_path / 'run'} --resume" in str(caught.value)


def test_the_course_of_a_grown_run_is_told_with_its_end(tmp_path, capsys):
    train(tmp_path / "run", "stages=[{epochs: 2}]")
    train(tmp_path / "run", "stages=[{epochs: 4}]", resume=True, quiet=False)
    said = capsys.readouterr().out
    rates = [line["lr"] for line in metrics_of(tmp_path / "run")]
    assert f"(linear): {rates[1]:.3g} -> " in said and f", and {rates[-1]:.3g} in the last step" in said
    table = [line.split() for line in said.splitlines() if line.startswith("latent")]
    assert table[0][3] == "0.004"  # the peak, as in the first training


@pytest.fixture
def long_run(tmp_path, tool):  # noqa: F811
    """A run of many overrides, and its folder's path."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**TINY, "stages": [{"epochs": 1}]}))
    overrides = ("seed=5", "model.width=0.25", "data.batch_size=20", "free.group=4", "optimizer.lr=1e-3")
    code, _, errors = tool("train", tmp_path / "r.yaml", *overrides, "--out", tmp_path / "run")
    assert code == 0, errors
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["", "recipe.yaml", "last.pt", "best.pt"])
def test_a_run_resumes_by_its_folder_alone_without_its_overrides(tool, long_run, name):  # noqa: F811
    code, printed, errors = tool("train", long_run / name, "--resume", "stages.0.epochs=2")
    assert code == 0 and printed.splitlines()[-1] == str(long_run), errors
    assert "goes on to 2 epochs" in printed
    code, _, errors = tool("train", long_run, "--resume", "seed=6")
    assert code == 2 and "seed (5 -> 6)" in errors


def test_what_cannot_be_resumed_names_the_runs_that_can(tool, long_run):  # noqa: F811
    for arguments, words in (
        ((long_run,), "holds a run already. Go on with --resume"),
        ((long_run / "recipe.yaml",), "holds a run already. Go on with --resume"),
        (
            (long_run.with_name("rum"), "--resume"),
            f"no such folder, expected one to go on with. Did you mean '{long_run}'?",
        ),
        ((long_run / "recipe.yaml", "--resume", "--out", long_run.with_name("x")), f"Runs there: {long_run}."),
    ):
        code, printed, errors = tool("train", *arguments)
        assert code == 2 and printed == "" and words in errors and len(errors.splitlines()) == 1, errors


# -- Ctrl-C

SLOW = """
import os, runpy, signal, sys, time
sys.path.insert(0, "tools")
where, sys.argv = sys.argv[1], sys.argv[2:]
from bnnfree.train import loop, report, run
def press(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)
if where == "data":
    run.load_data = press
else:
    loop.Stage._take_step = press
    report.Report.close = press if where == "twice" else report.Report.close
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts with & ignores it
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("where", ["data", "step", "twice"])
def test_ctrl_c_says_what_is_there_and_no_traceback(tmp_path, where):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(TINY))
    command = [sys.executable, "-c", SLOW, where, "tools/train.py", tmp_path / "r.yaml", "--out", tmp_path / "run"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr and "__del__" not in done.stderr, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == {
        "data": "interrupted; nothing was written yet; the same command begins anew",
        "step": "interrupted; there is no checkpoint yet; the run begins anew with: "
        f"python tools/train.py {tmp_path / 'run'} --resume",
        "twice": "interrupted twice: ended at once",
    }[where]  # fmt: skip
    assert ("--resume" in last) == (where == "step")
