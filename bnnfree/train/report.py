"""Files of a run beside its weights: metrics.jsonl, curves.png, probe.png, result.json, TensorBoard if installed.

Imports matplotlib and tensorboard lazily, bnnfree.files; no torch beyond that.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnnfree.errors import BnnfreeWarning
from bnnfree.files import replacing

DRAW_SECONDS = 60  # between two drawings of curves.png; the last epoch is always drawn
SCALARS = ("loss", "top1", "val_loss", "val_top1", "lr", "images_per_second")
PROBED = {  # numbers of bnnfree.analysis.probe.LayerProbe in probe.png -> their titles there
    "pre_sign_std": "deviation before the sign (dotted: expected)",
    "in_window": "share in the estimator's window",
    "imbalance": "imbalance of bits",
    "constant": "constant share of power",
    "output_std": "output's deviation / its constant",
    "flips": "weight bits flipped",
    "gradient": "gradient / latents, norms",
    "cosine": "cosine, STE and smooth gradient",
}
LOGARITHMIC = ("pre_sign_std", "output_std", "gradient")
TIMES = 7  # lines of probe.png, at most


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

    Epochs with probes make probe.png, drawn with curves.png.
    curves: False leaves out both, which take as long as training a second or two.
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
            self._try_to_draw()
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
            self._try_to_draw()
        if self.board is not None:
            self.board.close()

    def _write_history(self) -> None:
        with replacing(self.folder / "metrics.jsonl") as temporary:
            text = "".join(json.dumps(line) + "\n" for line in self.history)
            temporary.write_text(text, encoding="utf-8")

    def _try_to_draw(self) -> None:
        """`draw`; what goes wrong there, in a library or on the disk, is a warning: no picture is worth a training."""
        try:
            self.draw()
        except Exception as error:
            reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
            warnings.warn(f"{self.folder / 'curves.png'}: cannot be drawn ({reason}).", BnnfreeWarning, stacklevel=2)

    def draw(self) -> None:
        """curves.png: loss, accuracy, learning rate and flips over epochs, stages marked; probe.png (draw_probes)."""
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
        if records := [record for metrics in self.history for record in metrics.get("probe", ())]:
            draw_probes(self.folder / "probe.png", {self.folder.resolve().name: records})


def draw_probes(path: str | Path, networks: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The numbers of PROBED by depth, from image to classes: a line per probe, dark at first and bright at last.

    networks: name -> records {"step", "layers"}, in order; of many, TIMES that are evenly spaced are drawn. One
    network fills two rows of panels; several have a row each, with the same axes. Dotted: expected_std, of the last
    probe. Axes of LOGARITHMIC are so where the largest value is ten times the smallest.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shape = (2, 4) if len(networks) == 1 else (len(networks), len(PROBED))
    size = ((3.4 if len(networks) == 1 else 2.9) * shape[1], 3 * shape[0] + 0.6)
    figure, axes = pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    rows = [list(axes.flat)] if len(networks) == 1 else [list(row) for row in axes]
    for i, (row, (name, records)) in enumerate(zip(rows, networks.items(), strict=True)):
        for axis, (key, title) in zip(row, PROBED.items(), strict=True):
            _draw_number(axis, key, _chosen(records))
            axis.set_title(title if i == 0 else "", fontsize=9)
        first, last = (record["step"] for record in (records[0], records[-1]))
        steps = "" if last is None or len(records) < 2 else f"steps {first:,} to {last:,}"
        row[0].set_ylabel("\n".join(filter(None, (name, steps))) if len(networks) > 1 else "")
        if len(networks) == 1:
            figure.suptitle(", ".join(filter(None, (name, steps))))
    for column in range(len(PROBED)):
        _same_axes([row[column] for row in rows], log=list(PROBED)[column] in LOGARITHMIC)
    for axis in axes[-1]:
        axis.set_xlabel("binary layer, from image to classes")
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), _COLOURS)
    bar = figure.colorbar(scale, ax=axes, ticks=[0, _LAST], fraction=0.02, pad=0.01)
    bar.ax.set(ylim=(0, _LAST), yticklabels=["first probe", "last probe"])
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


_COLOURS, _LAST = "plasma", 0.9  # Why not to its end: that is too light for a line


def _chosen(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """TIMES of the records, the first and the last among them."""
    if len(records) <= TIMES:
        return list(records)
    return [records[round(i * (len(records) - 1) / (TIMES - 1))] for i in range(TIMES)]


def _draw_number(axis: Any, key: str, records: Sequence[Mapping[str, Any]]) -> None:
    import matplotlib

    colours = matplotlib.colormaps[_COLOURS]
    for i, record in enumerate(records):
        values = [_number(layer[key]) for layer in record["layers"]]
        colour = colours(_LAST * i / max(1, len(records) - 1))
        axis.plot(range(1, len(values) + 1), values, color=colour, marker=".")
    if key == "pre_sign_std":
        expected = [_number(layer["expected_std"]) for layer in records[-1]["layers"]]
        axis.plot(range(1, len(expected) + 1), expected, color="black", linestyle=":")


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _same_axes(axes: Sequence[Any], log: bool) -> None:
    """Give panels of one number the same limits, of all that is drawn in them."""
    lines = [line for axis in axes for line in axis.lines]
    values = [y for line in lines for y in line.get_ydata() if math.isfinite(y)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xlim(0.5, max(len(line.get_ydata()) for line in lines) + 0.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        if not values:
            axis.text(0.5, 0.5, "nothing to measure", transform=axis.transAxes, ha="center", color="gray")
            continue
        low, high = min(values), max(values)
        if log and low > 0 and high >= 10 * low:
            axis.set_yscale("log")
            axis.minorticks_off()
            decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            ticks = [m * 10.0**k for k in decades for m in (1, 2, 5)]
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_ylim(low / 1.2, high * 1.2)
        else:
            margin = 0.05 * (high - low) or 0.05
            axis.set_ylim(low - margin, high + margin)
