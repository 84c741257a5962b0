"""Recipes: YAML files that say what is trained, on what and how; read, checked and written here.

schema (every key; data_section those of `data`), read (files, `extends`, overrides, errors), tree (YAML), reads (under
which condition a key is read), keys (the table of all keys).
"""

from bnnfree.recipe.read import RecipeError, load_recipe, parse_recipe
from bnnfree.recipe.schema import Recipe

__all__ = ["Recipe", "RecipeError", "load_recipe", "parse_recipe"]
