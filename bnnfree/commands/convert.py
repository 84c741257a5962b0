"""Turn a published checkpoint of ReActNet or of BNN_NoBN into one of ours, or a run into a small file of its weights.

examples:
  python tools/convert.py FILE.pth.tar -o reactnet_a.pt
  python tools/convert.py FILE.pth.tar -o bf.pt --variant BNN_NoBN/Qaw_reactnet_A_bf --classes names.txt
  python tools/summary.py reactnet_a.pt
  python tools/evaluate.py bf.pt data.root=FOLDER
  python tools/convert.py runs/reactnet_nobn -o weights.pt --half

A run folder or checkpoint of ours becomes a checkpoint without what a training goes on from: init=weights.pt in a
recipe starts from it. --half keeps weights in bfloat16, which halves the file and changes the last digits.
Architecture, normaliser, width, stem and number of classes are found from keys and shapes. Where files of
several networks look the same (real and 1-bit weights do), --variant says which it is; without it the error
names them. evaluate.py compares the names of classes with the data's: for folders of images --classes holds
their names in sorted order. The path of the file written is printed last.
"""

from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("file", metavar="FILE|RUN", help="what their training wrote, or a run or checkpoint of ours")
    parser.add_argument(
        "-o", "--out", required=True, type=cli.to_file, metavar="OUT.pt", help="the checkpoint to write"
    )
    parser.add_argument("--variant", metavar="NAME", help="which network it is, where keys cannot tell")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line (default: class0, ...)")
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="side in pixels (default: 224; 32 for 10 or 100 classes)"
    )
    parser.add_argument("--half", action="store_true", help="weights in bfloat16")
    args = parser.read()

    from bnnfree.errors import BnnfreeError
    from bnnfree.models import MODELS
    from bnnfree.train.checkpoint import save_checkpoint
    from bnnfree.train.start import open_weights, weights_only

    if Path(args.out).suffix != ".pt":
        raise BnnfreeError(f"-o: got {args.out}, expected a name that ends in .pt.")
    names = None
    if args.classes:
        try:
            lines = Path(args.classes).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise BnnfreeError(f"--classes: {args.classes} cannot be read as text ({error}).") from None
        names = [line.strip() for line in lines if line.strip()]
    state = open_weights(args.file, MODELS, "FILE", variant=args.variant, classes=names, image_size=args.image_size)
    options = {"--variant": args.variant, "--classes": args.classes, "--image-size": args.image_size}
    if "published" not in state and (given := [name for name, value in options.items() if value is not None]):
        raise BnnfreeError(f"{given[0]}: {args.file} is a checkpoint of ours, which says so itself.")
    model, data = state["recipe"]["model"], state["data"]
    about = {
        **({"variant": state["published"]["variant"]} if "published" in state else {}),
        "model": model["name"],
        "norm": model["norm"],
        "binarize": state["binarize"],
        "width": f"{model['width']:g}",
        "stem": model["stem"],
        "classes": len(data["classes"]),
        "image size": data["image_size"][0],
    }
    console.say(", ".join(f"{key} {value}" for key, value in about.items()))
    save_checkpoint(args.out, weights_only(state, args.half))
    console.say(args.out)
