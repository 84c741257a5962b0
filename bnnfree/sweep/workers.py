"""Several trainings at once, each in a process of its own that goes on to the next: the machinery of a sweep.

A worker is a command that calls `serve`: it reads jobs from its input, a line of JSON each, trains, and answers each
with a line. It ends when its input ends, so that none outlives the sweep. Why processes that stay: to import torch
takes seconds, as long as a small run. Imports torch and its own room; the model builders are passed in.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bnnfree.errors import BnnfreeError
from bnnfree.sweep.run_folder import FAILURE
from bnnfree.train.checkpoint import Builders
from bnnfree.train.loop import TrainingError
from bnnfree.train.networks import parse_recipe
from bnnfree.train.report import write_json
from bnnfree.train.run import fit


@dataclass(frozen=True)
class Job:
    """A run to train: its resolved recipe as plain data, and its folder."""

    name: str
    recipe: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Place:
    """Device of a worker (None: as the recipe says) and changes to its environment."""

    device: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def serve(builders: Builders) -> None:
    """The worker's side; returns never."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # Why: what a run prints must not pass for an answer
        jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
        while True:
            job = jobs.get()
            train_one(job["recipe"], builders, Path(job["folder"]))
            print("done", file=answers, flush=True)


def _listen(jobs: queue.SimpleQueue) -> None:
    for line in sys.stdin:
        jobs.put(json.loads(line))
    os._exit(0)  # the sweep has ended, or is gone: what is being trained goes on from its checkpoint another time


def train_one(recipe: dict[str, Any], builders: Builders, folder: Path) -> None:
    """Train, or go on training; leaves result.json or FAILURE. A finished run keeps its best.pt alone, and
    has no curves.png: tools/compare.py draws curves from metrics.jsonl."""
    torch.compiler.reset()  # Why: what was compiled for runs before counts towards a limit
    try:
        wanted = parse_recipe(recipe, f"run {folder.name}", builders)
        fit(wanted, builders, folder, resume=(folder / "recipe.yaml").exists(), quiet=True, curves=False)
    except BnnfreeError as error:
        fail(folder, str(error), diverged=isinstance(error, TrainingError))
    except Exception as error:  # a sweep goes on whatever happens to one of its runs
        said = " ".join(str(error).split())
        fail(folder, f"{type(error).__name__}: {said}", traceback.format_exc())
    else:
        (folder / FAILURE).unlink(missing_ok=True)
        (folder / "last.pt").unlink(missing_ok=True)


def fail(folder: Path, error: str, trace: str = "", diverged: bool = False) -> None:
    """Record that a run has failed."""
    write_json(folder / FAILURE, {"error": error, "diverged": diverged, "traceback": trace})


def run_all(jobs: list[Job], command: list[str], places: list[Place], log: Path) -> Iterator[Job]:
    """Train `jobs` in order, one at a time in each of `places`; yields each when its folder holds what became of it.

    command: what starts a worker. What workers say goes to log/worker<n>.txt. A worker that dies takes only its run
    with it. Leaving the loop early, by an error or Ctrl-C, ends the workers.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    over: queue.SimpleQueue[Job] = queue.SimpleQueue()
    lines = [_Line(waiting, over, command, place, log / f"worker{i}.txt") for i, place in enumerate(places)]
    try:
        for line in lines:
            line.start()
        for _ in jobs:
            while True:
                try:
                    yield over.get(timeout=0.5)  # Why a time: a thread that waits for ever does not see Ctrl-C
                    break
                except queue.Empty:
                    if not any(line.is_alive() for line in lines) and over.empty():
                        raise BnnfreeError(f"sweep: its workers cannot be started; see {log}.") from None
    finally:
        for line in lines:
            line.stop()


class _Line(threading.Thread):
    """One worker after the other in one place, fed from `waiting`."""

    def __init__(self, waiting, over, command: list[str], place: Place, log: Path):
        super().__init__(daemon=True)
        self.waiting, self.over, self.command, self.place, self.log = waiting, over, command, place, log
        self.process: subprocess.Popen[str] | None = None
        self.stopped = False

    def run(self) -> None:
        while not self.stopped:
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                break
            recipe = job.recipe if self.place.device is None else {**job.recipe, "device": self.place.device}
            if not self._ask({"recipe": recipe, "folder": str(job.folder)}):
                if self.stopped:
                    return
                assert self.process is not None
                code = self.process.wait()
                said = f"signal {-code}. Too little memory?" if code < 0 else f"exit code {code}."
                fail(job.folder, f"its process ended by {said} See {self.log.name}.")
                self.process = None
            self.over.put(job)
        self.stop()

    def _ask(self, job: dict[str, Any]) -> bool:
        """Give the worker a job and wait for its answer; False: it has died."""
        if self.process is None:
            self._begin()
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            return bool(self.process.stdout.readline())
        except (OSError, ValueError):  # a broken pipe; one that `stop` has closed
            return False

    def _begin(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self.place.environment},
                start_new_session=True,  # Why: Ctrl-C is for the sweep, which then ends its workers
            )

    def stop(self) -> None:
        """End the worker; one that does not go by itself within seconds is killed."""
        self.stopped = True
        process = self.process
        if process is None or process.stdin is None:
            return
        try:
            process.stdin.close()
        except OSError:
            pass
        deadline = time.monotonic() + 5
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if process.poll() is None:
            process.kill()
        process.wait()


def places_of(devices: list[str], jobs: int, threads: int) -> list[Place]:
    """`jobs` places, spread over `devices` (cpu, cuda:0, ...; none: as each recipe says), `threads` of the CPU each.

    Errors: a device that is neither cpu nor cuda:NUMBER.
    """
    common = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if not devices:
        return [Place(None, common)] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    places = []
    for device in devices:
        kind, _, number = device.partition(":")
        if device != "cpu" and (kind != "cuda" or not number.isdecimal()):
            raise BnnfreeError(f"--devices: got {device!r}, expected cpu or cuda:0, cuda:1 and so on.")
        if device == "cpu":
            places.append(Place("cpu", common))
            continue
        names = visible.split(",") if visible else None
        if names is not None and int(number) >= len(names):
            raise BnnfreeError(f"--devices: got {device!r}, but CUDA_VISIBLE_DEVICES has {len(names)} devices.")
        name = names[int(number)] if names else number
        places.append(Place("cuda", {**common, "CUDA_VISIBLE_DEVICES": name}))
    return [places[i % len(places)] for i in range(jobs)]
