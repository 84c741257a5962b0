"""The file of a packed model: `read`, `write`, `to_bytes`, `from_bytes`. Standard library and numpy only.

What is wrong with a file is one named error (bnnfree.format.errors); nothing is executed, nothing is allocated by
what the file says: every array is a view of the bytes read. Must not import torch, export, engine.
"""

from __future__ import annotations

import mmap
import os
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from bnnfree.errors import BnnfreeError
from bnnfree.files import replacing
from bnnfree.format import schema
from bnnfree.format.check import check_model
from bnnfree.format.errors import (
    ChecksumError,
    LayoutError,
    LimitError,
    MagicError,
    OpError,
    SizeError,
    TensorError,
    TextError,
    VersionError,
)
from bnnfree.format.packed import Op, PackedModel, Tensor, storage_shape
from bnnfree.format.schema import ALIGN, NONE
from bnnfree.format.text import has_control, join_lines, metadata_bytes, read_metadata, split_lines

Bytes = bytes | memoryview | mmap.mmap

# -- writing


def to_bytes(model: PackedModel) -> bytes:
    """The file of `model`, after the same checks that a reader makes."""
    names = join_lines([t.name for t in model.tensors], "tensor name")
    classes = join_lines(model.classes, "class name")
    metadata = metadata_bytes(model.metadata)
    producer = model.producer.encode("ascii", "replace")[: schema.HEADER_TYPE["producer"].itemsize]
    parts = [np.zeros((), schema.HEADER_TYPE), np.zeros(len(model.tensors), schema.TENSOR_TYPE)]
    parts += [np.zeros(len(model.ops), schema.OP_TYPE)]
    header, tensors, ops = parts
    blob = bytearray()
    for part in (header.tobytes(), tensors.tobytes(), ops.tobytes(), names, classes, metadata):
        blob += bytes(-len(blob) % ALIGN) + part
    for row, tensor in zip(tensors, model.tensors, strict=True):
        if tensor.place == "constant":
            assert tensor.data is not None
            blob += bytes(-len(blob) % ALIGN)
            tensor.offset = len(blob)
            storage = schema.DTYPES[tensor.dtype].storage
            blob += np.ascontiguousarray(tensor.data.astype(storage, copy=False)).tobytes()
        row["offset"], row["bytes"] = tensor.offset, tensor.bytes
        row["shape"] = (*tensor.shape, *[1] * (4 - len(tensor.shape)))
        row["dtype"], row["place"] = schema.DTYPES[tensor.dtype].code, schema.PLACES[tensor.place]
        row["rank"] = len(tensor.shape)
    for row, op in zip(ops, model.ops, strict=True):
        row["code"] = schema.OPS[op.name].code
        for name, value in op.fields.items():
            row[name] = NONE if value is None else value
    header["magic"], header["version"], header["producer"] = schema.MAGIC, schema.VERSION, producer
    header["file_bytes"], header["arena_bytes"] = len(blob), model.arena_bytes
    header["tensor_count"], header["op_count"] = len(tensors), len(ops)
    header["name_bytes"], header["class_bytes"], header["metadata_bytes"] = len(names), len(classes), len(metadata)
    header["input"], header["output"] = model.input, model.output
    at = 0
    for table in parts:
        at += -at % ALIGN
        blob[at : at + table.nbytes] = table.tobytes()
        at += table.nbytes
    seal(blob)
    check_model(from_bytes(bytes(blob)))
    return bytes(blob)


def seal(blob: bytearray) -> None:
    """Write the checksum of `blob` into its header."""
    at = schema.HEADER_TYPE.fields["checksum"][1]  # type: ignore[index]
    blob[at : at + 4] = zlib.crc32(memoryview(blob)[schema.CHECKED_FROM :]).to_bytes(4, "little")


def write(model: PackedModel, path: str | Path) -> int:
    """Write `model` to `path`, whole or not at all; returns the file's size in bytes."""
    blob = to_bytes(model)
    with replacing(path) as temporary:
        temporary.write_bytes(blob)
    return len(blob)


# -- reading


def read(path: str | Path) -> PackedModel:
    """The model in the file `path`, fully checked; its constants are views of a copy of the file in memory.

    Errors: FormatError, one subclass per rule; BnnfreeError where there is no such file.
    """
    return read_with_bytes(path)[0]


def read_with_bytes(path: str | Path, mapped: bool = False) -> tuple[PackedModel, Bytes]:
    """As `read`; and the bytes of the file, for an engine that takes them as they are.

    mapped: they are the file itself, mapped into memory, and must not change as long as the model lives: a file that
    is truncated ends the process, one that is overwritten gives other answers.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            data = _mapped(file) if mapped else _copied(file)
    except (OSError, ValueError) as error:  # ValueError: a zero in the path
        raise BnnfreeError(f"packed model {path}: cannot be read ({getattr(error, 'strerror', error)}).") from None
    try:
        model = from_bytes(data)
        check_model(model)
    except BnnfreeError as error:
        raise type(error)(f"packed model {path}: {error}") from None
    return model, data


def _mapped(file: BinaryIO) -> Bytes:
    # Why not map an empty file: the operating system refuses to
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if file.seek(0, 2) else b""


def _copied(file: BinaryIO) -> Bytes:
    """The bytes of a file at a multiple of 64, where the native engine takes them without another copy."""
    size = os.fstat(file.fileno()).st_size
    room = np.empty(size + ALIGN, np.uint8)
    start = -room.ctypes.data % ALIGN
    view = memoryview(room.data)[start : start + size]
    return view[: file.readinto(view)].toreadonly()  # type: ignore[attr-defined]


def from_bytes(data: Bytes) -> PackedModel:
    """The model in `data`, header, tables, text and layout checked; `check.check_model` checks what they mean."""
    header = _read_header(data)
    counts = {"tensors": int(header["tensor_count"]), "ops": int(header["op_count"])}
    for name, count in counts.items():
        if not 0 < count <= schema.MAX_RECORDS:
            raise LimitError(f"got {count} {name}, expected 1 to {schema.MAX_RECORDS}.")
    sizes = [schema.HEADER_TYPE.itemsize, counts["tensors"] * schema.TENSOR_TYPE.itemsize]
    sizes += [counts["ops"] * schema.OP_TYPE.itemsize]
    for name in ("name_bytes", "class_bytes", "metadata_bytes"):
        if header[name] > schema.MAX_TEXT:
            raise LimitError(f"got {header[name]} {name.replace('_', ' ')}, expected up to {schema.MAX_TEXT}.")
        sizes.append(int(header[name]))
    sections, at = [], 0
    for size in sizes:
        at = _skip_gap(data, at)
        if at + size > len(data):
            raise SizeError(f"got {len(data)} bytes, too few for the tables the header counts.")
        sections.append(slice(at, at + size))
        at += size
    tensor_rows = np.frombuffer(data, schema.TENSOR_TYPE, counts["tensors"], sections[1].start)
    op_rows = np.frombuffer(data, schema.OP_TYPE, counts["ops"], sections[2].start)
    names = split_lines(bytes(data[sections[3]]), "names")
    if len(names) != counts["tensors"]:
        raise TextError(f"got {len(names)} names for {counts['tensors']} tensors.")
    tensors = [_read_tensor(row, name) for row, name in zip(tensor_rows.tolist(), names, strict=True)]
    for tensor in tensors:
        if tensor.place == "constant":
            at = _map_constant(data, tensor, at)
    if at != len(data):
        raise LayoutError(f"got {len(data) - at} bytes after the last constant, expected none.")
    return PackedModel(
        tensors=tensors,
        ops=[_read_op(row, i) for i, row in enumerate(op_rows.tolist())],
        input=_index(header["input"], tensors, "input"),
        output=_index(header["output"], tensors, "output"),
        arena_bytes=int(header["arena_bytes"]),
        classes=split_lines(bytes(data[sections[4]]), "classes"),
        metadata=read_metadata(bytes(data[sections[5]])),
        producer=_read_producer(header),
    )


def _read_header(data) -> np.void:
    if data[: len(schema.MAGIC)] != schema.MAGIC:
        got = bytes(data[:8])
        raise MagicError(f"got {got!r} as its first bytes, expected {schema.MAGIC!r}. Is it a packed model (.bnnf)?")
    if len(data) < schema.HEADER_TYPE.itemsize:
        raise SizeError(f"got {len(data)} bytes, expected at least {schema.HEADER_TYPE.itemsize}.")
    header = np.frombuffer(data, schema.HEADER_TYPE, 1)[0]
    if header["version"] != schema.VERSION:
        raise VersionError(
            f"got format version {header['version']}, expected {schema.VERSION}. Export it again with this bnnfree."
        )
    if header["file_bytes"] != len(data):
        raise SizeError(f"got {len(data)} bytes, expected the {header['file_bytes']} that its header counts.")
    if zlib.crc32(memoryview(data)[schema.CHECKED_FROM :]) != header["checksum"]:
        raise ChecksumError("its checksum is not that of its bytes. Copy or export it again.")
    at = schema.HEADER_TYPE.fields["rest"][1]  # type: ignore[index]
    if header["zero"] or any(data[at : schema.HEADER_TYPE.itemsize]):
        raise LayoutError("got values in the header where zeros belong.")
    return header


def _skip_gap(data, at: int) -> int:
    """The next aligned offset; what lies in between must be zero."""
    end = min(at + -at % ALIGN, len(data))
    if any(data[at:end]):
        raise LayoutError(f"got values between offsets {at} and {end}, expected zeros.")
    return at + -at % ALIGN


def _map_constant(data, tensor: Tensor, at: int) -> int:
    """Give `tensor` its view of `data`; returns where it ends."""
    start = _skip_gap(data, at)
    if tensor.offset != start:
        kind = "a hole" if tensor.offset > start else "an overlap"
        raise LayoutError(f"{tensor.name}: got offset {tensor.offset}, expected {start}: {kind}.")
    if start + tensor.bytes > len(data):
        raise SizeError(
            f"{tensor.name}: got {len(data)} bytes in all, too few for a constant up to {start + tensor.bytes}."
        )
    storage = np.dtype(schema.DTYPES[tensor.dtype].storage)
    array = np.frombuffer(data, storage, tensor.bytes // storage.itemsize, start)
    tensor.data = array.reshape(storage_shape(tensor.dtype, tensor.shape))
    return start + tensor.bytes


_DTYPE_NAMES = {dtype.code: name for name, dtype in schema.DTYPES.items()}
_PLACE_NAMES = {code: name for name, code in schema.PLACES.items()}
_OP_NAMES = {op.code: name for name, op in schema.OPS.items()}


def _read_tensor(row: tuple, name: str) -> Tensor:
    offset, size, shape, dtype, place, rank, *zeros = row
    shape = tuple(int(side) for side in shape)
    if dtype not in _DTYPE_NAMES or place not in _PLACE_NAMES or not 1 <= rank <= 4 or any(zeros):
        raise TensorError(f"{name}: got dtype {dtype}, place {place}, rank {rank}, which are not all known.")
    if any(side != 1 for side in shape[rank:]):
        raise TensorError(f"{name}: got sizes {shape}, expected 1 beyond rank {rank}.")
    if not all(shape):
        raise TensorError(f"{name}: got sizes {shape}, expected 1 or more each.")
    if max(shape) > schema.MAX_SIDE:
        raise LimitError(f"{name}: got sizes {shape}, expected up to {schema.MAX_SIDE} each.")
    tensor = Tensor(name, _DTYPE_NAMES[dtype], _PLACE_NAMES[place], shape[:rank], offset)
    if size != tensor.bytes:
        raise TensorError(f"{name}: got {size} bytes, expected {tensor.bytes} for {tensor.dtype} {tensor.shape}.")
    return tensor


def _read_op(row: tuple, number: int) -> Op:
    code = row[0]
    if code not in _OP_NAMES:
        raise OpError(f"op {number}: got code {code}, expected one of {', '.join(map(str, _OP_NAMES))}.")
    if any(row[-1]):
        raise OpError(f"op {number}: got values where zeros belong.")
    fields = {f.name: value for f, value in zip(schema.OP[1:-1], row[1:-1], strict=True)}
    tensors = {name: None if fields[name] == NONE else fields[name] for name in schema.TENSOR_FIELDS}
    return Op(_OP_NAMES[code], {**fields, **tensors})


def _index(value, tensors: list[Tensor], what: str) -> int:
    if value >= len(tensors):
        raise TensorError(f"{what}: got tensor {value} of {len(tensors)}.")
    return int(value)


def _read_producer(header: np.void) -> str:
    raw = bytes(header["producer"])
    if not raw.isascii() or has_control(raw.decode("ascii")):
        raise TextError(f"producer: got {raw!r}, expected printable ASCII.")
    return raw.decode("ascii")
