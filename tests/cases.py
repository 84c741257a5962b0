"""The C program native/suite.c and its cases on disk: files, images and the numpy engine's results."""

import os
import re
from pathlib import Path

import edits_ops  # noqa: F401  adds its rows to EDITS
import numpy as np
from cc import HERE, WRAPPED, engine_sources, objects, output_of
from damage import bases
from edits import EDITS, damaged
from packed import PARTS, Net, fields_of, images, random_net
from test_fuzz import bounds, damage

from bnnfree.engine import Engine
from bnnfree.format import FormatError, PackedModel, check_model, from_bytes, schema, to_bytes

FIRST_ERROR = 10  # BNNF_ERROR_MAGIC


def wide(seed: int) -> PackedModel:
    """Rows and channels that fill tiles of vectors and leave rests, of every op that has kernels of its own."""
    random = np.random.default_rng(seed)
    height, width = int(random.integers(3, 7)), int(random.integers(9, 20))
    net = Net(height, width, int(random.choice([1, 3, 4])), seed)
    window = fields_of((3, 3), random.integers(1, 3, 2).tolist(), (1, 1))
    channels, outputs = random.choice([31, 64, 65, 96, 128, 200]), int(random.choice([30, 64, 65, 100]))
    net.add("pixel_conv2d", 0, outputs=outputs, parts=PARTS[3:], writes="both", threshold="f32", **window)
    bits, real = net.bits(int(channels)), net.real(33)
    first = net.add("binary_conv2d", bits, outputs=outputs, pad_value=-1, **window)
    net.add("binary_conv2d", bits, outputs=outputs, pad_value=1, parts=PARTS, other=first, writes="both",
            threshold="f32", flip=True, **window)  # fmt: skip
    net.add("binary_conv2d", bits, outputs=outputs, pad_value=0, writes="bits", threshold="i32", **fields_of((1, 1)))
    for weights in ("f32", "i8", "bits"):
        net.add("conv2d", real, outputs=outputs, weights=weights, pad_value=-1, **window)
    for name in ("max_pool2d", "avg_pool2d"):
        net.add(name, real, ceil=1, **window)
    net.add("pointwise", real, parts=PARTS, other=real, writes="both", threshold="f32", flip=True)
    return net.model()


def golden_models(randoms: int, wides: int) -> dict[str, PackedModel]:
    models = {f"base{i}": from_bytes(blob) for i, blob in enumerate(bases())}
    for seed in range(randoms):
        models[f"random{seed}"] = random_net(seed, ("tame", "whole", "wild")[seed % 3])
    return models | {f"wide{seed}": wide(seed) for seed in range(wides)}


def write_golden(folder: Path, name: str, blob: bytes, count: int) -> None:
    model = from_bytes(blob)
    pixels = images(model, count, 1)
    with np.errstate(all="ignore"):
        output = Engine(model, "numpy").run(pixels)
    (folder / f"{name}.bnnf").write_bytes(blob)
    (folder / f"{name}.pixels").write_bytes(pixels.tobytes())
    (folder / f"{name}.floats").write_bytes(output.tobytes())


def write_goldens(folder: Path, randoms: int, wides: int) -> Path:
    """Cases that run; their list."""
    lines = []
    for name, model in golden_models(randoms, wides).items():
        write_golden(folder, name, to_bytes(model), 2)
        lines.append(f"run {name} 2\n")
    (folder / "goldens").write_text("".join(lines))
    return folder / "goldens"


def write_hostile(folder: Path, damages: int) -> Path:
    """Every edit of edits.py, with the status that refuses it, `damages` damaged files of test_fuzz.py, those that run
    with their results, and allocations that fail; their list."""
    lines = [f"exhaust base{i} 2\n" for i in range(len(bases()))]
    for i, blob in enumerate(bases()):
        write_golden(folder, f"base{i}", blob, 2)
    for status, error in enumerate(schema.ERRORS, FIRST_ERROR):
        for function, cases, seal in EDITS[error]:
            for i, case in enumerate(cases):
                name = f"{function.__name__}{i}"
                (folder / f"{name}.bnnf").write_bytes(damaged(function, case, seal))
                lines.append(f"refuse {name} {status}\n")
    with bounds():
        for seed in range(damages):
            blob, name = damage(seed), f"damage{seed}"
            try:
                check_model(from_bytes(blob))
            except FormatError:
                (folder / f"{name}.bnnf").write_bytes(blob)
                lines.append(f"refuse {name} 0\n")
            else:
                write_golden(folder, name, blob, 1)
                lines.append(f"run {name} 1\n")
    (folder / "hostile").write_text("".join(lines))
    return folder / "hostile"


# -- the program


def link(out: Path, command: list[str], flags, made) -> Path:
    output_of(*command, *flags, "-pthread", *WRAPPED, *made, "-o", out, "-lm")
    return out


def program(folder: Path, command: list[str], *flags: str) -> Path:
    """native/suite.c and the engine, compiled in `folder`."""
    sources = [HERE / "suite.c", HERE / "fence.c", *engine_sources()]
    return link(folder / "suite", command, flags, objects(folder, command, sources, "-pthread", *flags))


def check(command, cases: Path, isas: int) -> None:
    """Every line of the list is run, with every instruction set and number of threads, or refused as it should be."""
    settings = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "TSAN_OPTIONS": "halt_on_error=1"}
    said = output_of(*command, cases.name, cwd=cases.parent, env=settings)
    kinds = [line.split()[0] for line in cases.read_text().splitlines()]
    count, runs, refusals, wrong = map(int, re.findall(r"\d+", said.splitlines()[-1]))
    assert (count, runs, wrong) == (len(kinds), 3 * isas * kinds.count("run"), 0)
    assert refusals >= kinds.count("refuse") + 8 * kinds.count("exhaust")
