"""One training: from a recipe to a result by `fit`, and its checkpoints. Imports torch, torchvision, pydantic.

run (all stages), loop (a stage), losses, schedule, passes, evaluation, teacher, start (init, freeze), doubts (what a
recipe cannot do on the data at hand), dry (before a training), report (metrics and curves), resume, run_folder (lock).
Its file: checkpoint, sealed (bytes), meaning (structure, older versions); open_network opens one, a run folder or a
recipe; networks reads recipes against the builders of networks. dist is torchrun, process_settings what a process is
set to. Recipes are in bnnfree.recipe, data sets in bnnfree.data, many trainings in bnnfree.sweep.
"""

from bnnfree.data.datasets import load_data
from bnnfree.recipe.read import RecipeError
from bnnfree.recipe.schema import Recipe
from bnnfree.train.checkpoint import load_checkpoint, load_model
from bnnfree.train.evaluation import evaluate
from bnnfree.train.networks import load_recipe
from bnnfree.train.open_network import Network, open_source, source_kind
from bnnfree.train.run import fit

__all__ = [
    "Network",
    "Recipe",
    "RecipeError",
    "evaluate",
    "fit",
    "load_checkpoint",
    "load_data",
    "load_model",
    "load_recipe",
    "open_source",
    "source_kind",
]
