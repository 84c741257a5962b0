"""Copy a folder of images into tar shards: a few large files, for network drives and object storage.

examples:
  python tools/shard.py data/imagenet -o data/imagenet-shards
  python tools/shard.py data/imagenet -o data/imagenet-shards --size 250MB --skip-bad
  python tools/train.py recipes/imagenet_reactnet_a.yaml data.name=shards data.root=data/imagenet-shards
  python tools/train.py recipes/imagenet_reactnet_a.yaml data.name=shards data.root=https://HOST/imagenet-shards

FOLDER holds train/ and test/ or val/, each with one folder per class, as data.name=image_folder takes it. Files are
copied as they are, in an order drawn at random, the same every time; the webdataset library reads such shards too.
OUT is a new folder; upload it whole, its index.json says where each image lies. Its path is printed last.
"""

import re

from bnnfree import console
from bnnfree.commands import cli

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SMALLEST = 10**3  # bytes


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", metavar="FOLDER", help="folder of the images")
    parser.add_argument("-o", "--out", required=True, type=cli.to_folder, metavar="OUT", help="the folder to write")
    parser.add_argument("--size", default="100MB", metavar="SIZE", help="of the images in a shard (default: 100MB)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out files that are no images")
    args = parser.read()

    from bnnfree.data.tar_index import write

    skipped = write(args.folder, args.out, size=size_of(args.size), skip_bad=args.skip_bad, where="shard.py")
    if skipped:
        print(f"{skipped} bad files left out")
    console.say(args.out)


def size_of(text: str) -> int:
    """Bytes of a size such as 100MB or 1.5GB."""
    from bnnfree.errors import BnnfreeError

    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([KMG]B|)", text.strip().upper())
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < SMALLEST:
        raise BnnfreeError(f"--size: got {text!r}, expected a size of 1KB or more, such as 100MB or 1.5GB.")
    return size
