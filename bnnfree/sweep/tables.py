"""Entries (rows of runs) as Markdown, CSV and pictures. Imports matplotlib lazily and its own room."""

from __future__ import annotations

import csv
import io
import itertools
import math
from pathlib import Path
from typing import Any

from bnnfree.errors import one_line
from bnnfree.files import replacing
from bnnfree.sweep.grid import Axis, short
from bnnfree.sweep.run_folder import Entry

FIGURES = {"test_top1": 2, "val_top1": 2, "test_loss": 3, "minutes": 1}  # figure -> decimals
TITLES = {
    "test_top1": "test top-1, %",
    "val_top1": "validation top-1, %",
    "test_loss": "test loss",
    "top1": "training top-1, %",
    "val_loss": "validation loss",
    "loss": "training loss",
}
MARKS = "osD^vP*X<>hd"
LEGEND = 24  # more lines than these have no legend


def cell(entry: Entry, figure: str, decimals: int) -> str:
    """`mean ± deviation`, the mean alone of one run, nothing of none."""
    mean, deviation = entry.mean(figure), entry.deviation(figure)
    if mean is None:
        return ""
    return f"{mean:.{decimals}f}" + ("" if deviation is None else f" ± {deviation:.{decimals}f}")


def sweep_rows(entries: list[Entry], axes: list[str]) -> list[list[str]]:
    """Head and a row per point: its labels, its figures, how many runs are behind them."""
    shorts = [short(axis) for axis in axes]
    labels = [name if shorts.count(name) == 1 else axis for axis, name in zip(axes, shorts, strict=True)]
    rows = [labels + [TITLES.get(name, name) for name in FIGURES] + ["runs"]]
    for entry in entries:
        cells = [cell(entry, name, decimals) for name, decimals in FIGURES.items()]
        rows.append([*(entry.point[axis] for axis in axes), *cells, entry.runs])
    return rows


def markdown(rows: list[list[str]], left: int = 1) -> str:
    """A table that is aligned as text, too; the first `left` columns to the left, others to the right."""
    rows = [[one_line(text.replace("\n", " ")).replace("|", "\\|") for text in row] for row in rows]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [t.ljust(w) if i < left else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|".join(f" {'-' * w} " if i < left else f" {'-' * (w - 1)}: " for i, w in enumerate(widths))
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


def sweep_csv(entries: list[Entry], axes: list[str]) -> str:
    """The same in full precision: mean and deviation in columns of their own, then counts and the first error."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    columns = [f"{name}_{part}" for name in FIGURES for part in ("mean", "deviation")]
    writer.writerow([*axes, *columns, "runs", "done", "diverged", "failed", "error"])
    for entry in entries:
        values: list[Any] = [entry.point[axis] for axis in axes]
        for name in FIGURES:
            values += [entry.mean(name), entry.deviation(name)]
        values += [len(entry.outcomes), *(entry.count(state) for state in ("done", "diverged", "failed"))]  # type: ignore[arg-type]
        errors = [run.error for run in entry.outcomes if run.error]
        writer.writerow([*values, *(errors[:1] or [""])])
    return out.getvalue()


def choose_x(axes: list[Axis], wanted: str | None) -> Axis:
    """The axis along the picture: the one wanted, else the longest of numbers, else the longest."""
    if wanted is not None:
        return next(axis for axis in axes if axis.name == wanted)
    numeric = [axis for axis in axes if sum(axis.number(label) is not None for label in axis.points) > 1]
    return max(numeric or axes, key=lambda axis: len(axis.points))


def draw_sweep(path: Path, entries: list[Entry], axes: list[Axis], x: str | None, title: str) -> None:
    """A line of means with error bars (deviation over seeds) for each combination of the other axes.

    Numbers along x, on a log scale where the largest is 4 times the smallest or more; a value that is no number is a
    dotted line across. Other labels stand below each other, figures to the right.
    """
    along = choose_x(axes, x)
    groups: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        rest = ", ".join(label for axis, label in entry.point.items() if axis != along.name)
        groups.setdefault(rest, {})[entry.point[along.name]] = entry
    with _Picture(path, title) as axis:
        numbers = {label: number for label in along.points if (number := along.number(label)) is not None}
        if len(numbers) < 2:
            _dots(axis, along, groups)
        else:
            _lines(axis, along, groups, numbers)


class _Picture:
    """A figure of one panel, saved when the block ends well."""

    def __init__(self, path: Path, title: str):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        self.path, self.pyplot = path, pyplot
        self.figure, self.axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
        self.axis.set_title(title)
        self.axis.grid(alpha=0.3)

    def __enter__(self):
        return self.axis

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            count = len(self.axis.get_legend_handles_labels()[1])
            if 1 < count <= LEGEND:
                outside = count > 6
                self.axis.legend(**({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if outside else {}))
            with replacing(self.path) as temporary:
                self.figure.savefig(temporary, format="png", dpi=110)
        self.pyplot.close(self.figure)


def _styles(count: int):
    """Colour and mark of each line; all differ."""
    for i in range(count):
        yield {"color": f"C{i % 10}", "marker": MARKS[i // 10 % len(MARKS)], "linestyle": ("-", "--")[i // 10 % 2]}


def _lines(axis, along: Axis, groups: dict[str, dict[str, Entry]], numbers: dict[str, float]) -> None:
    order = sorted(numbers, key=numbers.__getitem__)
    for (name, row), style in zip(groups.items(), _styles(len(groups)), strict=True):
        points = [
            (numbers[label], *_bar(row[label])) for label in order if label in row and row[label].values("test_top1")
        ]
        if points:
            xs, means, deviations = zip(*points, strict=True)
            axis.errorbar(xs, means, yerr=deviations, label=name or None, capsize=3, **style)
        for label, entry in row.items():
            if label not in numbers and entry.values("test_top1"):
                text = f"{name}: {short(along.name)} {label}".removeprefix(": ")
                axis.axhline(entry.mean("test_top1"), color=style["color"], linestyle=":", label=text)
    values = sorted(numbers.values())
    if values[0] > 0 and values[-1] >= 4 * values[0]:
        axis.set_xscale("log")
        axis.set_xticks(values, [f"{value:g}" for value in values])
        axis.minorticks_off()
    axis.set_xlabel(along.name)
    axis.set_ylabel(TITLES["test_top1"])


def _dots(axis, along: Axis, groups: dict[str, dict[str, Entry]]) -> None:
    labels = list(along.points)
    for (name, row), style in zip(groups.items(), _styles(len(groups)), strict=True):
        points = [(labels.index(label), *_bar(entry)) for label, entry in row.items() if entry.values("test_top1")]
        if points:
            ys, means, deviations = zip(*points, strict=True)
            axis.errorbar(means, ys, xerr=deviations, label=name or None, capsize=3, **{**style, "linestyle": ""})
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel(TITLES["test_top1"])


def _bar(entry: Entry) -> tuple[float, float]:
    mean = entry.mean("test_top1")
    return (math.nan if mean is None else mean), entry.deviation("test_top1") or 0.0


def draw_curves(path: Path, entries: list[Entry], title: str, metric: str | None = None) -> None:
    """A metric by epoch, mean over an entry's runs; by itself validation accuracy, or training accuracy where none
    validates."""
    metric = metric or next((name for name in ("val_top1", "top1") if any(e.curve(name) for e in entries)), "loss")
    with _Picture(path, title) as axis:
        for entry, style in zip(entries, _styles(len(entries)), strict=True):
            curve = entry.curve(metric)
            axis.plot(range(1, len(curve) + 1), curve, label=entry.name, **{**style, "markersize": 4})
        axis.set_xlabel("epoch")
        axis.set_ylabel(TITLES.get(metric, metric))


def draw_panels(path: Path, panels: dict[str, dict[str, list[float]]], x: str) -> None:
    """Panels beside each other, title -> name -> values along x, counted from 1; a name has one style in all."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 5), layout="constrained", squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for (name, values), style in zip(lines.items(), _styles(len(lines)), strict=True):
            axis.plot(range(1, len(values) + 1), values, label=name, **{**style, "markersize": 4})
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
    handles, names = axes[0][0].get_legend_handles_labels()
    if len(names) <= LEGEND:
        figure.legend(handles, names, loc="outside lower center", ncols=4)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def compare_rows(entries: list[Entry], differing: dict[str, list[Any]]) -> list[list[str]]:
    """Head and a row per entry: name, figures, best epoch, then the recipe keys that are not the same in all."""
    head = ["", *(TITLES.get(name, name) for name in FIGURES), "best epoch", "runs", *(short(key) for key in differing)]
    doubles = {key for key, group in itertools.groupby(sorted(head)) if len(list(group)) > 1}
    head = [*head[: -len(differing) or None], *(k if short(k) in doubles else short(k) for k in differing)]
    rows = [head]
    for i, entry in enumerate(entries):
        cells = [cell(entry, name, decimals) for name, decimals in FIGURES.items()]
        keys = ["null" if found[i] is None else str(found[i]) for found in differing.values()]
        rows.append(
            [entry.name, *cells, cell(entry, "best_epoch", 1 if len(entry.outcomes) > 1 else 0), entry.runs, *keys]
        )
    return rows
