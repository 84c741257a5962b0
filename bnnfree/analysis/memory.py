"""Memory that a training step keeps from its forward pass for its backward pass. Imports torch only."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes of the tensors that autograd holds at the end of a forward pass with cross entropy.

    Each storage counts once and as a whole, however many operations saved a view of it; parameters and buffers, which
    are there anyway, do not count, the images do. What a custom function keeps otherwise than by save_for_backward is
    not seen. The model is run in the mode it is in; gradients are left alone. Shapes: images [N, C, H, W], labels [N].
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}  # Why the storages: one that is freed could lend its address again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = nn.functional.cross_entropy(model(images), labels)
    del loss
    return sum(storage.nbytes() for storage in held.values())


def saved_per_image(
    model: nn.Module, shape: tuple[int, int, int], classes: int, batch: int = 4, other: int | None = None
) -> tuple[float, float]:
    """(bytes that grow with each image of a batch, bytes that do not, such as standardised weights).

    Measured at two batch sizes, `batch` and `other` (None: twice that), on noise, where the model's parameters are.
    Shape: channels, height, width.
    """
    other = 2 * batch if other is None else other
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    found = []
    for count in (batch, other):
        images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        found.append(saved_bytes(model, images, (torch.arange(count) % classes).to(device)))
    each = (found[1] - found[0]) / (other - batch)
    return each, found[0] - batch * each
