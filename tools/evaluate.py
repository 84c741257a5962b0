"""Measure the accuracy of a network on the test (or validation) images.

examples:
  python tools/evaluate.py runs/reactnet_nobn
  python tools/evaluate.py runs/c10/best.pt data.root=FOLDER
  python tools/evaluate.py runs/reactnet_nobn --split val --json val.json
  python tools/evaluate.py recipes/reactnet_nobn.yaml

The network and its data come from the checkpoint's own recipe; overrides may move the data (data.*, precision,
device). A recipe stands for its last stage's network with random weights, at chance, and overrides may change
all of it. With --json the path of the file written is printed last.
"""

import argparse
import json

import _cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a run folder (its best.pt), a checkpoint file, or a recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to data.*, precision, device (a recipe: to any key)"
    )
    parser.add_argument("--split", choices=("test", "val", "train"), default="test")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    args = parser.parse_intermixed_args()

    from bnnfree.errors import BnnfreeError
    from bnnfree.train import evaluate, load_data, open_source
    from bnnfree.train.dist import start
    from bnnfree.train.report import write_json
    from models import MODELS

    if args.batch_size < 1:
        raise BnnfreeError(f"--batch-size: got {args.batch_size}, expected a whole number above 0.")
    network = open_source(args.source, MODELS, args.overrides)
    recipe = network.recipe
    dist = start(recipe.device)
    data = load_data(recipe.data, where="data")
    if network.trained and data.classes != network.data["classes"]:
        raise BnnfreeError(f"data: its classes are not those {args.source} was trained on.")
    split = getattr(data, args.split)
    if split is None:
        raise BnnfreeError("--split val: the recipe holds no validation images out (data.val_fraction is 0).")
    split.mean, split.std = network.data["mean"], network.data["std"]  # those it was trained with
    figures = evaluate(network.model.to(dist.device), split, dist, args.batch_size, recipe.precision)
    figures = {"split": args.split, "images": len(split), "trained": network.trained, **figures}
    print(json.dumps(figures, indent=2))
    if args.json:
        write_json(args.json, figures)
        print(args.json)


if __name__ == "__main__":
    _cli.run(main)
