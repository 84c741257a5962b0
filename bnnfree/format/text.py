"""The texts of a packed file: names, one a line, and the metadata. Standard library and bnnfree.format only."""

from __future__ import annotations

import json
import re
from typing import Any

from bnnfree.format import schema
from bnnfree.format.errors import LimitError, TextError

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_NESTING = re.compile(r'\\.|"|[\[{][ \t\n\r]*[\]}]|[\[{\]}]', re.DOTALL)  # an empty array or object is one token


def has_control(text: str) -> bool:
    """True if `text` could move a terminal: U+0000 to U+001F, U+007F to U+009F."""
    return _CONTROL.search(text) is not None


def join_lines(texts: list[str], what: str) -> bytes:
    """One UTF-8 line per text."""
    for text in texts:
        if "\n" in text:
            raise TextError(f"{what}: got {text!r}, expected a text without control characters.")
    try:
        lines = "".join(f"{text}\n" for text in texts).encode()
    except UnicodeEncodeError as error:
        raise TextError(f"{what}: not UTF-8 ({error}).") from None
    split_lines(lines, what)
    return lines


def split_lines(raw: bytes, what: str) -> list[str]:
    """The inverse of `join_lines`; no line is empty, very long, or holds a control character."""
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
        if len(line.encode()) > schema.MAX_LINE:
            raise LimitError(f"{what}: got a line of {len(line.encode())} bytes, expected up to {schema.MAX_LINE}.")
    return lines


def metadata_bytes(metadata: dict[str, Any]) -> bytes:
    """A JSON object in UTF-8, without spaces."""
    try:
        return json.dumps(metadata, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except RecursionError:
        raise _too_deep() from None
    except (TypeError, ValueError) as error:
        raise TextError(f"metadata: not JSON in UTF-8 ({error}).") from None


def _too_deep() -> LimitError:
    return LimitError(f"metadata: got values more than {schema.MAX_DEPTH} deep in each other.")


def _check_depth(text: str) -> None:
    """LimitError where more than MAX_DEPTH values of a JSON text stand in each other, before it is parsed.

    Why not by the parser: how deep that goes depends on Python and on the caller's stack.
    """
    depth, quoted = 0, False  # depth: of what is open here; what is open and not empty holds one more
    for match in _NESTING.finditer(text):
        token = match[0]
        if token == '"':
            quoted = not quoted
        elif quoted or token[0] == "\\":
            continue
        elif token in ("]", "}"):
            depth -= 1
        elif depth + (2 if len(token) == 1 else 1) > schema.MAX_DEPTH:
            raise _too_deep()
        elif len(token) == 1:
            depth += 1


def read_metadata(raw: bytes) -> dict[str, Any]:
    """The JSON object in `raw`: every key once in its object, every number finite, nothing very deep."""

    def unique(pairs):
        if len(pairs) != len(dict(pairs)):
            raise ValueError("a key stands twice")
        return dict(pairs)

    def refuse(name):
        raise ValueError(f"{name} is no JSON number")

    def whole(digits):
        if len(digits) > schema.MAX_DIGITS:
            raise LimitError(f"metadata: got {len(digits)} characters of a number, expected up to {schema.MAX_DIGITS}.")
        return int(digits)

    try:
        text = raw.decode()
        _check_depth(text)
        metadata = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_int=whole)
    except ValueError as error:
        raise TextError(f"metadata: not JSON in UTF-8 ({error}).") from None
    if not isinstance(metadata, dict):
        raise TextError(f"metadata: got a {type(metadata).__name__}, expected a JSON object.")
    metadata_bytes(metadata)  # refuses what could not be written again: 1e999, half a surrogate pair
    return metadata
