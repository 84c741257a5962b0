"""Names that recipes may use for what other rooms build. Imports nothing, so that reading a recipe is quick."""

LOSSES = ("cross_entropy", "distribution")
SCHEDULES = ("linear", "cosine", "step", "constant")
