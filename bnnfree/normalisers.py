"""Normalisers as facts: what each is called, where it stands, and what goes with it. Imports bnnfree.errors and names.

One row of NORMS per normaliser, with values alone, so that a recipe is read and resolved without torch. The layers
themselves are built by bnnfree.nn.norms.LAYERS, which has the same keys; tests/test_names.py compares every fact
here with the behaviour of what is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from bnnfree.errors import BnnfreeError, pick, unknown_name
from bnnfree.names import ACTIVATIONS, BETA_MODES, BINARIZE, SCALES, SHORTCUTS, STE_WINDOWS, STES

LARGEST = 3e38  # what float32 holds
Value = bool | int | float | None


@dataclass(frozen=True)
class Option:
    """An option of a normaliser: its default, the type of its values and their range; null too, or not."""

    default: Value
    kind: type = float
    low: float = -math.inf
    high: float = LARGEST
    null: bool = False

    def check(self, name: str, value: Any) -> None:
        """Errors: BnnfreeError for a value of another type or out of range. A whole number serves as a real one."""
        if value is None and self.null:
            return
        whole_for_real = self.kind is float and type(value) is int
        if type(value) is not self.kind and not whole_for_real:
            expected = f"{self.kind.__name__}{' or null' if self.null else ''}"
            raise BnnfreeError(f"{name}: got {value!r} ({type(value).__name__}), expected {expected}.")
        if self.kind is not bool:
            within(name, value, low=self.low, high=self.high)


Options = Mapping[str, Option]


@dataclass(frozen=True)
class Norm:
    """A normaliser: its place, what it is, and the options of the layers around it.

    values that a recipe may leave to it (null), see bnnfree.nn.Design:
        standardize, scale   of the weights of all convolutions; of binary weights
        centre, centre_gradient, centre_head   of convolutions, their gradients, and the classifier
        alpha, beta          factor of a block's branch, and its mode of expected variance
        ste, ste_window      straight-through estimator of the activations, and its window
        agc                  clip factor of adaptive gradient clipping (None: no clipping)
    layers around it:
        gain, bias           of every convolution; unit_output: its output has deviation 1 at calibration
        power_slopes         the slopes of RPReLU are powers of two
        scaled_shortcut      beta multiplies the shortcuts of transitions too, not the branch alone
    place:
        before   the layer stands before each sign instead, with dropout after the sign; the stem has none, and one
                 stands before the head's pool
        proxy    the layer takes the activation in: a block then has it at the end of its branch, and nothing after
                 the residual sum
        beliefs  moments predicted from the layers before are led through the network beside the map
    what it is:
        batch_dependent  in training a sample's output depends on the others of its batch
        state            training moves buffers, of the layer or of the convolutions: running means, statistics
        settles          its running statistics may be measured anew, with training images (bnnfree.nn.settle)
        folds            a packed file has no operation that normalises: factors and shifts at most
        options          keyword arguments of its builder that a recipe may set (model.norm_options)
    """

    summary: str
    standardize: bool = True
    scale: str = "fan_in"
    centre: bool = False
    centre_gradient: bool = False
    centre_head: bool = False
    alpha: float = 1.0
    beta: str = "none"
    ste: str = "approx"
    ste_window: str = "sample"
    agc: float | None = None
    gain: bool = False
    bias: bool = False
    unit_output: bool = False
    power_slopes: bool = False
    scaled_shortcut: bool = True
    before: bool = False
    proxy: bool = False
    beliefs: bool = False
    batch_dependent: bool = False
    state: bool = False
    settles: bool = False
    folds: bool = False
    options: Options = field(default_factory=dict)

    @property
    def activation(self) -> str:
        """The place of a block's activation."""
        return "branch" if self.proxy else "trunk"


def _options(**options: Option) -> Options:
    return MappingProxyType(options)


def _positive(default: float) -> Option:
    """An eps, which keeps a division finite."""
    return Option(default, low=EPS_LOW)


EPS_LOW = 1e-12
EPS = _positive(1e-5)
MOMENTUM = Option(0.1, low=0, high=1)
DROP = Option(0.05, low=0, high=0.99)
GROUPS = Option(None, int, low=1, null=True)
PROXY_EPS = _positive(0.03)
RESPONSE = {"eps": _positive(1e-6), "learnable_eps": Option(True, bool)}
STATISTICS: dict[str, Any] = {"batch_dependent": True, "state": True, "folds": True}

NORMS: dict[str, Norm] = {
    "none": Norm(
        "nothing: mean-abs weight scale, centred latents of unit output variance, alpha 1",
        standardize=False,
        scale="mean_abs",
        ste_window="fixed",
        folds=True,
    ),
    "bn": Norm(
        "batch normalisation after every convolution, with all that `free` has beside it "
        "(standardised weights, per-sample window): the strongest BN twin measured",
        **STATISTICS,
        settles=True,
        options=_options(eps=EPS, momentum=MOMENTUM, ghost=Option(0, int, low=0)),
    ),
    "free": Norm(
        "centred binary convolutions with a constant scale: the bits' running mean is taken out through the weights, "
        "the others' mean out of the bits' gradient; the output's deviation is a constant of calibration passes, which "
        "gains make up for",
        centre=True,
        centre_gradient=True,
        centre_head=True,
        gain=True,
        bias=True,
        unit_output=True,
        state=True,
        folds=True,
    ),
    "free_paper": Norm(
        "the published BN-free block: scaled weight standardisation, alpha 0.2, analytic beta, AGC",
        scale="mean_abs",
        gain=True,
        alpha=0.2,
        beta="nf",
        ste_window="fixed",
        agc=0.02,
        folds=True,
    ),
    "ab": Norm(
        "the BN-free block of A&B BNN: as free_paper, with slopes that are powers of two, the sigmoid estimator, alpha "
        "0.25, and beta before signs alone (its mask layer), where inference folds it away",
        scale="mean_abs",
        gain=True,
        alpha=0.25,
        beta="ref",
        ste="sigmoid",
        ste_window="fixed",
        agc=0.02,
        power_slopes=True,
        scaled_shortcut=False,
        folds=True,
    ),
    "brn": Norm(
        "batch renormalisation: clipped corrections towards the running statistics",
        **STATISTICS,
        options=_options(
            rmax=Option(3.0, low=1), dmax=Option(5.0, low=0), eps=EPS, momentum=Option(0.01, low=0, high=1)
        ),
    ),
    "gn": Norm("group normalisation, groups of 16 channels", options=_options(groups=GROUPS, eps=EPS)),
    "ln": Norm("layer normalisation: over channels and positions of a sample", options=_options(eps=EPS)),
    "in": Norm(
        "instance normalisation: over the positions of each channel of a sample; without an activation on the trunk "
        "(Bi-Real, XNOR) the pooled features are constants, and 1x1 maps are constants everywhere",
        options=_options(eps=EPS),
    ),
    "frn": Norm(
        "filter response normalisation and thresholded linear units, eps learned",
        options=_options(**RESPONSE, tlu=Option(True, bool), tau=Option(-1.0)),
    ),
    "ic": Norm(
        "independent components: batch norm before each sign, dropout after it",
        before=True,
        **STATISTICS,
        settles=True,
        options=_options(drop=DROP, eps=EPS, momentum=MOMENTUM),
    ),
    "ic_gn": Norm(
        "ic with group normalisation (ours)", before=True, options=_options(drop=DROP, groups=GROUPS, eps=EPS)
    ),
    "ic_frn": Norm(
        "ic with filter response normalisation (ours)", before=True, options=_options(drop=DROP, **RESPONSE)
    ),
    "kn": Norm(
        "batch Kalman: batch statistics fused with a prior from the layers before",
        beliefs=True,
        **STATISTICS,
        options=_options(prior=Option(None, low=0, high=1, null=True), eps=EPS, momentum=MOMENTUM),
    ),
    "ln_pn": Norm(
        "layer normalisation, then proxy normalisation of the activation; without one (Bi-Real, XNOR) nothing follows",
        proxy=True,
        options=_options(eps=EPS, proxy_eps=PROXY_EPS),
    ),
    "gn_pn": Norm(
        "group normalisation, then proxy normalisation of the activation; without one (Bi-Real, XNOR) nothing follows",
        proxy=True,
        options=_options(groups=GROUPS, eps=EPS, proxy_eps=PROXY_EPS),
    ),
    "in_pn": Norm(
        "instance normalisation, then proxy normalisation of the activation; constants where `in` gives them",
        proxy=True,
        options=_options(eps=EPS, proxy_eps=PROXY_EPS),
    ),
}

OWN = (
    *("standardize", "centre", "centre_gradient", "centre_head", "scale", "alpha", "beta", "ste", "ste_window"),
    "activation",
)
"""Keys of a design that may be left to the normaliser (None)."""


def complete(norm: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of OWN: the values that are given, and those of the normaliser where there is none or None.

    Where only the classifier is centred, its gradient is as well; "head" says so beside centred convolutions.
    """
    rule = pick(NORMS, norm, "norm")
    values = {key: getattr(rule, key) if given.get(key) is None else given[key] for key in OWN}
    if given.get("centre_gradient") is None and not rule.centre_gradient and values["centre_head"]:
        values["centre_gradient"] = "head" if values["centre"] else True
    return values


def check_design(design: Mapping[str, Any]) -> None:
    """Errors: BnnfreeError for a value that is not allowed, or not with this normaliser. `design` has no None in it."""
    norm = design["norm"]
    check_options(norm, design["norm_options"])
    for key, names in NAMED.items():
        pick(dict.fromkeys(names), design[key], key)
    if design["centre"] and NORMS[norm].beliefs:
        raise BnnfreeError(
            f"centre: got true with norm {norm!r}, whose priors pass through the layers, expected false."
        )
    if design["activation"] == "trunk" and NORMS[norm].proxy:
        raise BnnfreeError(f"activation: got 'trunk' for norm {norm!r}, which takes it in, expected 'branch'.")


NAMED: dict[str, Any] = {
    "binarize": BINARIZE,
    "shortcut": SHORTCUTS,
    "scale": SCALES,
    "beta": BETA_MODES,
    "ste": STES,
    "ste_window": STE_WINDOWS,
    "activation": ACTIVATIONS,
}
"""Keys of a design whose values are names."""


def check_options(norm: str, options: Mapping[str, Any]) -> None:
    """Errors: BnnfreeError for an option that this normaliser has not, or a value that it does not take.

    Groups must divide the channels, too, which the layer sees.
    """
    known = pick(NORMS, norm, "norm").options
    for name, value in options.items():
        if not known:
            raise BnnfreeError(f"norm_options: got {name!r}, expected none: this norm has no options.")
        if name not in known:
            raise unknown_name("norm_options", name, known)
        known[name].check(f"norm_options.{name}", value)


def within(name: str, value: float, *, low: float = -math.inf, high: float = LARGEST) -> float:
    """`value` if it lies in [low, high], else an error that says so."""
    if not low <= value <= high:
        bounds = f"from {low:g} on" if high == LARGEST else f"from {low:g} to {high:g}"
        raise BnnfreeError(f"{name}: got {value!r}, expected a number {bounds}.")
    return float(value)
