"""Recipes, sweeps and networks that come with bnnfree, found by name.

They lie in recipes/ and models/pretrained/ of the repository, once; setup.py copies them beside this file when it
builds a wheel. Standard library only.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent
ROOT = _HERE if (_HERE / "recipes").is_dir() else _HERE.parent.parent  # installed, or in a checkout
KINDS = {  # folder below ROOT and ending of the files
    "recipe": ("recipes", ".yaml"),
    "sweep": ("recipes/sweeps", ".yaml"),
    "network": ("models/pretrained", ".bnnf"),
}


def names(kind: str) -> list[str]:
    """The names of a kind of things, a key of KINDS."""
    folder, ending = KINDS[kind]
    return sorted(path.stem for path in (ROOT / folder).glob(f"*{ending}"))


def find(kind: str, text: str) -> str:
    """The path of what `text` names; `text` itself where it is a path, or no name of that kind."""
    folder, ending = KINDS[kind]
    if not text or Path(text).exists() or text not in names(kind):
        return text
    return str(ROOT / folder / f"{text}{ending}")
