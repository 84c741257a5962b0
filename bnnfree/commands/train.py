"""Train a network from a recipe to a result.

examples:
  python tools/train.py recipes/reactnet_nobn.yaml
  python tools/train.py recipes/cifar10_reactnet20.yaml data.name=image_folder data.root=FOLDER
  python tools/train.py recipes/cifar10_reactnet20.yaml model.norm=bn --out runs/twin_bn
  python tools/train.py recipes/cifar10_reactnet20.yaml --dry-run
  python tools/train.py recipes/reactnet_nobn.yaml --resume
  python tools/train.py runs/reactnet_nobn --resume
  python tools/train.py --keys
  torchrun --standalone --nproc_per_node 2 tools/train.py recipes/cifar10_reactnet18.yaml
  torchrun --standalone --nproc_per_node 8 --max-restarts 3 tools/train.py recipes/imagenet_reactnet18.yaml

data.batch_size counts the images of all processes together. When a process is killed, torchrun --max-restarts
starts all again and they go on from the last checkpoint by themselves; after the whole job: --resume.
With probe.every=100 every binary layer is measured each 100 steps (tools/probe.py). Prints the run folder last; it
holds recipe.yaml, metrics.jsonl, curves.png, last.pt, best.pt, result.json, and probe.png where layers are measured.
"""

import argparse
import shlex
from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli

CHECKPOINTS = ("last.pt", "best.pt")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("recipe", nargs="?", help="a YAML file, see recipes/README.md, or a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe, dotted keys")
    parser.add_argument("--out", type=cli.to_folder, metavar="DIR", help="run folder (default: runs/<recipe>)")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last checkpoint")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--dry-run", action="store_true", help="two steps on fake data, time and memory estimate, no files"
    )
    parser.add_argument("--keys", action="store_true", help="print every recipe key: type, default, meaning")
    args = parser.read(recipe="recipe")
    if args.keys:
        from bnnfree.recipe.keys import key_table

        print(key_table())
        return
    if args.recipe is None:
        parser.error("a recipe is needed, for example reactnet_nobn")

    from bnnfree.train import dist as processes

    with processes.one_voice():
        train(args)


def train(args: argparse.Namespace) -> None:
    """Train as the command line says."""
    import torch

    from bnnfree.errors import BnnfreeError
    from bnnfree.models import MODELS
    from bnnfree.train import dist as processes
    from bnnfree.train import fit, load_recipe

    if args.threads is not None:
        if not 1 <= args.threads <= 1024:
            raise BnnfreeError(f"--threads: got {args.threads}, expected 1 to 1024.")
        torch.set_num_threads(args.threads)
    path, out = paths_of(args)
    recipe = load_recipe(path, args.overrides, MODELS)
    where = f"{path}: data"
    if args.dry_run:
        from bnnfree.train.dry import dry_run

        text = dry_run(recipe, MODELS, where)
        processes.stop()
        if processes.speaks():
            print(text)
        return
    cli.on_interrupt(lambda: what_is_left(out))
    result = fit(recipe, MODELS, out, resume=args.resume, where=where)
    if processes.speaks():
        print(f"test top-1 {result['test_top1']:.2f} % after {result['epochs']} epochs, {result['seconds']:.0f} s")
        console.say(out)


def paths_of(args: argparse.Namespace) -> tuple[Path, Path]:
    """Recipe and run folder. A run folder in the recipe's place stands for its own recipe and for itself, and so do
    its recipe.yaml and, where a run is to go on, its checkpoints."""
    from bnnfree.errors import BnnfreeError, nearest_path

    given = Path(args.recipe)
    recipe, out = given, Path("runs") / given.stem
    if args.resume and not given.suffix and not given.exists():
        raise BnnfreeError(f"run folder {given}: no such folder, expected one to go on with.{nearest_path(given)}")
    if given.is_dir() and not (given / "recipe.yaml").exists():
        raise BnnfreeError(f"recipe {given}: is a folder without recipe.yaml, expected a YAML file or a run folder.")
    if given.is_dir():
        recipe, out = given / "recipe.yaml", given
    elif given.name in ("recipe.yaml", *CHECKPOINTS) and (given.parent / "metrics.jsonl").exists():
        if args.resume or given.name == "recipe.yaml":
            recipe, out = given.parent / "recipe.yaml", given.parent
    return recipe, Path(args.out or out)


def what_is_left(out: Path) -> str:
    """Words on how a training that was interrupted goes on."""
    again = shlex.join(["python", "tools/train.py", str(out), "--resume"])
    if (out / "last.pt").exists():
        return f"from its last checkpoint the run goes on with: {again}"
    if (out / "recipe.yaml").exists():
        return f"there is no checkpoint yet; the run begins anew with: {again}"
    return "nothing was written yet; the same command begins anew"
