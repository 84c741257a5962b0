"""A run as a whole: it learns, it leaves what it should, it can be cut anywhere and goes on to the same bits."""

import itertools
import json

import pytest
import torch
from helpers import assert_same, cut_at, double_stage, metrics_of, tiny, train

from bnnfree.data.datasets import describe, load_data
from bnnfree.errors import BnnfreeError, CheckpointError
from bnnfree.models import MODELS
from bnnfree.nn import NORMS, WeightLayer, centred_layers, gradient_centres
from bnnfree.recipe import resolve
from bnnfree.train import evaluate, load_checkpoint, load_model
from bnnfree.train.checkpoint import build_model, load_weights
from bnnfree.train.dist import Dist
from bnnfree.train.loop import Stage, TrainingError

CPU = Dist(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run that was never stopped, with everything that has state: two stages, EMA, AGC, accumulation."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    train(folder, "ema.decay=0.9", "agc.clip=0.02", "accumulate=2", curves=True)
    return folder


def test_a_run_leaves_its_artefacts(unbroken):
    for name in ("recipe.yaml", "metrics.jsonl", "curves.png", "last.pt", "best.pt", "result.json"):
        assert (unbroken / name).stat().st_size > 0, name
    assert not [p for p in unbroken.iterdir() if p.name.endswith(".tmp")]
    assert (unbroken / "curves.png").read_bytes().startswith(b"\x89PNG")
    lines = metrics_of(unbroken)
    assert [line["stage"] for line in lines] == ["activations"] * 2 + ["both"] * 2
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert not lines[0]["flips"] and len(lines[2]["flips"]) == 20
    assert all(0 <= rate <= 1 for rate in lines[3]["agc_rate"].values()) and len(lines[3]["agc_rate"]) == 21
    result = json.loads((unbroken / "result.json").read_text())
    assert {"test_top1", "val_top1", "seconds", "seed", "machine", "origin"} <= result.keys()


EARLY = ("bn", "free", "kn", "ln_pn")  # learn from fewer images
QUICK = (*EARLY, "frn")  # the others: python -m pytest -m slow tests/test_train.py


@pytest.mark.sample(3)
@pytest.mark.parametrize("norm", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NORMS])
def test_every_normaliser_learns(tmp_path, norm):
    changes = (f"data.samples={160 if norm in EARLY else 240}", "stages.1.epochs=4", "data.augment=[]")
    if norm == "ic_frn":  # its trunk is neither centred nor normalised: with dropout six epochs are too few
        changes += ("model.norm_options.drop=0",)
    result = train(tmp_path / norm, f"model.norm={norm}", *changes)
    assert result["test_top1"] > 50, norm  # chance is 25


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        train(tmp_path / name, f"seed={seed}", "data.samples=40", "stages.0.epochs=1", "stages.1.epochs=1")
    a, b, c = (load_checkpoint(tmp_path / name)["model"] for name in "abc")
    assert_same(a, b)
    assert not torch.equal(a["head.weight"], c["head.weight"])


@pytest.mark.parametrize("norm", ["free", "free uncentred", "free_paper", "none", "frn", "gn_pn"])
def test_four_batches_accumulated_are_one_large_batch_without_bn(monkeypatch, norm):
    """4 x 8 == 1 x 32 to 1e-9 in float64; the EMA of input means moves once per step, on all micro-batches."""
    common = (f"model.norm={norm.split()[0]}", f"model.centre_gradient={str(norm == 'free').lower()}")
    small = double_stage(monkeypatch, tiny(*common, "data.samples=120", "data.batch_size=8", "accumulate=4"))
    large = double_stage(monkeypatch, tiny(*common, "data.samples=120", "data.batch_size=32"))
    for stage in (small, large):
        stage.train_epoch(lambda: None)
    assert small.steps == large.steps
    found = large.model.state_dict()
    for key, value in small.model.state_dict().items():
        torch.testing.assert_close(value, found[key], rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


def step_gradients(monkeypatch, *options):
    """Gradients of a step, before the optimiser, and what centred layers counted."""
    stage, found = double_stage(monkeypatch, tiny("model.norm=free", *options)), {}

    def part_done(part):
        if part == "agc":
            found.update({name: p.grad.clone() for name, p in stage.model.named_parameters()})
            found.update({f"sum of {name}": layer.input_sum.clone() for name, layer in centred_layers(stage.model)})

    monkeypatch.setattr(stage, "part_done", part_done)
    batches = stage.data.train.train_batches(stage.recipe.data.batch_size, seed=0, epoch=0)
    stage._take_step(list(itertools.islice(batches, stage.recipe.accumulate)))
    return found


def assert_equal_gradients(found, expected):
    """Relative to the largest of each tensor, to 1e-9."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        near = 1e-9 * value.abs().max().item()
        assert near > 0, name
        torch.testing.assert_close(found[name], value, rtol=0, atol=near, msg=lambda m, k=name: f"{k}: {m}")


@pytest.mark.parametrize(
    ("step", "passes"), [(128, (64, 32, 1)), (105, (35, 21, 15, 5)), (70, (14, 10)), (20, (10, 4))]
)
def test_gradients_do_not_depend_on_how_a_step_is_divided(monkeypatch, step, passes):
    """128 = 2 x 64 = 4 x 32 = 128 x 1, also where passes cut through groups, with fused blocks; to 1e-9 in float64."""
    samples = f"data.samples={step + step // 9 + 2}"
    whole = step_gradients(monkeypatch, samples, f"data.batch_size={step}")
    for size in passes:
        divided = (samples, f"data.batch_size={size}", f"accumulate={step // size}")
        assert_equal_gradients(step_gradients(monkeypatch, *divided), whole)


def test_passes_of_whole_groups_are_shown_once(monkeypatch):
    """4 x 32 costs as many passes as there are; 2 x 48 one more, of the group in the middle."""
    for size, times, shown in ((32, 4, [32] * 4), (48, 2, [48, 48, 32]), (8, 4, [8] * 4 + [32])):
        recipe = tiny("model.norm=free", "data.samples=150", f"data.batch_size={size}", f"accumulate={times}")
        stage, seen = double_stage(monkeypatch, recipe), []
        stage.model.register_forward_pre_hook(lambda net, args, seen=seen: seen.append(len(args[0])))
        batches = stage.data.train.train_batches(size, seed=0, epoch=0)
        stage._take_step(list(itertools.islice(batches, times)))
        assert seen == shown


@pytest.mark.parametrize("loss", [(), ("loss.name=distribution", "loss.teacher=another")], ids=["labels", "teacher"])
def test_steps_of_few_images_centre_by_the_last_ones_seen(monkeypatch, loss):
    """Of this step and those before it, however a step is divided: 2 x 3 == 1 x 6, with 13 images of reference.

    To 1e-7: steps of Adam are as large where a gradient is nearly 0 as elsewhere. A teacher is asked about the
    step's own images only, each once.
    """
    stages = []
    for division in (("data.batch_size=3", "accumulate=2"), ("data.batch_size=6",)):
        common = ("model.norm=free", "free.reference=13", "free.recalibrate=0", "data.samples=60")
        stage = double_stage(monkeypatch, tiny(*common, *division, *loss))
        centre, seen, asked, taught = gradient_centres(stage.model)[0], [], [], []

        def teach(images, taught=taught):
            taught.append(images)
            return images.flatten(1)[:, :4] * 3

        stage.teacher = teach if loss else None

        def watch(net, args, centre=centre, seen=seen, asked=asked):
            seen.append(args[0][-centre.part.counted :])
            if centre.part.taken.any():
                asked.append((args[0], torch.cat(seen)[-13:]))

        stage.model.register_forward_pre_hook(watch)
        stage.train_epoch(lambda: None)
        assert [len(images) for images, _ in asked[:4]] == [6, 12, 13, 13]
        assert len(asked) == stage.steps and all(torch.equal(*pair) for pair in asked)
        assert not loss or torch.equal(torch.cat(taught), torch.cat(seen))
        stages.append(stage)
    found = stages[0].model.state_dict()
    for key, value in stages[1].model.state_dict().items():
        torch.testing.assert_close(value, found[key], rtol=1e-7, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(("size", "accumulate", "asks"), [(7, 1, True), (8, 1, False), (3, 2, True), (4, 2, False)])
@pytest.mark.parametrize("norm", ["free", "bn"])  # bn: such a pass would normalise by other images, and move statistics
def test_who_centres_by_images_of_steps_before(norm, size, accumulate, asks):
    recipe = tiny(f"model.norm={norm}", "model.centre_head=true", f"data.batch_size={size}", f"accumulate={accumulate}")
    torch.manual_seed(0)
    recipe = resolve(recipe, describe(recipe.data))
    model = build_model(recipe, MODELS, describe(recipe.data), recipe.stages[0].binarize)
    stage = Stage(recipe, 0, model, load_data(recipe.data), CPU)
    assert stage.passes.asks_before(size * accumulate) == (asks and norm == "free")


@pytest.mark.parametrize("norm", [("model.norm=bn",), ("model.norm=free", "optimizer.precondition=bnp")], ids=str)
def test_accumulation_is_not_exact_with_bn_and_bnp(monkeypatch, norm):
    """BNP: no image may be shown again, so passes of fewer than a group are centred by themselves."""
    common = (*norm, "data.samples=120")
    small = double_stage(monkeypatch, tiny(*common, "data.batch_size=8", "accumulate=4"))
    large = double_stage(monkeypatch, tiny(*common, "data.batch_size=32"))
    for stage in (small, large):
        stage.train_epoch(lambda: None)
    difference = (small.model.head.weight - large.model.head.weight).abs().max()
    assert difference > 1e-6


def test_the_average_of_weights_is_what_is_evaluated(unbroken):
    state = load_checkpoint(unbroken)
    model, _ = load_model(unbroken, MODELS)
    assert torch.equal(model.head.weight, state["ema"]["head.weight"])
    assert not torch.equal(model.head.weight, state["model"]["head.weight"])


def test_input_means_stay_at_their_calibration_when_not_tracked(monkeypatch):
    moved = {}
    for track in (True, False):
        stage = double_stage(monkeypatch, tiny(f"free.track={str(track).lower()}"))
        before = {k: v.clone() for k, v in stage.model.state_dict().items() if k.endswith("input_mean")}
        stage.train_epoch(lambda: None)
        moved[track] = any(not torch.equal(v, stage.model.state_dict()[k]) for k, v in before.items())
    assert moved == {True: True, False: False}


def test_each_stage_is_calibrated_from_its_own_network(tmp_path):
    train(
        tmp_path / "r",
        "data.samples=40",
        "stages.0.epochs=1",
        "stages.1.epochs=1",
        "optimizer.lr=1e-30",
        "free.track=false",
    )
    model, _ = load_model(tmp_path / "r", MODELS)
    layers = [m for m in model.modules() if isinstance(m, WeightLayer) and m.unit_output]
    assert layers and all((m.output_std != 1).any() for m in layers)


def test_a_stage_may_have_smaller_images_and_one_course_of_the_rate(tmp_path, monkeypatch):
    options = ("stages.0.image_size=6", "schedule.over=run", "schedule.warmup_steps=0", "accumulate=2")
    seen = []
    calibrate = Stage.calibrate
    monkeypatch.setattr(Stage, "calibrate", lambda stage: (seen.append(stage.data), calibrate(stage))[1])
    train(tmp_path / "r", *options)
    small, large = seen
    assert (small.image_size, large.image_size) == ((6, 6), (9, 9)) and small.mean == large.mean
    for part in ("train", "val", "test"):
        mine, its = getattr(small, part), getattr(large, part)
        assert mine.pixels.shape == (len(its), 6, 6, 3) and torch.equal(mine.labels, its.labels)
        assert (mine.pixels.float().mean() - its.pixels.float().mean()).abs() < 1
    rates = [line["lr"] for line in metrics_of(tmp_path / "r")]
    steps = 3  # 72 images in batches of 16, two a step
    assert rates == pytest.approx([4e-3 * (1 - (epoch * steps - 1) / (4 * steps)) for epoch in (1, 2, 3, 4)])
    with monkeypatch.context() as patch:
        cut_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", *options)
    train(tmp_path / "cut", *options, resume=True)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "r")


def test_a_loss_that_is_not_finite_stops_the_run_with_a_hint(tmp_path, monkeypatch):
    from bnnfree.train import loop

    monkeypatch.setitem(loop.LOSSES, "cross_entropy", lambda z, *_: z.sum() * float("nan"))
    with pytest.raises(TrainingError, match="not finite.*optimizer.lr"):
        train(tmp_path / "r")
    assert not (tmp_path / "r" / "best.pt").exists()


def test_a_teacher_of_ours_teaches(tmp_path, unbroken):
    options = ("loss.name=distribution", f"loss.teacher={unbroken}", "stages.0.epochs=1", "stages.1.epochs=1")
    train(tmp_path / "pupil", *options)
    train(tmp_path / "alone", *options[2:])
    taught, alone = (metrics_of(tmp_path / name)[0]["loss"] for name in ("pupil", "alone"))
    assert 0 < taught != alone  # the same network, data and seed, but another target
    with pytest.raises(BnnfreeError, match="other classes"):
        train(tmp_path / "other", *options, "data.classes=5")
    with pytest.raises(CheckpointError, match="no such"):
        train(tmp_path / "none", "loss.name=distribution", "loss.teacher=nowhere.pt")
    with pytest.raises(BnnfreeError, match="no model 'resnte'"):
        train(tmp_path / "zoo", "loss.name=distribution", "loss.teacher=torchvision:resnte")


@pytest.mark.parametrize(
    "change",
    [
        "optimizer.name=sgd",
        "optimizer.name=adamw",
        "precision=bf16",
        "model.ste=ede",
        "schedule.name=cosine",
        "data.val_fraction=0.0",
        "model.beta=measured",
    ],
)
def test_a_recipe_with_another_choice_runs_to_a_result(tmp_path, change):
    result = train(tmp_path / "r", change, "stages.0.epochs=1", "stages.1.epochs=1")
    assert 0 <= result["test_top1"] <= 100


@pytest.mark.thorough
def test_one_sample_at_a_time_trains(tmp_path):
    """Batch size 1, which batch normalisation does not survive."""
    options = ("data.batch_size=1", "data.samples=80", "stages=[{epochs: 2}]", "optimizer.lr=1e-3", "data.augment=[]")
    assert train(tmp_path / "r", *options)["test_top1"] > 50  # chance is 25


def test_weights_that_do_not_fit_are_named_and_none_is_loaded():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    wrong = {**before, "0.weight": torch.zeros(2, 4), "2.weight": torch.zeros(1)}
    del wrong["1.bias"]
    with pytest.raises(CheckpointError) as error:
        load_weights(model, wrong, "stage 1 taking over from stage 0")
    for part in ("1 missing (1.bias)", "1 unexpected (2.weight)", "0.weight [2, 4] for [2, 3]", "stage 1"):
        assert part in str(error.value)
    assert_same(dict(model.state_dict()), before)


def test_bop_trains_signs(tmp_path):
    options = ("optimizer.name=bop", "model.norm=bn", "model.standardize=false", "stages=[{epochs: 1}]")
    train(tmp_path / "r", *options, "optimizer.bop_gamma=0.1", "optimizer.bop_threshold=1e-6")
    state = load_checkpoint(tmp_path / "r")
    weight = state["model"]["blocks.0.branch.1.weight"]
    assert (weight.abs() == 1).all()
    assert max(metrics_of(tmp_path / "r")[0]["flips"].values()) > 0


def test_evaluate_leaves_the_network_as_it_was(unbroken, monkeypatch):
    stage = double_stage(monkeypatch, tiny())
    before = {k: v.clone() for k, v in stage.model.state_dict().items()}
    stage.model.train()
    figures = evaluate(stage.model, stage.data.test, CPU, batch_size=7)
    assert stage.model.training and figures["top1"] <= figures["top5"] == 100  # four classes
    assert_same(dict(stage.model.state_dict()), before)


def test_a_network_whose_logits_are_nan_is_right_about_nothing(unbroken, monkeypatch):
    stage = double_stage(monkeypatch, tiny())
    torch.nn.init.constant_(stage.model.get_classifier().bias, float("nan"))
    assert evaluate(stage.model, stage.data.test, CPU)["top1"] == 0


@pytest.mark.slow
def test_a_compiled_run_trains(tmp_path):
    assert train(tmp_path / "r", "compile=true", "stages.0.epochs=1", "stages.1.epochs=1")["epochs"] == 2
