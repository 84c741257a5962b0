"""Measure how fast a network runs, one image at a time; beside other runtimes, by layer, or kernel by kernel.

With --train: how fast a recipe trains; with --data: how fast its images come.

examples:
  python tools/bench.py model.bnnf
  python tools/bench.py model.bnnf --threads 2 --against onnxruntime openvino --json bench.json
  python tools/bench.py recipes/imagenet_reactnet18.yaml --layers
  python tools/bench.py --kernels
  python tools/bench.py --train recipes/cifar10_reactnet18.yaml data.root=FOLDER --batch 32 --precision fp32
  python tools/bench.py --train recipes/cifar10_reactnet20.yaml data.name=fake --contenders plain bn --json train.json
  python tools/bench.py --train recipes/cifar10_reactnet18.yaml data.root=FOLDER --against BNN_NoBN
  python tools/bench.py --data recipes/imagenet_reactnet18.yaml data.root=FOLDER --feeds 2500

SOURCE is a packed file, or what tools/export.py takes, with the same key=value: a recipe stands for its network with
random weights, which are as fast as trained ones. --against builds the same network from the same file: for ONNX
Runtime in float32 and in int8 (calibrated with random images: its speed counts, not its answers), for OpenVINO with
its binary convolutions (those of channels that are no multiple of 8, and of groups, as floats, which a line then
says); where it should give the same numbers that is checked first. All take turns in one run. ratio: its median over
the engine's. memory: of a session all that it allocates, the stacks of its threads aside. GMAC/s: 10^9
multiply-accumulates per second, those on padding too, as papers count. % of peak: only those inside the image, and
% nominal: all of them, over what xor, popcount and add (avx2, and AVX-512 without VPOPCNTDQ: its table look-ups) do on
registers alone, measured in the same run on as many threads; a kernel that saves some of these can pass 100.
--kernels takes single ops of usual shapes with each instruction set ("avx512 base": AVX-512 without VPOPCNTDQ and
VNNI, where that differs; "sign": a threshold and bits out, "float": scale and bias, floats out, "block": the whole
end of a block, floats and bits out). With --json the file's path is printed last.

--train lets contenders take whole training steps in turns, on the recipe's data (data.name=fake: noise), last stage:
  ours            the recipe as it is
  layers          module by module (speed=layers)
  fused, compiled, fused_compiled    one node of autograd a block; compiled by torch: the modules, those nodes
  plain           the same function as the papers' code writes it (bnnfree.analysis.plain), stepped as released
  plain_compiled  that, compiled by torch
  bn, float       the recipe with model.norm=bn; with real weights and activations
  reference       the released code itself, from its checkout (--against FOLDER, of BNN_NoBN): its files are run
ratio: the median over rounds of a contender's step over ours, above 1 where ours is faster. data: waiting for a batch;
forward with the loss; agc with the preconditioner; optimizer with what follows it. saved: what autograd keeps for the
backward pass, the part that grows with the batch, and the part that does not (fixed). peak: growth of a process that
has only this contender, or of a GPU's memory all of it. % matmul: 6 flops a multiply-accumulate over the speed of a
large bfloat16 product; % copy: the bytes that must move (saved ones twice, 40 a parameter) over that of a large copy.
In bf16_trunk, those without fused nodes run in bf16. Who cannot take a step gets a line with the reason.
"""

import functools
import json
from pathlib import Path

from bnnfree import console
from bnnfree.commands import cli

SAME = 0.02  # of the largest output: by so much may a peer that should be equal differ; a bit at its threshold may flip
CHECKED = 4  # images
SECONDS = 10  # for all contenders; with --train others
TIMES = 5  # so much shorter than a model is a single op timed
SPEED = ("GMAC/s", "% of peak", "% nominal")


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="a packed file, run folder, checkpoint or recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to a recipe, dotted keys")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of every contender (default: 1)")
    parser.add_argument("--backend", default="auto", metavar="NAME", help="of bnnfree.engine (default: auto)")
    parser.add_argument("--layers", action="store_true", help="time each layer")
    parser.add_argument("--kernels", action="store_true", help="time single ops; then SOURCE may be missing")
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="WHAT", help="onnxruntime, openvino; with --train: a checkout"
    )
    parser.add_argument("--train", action="store_true", help="time training steps of SOURCE, a recipe")
    parser.add_argument("--batch", nargs="+", type=int, default=[], metavar="N", help="with --train: batch sizes")
    parser.add_argument(
        "--precision", nargs="+", default=[], metavar="P", help="with --train: fp32, bf16, bf16_trunk (all)"
    )
    parser.add_argument("--contenders", nargs="+", default=[], metavar="C", help="with --train: those beside ours")
    parser.add_argument("--data", action="store_true", help="time the input pipeline of SOURCE")
    parser.add_argument("--feeds", type=float, metavar="IMAGES_PER_SECOND", help="with --data: what it has to feed")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="for the contenders (10; with --train 60 a precision and batch)"
    )
    parser.add_argument("--json", type=cli.to_file, metavar="FILE", help="write all figures there")
    args = parser.read(source="recipe network")

    from bnnfree.bench.machine import machine
    from bnnfree.errors import BnnfreeError
    from bnnfree.files import replacing

    check_mode(args)
    if args.seconds is not None and not 0 < args.seconds <= 3600:
        raise BnnfreeError(f"--seconds: got {args.seconds}, expected more than 0 and up to 3600.")
    about = {**machine(), "threads": args.threads}
    report: dict = {"machine": about}
    if args.train:
        from bnnfree.bench.contenders import bench_train

        print_machine(about)
        report["train"] = bench_train(args, print_table)
    elif args.data:
        from bnnfree.bench.reading_report import bench_data

        args.seconds = args.seconds or SECONDS
        report["data"] = bench_data(args)
    else:
        report |= bench_inference(args, about)
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        console.say(args.json)


def check_mode(args) -> None:
    """Errors: BnnfreeError where options of one kind of measurement meet those of another."""
    from bnnfree.errors import BnnfreeError

    modes = [f"--{name}" for name in ("train", "data", "kernels") if getattr(args, name)]
    others = {"--train": ("layers",), "--data": ("layers", "against")}
    if len(modes) > 1:
        raise BnnfreeError(f"{' '.join(modes)}: got {len(modes)} kinds of measurement, expected one.")
    for mode, names in others.items():
        if mode in modes and any(getattr(args, name) for name in names):
            raise BnnfreeError(f"{mode}: got --{' or --'.join(names)} beside it, which belongs to inference.")
    if args.data and args.source is None:
        raise BnnfreeError("--data: got no recipe, expected one, for example recipes/imagenet_reactnet18.yaml.")
    for name in ("batch", "precision", "contenders"):
        if getattr(args, name) and not args.train:
            raise BnnfreeError(f"--{name}: got {getattr(args, name)} without --train, expected both.")
    if args.feeds is not None and not args.data:
        raise BnnfreeError("--feeds: got it without --data, expected both.")


def bench_inference(args, about: dict) -> dict:
    """The report of a network, of single ops, or of both."""
    from bnnfree.bench.peers import PACKAGES
    from bnnfree.errors import BnnfreeError, unknown_name

    if args.source is None and not args.kernels:
        raise BnnfreeError("SOURCE: got none, expected a network, or --kernels.")
    for name in args.against:
        if name not in PACKAGES:
            raise unknown_name("--against", name, PACKAGES)
    args.seconds = args.seconds or SECONDS
    report: dict = {}
    if args.source is not None:
        engine = open_engine(args)
        about["isa"] = engine.backend
        print_machine(about)
        report |= bench_model(engine, args)
    if args.kernels:
        if args.source is None:
            print_machine(about)
        report |= bench_kernels(args)
    return report


def open_engine(args):
    """The engine of a packed file, which needs no torch, or of what can be exported."""
    from bnnfree.engine import Engine, load
    from bnnfree.errors import BnnfreeError

    packed = Path(args.source).suffix == ".bnnf"
    fixed = BnnfreeError(f"{args.source}: got {' '.join(args.overrides)} for a network that is fixed; expected none.")
    if packed and args.overrides:
        raise fixed
    if packed:
        return load(args.source, args.backend, args.threads)
    from bnnfree.export import pack_network
    from bnnfree.models import MODELS
    from bnnfree.train import open_source, source_kind

    if args.overrides and source_kind(args.source) != "recipe":
        raise fixed
    return Engine(pack_network(open_source(args.source, MODELS, args.overrides)).model, args.backend, args.threads)


def print_machine(about: dict) -> None:
    cores = f"{about['cores']} core{'s' if about['cores'] > 1 else ''}"
    isa = f", {about['isa']}" if "isa" in about else ""
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    console.say(f"machine   {about['cpu']}, {cores}, {threads}{isa}; {about['system']}")


# -- a model


def bench_model(engine, args) -> dict:
    """The report's part about one network."""
    from bnnfree.bench.layers import layers
    from bnnfree.bench.peak import Peak
    from bnnfree.bench.peers import random_images
    from bnnfree.bench.rounds import figures, measure

    model, images = engine.model, random_images(engine.model, CHECKED)
    height, width, channels = model.image_shape
    console.say(f"network   {args.source}: {height}x{width}x{channels}, {len(model.ops)} ops, batch 1")
    memory = memory_of(engine, args.source)
    print_memory(memory)
    peak = Peak(engine.backend, args.threads)
    peak.measure()
    contenders, peers = {"engine": functools.partial(engine.run, images[:1])}, {}
    for name, (run, facts) in open_peers(engine, images, args).items():
        contenders[name], peers[name] = functools.partial(run, images[:1]), facts
    times = measure(contenders, args.seconds, args.threads)
    peak.measure()
    report: dict = {"source": args.source, "memory": memory}
    report["engine"] = {"backend": engine.backend, **figures(times["engine"])}
    report["peers"] = {name: {**facts, **figures(times[name])} for name, facts in peers.items()}
    ours = report["engine"]["median_ms"]
    report["ratio"] = {name: row["median_ms"] / ours for name, row in report["peers"].items()}
    if args.layers:
        report["layers"] = layers(engine, images[:1], ours, peak)
    report["popcount_peak_gmacs"] = peak.best
    print_model(report)
    return report


def open_peers(engine, images, args) -> dict:
    """Name -> (its function, what is known of it), for the peers that can be compared; others get a line."""
    from importlib.metadata import version

    from bnnfree.bench.peers import PEERS, difference

    found, expected = {}, engine.run(images)
    for name, peer in PEERS.items():
        if peer.package not in args.against:
            continue
        if missing := peer.missing():
            console.say(f"{name}: not measured; pip install {' '.join(missing)}")
            continue
        try:
            run = peer.make(engine.model, args.threads)
            differs = difference(run, images, expected)
        except Exception as error:  # whatever another runtime says when it cannot
            reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            console.say(f"{name}: not measured; {reason[0]}")
            continue
        if peer.exact and differs > SAME:
            console.say(
                f"{name}: not measured; its outputs differ by {differs:.1%} of the largest, expected {SAME:.0%}."
            )
            continue
        note = peer.note(engine.model)
        if note:
            console.say(f"{name}: {note}")
        found[name] = run, {"version": version(peer.package), "difference": differs, "note": note}
    return found


def memory_of(engine, source: str) -> dict:
    """Bytes: session, of which activations and scratch; packed; file. None where the backend has no such thing."""
    from bnnfree.format import to_bytes

    info = engine.info()
    packed = Path(source).suffix == ".bnnf"
    return {
        "session_bytes": info["session_bytes"],
        "activation_bytes": info["arena_bytes"],
        "scratch_bytes": info["scratch_bytes"],
        "packed_bytes": info["packed_bytes"],
        "file_bytes": Path(source).stat().st_size if packed else len(to_bytes(engine.model)),
    }


def print_memory(memory: dict) -> None:
    session, activations, scratch, packed, file = ("" if value is None else f"{value:,}" for value in memory.values())
    text = f"activations {activations} bytes of one image"
    if session:
        text = f"session {session} bytes (activations {activations}, kernels' scratch {scratch})"
        text += f", weights as packed for the kernels {packed}"
    print(f"memory    {text}, file {file}")


def print_model(report: dict) -> None:
    rows = [("", "median ms", "p10", "p90", "ratio", "differs by")]
    for name, row in (("engine", report["engine"]), *report["peers"].items()):
        times = [f"{row[key]:.3f}" for key in ("median_ms", "p10_ms", "p90_ms")]
        ratio = f"{report['ratio'][name]:.2f}" if name != "engine" else ""
        differs = f"{row['difference']:.1e}" if "difference" in row else ""
        rows.append((f"{name} ({row.get('version') or row['backend']})", *times, ratio, differs))
    print_table(rows)
    if report["popcount_peak_gmacs"]:
        print(f"peak      {report['popcount_peak_gmacs']:.0f} GMAC/s by popcount")
    if "layers" in report:
        print()
        total = sum(row["ms"] for row in report["layers"])
        table = [("#", "name", "op", "ms", "share", *SPEED, "kernel")]
        for number, row in enumerate(report["layers"]):
            share = f"{100 * row['ms'] / total:.1f} %" if total else ""
            cells = (f"{row['ms']:.4f}", share, *speed_of(row), row["kernel"])
            table.append((str(number), row["name"], row["op"], *cells))
        print_table([*table, ("", "all", "", f"{total:.4f}", *[""] * 5)], left=(1, 2, 8))


# -- single ops


def bench_kernels(args) -> dict:
    """kernels: a row per shape and instruction set, with op, shape, isa, kernel, ms, macs, gmacs, percent_of_peak and
    so on; peaks: instruction set -> 10^9 products per second, None where that cannot be measured."""
    from bnnfree.bench.kernels import cases
    from bnnfree.bench.layers import layers
    from bnnfree.bench.peak import Peak
    from bnnfree.bench.peers import random_images
    from bnnfree.bench.rounds import figures, measure
    from bnnfree.engine import backends

    names = [args.backend]
    if args.backend == "auto":
        names = [n for n in backends() if n not in ("native", "numpy", "reference")] or ["numpy"]
    peaks: dict[str, Peak] = {}
    rows = []
    for case in cases(names, args.threads):
        if case.label not in peaks:
            peaks[case.label] = Peak(case.isa, args.threads)
        image = random_images(case.engine.model, 1)
        whole = figures(measure({"": functools.partial(case.engine.run, image)}, 0, 1)[""])
        row = layers(case.engine, image, TIMES * whole["median_ms"], peaks[case.label])[case.number]
        rows.append({**row, "shape": case.shape.text, "isa": case.label})
    for name, peak in peaks.items():
        if peak.best is not None:
            print(f"peak      {peak.best:.0f} GMAC/s by popcount, {name}")
    table = [("op", "shape", "isa", "ms", *SPEED, "kernel")]
    for row in rows:
        table.append((row["op"], row["shape"], row["isa"], f"{row['ms']:.4f}", *speed_of(row), row["kernel"]))
    print_table(table, left=(0, 1, 2, 7))
    return {"peaks": {name: peak.best for name, peak in peaks.items()}, "kernels": rows}


def speed_of(row: dict) -> list[str]:
    values = [row[key] for key in ("gmacs", "percent_of_peak", "percent_of_peak_nominal")]
    return ["" if value is None else f"{value:.1f}" for value in values]


def print_table(rows: list[tuple], left=(0,)) -> None:
    from bnnfree.errors import one_line

    rows = [tuple(map(one_line, row)) for row in rows]
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [t.ljust(w) if i in left else t.rjust(w) for i, (t, w) in enumerate(zip(row, wide, strict=True))]
        print("  ".join(cells).rstrip())
