"""A user's own network by the name FILE.py:NAME: a module, or a function that returns one. Imports torch."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

from torch import nn

from bnnfree.errors import BnnfreeError, nearest


def is_own(source: str) -> bool:
    """True for FILE.py:NAME, and for a file of Python without a name, which `load_own` refuses."""
    return source.endswith(".py") or source.rpartition(":")[0].endswith(".py")


def load_own(source: str) -> nn.Module:
    """The module that FILE.py:NAME stands for; runs the file, which may import what lies beside it.

    Errors: BnnfreeError, for whatever the file's own code raises too.
    """
    file, _, name = source.rpartition(":")
    if not name.isidentifier():
        raise BnnfreeError(f"network {source}: expected FILE.py:NAME, the name of a module or of a function.")
    path = Path(file)
    if not path.is_file():
        raise BnnfreeError(f"network {file}: no such file.")
    own = f"_own_{path.stem}"  # Why not its own name: another module may have that
    spec = importlib.util.spec_from_file_location(own, path)
    assert spec is not None and spec.loader is not None  # of a name that ends in .py
    code = importlib.util.module_from_spec(spec)
    sys.modules[own] = code
    sys.path.append(str(path.resolve().parent))
    try:
        spec.loader.exec_module(code)
        if not hasattr(code, name):
            raise BnnfreeError(f"network {file}: has no {name!r}.{nearest(name, vars(code))}")
        found = getattr(code, name)
        model = found if isinstance(found, nn.Module) or not callable(found) else found()
    except BnnfreeError:
        raise
    except SyntaxError as error:
        raise BnnfreeError(f"network {error.filename or file}: line {error.lineno}: {error.msg}.") from None
    except Exception as error:  # Why: the user's code may raise anything
        line = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())
        raise BnnfreeError(
            f"network {source}: its code raises {type(error).__name__} at {line.filename}:{line.lineno} ({message}). "
            "Expected a module, or a function that takes no arguments and returns one."
        ) from None
    if not isinstance(model, nn.Module):
        raise BnnfreeError(f"network {source}: gives a {type(model).__name__}, expected a torch module.")
    return model
