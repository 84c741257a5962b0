"""Look at what flows through networks: what enters each activation, its size and what it is made of.

examples:
  python tools/probe.py runs/reactnet_nobn
  python tools/probe.py recipes/cifar10_reactnet20.yaml model.norm=ln data.name=image_folder data.root=FOLDER
  python tools/probe.py runs/float_cpu --images 512
  python tools/probe.py runs/twin_ln runs/twin_ln_pn --out runs/probe_ln

SOURCE: a run folder or checkpoint; a sweep's folder, which stands for every point of its grid (means over seeds); or a
recipe, which stands for its random weights, calibrated on the images. Trained networks run as at inference; random ones
as in training, where a batch of all images gives batch normalisation its statistics. Images come from the validation
split, or else from the test split.

The power of what enters an activation is split into shares: constant (the mean of a channel over all images and
pixels, which says nothing about an image), sample_mean (differs from image to image), spatial (from pixel to pixel),
sample_spatial (how much it differs from pixel to pixel differs from image to image). A network whose constant share
nears 1 with depth is collapsing; one without sample_mean cannot tell images apart by their level.

Prints a line per source: means over what enters signs (in networks without signs: any activation) and, under deep,
over the last third of them. Writes probe.json with every layer, probe.md and probe.png; prints the folder last.
"""

import argparse
import statistics
from pathlib import Path

import _cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="runs, checkpoints, sweep folders, recipes; key=value changes these",
    )
    parser.add_argument("--images", type=int, default=256, metavar="N", help="how many (default: 256)")
    parser.add_argument("--out", default="runs/probe", metavar="FOLDER", help="(default: runs/probe)")
    args = parser.parse_args()

    from bnnfree.errors import BnnfreeError
    from bnnfree.files import replacing
    from bnnfree.train.report import write_json
    from bnnfree.train.tables import markdown

    if not 2 <= args.images <= 100_000:
        raise BnnfreeError(f"--images: got {args.images}, expected 2 to 100000.")
    overrides = [text for text in args.sources if "=" in text and not Path(text).exists()]
    sources = list(dict.fromkeys(text for text in args.sources if text not in overrides))
    if not sources:
        parser.error("expected a SOURCE, for example a run folder")
    groups = {name: [trace(each, overrides, args.images) for each in paths] for name, paths in named(sources)}
    lines = {name: mean_of(runs) for name, runs in groups.items()}
    table = markdown(table_of(groups))
    print(table)
    out = Path(args.out)
    with replacing(out / "probe.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    write_json(
        out / "probe.json",
        {name: [[signal.to_dict() for signal in run] for run in runs] for name, runs in groups.items()},
    )
    draw(out / "probe.png", lines)
    print(out)


def named(sources: list[str]) -> list[tuple[str, list[Path]]]:
    """(name, its networks): each source by itself, a sweep's folder as the points of its grid."""
    from bnnfree.errors import BnnfreeError
    from bnnfree.train.outcome import SWEEP, read_plan

    found: list[tuple[str, list[Path]]] = []
    names = [Path(source).resolve().name for source in sources]
    for source, short in zip(sources, names, strict=True):
        path, name = Path(source), short if names.count(short) == 1 else source
        if not (path / SWEEP).is_file():
            found.append((source, [path]))
            continue
        points: dict[tuple[str, ...], list[Path]] = {}
        for point, run in read_plan(path):
            if run.state == "done":
                points.setdefault(tuple(point.values()), []).append(run.folder)
        if not points:
            raise BnnfreeError(f"{source}: no run of this sweep is done.")
        prefix = f"{name}: " if len(sources) > 1 else ""
        found += [(prefix + ", ".join(labels), paths) for labels, paths in points.items()]
    return found


def trace(source: Path, overrides: list[str], count: int) -> list:
    """The signals of one network, by depth."""
    import torch

    from bnnfree.analysis.signals import by_depth, trace_signals
    from bnnfree.nn import calibrate
    from bnnfree.train import load_data, open_source
    from models import MODELS

    network = open_source(source, MODELS, overrides)
    data = load_data(network.recipe.data, where=f"{source}: data")
    split = data.test if data.val is None else data.val
    if network.trained:
        split.mean, split.std = network.data["mean"], network.data["std"]
    parts, left = [], count
    for images, _ in split.batches(256):
        parts.append(images[:left])
        left -= len(parts[-1])
        if left <= 0:
            break
    images = torch.cat(parts)
    if network.trained:
        return by_depth(trace_signals(network.model, images, batch=64))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(network.recipe.seed)
        calibrate(network.model, images)
        return by_depth(trace_signals(network.model.train(), images))


def mean_of(runs: list[list]) -> list[dict[str, float]]:
    """Layer by layer the mean over runs, which have as many layers."""
    from bnnfree.analysis.signals import FIGURES

    return [
        {name: statistics.fmean(getattr(signal, name) for signal in layer) for name in FIGURES}
        for layer in zip(*runs, strict=True)
    ]


def table_of(groups: dict[str, list[list]]) -> list[list[str]]:
    from bnnfree.analysis.signals import FIGURES

    rows = [["", *FIGURES, "constant, deep", "sample_mean, deep", "networks"]]
    for name, runs in groups.items():
        deep = [run[-max(1, len(run) // 3) :] for run in runs]
        cells = [mean_cell([statistics.fmean(getattr(s, field) for s in run) for run in runs]) for field in FIGURES]
        cells += [
            mean_cell([statistics.fmean(getattr(s, field) for s in run) for run in deep])
            for field in ("constant", "sample_mean")
        ]
        rows.append([name, *cells, str(len(runs))])
    return rows


def mean_cell(values: list[float]) -> str:
    """`mean ± deviation` over networks."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def draw(path: Path, lines: dict[str, list[dict[str, float]]]) -> None:
    """The shares constant and sample_mean, and the size, by depth: a line per source."""
    from bnnfree.train.tables import draw_panels

    panels = {
        title: {name: [layer[field] for layer in layers] for name, layers in lines.items()}
        for field, title in (
            ("constant", "constant share of power"),
            ("sample_mean", "share of power from sample means"),
            ("rms", "root mean square"),
        )
    }
    draw_panels(path, panels, "activation, from image to classes")


if __name__ == "__main__":
    _cli.run(main)
