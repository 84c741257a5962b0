"""Show what a network holds and costs: per layer and in total, parameters, bytes, multiply-accumulates.

examples:
  python tools/summary.py recipes/cifar10_reactnet20.yaml
  python tools/summary.py recipes/cifar10_reactnet20.yaml model.name=reactnet_a model.shortcut=real
  python tools/summary.py recipes/cifar10_reactnet20.yaml --image-size 224
  python tools/summary.py runs/reactnet_nobn --json summary.json

The network of a recipe is that of its last stage; its data need not be there (image_folder: its folders
must). A checkpoint or run folder stands for the network that it holds. All units: under the table.
With --json the file's path is printed last.
"""

import argparse
import json
from pathlib import Path

import _cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="RECIPE", help="a YAML file, or a checkpoint, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, dotted keys")
    parser.add_argument("--json", metavar="FILE", help="write all numbers to FILE")
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="side of the image in pixels (default: the data's own)"
    )
    args = parser.parse_intermixed_args()

    from bnnfree.analysis import summarize
    from bnnfree.errors import BnnfreeError
    from bnnfree.files import replacing
    from bnnfree.train import load_model, load_recipe
    from bnnfree.train.checkpoint import build_model
    from bnnfree.train.data import describe
    from models import MODELS

    path = Path(args.source)
    if path.is_dir() or path.suffix == ".pt":
        if args.overrides:
            raise BnnfreeError(
                f"{path}: got {' '.join(args.overrides)} for a checkpoint, whose network is fixed; expected "
                "no key=value. Give the recipe to change it."
            )
        model, state = load_model(path, MODELS)
        data, binarize, side = state["data"], state["binarize"], args.image_size
        name, norm = (state["recipe"]["model"][key] for key in ("name", "norm"))
        image_size = (side, side) if side is not None else tuple(data["image_size"])
    else:
        size = [] if args.image_size is None else [f"data.image_size={args.image_size}"]
        recipe = load_recipe(path, [*args.overrides, *size], MODELS)
        data, name, norm = describe(recipe.data, f"{path}: data"), recipe.model.name, recipe.model.norm
        binarize = recipe.stages[-1].binarize or recipe.model.binarize
        model, image_size = build_model(recipe, MODELS, data, binarize), tuple(data["image_size"])
    summary = summarize(model, image_size, data["channels"])
    about = {
        "source": str(path),
        "model": name,
        "norm": norm,
        "binarize": binarize,
        "classes": len(data["classes"]),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()), summary.table(), sep="\n\n")
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(about | summary.to_dict(), indent=1) + "\n", encoding="utf-8")
        print(args.json)


if __name__ == "__main__":
    _cli.run(main)
