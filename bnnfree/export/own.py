"""A user's own network by the name FILE.py:NAME: a module, or a function that returns one. Imports torch."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from torch import nn

from bnnfree.errors import BnnfreeError, nearest


def is_own(source: str) -> bool:
    """True for FILE.py:NAME."""
    path, colon, name = source.rpartition(":")
    return bool(colon) and path.endswith(".py") and name.isidentifier()


def load_own(source: str) -> nn.Module:
    """The module that FILE.py:NAME stands for; runs the file, which may import what lies beside it.

    Errors: BnnfreeError.
    """
    file, _, name = source.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise BnnfreeError(f"network {file}: no such file.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # of a name that ends in .py
    code = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, code)
    sys.path.append(str(path.resolve().parent))
    try:
        spec.loader.exec_module(code)
    except SyntaxError as error:
        raise BnnfreeError(f"network {file}: line {error.lineno}: {error.msg}.") from None
    if not hasattr(code, name):
        raise BnnfreeError(f"network {file}: has no {name!r}.{nearest(name, vars(code))}")
    found = getattr(code, name)
    model = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(model, nn.Module):
        raise BnnfreeError(f"network {source}: gives a {type(model).__name__}, expected a torch module.")
    return model
