"""Keys that recipes had, of experiments that are over (recipes/NOTES.md): one table. Imports names and its own room.

A recipe that sets one is told why it is gone. Files that hold every key, as runs and checkpoints do, hold these too:
at the value that did nothing they are left out, at another there is nothing that could do the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bnnfree.names import GROUP
from bnnfree.recipe.tree import RecipeError


@dataclass(frozen=True)
class Retired:
    """A key that is gone: the values that did nothing, and the reason in a sentence without its full stop."""

    neutral: tuple[Any, ...]
    why: str


NO_GAIN = "it gained nothing where it was measured (recipes/NOTES.md, section 12)"
RETIRED = {
    "model.ste_parameter": Retired((None,), f"{NO_GAIN}; an estimator has its own width"),
    "model.ste_last": Retired((None,), f"{NO_GAIN}; an estimator has its own width"),
    "model.start": Retired(("plain",), f"{NO_GAIN}; thresholds and shifts start at 0"),
    "optimizer.gain_decay": Retired((0, 0.0), f"{NO_GAIN}; gains do not decay"),
    "free.freeze": Retired((1, 1.0), f"{NO_GAIN}; input means follow to the end, or free.track=false"),
    "free.gather": Retired(
        (), "groups have its place (recipes/NOTES.md, section 19); free.group says of how many images"
    ),
    "optimizer.bnp_floor": Retired((0.01,), "nobody set it; the preconditioner has a constant, 0.01"),
    "agc.eps": Retired((0.001,), "nobody set it; the clipping has a constant, 0.001"),
    "probe.images": Retired((64,), "nothing was learned from another number; a probe sees 64 images"),
}
OF_FREE = {"window", "calibration", "track", "recalibrate", "reference"}  # which stored files with free.gather have


def translated(tree: Any) -> Any:
    """The tree of a file that a run wrote before groups: free.gather as the free.group that does the same."""
    free = tree.get("free") if isinstance(tree, dict) else None
    if not isinstance(free, dict) or not isinstance(free.get("gather"), bool) or not free.keys() >= OF_FREE:
        return tree
    rest = {key: value for key, value in free.items() if key != "gather"}
    return {**tree, "free": {"group": GROUP if free["gather"] else 0, **rest}}


def without_retired(tree: Any, where: str, stored: bool) -> Any:
    """The tree without retired keys. stored: it is a file that a run has written, which may hold them at no effect.

    Errors: RecipeError that names each other one.
    """
    if not isinstance(tree, dict):
        return tree
    lines, kept = [], dict(tree)
    for key, retired in RETIRED.items():
        section, _, name = key.partition(".")
        part = kept.get(section)
        if not isinstance(part, dict) or name not in part:
            continue
        value = part[name]
        if not stored or not any(type(value) is type(each) and value == each for each in retired.neutral):
            was = f"{key}: got {value!r:.80}, but this key is no more: {retired.why}."
            lines.append(f"{where}: {was} {'Leave it out.' if not stored else 'An older bnnfree opens this file.'}")
        kept[section] = {other: value for other, value in part.items() if other != name}
    if lines:
        raise RecipeError(*lines)
    return kept
