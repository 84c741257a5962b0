"""Measure the accuracy of a network, or of a packed file, on the test (or validation) images.

examples:
  python tools/evaluate.py runs/reactnet_nobn
  python tools/evaluate.py runs/c10/best.pt data.root=FOLDER
  python tools/evaluate.py runs/c10/last.pt --settle 5120
  python tools/evaluate.py runs/reactnet_nobn --split val --json val.json
  python tools/evaluate.py recipes/reactnet_nobn.yaml
  python tools/evaluate.py model.bnnf

The network and its data come from the checkpoint's own recipe; overrides may move the data (data.*, precision,
device). A recipe stands for its last stage's network with random weights, at chance, and overrides may change
all of it. A packed file (.bnnf) runs in bnnfree.engine on the data set that it names, or that data.* says. With
--json the path of the file written is printed last.

--settle measures the statistics of batch norms and the input means of centred layers anew first, on that many
augmented training images, as the recipe key `settle` does for each evaluation in training. best.pt of a training
with that key has them already; last.pt has those that training goes by.
"""

import json
from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("source", help="a run folder (its best.pt), a checkpoint file, a recipe, or a packed file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to data.*, precision, device (a recipe: to any key)"
    )
    parser.add_argument("--split", choices=("test", "val", "train"), default="test")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N")
    parser.add_argument("--settle", type=int, default=0, metavar="N", help="measure statistics anew on N images first")
    parser.add_argument("--json", type=cli.to_file, metavar="FILE", help="write the figures there as well")
    args = parser.read(source="recipe network")

    from bnnfree.errors import BnnfreeError
    from bnnfree.models import MODELS
    from bnnfree.nn import settle
    from bnnfree.progress import Progress
    from bnnfree.train import evaluate, load_data, open_source
    from bnnfree.train.dist import start
    from bnnfree.train.report import write_json

    if args.batch_size < 1:
        raise BnnfreeError(f"--batch-size: got {args.batch_size}, expected a whole number above 0.")
    packed = Path(args.source).suffix == ".bnnf"
    if args.settle < 0 or (packed and args.settle):
        raise BnnfreeError(f"--settle: got {args.settle}, expected 0 or more, and for a packed file 0: it is settled.")
    if packed:
        model, recipe, known = open_packed(args.source, args.overrides)
        trained, classes, device = True, known["classes"], "cpu"
    else:
        network = open_source(args.source, MODELS, args.overrides)
        model, recipe, known, trained = network.model, network.recipe, network.data, network.trained
        classes, device = known["classes"], recipe.device
    dist = start(device)
    data = load_data(recipe.data, where="data")
    if trained and data.classes != classes:
        raise BnnfreeError(f"data: its classes are not those {args.source} was trained on.")
    split = getattr(data, args.split)
    if split is None:
        raise BnnfreeError("--split val: the recipe holds no validation images out (data.val_fraction is 0).")
    split.mean, split.std = known["mean"], known["std"]  # those it was trained with
    model.to(dist.device)
    if args.settle:
        how = {"seed": recipe.seed, "epoch": sum(stage.epochs for stage in recipe.stages), "device": dist.device}
        settle(model, data.train.settling_batches(args.settle, recipe.data.batch_size, **how))
    images = -(-len(split) // dist.world)
    with Progress(images, "evaluating", "images", hidden=not dist.main, delay=1) as bar:
        figures = evaluate(model, split, dist, args.batch_size, recipe.precision, bar.update)
    about = {"split": args.split, "images": len(split), "trained": trained, "settle": args.settle}
    figures = {**about, **figures}
    print(json.dumps(figures, indent=2))
    if args.json:
        write_json(args.json, figures)
        console.say(args.json)


def open_packed(path: str, overrides: list[str]):
    """(module that runs the packed file, its recipe, what is known of its data).

    Its images come as pixels: mean 0 and deviation 1/255 undo the scaling to 0..1.
    """
    import torch
    from torch import nn

    from bnnfree.engine import load
    from bnnfree.models import MODELS
    from bnnfree.train.networks import parse_recipe

    engine = load(path)
    channels = engine.model.image_shape[2]

    class Packed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pixels = x.permute(0, 2, 3, 1).round().to(torch.uint8)
            return torch.from_numpy(engine.run(pixels.contiguous().numpy()))

    recipe = parse_recipe(recipe_of(engine.model, path, overrides), f"packed file {path}", MODELS, overrides)
    known = {"classes": engine.model.classes, "mean": [0.0] * channels, "std": [1 / 255] * channels}
    return Packed(), recipe, known


def recipe_of(model, path: str, overrides: list[str]) -> dict:
    """The recipe that a packed file carries, without places; else one that says what its metadata does of its data."""
    from bnnfree.errors import BnnfreeError
    from bnnfree.format.text import split_numbers
    from bnnfree.models import MODELS
    from bnnfree.names import FILE_DATASETS as FILES
    from bnnfree.train.open_network import without_places

    metadata = model.metadata
    if "recipe" in metadata:
        try:
            tree = json.loads(metadata["recipe"])
        except (ValueError, RecursionError) as error:
            raise BnnfreeError(f"{path}: metadata: recipe: got what is no JSON ({str(error)[:80]}).") from None
        if not isinstance(tree, dict) or not isinstance(tree.get("data") or {}, dict):
            raise BnnfreeError(f"{path}: metadata: recipe: got what is no recipe.")
        return without_places(tree, local=False)
    given = {key: value for key, _, value in (text.partition("=") for text in overrides)}
    name = given.get("data.name", metadata.get("data"))
    if name is None:
        raise BnnfreeError(f"{path}: names no data set. Say which, such as data.name=image_folder data.root=FOLDER.")
    height, width, channels = model.image_shape
    data = {"name": name, "image_size": height if height == width else [height, width]}
    if name in FILES:
        data |= {"orientation": metadata.get("orientation", "stored"), "channels": channels}
    if "range" in metadata and name in (*FILES, "arrays"):
        data["range"] = split_numbers(metadata["range"], f"{path}: metadata: range")
    if name == "fake":
        data |= {"channels": channels, "classes": max(2, len(model.classes))}
    return {"model": {"name": next(iter(MODELS))}, "data": data, "stages": [{"epochs": 1}]}
