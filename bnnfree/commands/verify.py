"""Check that a packed file is the network it was exported from: torch, float64 and every engine backend.

examples:
  python tools/verify.py runs/reactnet_nobn model.bnnf --samples 256
  python tools/verify.py runs/c10 model.bnnf --images FOLDER
  python tools/verify.py recipes/cifar10_reactnet20.yaml random.bnnf --samples 64 --json verify.json
  python tools/verify.py net.py:build own.bnnf --samples 64

SOURCE is what tools/export.py was given, with the same key=value: FILE.py:NAME for a network of your own, which must
come with the weights it had then. Layer by layer it counts bits that differ and measures floats in ulp; then it
compares the classes of all images. A tie is a bit so near its threshold that rounding decides; an untrained network has
many, for its biases are 0 and so are many sums. Exit code 0: equal in this sense, which bnnfree/export/verify.py
states: every backend to the bit, every sum of signs and bit the same but for ties, and the same class for --agreement
of the images. 1: not equal.
--images takes all image files in a folder and below it; --samples makes random images with structure.
"""

import json

from bnnfree import console
from bnnfree.commands import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("source", metavar="SOURCE", help="a run folder, a checkpoint, a recipe or FILE.py:NAME")
    parser.add_argument("model", metavar="MODEL", help="the packed file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to a recipe, dotted keys")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--images", metavar="DIR", help="a folder of image files")
    which.add_argument("--samples", type=int, metavar="N", help="so many random images")
    parser.add_argument("--agreement", type=float, default=0.995, metavar="SHARE", help="default: %(default)s")
    parser.add_argument("--layer-images", type=int, default=32, metavar="N", help="compared by layer (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="of the random images")
    parser.add_argument("--json", type=cli.to_file, metavar="FILE", help="write all figures there")
    args = parser.read(source="recipe", model="network")

    import numpy as np

    from bnnfree.errors import BnnfreeError
    from bnnfree.export import pack, pack_network
    from bnnfree.export.own import is_own, load_own
    from bnnfree.export.verify import check_same_activations, sample_images, verify
    from bnnfree.files import replacing
    from bnnfree.format import read
    from bnnfree.format.text import split_numbers
    from bnnfree.models import MODELS
    from bnnfree.preprocess import find_images, load_image, reading_of
    from bnnfree.progress import Progress, over
    from bnnfree.train import open_source

    if args.samples is not None and args.samples < 1:
        raise BnnfreeError(f"--samples: got {args.samples}, expected 1 or more.")
    if args.layer_images < 1 or args.seed < 0:
        raise BnnfreeError("--layer-images, --seed: expected whole numbers of at least 1 and 0.")
    if not 0 <= args.agreement <= 1:
        raise BnnfreeError(f"--agreement: got {args.agreement}, expected a share from 0 to 1.")
    model = read(args.model)
    ends = {name: model.metadata.get(name, "int8") for name in ("stem", "head")}
    if is_own(args.source):
        if args.overrides:
            raise BnnfreeError(f"{args.source}: got {' '.join(args.overrides)} for a network of its own code.")
        rows, columns, depth = model.image_shape
        known = {key: split_numbers(model.metadata.get(key, ""), f"{args.model}: {key}") for key in ("mean", "std")}
        packed = pack(load_own(args.source), image_size=(rows, columns), channels=depth, **known, **ends)
    else:
        packed = pack_network(open_source(args.source, MODELS, args.overrides), **ends)
    check_same_activations(packed, model)
    height, width, channels = model.image_shape
    if args.images:
        files = find_images(args.images)
        resize = model.metadata.get("resize", "square")
        reading = reading_of(model.metadata, channels, args.model)
        read_as = (height, width), channels, resize
        known = {"orientation": reading.orientation, "limits": reading.limits}
        counted = over(files, "reading", "images", delay=1)
        images = np.stack([load_image(file, *read_as, **known) for file in counted])
    else:
        images = sample_images((height, width, channels), args.samples, args.seed)
    total = len(images) + min(len(images), args.layer_images)
    with Progress(total, "verifying", "images", delay=1) as bar:
        sizes = {"layer_images": args.layer_images, "batch_size": 32 if height * width <= 64 * 64 else 8}
        report = verify(packed, model, images, agreement=args.agreement, progress=bar.update, **sizes)
    print(report.table())
    if args.json:
        about = {"source": args.source, "model": args.model, "images_from": args.images or f"seed {args.seed}"}
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(about | report.to_dict(), indent=1) + "\n", encoding="utf-8")
        console.say(args.json)
    if not report.equal:
        raise SystemExit(1)
