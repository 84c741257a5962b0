"""Write a network as a bit-packed file that bnnfree.engine runs without torch.

examples:
  python tools/export.py runs/reactnet_nobn -o model.bnnf
  python tools/export.py runs/c10/best.pt -o model.bnnf --head float
  python tools/export.py recipes/cifar10_reactnet20.yaml model.norm=bn -o random.bnnf
  python tools/export.py runs/reactnet_nobn -o model.onnx
  python tools/export.py net.py:build -o own.bnnf --image-size 32 48 --channels 1 --mean 0.5 --std 0.25

SOURCE is a run folder (its best checkpoint), a checkpoint, a recipe, which stands for its network with random
weights, or FILE.py:NAME, your own: a module, or a function that returns one. Scalings, biases, batch normalisation and
thresholds are folded; the first and the last layer keep 8-bit weights unless --stem or --head says float. A name that
ends in .onnx gets the same graph in floats, for Netron and ONNX Runtime. Before anything is written network and packed
model run on random images and must agree (--no-check: not). tools/verify.py SOURCE MODEL looks closer. Layers that
leave the fast kernels are named. The path of the file is printed last.
"""

from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli

SUFFIXES = {"bnnf": ".bnnf", "onnx": ".onnx"}
OWN = ("image_size", "channels", "mean", "std")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a run folder, a checkpoint, a recipe or FILE.py:NAME")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to a recipe, dotted keys")
    parser.add_argument("-o", "--out", required=True, type=cli.to_file, metavar="FILE", help="the file to write")
    parser.add_argument("--format", choices=tuple(SUFFIXES), help="default: by the ending of FILE, else bnnf")
    parser.add_argument("--with-recipe", action="store_true", help="keep the recipe in the file, but for its paths")
    parser.add_argument("--no-check", dest="check", action="store_false", help="write without running it first")
    own = parser.add_argument_group("of a network FILE.py:NAME")
    own.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="of its images, pixels")
    own.add_argument("--channels", type=int, metavar="N", help="of its images (default 3)")
    own.add_argument("--mean", type=float, nargs="+", metavar="X", help="of pixels scaled to 0..1, in training")
    own.add_argument("--std", type=float, nargs="+", metavar="X", help="likewise (default: mean 0, std 1)")
    parser.add_argument("--stem", choices=("int8", "float"), default="int8", help="weights of the first layer")
    parser.add_argument("--head", choices=("int8", "float"), default="int8", help="weights of the last layer")
    args = parser.read(source="recipe")

    from bnnfree.errors import BnnfreeError
    from bnnfree.export import check_packed, pack, pack_network
    from bnnfree.export.own import is_own, load_own
    from bnnfree.format import write
    from bnnfree.models import MODELS
    from bnnfree.train import open_source, source_kind

    if args.overrides and (is_own(args.source) or source_kind(args.source) != "recipe"):
        given = " ".join(args.overrides)
        raise BnnfreeError(f"{args.source}: got {given} for a network that is fixed; expected none.")
    ending = Path(args.out).suffix.lower()
    form = args.format or next((form for form, suffix in SUFFIXES.items() if suffix == ending), "bnnf")
    if ending in SUFFIXES.values() and ending != SUFFIXES[form]:
        raise BnnfreeError(f"-o: got {args.out} for --format {form}, expected a name that ends in {SUFFIXES[form]}.")
    given = {name: getattr(args, name) for name in OWN if getattr(args, name) is not None}
    ends = {"stem": args.stem, "head": args.head}
    if is_own(args.source):
        if args.with_recipe:
            raise BnnfreeError(f"--with-recipe: got it for {args.source}, which has no recipe.")
        if "image_size" not in given:
            raise BnnfreeError(f"--image-size: missing; {args.source} does not say what images it is for.")
        numbers = {
            name: value[0] if name in ("mean", "std") and len(value) == 1 else value for name, value in given.items()
        }
        packed, title = pack(load_own(args.source), **numbers, **ends), f"network   {args.source}"
    else:
        if given:
            option = next(iter(given)).replace("_", "-")
            raise BnnfreeError(f"--{option}: got it for {args.source}, which says itself what its images are.")
        network = open_source(args.source, MODELS, args.overrides)
        weights = "" if network.trained else ", random weights"
        title = f"network   {network.recipe.model.name}, norm {network.recipe.model.norm}{weights}"
        packed = pack_network(network, **ends, with_recipe=args.with_recipe)
    if args.check:
        check_packed(packed)
    model = packed.model
    if form == "onnx":
        from bnnfree.export.onnx import write_onnx as write
    size = write(model, args.out)
    height, width, channels = model.image_shape
    kinds: dict[str, int] = {}
    for op in model.ops:
        kinds[op.name] = kinds.get(op.name, 0) + 1
    console.say(title)
    print(f"image     {height}x{width}x{channels} (height x width x channels), {len(model.classes)} classes")
    print(f"ops       {', '.join(f'{count} {name}' for name, count in kinds.items())}")
    print(f"arena     {model.arena_bytes:,} bytes for the activations of one image")
    print(f"file      {size:,} bytes")
    for line in packed.slow:
        console.say(f"slow      {line}")
    console.say(args.out)
