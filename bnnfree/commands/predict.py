"""Say what is on images, by a packed network. Needs numpy and Pillow, no torch.

examples:
  python tools/predict.py model.bnnf cat.jpg
  python tools/predict.py model.bnnf photos/*.jpg --top 1 --threads 4
  python tools/predict.py model.bnnf cat.jpg dog.png --json answers.json

Each image gets a block: its file, then the most probable classes in percent. Images are cut and scaled as the
network was trained ("resize" in the model's metadata; the largest centred box where it says nothing) and become
grey or RGB as it takes them; "orientation" there says whether a camera's turn counts, "range" which values
of files of more than 8 bits are black and white. A network that does not end in softmax gets one.

An image that cannot be read stops nothing: the others are done first, then the error names it and the exit code
is 2. With --json all that was found, and the errors, go to FILE, whose path is printed last.
"""

import json
from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli

TOGETHER = 64  # images in memory at one time


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a packed network (.bnnf)")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="how many classes to name (default: 5)")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="of bnnfree.engine (default: auto)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="how many work on the images (default: 1)")
    parser.add_argument("--json", type=cli.to_file, metavar="FILE", help="write the predictions there as well")
    args = parser.read(model="network")

    from bnnfree.engine import load
    from bnnfree.errors import BnnfreeError, DataError
    from bnnfree.files import replacing

    if args.top < 1:
        raise BnnfreeError(f"--top: got {args.top}, expected a whole number of 1 or more.")
    engine = load(args.model, args.backend, args.threads)
    read = reader(engine.model, args.model)
    found, errors, files = [], [], list(dict.fromkeys(images_of(args.images)))
    for first in range(0, len(files), TOGETHER):
        pixels = {}
        for path in files[first : first + TOGETHER]:
            try:
                pixels[path] = read(path)
            except DataError as error:
                errors.append({"image": path, "error": str(error)})
        for path, top in zip(pixels, predict(engine, list(pixels.values()), args.top), strict=True):
            console.say(*[""] if found else [], path, *(f"{100 * t['probability']:7.2f} %  {t['class']}" for t in top))
            found.append({"image": path, "top": top})
    if args.json:
        with replacing(args.json) as temporary:
            result = {"model": args.model, "images": found, "errors": errors}
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.say(args.json)
    if errors:
        raise DataError(*(e["error"] for e in errors))


def images_of(paths):
    """The files that are named, and all image files in the folders that are."""
    from bnnfree.preprocess import find_images

    for path in paths:
        yield from map(str, find_images(path)) if Path(path).is_dir() else [path]


def reader(model, path):
    """Function from an image file to `model`'s input. Errors: a model that takes no images, or gives no classes."""
    from bnnfree.errors import BnnfreeError, pick
    from bnnfree.preprocess import RESIZES, load_image, reading_of

    height, width, channels = model.image_shape
    rows, columns, _ = model.tensors[model.output].shape
    if (rows, columns) != (1, 1):
        raise BnnfreeError(f"{path}: gives a map of {rows}x{columns}, expected one number per class.")
    reading = reading_of(model.metadata, channels, path)
    resize = model.metadata.get("resize", "square")
    pick(RESIZES, resize, f"{path}: metadata: resize")
    known = {"orientation": reading.orientation, "limits": reading.limits}
    return lambda file: load_image(file, (height, width), channels, resize, **known)


def predict(engine, pixels, count):
    """The `count` most probable classes of each image, the best first; of equals the one that comes first."""
    import numpy as np

    from bnnfree.ops import softmax

    if not pixels:
        return []
    model = engine.model
    scores = engine.run(np.stack(pixels))
    last = next(op for op in model.ops if model.output in op.writes())
    shares = scores if last.name == "softmax" else softmax(scores)
    names = model.classes or [str(i) for i in range(scores.shape[1])]
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    return [
        [{"class": names[i], "index": int(i), "probability": float(share[i])} for i in row]
        for row, share in zip(order, shares, strict=True)
    ]
