"""Keys of a recipe that nothing reads: each is an error where it is written, and only there."""

import json

import pytest
import yaml
from helpers import TINY as TWO_STAGES

from bnnfree.models import MODELS
from bnnfree.recipe.read import RecipeError, save_recipe
from bnnfree.recipe.reads import READ, leaves, unread
from bnnfree.recipe.schema import Recipe
from bnnfree.sweep.file import read_sweep
from bnnfree.train import fit, load_recipe
from bnnfree.train.networks import look_at, parse_recipe

TINY = {**TWO_STAGES, "stages": [{"epochs": 2}]}
del TINY["free"]

# (what else is set, key, a value that nothing reads then)
IDLE = [
    (["model.norm=bn"], "free.recalibrate", 0),
    (["model.norm=bn"], "free.track", False),
    (["model.norm=bn"], "free.reference", 16),
    (["model.norm=bn"], "free.window", 99.0),
    (["model.norm=bn"], "free.group", 8),
    (["optimizer.precondition=bnp"], "free.reference", 8),
    (["model.norm=bn"], "free.calibration", 9),
    (["model.norm=bn"], "model.centre_gradient", True),
    (["free.track=false"], "free.window", 99.0),
    (["model.norm=none"], "model.latent_std", 0.5),
    (["model.norm=none"], "settle", 8),
    (["model.norm=gn"], "settle", 8),
    (["model.norm=free_paper"], "settle", 8),
    (["optimizer.name=sgd"], "optimizer.betas", [0.5, 0.5]),
    (["optimizer.name=sgd"], "optimizer.eps", 0.5),
    ([], "optimizer.momentum", 0.5),
    ([], "optimizer.nesterov", True),
    ([], "optimizer.bop_gamma", 0.5),
    ([], "optimizer.bop_threshold", 0.5),
    ([], "optimizer.bnp_rho", 0.5),
    (["stages.0.lr=0.001"], "optimizer.lr", 0.5),
    (["stages.0.weight_decay=0.001"], "optimizer.weight_decay", 0.5),
    ([], "schedule.gamma", 0.5),
    ([], "schedule.milestones", [0.5]),
    ([], "loss.teacher", "runs/nowhere"),
    ([], "data.test_root", "nowhere"),
    ([], "data.val_root", "nowhere"),
    ([], "data.cache_gb", 1.0),
    ([], "data.root", "nowhere"),
    ([], "data.download", True),
    ([], "data.bad_images", "skip"),
    (["model.name=resnet20"], "model.binarize", "activations"),
    (["model.name=resnet20"], "stages.0.binarize", "none"),
    (["model.name=resnet20"], "model.scale", "none"),
    (["model.name=resnet20"], "model.shortcut", "real"),
    (["model.name=resnet20"], "model.ste", "clip"),
    (["model.name=resnet20"], "model.latent_std", 0.5),
    (["model.name=resnet20"], "probe.every", 1),
    (["model.name=reactnet_a"], "model.shortcut", "real"),
    (["model.binarize=activations"], "model.shortcut", "real"),
    (["model.binarize=activations"], "model.scale", "mean_abs"),
    (["model.binarize=weights"], "model.ste", "clip"),
    (["model.binarize=weights"], "model.ste_window", "fixed"),
    (["data.name=digits"], "data.root", "nowhere"),
    (["data.name=digits"], "data.samples", 99),
    (["data.name=digits"], "data.channels", 1),
    (["data.name=digits"], "data.classes", 3),
    (["data.name=image_folder"], "data.download", True),
    (["data.name=shards", "data.root=FOLDER"], "data.cache_gb", 1.0),
    (["data.name=shards", "data.val_root=v-{0..1}.tar"], "data.val_fraction", 0.2),
    (["loss.name=distribution", "loss.teacher=runs/t"], "loss.label_smoothing", 0.1),
]
named = pytest.mark.parametrize(("others", "key", "value"), IDLE, ids=[f"{' '.join(o)} {k}" for o, k, _ in IDLE])


def with_key(others, key, value):
    """The recipe TINY with other keys and one more, as a tree whose keys are not judged."""
    tree = parse_recipe(TINY, "x", MODELS, others).model_dump()
    *sections, last = key.split(".")
    node = tree
    for part in sections:
        node = node[int(part) if part.isdigit() else part]
    node[last] = value
    return tree


def test_every_key_has_its_row():
    tree = parse_recipe(TINY, "x").model_dump()
    tree["stages"] = tree["stages"][:1]
    assert {key.replace("stages.0.", "stages.*.") for key in leaves(tree)} == set(READ)


@named
def test_a_key_that_nothing_reads_is_one_line(tmp_path, others, key, value):
    text = json.dumps(value)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(TINY, "tiny.yaml", MODELS, [*others, f"{key}={text}"])
    line = str(caught.value)
    assert (
        line.startswith(f"override {f'{key}={text}'!r}: {key}: got ")
        and ", which nothing reads here: it is for " in line
    )
    assert len(line.splitlines()) == 1
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(with_key(others, key, value) | {"seed": 3}))
    assert load_recipe(tmp_path / "file.yaml", models=MODELS).seed == 3  # whole: what a run has written


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Metrics of a tree of keys, trained."""
    known = {}

    def train(tree):
        text = json.dumps(tree)
        if text not in known:
            folder = tmp_path_factory.mktemp("run") / "run"
            fit(parse_recipe(tree, "x", MODELS), MODELS, folder, quiet=True, curves=False)
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            times = ("seconds", "images_per_second", "probe")
            known[text] = [{k: v for k, v in line.items() if k not in times} for line in lines]
        return known[text]

    return train


@pytest.mark.sample(12)
@pytest.mark.parametrize(
    ("others", "key", "value"),
    [
        case
        for case in IDLE
        if not any("data.name" in other or "loss.name" in other for other in case[0])
        and case[1] != "probe.every"  # with nothing to read it, an error of its own
    ],
)
def test_a_key_that_nothing_reads_changes_nothing(trained, others, key, value):
    small = [*others, "model.width=0.25", "stages.0.epochs=1", "data.samples=24"]
    assert trained(with_key(small, key, value)) == trained(parse_recipe(TINY, "x", MODELS, small).model_dump())


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.norm=bn", "model.centre_head=true", "free.window=99"],
        ["model.norm=none", "model.centre=true", "free.window=99"],
        ["model.norm=bn", "settle=8", "model.latent_std=0.5"],
        ["model.norm=bn", "model.norm_options.ghost=2", "settle=8"],
        ["model.norm=none", "model.beta=measured", "free.calibration=9"],
        ["optimizer.name=sgd", "optimizer.momentum=0.5", "optimizer.nesterov=true"],
        [
            "optimizer.name=bop",
            "model.norm=none",
            "stages.0.binarize=both",
            "optimizer.betas=[0.5, 0.5]",
            "optimizer.bop_gamma=0.5",
        ],
        ["optimizer.precondition=bnp", "optimizer.bnp_rho=0.5", "model.norm=none"],
        ["schedule={name: step, milestones: [0.5], gamma: 0.5}"],
        ["probe={every: 1}"],
        ["model.name=resnet20", "model.pad_value=1", "model.standardize=false", "model.alpha=0.5"],
        ["model.binarize=activations", "model.scale=learned"],
        ["free.group=8", "free.reference=16", "free.recalibrate=0"],
        ["data.name=shards", "data.root=http://x/", "data.cache_gb=2", "data.classes=3", "data.test_root=x"],
        ["data.name=cifar10", "data.root=x", "data.download=true"],
    ],
    ids=" ".join,
)
def test_a_key_that_is_read_is_accepted(overrides):
    parse_recipe(TINY, "x", MODELS, overrides)


def test_a_value_that_is_the_default_says_nothing():
    parse_recipe(TINY, "x", MODELS, ["model.norm=bn", "free.window=256", "free.track=true", "optimizer.momentum=0.9"])


def test_without_builders_a_block_of_the_design_tells():
    with pytest.raises(RecipeError, match="free.window"):
        parse_recipe(TINY, "x", None, ["model.norm=bn", "free.window=99"])
    parse_recipe(TINY, "x", None, ["free.window=99"])


# where a key is judged


def file(tmp_path, name="x.yaml", **changes):
    tree = {**TINY, **changes}
    (tmp_path / name).write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    return tmp_path / name


def test_the_keys_of_a_file_are_judged_by_the_file(tmp_path):
    path = file(tmp_path, free={"window": 99.0}, optimizer={"name": "sgd", "momentum": 0.5})
    twin = load_recipe(path, ["model.norm=bn", "optimizer.name=adam"], MODELS)
    assert (twin.model.norm, twin.free.window) == ("bn", 99.0)
    bad = file(tmp_path, "bad.yaml", optimizer={"momentum": 0.5})
    with pytest.raises(RecipeError, match=r"bad\.yaml: optimizer\.momentum: got 0\.5"):
        load_recipe(bad, ["optimizer.name=sgd"], MODELS)
    with pytest.raises(RecipeError, match=r"free\.track: got False"):
        load_recipe(path, ["model.norm=bn", "free.track=false"], MODELS)


def test_the_keys_of_a_base_are_judged_by_the_base(tmp_path):
    file(tmp_path, "base.yaml", free={"window": 99.0})
    own = tmp_path / "own.yaml"
    own.write_text("extends: base.yaml\nmodel: {norm: bn}\n")
    assert load_recipe(own, models=MODELS).model.norm == "bn"
    own.write_text("extends: base.yaml\nmodel: {norm: bn}\nfree: {group: 5}\n")
    with pytest.raises(RecipeError, match=r"own\.yaml \(extends base\.yaml\): free\.group: got 5"):
        load_recipe(own, models=MODELS)


def test_a_file_that_is_no_whole_recipe_is_judged_with_what_completes_it(tmp_path):
    path = file(tmp_path, data=None, optimizer={"momentum": 0.5})
    assert load_recipe(path, ["data.name=digits", "optimizer.name=sgd"], MODELS).optimizer.momentum == 0.5
    with pytest.raises(RecipeError, match=r"optimizer\.momentum"):
        load_recipe(path, ["data.name=digits"], MODELS)


def test_options_of_a_norm_go_with_it(tmp_path):
    path = file(tmp_path, model={**TINY["model"], "norm": "gn", "norm_options": {"groups": 4}})
    assert load_recipe(path, ["model.norm=bn"], MODELS).model.norm_options == {}
    assert load_recipe(path, ["model.norm=gn"], MODELS).model.norm_options == {"groups": 4}
    for overrides in (["model.norm=bn", "model.norm_options.ghost=2"], ["model.norm_options.ghost=2", "model.norm=bn"]):
        assert load_recipe(path, overrides, MODELS).model.norm_options == {"ghost": 2}
    whole = ["model={name: reactnet20, norm: gn, norm_options: {groups: 2}}", "model.norm=bn"]
    assert load_recipe(path, whole, MODELS).model.norm == "bn" and load_recipe(path, whole[:1], MODELS).model.width == 1
    own = tmp_path / "own.yaml"
    own.write_text("extends: x.yaml\nmodel: {norm: bn, norm_options: {ghost: 2}}\n")
    assert load_recipe(own, models=MODELS).model.norm_options == {"ghost": 2}


def test_a_twin_is_saved_and_read_again(tmp_path):
    twin = load_recipe(file(tmp_path, free={"window": 99.0}), ["model.norm=bn"], MODELS)
    save_recipe(twin, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml", models=MODELS) == twin
    with pytest.raises(RecipeError, match=r"free\.track"):
        load_recipe(tmp_path / "saved.yaml", ["free.track=false"], MODELS)


def sweep(tmp_path, **changes):
    file(tmp_path, "base.yaml")
    tree = {"recipe": "base.yaml", "grid": {"model.norm": ["bn", "free"]}, **changes}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "sweep.yaml"


def test_what_a_sweep_sets_goes_to_the_runs_that_read_it(tmp_path):
    path = sweep(tmp_path, set={"free.window": 99.0})
    windows = {run.recipe.model.norm: run.recipe.free.window for run in read_sweep(path, ["settle=8"], MODELS).runs}
    assert windows == {"bn": 256.0, "free": 99.0}
    for run in read_sweep(path, models=MODELS).runs:
        assert load_recipe(tmp_path / "base.yaml", run.overrides, MODELS) == run.recipe


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        ({"set": {"optimizer.momentum": 0.5}}, []),
        ({}, ["optimizer.momentum=0.5"]),
        ({"grid": {"norm": {"bn": {"model.norm": "bn", "optimizer.momentum": 0.5}}}}, []),
        ({"grid": {"model.norm": ["bn"], "optimizer.momentum": [0.5, 0.8]}}, []),
    ],
)
def test_what_no_run_of_a_sweep_reads_is_an_error(tmp_path, changes, overrides):
    with pytest.raises(RecipeError, match=r"optimizer\.momentum: got 0\.5, which nothing reads here"):
        read_sweep(sweep(tmp_path, **changes), overrides, MODELS)


def test_reading_a_recipe_draws_no_random_numbers():
    import torch

    torch.manual_seed(3)
    before = torch.get_rng_state()
    recipe = parse_recipe(TINY, "x", MODELS, ["model.width=0.375"])
    assert unread(recipe, leaves(TINY), look_at(recipe, MODELS)) == {}
    assert torch.equal(before, torch.get_rng_state()) and isinstance(recipe, Recipe)
