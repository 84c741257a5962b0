"""Recipes: YAML files that say what is trained, on what and how; read, checked and written here.

schema (every key; data_section those of `data`), read (files, `extends`, overrides, errors), tree (YAML), reads (under
which condition a key is read), resolve (what a recipe leaves open gets its value), retired (keys that are no more),
keys (the table of all keys). No torch: a recipe is read in milliseconds.
"""

from bnnfree.recipe.read import RecipeError, load_recipe, parse_recipe
from bnnfree.recipe.resolve import Resolved, resolve
from bnnfree.recipe.schema import Recipe

__all__ = ["Recipe", "RecipeError", "Resolved", "load_recipe", "parse_recipe", "resolve"]
