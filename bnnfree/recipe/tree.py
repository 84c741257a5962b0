"""Plain trees of keys and values from YAML files: bounded in size, errors of one line. Imports yaml, bnnfree.errors."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from bnnfree import errors

SUFFIXES = (".yaml", ".yml")
YAML = "expected YAML (.yaml, .yml)"
REMEDIES = {  # ending of a file that is no recipe -> where its recipe is
    ".pt": " A run's recipe.yaml is beside its checkpoint; init={} in a recipe starts from one.",
    ".bnnf": " What it was trained by: tools/dump.py {} --recipe.",
}
LONGEST = 4_000_000  # characters of a file
MOST_NODES = 100_000  # values of a file, each alias counted as what it stands for


class RecipeError(errors.BnnfreeError):
    """A recipe that cannot be read, or a key in it that is unknown, ill-typed or in contradiction."""


class Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number and 1:30 a text, as YAML 1.2 has it, and a key given twice is an error.

    Aliases cannot make a small file large: what they stand for is counted before anything is made of it.
    """

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None and _size(node, {}) > MOST_NODES:
            raise yaml.YAMLError(f"it stands for more than {MOST_NODES:,} values, its aliases written out")
        return node

    def construct_object(self, node, deep=False):
        return super().construct_object(node, deep=True)  # Why: so a node that holds itself is an error

    def construct_mapping(self, node, deep=False):
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        seen = set()
        for key_node, _ in pairs:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what Loader would take for a number."""


FLOAT, INT = "tag:yaml.org,2002:float", "tag:yaml.org,2002:int"
EXPONENT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
# YAML 1.1's, less 1:30 for 90. Why: a long one takes quadratic time, and nobody means it
BASE_10 = {
    FLOAT: re.compile(
        r"^([-+]?\d[\d_]*\.[\d_]*([eE][-+]\d+)?|\.\d[\d_]*([eE][-+]\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    INT: re.compile(r"^[-+]?(0b[01_]+|0[0-7_]+|0|[1-9][\d_]*|0x[\da-fA-F_]+)$"),
}
for _side in (Loader, Dumper):
    _side.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))
Loader.yaml_implicit_resolvers = {
    first: [(tag, BASE_10[tag] if tag in BASE_10 and pattern is not EXPONENT else pattern) for tag, pattern in rules]
    for first, rules in Loader.yaml_implicit_resolvers.items()
}


def _size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Values below `node` and itself, a shared one counted wherever it stands; of a circle once around."""
    if node not in sizes:
        sizes[node] = 1
        if isinstance(node, yaml.MappingNode):
            sizes[node] += sum(_size(part, sizes) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            sizes[node] += sum(_size(part, sizes) for part in node.value)
    return sizes[node]


def parse_yaml(text: str) -> Any:
    """Parse `text` as YAML. Errors: RecipeError, of one line."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise RecipeError(" ".join(str(error).split())) from None
    # Why: PyYAML's own slips: month 13 of a date, 0x_, !!bool maybe, thousands of nested brackets
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise RecipeError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def read_tree(path: Path, what: str, expected: str = "model, data, stages", beside: bool = False) -> dict:
    """The keys of a YAML file; `what` names it and `expected` some of its keys in errors. Errors: RecipeError.

    beside: it was named by its name alone.
    """
    if path.is_file() and path.suffix not in SUFFIXES:
        remedy = REMEDIES.get(path.suffix, "").format(path)
        raise RecipeError(f"{what}: got a file that ends in {path.suffix!r}, {YAML}.{remedy}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except FileNotFoundError:
        expected = "" if path.suffix in SUFFIXES else f", {YAML}"
        raise RecipeError(f"{what}: no such file{expected}.{_similar(path, beside)}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{what}: cannot be read as text ({error}).") from None
    if len(text) > LONGEST:
        raise RecipeError(f"{what}: got more than {LONGEST:,} characters, expected keys such as {expected}.")
    try:
        tree = parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{what}: not valid YAML: {error}{_meant(str(error))}") from None
    if tree is None:
        raise RecipeError(f"{what}: is empty, expected keys such as {expected}.")
    if not isinstance(tree, dict):
        hint = " Write a space after each colon." if isinstance(tree, str) and re.search(r"\w:\w", tree) else ""
        raise RecipeError(f"{what}: got a {type(tree).__name__}, expected keys such as {expected}.{hint}")
    return tree


def _similar(path: Path, beside: bool) -> str:
    """A hint: the path (its name alone) of the recipe with the most similar name, there or in recipes/."""
    for folder in dict.fromkeys((path.parent, path.parent / "recipes")):
        names = [each.name for each in folder.glob("*.yaml")] if folder.is_dir() else []
        if hint := errors.nearest(path.name, names, "" if beside or folder == Path(".") else f"{folder}/"):
            return hint
    return ""


def _meant(error: str) -> str:
    """A hint for the slips that YAML's own words do not explain."""
    if "alias" in error or "cannot start any token" in error:
        return " A text that begins with *, & or another sign needs quotes."
    slips = ("could not find expected ':'", "mapping values are not allowed")
    return " Is there a space after each colon?" if any(slip in error for slip in slips) else ""
