"""bnnfree.analysis.summary and tools/summary.py: published counts by formula, odd shapes, no traces."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnnfree.analysis import summarize
from bnnfree.errors import BnnfreeError
from bnnfree.models import MODELS
from bnnfree.nn import BINARIZE, BinaryConv2d, BinaryLinear, RSign, ScaledStdConv2d, Sign
from bnnfree.recipe import resolve
from bnnfree.train.checkpoint import save_checkpoint
from bnnfree.train.networks import load_recipe

ROOT = Path(__file__).resolve().parent.parent
REACTNET_A = [  # input channels, output channels, side of the output at 224
    (32, 64, 112), (64, 128, 56), (128, 128, 56), (128, 256, 28), (256, 256, 28), (256, 512, 14),
    *[(512, 512, 14)] * 5, (512, 1024, 7), (1024, 1024, 7),
]  # fmt: skip


def resnet18_blocks(side: int):
    """(input channels, output channels, side of the output) of the 16 blocks; `side` is that of the first."""
    cin = 64
    for stage, cout in enumerate((64, 128, 256, 512)):
        for _ in range(4):
            yield cin, cout, side >> stage
            cin = cout


def resnet18_macs(side: int) -> tuple[int, int]:
    """MACs of the 3x3 convolutions and of the 1x1 shortcuts."""
    blocks = list(resnet18_blocks(side))
    branch = sum(s * s * cin * cout * 9 for cin, cout, s in blocks)
    return branch, sum(s * s * cin * cout for cin, cout, s in blocks if cin != cout)


def test_reactnet_a_has_the_published_counts():
    total = summarize(MODELS["reactnet_a"](1000, stem="imagenet", norm="bn"), (224, 224)).total
    assert total.binary_macs == sum(s * s * (cin * cin * 9 + cin * cout) for cin, cout, s in REACTNET_A)
    assert total.bit_parameters == sum(cin * cin * 9 + cin * cout for cin, cout, _ in REACTNET_A)
    assert total.float_macs == 112 * 112 * 32 * 3 * 9 + 1024 * 1000
    assert (total.binary_macs, total.mixed_macs) == (4_816_896_000, 0)
    assert total.ops == 87_126_016
    assert total.bit_parameters == 28_253_184


@pytest.mark.parametrize(("shortcut", "ops"), [("real", 163_985_408), ("binary", 145_018_880)])
def test_reactnet18_has_the_published_counts_at_224(shortcut, ops):
    total = summarize(MODELS["reactnet18"](1000, stem="imagenet", shortcut=shortcut), (224, 224)).total
    branch, shortcuts = resnet18_macs(56)
    real = 112 * 112 * 64 * 3 * 49 + 512 * 1000
    assert total.binary_macs == branch == 1_676_279_808
    assert total.mixed_macs == (shortcuts if shortcut == "binary" else 0)
    assert total.flops == real + (shortcuts if shortcut == "real" else 0)
    assert total.ops == total.flops + total.bops / 64 == ops


@pytest.mark.parametrize(
    ("shortcut", "bops", "flops"), [("real", 547_356_672, 8_066_048), ("binary", 553_648_128, 1_774_592)]
)
def test_reactnet18_has_the_published_counts_at_32(shortcut, bops, flops):
    total = summarize(MODELS["reactnet18"](10, stem="cifar", shortcut=shortcut), (32, 32)).total
    branch, shortcuts = resnet18_macs(32)
    real = 32 * 32 * 64 * 3 * 9 + 512 * 10
    assert total.bops == branch + (shortcuts if shortcut == "binary" else 0) == bops
    assert total.flops == real + (shortcuts if shortcut == "real" else 0) == flops
    if shortcut == "real":
        assert total.ops == 16_618_496


# floats per output channel: of a branch convolution and its norm, a shortcut's, the stem's, an RPReLU
@pytest.mark.parametrize(("norm", "branch", "shortcut", "stem", "act"), [("bn", 2, 2, 2, 3), ("free", 2, 1, 2, 2)])
def test_reactnet18_parameters_and_what_stays_float(norm, branch, shortcut, stem, act):
    model = MODELS["reactnet18"](10, norm=norm)
    summary = summarize(model, (32, 32))
    blocks = list(resnet18_blocks(32))
    bits = sum(cin * cout * 9 + (cin * cout if cin != cout else 0) for cin, cout, _ in blocks)
    affine = sum(cin + (branch + act) * cout for cin, cout, _ in blocks)  # with the RSign
    affine += shortcut * (128 + 256 + 512) + stem * 64
    total = summary.total
    assert total.bit_parameters == bits
    assert total.float_parameters == 64 * 27 + affine + 513 * 10
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert total.parameters == {"bn": 11_188_874, "free": 11_184_138}[norm]
    # all layers hold whole bytes here
    assert total.bytes == bits // 8 + 4 * total.float_parameters
    inside = stem * 64 if norm == "free" else 0  # the stem's own gain and bias
    assert summary.stays_float == {"stem": 1728 + inside, "head": 5130, "real": 0, "affine": affine - inside}


CONVS = [
    # cin, cout, kernel, stride, padding, dilation, groups
    (3, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (6, 9, (3, 1), (2, 1), (1, 0), (1, 2), 3),
    (7, 7, (3, 5), (1, 2), (2, 4), (2, 2), 7),
    (4, 2, (1, 1), (3, 3), (0, 0), (1, 1), 2),
]


@pytest.mark.parametrize("layer", [BinaryConv2d, ScaledStdConv2d, nn.Conv2d])
@pytest.mark.parametrize("conv", CONVS)
def test_macs_are_the_taps_of_every_output_value(layer, conv):
    cin, cout, kernel, stride, padding, dilation, groups = conv
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    module = layer(cin, cout, kernel, **geometry)
    row = summarize(module, (13, 9), cin).layers[0]
    # all ones on an image of ones that is padded with ones: each output value counts its own taps
    ones = torch.ones(1, cin, 13 + 2 * padding[0], 9 + 2 * padding[1])
    taps = F.conv2d(ones, torch.ones(cout, cin // groups, *kernel), None, stride, 0, dilation, groups)
    macs = int(taps.sum())
    binary = layer is BinaryConv2d
    assert (row.mixed_macs, row.float_macs) == ((macs, 0) if binary else (0, macs))
    assert row.input_shape == (cin, 13, 9) and row.output_shape == tuple(taps.shape[1:])
    weights = cout * cin // groups * kernel[0] * kernel[1]
    assert row.bit_parameters == (weights if binary else 0)
    # what is no weight: a gain per channel in our layers, a bias in torch's
    assert row.parameters == weights + cout
    assert row.bytes == (-(-weights // 8) if binary else 4 * weights) + 4 * cout


def test_linear_layers_count_every_position():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.binary = BinaryLinear(11, 7, bias=True, scale="learned")
            self.head = nn.Linear(7, 3)

        def forward(self, x):
            return self.head(self.binary(x=x)).mean(2)

    binary, head = summarize(Positions(), (5, 11), 2).layers
    assert binary.input_shape == (2, 5, 11) and binary.output_shape == (2, 5, 7)
    assert (binary.mixed_macs, head.float_macs) == (2 * 5 * 11 * 7, 2 * 5 * 7 * 3)
    # gain, bias and learned scale
    assert (binary.bit_parameters, binary.float_parameters, binary.bytes) == (77, 21, 10 + 84)
    assert (head.bit_parameters, head.float_parameters) == (0, 24)


def test_signs_are_seen_through_a_reshape_and_not_through_an_activation():
    def first(*between):
        layers = summarize(nn.Sequential(RSign(3), *between, nn.Flatten(), BinaryLinear(3 * 35, 5)), (5, 7)).layers
        return layers[0]

    assert (first().input_bits, first().binary_macs, first().mixed_macs) == (1, 3 * 35 * 5, 0)
    real = first(nn.AvgPool2d(3, 1, 1))
    assert (real.input_bits, real.binary_macs, real.mixed_macs) == (32, 0, 3 * 35 * 5)


def test_real_weights_on_signs_are_float_macs():
    row = summarize(nn.Sequential(Sign(), nn.Conv2d(3, 4, 3)), (5, 5)).layers[0]
    assert (row.weight_bits, row.input_bits, row.float_macs) == (32, 1, 3 * 3 * 4 * 27)


def test_a_module_used_twice_works_twice_and_weighs_once():
    conv = BinaryConv2d(5, 5, 3, padding=1)
    once = summarize(nn.Sequential(conv), (7, 9), 5)
    twice = summarize(nn.Sequential(conv, conv), (7, 9), 5)
    assert [layer.call for layer in twice.layers] == [1, 2]
    assert [layer.path for layer in twice.layers] == ["0", "0"]
    assert twice.total.bops == 2 * once.total.bops > 0
    assert (twice.total.parameters, twice.total.bytes) == (once.total.parameters, once.total.bytes)
    assert "0 (call 2)" in twice.table()


def test_a_parameter_shared_by_two_modules_counts_once():
    first, second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
    second.weight = first.weight
    total = summarize(nn.Sequential(first, second), (2, 6)).total
    assert (total.parameters, total.float_macs) == (36, 2 * 3 * 2 * 36)


def test_nothing_of_the_model_changes():
    torch.manual_seed(3)
    network = MODELS["reactnet18"](7, norm="free", width=0.125)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), network).train()
    network.get_submodule("blocks.2").eval()
    model(torch.randn(2, 3, 9, 9)).sum().backward()
    state = {k: v.clone() for k, v in [*model.named_parameters(), *model.named_buffers()]}
    grads = {k: (p.grad, p.grad.clone()) for k, p in model.named_parameters() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    summarize(model, (9, 11))
    assert torch.equal(random, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(torch.equal(after[k].nan_to_num(), v.nan_to_num()) for k, v in state.items())
    assert grads and all(model.get_parameter(k).grad is old for k, (old, _) in grads.items())
    assert all(torch.equal(old, kept) for old, kept in grads.values())


def test_random_numbers_drawn_by_a_model_leave_no_trace():
    class Noisy(nn.Linear):
        def forward(self, x):
            return super().forward(x + torch.rand_like(x))

    model = Noisy(4, 2)
    before = torch.get_rng_state()
    summarize(model, (3, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_counts_do_not_depend_on_precision_or_mode():
    model = MODELS["reactnet20"](5, width=0.5)
    expected = summarize(model, (15, 15)).to_dict()
    assert summarize(model.double().eval(), (15, 15)).to_dict() == expected
    assert summarize(model.bfloat16().train(), (15, 15)).to_dict() == expected


def test_a_norm_that_cannot_train_on_one_image_is_no_obstacle():
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 4), nn.BatchNorm1d(4)).train()
    assert summarize(model, (5, 5)).total.float_macs == 300


@pytest.mark.parametrize("name", [name for name in MODELS if name != "resnet20"])  # which is real
@pytest.mark.parametrize("binarize", list(BINARIZE))
def test_what_is_binarised_decides_the_kind_of_macs(name, binarize):
    model = MODELS[name](3, 2, width=0.25, binarize=binarize, shortcut="binary")
    summary = summarize(model, (17, 23), 2)
    signs, weights = BINARIZE[binarize]
    both = summarize(MODELS[name](3, 2, width=0.25), (17, 23), 2)
    inner = [row for row in summary.layers if ".branch." in row.path]
    assert [row.path for row in summary.layers] == [row.path for row in both.layers]
    assert {(row.weight_bits, row.input_bits) for row in inner} == {(1 if weights else 32, 1 if signs else 32)}
    assert all(row.input_bits == 32 for row in summary.layers if row not in inner)
    total = summary.total
    assert total.bops + total.flops == both.total.bops + both.total.flops
    assert bool(total.binary_macs) == (signs and weights)
    assert (total.bops > 0) == (total.bit_parameters > 0) == weights
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert sum(summary.stays_float.values()) == total.float_parameters
    assert (summary.stays_float["real"] > 0) == (not weights)
    assert not summary.uncounted


def test_matrices_whose_work_is_unknown_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 4, 2)
            self.spare = BinaryConv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.token = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.norm(self.up(x))

    model = Odd()
    summary = summarize(model, (5, 5))
    assert summary.uncounted == ("up (ConvTranspose2d)", "spare (BinaryConv2d)")
    assert [(row.path, row.call, row.bops) for row in summary.layers] == [("spare", 0, 0)]
    assert summary.total.bit_parameters == 108
    assert summary.total.parameters == sum(p.numel() for p in model.parameters())
    assert "NOT COUNTED  MACs of up (ConvTranspose2d), spare (BinaryConv2d)" in summary.table()


@pytest.mark.parametrize("arguments", [((0, 5), 3), ((5, 5), 0), ((5,), 3), ((5.0, 5), 3), ((5, 5), 4), ((2, 2), 3)])
def test_an_image_that_cannot_be_is_an_error(arguments):
    with pytest.raises(BnnfreeError, match="summarize: "):
        summarize(nn.Conv2d(3, 4, 3), *arguments)


def test_a_lazy_layer_is_an_error_that_says_what_to_do():
    with pytest.raises(BnnfreeError, match="1.weight has no shape yet. Run one batch"):
        summarize(nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), (5, 5))


def test_table_and_dict_agree():
    summary = summarize(MODELS["reactnet20"](10, norm="bn"), (33, 31))
    lines = summary.table().split("\n")
    assert lines[0].split()[:4] == ["layer", "type", "input", "output"]
    rows = lines[2 : 2 + len(summary.layers)]
    assert [line.split()[0] for line in rows] == [layer.path for layer in summary.layers]
    assert {len(line) for line in rows} == {len(lines[0])} == {len(lines[1])}
    total = summary.total
    (bottom,) = (line for line in lines if line.startswith("total"))
    counts = (total.bit_parameters, total.float_parameters, total.bytes, total.binary_macs, total.mixed_macs)
    assert bottom.split() == ["total", *(f"{n:,}" for n in (*counts, total.float_macs))]
    assert any(line.startswith("OPs") and f"{total.ops:,.0f}" in line for line in lines)
    back = json.loads(json.dumps(summary.to_dict()))
    assert back["total"]["ops"] == total.ops and back["image"] == [3, 33, 31]
    for key in ("bit_parameters", "float_parameters", "bytes", "binary_macs", "mixed_macs", "float_macs"):
        assert sum(row.get(key, 0) for row in back["layers"] + back["groups"]) == back["total"][key]
    assert {group["type"]: group["count"] for group in back["groups"]} == {
        "RSign": 18,
        "RPReLU": 18,
        "BatchNorm2d": 21,
    }


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run tools/summary.py in this process: the lines it prints."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["summary.py", *map(str, arguments)])
        monkeypatch.syspath_prepend(str(ROOT / "tools"))
        runpy.run_path(str(ROOT / "tools" / "summary.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return call


def ops_in(lines: list[str]) -> str:
    return next(line.split()[1] for line in lines if line.startswith("OPs "))


RECIPE = """
model: {name: reactnet_a, binarize: none}
data: {name: imagenet}
stages: [{epochs: 1, binarize: activations}, {epochs: 1, binarize: both}]
"""


@pytest.mark.thorough
def test_tool_takes_the_last_stage_without_data(tool, tmp_path):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(RECIPE)
    lines = tool(recipe, "--json", tmp_path / "deep" / "a.json")
    assert ops_in(lines) == "87,126,016"
    assert lines[-1] == str(tmp_path / "deep" / "a.json")
    written = json.loads(Path(lines[-1]).read_text())
    assert (written["model"], written["binarize"], written["classes"]) == ("reactnet_a", "both", 1000)
    assert written["total"]["ops"] == 87_126_016
    changes = ["model.name=reactnet18", "model.shortcut=real", "data.name=cifar10"]
    assert ops_in(tool(recipe, *changes)) == "16,618,496"
    # stem auto takes the larger one, and 10 classes spare 990 rows of the head
    assert ops_in(tool(recipe, *changes, "--image-size", 224)) == f"{163_985_408 - 512 * 990:,}"


def test_tool_takes_a_run_folder_and_refuses_to_change_it(tool, tmp_path, capsys):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(RECIPE)
    names = ["model.name=reactnet20", "model.width=0.5", "data.name=fake"]
    resolved = load_recipe(recipe, names, MODELS)
    options = resolved.model.model_dump(exclude={"name", "stem", "binarize"})
    model = MODELS["reactnet20"](10, **options)
    data = {"classes": [str(i) for i in range(10)], "channels": 3, "image_size": [32, 32]}
    data |= {"mean": [0.5] * 3, "std": [0.2] * 3}
    state = {"recipe": resolve(resolved, data).model_dump(), "open": [], "data": data, "binarize": "both", "ema": None}
    save_checkpoint(tmp_path / "run" / "best.pt", {**state, "model": model.state_dict()})
    expected = f"{summarize(model, (32, 32)).total.ops:,.0f}"
    assert expected == ops_in(tool(tmp_path / "run")) == ops_in(tool(recipe, *names))
    assert ops_in(tool(tmp_path / "run" / "best.pt", "--image-size", 16)) != expected
    with pytest.raises(SystemExit) as stop:
        tool(tmp_path / "run", "model.width=1")
    assert stop.value.code == 2
    assert "expected no key=value" in capsys.readouterr().err


def test_tool_help_shows_commands_without_loading_torch():
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / "summary.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "examples:" in done.stdout
    assert " torch\n" not in done.stderr
