"""Reading recipes: files, `extends`, `key=value` overrides, and errors that name file, key and remedy.

Imports yaml, pydantic, bnnfree.errors and the schema, the keys' conditions and YAML of its own room.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bnnfree import errors
from bnnfree.files import replacing
from bnnfree.recipe.place import Place, shown
from bnnfree.recipe.reads import Look, Traits, leaves, traits_of, unread
from bnnfree.recipe.remedies import KEYS, quoted, remedy, with_space
from bnnfree.recipe.resolve import reopened
from bnnfree.recipe.retired import translated, without_retired
from bnnfree.recipe.schema import Recipe
from bnnfree.recipe.sections import section_of
from bnnfree.recipe.tree import Dumper, RecipeError, parse_yaml, read_tree


class UnreadError(RecipeError):
    """Keys that are set and that nothing reads; `unread`: dotted key -> what is said of it."""

    def __init__(self, unread: dict[str, str], where: Place):
        super().__init__(*(f"{where.of(key)}: {line}" for key, line in unread.items()))
        self.unread = unread


def load_recipe(
    path: str | Path, overrides: Iterable[str] = (), models: Iterable[str] | None = None, look: Look = traits_of
) -> Recipe:
    """The recipe in `path`, with `key=value` overrides, every default filled in.

    `extends: other.yaml` (one level, beside the file) supplies what the file does not say; lists are
    replaced as a whole. `models`: the known architectures, to check model.name against. `look`: the traits of a
    recipe's networks, by which keys are judged; bnnfree.train.load_recipe builds the networks.

    Options of a norm go with it: they count as long as `model.norm` stays what it was where they are written.

    A key that is set, to another value than its default, and that nothing reads is an error. Each key is judged where
    it is written: one of a base by the base, one of a file by the file, one of the command line by all of it. So
    `model.norm=bn` makes a twin of a file with keys of `free`. A file that holds every key is a resolved recipe: its
    keys were judged when it was made. Errors: RecipeError, naming file, key, the value received, what is allowed and
    the nearest name.
    """
    path = Path(path)
    layers, where = _read_layers(path)
    return _parse(layers, overrides, where, models, look)


def load_fitting(
    path: str | Path, overrides: Mapping[str, str], common: Iterable[str], models, look: Look = traits_of
) -> tuple[Recipe, dict[str, str]]:
    """The recipe without those overrides (key -> key=value) of `common` that nothing reads beside the others.

    For several recipes that share some overrides. And what would have been said of those left out, by key.
    """
    left: dict[str, str] = {}
    while True:
        try:
            return load_recipe(path, [text for key, text in overrides.items() if key not in left], models, look), left
        except UnreadError as error:
            if not error.unread.keys() <= set(common) - left.keys():
                raise
            left |= error.unread


def by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Key -> key=value; of a key that is given twice the last."""
    return {text.partition("=")[0].strip(): text for text in overrides}


def parse_recipe(
    tree: dict,
    where: str,
    models: Iterable[str] | None = None,
    overrides: Iterable[str] = (),
    look: Look = traits_of,
) -> Recipe:
    """A Recipe from plain dictionaries (a checkpoint holds one); `where` is named in errors.

    Of keys that nothing reads only those of `overrides` are errors.
    """
    return _parse([tree], overrides, where, models, look, judged=1)


def _parse(layers: list[dict], overrides: Iterable[str], where: str, models, look: Look, judged: int = 0) -> Recipe:
    """The recipe of `layers`, each over the one before, and overrides; keys of the first `judged` ones are not judged.

    A layer that is no whole recipe yet is judged together with the next.
    """
    models, overrides = None if models is None else list(models), list(overrides)
    tree: dict[str, Any] = {}
    pending: dict[str, Any] = {}
    for number, layer in enumerate(layers):
        layer = translated(layer)
        stored = number < judged or _is_resolved(layer)
        layer = without_retired(layer, where, stored)
        written = leaves(layer)
        tree = merge(_for_norm(tree, written), layer) if tree else copy.deepcopy(layer)
        if stored:
            continue
        pending |= written
        try:
            recipe = _validated(tree, Place(where), models)
            traits = _seen(recipe, look, Place(where))
        except RecipeError:
            continue
        _judge(recipe, traits, pending, Place(where))
        pending = {}
    before = leaves(tree)
    tree = _for_norm(tree, _norm_of(overrides))
    keys: dict[str, str] = {}
    for override in sorted(overrides, key=_is_option):
        key = _apply(tree, override)
        keys[key] = override
        if key == "model.norm":
            tree = _without_options(tree, leaves(tree), before)
    written = {
        name: value
        for name, value in leaves(tree).items()
        if any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for key in keys)
    }
    place = Place(where, keys)
    recipe = _validated(without_retired(tree, where, False) if keys else tree, place, models)
    _judge(recipe, _seen(recipe, look, place), pending | written, place)
    return recipe


def _norm_of(overrides: Iterable[str]) -> dict[str, Any]:
    """The norm that overrides choose, as `leaves` gives it."""
    text = by_key(overrides).get("model.norm")
    return {} if text is None else {"model.norm": text.partition("=")[2].strip()}


def _for_norm(tree: dict, now: Mapping[str, Any]) -> dict:
    """The tree for the norm of `now` (leaves): without what belongs to another that it had.

    That is the options of the norm; in a resolved tree its own values too, which are open again.
    """
    was = leaves(tree).get("model.norm", "free")
    if now.get("model.norm", was) != was and _is_resolved(tree):
        try:
            tree = reopened(Recipe.model_validate(tree)).model_dump()
        except ValidationError:
            pass  # said when all is together
    return _without_options(tree, now)


def _is_option(override: str) -> bool:
    """True for an option of the norm. Why: those of another norm go with that, and these come after it."""
    return override.strip().startswith("model.norm_options")


def _without_options(tree: dict, now: Mapping[str, Any], before: Mapping[str, Any] | None = None) -> dict:
    """The tree without the options of its norm, where the norm is another `now` (leaves) than `before` (the tree's)."""
    was = (leaves(tree) if before is None else before).get("model.norm", "free")
    if now.get("model.norm", was) == was or not isinstance(tree.get("model"), dict):
        return tree
    return {**tree, "model": {key: value for key, value in tree["model"].items() if key != "norm_options"}}


def _validated(tree: Any, where: Place, models: list[str] | None) -> Recipe:
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(*_explain(error, where)) from None
    if models is not None and recipe.model.name not in models:
        raise RecipeError(str(errors.unknown_name(f"{where.of('model.name')}: model.name", recipe.model.name, models)))
    return recipe


def _seen(recipe: Recipe, look: Look, where: Place) -> Traits:
    """The traits of the recipe's networks. Errors: RecipeError where there can be none such."""
    try:
        return look(recipe)
    except errors.BnnfreeError as error:
        line = f"model.{error}"
        raise RecipeError(f"{where.of(line.partition(':')[0])}: {line}") from None


def _judge(recipe: Recipe, traits: Traits, written: Mapping[str, Any], where: Place) -> None:
    lines = {
        key: f"{key}: got {shown(written[key])}, which nothing reads here: it is for {needs}. Leave it out."
        for key, needs in unread(recipe, written, traits).items()
    }
    if lines:
        raise UnreadError(lines, where)


def _is_resolved(tree: Any) -> bool:
    """True where the tree holds every key, as what `save_recipe` writes does."""

    def whole(node: Any, section: type[BaseModel]) -> bool:
        if not isinstance(node, dict) or section.model_fields.keys() - node.keys():
            return False
        inner = {name: section_of(found.annotation) for name, found in section.model_fields.items()}
        return all(
            whole(item, part)
            for name, part in inner.items()
            if part is not None
            for item in (node[name] if isinstance(node[name], list) else [node[name]])
        )

    return whole(tree, Recipe)


def save_recipe(recipe: Recipe, path: str | Path, header: str = "") -> None:
    """Write the resolved recipe as YAML that `load_recipe` reads back to the same recipe."""
    text = yaml.dump(recipe.model_dump(), Dumper=Dumper, sort_keys=False)
    with replacing(path) as temporary:
        temporary.write_text(header + text, encoding="utf-8")


def _read_layers(path: Path) -> tuple[list[dict], str]:
    """The plain trees of what a file extends and of the file itself, and what errors call them."""
    tree = read_tree(path, f"recipe {path}")
    base_name = tree.pop("extends", None)
    if base_name is None:
        return [tree], str(path)
    if not isinstance(base_name, str) or not base_name or re.search(r"[/\\:]|^\.+$", base_name):
        raise RecipeError(f"recipe {path}: extends: got {shown(base_name)}, expected the name of a recipe beside it.")
    base = read_tree(path.parent / base_name, f"recipe {path}: extends: {_name(base_name)}", beside=True)
    if base.pop("extends", None) is not None:
        raise RecipeError(f"recipe {path}: extends {base_name}, which extends another; one level is allowed.")
    return [base, tree], f"{path} (extends {base_name})"


def merge(base: dict, own: dict) -> dict:
    """`own` over `base`: sections key by key, all else as a whole."""
    merged = dict(base)
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def _apply(tree: dict, override: str) -> str:
    """Set one `a.b=value` (list items by number: stages.0.epochs=2) in the plain tree; returns the key."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"override {override!r}: expected key=value, for example model.norm=bn.")
    try:
        value = parse_yaml(text)
    except RecipeError:
        raise RecipeError(
            f"override {override!r}: {text!r} is not a value that YAML knows.{quoted(key, text)}"
        ) from None
    node: Any = tree
    for i, part in enumerate(path):
        place: Any = part
        if isinstance(node, list):
            place = _item(node, path, i, f"override {shown(override)}")
        elif not isinstance(node, dict):
            raise RecipeError(
                f"override {shown(override)}: {'.'.join(path)}: {'.'.join(path[:i])} is a value and has no keys."
            )
        if i + 1 == len(path):
            node[place] = value
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        else:
            node[place] = copy.copy(node[place])  # Why: a YAML alias may share it with another place
        node = node[place]
    return ".".join(path)


def _item(node: list, path: list[str], i: int, override: str) -> int:
    """The index that part `i` of the path says, within the list."""
    part = path[i]
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
        expected = f"a number from 0 to {len(node) - 1}" if node else "no item: the list is empty"
        numbered = node and not part.isdecimal()
        hint = f" Did you mean {'.'.join([*path[:i], '0', *path[i:]])}?" if numbered else ""
        raise RecipeError(f"{override}: {'.'.join(path)}: got item {part!r}, expected {expected}.{hint}")
    return int(part)


def _explain(error: ValidationError, where: Place) -> list[str]:
    """Pydantic's errors in the house form, one line for each key, with the place of each."""
    lines: dict[str, str] = {}
    wanted: dict[str, list[str]] = {}
    spaceless: set[str] = set()  # keys that are there, but that YAML read as a text with their value
    for item in error.errors():
        parts, allowed, names = _place(item["loc"])
        key, kind, got = ".".join(map(_name, parts)) or "recipe", item["type"], item["input"]
        here = f"Allowed here: {', '.join(allowed)}."
        raw = ".".join(map(str, parts))
        typed, line = where.typed(raw) is not None, ""
        if kind == "contradiction":
            lines[item["msg"]] = f"{where.of_all(item['msg'])}: {item['msg']}"
        elif kind in ("unknown_name", "image_size"):
            line = item["msg"] + remedy(key, kind, got, typed, names)
        elif kind == "missing":
            line = "this key is missing and has no default."
        elif kind == "extra_forbidden":
            before = ".".join(map(_name, parts[:-1]))
            line = f"unknown key.{_meant(str(parts[-1]), allowed, before and f'{before}.')} {here}"
            if with_space(str(parts[-1])):
                spaceless.add(f"{before}.{parts[-1]}".lstrip(".").rpartition(":")[0])
        elif kind == "invalid_key":
            line = f"got a key that YAML reads as no text, expected a name. {here}"
        else:
            wanted.setdefault(key, []).append(_expected(item))  # a union complains once for each branch
            expected = " or ".join(wanted[key])
            choices = re.findall(r"'([^']*)'", expected)
            hint = errors.nearest(got, choices) if isinstance(got, str) and choices else ""
            received = "null" if got is None else f"{shown(got)} ({type(got).__name__})"
            hint = hint or remedy(key, kind, got, typed, names) or _colon(got, (item["loc"] or ("",))[-1])
            line = f"got {received}, expected {expected}.{hint}"
        if line:
            lines[key] = f"{where.of(raw)}: {key}: {line}"
    return [line for key, line in lines.items() if key not in spaceless]


def _colon(got: Any, name: Any) -> str:
    """The remedy for a name without a value, which holds both."""
    spaced = with_space(str(name)) if got is None else ""
    return f" Write a space after the colon: {spaced}." if spaced else ""


def _expected(item) -> str:
    """Description of the values that pydantic accepts in place of the refused one."""
    kind, limits = item["type"], item.get("ctx", {})
    if kind in KEYS:
        return "keys with values"
    if kind == "too_short":
        return f"a list of at least {limits['min_length']}"
    if kind == "too_long":
        return f"a list of at most {limits['max_length']}"
    return item["msg"].removeprefix("Input should be ")


def _place(loc) -> tuple[list, list[str], bool]:
    """The keys in a location of pydantic's, less the branches of unions; the keys allowed at its last; has it a name.

    The last is True where what stands there is a section with a key `name`.
    """
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
    return parts, allowed, section is not None and "name" in section.model_fields


def _meant(key: str, allowed: list[str], before: str) -> str:
    """A hint: a space that is missing, the places elsewhere that have just this key, else the nearest key allowed.

    before: the path of the section in which it was found.
    """
    name, colon, value = key.partition(":")
    if colon and name in allowed:
        return f" Write a space after the colon: {_name(name)}: {_name(value)}."
    places = []
    for name, found in Recipe.model_fields.items():
        section = section_of(found.annotation)
        if section is not None and key in section.model_fields and section.model_fields.keys() != set(allowed):
            places.append(f"{name}.0.{key}" if get_origin(found.annotation) is list else f"{name}.{key}")
    if places:
        return f" Did you mean {' or '.join(places)}?"
    return errors.nearest(key, allowed, before)


def _name(part: Any) -> str:
    """A key as errors show it: quoted where it is no plain word, so that a message stays one line."""
    return str(part) if re.fullmatch(r"[\w.+-]{1,60}", str(part)) else shown(part)
