"""Show what a network holds and costs: per layer and in total, parameters, bytes, multiply-accumulates.

examples:
  python tools/summary.py recipes/cifar10_reactnet20.yaml
  python tools/summary.py recipes/cifar10_reactnet20.yaml model.name=reactnet_a model.norm=bn
  python tools/summary.py recipes/cifar10_reactnet20.yaml --image-size 224
  python tools/summary.py runs/reactnet_nobn --json summary.json

The network of a recipe is that of its last stage; its data need not be there (image_folder: its folders
must). A checkpoint or run folder stands for the network that it holds. All units: under the table.
With --json the file's path is printed last.
"""

import json
from dataclasses import replace

from bnnfree import console
from bnnfree.commands import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("source", metavar="RECIPE", help="a YAML file, or a checkpoint, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, dotted keys")
    parser.add_argument("--json", type=cli.to_file, metavar="FILE", help="write all numbers to FILE")
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="side of the image in pixels (default: the data's own)"
    )
    args = parser.read(source="recipe")

    from bnnfree.analysis import summarize
    from bnnfree.errors import BnnfreeError
    from bnnfree.export import ExportError, pack_network, packed_bytes
    from bnnfree.files import replacing
    from bnnfree.models import MODELS
    from bnnfree.train import open_source, source_kind

    overrides, side = args.overrides, args.image_size
    if source_kind(args.source) == "recipe":
        overrides = [*overrides, *([] if side is None else [f"data.image_size={side}"])]
    elif overrides:
        raise BnnfreeError(
            f"{args.source}: got {' '.join(overrides)} for a checkpoint, whose network is fixed; expected "
            "no key=value. Give the recipe to change it."
        )
    network = open_source(args.source, MODELS, overrides)
    image_size = tuple(network.data["image_size"]) if side is None else (side, side)
    summary = summarize(network.model, image_size, network.data["channels"])
    about = {
        "source": network.source,
        "model": network.recipe.model.name,
        "norm": network.recipe.model.norm,
        "binarize": network.binarize,
        "classes": len(network.data["classes"]),
    }
    console.say(", ".join(f"{key} {value}" for key, value in about.items()), "")
    print(summary.table())
    try:
        found = pack_network(replace(network, data=network.data | {"image_size": image_size}))
        packed = packed_bytes(found.model)
        parts = ", ".join(f"{name} {size:,}" for name, size in packed.items() if name != "total")
        print(f"\npacked file  {packed['total']:,} bytes as tools/export.py writes it: {parts}")
        for line in found.slow:
            console.say(f"slow         {line}")
    except ExportError as error:
        packed = None
        console.say("", f"packed file  none: {error}")
    if args.json:
        figures = about | {"packed_bytes": packed} | summary.to_dict()
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        console.say(args.json)
