"""A whole run: the stages of a recipe, one after the other, in one folder that can be resumed.

With several processes, process 0 alone reads and writes the folder, and tells the others what they need of it.
Imports torch, numpy, bnnfree.nn and its own room; the model builders are passed in.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bnnfree.data.datasets import Data, load_data
from bnnfree.errors import CheckpointError, one_line
from bnnfree.nn import BatchRenorm2d
from bnnfree.optim import describe_groups
from bnnfree.progress import Progress, say
from bnnfree.recipe.read import save_recipe
from bnnfree.recipe.resolve import left_open, resolve
from bnnfree.recipe.schema import Recipe
from bnnfree.train import dist as processes
from bnnfree.train.checkpoint import (
    Builders,
    build_model,
    load_weights,
    open_checkpoint,
    origin,
    save_checkpoint,
)
from bnnfree.train.dist import Dist
from bnnfree.train.doubts import doubts
from bnnfree.train.evaluation import evaluate
from bnnfree.train.loop import Stage
from bnnfree.train.process_settings import settings
from bnnfree.train.report import Report, machine, write_json
from bnnfree.train.resume import MAY_CHANGE, check_images, other_bits, resume_recipe
from bnnfree.train.run_folder import open_folder, taken, writing
from bnnfree.train.start import find_weights, freeze, open_weights, take_weights
from bnnfree.train.teacher import load_teacher

__all__ = ["MAY_CHANGE", "Run", "fit", "load_teacher"]


class Run:
    """A recipe on its way to a result in `folder`."""

    def __init__(
        self,
        recipe: Recipe,
        builders: Builders,
        folder: Path,
        data: Data,
        dist: Dist,
        resumed: dict[str, Any] | None = None,
    ):
        """`resumed`: what last.pt of the run holds, None at its start."""
        self.builders, self.folder, self.data, self.dist = builders, folder, data, dist
        self.data_info: dict[str, Any] = {
            "classes": list(data.classes),
            "channels": data.channels,
            "image_size": list(data.image_size),
            "mean": list(data.mean),
            "std": list(data.std),
        }
        self.listing = data.listing()
        self.origin = origin()
        self.best: dict[str, Any] = {"top1": None, "epoch": 0}  # top1: of validation; None without
        self.seconds = 0.0
        self.resumed = resumed
        self.init = None
        self.grown = False  # the last stage has more epochs than the run that is resumed
        self.lines = [data.describe()]  # to be printed before training
        if resumed is None:
            self.recipe, self.open = resolve(recipe, self.data_info), left_open(recipe)
        else:
            self.recipe, self.grown = resume_recipe(resumed, recipe, builders, self.data_info, folder)
            check_images(resumed.get("listing", self.listing), self.listing, folder)
            self.open, self.init = resumed["open"], resumed.get("init")
            self.lines += other_bits(resumed)
        self.stage = self._start_stage(0, None)

    def _binarize(self, index: int) -> str:
        """The parts that are 1 bit in a stage."""
        return self.recipe.stages[index].binarize or self.recipe.model.binarize

    def _start_stage(self, index: int, weights) -> Stage:
        torch.manual_seed(self.recipe.seed + index)
        model = build_model(self.recipe, self.builders, self.data_info, self._binarize(index))
        kept: frozenset[str] = frozenset()
        if weights is not None:
            load_weights(model, weights, f"stage {index} taking over from stage {index - 1}")
            if self._binarize(index) == self._binarize(index - 1):
                frozen = set(freeze(model, self.recipe.freeze))
                kept = frozenset(name for name, module in model.named_modules() if module in frozen)
        elif self.recipe.init is not None and self.resumed is None:
            source = self.recipe.init
            state = self.dist.together(lambda: open_weights(source, self.builders))
            taken = take_weights(model, state, source, self._binarize(index))
            self.init, kept = {**taken.record(), "origin": state["origin"]}, taken.whole
            self.lines += taken.describe()
        data = self.data.resized(self.recipe.stages[index].image_size)
        stage = Stage(self.recipe, index, model, data, self.dist, self._teacher(), kept)
        self.renorm = any(isinstance(module, BatchRenorm2d) for module in model.modules())
        return stage

    def _teacher(self) -> nn.Module | None:
        if self.recipe.loss.teacher is None or self.recipe.loss.name != "distribution":
            return None
        teacher = load_teacher(self.recipe.loss.teacher, self.builders, self.data)
        return teacher.to(self.dist.device).to(memory_format=torch.channels_last)

    def state(self) -> dict[str, Any]:
        """Contents of last.pt. With several processes all call it at the same time and hold the same."""
        recipe = self.recipe
        return {
            **self.stage.state(),
            "recipe": recipe.model_dump(),
            "open": self.open,
            "init": self.init,
            "threads": torch.get_num_threads(),
            "binarize": self._binarize(self.stage.index),
            "data": self.data_info,
            "listing": self.listing,
            "origin": self.origin,
            "history": self.report.history,
            "best": self.best,
            "seconds": self.seconds + time.monotonic() - self.started,
            "rng": torch.get_rng_state(),
            "cuda_rng": [torch.cuda.get_rng_state(self.dist.device)] if self.dist.device.type == "cuda" else [],
            "process_sums": self.dist.gather(self.stage.sums),
        }

    def load(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        """Go back to where last.pt was written; returns the metrics up to there. Errors: CheckpointError."""
        try:
            return self._load(state)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().split("\n")[0][:120]
            raise CheckpointError(
                f"checkpoint {self.folder / 'last.pt'}: does not fit the training of its recipe ({reason})."
            ) from None

    def _load(self, state: dict[str, Any]) -> list[dict[str, Any]]:
        sums = state.get("process_sums", state["sums"][None])
        if len(sums) != self.dist.world:
            self._check_world(len(sums))
            sums = torch.cat([sums.sum(0, keepdim=True), sums.new_zeros(self.dist.world - 1, *sums.shape[1:])])
        if state["stage"] != self.stage.index:
            self.stage = self._start_stage(state["stage"], state["model"])
        self.stage.load({**state, "sums": sums[self.dist.rank]})
        self.best, self.seconds = state["best"], state["seconds"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and self.dist.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"][0], self.dist.device)
        if self.grown:
            if self.dist.main:
                (self.folder / "result.json").unlink(missing_ok=True)  # it is not over
            self.lines.append(
                f"stage {self.stage.index} goes on to {self.stage.epochs} epochs: the learning rate is what it would "
                f"be there in a stage of as many ({self.recipe.schedule.name}): {state['history'][-1]['lr']:.3g} -> "
                f"{self.stage.next_lr():.3g}, and {self.stage.last_lr():.3g} in the last step"
                if state["history"]
                else f"stage {self.stage.index} goes on to {self.stage.epochs} epochs"
            )
        return state["history"]

    def _check_world(self, was: int) -> None:
        """May a run of `was` processes go on in as many as there are now? Where that is the same mathematics."""
        now, batch = self.dist.world, self.recipe.data.batch_size
        steps = [self.data.train.train_steps(batch, world) for world in (was, now)]
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.stage.model.modules()):
            reason = f"norm {self.recipe.model.norm!r} has statistics of one process's images"
        elif steps[0] != steps[1]:
            reason = f"an epoch of {len(self.data.train)} images would have {steps[1]} batches and not {steps[0]}"
        else:
            return
        raise CheckpointError(
            f"run folder {self.folder}: got {now} processes, expected the {was} it was trained by: {reason}. "
            f"Start with torchrun --nproc_per_node {was}, or train into another --out."
        )

    def train(self, quiet: bool = False, curves: bool = True) -> dict[str, Any]:
        """Run every stage that is left, choose the best epoch, test it. Returns what result.json holds."""
        history = [] if self.resumed is None else self.load(self.resumed)
        if self.dist.main:  # Why after: a recipe that is refused must not take the place of the run's own
            save_recipe(self.recipe, self.folder / "recipe.yaml")
        self.started, self.hidden = time.monotonic(), quiet or not self.dist.main
        self.report = Report(self.folder, history, curves) if self.dist.main else _Silent(history)
        try:
            self._say(*self.lines)
            self._warn()
            self._describe(plan=True)
            with self._bar() as self.bar:
                if self.resumed is None:
                    self.stage.calibrate()
                while True:
                    self._train_stage()
                    following = self.stage.index + 1
                    if following == len(self.recipe.stages):
                        break
                    self.dist.same_buffers(self.stage.evaluated)
                    self.stage = self._start_stage(following, self.stage.evaluated.state_dict())
                    self.stage.calibrate()
                    self._describe()
        finally:
            self.report.close()
        return self._finish()

    def _bar(self) -> Progress:
        steps = sum(stage.epochs for stage in self.recipe.stages) * self.stage.steps
        done = (self.stage.first_epoch + self.stage.epoch) * self.stage.steps + self.stage.step
        return Progress(steps, "training", "steps", done=done, hidden=self.hidden)

    def _warn(self) -> None:
        """Say what the recipe will not do on these data; in a log too, where all else is quiet."""
        validation = 0 if self.data.val is None else len(self.data.val)
        for doubt in doubts(self.recipe, self.stage.steps, validation) if self.dist.main else ():
            say(one_line(f"warning: {doubt}."), file=sys.stderr)

    def _say(self, *lines: str) -> None:
        """Print each as one line, above the progress bar."""
        if not self.hidden:
            say("\n".join(map(one_line, lines)))

    def _describe(self, plan: bool = False) -> None:
        """Say what the stage is; with `plan` those that follow first."""
        first = self.stage.index
        heads = [
            f"stage {index} ({stage.name}): {stage.epochs} epochs, 1-bit: {self._binarize(index)}"
            for index, stage in enumerate(self.recipe.stages)
            if index == first or plan and index > first
        ]
        self._say(*heads, f"speed: {self.stage.speed}", *describe_groups(self.stage.groups).splitlines())

    def _train_stage(self) -> None:
        stage, last_stage = self.stage, self.stage.index + 1 == len(self.recipe.stages)
        saved = time.monotonic()

        def after_step() -> None:
            nonlocal saved
            self.bar.update()
            self._between_steps()
            if stage.step < stage.steps and self._due(time.monotonic() - saved):
                self._save("last.pt")
                saved = time.monotonic()

        while stage.epoch < stage.epochs:
            start, first_step = time.monotonic(), stage.step
            self._between_steps()
            metrics = stage.train_epoch(after_step)
            seconds = time.monotonic() - start
            metrics["seconds"] = seconds
            metrics["images_per_second"] = len(self.data.train) * (1 - first_step / stage.steps) / seconds
            with stage.settled():
                if stage.data.val is not None:
                    val = evaluate(stage.evaluated, stage.data.val, self.dist, precision=self.recipe.precision)
                    metrics |= {"val_loss": val["loss"], "val_top1": val["top1"]}
                self.report.add(metrics)
                shown = {key: metrics[key] for key in ("stage", "epoch")}
                shown |= {key: f"{metrics[key]:.2f}" for key in ("loss", "top1", "val_top1") if key in metrics}
                self.bar.note(shown)
                top1, best = metrics.get("val_top1"), self.best["top1"]
                # without validation images the last epoch is the best
                if last_stage and (top1 is None or best is None or top1 > best):
                    self.best = {"top1": top1, "epoch": metrics["epoch"]}
                    self._save("best.pt", optimizers=[], signs={}, probe=None)
            self._save("last.pt")

    def _save(self, name: str, **instead: Any) -> None:
        state = self.state() | instead
        if self.dist.main:
            save_checkpoint(self.folder / name, state)

    def _due(self, seconds: float) -> bool:
        """Is it time for a checkpoint, so long after the last? Process 0's clock decides for all."""
        due = seconds > 60 * self.recipe.checkpoint_minutes
        if self.dist.world == 1:
            return due
        if self.dist.device.type == "cuda" and self.stage.step % 50:
            return False  # Why: the answer would make every step wait for the device
        return self.dist.decide(due)

    def _between_steps(self) -> None:
        """With several processes: give each the random state that belongs to the step and to the process.

        So none draws what another draws, and a run that goes on from process 0's checkpoint draws what it would have.
        """
        if self.dist.world == 1:
            return
        stage = self.stage
        place = [self.recipe.seed, stage.first_epoch + stage.epoch, stage.step, self.dist.rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        if self.renorm:  # trains with running statistics, which differ
            self.dist.same_buffers(stage.model)

    def _open_best(self) -> dict[str, Any]:
        """The checkpoint to be tested: best.pt, or where that was deleted last.pt."""
        try:
            best = open_checkpoint(self.folder)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} Delete it, then --resume tests the weights of the last epoch, those of last.pt."
            ) from None
        if not (self.folder / "best.pt").is_file():
            self.best = {"top1": self.report.history[-1].get("val_top1", -1.0), "epoch": len(self.report.history)}
        return best

    def _finish(self) -> dict[str, Any]:
        best = self.dist.tell(self._open_best)
        model = self.stage.evaluated
        load_weights(model, best["ema"] or best["model"], f"checkpoint {self.folder / 'best.pt'}")
        test = evaluate(model, self.data.test, self.dist, precision=self.recipe.precision)
        result = {
            "test_top1": test["top1"],
            "test_top5": test["top5"],
            "test_loss": test["loss"],
            "val_top1": self.best["top1"],
            "best_epoch": self.best["epoch"],
            "epochs": sum(stage.epochs for stage in self.recipe.stages),
            "train_images": len(self.data.train),
            "test_images": len(self.data.test),
            "skipped_images": self.data.skipped,
            "seconds": self.seconds + time.monotonic() - self.started,
            "seed": self.recipe.seed,
            "model": self.recipe.model.model_dump(),
            "init": self.init,
            "processes": self.dist.world,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if self.dist.device.type == "cuda" else "cpu",
            "machine": machine(),
            "origin": self.origin,
        }
        if self.dist.main:
            write_json(self.folder / "result.json", result)
        return result


class _Silent:
    """The report of a process that is not the main one."""

    def __init__(self, history: list[dict[str, Any]]):
        self.history = history

    def add(self, metrics: dict[str, Any]) -> None:
        self.history.append(metrics)

    def close(self) -> None:
        pass


def fit(
    recipe: Recipe,
    builders: Builders,
    folder: str | Path,
    *,
    resume: bool = False,
    where: str = "data",
    quiet: bool = False,
    curves: bool = True,
) -> dict[str, Any]:
    """Train `recipe` into `folder` and return its result: the whole job of tools/train.py.

    folder receives recipe.yaml (resolved), metrics.jsonl (a line per epoch), where `curves` curves.png (and probe.png
    of a recipe that probes), last.pt (to resume from), best.pt (by validation accuracy in the last stage) and
    result.json (accuracy on the test split, looked at once, at the end). A folder with a run in it is refused unless
    `resume`, and one without a run if `resume`. That goes on from last.pt and, deterministic, ends with the same bits
    as a run that was never stopped. So does, by itself, what torchrun restarts. Under torchrun only process 0 needs the
    folder; each process needs the data.
    """
    folder = Path(folder)
    try:
        with settings(recipe.deterministic), ExitStack() as held:

            def take() -> dict[str, Any] | None:
                held.enter_context(taken(folder))
                return open_folder(folder, resume)

            dist = processes.start(recipe.device)
            state = dist.tell(take)
            if recipe.init is not None and state is None:
                find_weights(recipe.init)  # Why here: its error should not wait for the data
            data = dist.together(lambda: load_data(recipe.data, where=where))
            run = Run(recipe, builders, folder, data, dist, state)
            with writing(folder):
                return run.train(quiet, curves)
    finally:
        processes.stop()
