"""Layers: signs and their estimators, binary and standardised layers, the BN-free block, normalisers.

One file per concept: sign, standard (weight standardisation), binary, react (RSign, RPReLU), norms (what
replaces BN), centring (of gradients), variance (alpha and beta), block (the residual block), calibrate
(constants from data).
Imports torch only.
"""

from bnnfree.errors import lacking

try:
    import torch  # noqa: F401
except ModuleNotFoundError as _error:
    raise lacking(_error, "bnnfree.nn") from None

from bnnfree.names import ACTIVATIONS, BINARIZE, GROUP, SCALES, SHORTCUTS, STE_WINDOWS
from bnnfree.nn.binary import BinaryConv2d, BinaryLinear
from bnnfree.nn.block import BinaryBlock, Clip, Design
from bnnfree.nn.calibrate import (
    anneal,
    calibrate,
    centred_layers,
    measure_deviations,
    rescale,
    rescaled_layers,
    settle,
    settled,
    update_input_means,
)
from bnnfree.nn.centring import Part, ask_before, gradient_centres, plan_step, set_part
from bnnfree.nn.norms import (
    LAYERS,
    NORMS,
    BatchRenorm2d,
    Belief,
    FilterResponseNorm,
    GhostBatchNorm2d,
    GroupNorm,
    KalmanNorm2d,
    ProxyNorm,
    ThresholdedLinear,
    first_belief,
    gaussian_moments,
    make_norm,
)
from bnnfree.nn.react import RPReLU, RSign
from bnnfree.nn.sign import STES, Sign, sign, sign_of_weight
from bnnfree.nn.standard import CentredLinear, ScaledStdConv2d, WeightLayer, standardize_weight
from bnnfree.nn.variance import BETA_MODES, BlockShape, expected_betas
from bnnfree.normalisers import Norm

__all__ = [
    "ACTIVATIONS",
    "BETA_MODES",
    "BINARIZE",
    "GROUP",
    "LAYERS",
    "NORMS",
    "SCALES",
    "SHORTCUTS",
    "STES",
    "STE_WINDOWS",
    "BatchRenorm2d",
    "Belief",
    "BinaryBlock",
    "BinaryConv2d",
    "BinaryLinear",
    "BlockShape",
    "CentredLinear",
    "Clip",
    "Design",
    "FilterResponseNorm",
    "GhostBatchNorm2d",
    "GroupNorm",
    "KalmanNorm2d",
    "Norm",
    "Part",
    "ProxyNorm",
    "RPReLU",
    "RSign",
    "ScaledStdConv2d",
    "Sign",
    "ThresholdedLinear",
    "WeightLayer",
    "anneal",
    "ask_before",
    "calibrate",
    "centred_layers",
    "expected_betas",
    "first_belief",
    "gaussian_moments",
    "gradient_centres",
    "make_norm",
    "measure_deviations",
    "plan_step",
    "rescale",
    "rescaled_layers",
    "set_part",
    "settle",
    "settled",
    "sign",
    "sign_of_weight",
    "standardize_weight",
    "update_input_means",
]
