"""Analysis of networks. Imports torch, bnnfree.errors, bnnfree.nn; never train, export, engine, models.

summary: parameters, bytes and multiply-accumulates, layer by layer. memory: what training keeps for its backward pass.
"""

from bnnfree.analysis.summary import Costs, Group, Layer, Summary, summarize

__all__ = ["Costs", "Group", "Layer", "Summary", "summarize"]
