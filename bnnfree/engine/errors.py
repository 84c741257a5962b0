"""Errors of the engine."""

from bnnfree.errors import BnnfreeError


class EngineError(BnnfreeError):
    """Images that do not fit the model, or a backend or thread count that cannot be."""
