"""Write a network as a bit-packed file that bnnfree.engine runs without torch.

examples:
  python tools/export.py runs/reactnet_nobn -o model.bnnf
  python tools/export.py runs/c10/best.pt -o model.bnnf --head float
  python tools/export.py recipes/cifar10_reactnet20.yaml model.norm=bn -o random.bnnf
  python tools/export.py runs/reactnet_nobn -o model.onnx --format onnx

SOURCE is a run folder (its best checkpoint), a checkpoint, or a recipe, which stands for its network with random
weights. Scalings, biases, batch normalisation and thresholds are folded; the first and the last layer keep 8-bit
weights unless --stem or --head says float. --format onnx writes the same graph in floats, for Netron and ONNX
Runtime. Is the file the same network? tools/verify.py SOURCE MODEL. The path of the file is printed last.
"""

import argparse
from pathlib import Path

import _cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="a run folder, a checkpoint or a recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to a recipe, dotted keys")
    parser.add_argument("-o", "--out", required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--format", choices=("bnnf", "onnx"), default="bnnf")
    parser.add_argument("--stem", choices=("int8", "float"), default="int8", help="weights of the first layer")
    parser.add_argument("--head", choices=("int8", "float"), default="int8", help="weights of the last layer")
    args = parser.parse_intermixed_args()

    from bnnfree.errors import BnnfreeError
    from bnnfree.export import pack_network
    from bnnfree.format import write
    from bnnfree.train import open_source, source_kind
    from models import MODELS

    if Path(args.out).is_dir():
        raise BnnfreeError(f"-o: got the folder {args.out}, expected a file name such as {args.out}/model.bnnf.")
    if args.overrides and source_kind(args.source) != "recipe":
        given = " ".join(args.overrides)
        raise BnnfreeError(f"{args.source}: got {given} for a checkpoint, whose network is fixed; expected none.")
    network = open_source(args.source, MODELS, args.overrides)
    packed = pack_network(network, stem=args.stem, head=args.head)
    model = packed.model
    if args.format == "onnx":
        from bnnfree.export.onnx import write_onnx as write
    size = write(model, args.out)
    height, width, channels = model.image_shape
    kinds: dict[str, int] = {}
    for op in model.ops:
        kinds[op.name] = kinds.get(op.name, 0) + 1
    weights = "" if network.trained else ", random weights"
    print(f"network   {network.recipe.model.name}, norm {network.recipe.model.norm}{weights}")
    print(f"image     {height}x{width}x{channels} (height x width x channels), {len(model.classes)} classes")
    print(f"ops       {', '.join(f'{count} {name}' for name, count in kinds.items())}")
    print(f"arena     {model.arena_bytes:,} bytes for the activations of one image")
    print(f"file      {size:,} bytes")
    print(args.out)


if __name__ == "__main__":
    _cli.run(main)
