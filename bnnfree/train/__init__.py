"""From a recipe to a result: `load_recipe`, `fit`. Imports torch, torchvision, yaml, pydantic, tqdm.

recipe (the schema), recipes (reading files), data (what it trains on) + subset, images (in memory), streamed (from
files), augment (for both), folder, shards + members (from tars), addresses (of them), losses, schedule, loop (a
stage), evaluation, run (all stages), checkpoint + sealed (its file), meaning (structure, design, older versions),
start (init, freeze), resume, run_folder (lock), source (checkpoint, run folder or recipe as a network), report
(metrics and curves), dist (torchrun). Many at once: sweep (the file) + expression, pool (processes), outcome (what
run folders hold), tables. Measuring: throughput (steps), feed (reading images).
"""

from bnnfree.train.checkpoint import load_checkpoint, load_model
from bnnfree.train.data import load_data
from bnnfree.train.evaluation import evaluate
from bnnfree.train.recipe import Recipe
from bnnfree.train.recipes import RecipeError, load_recipe
from bnnfree.train.run import fit
from bnnfree.train.source import Network, open_source, source_kind

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
