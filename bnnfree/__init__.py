"""bnnfree: binary neural networks without batch normalisation, from a recipe to a bit-packed model.

Importing this package is cheap: it pulls in neither torch nor numpy. Import the room you need:
`bnnfree.nn` (layers), `bnnfree.optim` (AGC, Bop), `bnnfree.train` (recipe to result),
`bnnfree.analysis` (what a network costs).
"""

__version__ = "0.1.0.dev0"
