"""The texts of a packed file: names, a line each, and metadata, two lines an entry. Imports its own room only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from bnnfree.format import schema
from bnnfree.format.errors import LimitError, TextError

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def has_control(text: str) -> bool:
    """True if `text` could move a terminal: U+0000 to U+001F, U+007F to U+009F."""
    return _CONTROL.search(text) is not None


def join_lines(texts: list[str], what: str) -> bytes:
    """One UTF-8 line per text."""
    lines = _joined(texts, what)
    split_lines(lines, what)
    return lines


def split_lines(raw: bytes, what: str) -> list[str]:
    """The inverse of `join_lines`; no line is empty, very long, or holds a control character."""
    lines = _lines(raw, what)
    for line in lines:
        _check_length(line, what)
    return lines


def _joined(texts: list[str], what: str) -> bytes:
    for text in texts:
        if "\n" in text:
            raise TextError(f"{what}: got {text!r}, expected a text without control characters.")
    try:
        return "".join(f"{text}\n" for text in texts).encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{what}: not UTF-8 ({error}).") from None


def _lines(raw: bytes, what: str) -> list[str]:
    """Lines of any length."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise TextError(f"{what}: not UTF-8 ({error}).") from None
    if text and not text.endswith("\n"):
        raise TextError(f"{what}: the last line has no end.")
    lines = text.split("\n")[:-1]
    for line in lines:
        if not line or has_control(line):
            raise TextError(f"{what}: got {line!r:.80}, expected a text without control characters, not empty.")
    return lines


def _check_length(line: str, what: str) -> None:
    if len(line.encode()) > schema.MAX_LINE:
        raise LimitError(f"{what}: got a line of {len(line.encode())} bytes, expected up to {schema.MAX_LINE}.")


def metadata_bytes(metadata: Mapping[str, str]) -> bytes:
    """Two UTF-8 lines for each entry: its key, its value."""
    if not isinstance(metadata, Mapping):
        raise TextError(f"metadata: got a {type(metadata).__name__}, expected texts by key.")
    texts = [text for entry in metadata.items() for text in entry]
    for text in texts:
        if not isinstance(text, str):
            raise TextError(f"metadata: got a {type(text).__name__}, expected texts.")
    lines = _joined(texts, "metadata")
    read_metadata(lines)
    return lines


def read_metadata(raw: bytes) -> dict[str, str]:
    """The inverse of `metadata_bytes`: every key once, no line empty or with a control character."""
    lines = _lines(raw, "metadata")
    keys = lines[::2]
    if len(lines) % 2:
        raise TextError(f"metadata: the key {lines[-1]!r:.80} has no value.")
    if len(keys) > schema.MAX_KEYS:
        raise LimitError(f"metadata: got {len(keys)} keys, expected up to {schema.MAX_KEYS}.")
    for key in keys:
        _check_length(key, "metadata")
    if len(set(keys)) < len(keys):
        raise TextError("metadata: a key stands twice.")
    return dict(zip(keys, lines[1::2], strict=True))


def join_numbers(values: Iterable[float]) -> str:
    """Numbers as a value of the metadata: the shortest decimals that say them, with spaces between."""
    return " ".join(repr(float(value)) for value in values)


def split_numbers(text: str, where: str) -> list[float]:
    """The inverse of `join_numbers`. Errors: TextError for what is no finite number."""
    try:
        values = [float(part) for part in text.split(" ")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise TextError(f"{where}: got {text!r:.80}, expected numbers with spaces between.")
    return values
