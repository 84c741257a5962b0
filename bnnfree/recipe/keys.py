"""Every key of a recipe as a table, made from the schema. Imports pydantic and the schema only."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bnnfree.recipe.schema import Recipe
from bnnfree.recipe.sections import section_of


def key_table() -> str:
    """Lines `key  type  default  meaning` of all keys, in the schema's order; sections in their docstring's words."""
    rows = [("key", "type", "default", "meaning")]
    _collect(Recipe, "", rows)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _collect(section: type[BaseModel], prefix: str, rows: list[tuple[str, str, str, str]]) -> None:
    for name, found in section.model_fields.items():
        inner = section_of(found.annotation)
        if inner is None:
            if not prefix and "." in rows[-1][0]:
                rows.append(("", "", "", ""))
            rows.append((prefix + name, _type(found.annotation), _default(found), found.description or ""))
            continue
        place = f"{prefix}{name}[]." if get_origin(found.annotation) is list else f"{prefix}{name}."
        rows.append(("", "", "", ""))
        rows.append((place, "", "", (inner.__doc__ or "").strip()))
        _collect(inner, place, rows)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments)
    if origin is Literal:
        return " or ".join(str(a) for a in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    return "null" if annotation is type(None) else annotation.__name__


def _default(found: FieldInfo) -> str:
    if found.default is PydanticUndefined:
        return "(needed)"
    plain = {None: "null", True: "true", False: "false"}
    return plain[found.default] if isinstance(found.default, bool | None) else str(found.default)
