"""One process or many, started by torchrun. Imports torch only."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from bnnfree.errors import BnnfreeError


@dataclass(frozen=True)
class Dist:
    """This process among its peers: number `rank` of `world`, on `device`."""

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Is this the process that prints and writes?"""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.world > 1:
            distributed.barrier()

    def same_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of process 0 (batch normalisation's running statistics differ)."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)


def start(device: str = "auto") -> Dist:
    """Join the process group that torchrun describes in the environment, if it does; choose the device."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise BnnfreeError("device: got 'cuda', but torch sees no CUDA device here. Use device=cpu or device=auto.")
    kind = "cuda" if device != "cpu" and cuda else "cpu"
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Dist(0, 1, torch.device(kind))
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        torch.cuda.set_device(local)
    place = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    return Dist(distributed.get_rank(), distributed.get_world_size(), place)


def stop() -> None:
    """Leave the process group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
