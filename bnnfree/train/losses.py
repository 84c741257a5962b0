"""Loss functions and their targets. Imports torch only."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def main_class(labels: Tensor) -> Tensor:
    """Classes [N] of labels; of the shares [N, classes] of mixed images those with the largest."""
    return labels.argmax(1) if labels.is_floating_point() else labels


def cross_entropy(logits: Tensor, labels: Tensor, teacher: Tensor | None, smoothing: float) -> Tensor:
    """sum_n -log softmax(z_n)[y_n], the target spread by `smoothing` over all classes; y_n may be shares of classes."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="sum")


def distribution(logits: Tensor, labels: Tensor, teacher: Tensor | None, smoothing: float) -> Tensor:
    """sum_n -sum_c softmax(t_n)_c log softmax(z_n)_c: no temperature, no hard labels.

    Ref: Shen et al. 2019 (MEAL V2's loss), as used by Liu et al. 2020 (ReActNet) and Chen et al. 2021.
    """
    if teacher is None:
        raise ValueError("the distribution loss needs a teacher's logits")
    return -(teacher.float().softmax(1) * logits.float().log_softmax(1)).sum()


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None, float], Tensor]] = {
    "cross_entropy": cross_entropy,
    "distribution": distribution,
}
"""Each: (logits [N, classes], labels [N] or shares like logits, teacher logits or None, smoothing) -> sum of losses."""
