"""The architectures of bnnfree.models, by the name that they had before they came with the package."""

from bnnfree.models import MODELS

__all__ = ["MODELS"]
