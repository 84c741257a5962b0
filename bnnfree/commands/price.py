"""Measure the cost of each normaliser, at inference after folding and in training: one network, every normaliser.

examples:
  python tools/price.py recipes/cifar10_reactnet18.yaml
  python tools/price.py recipes/cifar10_reactnet18.yaml --norms none bn gn --seconds 60 --threads 2
  python tools/price.py recipes/cifar10_reactnet20.yaml model.width=0.5 --batch 16 --out runs/price20

RECIPE stands for its last stage's network with random weights, once with each name of model.norm and once with
optimizer.precondition=bnp. Of the packed file: float ops of one image as bnnfree.bench.costs counts them; bytes of
its float constants and of the whole file; the ops that `none` has not, or has fewer of; and the median milliseconds of
one image, all networks taking turns in one run. In training: images per second of whole steps (forward, cross entropy,
backward, clipping, optimiser, no teacher) on noise, in turns again; MB per image that autograd keeps from forward to
backward. What cannot be exported or trained has a line with the reason. Writes price.md and price.json; prints the
folder last.
"""

from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli

NO_NORM, BNP = "none", "bnp"
ENDLESS = 10**6  # epochs: a step here is an epoch of one batch, and the schedule must not run out


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, see recipes/README.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, dotted keys")
    parser.add_argument("--norms", nargs="+", metavar="NORM", help="of model.norm, and bnp (default: all)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the engine and of torch (default: 1)")
    parser.add_argument("--seconds", type=float, default=30, metavar="S", help="for the engine, and again for training")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="of the training step (default: 32)")
    parser.add_argument(
        "--out", default="runs/price", type=cli.to_folder, metavar="FOLDER", help="(default: runs/price)"
    )
    args = parser.read(recipe="recipe")

    import torch

    from bnnfree.bench.machine import machine
    from bnnfree.errors import BnnfreeError, unknown_name
    from bnnfree.files import replacing
    from bnnfree.models import MODELS
    from bnnfree.nn import NORMS
    from bnnfree.sweep.tables import markdown
    from bnnfree.train import load_recipe
    from bnnfree.train.process_settings import settings
    from bnnfree.train.report import write_json

    if not 0 < args.seconds <= 3600:
        raise BnnfreeError(f"--seconds: got {args.seconds}, expected more than 0 and up to 3600.")
    for name, value in (("--threads", args.threads), ("--batch", args.batch)):
        if not 1 <= value <= 4096:
            raise BnnfreeError(f"{name}: got {value}, expected 1 to 4096.")
    known = [*NORMS, BNP]
    for name in args.norms or ():
        if name not in known:
            raise unknown_name("--norms", name, known)
    torch.set_num_threads(args.threads)
    recipe = load_recipe(
        args.recipe, args.overrides, MODELS
    )  # what is wrong with it is one error and not one of each row
    rows = {name: {"norm": name} for name in dict.fromkeys(args.norms or known)}
    price_inference(rows, args)
    with settings(recipe.deterministic):  # as it would be trained
        price_training(rows, args)
    about = {**machine(), "threads": args.threads, "recipe": args.recipe, "overrides": args.overrides}
    table = markdown(table_of(list(rows.values())))
    note = f"{about['cpu']}, {args.threads} threads; {args.recipe} {' '.join(args.overrides)}, batch 1; training: batch"
    print(table)
    out = Path(args.out)
    with replacing(out / "price.md") as temporary:
        temporary.write_text(f"{table}\n\n{' '.join(note.split())} {args.batch}.\n", encoding="utf-8")
    write_json(out / "price.json", {"machine": about, "batch": args.batch, "norms": list(rows.values())})
    console.say(out)


def overrides_of(name: str, args) -> list[str]:
    """Overrides that give the recipe this normaliser, without the user's that only another one reads."""
    from bnnfree.models import MODELS
    from bnnfree.recipe.read import by_key
    from bnnfree.train.networks import load_fitting

    own = [f"model.norm={NO_NORM}", "optimizer.precondition=bnp"] if name == BNP else [f"model.norm={name}"]
    texts = by_key([*args.overrides, *own])
    left = load_fitting(args.recipe, texts, texts.keys() - by_key(own).keys(), MODELS)[1]
    return [text for key, text in texts.items() if key not in left]


def measured(what: str, contenders: dict, seconds: float, threads: int) -> dict:
    """`bnnfree.bench.rounds.measure` of the contenders, with a bar; nothing of none."""
    from bnnfree.bench.rounds import measure
    from bnnfree.progress import Progress

    if not contenders:
        return {}
    with Progress(seconds, what, "s") as shown:
        return measure(contenders, seconds, threads, lambda passed: shown.update(passed - shown.done))


# -- inference


def price_inference(rows: dict, args) -> None:
    """float_ops, constant_bytes, file_bytes, ops, engine (milliseconds) into each row, or why not: not_exported."""
    import functools

    from bnnfree.bench.costs import float_ops, op_counts
    from bnnfree.bench.peers import random_images
    from bnnfree.bench.rounds import figures
    from bnnfree.engine import Engine
    from bnnfree.export import pack_network, packed_bytes
    from bnnfree.models import MODELS
    from bnnfree.progress import over
    from bnnfree.train import open_source

    contenders = {}
    for name, row in over(rows.items(), "packing", "norms"):
        try:
            model = pack_network(open_source(args.recipe, MODELS, overrides_of(name, args))).model
            engine, image = Engine(model, threads=args.threads), random_images(model, 1)
            engine.run(image)
            sizes = packed_bytes(model)
            row |= {"float_ops": float_ops(model), "float_bytes": sizes["f32"], "constant_bytes": constants_of(sizes)}
            row |= {"file_bytes": sizes["total"], "ops": op_counts(model), "backend": engine.backend}
        except Exception as error:  # a table with a reason in one row is worth more than none
            row["not_exported"] = str(error) or type(error).__name__
            continue
        contenders[name] = functools.partial(engine.run, image)
    for name, times in measured("engine", contenders, args.seconds, args.threads).items():
        rows[name]["engine"] = figures(times)


def constants_of(sizes: dict[str, int]) -> int:
    return sum(bytes_ for kind, bytes_ in sizes.items() if kind not in ("rest", "total"))


# -- training


def price_training(rows: dict, args) -> None:
    """train (milliseconds of a step, images per second) and saved bytes into each row, or why not: not_trained."""
    from bnnfree.bench.rounds import figures
    from bnnfree.progress import over

    contenders = {}
    for name, row in over(rows.items(), "first steps", "norms"):
        try:
            step, saved = open_step(name, args)
            step()
        except Exception as error:
            row["not_trained"] = str(error) or type(error).__name__
            continue
        row |= saved
        contenders[name] = step
    for name, times in measured("training", contenders, args.seconds, 1).items():
        found = figures(times)
        rows[name]["train"] = {**found, "images_per_second": 1e3 * args.batch / found["median_ms"]}


def open_step(name: str, args):
    """(a function that takes one training step, what autograd saves in it)."""
    import torch

    from bnnfree.analysis.memory import saved_per_image
    from bnnfree.data.datasets import describe, load_data
    from bnnfree.models import MODELS
    from bnnfree.recipe import resolve
    from bnnfree.train.checkpoint import build_model
    from bnnfree.train.dist import Dist
    from bnnfree.train.loop import Stage
    from bnnfree.train.networks import load_recipe

    recipe = load_recipe(args.recipe, overrides_of(name, args), MODELS)
    shape = describe(recipe.data, f"{args.recipe}: data")
    classes, (height, width), channels = len(shape["classes"]), shape["image_size"], shape["channels"]
    fake = {"name": "fake", "samples": args.batch, "batch_size": args.batch, "classes": min(classes, args.batch)}
    fake |= {
        "channels": channels,
        "image_size": [height, width],
        "range": None,
        "test_fraction": None,
        "augment": [],
        "val_fraction": 0.0,
    }
    data_recipe = recipe.data.model_copy(update={**fake, "train_limit": None, "test_limit": None})
    stages = [stage.model_copy(update={"epochs": ENDLESS}) for stage in recipe.stages]
    device = torch.device("cpu")
    loss = recipe.loss.model_copy(update={"name": "cross_entropy", "teacher": None})
    recipe = recipe.model_copy(update={"data": data_recipe, "stages": stages, "accumulate": 1, "loss": loss})
    recipe = resolve(recipe, shape)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, MODELS, shape, recipe.stages[-1].binarize)
    stage = Stage(recipe, len(stages) - 1, model, load_data(data_recipe), Dist(0, 1, device))
    stage.calibrate()
    stage.model.train()
    each, fixed = saved_per_image(stage.model, (channels, height, width), classes)
    saved = {"saved_bytes_per_image": each, "saved_bytes_fixed": fixed}
    return lambda: stage.train_epoch(lambda: None), saved


# -- the table


def table_of(rows: list[dict]) -> list[list[str]]:
    head = [
        "norm",
        "float ops",
        "float constants, bytes",
        "file, bytes",
        "ops left",
        "engine, ms",
        "training, images/s",
    ]
    table = [[*head, "saved, MB/image", ""]]
    base = next((row for row in rows if row["norm"] == NO_NORM and "ops" in row), None)
    for row in rows:
        cells = [row["norm"]]
        cells += [f"{row[key]:,}" if key in row else "-" for key in ("float_ops", "float_bytes", "file_bytes")]
        cells.append(left_of(row, base))
        cells.append(f"{row['engine']['median_ms']:.3f}" if "engine" in row else "-")
        cells.append(f"{row['train']['images_per_second']:.1f}" if "train" in row else "-")
        cells.append(f"{row['saved_bytes_per_image'] / 1e6:.2f}" if "saved_bytes_per_image" in row else "-")
        reasons = [f"{key.replace('_', ' ')}: {row[key]}" for key in ("not_exported", "not_trained") if key in row]
        table.append([*cells, " ".join("; ".join(reasons).split())])
    if not any(row[-1] for row in table[1:]):
        table = [row[:-1] for row in table]
    return table


def left_of(row: dict, base: dict | None) -> str:
    """The ops that the network without a normaliser has fewer of."""
    if "ops" not in row or base is None:
        return "-"
    more = {name: count - base["ops"].get(name, 0) for name, count in row["ops"].items()}
    return ", ".join(f"{count} {name}" for name, count in more.items() if count > 0) or "none"
