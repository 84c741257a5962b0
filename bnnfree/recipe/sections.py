"""Sections of the schema behind its annotations. Imports pydantic only."""

from __future__ import annotations

from typing import Any, get_args, get_origin

from pydantic import BaseModel


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The part of the schema in an annotation such as AgcRecipe or list[StageRecipe]."""
    for candidate in (annotation, *get_args(annotation)):
        # Why get_origin: on Python 3.10 list[X] passes for a type
        if get_origin(candidate) is None and isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
