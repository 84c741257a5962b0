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

from bnnfree.nn.binary import SCALES, BinaryConv2d, BinaryLinear
from bnnfree.nn.block import ACTIVATIONS, BINARIZE, SHORTCUTS, BinaryBlock, Clip, Design, check_activation
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
from bnnfree.nn.centring import GROUP, Part, ask_before, gradient_centres, plan_step, set_part
from bnnfree.nn.norms import (
    NORMS,
    BatchRenorm2d,
    Belief,
    FilterResponseNorm,
    GhostBatchNorm2d,
    GroupNorm,
    KalmanNorm2d,
    Norm,
    ProxyNorm,
    ThresholdedLinear,
    check_norm,
    first_belief,
    gaussian_moments,
    make_norm,
    of_batch,
)
from bnnfree.nn.react import RPReLU, RSign
from bnnfree.nn.sign import STE_WINDOWS, STES, Sign, sign, sign_of_weight
from bnnfree.nn.standard import CentredLinear, ScaledStdConv2d, WeightLayer, standardize_weight
from bnnfree.nn.variance import BETA_MODES, BlockShape, expected_betas

__all__ = [
    "ACTIVATIONS",
    "BETA_MODES",
    "BINARIZE",
    "GROUP",
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
    "check_activation",
    "check_norm",
    "expected_betas",
    "first_belief",
    "gaussian_moments",
    "gradient_centres",
    "make_norm",
    "measure_deviations",
    "of_batch",
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
