"""Reading recipes: YAML, `extends`, `key=value` overrides, and errors that name file, key and remedy.

Imports yaml, pydantic, bnnfree.errors and bnnfree.train.recipe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bnnfree import errors
from bnnfree.files import replacing
from bnnfree.train.recipe import Recipe


class RecipeError(errors.BnnfreeError):
    """A recipe that cannot be read, or a key in it that is unknown, ill-typed or in contradiction."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as YAML 1.2 has it, and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def load_recipe(path: str | Path, overrides: Iterable[str] = (), models: Iterable[str] | None = None) -> Recipe:
    """The recipe in `path`, with `key=value` overrides, every default filled in.

    `extends: other.yaml` (one level, beside the file) supplies what the file does not say; lists are
    replaced as a whole. `models`: the known architectures, to check model.name against.
    Errors: RecipeError, naming file, key, the value received, what is allowed and the nearest name.
    """
    path = Path(path)
    tree = _read_extended(path)
    where = str(path)
    for override in overrides:
        _apply(tree, override, where)
    return parse_recipe(tree, where, models)


def parse_recipe(tree: dict, where: str, models: Iterable[str] | None = None) -> Recipe:
    """A Recipe from plain dictionaries; `where` is named in errors."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise RecipeError("\n".join(f"{where}: {line}" for line in lines)) from None
    if models is not None and recipe.model.name not in list(models):
        raise RecipeError(str(errors.unknown_name(f"{where}: model.name", recipe.model.name, models)))
    return recipe


def save_recipe(recipe: Recipe, path: str | Path, header: str = "") -> None:
    """Write the resolved recipe as YAML that `load_recipe` reads back to the same recipe."""
    text = yaml.safe_dump(recipe.model_dump(), sort_keys=False)
    with replacing(path) as temporary:
        temporary.write_text(header + text, encoding="utf-8")


def _read(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = errors.nearest(path.name, names)
        raise RecipeError(f"recipe {path}: no such file.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path}: cannot be read as text ({error}).") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise RecipeError(f"recipe {path}: got {type(tree).__name__}, expected keys such as model, data, stages.")
    return tree


def _read_extended(path: Path) -> dict:
    tree = _read(path)
    base_name = tree.pop("extends", None)
    if base_name is None:
        return tree
    if not isinstance(base_name, str):
        raise RecipeError(f"recipe {path}: extends: got {base_name!r}, expected the name of a recipe beside it.")
    base = _read(path.parent / base_name)
    if "extends" in base:
        raise RecipeError(f"recipe {path}: extends {base_name}, which extends another; one level is allowed.")
    return _merge(base, tree)


def _merge(base: dict, own: dict) -> dict:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict, override: str, where: str) -> None:
    """Set one `a.b=value` (list items by number: stages.0.epochs=2) in the plain tree."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected key=value, for example model.norm=bn.")
    try:
        value = yaml.load(text, Loader=_Loader) if text else None
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: {text!r} is not a value that YAML knows.") from None
    *parents, last = key.split(".")
    node: Any = tree
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, part, key, where)
        else:
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise RecipeError(f"{where}: {key}: {'.'.join(parents[: i + 1])} is a value and has no keys.")
    if isinstance(node, list):
        _item(node, last, key, where)
        node[int(last)] = value
    else:
        node[last] = value


def _item(node: list, part: str, key: str, where: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(f"{where}: {key}: got item {part!r}, expected a number from 0 to {len(node) - 1}.")
    return node[int(part)]


def _explain(item) -> str:
    """One pydantic error in the house form."""
    loc = [part for part in item["loc"] if not _is_union_branch(part)]
    key = ".".join(str(part) for part in loc) or "recipe"
    kind, got = item["type"], item["input"]
    if kind == "extra_forbidden":
        allowed = _fields_at(loc[:-1])
        return f"{key}: unknown key.{errors.nearest(str(loc[-1]), allowed)} Allowed here: {', '.join(allowed)}."
    if kind == "missing":
        return f"{key}: this key is missing and has no default."
    if kind == "contradiction":
        return item["msg"]
    if kind == "unknown_name":
        return f"{key}: {item['msg']}"
    expected = item["msg"].removeprefix("Input should be ")
    choices = re.findall(r"'([^']*)'", expected)
    hint = errors.nearest(got, choices) if isinstance(got, str) and choices else ""
    return f"{key}: got {got!r} ({type(got).__name__}), expected {expected}.{hint}"


def _is_union_branch(part) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("float", "str", "int", "constrained-str", "none"))


def _fields_at(loc: list) -> list[str]:
    """Names of the keys allowed at a place in the schema."""
    model: Any = Recipe
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
