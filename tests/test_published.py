"""Published checkpoints become networks of ours that compute the same function, or an error that names the key.

The networks of the two repositories are written down twice here, from their facts and without their code: as
the keys and shapes that their files hold (`layout`), and as a function of such a file (`their_logits`).
"""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from test_tools import tool  # noqa: F401

from bnnfree.convert.published import VARIANTS, read_published
from bnnfree.errors import BnnfreeError, CheckpointError, UnknownNameError
from bnnfree.models import MODELS
from bnnfree.nn import NORMS, SCALES, BinaryConv2d, Design, ScaledStdConv2d
from bnnfree.train import load_model
from bnnfree.train.checkpoint import save_checkpoint
from bnnfree.train.start import convert_published

CLASSES = 5
ALPHA = 0.2
WIDTHS_A = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
RESETS_A = (2, 4, 6, 12)  # features of stride 2
CONV = ("binary_conv", "binary_3x3", "binary_pw")  # how the names of their binary convolutions begin

# variant -> architecture, norm, 1-bit block weights, 1-bit shortcuts, blocks' weights stored flat, stem kernel
THEIRS = {
    "ReActNet/mobilenet/1_step1": ("A", "bn", False, False, False, 3),
    "ReActNet/mobilenet/2_step2": ("A", "bn", True, False, True, 3),
    "ReActNet/resnet/1_step1": ("18", "bn", False, False, False, 7),
    "ReActNet/resnet/2_step2": ("18", "bn", True, False, False, 7),
    **{
        f"BNN_NoBN/{stage}_reactnet_{arch}_{norm}": (arch, norm, stage == "Qaw", stage == "Qaw", False, kernel)
        for arch, kernel in (("A", 3), ("18", 7))
        for norm in ("bf", "bn", "none")
        for stage in ("Qa", "Qaw")
    },
}
CASES = {
    **{name: (name, facts) for name, facts in THEIRS.items()},
    **{f"{k}, 3x3 stem": (k, (*v[:5], 3)) for k, v in THEIRS.items() if v[0] == "18" and k.startswith("BNN")},
    "ReActNet/resnet/2_step2, flat": ("ReActNet/resnet/2_step2", ("18", "bn", True, False, True, 7)),
}


@pytest.fixture
def double():
    """Everything built in float64, alpha and beta included."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def layout(facts, base, classes=CLASSES):
    """Key -> shape of a file of theirs whose stem has `base` channels, less the prefix of DataParallel."""
    arch, norm, _, _, flat, kernel = facts
    shapes = {}

    def conv(name, cout, cin, k):
        block = name.split(".")[-1].startswith(CONV)
        if flat and block:
            shapes[f"{name}.weights"] = (cout * cin * k * k, 1)
        else:
            shapes[f"{name}.weight"] = (cout, cin, k, k)
        if norm == "bf":
            shapes[f"{name}.gain"] = (cout, 1, 1, 1)

    def bn(name, c):
        if norm == "bn":
            shapes.update({f"{name}.{k}": (c,) for k in ("weight", "bias", "running_mean", "running_var")})
            shapes[f"{name}.num_batches_tracked"] = ()

    def move(name, c):
        shapes[f"{name}.bias"] = (1, c, 1, 1)

    if arch == "A":
        widths = [w // 32 * base for w in WIDTHS_A]
        conv("feature.0.conv1", base, 3, kernel)
        bn("feature.0.bn1", base)
        for i, (cin, cout) in enumerate(zip(widths, widths[1:], strict=False), 1):
            at = f"feature.{i}."
            for name in ("move11", "move12", "move13", "move21", "move22", "move23"):
                move(at + name, cout if name > "move21" else cin)
            shapes[at + "prelu1.weight"], shapes[at + "prelu2.weight"] = (cin,), (cout,)
            conv(at + "binary_3x3", cin, cin, 3)
            bn(at + "bn1", cin)
            for convolution, norm_name in (
                [("binary_pw", "bn2")] if cin == cout else [("binary_pw_down1", "bn2_1"), ("binary_pw_down2", "bn2_2")]
            ):
                conv(at + convolution, cin, cin, 1)
                bn(at + norm_name, cin)
    else:
        widths = [base << (n // 4) for n in range(16)]
        conv("conv1", base, 3, kernel)
        bn("bn1", base)
        for n, (cin, cout) in enumerate(zip([base, *widths], widths, strict=False)):
            at = f"layer{n // 4 + 1}.{n % 4}."
            for name, c in (("move0", cin), ("move1", cout), ("move2", cout)):
                move(at + name, c)
            shapes[at + "prelu.weight"] = (cout,)
            conv(at + "binary_conv", cout, cin, 3)
            bn(at + "bn1", cout)
            if cin != cout:
                conv(at + "downsample.1", cout, cin, 1)
                bn(at + "downsample.2", cout)
    shapes["fc.weight"], shapes["fc.bias"] = (classes, widths[-1]), (classes,)
    return shapes


def make_file(facts, base, seed, classes=CLASSES):
    """A state dict of that layout with random values everywhere, each of a plausible size."""
    print(f"seed {seed}")
    random = torch.Generator().manual_seed(seed)

    def value(key, shape):
        noise = torch.randn(shape, generator=random)
        if key.endswith("num_batches_tracked"):
            return torch.tensor(7)
        if key.endswith(("running_var", "gain")) or ("bn" in key or "downsample.2" in key) and key.endswith("weight"):
            return noise.abs() + 0.5
        if "prelu" in key:
            return 0.25 + 0.1 * noise
        if key.endswith((".weight", ".weights")):
            return noise / math.sqrt(math.prod(shape[1:]) if key.endswith(".weight") else 100) + 0.01
        return 0.3 * noise

    return {key: value(key, shape) for key, shape in layout(facts, base, classes).items()}


def sign(x):
    return torch.where(x < 0, -1.0, 1.0).to(x.dtype)


def their_conv(file, name, x, norm, one_bit, stride=1, shape=None):
    """The convolution `name`; a flat weight has `shape`."""
    w = file[f"{name}.weight"] if f"{name}.weight" in file else file[f"{name}.weights"].reshape(shape)
    if norm == "bf":
        mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), correction=0, keepdim=True)
        w = (w - mean) / (std + 1e-5) / math.sqrt(w[0].numel())
    if one_bit:
        w = sign(w) * w.abs().mean((1, 2, 3), keepdim=True)
    if norm == "bf":
        w = file[f"{name}.gain"] * w
    return F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2)


def their_bn(file, name, x):
    if f"{name}.weight" not in file:
        return x
    keys = ("running_mean", "running_var", "weight", "bias")
    mean, var, gain, bias = (file[f"{name}.{key}"].view(1, -1, 1, 1) for key in keys)
    return (x - mean) / (var + 1e-5).sqrt() * gain + bias


def their_act(file, move1, prelu, move2, x):
    x = x + file[f"{move1}.bias"]
    return torch.where(x > 0, x, x * file[f"{prelu}.weight"].view(1, -1, 1, 1)) + file[f"{move2}.bias"]


def factors(norm, arch):
    """alpha, and beta of every unit, as the released code counts them up."""
    if norm != "bf":
        return 1.0, [1.0] * 26
    betas, var = [], 1.0
    if arch == "18":
        for n in range(16):
            betas.append(var**-0.5)
            var = 1.0 if n % 4 == 0 else var + ALPHA**2  # a stage's first block adds nothing
        return ALPHA, betas
    for i in range(1, 14):
        betas += [var**-0.5, (var + ALPHA**2) ** -0.5]
        var = 1.0 if i in RESETS_A else var + 2 * ALPHA**2
    return ALPHA, betas


def their_logits(file, facts, x):
    arch, norm, one_bit, one_bit_shortcut, _, _ = facts
    alpha, betas = factors(norm, arch)
    if arch == "A":
        x = their_bn(file, "feature.0.bn1", their_conv(file, "feature.0.conv1", x, norm, False, 2))
        for i in range(1, 14):
            at, stride, c = f"feature.{i}.", 2 if i in RESETS_A else 1, x.shape[1]
            u = x * betas[2 * i - 2]
            s = sign(u + file[at + "move11.bias"])
            h = their_conv(file, at + "binary_3x3", s, norm, one_bit, stride, (c, c, 3, 3))
            h = alpha * their_bn(file, at + "bn1", h) + (F.avg_pool2d(u, 2) if stride == 2 else x)
            x = their_act(file, at + "move12", at + "prelu1", at + "move13", h)
            s = sign(x * betas[2 * i - 1] + file[at + "move21.bias"])
            pairs = [("binary_pw", "bn2"), ("binary_pw_down1", "bn2_1"), ("binary_pw_down2", "bn2_2")]
            halves = [
                x + alpha * their_bn(file, at + bn, their_conv(file, at + conv, s, norm, one_bit, shape=(c, c, 1, 1)))
                for conv, bn in pairs
                if any(key.startswith(f"{at}{conv}.") for key in file)
            ]
            x = their_act(file, at + "move22", at + "prelu2", at + "move23", torch.cat(halves, 1))
    else:
        large = file["conv1.weight"].shape[-1] == 7
        x = their_bn(file, "bn1", their_conv(file, "conv1", x, norm, False, 2 if large else 1))
        x = F.max_pool2d(x, 3, 2, 1) if large else x
        for n in range(16):
            at, u = f"layer{n // 4 + 1}.{n % 4}.", x * betas[n]
            stride, cout = 2 if n in (4, 8, 12) else 1, file[f"layer{n // 4 + 1}.{n % 4}.move1.bias"].shape[1]
            shape = (cout, x.shape[1], 3, 3)
            h = their_conv(file, at + "binary_conv", sign(u + file[at + "move0.bias"]), norm, one_bit, stride, shape)
            h = alpha * their_bn(file, at + "bn1", h)
            if stride == 2:
                x = their_conv(file, at + "downsample.1", F.avg_pool2d(u, 2), norm, one_bit_shortcut)
                x = their_bn(file, at + "downsample.2", x)
            x = their_act(file, at + "move1", at + "prelu", at + "move2", h + x)
    return x.mean((2, 3)) @ file["fc.weight"].T + file["fc.bias"]


def narrow(facts):
    return 8 if facts[0] == "A" else 16


def save(path, file, wrap=True, parallel=True, **more):
    file = {f"module.{key}" if parallel else key: value for key, value in file.items()}
    torch.save({"epoch": 3, "state_dict": file, "best_top1_acc": torch.tensor(69.5), **more} if wrap else file, path)
    return path


def converted(path, variant=None):
    """The network of ours that a file becomes, by way of a checkpoint, and what that holds."""
    out = path.with_name("converted.pt")
    save_checkpoint(out, convert_published(path, MODELS, variant=variant))
    return load_model(out, MODELS)


def test_the_table_here_has_every_variant():
    assert set(THEIRS) == set(VARIANTS)


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", CASES)
def test_a_published_network_computes_the_same_function_here(double, tmp_path, case):
    variant, facts = CASES[case]
    file = make_file(facts, narrow(facts), seed=len(case))
    path = save(tmp_path / "x.pth.tar", file, wrap=len(case) % 3 > 0, parallel=len(case) % 2 == 0)
    model, state = converted(path, variant)
    large = facts[0] == "A" or facts[5] == 7
    sides = (32, 64) if large else (8, 16)
    images = torch.randn(3, 3, *sides, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        ours, theirs = model(images), their_logits(file, facts, images)
    assert ours.shape == (3, CLASSES) and theirs.std(0).min() > 1e-3, "a network that does not look at its images"
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()
    assert state["recipe"]["model"]["stem"] == ("imagenet" if large else "cifar")
    assert state["published"]["variant"] == variant
    assert all(value == 7 for key, value in state["model"].items() if key.endswith("num_batches_tracked"))


@pytest.mark.parametrize(
    "others",
    [
        ["BNN_NoBN/Qa_reactnet_A_bf", "BNN_NoBN/Qaw_reactnet_A_bf"],
        ["ReActNet/resnet/1_step1", "ReActNet/resnet/2_step2", "BNN_NoBN/Qaw_reactnet_18_bn"],
    ],
)
def test_files_that_look_the_same_are_other_functions_so_the_variant_must_be_said(double, tmp_path, others):
    file = make_file(THEIRS[others[0]], narrow(THEIRS[others[0]]), seed=1)
    path = save(tmp_path / "x.pth.tar", file, optimizer={"param_groups": [{"weight_decay": 0}, {"weight_decay": 1e-5}]})
    with pytest.raises(CheckpointError, match=r"--variant NAME.* weight decay is 1e-05") as caught:
        convert_published(path, MODELS)
    assert all(name in str(caught.value) for name in others) and len(str(caught.value).splitlines()) == 1
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = [converted(path, name)[0](images) for name in others]
    for i, a in enumerate(logits):
        assert all((a - b).abs().max() > 1e-3 for b in logits[:i])


def test_flat_weights_tell_the_variant_at_full_width(tmp_path):
    facts = THEIRS["ReActNet/mobilenet/2_step2"]
    file = {key: torch.zeros(shape) for key, shape in layout(facts, 32, 1000).items()}
    state = convert_published(save(tmp_path / "x.pth.tar", file, parallel=False), MODELS)
    assert state["published"] == {"variant": "ReActNet/mobilenet/2_step2", "file": "x.pth.tar"}
    assert state["recipe"]["model"]["width"] == 1 and state["recipe"]["data"]["name"] == "imagenet"
    assert state["data"]["image_size"] == [224, 224] and len(state["data"]["classes"]) == 1000


DAMAGE = [
    ("BNN_NoBN/Qaw_reactnet_18_bf", "layer2.0.downsample.1.gain"),
    ("BNN_NoBN/Qaw_reactnet_18_bf", "conv1.weight"),
    ("BNN_NoBN/Qa_reactnet_A_none", "feature.1.prelu1.weight"),
    ("BNN_NoBN/Qa_reactnet_A_bn", "feature.7.binary_pw.weight"),
    ("ReActNet/mobilenet/2_step2", "feature.4.binary_pw_down2.weights"),
    ("ReActNet/mobilenet/2_step2", "feature.12.bn2_1.num_batches_tracked"),
    ("ReActNet/resnet/2_step2", "layer4.3.bn1.running_var"),
    ("ReActNet/resnet/1_step1", "fc.weight"),
    ("ReActNet/resnet/1_step1", "fc.bias"),
    ("ReActNet/mobilenet/1_step1", "feature.0.conv1.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("variant", "key"), DAMAGE)
def test_a_key_that_is_missing_unknown_or_misshapen_is_named(tmp_path, variant, key):
    file = make_file(THEIRS[variant], narrow(THEIRS[variant]), seed=3)
    shape = list(file[key].shape) or [1]
    shape[0 if len(shape) == 4 else -1] += 1
    bad = {
        "1 missing": {k: v for k, v in file.items() if k != key},
        "1 unexpected": {**file, "extra.gain": torch.zeros(1)},
        "1 other shape": {**file, key: torch.ones(shape)},
    }
    for what, damaged in bad.items():
        with pytest.raises(CheckpointError) as caught:
            convert_published(save(tmp_path / "x.pth.tar", damaged), MODELS, variant=variant)
        message = str(caught.value)
        assert "x.pth.tar" in message and what in message and ("extra.gain" if "unex" in what else key) in message
        assert len(message.splitlines()) == 1


QAW = "BNN_NoBN/Qaw_reactnet_18_bf"
FLAT = (*THEIRS[QAW][:4], True, 7)  # as theirs never are
OTHERS = {
    # what it is: change to a file of Qa_reactnet_18_bf, variant, error, words in its message
    "another variant": ({}, "BNN_NoBN/Qa_reactnet_18_bn", CheckpointError, ["Qa_reactnet_18_bn", QAW]),
    "a misspelt variant": ({}, "BNN_NoBN/Qa_reactnet_18_bg", UnknownNameError, ["Did you mean"]),
    "34 layers": (
        {"layer1.4.move0.bias": (1, 16, 1, 1)},
        QAW,
        CheckpointError,
        ["1 unexpected", "layer1.4.move0.bias"],
    ),
    "no multiple of 8": (
        layout(THEIRS[QAW], 12),
        QAW,
        CheckpointError,
        ["conv1.weight [12, 3, 7, 7] for [16, 3, 7, 7]"],
    ),
    "flat": (layout(FLAT, 16), None, CheckpointError, ["bf", "stored as 'weights'"]),
    "a vector for a head": ({"fc.weight": (5,)}, QAW, CheckpointError, ["1 other shape", "fc.weight [5]"]),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_network_or_variant_is_refused_in_one_line(tmp_path, what):
    change, variant, error, words = OTHERS[what]
    file = {key: torch.zeros(shape) for key, shape in {**layout(THEIRS[QAW], 16), **change}.items()}
    path = save(tmp_path / "x.pth.tar", file)
    with pytest.raises(error) as caught:
        convert_published(path, MODELS, variant=variant)
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) == 1


def test_a_network_of_neither_repository_is_refused(tmp_path):
    file = {"conv1.weight": torch.zeros(2), "layer5.0.weight": torch.zeros(2)}
    with pytest.raises(CheckpointError, match="conv1.weight.*liuzechun/ReActNet"):
        convert_published(save(tmp_path / "x.pth.tar", file), MODELS)


def test_a_file_with_more_than_weights_is_refused_with_a_remedy_that_works(tmp_path):
    file = make_file(THEIRS["BNN_NoBN/Qa_reactnet_18_none"], 8, seed=7)
    path = save(tmp_path / "x.pth.tar", file, best=np.float64(3.0))
    with pytest.raises(CheckpointError, match="weights_only=False") as caught:
        read_published(path)
    remedy = str(caught.value)[str(caught.value).index("torch.save(") :].rstrip(".")
    new = tmp_path / "new.pth.tar"
    exec(remedy, {"torch": torch, "FILE": path, "NEW": new})
    assert {k: v.shape for k, v in read_published(new)[0].items()} == {k: v.shape for k, v in file.items()}


def test_files_of_old_torch_are_read(tmp_path):
    file = make_file(THEIRS["BNN_NoBN/Qa_reactnet_18_none"], 8, seed=7)
    torch.save({"state_dict": file}, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=False)
    assert read_published(tmp_path / "x.pth.tar")[0].keys() == file.keys()


WRITERS = {
    "text": lambda p: p.write_text("hello"),
    "empty": lambda p: p.write_bytes(b""),
    "half a zip": lambda p: p.write_bytes(b"PK\x03\x04" + bytes(99)),
    "a list": lambda p: torch.save([1, 2, 3], p),
    "no tensors": lambda p: torch.save({"state_dict": {"conv1.weight": 3}}, p),
    "no weights": lambda p: torch.save({}, p),
    "a folder": lambda p: p.mkdir(),
    "nothing": lambda p: None,
}


@pytest.mark.parametrize("content", WRITERS)
def test_what_is_no_state_dict_exits_2_with_one_line_and_writes_nothing(tool, tmp_path, content):  # noqa: F811
    WRITERS[content](tmp_path / "x.pth.tar")
    code, printed, errors = tool("convert", tmp_path / "x.pth.tar", "-o", tmp_path / "out.pt")
    assert code == 2 and printed == "" and "x.pth.tar" in errors and len(errors.strip().splitlines()) == 1, errors
    assert not (tmp_path / "out.pt").exists()


def test_a_converted_file_is_a_checkpoint_that_the_tools_take(tool, tmp_path):  # noqa: F811
    variant = "BNN_NoBN/Qaw_reactnet_18_bf"
    path = save(tmp_path / "x.pth.tar", make_file(THEIRS[variant], 8, seed=8))
    names, out = tmp_path / "names.txt", tmp_path / "out.pt"
    names.write_text("".join(f"class{i}\n" for i in range(CLASSES)) + "\n")
    options = ("--variant", variant, "--classes", names, "--image-size", 33)
    code, printed, errors = tool("convert", path, "-o", out, *options)
    assert code == 0 and printed.splitlines()[-1] == str(out), errors
    assert variant in printed and "width 0.125" in printed and "norm free_paper" in printed
    code, printed, errors = tool("summary", out, "--json", tmp_path / "s.json")
    assert code == 0, errors
    about = json.loads((tmp_path / "s.json").read_text())
    assert about["binarize"] == "both" and about["classes"] == CLASSES
    fake = ("data.name=fake", f"data.classes={CLASSES}", "data.samples=20", "data.image_size=33")
    code, _, errors = tool("evaluate", out, *fake)
    assert code == 0, errors
    model, state = load_model(out, MODELS)
    assert state["data"]["classes"] == names.read_text().split() and state["data"]["image_size"] == [33, 33]
    for arguments, word in [
        (("-o", tmp_path / "out.pth"), ".pt"),
        (("-o", out, "--classes", tmp_path / "none.txt"), "--classes"),
        (("-o", out, "--classes", ROOT / "setup.py"), "names of classes"),
        (("-o", out, "--image-size", 0), "image_size"),
    ]:
        code, _, errors = tool("convert", path, *arguments, "--variant", variant)
        assert code == 2 and word in errors and len(errors.strip().splitlines()) == 1, errors


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("norm", NORMS)
def test_scale_sets_the_size_of_binary_weights_and_nothing_else(norm, scale):
    own, design = Design(norm=norm), Design(norm=norm, scale=scale)
    for block in (design.make_conv(8, 16, 3), design.make_shortcut(8, 16)[0]):
        assert isinstance(block, BinaryConv2d) and block.scale_rule == scale
    assert own.make_conv(8, 16, 3).scale_rule == NORMS[norm].scale
    assert {**design.binary_options, "scale": ""} == {**own.binary_options, "scale": ""}
    assert isinstance(design.make_stem(3, 8, 3, 1)[0], ScaledStdConv2d)
    with pytest.raises(BnnfreeError, match="scale: got 'mean'"):
        Design(scale="mean")
