"""Show what a packed model holds, op by op; or how two packed models differ.

examples:
  python tools/dump.py model.bnnf
  python tools/dump.py model.bnnf --recipe --json model.json
  python tools/dump.py before.bnnf after.bnnf

With two files: what was removed (-), added (+) and changed, ops matched by the name of what they write, and the
constants that differ: how many values, and by how much at most (bits: how many). Ends with 0 if the files are the
same to the byte ("identical"), with 1 if they differ. window: k kernel, s stride, p padding (a: below and right, if
another), d dilation, g groups, as far as it is not the usual; epilogue: its parts in order. With --json the file's path
is printed last.
"""

import json
import math
from collections import Counter
from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli

RECIPE = "recipe"


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("model", metavar="MODEL", help="a packed model, .bnnf")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="a second one, to compare")
    parser.add_argument("--recipe", action="store_true", help="show the recipe in the metadata too")
    parser.add_argument("--json", type=cli.to_file, metavar="FILE", help="write the same as numbers to FILE")
    args = parser.read(model="network")

    from bnnfree.files import replacing
    from bnnfree.format import read

    models = [read(path) for path in (args.model, args.other) if path is not None]
    same = True
    if len(models) == 1:
        result = describe(args.model, models[0], args.recipe)
        print_description(result)
    else:
        same = Path(args.model).read_bytes() == Path(args.other).read_bytes()
        result = {"identical": same} | ({} if same else differences(args.model, args.other, *models))
        console.say(*["identical"] if same else difference_lines(result))
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        console.say(args.json)
    if not same:
        raise SystemExit(1)


# -- one model


def facts(path: str, model) -> dict:
    """Facts from the header, and the file's size."""
    from bnnfree.format import VERSION

    output = model.tensors[model.output]
    return {
        "version": VERSION,
        "producer": model.producer,
        "image": list(model.image_shape),
        "output": [output.name, *output.shape],
        "classes": len(model.classes),
        "tensors": len(model.tensors),
        "ops": len(model.ops),
        "arena_bytes": model.arena_bytes,
        "file_bytes": Path(path).stat().st_size,
    }


def describe(path: str, model, recipe: bool) -> dict:
    """All that the table shows."""
    sizes: dict[str, int] = {}
    for tensor in model.tensors:
        if tensor.place == "constant":
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.bytes
    hidden = set() if recipe else {RECIPE}
    return {
        "file": path,
        **facts(path, model),
        "class_names": model.classes,
        "metadata": {key: value for key, value in model.metadata.items() if key not in hidden},
        "table": [op_row(model, number) for number in range(len(model.ops))],
        "bytes_by_dtype": sizes,
    }


def op_row(model, number: int) -> dict:
    """One op: what it writes and reads by name, its window, weights, epilogue, bytes of its constants."""
    from bnnfree.format.schema import EPILOGUE_FIELDS, OPS, WINDOW_FIELDS

    op, tensors = model.ops[number], model.tensors
    written = tensors[op.writes()[0]]
    parts = [f for f in ("scale", "bias", "factor", "other", *EPILOGUE_FIELDS[2:]) if op.fields[f] is not None]
    weights = None if op.weights is None else [tensors[op.weights].dtype, *tensors[op.weights].shape]
    return {
        "number": number,
        "op": op.name,
        "name": written.name,
        "shape": list(written.shape),
        "reads": [tensors[i].name for i in op.reads()],
        "window": {name: op.fields[name] for name in WINDOW_FIELDS} if OPS[op.name].window else None,
        "weights": weights,
        "epilogue": [p for p in parts if p != "other" or op.name != "concat"],
        "writes": [field for field in ("real", "bits") if op.fields[field] is not None],
        "offsets": [tensors[i].offset for i in op.writes()],
        "bytes": sum(tensors[i].bytes for i in op.constants().values()),
    }


def window_text(window: dict | None) -> str:
    """The fields of a window that are not the usual, in short."""
    if window is None:
        return ""
    pairs = {
        "k": ("kernel", None),
        "s": ("stride", (1, 1)),
        "p": ("padding", (0, 0)),
        "a": ("after", None),
        "d": ("dilation", (1, 1)),
    }
    parts = []
    for letter, (name, usual) in pairs.items():
        pair = (window[f"{name}_h"], window[f"{name}_w"])
        usual = (window["padding_h"], window["padding_w"]) if name == "after" else usual
        if pair != usual:
            parts.append(f"{letter}{pair[0]}" if pair[0] == pair[1] else f"{letter}{pair[0]}x{pair[1]}")
    parts += [f"g{window['groups']}"] if window["groups"] > 1 else []
    parts += [f"pad={window['pad_value']:+}"] if window["pad_value"] else []
    return " ".join([*parts, *(["ceil"] if window["ceil"] else [])])


def by_x(sizes: list) -> str:
    return "x".join(map(str, sizes))


def print_description(about: dict) -> None:
    from bnnfree.errors import one_line

    console.say(f"{about['file']}: format {about['version']}, written by {about['producer'] or 'nobody who says so'}")
    print(f"image     {by_x(about['image'])} (height x width x channels)")
    console.say(f"output    {about['output'][0]}, {by_x(about['output'][1:])}, {about['classes']} class names")
    for key, value in about["metadata"].items():
        console.say(f"metadata  {key}: {value}")
    print()
    rows = [("#", "op", "writes", "shape", "window", "weights", "epilogue", "as", "bytes")]
    for row in about["table"]:
        weights = f"{row['weights'][0]} {by_x(row['weights'][1:])}" if row["weights"] else ""
        texts = (row["op"], row["name"], by_x(row["shape"]), window_text(row["window"]), weights)
        ends = (" ".join(row["epilogue"]), "+".join(row["writes"]), f"{row['bytes']:,}")
        rows.append((str(row["number"]), *texts, *ends))
    rows = [tuple(map(one_line, row)) for row in rows]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            text.rjust(w) if i in (0, 8) else text.ljust(w) for i, (text, w) in enumerate(zip(row, wide, strict=True))
        ]
        print("  ".join(cells).rstrip())
    print()
    for dtype, size in about["bytes_by_dtype"].items():
        print(f"{dtype:9} {size:>13,} bytes")
    print(f"{'constants':9} {sum(about['bytes_by_dtype'].values()):>13,} bytes")
    print(f"{'arena':9} {about['arena_bytes']:>13,} bytes for the activations of one image")
    print(f"{'file':9} {about['file_bytes']:>13,} bytes")


# -- two models


def differences(path_a: str, path_b: str, a, b) -> dict:
    """Differences of files: facts and metadata by key, ops by their output's name, constants by op and field."""
    mine, theirs = named_ops(a), named_ops(b)
    changed, constants = {}, []
    for name in [name for name in mine if name in theirs]:
        rows = [op_row(a, mine[name]), op_row(b, theirs[name])]
        fields = {key: [row[key] for row in rows] for key in rows[0] if rows[0][key] != rows[1][key]}
        fields.pop("number", None)
        if fields:
            changed[name] = fields
        constants += constant_differences(name, a, b, a.ops[mine[name]], b.ops[theirs[name]])
    order = [[name for name in one if name in two] for one, two in ((mine, theirs), (theirs, mine))]
    return {
        "files": [path_a, path_b],
        "facts": changes(facts(path_a, a) | {"class_names": a.classes}, facts(path_b, b) | {"class_names": b.classes}),
        "metadata": changes(flat(a.metadata), flat(b.metadata)),
        "removed": [f"{a.ops[mine[name]].name} {name}" for name in mine if name not in theirs],
        "added": [f"{b.ops[theirs[name]].name} {name}" for name in theirs if name not in mine],
        "changed": changed,
        "order": order[0] != order[1],
        "constants": constants,
    }


def named_ops(model) -> dict[str, int]:
    """Name of what an op writes -> its number; a name that comes again with how often."""
    seen: Counter = Counter()
    numbers = {}
    for number, op in enumerate(model.ops):
        name = model.tensors[op.writes()[0]].name
        seen[name] += 1
        numbers[name if seen[name] == 1 else f"{name} ({seen[name]})"] = number
    return numbers


def changes(a: dict, b: dict) -> dict[str, list]:
    """Key -> [value in a, value in b] where they differ; None where there is none."""
    return {key: [a.get(key), b.get(key)] for key in [*a, *(k for k in b if k not in a)] if a.get(key) != b.get(key)}


def flat(value: dict, prefix: str = "") -> dict:
    """Nested objects as dotted keys."""
    found = {}
    for key, part in value.items():
        found |= flat(part, f"{prefix}{key}.") if isinstance(part, dict) and part else {f"{prefix}{key}": part}
    return found


def constant_differences(name: str, a, b, op_a, op_b) -> list[dict]:
    """One row per constant that both ops have and that differs."""
    import numpy as np

    rows = []
    for field, index in op_a.constants().items():
        if (other := op_b.fields[field]) is None:
            continue
        x, y = a.tensors[index], b.tensors[other]
        row: dict = {"op": name, "constant": field, "dtype": x.dtype, "shape": list(x.shape)}
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            rows.append(row | {"becomes": [y.dtype, *y.shape]})
        elif x.data.tobytes() != y.data.tobytes():
            if x.dtype == "bits":
                rows.append(row | {"differ": int(np.bitwise_count(x.data ^ y.data).sum())})
                continue
            count = int(np.count_nonzero(x.data != y.data))  # 0 where only the sign of a zero does
            with np.errstate(invalid="ignore"):
                gap = np.abs(x.data.astype(np.float64) - y.data)
            most = float(np.max(gap, initial=0.0, where=x.data != y.data))
            rows.append(row | {"differ": count, "at_most": most if np.isfinite(most) else "infinity"})
    return rows


def difference_lines(found: dict) -> list[str]:
    """The differences as a page."""
    lines = [f"a: {found['files'][0]}", f"b: {found['files'][1]}"]
    for part in ("facts", "metadata"):
        lines += [f"{part}  {key}: {short(old)} -> {short(new)}" for key, (old, new) in found[part].items()]
    lines += [f"- {text}" for text in found["removed"]] + [f"+ {text}" for text in found["added"]]
    lines += ["the ops run in another order"] if found["order"] else []
    for name, fields in found["changed"].items():
        for key, (old, new) in fields.items():
            if key == "window" and old and new:
                old, new = window_text(old), window_text(new)
            lines.append(f"{name}  {key}: {short(old)} -> {short(new)}")
    for row in found["constants"]:
        text = f"{row['op']}  {row['constant']}, {row['dtype']} {by_x(row['shape'])}: "
        if "becomes" in row:
            lines.append(f"{text}becomes {row['becomes'][0]} {by_x(row['becomes'][1:])}")
        else:
            most = row.get("at_most")
            most = "" if most is None else f", by {most if isinstance(most, str) else f'{most:.6g}'} at most"
            lines.append(f"{text}{row['differ']:,} of {math.prod(row['shape']):,} values differ{most}")
    if len(lines) == 2:
        lines.append("the same network in other bytes: names or places of constants, or the form of the metadata")
    return lines


def as_json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def short(value) -> str:
    text = as_json(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
