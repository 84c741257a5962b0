"""The command `bnnfree`: bnnfree NAME arguments. Imports what NAME needs, and nothing else."""

from __future__ import annotations

import importlib
import sys

import bnnfree
from bnnfree.commands import cli
from bnnfree.errors import BnnfreeError, nearest

COMMANDS = {
    "train": "train a network from a recipe",
    "evaluate": "accuracy of a network or of a packed file",
    "export": "a trained network as a packed file, or as ONNX",
    "verify": "compare a packed file with the network that it came from",
    "predict": "say what is on images",
    "summary": "layers, operations and sizes of a network",
    "dump": "what a packed file holds, or how two differ",
    "bench": "speed of the engine, of training or of reading images",
    "sweep": "many trainings over a grid of recipe keys",
    "compare": "curves and results of several runs",
    "probe": "measurements of the binary layers of a run",
    "price": "what each normaliser costs",
    "shard": "image folders as tar shards",
    "convert": "published checkpoints, and small files of weights",
    "completion": "completion of these commands for a shell",
}
INNER = {"held-alone": ("bnnfree.bench.contenders", "answer")}
"""Commands that processes of ours call: name -> module, function."""


def usage() -> str:
    """The list of commands, a line each."""
    wide = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{wide}}  {meaning}" for name, meaning in COMMANDS.items())
    return f"usage: bnnfree COMMAND [arguments]\n\n{rows}\n\nbnnfree COMMAND --help says more, with examples."


def main() -> None:
    """The console script."""
    cli.run(_main)


def _main() -> None:
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in ("", "-h", "--help", "help"):
        print(usage())
        if not name:
            raise SystemExit(2)
        return
    if name in ("-V", "--version", "version"):
        print(f"bnnfree {bnnfree.__version__}")
        return
    if name not in COMMANDS and name not in INNER:
        raise BnnfreeError(f"bnnfree: got the command {name!r}.{nearest(name, COMMANDS)} bnnfree --help lists them.")
    sys.argv = [f"bnnfree {name}", *arguments]
    module, function = INNER.get(name, (f"bnnfree.commands.{name}", "main"))
    getattr(importlib.import_module(module), function)()
