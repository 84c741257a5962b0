"""Training from weights: what fits is taken, what is taken holds, what is frozen stays, and all of it is said."""

import json
import re
import shlex

import pytest
import torch
from helpers import ROOT, make_model, tiny, train
from test_tools import images, tool  # noqa: F401

from bnnfree.errors import BnnfreeError, CheckpointError
from bnnfree.models import MODELS
from bnnfree.nn import calibrate
from bnnfree.optim import parameter_groups
from bnnfree.train import load_checkpoint, load_model, open_source
from bnnfree.train import start as start_module
from bnnfree.train.start import freeze, open_weights, take_weights, weights_only

ONE = "stages=[{epochs: 1}]"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run of one stage, all 1 bit."""
    folder = tmp_path_factory.mktemp("runs") / "source"
    train(folder, "stages=[{epochs: 2}]")
    return folder


def started(monkeypatch, folder, *overrides):
    """The weights with which the first step of a run begins, calibrated, and the run's result."""
    found = {}
    from bnnfree.train.loop import Stage

    calibrated = Stage.calibrate

    def note(self):
        calibrated(self)
        found.setdefault("weights", {name: tensor.clone() for name, tensor in self.model.state_dict().items()})

    with monkeypatch.context() as patch:
        patch.setattr(Stage, "calibrate", note)
        found["result"] = train(folder, *overrides)
    return found["weights"], found["result"]


def test_a_run_begins_as_the_network_it_starts_from(tmp_path, monkeypatch, source):
    weights, result = started(monkeypatch, tmp_path / "run", ONE, f"init={source}", "seed=3")
    model, _ = load_model(source, MODELS)
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name  # constants that come from data too
    assert result["init"]["taken"] == list(weights)[:0] + [n for n in weights if not n.endswith((".alpha", ".beta"))]
    assert result["init"]["new"] == {} and result["init"]["unused"] == []
    assert load_checkpoint(tmp_path / "run")["init"] == result["init"]


def test_other_classes_get_a_new_head_and_the_rest_is_taken(tmp_path, monkeypatch, source):
    weights, result = started(monkeypatch, tmp_path / "run", ONE, f"init={source / 'last.pt'}", "data.classes=7")
    theirs = load_checkpoint(source / "last.pt")["model"]
    assert weights["head.weight"].shape[0] == 7 and list(result["init"]["new"]) == ["head"]
    assert "[4, " in result["init"]["new"]["head"] and "[7, " in result["init"]["new"]["head"]
    assert all(torch.equal(weights[name], theirs[name]) for name in theirs if not name.startswith("head"))
    assert weights["head.input_mean"].abs().sum() > 0  # calibrated


def test_where_other_parts_are_1_bit_constants_are_measured_anew(tmp_path, monkeypatch, source):
    weights, _ = started(monkeypatch, tmp_path / "run", "stages=[{epochs: 1, binarize: activations}]", f"init={source}")
    theirs = load_checkpoint(source)["model"]
    assert torch.equal(weights["blocks.3.branch.1.weight"], theirs["blocks.3.branch.1.weight"])
    assert not torch.equal(weights["blocks.3.branch.1.output_std"], theirs["blocks.3.branch.1.output_std"])


def test_another_normaliser_takes_weights_and_keeps_its_own_design(source):
    model = make_model("reactnet20", "free_paper")
    state = open_weights(str(source), MODELS)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    taken = take_weights(model, state, "x", "both")
    assert torch.equal(model.blocks[2].branch[1].weight, state["model"]["blocks.2.branch.1.weight"])
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert "blocks.2.branch.1.output_std" in taken.unused and "head" in taken.new


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (["init=no_such_name"], r"init: got 'no_such_name', expected a checkpoint, .* \(free_a, other\)"),
        (["init=free_b"], "Did you mean 'free_a'"),
        (["init=SOURCE", "model.name=xnor_resnet18", "model.width=0.25"], "no layer fits"),
        (["init=SOURCE/recipe.yaml"], "published checkpoint|not a checkpoint"),
        (["freeze=[nothing.*]"], r"freeze: got 'nothing\.\*', which matches no parameter"),
        (["freeze=[haed.weight]"], "Did you mean 'head.weight'"),
        (["freeze=['*']"], "leaves nothing to train"),
        (["optimizer.lr_mult={head.wieght: 2.0}"], r"lr_mult: got 'head\.wieght'.* Did you mean 'head.weight'"),
        (["optimizer.lr_mult={head.weight: 0.0}"], "greater than 0"),
    ],
)
def test_what_fits_nowhere_is_one_line(tmp_path, monkeypatch, source, overrides, match):
    monkeypatch.setattr(start_module, "PRETRAINED", tmp_path / "pretrained")
    (tmp_path / "pretrained").mkdir()
    for name in ("free_a.pt", "other.pt"):
        (tmp_path / "pretrained" / name).touch()
    with pytest.raises(BnnfreeError, match=match) as caught:
        train(tmp_path / "run", ONE, *(each.replace("SOURCE", str(source)) for each in overrides))
    assert "\n" not in str(caught.value)


def test_a_name_stands_for_a_pretrained_file(tmp_path, monkeypatch, source):
    monkeypatch.setattr(start_module, "PRETRAINED", tmp_path)
    (tmp_path / "mine.pt").write_bytes((source / "best.pt").read_bytes())
    assert train(tmp_path / "run", ONE, "init=mine")["init"]["new"] == {}


def test_weights_alone_are_small_and_open(tmp_path, tool, source):  # noqa: F811
    sizes = {}
    for name, options in {"whole.pt": [], "half.pt": ["--half"]}.items():
        code, out, errors = tool("convert", source, "-o", tmp_path / name, *options)
        assert code == 0 and out.endswith(f"{name}\n"), errors
        sizes[name] = (tmp_path / name).stat().st_size
    theirs, _ = load_model(source, MODELS)
    whole, half = (open_source(tmp_path / name, MODELS).model for name in sizes)
    for (key, tensor), mine, small in zip(
        theirs.state_dict().items(), whole.state_dict().values(), half.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, mine)
        assert torch.equal(tensor.float(), small.float()) or tensor.dim() > 1, key
        torch.testing.assert_close(small, tensor, rtol=2**-8, atol=0)
        assert torch.equal(small >= 0, tensor >= 0)
    weights = sum(p.numel() for p in theirs.parameters() if p.dim() > 1)
    assert sizes["whole.pt"] < (source / "last.pt").stat().st_size / 2
    assert sizes["half.pt"] == pytest.approx(sizes["whole.pt"] - 2 * weights, abs=5000)
    assert train(tmp_path / "run", ONE, f"init={tmp_path / 'half.pt'}")["init"]["new"] == {}


def test_a_run_that_started_from_weights_resumes_without_them(tmp_path, source):
    (tmp_path / "once.pt").write_bytes((source / "best.pt").read_bytes())
    options = (ONE, f"init={tmp_path / 'once.pt'}")
    first = train(tmp_path / "run", *options)
    (tmp_path / "once.pt").unlink()
    assert train(tmp_path / "run", *options, resume=True)["test_loss"] == first["test_loss"]


# ---- frozen layers


@pytest.mark.parametrize("speed", ["layers", "fused"])
@pytest.mark.parametrize("norm", ["free", "bn"])
def test_frozen_layers_stay_to_the_bit(tmp_path, monkeypatch, norm, speed):
    patterns = ["stem.*", "blocks.0.*", "blocks.7.*"]
    rescaled = ["free.recalibrate=32"] if norm == "free" else []
    options = (f"model.norm={norm}", f"speed={speed}", *rescaled, "ema.decay=0.5", "stages=[{epochs: 2}]")
    before, _ = started(monkeypatch, tmp_path / "run", f"freeze={json.dumps(patterns)}", *options)
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    for weights in (state["model"], state["ema"]):
        for name, tensor in weights.items():
            frozen = name.startswith(("stem.", "blocks.0.", "blocks.7."))
            if frozen:
                assert torch.equal(tensor, before[name]), name  # running means and constants too
            elif name.endswith(".weight"):
                assert not torch.equal(tensor, before[name]), name
    moved = sum(len(group["params"]) for group in state["optimizers"][0]["param_groups"])
    assert moved == sum(not n.startswith(("stem.", "blocks.0.", "blocks.7.")) for n in parameters_of(norm))
    assert len(state["optimizers"][0]["state"]) == moved


def parameters_of(norm):
    return [name for name, _ in make_model("reactnet20", norm).named_parameters()]


def test_a_frozen_layer_is_one_of_which_nothing_moves():
    model = make_model("reactnet20", "free")
    layers = freeze(model, ["blocks.1.branch.1.weight", "blocks.2.branch.1.*", "blocks.3.branch.?.[wgb]*"])
    names = [name for name, module in model.named_modules() if module in layers]
    assert names == ["blocks.2.branch.1", "blocks.3.branch.0", "blocks.3.branch.1"]
    assert not model.blocks[1].branch[1].weight.requires_grad and model.blocks[1].branch[1].gain.requires_grad


def test_calibration_leaves_the_layers_it_is_told_to():
    model = make_model("reactnet20", "free")
    x = torch.randn(4, 3, 9, 9)
    calibrate(model, x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calibrate(model, 2 * x + 1, keep={"stem.0", "blocks.4.branch.1"})
    changed = {name.rpartition(".")[0] for name, tensor in model.state_dict().items() if not before[name].equal(tensor)}
    assert not changed & {"stem.0", "blocks.4.branch.1"} and {"blocks.0.branch.1", "head"} <= changed


# ---- factors on the learning rate


def test_factors_by_pattern_multiply_the_rate_and_the_last_counts():
    model = make_model("reactnet20", "free")
    mult = {"blocks.*": 0.5, "blocks.1.*": 0.1, "*.gain": 3.0}
    groups = parameter_groups(model, lr=1.0, affine_lr_mult=5.0, lr_mult=mult)
    rates = {name: group["lr"] for group in groups for name in group["names"]}
    assert rates["blocks.0.branch.1.weight"] == 0.5 and rates["blocks.1.branch.1.weight"] == 0.1
    assert rates["blocks.1.branch.1.gain"] == 15.0 and rates["stem.0.gain"] == 15.0
    assert rates["stem.0.weight"] == 1.0 and rates["blocks.10.branch.1.weight"] == 0.5
    assert sorted(rates) == sorted(name for name, _ in model.named_parameters())
    plain = parameter_groups(model, lr=1.0, affine_lr_mult=5.0)
    assert [group["kind"] for group in plain] == ["latent", "real", "affine", "head"]
    with pytest.raises(BnnfreeError, match=r"lr_mult of '\*' -1"):
        parameter_groups(model, lr=1.0, lr_mult={"*": -1})


def test_metrics_tell_the_rate_without_factors(tmp_path):
    for name, mult in {"plain": "{}", "mult": "{'blocks.*': 0.1, 'stem.*': 7.0}"}.items():
        train(tmp_path / name, "stages=[{epochs: 1, lr: 0.002}]", f"optimizer.lr_mult={mult}")
    plain, mult = (json.loads((tmp_path / name / "metrics.jsonl").read_text())["lr"] for name in ("plain", "mult"))
    assert plain == mult


def test_weights_only_keeps_what_they_mean(source):
    state = weights_only(open_weights(str(source), MODELS), half=True)
    assert "optimizers" not in state and state["ema"] is None
    assert state["model"]["stem.0.weight"].dtype == torch.bfloat16
    assert state["model"]["stem.0.gain"].dtype == torch.float32
    assert tiny(ONE).init is None
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(source / "none.pt")


def test_readme_fine_tunes_in_five_minutes(tmp_path, monkeypatch, tool, images):  # noqa: F811
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("### Fine-tune on your own pictures") :]
    commands = re.search(r"```bash\n(.*?)```", section, re.S)[1].splitlines()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    small = ["model.width=0.5", "data.batch_size=8", "stages=[{epochs: 1}]", "data.val_fraction=0.2"]
    fake = ["data.name=fake", "data.samples=24", "data.image_size=9"]
    for line in commands:
        name, *arguments = shlex.split(line.replace("FOLDER", str(images)))[1:]
        if name.endswith("train.py"):
            arguments += small + ([] if "FOLDER" in line else fake)
        code, out, errors = tool(name.removeprefix("tools/").removesuffix(".py"), *arguments)
        assert code == 0, f"{line}: {errors}"
        if "init=" in line:
            assert "init runs/base: took" in out + errors and "new: head ([10, 32] there, [2, 32] here)" in out + errors
    assert json.loads((tmp_path / "runs/mine/result.json").read_text())["init"]["new"].keys() == {"head"}
    assert load_model("base.pt", MODELS)


# ---- messages that a newcomer meets


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (
            ["freeze=['*']"],
            r"freeze: got \['\*'\], which leaves .*: all \d+ parameters match\..* head\.\*",
        ),
        (["freeze=[stem.*, blocks.*, head.*]"], "leaves nothing to train"),
        (["freeze=[stem.0]"], r"For all of that layer: 'stem\.0\.\*'"),
        (["optimizer.lr_mult={nothing.*: 2.0}"], r"^optimizer\.lr_mult: got 'nothing\.\*', which matches no parameter"),
    ],
)
def test_a_pattern_that_cannot_be_meant_names_its_key(tmp_path, overrides, match):
    with pytest.raises(BnnfreeError, match=match) as caught:
        train(tmp_path / "run", ONE, *overrides)
    assert "Trunk" not in str(caught.value) and "parameter_groups" not in str(caught.value)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder in which one packed file is the pretrained network, and one checkpoint is what recipes start from."""
    pretrained, weights = tmp_path / "models" / "pretrained", tmp_path / "recipes" / "weights"
    pretrained.mkdir(parents=True)
    weights.mkdir(parents=True)
    (pretrained / "network.bnnf").touch()
    (weights / "first_stage.pt").touch()
    monkeypatch.setattr(start_module, "PRETRAINED", pretrained)
    return pretrained


@pytest.mark.parametrize("by_name", [True, False])
def test_a_packed_file_is_no_start_and_the_message_says_what_is(tmp_path, shelf, by_name):
    init = "network" if by_name else str(shelf / "network.bnnf")
    packed = "packed file: its weights are bits, which cannot be trained on. Take the run folder or the checkpoint"
    with pytest.raises(CheckpointError, match=packed) as caught:
        train(tmp_path / "run", ONE, f"init={init}")
    assert "first_stage" in str(caught.value) and not list((tmp_path / "run").iterdir())


def test_weights_that_recipes_start_from_have_names_too(tmp_path, shelf):
    assert start_module.find_weights("first_stage").is_file()
    with pytest.raises(CheckpointError, match="Did you mean 'first_stage'"):
        start_module.find_weights("first_stag")
    (tmp_path / "mine.pt").touch()
    with pytest.raises(CheckpointError, match=f"Did you mean '{tmp_path}/mine.pt'"):
        start_module.find_weights(str(tmp_path / "mein.pt"))


@pytest.mark.parametrize("content", [b"", b"hello", b"}", b"(.", b"\x80\x02.", b"BNNF" + b"\x00" * 40])
def test_a_file_of_another_kind_is_told_without_the_words_of_pickle(tmp_path, tool, content):  # noqa: F811
    (tmp_path / "x.pt").write_bytes(content)
    code, _, errors = tool("convert", tmp_path / "x.pt", "-o", tmp_path / "y.pt")
    assert code == 2 and len(errors.splitlines()) == 1 and "torch.save" in errors
    assert "pop from" not in errors and "()" not in errors.replace("torch.load(", ""), errors
