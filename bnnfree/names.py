"""Names that recipes may use for what other rooms build, one tuple per table. Imports nothing: recipes read quickly.

The room that builds has a table with the same keys; tests/test_names.py compares them.
"""

LOSSES = ("cross_entropy", "distribution")
SCHEDULES = ("linear", "cosine", "step", "constant")
OPTIMIZERS = ("adam", "adamw", "sgd", "bop")
STES = ("approx", "clip", "swish", "sigmoid", "ede", "identity")
STE_WINDOWS = ("fixed", "sample")
SCALES = ("fan_in", "mean_abs", "learned", "none")
BETA_MODES = ("nf", "ref", "measured", "none")
SHORTCUTS = ("real", "binary")
ACTIVATIONS = ("trunk", "branch")
BINARIZE = {"none": (False, False), "activations": (True, False), "weights": (False, True), "both": (True, True)}
"""Each: whether the inputs of the blocks' convolutions are signs, and whether their weights are."""

PRECISIONS = ("fp32", "bf16", "bf16_trunk")
SPEEDS = ("layers", "fused", "compiled", "fused_compiled")
GROUP = 32  # samples whose gradients are centred together: as much learnt as by all 128 (recipes/NOTES.md, section 19)

DATASETS = ("digits", "cifar10", "cifar100", "imagenet", "image_folder", "shards", "arrays", "fake")
FILE_DATASETS = ("imagenet", "image_folder", "shards")  # those of image files
CHANNELS = (1, 3, 4)  # that image files become: grey, RGB, RGBA
GEOMETRIES = ("flip", "crop", "shift")
POLICIES = ("color_jitter", "randaugment", "trivialaugment", "random_erasing")
MIXTURES = ("mixup", "cutmix")
AUGMENTS = (*GEOMETRIES, *POLICIES, *MIXTURES)
