"""Addresses of shards: which are allowed, what a pattern of them names, and how one is fetched.

Recipes, indices and packed files come from others. So an address is checked before it is used, and the programs that
fetch it get it as one argument, never through a shell.

Must not import torch, bnnfree.nn, models, export or engine.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from pathlib import Path

from bnnfree.errors import DataError, missing, printable

SCHEMES = ("http", "https", "s3", "gs", "hf")
MOST = 1_000_000  # shards that a pattern may name
LONGEST = 2**16  # characters of a pattern
ROOM = 2**28  # characters of all names
ALLOWED = re.compile(r"[A-Za-z0-9._~:/?#@!$&()*+,;=%\[\]-]+")  # RFC 3986 without the quote
RANGE = re.compile(r"\{([^{},.]*)\.\.([^{},.]*)(?:\.\.([^{},.]*))?\}")


def is_url(place: str) -> bool:
    """True for a URL, False for a path.

    Errors: DataError for a scheme that is not one of SCHEMES and for characters that a URL cannot have.
    """
    scheme = place.split(":", 1)[0] if "://" in place or place.startswith("pipe:") else ""
    shown = repr(place)[1:-1]
    if scheme and scheme not in SCHEMES:
        hint = " A recipe must not run commands." if scheme == "pipe" else ""
        raise DataError(f"shard {shown}: got the scheme {scheme!r}, expected one of {', '.join(SCHEMES)}.{hint}")
    if scheme and not ALLOWED.fullmatch(place):
        odd = next(char for char in place if not ALLOWED.fullmatch(char))
        raise DataError(
            f"shard {shown}: got the character {odd!r}, which a URL cannot have. Write it as"
            f" {''.join(f'%{byte:02X}' for byte in odd.encode('utf-8', 'surrogatepass'))}."
        )
    if "\0" in place:
        raise DataError(f"shard {shown}: got a zero byte, which a path cannot have.")
    return bool(scheme)


def is_plain(name: str) -> bool:
    """True for the name of a file without folders, control characters, quotes, spaces, and a dash in front."""
    return bool(re.fullmatch(r"[\w.~+@%=,][\w.~+@%=,-]*", name)) and name not in (".", "..")


def expand(pattern: str, where: str) -> list[str]:
    """The places that a pattern such as `a-{00..12}.tar` names; `::` stands between several patterns.

    Errors: DataError for braces that do not match, for more than MOST places and for more text than memory should hold.
    """
    if len(pattern) > LONGEST:
        raise DataError(f"{where}: got a pattern of {len(pattern):,} characters, expected at most {LONGEST:,}.")
    shown = pattern if len(pattern) < 200 else pattern[:200] + "..."
    most = min(MOST, ROOM // max(1, len(pattern)))
    if (count := sum(map(_bound, pattern.split("::")))) > most:
        raise DataError(f"{where}: got {shown!r}, a pattern of {count:,} shards or so, expected at most {most:,}.")
    try:
        return webdataset("a pattern").shardlists.expand_urls(os.path.expanduser(pattern))
    except RecursionError:
        raise DataError(f"{where}: got {shown!r}, a pattern with too many braces in braces.") from None
    except ValueError as error:
        raise DataError(f"{where}: got {shown!r}, a pattern that cannot be expanded ({str(error)[:200]}).") from None


def _bound(pattern: str) -> int:
    """At least as many as the places that a pattern without `::` names, found without naming them."""
    total = 1
    for first, last, step in RANGE.findall(pattern):
        try:
            total *= abs(int(last[:20]) - int(first[:20])) // max(1, abs(int(step[:20] or 1))) + 1
        except ValueError:  # letters
            total *= 256
    return total * math.prod(group.count(",") + 1 for group in re.findall(r"\{[^{}]*,[^{}]*", pattern))


def command(url: str, path: Path, most: int | None = None) -> list[str]:
    """The program that writes what is at `url` to `path`, and its arguments; from the web at most `most` bytes."""
    scheme = url.split(":", 1)[0]
    if scheme == "s3":
        return ["aws", "s3", "cp", "--only-show-errors", url, str(path)]
    if scheme == "gs":
        return ["gsutil", "-q", "cp", url, str(path)]
    # Why the protocols: a server must not send us on to a file of this machine
    options = ["--proto", "=http,https", "--proto-redir", "=http,https", "--globoff", "--fail", "--location"]
    options += [] if most is None else ["--max-filesize", str(most)]
    return ["curl", *options, "--silent", "--show-error", "--output", str(path), "--url", _web(url)]


def _web(url: str) -> str:
    """The web address of hf://datasets/OWNER/NAME/PATH (or OWNER/NAME/PATH of a model); others as they are."""
    if not url.startswith("hf://"):
        return url
    parts = url[len("hf://") :].split("/")
    start = 3 if parts[0] in ("datasets", "spaces") else 2
    if len(parts) <= start:
        raise DataError(f"shard {url}: expected hf://datasets/OWNER/NAME/PATH.")
    name, _, revision = parts[start - 1].partition("@")
    owner = "/".join([*parts[: start - 1], name])
    return f"https://huggingface.co/{owner}/resolve/{revision or 'main'}/{'/'.join(parts[start:])}"


def fetch(url: str, path: Path, most: int | None = None) -> None:
    """Write what is at `url` to `path`, by curl for the web and by the tools of Amazon and Google for s3 and gs.

    A token in the environment variable HF_TOKEN goes along to hf:// addresses. Errors: DataError.
    """
    is_url(url)
    arguments = command(url, path.absolute(), most)
    if shutil.which(arguments[0]) is None:
        raise DataError(f"shard {url}: cannot be fetched: no program {arguments[0]!r}, which does so. Install it.")
    header, token = "", os.environ.get("HF_TOKEN", "")
    if url.startswith("hf://") and re.fullmatch(r"\w+", token):
        arguments += ["--config", "-"]  # Why: arguments are visible to every user of the machine
        header = f'header = "Authorization: Bearer {token}"\n'
    done = subprocess.run(arguments, input=header.encode(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        said = printable(" ".join(done.stderr.decode("utf-8", "replace").split())[:200])
        raise DataError(
            f"shard {url}: cannot be fetched ({arguments[0]} ended with {done.returncode}{': ' * bool(said)}{said})."
        )
    if not path.is_file():
        raise DataError(f"shard {url}: cannot be fetched ({arguments[0]} wrote nothing).")


def webdataset(what: str):
    """The library of that name. Errors: DataError where it is not installed."""
    try:
        import webdataset as library
    except ImportError:
        raise DataError(f"shards: {what} needs {missing('webdataset')}") from None
    return library
