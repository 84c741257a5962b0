"""One process or many, started by torchrun: the group, what is shared in it, data parallel training, its errors.

Process 0 alone reads and writes the run folder and tells the others. A process that is killed takes the group with
it: every collective of the others fails at once (a closed connection) or after TIMEOUT (a peer that hangs).

Imports torch and bnnfree.errors only.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from bnnfree.errors import BnnfreeError

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)  # for peers in a collective: longer than what one process ever does alone
PATIENCE = timedelta(minutes=5)  # for processes to appear at the start
BUCKET_MB = (1, 25)  # of gradients summed at once: from where latency no longer counts to torch's own choice
BUCKETS = 8  # wanted, so that most gradients travel while the rest are computed

_store: distributed.Store | None = None  # through which the processes found each other


class LostError(BnnfreeError, RuntimeError):
    """Another process of the group is gone or does not answer."""


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

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, [world, ...], in every process."""
        rows = tensor.new_zeros(self.world, *tensor.shape)
        rows[self.rank] = tensor
        return self.sum_(rows)

    def decide(self, value: bool) -> bool:
        """The value that process 0 has, in every process."""
        return bool(self.sum_(torch.tensor(float(value and self.main), device=self.device)))

    def tell(self, make: Callable[[], T]) -> T:
        """`make()` of process 0, in every process; so is the BnnfreeError that it raises."""
        if self.world == 1:
            return make()
        told: list[Any] = [None, None]
        if self.main:
            try:
                told[0] = make()
            except BnnfreeError as error:
                told[1] = error
        distributed.broadcast_object_list(told)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def together(self, make: Callable[[], T]) -> T:
        """`make()` of each process its own; where one raises a BnnfreeError, all raise the first process's."""
        if self.world == 1:
            return make()
        value, error = None, None
        try:
            value = make()
        except BnnfreeError as raised:
            error = raised
        errors: list[Any] = [None] * self.world
        distributed.all_gather_object(errors, error)
        for each in errors:
            if each is not None:
                raise each
        return value  # type: ignore[return-value]

    def same_buffers(self, model: nn.Module) -> None:
        """Give every process the buffers of process 0 (batch normalisation's running statistics differ)."""
        if self.world == 1:
            return
        alike: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            alike.setdefault(buffer.dtype, []).append(buffer)
        for buffers in alike.values():  # Why flat: one message of a kind and not one per buffer
            flat = torch.cat([buffer.detach().flatten() for buffer in buffers])
            distributed.broadcast(flat, 0)
            for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))


def start(device: str = "auto") -> Dist:
    """Join the process group that torchrun describes in the environment, if it does; choose the device.

    Each process has the CUDA device of its LOCAL_RANK. Errors: BnnfreeError for a device that is not there, for more
    processes on a machine than CUDA devices, for a bad environment; LostError where no group comes about.
    """
    global _store
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise BnnfreeError("device: got 'cuda', but torch sees no CUDA device here. Use device=cpu or device=auto.")
    kind = "cuda" if device != "cpu" and cuda else "cpu"
    world = _variable("WORLD_SIZE", 1)
    if world <= 1:
        return Dist(0, 1, torch.device(kind))
    rank, local = _variable("RANK"), _variable("LOCAL_RANK", 0)
    if rank >= world:
        raise BnnfreeError(f"environment RANK: got {rank} of WORLD_SIZE {world}, expected a number below it.")
    place = torch.device("cpu")
    if kind == "cuda":
        count = torch.cuda.device_count()
        if local >= count:
            raise BnnfreeError(
                f"processes: got more on this machine than its {count} CUDA devices, expected one for each device. "
                f"Start torchrun with --nproc_per_node {count}, or train with device=cpu."
            )
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    if not distributed.is_initialized():
        _store = _meet(rank, world)
        distributed.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            store=_store,
            rank=rank,
            world_size=world,
            timeout=TIMEOUT,
            device_id=place if kind == "cuda" else None,
        )
    return Dist(rank, world, place)


def _meet(rank: int, world: int) -> distributed.Store:
    """The store at MASTER_ADDR:MASTER_PORT, which process 0 (or torchrun) keeps."""
    where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if where.startswith(":") or not 0 < _variable("MASTER_PORT") < 2**16:
        raise BnnfreeError(
            f"environment MASTER_ADDR:MASTER_PORT: got {where!r}, expected where process 0 is, as in 10.0.0.1:29500. "
            "torchrun sets them."
        )
    try:
        if rank > 0:
            _await_master()
        store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
        store = _fresh(store, rank, world)
    except (RuntimeError, ValueError, OSError) as error:
        raise LostError(
            f"process {rank} of {world}: the {world} processes did not meet at {where} within "
            f"{PATIENCE.total_seconds():g} s ({_first_line(error)}). Are all started, is the port open and free?"
        ) from None
    store.set_timeout(TIMEOUT)
    return store


def _await_master() -> None:
    """Wait until somebody listens at MASTER_ADDR:MASTER_PORT. Why: torch would log a page for each try that fails."""
    end = time.monotonic() + PATIENCE.total_seconds()
    while True:
        try:
            socket.create_connection((os.environ["MASTER_ADDR"], _variable("MASTER_PORT")), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _fresh(store: distributed.Store, rank: int, world: int) -> distributed.Store:
    """The part of `store` that belongs to these processes: torchrun keeps one store through its restarts.

    Why: what processes that are gone have left there, their addresses, would be taken for that of their successors.
    Process 0 names a part; each other writes its own name there, and stays when process 0 has read it.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("bnnfree", own)
        names = [f"bnnfree/{own}/{other}" for other in range(1, world)]
        store.wait(names, PATIENCE)
        store.set(f"bnnfree/{own}", " ".join(store.get(name).decode() for name in names))
        return distributed.PrefixStore(own, store)
    end = time.monotonic() + PATIENCE.total_seconds()
    while time.monotonic() < end:
        part = store.get("bnnfree").decode()
        store.set(f"bnnfree/{part}/{rank}", own)
        if store.check([f"bnnfree/{part}"]) and own in store.get(f"bnnfree/{part}").decode():
            return distributed.PrefixStore(part, store)
        time.sleep(0.05)
    raise LostError("process 0 did not answer")


def _variable(name: str, default: int | None = None) -> int:
    """A whole number of the environment. Errors: BnnfreeError where it is none, or missing without a default."""
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise BnnfreeError(
            f"environment {name}: got {text!r}, expected a whole number of at least 0. torchrun sets it; "
            "unset WORLD_SIZE to train in one process."
        )
    return int(text)


def stop() -> None:
    """Leave the process group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def data_parallel(model: nn.Module, dist: Dist, image: tuple[int, ...]) -> nn.Module:
    """`model` for one of many processes: after a backward pass its gradients are the mean over them.

    Gradients travel in buckets while the pass goes on, of a graph that torch takes as the same in every pass (it is:
    nothing in our networks depends on the data). `image`: (C, H, W) of two passes of two blank images in which the
    graph is learned; they leave the model, its buffers and torch's random state as they were.

    Why those: torch learns a static graph in the first backward pass, where accumulation must not start (no_sync fails
    in it), and the order of the gradients in the second, by which it makes the buckets anew. Done here, the buckets are
    the same in each step, also of a run that was restarted: with three processes or more a sum's bits depend on them.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    kept, was_training = [buffer.clone() for buffer in model.buffers()], model.training
    like = next(model.parameters())
    blank = torch.zeros(2, *image, dtype=like.dtype, device=dist.device)
    with warnings.catch_warnings(), torch.random.fork_rng([] if dist.device.type == "cpu" else [dist.device]):
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has a new name; the oldest torch has not
        warnings.filterwarnings("ignore", "Grad strides")  # of 1x1 kernels, which have the same order in both layouts
        net = DistributedDataParallel(
            model,
            device_ids=None if dist.device.type == "cpu" else [dist.device],
            broadcast_buffers=False,
            bucket_cap_mb=min(max(size / BUCKETS, BUCKET_MB[0]), BUCKET_MB[1]),
            gradient_as_bucket_view=True,
            static_graph=True,
        )
        net.train()
        for _ in range(2):
            net(blank.contiguous(memory_format=torch.channels_last)).sum().backward()
    with torch.no_grad():
        for buffer, old in zip(model.buffers(), kept, strict=True):
            buffer.copy_(old)
    for param in model.parameters():
        param.grad = None
    return net.train(was_training)


def job() -> str | None:
    """Identifier of the current torchrun job, unchanged when it restarts its processes. None outside torchrun.

    Why not TORCHELASTIC_RUN_ID alone: it is "none" or a name given by hand, which the next torchrun may have too.
    Nor TORCHELASTIC_RESTART_COUNT: torchrun also restarts processes that refused a folder of another run.
    """
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    if run is None:
        return None
    parent = os.getppid()
    try:  # when it was started: numbers of processes are given again
        began = Path(f"/proc/{parent}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        began = ""
    return " ".join([run, socket.gethostname(), str(parent), began]).strip()


def speaks() -> bool:
    """Is this the process whose results are printed? Without a group of processes it is."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def one_voice() -> Iterator[None]:
    """Around a tool's main: an error that several processes have is raised by one, the others end with exit code 2.

    What torch says when a peer is gone becomes a LostError; that one is silent where another process has said why.
    """
    try:
        yield
    except (BnnfreeError, RuntimeError) as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        known = error if isinstance(error, BnnfreeError) else _lost(error)
        if known is None:
            raise
        if not _first_to_say(known):
            sys.stdout.flush()
            os._exit(2)  # Why not SystemExit: leaving a broken group can wait for the peers that are gone
        raise known from None


def _lost(error: RuntimeError) -> LostError | None:
    """The LostError that torch's `error` means, if it comes from a collective."""
    said = str(error)
    if not (isinstance(error, distributed.DistError) or "gloo" in said or "NCCL" in said):
        return None
    return LostError(
        f"process {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')}: another process is gone or does not "
        f"answer ({_first_line(error)}). torchrun --max-restarts N starts again by itself; else go on with --resume."
    )


def _first_line(error: BaseException) -> str:
    """First sentence of torch's message, without the source location before it and the trace after it."""
    return str(error).strip().split("\n")[0].rsplit("] ", 1)[-1].split(". ")[0].rstrip(". ")[:160]


def _first_to_say(error: BnnfreeError) -> bool:
    """Has no other process said the same, before a restart included? True where nobody knows.

    A LostError: has no process said anything since the last restart?
    """
    place = f"bnnfree/said/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = _agent_store() or _store
        if store is None:
            return True
        if isinstance(error, LostError):
            return store.add(place, 1) == 1
        store.add(place, 1)
        return store.add(f"bnnfree/said/{error}", 1) == 1
    except RuntimeError:  # the store was with a process that is gone
        return True


def _agent_store() -> distributed.Store | None:
    """torchrun's own store, for errors before there is a group; None where process 0 would keep it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
