"""Remedies in errors of recipes: the text to write in place of the one refused. Imports yaml and its own room.

A remedy begins with a space and ends with a full stop, or is empty. `typed`: it is for the command line (key=value).
"""

from __future__ import annotations

import re
import shlex
from typing import Any

import yaml

from bnnfree.recipe.tree import Dumper, RecipeError, parse_yaml

ONE_VALUE = {"float_type", "int_type", "string_type", "bool_type", "literal_error", "unknown_name", "image_size"}
ONE_VALUE |= {"float_parsing", "int_parsing", "int_from_float"}
PAIRS = ("data.range",)  # lists of two
KEYS = ("model_type", "dict_type")
BARE = re.compile(r"""(?<![^\[{,:\s])([*&!%@`][^\s,\]}:]*)""")  # a text that YAML takes for a sign of its own


def remedy(key: str, kind: str, got: Any, typed: bool, names: bool) -> str:
    """The remedy for a value of another shape: one for a list, a list for one, a space that a colon lacks.

    kind: pydantic's name of the error at the dotted `key`. names: the section there has a key `name`.
    """
    if kind == "list_type" and (items := _items(key, got)):
        return f" Write a list: {_written(key, items, typed)}."
    if kind in ONE_VALUE and isinstance(got, list) and got and all(isinstance(item, str | int | float) for item in got):
        if len(got) == 1:
            return f" Write it without brackets: {_written(key, got[0], typed)}."
        return "" if kind == "image_size" else " Write one of them."
    if kind in KEYS and isinstance(got, list) and len(got) == 1 and isinstance(got[0], dict):
        return f" Write it without brackets: {_written(key, _mended(got[0]), typed)}."
    if kind in KEYS and isinstance(got, str):
        if spaced := with_space(got):
            return f" Write a space after the colon: {spaced}."
        return f" Did you mean {_written(f'{key}.name', got, True)}?" if names and typed else " {KEY: VALUE} are such."
    return ""


def with_space(text: str) -> str:
    """`key: value` of `key:value`, which YAML takes for one text; empty for any other."""
    found = re.fullmatch(r"([^\s:]+):(?!//)([^\s:]+)", text)
    return f"{found[1]}: {found[2]}" if found else ""


def quoted(key: str, text: str) -> str:
    """The remedy for the value of an override that YAML cannot read."""
    mended = BARE.sub(lambda found: f'"{found[1]}"', text)
    try:
        parse_yaml(mended)
    except RecipeError:
        return f" Quote a text, and all of it for the shell: '{key}=\"...\"'."
    sign = BARE.search(text)
    why = f"Quote a text that begins with {sign[1][0]}" if sign else "Quote a text"
    return f" {why}, and all of it for the shell: {shlex.quote(f'{key}={mended}')}."


def _items(key: str, got: Any) -> list[Any]:
    """The list that was meant; empty where there is no telling."""
    if key == "stages":
        epochs = {"epochs": got} if type(got) is int and got > 0 else got
        return [_mended(epochs)] if isinstance(epochs, dict) else []
    if isinstance(got, dict):  # of data.augment.0=flip
        return list(got.values()) if all(str(name).isdecimal() for name in got) else []
    if isinstance(got, str):
        return [_plain(text) for text in got.split(",")]
    return [] if got is None or key in PAIRS else [got]


def _plain(text: str) -> Any:
    """The value that YAML reads in an item of a list without brackets."""
    try:
        return parse_yaml(text)
    except RecipeError:
        return text.strip()


def _mended(value: Any) -> Any:
    """The value with the space that its one key lacks: {'epochs:2': None} becomes {'epochs': 2}."""
    if isinstance(value, dict) and len(value) == 1 and list(value.values()) == [None]:
        name, _, after = with_space(str(next(iter(value)))).partition(": ")
        return {name: _plain(after)} if name else value
    return value


def _written(key: str, value: Any, typed: bool) -> str:
    """The key with its value, as it is typed or as a file has it."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**6, sort_keys=False)
    text = " ".join(text.removesuffix("...\n").split())[:200]
    return shlex.quote(f"{key}={text}") if typed else f"{key.rpartition('.')[2]}: {text}"
