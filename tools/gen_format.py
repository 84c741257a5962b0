"""Write what follows from the format's one table, bnnfree/format/schema.py: the C header and the tables in FORMAT.md.

examples:
  python tools/gen_format.py
  python tools/gen_format.py --check

Run it after a change of the schema. --check writes nothing and ends with 1 if anything would change; tests do the
same. The paths of the files it wrote are printed last.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # Why not beside it: names here hide modules of Python's own

from bnnfree.commands import cli  # noqa: E402
from bnnfree.errors import BnnfreeError  # noqa: E402
from bnnfree.files import replacing  # noqa: E402
from bnnfree.format import schema  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
HEADER = Path("bnnfree/engine/native/format.h")
DOCUMENT = Path("bnnfree/format/FORMAT.md")
RECORDS = {"header": schema.HEADER, "tensor": schema.TENSOR, "op": schema.OP}
TYPES = {"header": schema.HEADER_TYPE, "tensor": schema.TENSOR_TYPE, "op": schema.OP_TYPE}
WIDTH = 120


# -- format.h


def c_header() -> str:
    """The text of format.h."""
    parts = [
        "/* The packed file format for C11. Generated from bnnfree/format/schema.py: python tools/gen_format.py */",
        "#ifndef BNNF_FORMAT_H\n#define BNNF_FORMAT_H\n\n#include <stddef.h>\n#include <stdint.h>",
        _constants(),
        _enum("dtype", {name: (dtype.code, [dtype.meaning]) for name, dtype in schema.DTYPES.items()}),
        _enum("place", {name: (code, [schema.PLACE_MEANINGS[name]]) for name, code in schema.PLACES.items()}),
        _ops(),
        *(_struct(name) for name in RECORDS),
        "#endif",
    ]
    return "\n\n".join(parts) + "\n"


def _constants() -> str:
    magic = "".join(f"\\{byte:03o}" for byte in schema.MAGIC)
    values = {
        "MAGIC": f'"{magic}"',
        "MAGIC_BYTES": str(len(schema.MAGIC)),
        "VERSION": f"{schema.VERSION}u",
        "ALIGN": f"{schema.ALIGN}u",
        "CHECKED_FROM": f"{schema.CHECKED_FROM}u",
        "NONE": f"0x{schema.NONE:X}u",
    }
    lines = [f"#define BNNF_{name} {value}" for name, value in values.items()]
    for name, meaning in schema.LIMITS.items():
        lines += [*_comment(meaning), f"#define BNNF_{name} UINT64_C({getattr(schema, name)})"]
    return "\n".join(lines)


def _comment(text: str, indent: str = "") -> list[str]:
    lines = textwrap.wrap(text, WIDTH - len(indent) - 6)
    return [f"{indent}{'/*' if i == 0 else '  '} {line}" for i, line in enumerate(lines[:-1])] + [
        f"{indent}{'  ' if lines[:-1] else '/*'} {lines[-1]} */"
    ]


def _enum(name: str, values: dict[str, tuple[int, list[str]]], tail: tuple[str, ...] = ()) -> str:
    rows = []
    for key, (code, notes) in values.items():
        rows += [line for note in notes for line in _comment(note, "    ")]
        rows += [f"    BNNF_{name.upper()}_{key.upper()} = {code},"]
    return "\n".join([f"enum bnnf_{name} {{", *rows, *tail, "};"])


def _ops() -> str:
    notes = {name: (op.code, [op.meaning, _takes(op)]) for name, op in schema.OPS.items()}
    first = next(iter(schema.OPS)).upper()
    return "\n".join(
        [
            f"#define BNNF_OP_COUNT {len(schema.OPS)}",
            _enum("op", notes, ("    BNNF_OP_END",)),
            f"_Static_assert(BNNF_OP_END - BNNF_OP_{first} == BNNF_OP_COUNT, "
            '"the codes of the ops follow each other");',
        ]
    )


def _takes(op: schema.Op) -> str:
    """The fields of an op's record that it uses."""
    parts = [f"input: {' or '.join(op.inputs)}"]
    parts += [f"weights: {' or '.join(op.weights)}"] if op.weights else []
    parts += [f"needs: {', '.join(op.needs)}"] if op.needs else []
    parts += [f"may have: {', '.join(op.may)}"] if op.may else []
    parts += [f"mode: {', '.join(f'{i} {name}' for i, name in enumerate(op.modes))}"] if op.modes else []
    window = "window" if op.window == schema.WINDOW_FIELDS else ", ".join(op.window)
    parts += [f"{window}{', size_h, size_w' if op.sized else ''}"] if op.window else ["size_h, size_w"] * op.sized
    return "; ".join(parts)


def _struct(name: str) -> str:
    struct, offsets, last = f"struct bnnf_{name}_record", TYPES[name].fields, RECORDS[name][-1].name
    wide = max(len(field.c_type) for field in RECORDS[name])
    rows = [f"    {f'{f.c_type};':{wide + 1}} /* {offsets[f.name][1]:3}: {f.meaning} */" for f in RECORDS[name]]
    return "\n".join(
        [
            f"{struct} {{",
            *rows,
            "};",
            f'_Static_assert(sizeof({struct}) == {TYPES[name].itemsize}, "no gaps");',
            f'_Static_assert(offsetof({struct}, {last}) == {offsets[last][1]}, "no gaps");',
        ]
    )


# -- FORMAT.md


def tables() -> dict[str, str]:
    """The generated parts of FORMAT.md by the name in their marker."""
    made = {name: _record(name) for name in RECORDS}
    made["dtypes"] = _table(
        ("code", "dtype", "bytes", "stored as"),
        [
            (d.code, name, f"{np.dtype(d.storage).itemsize}{' a word' if name == 'bits' else ''}", d.meaning)
            for name, d in schema.DTYPES.items()
        ],
    )
    made["places"] = _table(
        ("code", "place", "where"),
        [(code, name, schema.PLACE_MEANINGS[name]) for name, code in schema.PLACES.items()],
    )
    made["ops"] = _table(
        ("code", "op", "what it computes", "fields"),
        [(op.code, f"`{name}`", op.meaning, _takes(op)) for name, op in schema.OPS.items()],
    )
    made["epilogue"] = f"```text\n{schema.EPILOGUE}\n```"
    made["limits"] = _table(
        ("name", "value", "of what"),
        [(f"`{name}`", f"2^{getattr(schema, name).bit_length() - 1}", note) for name, note in schema.LIMITS.items()],
    )
    made["errors"] = _table(("error", "what is wrong"), [(f"`{name}`", note) for name, note in schema.ERRORS.items()])
    return made


def _record(name: str) -> str:
    fields = TYPES[name].fields
    rows = [(fields[f.name][1], f.name, _type(f.type), f.meaning) for f in RECORDS[name]]
    return _table(("offset", "field", "type", "meaning"), [*rows, (TYPES[name].itemsize, "", "", "the end")])


def _type(code: str) -> str:
    kind = np.dtype(code)
    if kind.kind == "S":
        return f"{kind.itemsize} bytes"
    text = f"{'i' if kind.base.kind == 'i' else 'u'}{8 * kind.base.itemsize}"
    return f"{text} x {kind.shape[0]}" if kind.shape else text


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def document(text: str) -> str:
    """`text` with what stands between each pair of markers made anew."""
    made = tables()
    for name, part in made.items():
        pattern = rf"(<!-- {name}: generated -->\n).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda m, part=part: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)
        if count != 1:
            raise BnnfreeError(f"{DOCUMENT}: got {count} places for the table {name!r}, expected 1.")
    return text


def generated() -> dict[Path, str]:
    """Every generated file: path from the repository's root -> its text."""
    return {HEADER: c_header(), DOCUMENT: document((ROOT / DOCUMENT).read_text(encoding="utf-8"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file would change")
    args = parser.parse_args()

    stale = []
    for path, text in generated().items():
        place = ROOT / path
        if not place.exists() or place.read_bytes() != text.encode():
            stale.append(path)
    if args.check:
        if stale:
            print(f"not up to date: {', '.join(map(str, stale))}. Run python tools/gen_format.py", file=sys.stderr)
            raise SystemExit(1)
        return
    for path, text in generated().items():
        with replacing(ROOT / path) as temporary:
            temporary.write_bytes(text.encode())
        print(path)


if __name__ == "__main__":
    cli.run(main)
