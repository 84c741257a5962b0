"""Checks of numbers that builders of normalisers share. Imports bnnfree.normalisers only."""

from __future__ import annotations

from bnnfree.normalisers import EPS_LOW, within


def positive_eps(value: float, name: str = "eps") -> float:
    """An eps that keeps a division finite: the value, or an error if it is not clearly above 0."""
    return within(name, value, low=EPS_LOW)
