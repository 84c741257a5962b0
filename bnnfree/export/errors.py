"""Errors of the exporter."""

from bnnfree.errors import BnnfreeError


class ExportError(BnnfreeError):
    """A module that cannot be exported: which layer, why, and what to do."""
