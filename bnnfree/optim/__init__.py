"""Updates of weights: clipping, preconditioning, the flip optimiser, parameter groups. Torch and bnnfree.nn only."""

from bnnfree.optim.agc import EPS as AGC_EPS
from bnnfree.optim.agc import ClipRate, adaptive_grad_clip
from bnnfree.optim.bop import Bop
from bnnfree.optim.groups import (
    OPTIMIZERS,
    describe_groups,
    find_head,
    make_optimizer,
    matching,
    parameter_groups,
    rescale_moments,
)
from bnnfree.optim.precondition import Precondition

__all__ = [
    "AGC_EPS",
    "OPTIMIZERS",
    "Bop",
    "ClipRate",
    "Precondition",
    "adaptive_grad_clip",
    "describe_groups",
    "find_head",
    "make_optimizer",
    "matching",
    "parameter_groups",
    "rescale_moments",
]
