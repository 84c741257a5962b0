"""The container of a checkpoint: a zip archive of torch.save with a seal, so that one changed byte is an error.

The seal is the archive's comment: the SHA-256 of all bytes before its length. Standard library and torch only.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch

from bnnfree.errors import CheckpointError
from bnnfree.files import OutputError, replacing, said


class ForeignCheckpoint(CheckpointError):
    """A file that another program wrote: no archive of torch.save, or one without our mark."""


SEAL = b"bnnfree sha256 "
LENGTH = len(SEAL) + 64
END = b"PK\x05\x06"  # starts the last record of a zip archive, of 22 bytes and a comment
CHUNK = 1 << 20
# torch, zipfile and pickle raise any of these for a damaged file or a file of another kind
DAMAGE: tuple[type[Exception], ...] = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    ImportError,
)


def write_state(path: str | Path, state: Any) -> None:
    """Write `state` and its seal in one step: whole or not at all. Errors: CheckpointError, a full disk by name."""
    try:
        with replacing(path) as temporary:
            with temporary.open("wb") as file:  # Why not by name: torch then hides what the system says
                torch.save(state, file)
            _seal(temporary)
    except OutputError as error:
        raise CheckpointError(f"checkpoint {error}") from None
    except RuntimeError as error:
        if (refusal := _refusal(error)) is None:
            raise
        raise CheckpointError(f"checkpoint {path}: cannot be written: {said(refusal)}.") from None


def _refusal(error: BaseException | None) -> OSError | None:
    """The system's error behind one of torch's."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def read_state(path: str | Path) -> tuple[Any, bool]:
    """The contents of a file of torch.save, tensors and plain values only, and True if it has a seal (which is right).

    A file without one is read by the archive's own checksums, which leave out its directory.
    Errors: CheckpointError for a damaged, compressed or foreign file, and for tensors that claim more than is there.
    """
    try:
        sealed = _check_container(Path(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
        _check_tensors(state)
        return state, sealed
    except CheckpointError as error:
        raise type(error)(f"checkpoint {path}: {error}") from None
    except pickle.UnpicklingError:
        reason = "it holds more than tensors and plain values"
    except RecursionError:
        reason = "it is nested too deeply"
    except DAMAGE as error:
        reason = str(error).strip().split("\n")[0][:120] or type(error).__name__
    raise CheckpointError(f"checkpoint {path}: not a checkpoint, or torn ({reason}).")


def _seal(path: Path) -> None:
    with path.open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(size - 22)
        if file.read(4) != END:
            raise CheckpointError(f"checkpoint {path}: torch wrote an archive with a comment, expected none.")
        file.seek(size - 2)
        file.write(struct.pack("<H", LENGTH))
        file.seek(size)
        file.write(SEAL + b"0" * 64)
        digest = _digest(file, size)
        file.seek(size + len(SEAL))
        file.write(digest)


def _digest(file: Any, size: int) -> bytes:
    """SHA-256, in hexadecimal, of the first `size` bytes."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (part := file.read(min(CHUNK, size))):
        digest.update(part)
        size -= len(part)
    return digest.hexdigest().encode()


def _check_container(path: Path) -> bool:
    """True if the archive has a seal. Errors: CheckpointError for a seal or checksum that does not fit, compression."""
    if not zipfile.is_zipfile(path):
        raise ForeignCheckpoint("not a checkpoint, or torn (no archive of torch.save).")
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        size = file.seek(0, 2)
        members = archive.infolist()
        if any(each.compress_type != zipfile.ZIP_STORED for each in members):
            raise CheckpointError("holds compressed members, expected stored ones. Write it with torch.save.")
        if sum(each.file_size for each in members) > size:
            raise CheckpointError("its members claim more bytes than the file has.")
        if archive.comment[: len(SEAL)] == SEAL:
            if archive.comment != SEAL + _digest(file, size - LENGTH):
                raise CheckpointError("damaged: its checksum is another. Copy or download the file again.")
            return True
        if (bad := archive.testzip()) is not None:
            raise CheckpointError(f"damaged: the checksum of {bad} is another. Copy or download the file again.")
        return False


def _check_tensors(value: Any) -> None:
    """Errors: CheckpointError for a tensor that is sparse, of no memory, or larger than its memory."""
    pending, seen = [value], set()
    while pending:
        value = pending.pop()
        if id(value) in seen:  # a pickle can hold itself
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            dense = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not dense or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise CheckpointError("holds a tensor that is sparse, expanded or without values, expected plain ones.")
        elif isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            pending += value
