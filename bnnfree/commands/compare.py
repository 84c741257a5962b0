"""Put runs, sweeps or benchmarks side by side.

examples:
  python tools/compare.py runs/reactnet_nobn runs/twin_bn
  python tools/compare.py runs/batch_size_cpu --metric val_top1
  python tools/compare.py before.json after.json

RUN: a run folder; a sweep's folder, which stands for every point of its grid (means over seeds); or a file that
tools/bench.py --json wrote. Of runs: a table of results with the recipe keys that are not the same in all, and the
curves. Of benchmarks: the median of each contender and of each kernel in each file, and how many times the first
file's it is. Writes compare.md, and of runs compare.png; prints the folder last.
"""

import json
from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders and sweep folders, or bench files")
    parser.add_argument("--metric", choices=("val_top1", "top1", "val_loss", "loss"), help="of the picture")
    parser.add_argument(
        "--out", default="runs/compare", type=cli.to_folder, metavar="FOLDER", help="(default: runs/compare)"
    )
    args = parser.read()

    from bnnfree.errors import BnnfreeError
    from bnnfree.files import replacing
    from bnnfree.sweep.tables import markdown

    out, paths = Path(args.out), [Path(name) for name in args.runs]
    files = [path for path in paths if path.is_file()]
    if files and len(files) < len(paths):
        other = next(path for path in paths if path not in files)
        raise BnnfreeError(f"{files[0]} and {other}: got a file and no file, expected folders of runs or bench files.")
    if files:
        rows, left = bench_rows(files)
    else:
        rows, left = run_rows(paths, args.metric, out), 1
    table = markdown(rows, left)
    print(table)
    with replacing(out / "compare.md") as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    console.say(out)


# -- runs


def run_rows(paths: list[Path], metric: str | None, out: Path) -> list[list[str]]:
    """The rows, head first; draws compare.png, if there is an epoch to draw."""
    from bnnfree.sweep.run_folder import differing
    from bnnfree.sweep.tables import compare_rows, draw_curves

    names = [path.resolve().name for path in paths]
    entries = []
    for path, name in zip(paths, names, strict=True):
        entries += open_entries(path, name if names.count(name) == 1 else str(path), len(paths) > 1)
    recipes = [recipe_of(entry) for entry in entries]
    known = [recipe for recipe in recipes if recipe]
    found = differing(known)
    values = {key: iter(column) for key, column in found.items()}
    columns = {key: [next(values[key]) if recipe else "" for recipe in recipes] for key in found}
    if any(entry.curve(name) for entry in entries for name in ("val_top1", "top1")):
        draw_curves(out / "compare.png", entries, "", metric)
    return compare_rows(entries, columns)


def open_entries(path: Path, name: str, several: bool) -> list:
    """One entry of a run folder; of a sweep's folder one per point of its grid of which a run has begun."""
    from bnnfree.errors import BnnfreeError, nearest_path
    from bnnfree.sweep.run_folder import SWEEP, Entry, entries_of, read_plan, read_run

    if not path.is_dir():
        hint = nearest_path(path)
        raise BnnfreeError(f"{path}: no such file or folder, expected a run, a sweep's folder or a bench file.{hint}")
    if (path / SWEEP).is_file():
        begun = [(point, run) for point, run in read_plan(path) if run.state != "new"]
        if not begun:
            raise BnnfreeError(f"{path}: no run of this sweep has begun.")
        prefix = f"{name}: " if several else ""
        return entries_of(begun, lambda point: prefix + ", ".join(point.values()))
    run = read_run(path)
    if not run.recipe:
        raise BnnfreeError(f"{path}: holds no run (no recipe.yaml), and no sweep (no {SWEEP}).")
    return [Entry(name, [run])]


def recipe_of(entry) -> dict:
    """The recipe that its runs share; of several seeds all of them."""
    recipes = [run.recipe for run in entry.outcomes if run.recipe]
    if not recipes:
        return {}
    seeds = [recipe["seed"] for recipe in recipes]
    return {**recipes[0], "seed": seeds[0] if len(seeds) == 1 else ", ".join(map(str, seeds))}


# -- benchmarks


def bench_rows(files: list[Path]) -> tuple[list[list[str]], int]:
    """(rows, head first; how many columns stand left): a row per contender, then one per kernel."""
    reports = [open_report(file) for file in files]
    head = ["", *(file.stem for file in files), *(f"{file.stem} / {files[0].stem}" for file in files[1:])]
    rows = [head]
    for title in ("source", "machine"):
        cells = [report[title] for report in reports]
        rows.append([title, *cells, *[""] * (len(files) - 1)])
    for name in dict.fromkeys(name for report in reports for name in report["times"]):
        times = [report["times"].get(name) for report in reports]
        ratios = [f"{t / times[0]:.3f}" if t and times[0] else "" for t in times[1:]]
        rows.append([f"{name}, ms", *("" if t is None else f"{t:.4g}" for t in times), *ratios])
    return rows, 1


def open_report(file: Path) -> dict:
    """source, machine, times (name -> median milliseconds). Errors: a file that tools/bench.py did not write."""
    from bnnfree.errors import BnnfreeError

    expected = BnnfreeError(f"{file}: expected a file that tools/bench.py --json wrote.")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        about, times = report["machine"], {}
        if "engine" in report:
            backend, peers = report["engine"]["backend"], report.get("peers", {})
            times = {"engine": report["engine"]["median_ms"], **{k: v["median_ms"] for k, v in peers.items()}}
            about = {**about, "isa": backend}
        for row in report.get("kernels", []):
            times[f"{row['op']} {row['shape']} {row['isa']}"] = row["ms"]
        if not times or not all(isinstance(value, int | float) for value in times.values()):
            raise expected
        threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
        machine = ", ".join([about["cpu"], threads, *([about["isa"]] if "isa" in about else [])])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise expected from None
    return {"source": str(report.get("source", "kernels")), "machine": machine, "times": times}
