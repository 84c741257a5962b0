"""Loss and accuracy of a network over a split of data. Imports torch and its own room; no models, export, engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bnnfree.data.pixel_split import Split
from bnnfree.train.dist import Dist

WRONG = 2**31 - 1


def ranks_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The place of each label among its row's logits, 0 first: of equal ones the lower class comes first, as in argmax.

    NaN comes before every number. A label whose logit is NaN has the rank WRONG, which no k is above.
    Shapes: [N, C], [N] -> [N].
    """
    own = logits.gather(1, labels[:, None])
    classes = torch.arange(logits.shape[1], device=logits.device)
    ranks = (~(logits <= own) | (logits == own) & (classes < labels[:, None])).sum(1)
    return ranks.masked_fill(own[:, 0].isnan(), WRONG)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    dist: Dist,
    batch_size: int = 256,
    precision: str = "fp32",
    progress: Callable[[int], None] = lambda images: None,
) -> dict[str, float]:
    """Mean loss, top-1 and top-5 accuracy (percent) of `model` over `split`, summed over processes.

    progress: is told after each batch how many images of this process it had.
    """
    was_training = model.training
    model.eval()
    dist.same_buffers(model)
    sums = torch.zeros(4, dtype=torch.float64, device=dist.device)
    for images, labels in split.batches(batch_size, device=dist.device, rank=dist.rank, world=dist.world):
        with torch.autocast(dist.device.type, torch.bfloat16, enabled=precision != "fp32"):
            logits = model(images).float()
        ranks = ranks_of(logits, labels)
        sums[0] += nn.functional.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (ranks < 1).sum()
        sums[2] += (ranks < 5).sum()
        sums[3] += len(ranks)
        progress(len(ranks))
    model.train(was_training)
    loss, top1, top5, samples = dist.sum_(sums).tolist()
    return {"loss": loss / samples, "top1": 100 * top1 / samples, "top5": 100 * top5 / samples}
