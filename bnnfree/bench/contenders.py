"""The part of tools/bench.py that measures training: contenders, turns, tables.

Run as a program, with a request as JSON, it tells what one contender holds in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bnnfree import console

SECONDS = 60  # for the contenders of one precision and batch
MB = 1e6
LAYERS = ("speed=layers",)  # changes to a recipe that make it run module by module


@dataclass(frozen=True)
class Request:
    """Settings that all contenders of one race share, here and in the processes that measure memory."""

    source: str
    overrides: list[str]
    precision: str
    batch: int | None
    against: str | None
    threads: int


@dataclass(frozen=True)
class Variant:
    """A contender: changes to the recipe, and who takes its steps; `binarize` instead of what the stage binarises."""

    about: str
    changes: tuple[str, ...] = ()
    binarize: str | None = None
    make: str = "stage"  # | plain | reference
    compiled: bool = False
    trunk: bool = False  # takes precision bf16_trunk; others are measured in bf16 beside it


VARIANTS = {
    "ours": Variant("the recipe as it is", trunk=True),
    "layers": Variant("module by module", LAYERS),
    "fused": Variant("one node of autograd for each block", ("speed=fused",), trunk=True),
    "compiled": Variant("its modules compiled by torch", ("speed=compiled",)),
    "fused_compiled": Variant("such nodes compiled by torch", ("speed=fused_compiled",), trunk=True),
    "plain": Variant("the same function as the papers' code writes it, stepped as released", LAYERS, make="plain"),
    "plain_compiled": Variant("that, compiled by torch", LAYERS, make="plain", compiled=True),
    "bn": Variant("with batch normalisation", ("model.norm=bn", "model.norm_options={}"), trunk=True),
    "float": Variant("real weights and activations", binarize="none"),
    "reference": Variant("the released code itself", make="reference"),
}


def bench_train(args, print_table: Callable[..., None]) -> dict[str, Any]:
    """The report's part about training: precision -> batch -> contenders, ratios; device, data, roofline."""
    import torch

    from bnnfree.bench.reference import open_reference
    from bnnfree.bench.training import roofline
    from bnnfree.errors import BnnfreeError
    from bnnfree.nn.fused import PRECISIONS
    from bnnfree.train import dist

    check(args)
    torch.set_num_threads(args.threads)
    names = [name for name in VARIANTS if name in args.contenders or name == "ours"]
    if not args.contenders:
        names = [name for name in VARIANTS if name != "reference" or args.against]
    request = Request(args.source, args.overrides, "fp32", None, args.against[0] if args.against else None, 1)
    recipe = recipe_of(request)
    data = data_of(recipe, args.source)
    device = dist.start(recipe.device).device
    if request.against:
        open_reference(str(request.against), recipe, data)  # before the minutes that others take
    report: dict[str, Any] = {"source": args.source, "overrides": args.overrides, "device": name_of(device)}
    report |= {"torch": str(torch.__version__), **about(recipe, data), "roofline": roofline(device)}
    console.say(f"recipe    {args.source}: {recipe.model.name}, norm {recipe.model.norm}, stage {report['stage']}")
    console.say(f"data      {report['data']}")
    print(f"device    {report['device']}, torch {report['torch']}")
    if recipe.loss.teacher is not None:
        print("loss      cross entropy: the teacher's forward pass is left out, of all")
    for precision in args.precision or PRECISIONS:
        for batch in args.batch or [recipe.data.batch_size]:
            request = Request(args.source, args.overrides, precision, batch, request.against, args.threads)
            try:
                race = run_race(request, data, device, names, args.seconds or SECONDS, report["roofline"])
            except BnnfreeError as error:
                if args.precision or precision == "fp32":
                    raise
                console.say("", f"{precision}: left out; {error}")  # nobody asked for it by name
                continue
            report.setdefault(precision, {})[str(batch)] = race
            print_race(f"\n{precision}, batch {batch}", race, print_table)
    return report


def check(args) -> None:
    """Errors: BnnfreeError for options that do not fit together."""
    from bnnfree.errors import BnnfreeError, unknown_name
    from bnnfree.nn.fused import PRECISIONS

    if args.source is None:
        raise BnnfreeError("--train: got no recipe, expected one, for example recipes/cifar10_reactnet20.yaml.")
    for name in args.precision:
        if name not in PRECISIONS:
            raise unknown_name("--precision", name, PRECISIONS)
    for name in args.contenders:
        if name not in VARIANTS:
            raise unknown_name("--contenders", name, VARIANTS)
    for batch in args.batch:
        if batch < 1:
            raise BnnfreeError(f"--batch: got {batch}, expected 1 or more.")
    if args.threads < 1:
        raise BnnfreeError(f"--threads: got {args.threads}, expected 1 or more.")
    if len(args.against) > 1:
        raise BnnfreeError(
            f"--against: got {len(args.against)} values with --train, expected one folder, a checkout of the released "
            "code. Put key=value before it."
        )
    if "reference" in args.contenders and not args.against:
        raise BnnfreeError("--contenders: got reference without --against FOLDER, a checkout of the released code.")
    if args.against and not Path(args.against[0]).is_dir():
        raise BnnfreeError(
            f"--against: got {args.against[0]!r} with --train, expected a folder, a checkout of the released code."
        )


def recipe_of(request: Request, changes: tuple[str, ...] = ()):
    """The recipe of a request, with these changes; without those overrides that only the unchanged one reads."""
    from bnnfree.models import MODELS
    from bnnfree.recipe.read import by_key
    from bnnfree.train.networks import load_fitting

    overrides = [*request.overrides, f"precision={request.precision}", *changes]
    if request.batch is not None:
        overrides.append(f"data.batch_size={request.batch}")
    common = by_key(request.overrides) if changes else ()
    return load_fitting(request.source, by_key(overrides), common, MODELS)[0]


def data_of(recipe, source: str):
    """The recipe's data. Errors: DataError where they are not there; noise never takes their place unasked."""
    from bnnfree.errors import DataError
    from bnnfree.train import load_data

    try:
        return load_data(recipe.data, where=f"{source}: data")
    except DataError as error:
        raise DataError(f"{error} To measure on noise: data.name=fake.") from None


def about(recipe, data) -> dict[str, str]:
    """data and stage, in words."""
    height, width = data.image_size
    augment = ", ".join(recipe.data.augment) or "nothing"
    place = f" in {recipe.data.root}" if recipe.data.root and recipe.data.name != "fake" else ""
    text = f"{recipe.data.name}{place}: {len(data.train):,} training images {height}x{width}x{data.channels}, "
    stage = recipe.stages[-1]
    return {
        "data": text + f"{len(data.classes)} classes, augmented by {augment}",
        "stage": f"{stage.name} (1 bit: {stage.binarize or recipe.model.binarize})",
    }


def name_of(device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def make_contender(name: str, request: Request, data, device):
    """The contender `name`. Errors: BnnfreeError where recipe or reference do not allow it."""
    from bnnfree.analysis.plain import plain
    from bnnfree.bench.reference import open_reference
    from bnnfree.bench.training import ReleasedContender, StageContender, data_info
    from bnnfree.errors import BnnfreeError
    from bnnfree.models import MODELS
    from bnnfree.optim import find_head
    from bnnfree.recipe import resolve

    variant = VARIANTS[name]
    if request.precision == "bf16_trunk" and not variant.trunk:
        request = replace(request, precision="bf16")
    recipe = recipe_of(request, variant.changes)
    loss = recipe.loss.model_copy(update={"name": "cross_entropy", "teacher": None})
    recipe = resolve(recipe.model_copy(update={"loss": loss}), data_info(data))
    if variant.make == "reference":
        net, clip, left_out = open_reference(str(request.against), recipe, data)
        return ReleasedContender(net, recipe, device, unclipped=left_out, clip=clip)
    stage = StageContender(recipe, MODELS, data, device, binarize=variant.binarize)
    if variant.make == "stage":
        return stage
    if recipe.optimizer.precondition is not None:
        raise BnnfreeError("plain: got optimizer.precondition, expected null: the released step has none.")
    net = plain(stage.stage.model)
    head = find_head(net)
    unclipped = [] if head is None else head.parameters()
    return ReleasedContender(net, recipe, device, unclipped=unclipped, compiled=variant.compiled)


def run_race(request: Request, data, device, names: list[str], seconds: float, peak: dict) -> dict[str, Any]:
    """One precision and batch: contenders, their ratios to ours, and who was left out for what reason."""
    import torch

    from bnnfree.analysis import summarize
    from bnnfree.bench.training import Feed, data_info, race, ratios, shares
    from bnnfree.models import MODELS
    from bnnfree.train.checkpoint import build_model

    recipe = recipe_of(request)
    feed = Feed(data.train, recipe.data.batch_size, recipe.seed, device)
    contenders, left_out = open_contenders(request, data, device, names, feed)
    times = race(contenders, feed, device, seconds=seconds, accumulate=recipe.accumulate)
    images = recipe.data.batch_size * recipe.accumulate
    found: dict[str, dict] = {}
    for name, row in times.items():
        found[name] = {"about": VARIANTS[name].about, "precision": contenders[name].precision, **row.figures(images)}
    contenders.clear()
    torch.compiler.reset()  # Why: it gives up compiling after a few versions of one function, and says little
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the processes that measure memory
    network = build_model(recipe, MODELS, data_info(data), recipe.stages[-1].binarize)
    costs = summarize(network, data.image_size, data.channels).total
    macs = costs.binary_macs + costs.mixed_macs + costs.float_macs
    parameters = sum(p.numel() for p in network.parameters())
    for name, figures in found.items():
        held = held_alone(name, request)
        figures |= held
        saved = None if "memory_not_measured" in held else held
        figures["roofline"] = shares(figures["step_ms"]["median"] / 1e3, images, macs, parameters, saved, peak)
    report: dict[str, Any] = {"images": images, "rounds": len(times["ours"].steps), "contenders": found}
    report |= {"ratio": ratios(times), "left_out": left_out, "saved_bytes_ratio": {}, "peak_memory_ratio": {}}
    for name, figures in found.items():
        for key, ratio in (("saved_bytes_per_image", "saved_bytes_ratio"), ("peak_memory_bytes", "peak_memory_ratio")):
            if name != "ours" and figures.get(key) and found["ours"].get(key):
                report[ratio][name] = figures[key] / found["ours"][key]
    return report


def open_contenders(request: Request, data, device, names: list[str], feed) -> tuple[dict, dict[str, str]]:
    """(contenders that have taken a step, name -> why another cannot). Errors: where ours or the reference cannot."""
    from bnnfree.bench.training import warm_up
    from bnnfree.errors import BnnfreeError

    contenders, left_out = {}, {}
    for name in names:
        try:
            contender = make_contender(name, request, data, device)
            warm_up(contender, feed, device, recipe_of(request).accumulate)
        except Exception as error:  # whatever torch says when it cannot
            if name in ("ours", "reference") and isinstance(error, BnnfreeError):
                raise
            if name == "ours":
                raise BnnfreeError(f"{request.source}: no step of training: {first_line(error)}") from error
            left_out[name] = first_line(error)
            continue
        contenders[name] = contender
    return contenders, left_out


def first_line(error: Exception) -> str:
    """Message of an exception, as one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def print_race(title: str, race: dict, print_table: Callable[..., None]) -> None:
    from bnnfree.bench.training import PARTS

    print(f"{title}, {race['rounds']} rounds")
    head = ("", "images/s", "step ms", "p10", "p90", "ratio", *PARTS)
    rows = [(*head, "saved MB/image", "fixed MB", "peak MB", "% matmul", "% copy")]
    for name, row in race["contenders"].items():
        step = row["step_ms"]
        ratio = f"{race['ratio'][name]:.2f}" if name != "ours" else ""
        cells = [f"{row['images_per_second']:.1f}", *(f"{step[k]:.1f}" for k in ("median", "p10", "p90")), ratio]
        cells += [f"{row['parts_ms'][part]:.1f}" for part in PARTS]
        for key in ("saved_bytes_per_image", "saved_bytes_fixed", "peak_memory_bytes"):
            cells.append(f"{row[key] / MB:.2f}" if key in row else "-")
        for key in ("matmul_share", "bandwidth_share"):
            cells.append(f"{100 * row['roofline'][key]:.1f}" if key in row["roofline"] else "-")
        rows.append((name, *cells))
    print_table(rows)
    for name, reason in race["left_out"].items():
        console.say(f"{name}: left out; {reason}")
    for name, row in race["contenders"].items():
        if "memory_not_measured" in row:
            console.say(f"{name}: memory not measured; {row['memory_not_measured']}")


# -- a process of its own for each contender's memory


def held_alone(name: str, request: Request) -> dict[str, Any]:
    """Memory of the contender in a fresh process (`throughput.held`), or memory_not_measured: why."""
    asked = json.dumps({"name": name, **asdict(request)})
    threads = {key: str(request.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = console.process_of("held-alone", asked)
    done = subprocess.run(command, env={**os.environ, **threads}, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"memory_not_measured": lines[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def answer() -> None:
    """The other side of `held_alone`."""
    import torch

    from bnnfree.bench.training import Feed, held
    from bnnfree.train import dist

    asked = json.loads(sys.argv[1])
    name, request = asked.pop("name"), Request(**asked)
    torch.set_num_threads(request.threads)
    recipe = recipe_of(request)
    data = data_of(recipe, request.source)
    device = dist.start(recipe.device).device
    feed = Feed(data.train, recipe.data.batch_size, recipe.seed, device)
    feed.take(1)  # what the pipeline holds is nobody's
    found = held(lambda: make_contender(name, request, data, device), feed, data, device, recipe.data.batch_size)
    print(json.dumps(found))
