"""A run folder belongs to one training at a time, and what the system refuses there is one line."""

import errno
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, cut_at, metrics_of, train

from bnnfree.errors import BnnfreeError, BnnfreeWarning
from bnnfree.train import report
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
