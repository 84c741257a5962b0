"""The schema of a recipe as written: every key, its type, its default and what it means. Reading files is `read.py`.

Imports pydantic and what has no torch: names, normalisers and sizes.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from bnnfree import errors
from bnnfree.data.sizes import size_of
from bnnfree.names import (
    ACTIVATIONS,
    BETA_MODES,
    BINARIZE,
    GROUP,
    LOSSES,
    OPTIMIZERS,
    PRECISIONS,
    SCALES,
    SCHEDULES,
    SHORTCUTS,
    SPEEDS,
    STE_WINDOWS,
    STES,
)
from bnnfree.normalisers import NORMS, check_design, complete
from bnnfree.recipe.data_section import MOST, MOST_PIXELS, DataRecipe, ImageSize, Part, contradiction, one_of


def _options_of_norms() -> str:
    """The options of every norm and their defaults, as its builder has them."""
    norms: dict[str, list[str]] = {}
    for name, rule in NORMS.items():
        options = (f"{key} {option.default}" for key, option in rule.options.items())
        norms.setdefault(", ".join(options), []).append(name)
    return "of that norm: " + "; ".join(f"{' '.join(names)}: {text or '-'}" for text, names in norms.items())


class ModelRecipe(Part):
    """Network: architecture, normaliser, and what of it is binary."""

    name: str
    """architecture: a name of models.MODELS"""
    norm: one_of(NORMS) = Field(  # type: ignore[valid-type]
        default="free", description=f"what stands in for batch normalisation: {' | '.join(NORMS)}"
    )
    norm_options: dict[str, bool | int | float | None] = Field(default={}, description=_options_of_norms())
    width: float = Field(default=1.0, gt=0, le=1000)
    """multiplier of every layer's channels"""
    binarize: one_of(BINARIZE) = "both"  # type: ignore[valid-type]
    """what is 1 bit: none | activations | weights | both; a stage may say otherwise"""
    stem: Literal["auto", "cifar", "half", "imagenet"] = "auto"
    """first layer: cifar keeps the resolution, half halves it, imagenet quarters it; auto: cifar up to 64 pixels"""
    shortcut: one_of(SHORTCUTS) = "binary"  # type: ignore[valid-type]
    """weights of the 1x1 shortcut convolutions: real | binary (their inputs are real)"""
    activation: one_of(ACTIVATIONS) | None = None  # type: ignore[valid-type]
    """place of a block's activation: trunk (after the residual sum) | branch (before it); null: the normaliser's own"""
    standardize: bool | None = None
    """scaled weight standardisation; null: the normaliser's own"""
    centre: bool | None = None
    """takes the expected mean out of each convolution's output; null: the normaliser's own"""
    centre_gradient: bool | Literal["head"] | None = None
    """takes what groups share out of the gradient of centred layers' inputs (head: classifier's); null: norm's own"""
    centre_head: bool | None = None
    """takes the mean out of the classifier's inputs and of their gradient; null: the normaliser's own"""
    scale: one_of(SCALES) | None = None  # type: ignore[valid-type]
    """size of the binary weights: fan_in | mean_abs | learned | none; null: the normaliser's own"""
    alpha: float | None = None
    """factor of each block's branch; null: the normaliser's own"""
    beta: one_of(BETA_MODES) | None = None  # type: ignore[valid-type]
    """expected-variance bookkeeping: nf | ref | measured | none; null: the normaliser's own"""
    ste: one_of(STES) | None = None  # type: ignore[valid-type]
    """straight-through estimator: approx | clip | swish | sigmoid | ede | identity; null: the normaliser's own"""
    ste_window: one_of(STE_WINDOWS) | None = None  # type: ignore[valid-type]
    """window of that estimator: fixed | sample; null: the normaliser's own"""
    pad_value: one_of((0, 1, -1), int) = 0  # type: ignore[valid-type]
    """what the padding of binary convolutions carries"""
    latent_std: float | None = Field(default=0.04, gt=0)
    """deviation of the initial latent weights, where standardised; about 10 times the learning rate"""

    @model_validator(mode="after")
    def _names_take_their_options(self) -> ModelRecipe:
        try:
            check_design({**self.model_dump(), **complete(self.norm, self.model_dump())})
        except errors.BnnfreeError as error:
            raise contradiction(f"model.{error}") from None
        return self


class StageRecipe(Part):
    """One leg of training; weights go on to the next, optimiser and schedule start anew."""

    name: str = "train"
    """what metrics.jsonl calls it"""
    epochs: int = Field(ge=1, le=1_000_000)
    """passes over the training images"""
    binarize: one_of(BINARIZE) | None = None  # type: ignore[valid-type]
    """what is 1 bit in this stage; null: model.binarize"""
    image_size: ImageSize | None = None
    """size of this stage's images, scaled from those of data.image_size; null: those; the last stage has none"""
    lr: float | None = Field(default=None, gt=0)
    """null: optimizer.lr"""
    weight_decay: float | None = Field(default=None, ge=0)
    """null: optimizer.weight_decay"""


class OptimizerRecipe(Part):
    """Optimiser: which one, its learning rates, decay and moments."""

    name: one_of(OPTIMIZERS) = "adam"  # type: ignore[valid-type]
    """adam | adamw | sgd | bop (Bop on binary weights, Adam on the rest)"""
    lr: float = Field(default=1e-3, gt=0)
    """peak learning rate"""
    affine_lr_mult: float = Field(default=1.0, gt=0)
    """factor on lr for gains, biases, thresholds and slopes"""
    lr_mult: dict[str, Annotated[float, Field(gt=0)]] = {}
    """more factors on lr by pattern of parameter names, of several the last: {"stem.*": 0.1, "blocks.1?.*": 0.5}"""
    weight_decay: float = Field(default=0.0, ge=0)
    """of convolution weights, and of nothing else"""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """adam, adamw"""
    eps: float = Field(default=1e-8, gt=0)
    """adam, adamw"""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """sgd"""
    nesterov: bool = False
    """sgd"""
    bop_gamma: float = Field(default=1e-4, gt=0, le=1)
    """bop: share of the new gradient in its average"""
    bop_threshold: float = Field(default=1e-8, ge=0)
    """bop: how strong the average must be to flip a bit"""
    precondition: Literal["bnp"] | None = None
    """bnp: gradients as if the inputs of every layer were normalised; null: as they are"""
    bnp_rho: float = Field(default=0.99, ge=0, lt=1)
    """bnp: share of the inputs' running mean and variance kept per step"""


class ScheduleRecipe(Part):
    """Learning rate over a stage or a run; its last step is never at zero."""

    name: one_of(SCHEDULES) = "linear"  # type: ignore[valid-type]
    """linear | cosine | step | constant"""
    over: Literal["stage", "run"] = "stage"
    """what the rate's course spans: each stage, or once all of them (run); a warm-up is always a stage's"""
    warmup_steps: int = Field(default=0, ge=0, le=MOST)
    """optimiser steps of linear ramp at the start"""
    milestones: list[float] = Field(default=[], max_length=1000)
    """step: shares of the stage in (0, 1) at which lr is multiplied by gamma"""
    gamma: float = Field(default=0.1, gt=0, lt=1)
    """step: that factor"""


class AgcRecipe(Part):
    """Adaptive gradient clipping of convolution weights."""

    clip: float | Literal["auto"] | None = "auto"
    """largest gradient norm / weight norm of an output channel; null: off; auto: the normaliser's own"""


class LossRecipe(Part):
    """Loss function and its targets."""

    name: one_of(LOSSES) = "cross_entropy"  # type: ignore[valid-type]
    """cross_entropy | distribution (cross entropy against a teacher's probabilities)"""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """cross_entropy: share of the target spread over all classes"""
    teacher: str | None = None
    """distribution: a checkpoint or run folder of ours, or torchvision:NAME"""


class EmaRecipe(Part):
    """Exponential moving average of the weights, which is then what is evaluated and kept as best."""

    decay: float | None = Field(default=None, gt=0, lt=1)
    """share kept per step; null: off"""


class FreeRecipe(Part):
    """The constants of centred convolutions (norms that have them)."""

    window: float = Field(default=256.0, gt=0)
    """samples over which the running mean of a layer's inputs looks back"""
    calibration: int = Field(default=512, ge=1, le=MOST)
    """training images of the pass that sets the constants at the start of a stage"""
    track: bool = True
    """false: input means stay at their calibration"""
    recalibrate: int = Field(default=9000, ge=0, le=MOST)
    """training samples after which constant deviations are measured anew, and gains make up for it; 0: never"""
    group: int = Field(default=GROUP, ge=0, le=MOST)
    """images of a step whose gradients are centred together, however passes and processes divide it; 0: all"""
    reference: int = Field(default=32, ge=0, le=MOST)
    """steps of fewer than 8 images centre gradients by the last so many, of steps before too (one process); 0: never"""


class ProbeRecipe(Part):
    """Measurements of binary layers while they train: key `probe` of metrics.jsonl, probe.png."""

    every: int | None = Field(default=None, ge=1, le=MOST)
    """optimiser steps between two probes; the first comes before a stage's first step; null: none"""


class Recipe(Part):
    """A whole training: what, on what, how, in which stages."""

    model: ModelRecipe
    data: DataRecipe
    stages: list[StageRecipe] = Field(min_length=1, max_length=1000)
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    agc: AgcRecipe = AgcRecipe()
    loss: LossRecipe = LossRecipe()
    ema: EmaRecipe = EmaRecipe()
    free: FreeRecipe = FreeRecipe()
    probe: ProbeRecipe = ProbeRecipe()
    init: str | None = None
    """weights to start from: a checkpoint, run folder, published file, or a name in models/pretrained; null: none"""
    freeze: list[str] = []
    """patterns of parameter names that stay as they are, their layers' running means too: ["stem.*", "blocks.0.*"]"""
    settle: int = Field(default=0, ge=0, le=MOST)
    """images to measure statistics (bn) or input means (free) on for each evaluation; 0: none; other norms: nothing"""
    accumulate: int = Field(default=1, ge=1, le=MOST)
    """forward passes per optimiser step"""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """of initial weights, order and augmentation"""
    deterministic: bool = True
    """the same bits from the same recipe on the same machine"""
    precision: one_of(PRECISIONS) = "fp32"  # type: ignore[valid-type]
    """fp32 | bf16 (signs and gradients of products; sums of signs stay exact) | bf16_trunk (what is kept too: half)"""
    speed: one_of(("auto", *SPEEDS)) = "auto"  # type: ignore[valid-type]
    """how blocks run in training: auto | layers | fused | compiled | fused_compiled; auto says what it takes"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where to train"""
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    """time between checkpoints within an epoch; one is always written at its end"""

    @model_validator(mode="after")
    def _no_contradictions(self) -> Recipe:
        if self.loss.name == "distribution" and self.loss.teacher is None:
            raise contradiction("loss.name is 'distribution' but loss.teacher is not given")
        teacher = self.loss.teacher or "" if self.loss.name == "distribution" else ""
        if teacher.startswith("torchvision:") and self.data.name in ("digits", "cifar10", "cifar100"):
            raise contradiction(
                f"loss.teacher is {teacher!r}, which knows ImageNet's classes, but data.name is {self.data.name!r}"
            )
        if self.optimizer.name == "sgd" and self.optimizer.nesterov and not self.optimizer.momentum:
            raise contradiction("optimizer.nesterov is true but optimizer.momentum is 0")
        if self.schedule.name == "step" and not self.schedule.milestones:
            raise contradiction("schedule.name is 'step' but schedule.milestones is empty")
        data = self.data
        values = data.samples * math.prod(size_of(data.image_size) or (32, 32)) * data.channels
        if data.name == "fake" and values > MOST_PIXELS:
            raise contradiction(
                f"data.samples: got {data.samples}, which with data.image_size and data.channels makes {values:,} "
                f"values, expected up to {MOST_PIXELS:,}"
            )
        if any(not 0 < m < 1 for m in self.schedule.milestones):
            raise contradiction("schedule.milestones are shares of a stage, each between 0 and 1")
        if isinstance(self.agc.clip, float) and self.agc.clip <= 0:
            raise contradiction(f"agc.clip: got {self.agc.clip}, expected a number above 0, null or auto")
        own = NORMS[self.model.norm].standardize
        if self.optimizer.name == "bop" and (own if self.model.standardize is None else self.model.standardize):
            raise contradiction(
                "optimizer.name is 'bop', whose weights are signs already, but the weights are standardised; "
                "set model.standardize=false"
            )
        if self.stages[-1].image_size is not None:
            raise contradiction(
                f"stages.{len(self.stages) - 1}.image_size: got {self.stages[-1].image_size} for the last stage, whose "
                "images are of data.image_size, expected null"
            )
        for i, stage in enumerate(self.stages):
            signs = stage.binarize or self.model.binarize
            if self.optimizer.name == "bop" and not BINARIZE[signs][1]:
                raise contradiction(
                    f"optimizer.name is 'bop', which holds weights of +-1 only, but stages.{i} "
                    f"has real weights (binarize: {signs})"
                )
        return self
