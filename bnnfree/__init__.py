"""bnnfree: binary neural networks without batch normalisation, from a recipe to a bit-packed model.

Importing this package is cheap: it pulls in neither torch nor numpy. Import the room you need:
`bnnfree.nn` (layers), `bnnfree.optim` (AGC, Bop), `bnnfree.train` (recipe to result),
`bnnfree.analysis` (what a network costs), `bnnfree.export` (torch to a packed file); and without torch
`bnnfree.engine` (runs a packed file), `bnnfree.format` (what it is), `bnnfree.ops` (what its operations mean).
"""

__version__ = "0.1.0.dev0"
