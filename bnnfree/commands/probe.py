"""Look at what flows through networks, and what their binary layers lose: as they start, as trained, and in between.

examples:
  python tools/probe.py runs/reactnet_nobn
  python tools/probe.py recipes/cifar10_reactnet20.yaml model.norm=ln data.name=image_folder data.root=FOLDER
  python tools/probe.py runs/float_cpu --images 512
  python tools/probe.py runs/paper runs/ours --out runs/probe_free
  python tools/train.py recipes/cifar10_reactnet20.yaml probe.every=100 --out runs/ours

SOURCE: a run folder or checkpoint; a sweep's folder, which stands for every point of its grid (means over seeds); or a
recipe, which stands for its random weights, calibrated on the images. Images come from the validation split, or else
from the test split, evenly spaced over it.

Signals, of all activations: trained networks run as at inference; random ones as in training, where a batch of all
images gives batch normalisation its statistics. The power of what enters an activation is split into shares: constant
(the mean of a channel over all images and pixels, which says nothing about an image), sample_mean (differs from image
to image), spatial (from pixel to pixel), sample_spatial (how much it differs from pixel to pixel differs from image to
image). A network whose constant share nears 1 with depth is collapsing; one without sample_mean cannot tell images
apart by their level.

Binary layers, of networks that have signs: each sign with the convolutions that read it, in training mode, on up to 64
of the images, with the loss cross entropy. Initial is the recipe's random weights calibrated, trained the checkpoint
(its flips are those since the initial weights). A run that was trained with `probe.every` also shows its course: what
it measured on training images at some of its steps (flips since the probe before). The numbers are explained in
bnnfree/analysis/probe.py; each is the mean over layers.

Prints a line per source: means over what enters signs (in networks without signs: any activation) and, under deep,
over the last third of them; then the lines of binary layers. Writes probe.json with every layer, probe.md (the
tables), signals.png and, where there are binary layers, probe.png: their numbers by depth, a row of panels per source,
all with the same axes, from the course or else of initial and trained. Prints the folder last.
"""

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli

LAYER_IMAGES = 64  # of the images, for what needs gradients
COURSE = 5  # lines of a course in the table, at most


@dataclass
class Look:
    """Measurements of one network: `layers` initial and trained, `course` the records of its training."""

    signals: list
    layers: dict[str, list] = field(default_factory=dict)
    course: list[dict] = field(default_factory=list)

    def to_dict(self) -> dict:
        layers = {time: [layer.to_dict() for layer in found] for time, found in self.layers.items()}
        return {"signals": [signal.to_dict() for signal in self.signals], **layers, "course": self.course}

    def records(self) -> list[dict]:
        """Records to draw: the course of the training, or else the measurements made here."""
        times = [{"step": None, "layers": [layer.to_dict() for layer in found]} for found in self.layers.values()]
        return self.course or times


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="runs, checkpoints, sweep folders, recipes; key=value changes these",
    )
    parser.add_argument("--images", type=int, default=256, metavar="N", help="how many (default: 256)")
    parser.add_argument(
        "--out", default="runs/probe", type=cli.to_folder, metavar="FOLDER", help="(default: runs/probe)"
    )
    args = parser.read()

    from bnnfree.errors import BnnfreeError
    from bnnfree.files import replacing
    from bnnfree.sweep.tables import markdown
    from bnnfree.train.report import draw_probes, write_json

    if not 2 <= args.images <= 100_000:
        raise BnnfreeError(f"--images: got {args.images}, expected 2 to 100000.")
    overrides = [text for text in args.sources if "=" in text and not Path(text).exists()]
    sources = list(dict.fromkeys(text for text in args.sources if text not in overrides))
    if not sources:
        parser.error("expected a SOURCE, for example a run folder")
    groups = {name: [look(each, overrides, args.images) for each in paths] for name, paths in named(sources)}
    tables = [markdown(signal_rows(groups))]
    if any(seen.layers for runs in groups.values() for seen in runs):
        tables.append(markdown(layer_rows(groups)))
    text = "\n\n".join(tables)
    print(text)
    out = Path(args.out)
    with replacing(out / "probe.md") as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    write_json(out / "probe.json", {name: [seen.to_dict() for seen in runs] for name, runs in groups.items()})
    draw_signals(out / "signals.png", {name: mean_signals(runs) for name, runs in groups.items()})
    if courses := {name: records for name, runs in groups.items() if (records := mean_records(runs))}:
        shorts = [Path(name).name for name in courses]
        names = shorts if len(set(shorts)) == len(shorts) else list(courses)
        draw_probes(out / "probe.png", dict(zip(names, courses.values(), strict=True)))
    console.say(out)


def named(sources: list[str]) -> list[tuple[str, list[Path]]]:
    """(name, its networks): each source by itself, a sweep's folder as the points of its grid."""
    from bnnfree.errors import BnnfreeError
    from bnnfree.sweep.run_folder import SWEEP, read_plan

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


def look(source: Path, overrides: list[str], count: int) -> Look:
    """The signals of one network, by depth, and its binary layers, if it has any."""
    import torch

    from bnnfree.analysis.probe import probe, weight_signs
    from bnnfree.analysis.signals import SIGNS, by_depth, trace_signals
    from bnnfree.models import MODELS
    from bnnfree.nn import anneal, calibrate
    from bnnfree.optim import AGC_EPS
    from bnnfree.train import open_source
    from bnnfree.train.checkpoint import build_model
    from bnnfree.train.networks import parse_recipe

    network = open_source(source, MODELS, overrides)
    images, labels = some_images(network, count)
    every = -(-len(images) // LAYER_IMAGES)
    part = images[::every], labels[::every]
    recipe = network.recipe
    if network.trained:  # Why anew: overrides are about the data, and not about what was trained
        recipe = parse_recipe(network.state["recipe"], network.source, MODELS)
    agc = None if recipe.agc.clip is None else (recipe.agc.clip, AGC_EPS)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(recipe.seed)
        initial = build_model(recipe, MODELS, network.data, network.binarize)
        calibrate(initial, images)
        initial.train()
        signals = trace_signals(network.model, images, batch=64) if network.trained else trace_signals(initial, images)
        seen = Look(by_depth(signals), course=course_of(source))
        if not any(isinstance(module, SIGNS) for module in initial.modules()):
            return seen
        seen.layers["initial"] = probe(initial, *part, agc=agc)
        if network.trained:
            anneal(network.model, 1.0)  # what moves with training is not in the checkpoint
            before = weight_signs(initial)
            seen.layers["trained"] = probe(network.model.train(), *part, agc=agc, before=before)
    return seen


def some_images(network, count: int) -> tuple:
    """Images and labels of the validation or test split, evenly spaced: neighbours may be of one class."""
    from bnnfree.errors import BnnfreeError
    from bnnfree.train import load_data

    data = load_data(network.recipe.data, where=f"{network.source}: data")
    if len(data.classes) != len(network.data["classes"]):
        raise BnnfreeError(
            f"{network.source}: data: got {len(data.classes)} classes, expected the {len(network.data['classes'])} "
            "that the network tells apart."
        )
    split = data.test if data.val is None else data.val
    if network.trained:
        split.mean, split.std = network.data["mean"], network.data["std"]
    return split.spread(count)


def course_of(source: Path) -> list[dict]:
    """The records of a run folder that was trained with probes."""
    from bnnfree.analysis.probe import NUMBERS
    from bnnfree.errors import BnnfreeError

    path = source / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        records = [record for line in lines for record in line.get("probe", ())]
        layers = [layer for record in records for layer in record["layers"]]
        if any("step" not in record for record in records) or not all(layer.keys() >= set(NUMBERS) for layer in layers):
            raise ValueError("a record lacks numbers")
        return records
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise BnnfreeError(
            f"{path}: is not what training with probe.every writes ({type(error).__name__}: {error})."
        ) from None


def mean_signals(runs: list[Look]) -> list[dict[str, float]]:
    """Activation by activation the mean over runs, which have as many."""
    from bnnfree.analysis.signals import FIGURES

    return [
        {name: statistics.fmean(getattr(signal, name) for signal in layer) for name in FIGURES}
        for layer in zip(*(seen.signals for seen in runs), strict=True)
    ]


def mean_records(runs: list[Look]) -> list[dict]:
    """Record by record and layer by layer the mean over runs, as far as all of them go."""
    from bnnfree.analysis.probe import NUMBERS

    return [
        {
            "step": records[0]["step"],
            "layers": [
                {name: mean([layer[name] for layer in layers]) for name in NUMBERS}
                for layers in zip(*(record["layers"] for record in records), strict=True)
            ],
        }
        for records in zip(*(seen.records() for seen in runs), strict=False)
    ]


def mean(values: list) -> float | None:
    """Of those that are numbers; None of none."""
    numbers = [value for value in values if value is not None]
    return statistics.fmean(numbers) if numbers else None


def signal_rows(groups: dict[str, list[Look]]) -> list[list[str]]:
    from bnnfree.analysis.signals import FIGURES

    rows = [["", *FIGURES, "constant, deep", "sample_mean, deep", "networks"]]
    for name, looks in groups.items():
        runs = [seen.signals for seen in looks]
        deep = [run[-max(1, len(run) // 3) :] for run in runs]
        cells = [mean_cell([statistics.fmean(getattr(s, field) for s in run) for run in runs]) for field in FIGURES]
        cells += [
            mean_cell([statistics.fmean(getattr(s, field) for s in run) for run in deep])
            for field in ("constant", "sample_mean")
        ]
        rows.append([name, *cells, str(len(runs))])
    return rows


def layer_rows(groups: dict[str, list[Look]]) -> list[list[str]]:
    """Head and the means over layers: of initial and trained, then of some steps of the course."""
    from bnnfree.analysis.probe import NUMBERS

    rows = [["binary layers", *NUMBERS]]
    for name, runs in groups.items():
        times: dict[str, list] = {}
        for seen in runs:
            for time, layers in seen.layers.items():
                times.setdefault(time, []).append([layer.to_dict() for layer in layers])
            last = len(seen.course) - 1
            for i in sorted({round(k * last / (COURSE - 1)) for k in range(COURSE)} if last >= 0 else ()):
                times.setdefault(f"step {seen.course[i]['step']:,}", []).append(seen.course[i]["layers"])
        for time, networks in times.items():
            columns = [[mean([layer[number] for layer in layers]) for layers in networks] for number in NUMBERS]
            cells = [mean_cell([value for value in column if value is not None]) for column in columns]
            rows.append([f"{name}, {time}", *cells])
    return rows


def mean_cell(values: list[float]) -> str:
    """`mean ± deviation` over networks; nothing of none."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def draw_signals(path: Path, lines: dict[str, list[dict[str, float]]]) -> None:
    """The shares constant and sample_mean, and the size, by depth: a line per source."""
    from bnnfree.sweep.tables import draw_panels

    panels = {
        title: {name: [layer[field] for layer in layers] for name, layers in lines.items()}
        for field, title in (
            ("constant", "constant share of power"),
            ("sample_mean", "share of power from sample means"),
            ("rms", "root mean square"),
        )
    }
    draw_panels(path, panels, "activation, from image to classes")
