"""What a run leaves beside its weights: metrics.jsonl, curves.png, result.json, TensorBoard if installed.

Imports matplotlib and tensorboard lazily, bnnfree.files; no torch beyond that.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

from bnnfree.files import replacing

DRAW_SECONDS = 60  # between two drawings of curves.png; the last epoch is always drawn
SCALARS = ("loss", "top1", "val_loss", "val_top1", "lr", "images_per_second")


def machine() -> dict[str, Any]:
    """Processor, cores and system that a number was measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return {"processor": name, "cores": os.cpu_count(), "system": platform.system()}


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class Report:
    """The metrics of a run: a line per epoch in metrics.jsonl, curves.png, TensorBoard events if installed.

    curves: False leaves out curves.png, which takes as long as training a second or two.
    """

    def __init__(self, folder: str | Path, history: list[dict[str, Any]], curves: bool = True):
        self.folder = Path(folder)
        self.history = history
        self.curves = curves
        self._drawn = -math.inf
        self._write_history()
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=len(history))

    def add(self, metrics: dict[str, Any]) -> None:
        """One epoch."""
        self.history.append(metrics)
        self._write_history()
        if self.curves and time.monotonic() - self._drawn > DRAW_SECONDS:
            self.draw()
        if self.board is not None:
            for key in SCALARS:
                if metrics.get(key) is not None:
                    self.board.add_scalar(key, metrics[key], len(self.history))
            for key in ("flips", "agc_rate"):
                for layer, value in metrics.get(key, {}).items():
                    self.board.add_scalar(f"{key}/{layer}", value, len(self.history))
            self.board.flush()

    def close(self) -> None:
        """No more epochs: draw the curves a last time."""
        if self.curves and self.history:
            self.draw()
        if self.board is not None:
            self.board.close()

    def _write_history(self) -> None:
        with replacing(self.folder / "metrics.jsonl") as temporary:
            text = "".join(json.dumps(line) + "\n" for line in self.history)
            temporary.write_text(text, encoding="utf-8")

    def draw(self) -> None:
        """curves.png: loss, accuracy, learning rate and flips over epochs, stages marked."""
        import matplotlib

        self._drawn = time.monotonic()
        matplotlib.use("Agg")
        from matplotlib import pyplot

        epochs = range(1, len(self.history) + 1)
        figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), sharex=True, layout="constrained")
        panels = {
            "loss": ("loss", "val_loss"),
            "accuracy (%)": ("top1", "val_top1"),
            "learning rate": ("lr",),
        }
        for axis, (title, keys) in zip(axes.flat, panels.items(), strict=False):
            for key in keys:
                points = [(e, m[key]) for e, m in zip(epochs, self.history, strict=True) if m.get(key) is not None]
                if points:
                    name = "validation" if key.startswith("val") else "training"
                    axis.plot(*zip(*points, strict=True), marker=".", label=name)
            axis.set_title(title)
            if len(keys) > 1:
                axis.legend()
        flips = axes.flat[-1]
        layers = list(self.history[-1].get("flips", {}))
        for i, layer in enumerate(layers):
            shade = str(0.75 * i / max(1, len(layers) - 1))
            flips.plot(epochs, [100 * m.get("flips", {}).get(layer, float("nan")) for m in self.history], color=shade)
        flips.set_title("weight signs changed (%), first layer dark")
        for axis in axes.flat:
            for e in range(1, len(self.history)):
                if self.history[e]["stage"] != self.history[e - 1]["stage"]:
                    axis.axvline(e + 0.5, color="tab:red", linewidth=0.8)
        for axis in axes[1]:
            axis.set_xlabel("epoch (red: a new stage)")
        with replacing(self.folder / "curves.png") as temporary:
            figure.savefig(temporary, format="png", dpi=110)
        pyplot.close(figure)
