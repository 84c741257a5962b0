"""Small packed files for the fuzzer to start from: python tests/corpus.py writes tests/corpus again.

`runs-*.bnnf` are valid; the others are damaged ones of test_fuzz.py, each called after the error that refuses it.
After a change of the format they must be written again.
"""

from pathlib import Path

import numpy as np
from damage import File, every_op, sealed
from packed import Net, random_net
from test_fuzz import KINDS

from bnnfree.format import FormatError, check_model, from_bytes, schema, to_bytes

CORPUS = Path(__file__).resolve().parent / "corpus"
RUNS = "runs"
LARGEST = 5500  # bytes of a random one
VALID = 20
METADATA = {"keys": "".join(f"k{i}\nv\n" for i in range(40)), "long": "k\n" + "v" * 3000 + "\n"}


def outcome(blob: bytes) -> str:
    """Name of the error that refuses a file, or RUNS."""
    try:
        check_model(from_bytes(blob))
    except FormatError as error:
        return type(error).__name__
    return RUNS


def no_constants() -> bytes:
    """It ends with its metadata."""
    net = Net(2, 3, 2)
    net.add("pointwise", 0)
    return to_bytes(net.model())


def files() -> dict[str, bytes]:
    """name -> bytes"""
    made = {f"{RUNS}-every-op": to_bytes(every_op()), f"{RUNS}-no-constants": no_constants()}
    seeds = iter(range(1000))
    while len(made) < VALID:
        seed = next(seeds)
        blob = to_bytes(random_net(seed, ("tame", "whole", "wild")[seed % 3]))
        if len(blob) <= LARGEST:
            made[f"{RUNS}-{seed}"] = blob
    valid, missing = list(made.values())[2:], set(schema.ERRORS)
    for name, text in METADATA.items():
        blob = File(no_constants()).retext(metadata=text.encode())
        made[f"{RUNS}-{name}"] = sealed(blob.rstrip(b"\0"))  # it ends with the text
    for seed in range(100_000):
        random = np.random.default_rng(seed)
        blob = bytes(KINDS[random.integers(len(KINDS))](random, bytearray(valid[seed % len(valid)])))
        blob = sealed(blob) if seed % 2 else blob
        if (name := outcome(blob)) in missing and len(blob) <= LARGEST:
            missing.remove(name)
            made[f"{name}-{seed}"] = blob
        if not missing:
            break
    return made


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.glob("*.bnnf"):
        old.unlink()
    for name, blob in files().items():
        (CORPUS / f"{name}.bnnf").write_bytes(blob)


if __name__ == "__main__":
    main()
