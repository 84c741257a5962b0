"""The README does what it says: its Python runs, its commands parse and run (shrunk, where they train long)."""

import configparser
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from test_published import THEIRS, make_file, save
from test_tools import images, tool  # noqa: F401

from bnnfree.export import pack
from bnnfree.export.verify import sample_images, verify
from bnnfree.format import read
from bnnfree.train.report import Report

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
SHRUNK = ("model.width=0.1", "stages=[{epochs: 1}]", "data.augment=[]")
BUILD = """
import torch

def build():
    torch.manual_seed(0)
    net = Small()
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:  # at their start, sums of signs lie on thresholds
            torch.nn.init.normal_(parameter, 0.5, 0.2)
    return net
"""


def test_the_python_examples_run(tmp_path, monkeypatch):
    """In order, as scripts in one folder; what each leaves is what its text says."""
    monkeypatch.chdir(tmp_path)
    use, own, train = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names: dict = {}
    exec(own, names)
    packed = pack(names["net"], image_size=(24, 32), mean=0.5, std=0.25)
    assert verify(packed, read(tmp_path / "small.bnnf"), sample_images((24, 32, 3), 20)).equal
    (tmp_path / "small.bnnf").rename("model.bnnf")
    exec(use, names)
    assert names["logits"].shape == (1, 2) and names["logits"].dtype == np.float32
    exec(train, names)
    assert names["loss"].isfinite()


def test_the_first_two_commands_are_the_set_up_commands():
    assert COMMANDS[:2] == [
        'pip install -e ".[train]" && python tools/train.py recipes/reactnet_nobn.yaml',
        'pip install -e ".[test]" && python -m pytest',
    ]
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    assert {"train", "test"} <= set(setup["options.extras_require"])


@pytest.mark.thorough
def test_every_tool_command_runs(tool, tmp_path, images, monkeypatch):  # noqa: F811
    """In the README's order, each in one folder, so that --resume and evaluate find what was trained before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Report, "draw", lambda self: None)  # test_train.py draws
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    save(tmp_path / "file.pth.tar", make_file(THEIRS["ReActNet/resnet/2_step2"], 8, seed=0))
    own = re.findall(r"```python\n(.*?)```", TEXT, re.S)[1].split("net = Small()")[0]
    (tmp_path / "net.py").write_text(own + BUILD)
    lines = [re.sub(r"^.*(python|torchrun [^/]*?) (?=tools/)", "", line) for line in COMMANDS if "tools/" in line]
    assert len(lines) >= 6
    for line in lines:
        line = line.replace("FILE.pth.tar", "file.pth.tar").replace("IMAGE", str(next(images.rglob("*.png"))))
        line = line.replace("--samples 256", "--samples 16")
        name, *arguments = shlex.split(line.replace("FOLDER", str(images)))
        name = name.removeprefix("tools/").removesuffix(".py")
        if name == "train":
            if "image_folder" not in line and "nobn" not in line:
                arguments += ["data.name=fake", "data.samples=24", "data.image_size=9"]
            if "nobn" in line:
                arguments += ["data.val_fraction=0.9", "data.batch_size=128"]
            out = [] if "--out" in line else ["--out", "runs/reactnet_nobn" if "nobn" in line else f"runs/{len(line)}"]
            file = Path(arguments[0])
            free = "model.norm" not in line and file.exists() and "norm: free_paper" not in file.read_text()
            arguments += [*SHRUNK, *(["free.calibration=8"] if free else []), *out]
        if name == "sweep":
            arguments += ["grid.norm={bn: {model.norm: bn}}", "grid.data.batch_size=[4]", "seeds=2"]
        code, _, errors = tool(name, *arguments)
        assert code == 0, f"{line}: {errors}"


SIZES = re.findall(r"\| ([\d,]{9,}) \| ([\d,]{9,}) \| `(\w+\.yaml)` \|", TEXT)
PRICES = dict(re.findall(r"^\| `(\w+)` \| [\d,]+ \| ([\d,]+) \|", TEXT, re.M))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("recipe", "packed", "floats", "changes"),
    [(recipe, packed, floats, []) for packed, floats, recipe in SIZES]
    + [("cifar10_reactnet18.yaml", PRICES[norm], None, [f"model.norm={norm}"]) for norm in ("free", "gn_pn")],
)
def test_sizes_are_those_of_today(tool, recipe, packed, floats, changes):  # noqa: F811
    """To the byte: a file holds the network alone, so only a change of the format or the exporter moves them."""
    assert len(SIZES) == 3 and len(PRICES) == 17
    code, out, errors = tool("summary", ROOT / "recipes" / recipe, *changes)
    assert code == 0, errors
    assert f"packed file  {packed} bytes" in out
    assert floats is None or f"; {floats} if all were float" in out


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()
