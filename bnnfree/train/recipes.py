"""Reading recipes: YAML, `extends`, `key=value` overrides, and errors that name file, key and remedy.

Imports yaml, pydantic, bnnfree.errors and bnnfree.train.recipe.
"""

from __future__ import annotations

import copy
import re
import reprlib
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bnnfree import errors
from bnnfree.files import replacing
from bnnfree.train.recipe import Recipe


class RecipeError(errors.BnnfreeError):
    """A recipe that cannot be read, or a key in it that is unknown, ill-typed or in contradiction."""


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as YAML 1.2 has it, and a key given twice is an error."""

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


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes what _Loader would take for a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
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
    tree, where = _read_extended(path)
    return parse_recipe(tree, where, models, overrides)


def parse_recipe(tree: dict, where: str, models: Iterable[str] | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """A Recipe from plain dictionaries (a checkpoint holds one); `where` is named in errors."""
    tree = copy.deepcopy(tree)
    for override in overrides:
        _apply(tree, override, where)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{where}: {line}" for line in _explain(error))) from None
    known = None if models is None else list(models)
    if known is not None and recipe.model.name not in known:
        raise RecipeError(str(errors.unknown_name(f"{where}: model.name", recipe.model.name, known)))
    return recipe


def save_recipe(recipe: Recipe, path: str | Path, header: str = "") -> None:
    """Write the resolved recipe as YAML that `load_recipe` reads back to the same recipe."""
    text = yaml.dump(recipe.model_dump(), Dumper=_Dumper, sort_keys=False)
    with replacing(path) as temporary:
        temporary.write_text(header + text, encoding="utf-8")


def parse_yaml(text: str) -> Any:
    """What `text` says. Errors: RecipeError, of one line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(" ".join(str(error).split())) from None
    # Why: PyYAML's own slips: month 13 of a date, 0x_, !!bool maybe, thousands of nested brackets
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        raise RecipeError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None


def read_tree(path: Path, what: str, expected: str = "model, data, stages") -> dict:
    """The keys of a YAML file; `what` names it and `expected` some of its keys in errors. Errors: RecipeError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise RecipeError(f"{what}: no such file.{errors.nearest(path.name, names)}") from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"{what}: cannot be read as text ({error}).") from None
    try:
        tree = parse_yaml(text)
    except RecipeError as error:
        raise RecipeError(f"{what}: not valid YAML: {error}") from None
    if tree is None:
        raise RecipeError(f"{what}: is empty, expected keys such as {expected}.")
    if not isinstance(tree, dict):
        raise RecipeError(f"{what}: got a {type(tree).__name__}, expected keys such as {expected}.")
    return tree


def _read_extended(path: Path) -> tuple[dict, str]:
    """The plain tree of a file and of what it extends, and what errors call it."""
    tree = read_tree(path, f"recipe {path}")
    base_name = tree.pop("extends", None)
    if base_name is None:
        return tree, str(path)
    if not isinstance(base_name, str) or not base_name:
        raise RecipeError(f"recipe {path}: extends: got {_shown(base_name)}, expected the name of a recipe beside it.")
    base = read_tree(path.parent / base_name, f"recipe {path}: extends: {_name(base_name)}")
    if base.pop("extends", None) is not None:
        raise RecipeError(f"recipe {path}: extends {base_name}, which extends another; one level is allowed.")
    return _merge(base, tree), f"{path} (extends {base_name})"


def _merge(base: dict, own: dict) -> dict:
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict, override: str, where: str) -> None:
    """Set one `a.b=value` (list items by number: stages.0.epochs=2) in the plain tree."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"override {override!r}: expected key=value, for example model.norm=bn.")
    try:
        value = parse_yaml(text)
    except RecipeError:
        raise RecipeError(
            f"override {override!r}: {text!r} is not a value that YAML knows. Quote a text: {key}=\"'...'\"."
        ) from None
    node: Any = tree
    for i, part in enumerate(path):
        place: Any = part
        if isinstance(node, list):
            place = _item(node, part, key, where)
        elif not isinstance(node, dict):
            raise RecipeError(f"{where}: {key}: {'.'.join(path[:i])} is a value and has no keys.")
        if i + 1 == len(path):
            node[place] = value
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        else:
            node[place] = copy.copy(node[place])  # Why: a YAML alias may share it with another place
        node = node[place]


def _item(node: list, part: str, key: str, where: str) -> int:
    """The index that `part` says, within the list."""
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
        expected = f"a number from 0 to {len(node) - 1}" if node else "no item: the list is empty"
        raise RecipeError(f"{where}: {key}: got item {part!r}, expected {expected}.")
    return int(part)


def _explain(error: ValidationError) -> list[str]:
    """Pydantic's errors in the house form, one line for each key."""
    lines: dict[str, str] = {}
    wanted: dict[str, list[str]] = {}
    for item in error.errors():
        parts, allowed = _place(item["loc"])
        key, kind, got = ".".join(map(_name, parts)) or "recipe", item["type"], item["input"]
        here = f"Allowed here: {', '.join(allowed)}."
        if kind == "contradiction":
            lines[item["msg"]] = item["msg"]
        elif kind == "unknown_name":
            lines[key] = f"{key}: {item['msg']}"
        elif kind == "missing":
            lines[key] = f"{key}: this key is missing and has no default."
        elif kind == "extra_forbidden":
            lines[key] = f"{key}: unknown key.{_meant(str(parts[-1]), allowed)} {here}"
        elif kind == "invalid_key":
            lines[key] = f"{key}: got a key that YAML reads as no text, expected a name. {here}"
        else:
            wanted.setdefault(key, []).append(_expected(item))  # a union complains once for each branch
            expected = " or ".join(wanted[key])
            choices = re.findall(r"'([^']*)'", expected)
            hint = errors.nearest(got, choices) if isinstance(got, str) and choices else ""
            received = "null" if got is None else f"{_shown(got)} ({type(got).__name__})"
            lines[key] = f"{key}: got {received}, expected {expected}.{hint}"
    return list(lines.values())


def _expected(item) -> str:
    """What pydantic would have taken."""
    kind, limits = item["type"], item.get("ctx", {})
    if kind == "model_type":
        return "keys with values"
    if kind == "too_short":
        return f"a list of at least {limits['min_length']}"
    if kind == "too_long":
        return f"a list of at most {limits['max_length']}"
    return item["msg"].removeprefix("Input should be ")


def _place(loc) -> tuple[list, list[str]]:
    """The keys in a location of pydantic's, less the branches of unions; and the keys allowed at its last."""
    parts: list[Any] = []
    section: type[BaseModel] | None = Recipe
    allowed: list[str] = []
    for part in loc:
        if section is None and isinstance(part, str):
            break  # below a value a name is a branch of its union
        parts.append(part)
        if section is None:
            continue
        allowed = list(section.model_fields)
        if isinstance(part, str):
            found = section.model_fields.get(part)
            section = None if found is None else section_of(found.annotation)
    return parts, allowed


def _meant(key: str, allowed: list[str]) -> str:
    """A hint: the places elsewhere that have just this key, else the nearest key allowed here."""
    places = []
    for name, found in Recipe.model_fields.items():
        section = section_of(found.annotation)
        if section is not None and key in section.model_fields and section.model_fields.keys() != set(allowed):
            places.append(f"{name}.0.{key}" if get_origin(found.annotation) is list else f"{name}.{key}")
    if places:
        return f" Did you mean {' or '.join(places)}?"
    return errors.nearest(key, allowed)


def _name(part: Any) -> str:
    """A key as errors show it: quoted where it is no plain word, so that a message stays one line."""
    return str(part) if re.fullmatch(r"[\w.+-]{1,60}", str(part)) else _shown(part)


def _shown(value: Any) -> str:
    """A value as errors show it: one line, cut to size."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    short.maxlevel = 3
    return " ".join(short.repr(value).split())


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The part of the schema in an annotation such as AgcRecipe or list[StageRecipe]."""
    for candidate in (annotation, *get_args(annotation)):
        # Why get_origin: on Python 3.10 list[X] passes for a type
        if get_origin(candidate) is None and isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
