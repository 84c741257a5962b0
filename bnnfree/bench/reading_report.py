"""The part of tools/bench.py about reading images: bench.py --data RECIPE."""

import os

FEEDS = 2500.0  # images per second of one GPU, where --feeds does not say
SECONDS = 20.0  # for all measurements, where --seconds does not say


def bench_data(args) -> dict:
    """Measure how fast the recipe `args.source` (with `args.overrides`) reads its training images; print and return it.

    `args.seconds` are shared by all measurements; `args.feeds` (images per second) is what a GPU trains at.
    Errors: BnnfreeError for images that are held in memory, and what load_recipe and load_data raise.
    """
    from bnnfree.bench.reading import PHASES, cores_needed, memory, phases, rate, streamed
    from bnnfree.errors import BnnfreeError
    from bnnfree.models import MODELS
    from bnnfree.train import load_data, load_recipe

    feeds = FEEDS if args.feeds is None else args.feeds
    if not 0 < feeds < float("inf"):
        raise BnnfreeError(f"--feeds: got {feeds}, expected more than 0 images per second.")
    if args.source is None:
        raise BnnfreeError("SOURCE: got none, expected a recipe beside --data.")
    recipe = load_recipe(args.source, args.overrides, MODELS)
    data, seconds, grown = memory(lambda: load_data(recipe.data, where=f"{args.source}: data"))
    split = streamed(data.train)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = [0, *sorted({1, *(2**n for n in range(1, 12) if 2**n < cores), cores})]
    share = (args.seconds or SECONDS) / (len(counts) + 1)
    report: dict = {
        "source": args.source,
        "images": len(data.train),
        "image_size": list(data.image_size),
        "augment": list(split.augment),
        "list_seconds": seconds,
        "list_bytes": grown,
        "cores": cores,
        "ms": phases(split, share),
    }
    print(f"images    {len(data.train):,} to train on, found in {seconds:.2f} s", end="")
    print("" if grown is None else f", which took {grown / 1e6:.0f} MB of memory")
    size = "x".join(map(str, split.size))
    parts = ", ".join(f"{phase} {report['ms'][phase]:.3f}" for phase in PHASES)
    print(f"ms/image  {sum(report['ms'].values()):.3f}: {parts}; at {size} pixels, {' + '.join(split.augment)}")
    measured = {count: rate(split, count, share) for count in counts}
    report["rates"] = {str(count): value for count, (value, _) in measured.items()}
    print(f"{'workers':>7}  {'images/s':>8}  {'a core':>8}")
    for count, (value, _) in measured.items():
        print(f"{count:>7}  {value:>8.0f}  {value / min(max(count, 1), cores):>8.0f}")
    report["per_cpu_second"] = measured[0][1]
    report["per_core"] = measured[cores][0] / cores
    report["feeds"] = {"images_per_second": feeds, "cores": cores_needed(feeds, report["per_core"])}
    print(f"{report['per_cpu_second']:.0f} images per second that one core computes, waiting for files left out")
    print(f"a GPU that trains {feeds:,.0f} images/s needs {report['feeds']['cores']} cores like these", end="")
    print(f" ({report['per_core']:.0f} images/s each with all {cores} at work)")
    return report
