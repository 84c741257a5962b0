"""Train a grid of recipes with several seeds, several at once, and tabulate what comes out.

examples:
  python tools/sweep.py recipes/sweeps/agc_lambda.yaml data.name=image_folder data.root=FOLDER --dry-run
  python tools/sweep.py recipes/sweeps/batch_size.yaml data.name=image_folder data.root=FOLDER --jobs 2
  python tools/sweep.py recipes/sweeps/batch_size.yaml scale=gpu --jobs 8 --devices cuda:0 cuda:1
  python tools/sweep.py recipes/sweeps/batch_size.yaml grid.norm=[free,bn] grid.data.batch_size=[2,128] seeds=5
  python tools/sweep.py recipes/sweeps/batch_size.yaml --table

key=value changes the sweep's own keys (scale, seeds, grid.AXIS, constants.NAME, plot.x) or a key of every recipe.
Call it again to go on: a finished run is not trained again, one that was cut goes on from its last checkpoint, one
that failed is tried again; one that diverged stays, as a result. --table only reads what is there by now.

The folder (default: runs/NAME_SCALE) receives a run folder per run, table.md, table.csv, table.png: mean and sample
deviation over seeds, by point of the grid; its path is printed last. bnnfree/sweep/file.py says what a file holds.
"""

import argparse
import contextlib
import shlex
import time
from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("sweep", nargs="?", help="a YAML file, see recipes/README.md")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the sweep or to every recipe")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at once (default: one, or one per device)")
    parser.add_argument("--devices", nargs="+", default=[], metavar="DEVICE", help="cpu, cuda:0, cuda:1 and so on")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of each run (default: cores / jobs)")
    parser.add_argument("--out", type=cli.to_folder, metavar="FOLDER", help="default: runs/<sweep>_<scale>")
    parser.add_argument("--table", action="store_true", help="train nothing, tabulate what is there")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and write nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.read(sweep="sweep")

    from bnnfree.models import MODELS

    if args.worker:
        from bnnfree.sweep.workers import serve

        serve(MODELS)
    if args.sweep is None:
        parser.error("a sweep is needed, for example recipes/sweeps/batch_size.yaml")

    from bnnfree.bench.machine import machine
    from bnnfree.errors import BnnfreeError
    from bnnfree.sweep.file import read_sweep
    from bnnfree.sweep.workers import places_of

    jobs = max(1, len(args.devices)) if args.jobs is None else args.jobs
    threads = max(1, machine()["cores"] // max(1, jobs)) if args.threads is None else args.threads
    for name, value in (("--jobs", jobs), ("--threads", threads)):
        if not 1 <= value <= 1024:
            raise BnnfreeError(f"{name}: got {value}, expected 1 to 1024.")
    places = places_of(args.devices, jobs, threads)
    sweep = read_sweep(args.sweep, args.overrides, MODELS)
    out = Path(args.out or Path("runs") / sweep.name)
    states = read_all(sweep, out)
    over = sum(outcome.over for outcome in states.values())
    console.say(f"{len(sweep.runs)} runs, {over} of them over{f'; {sweep.about}' if sweep.about else ''}")
    if args.dry_run:
        for run in sweep.runs:
            console.say(f"{states[run.folder].state:<12}{run.name}")
        console.say(f"the first: {command_of(sweep, sweep.runs[0], out)}")
        return
    cli.on_interrupt(lambda: "the same command goes on: finished runs stay, a cut one goes on from its checkpoint")
    write_plan(sweep, out, args.overrides)
    if not args.table:
        states = train(sweep, out, states, places)
    print(write_tables(sweep, out, states))
    console.say(out)


def read_all(sweep, out: Path) -> dict:
    """Folder name -> what it holds. Errors: a folder that holds another run."""
    from bnnfree.sweep.run_folder import read_run

    return {run.folder: read_run(out / run.folder, run.recipe) for run in sweep.runs}


def command_of(sweep, run, out: Path) -> str:
    """Command that trains one run by itself."""
    return shlex.join(["python", "tools/train.py", str(sweep.base), *run.overrides, "--out", str(out / run.folder)])


def write_plan(sweep, out: Path, overrides: list[str]) -> None:
    """sweep.json: which folder is which point, for tools/compare.py and for people."""
    from bnnfree.sweep.run_folder import SWEEP
    from bnnfree.train.report import write_json

    runs = [
        {"folder": r.folder, "point": r.point, "seed": r.seed, "command": command_of(sweep, r, out)} for r in sweep.runs
    ]
    about = {"sweep": str(sweep.path), "scale": sweep.scale, "overrides": overrides, "seeds": sweep.seeds}
    write_json(out / SWEEP, {**about, "axes": {a.name: list(a.points) for a in sweep.axes}, "runs": runs})


# -- training


def train(sweep, out: Path, states: dict, places: list) -> dict:
    """Train what is not over; a line per run as it ends, with the time left."""
    from bnnfree.progress import duration
    from bnnfree.sweep.run_folder import read_run
    from bnnfree.sweep.workers import Job, run_all

    todo = [run for run in sweep.runs if not states[run.folder].over]
    if not todo:
        return states
    look_at_data(todo)
    runs = {run.folder: run for run in todo}
    jobs = [Job(run.name, run.recipe.model_dump(), out / run.folder) for run in todo]
    command = console.process_of("sweep", "--worker")
    start, done, whole = time.monotonic(), 0.0, sum(run.weight for run in todo)
    with contextlib.closing(run_all(jobs, command, places, out / "workers")) as finished:
        for number, job in enumerate(finished, len(sweep.runs) - len(todo) + 1):
            run = runs[job.folder.name]
            states[run.folder] = outcome = read_run(job.folder, run.recipe)
            done += run.weight
            left = (time.monotonic() - start) * (whole - done) / done
            console.say(f"[{number}/{len(sweep.runs)}] {run.name}: {line_of(outcome)} | {duration(left)} left")
    return states


def look_at_data(runs: list) -> None:
    """Read each data set once: what is wrong with it is one error now and not one of each run, and small images are
    decoded and cached before several workers want them."""
    from bnnfree.data.datasets import load_data

    seen = set()
    for run in runs:
        data = run.recipe.data
        if (key := (data.name, data.root, str(data.image_size))) not in seen:
            seen.add(key)
            load_data(data, where=f"{run.name}: data")


def line_of(outcome) -> str:
    if outcome.state != "done":
        return f"{outcome.state}: {outcome.error.splitlines()[0] if outcome.error else ''}"
    test, val, minutes = (outcome.figure(name) for name in ("test_top1", "val_top1", "minutes"))
    shown = "" if val is None else f", validation {val:.2f}"
    return f"test {test:.2f} %{shown}, {minutes:.1f} min"


# -- tables


def write_tables(sweep, out: Path, states: dict) -> str:
    """table.md, table.csv and table.png; returns the table."""
    from bnnfree.files import replacing
    from bnnfree.sweep.run_folder import entries_of
    from bnnfree.sweep.tables import draw_sweep, markdown, sweep_csv, sweep_rows

    axes = [axis.name for axis in sweep.axes]
    entries = entries_of(
        [(run.point, states[run.folder]) for run in sweep.runs], lambda point: ", ".join(point.values())
    )
    title = f"{sweep.path.stem}{f', scale {sweep.scale}' if sweep.scale else ''}"
    table = markdown(sweep_rows(entries, axes), left=len(axes))
    text = f"# {title}\n\n{sweep.about}\n\n{table}\n\n{notes(states)}\n"
    for name, content in (("table.md", text), ("table.csv", sweep_csv(entries, axes))):
        with replacing(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    if any(entry.values("test_top1") for entry in entries):
        draw_sweep(out / "table.png", entries, sweep.axes, sweep.x, title)
    return table


def notes(states: dict) -> str:
    """Notes under a table: meaning of the figures, machines, and the first error of each kind."""
    done = [outcome for outcome in states.values() if outcome.state == "done"]
    lines = ["Mean and sample deviation (n - 1) over seeds, of the epoch best by validation; minutes are wall clock."]
    places = {(r["device"], r["machine"]["processor"], r["threads"]) for r in (outcome.result for outcome in done)}
    lines += [f"Measured on: {device}, {cpu}, {n} threads a run." for device, cpu, n in sorted(places)]
    errors = {f"{outcome.state}: {outcome.error}" for outcome in states.values() if outcome.error}
    return "\n".join([*lines, *(f"- {' '.join(error.split())}" for error in sorted(errors))])
