"""The README does what it says: its Python runs, its commands parse and run (shrunk, where they train long)."""

import configparser
import re
import shlex

import pytest
from helpers import ROOT
from test_tools import images, tool  # noqa: F401

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
SHRUNK = ("model.width=0.1", "stages=[{epochs: 1}]", "data.augment=[]", "free.calibration=8")


def test_the_python_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names: dict = {}
    exec(code, names)
    assert names["loss"].isfinite()


def test_the_first_two_commands_are_the_set_up_commands():
    assert COMMANDS[:2] == [
        'pip install -e ".[train]" && python tools/train.py recipes/reactnet_nobn.yaml',
        'pip install -e ".[test]" && python -m pytest',
    ]
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    assert {"train", "test"} <= set(setup["options.extras_require"])


def test_every_tool_command_runs(tool, tmp_path, images, monkeypatch):  # noqa: F811
    """In the README's order, each in one folder, so that --resume and evaluate find what was trained before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    lines = [re.sub(r"^.*(python|torchrun [^/]*?) (?=tools/)", "", line) for line in COMMANDS if "tools/" in line]
    assert len(lines) >= 6
    for line in lines:
        name, *arguments = shlex.split(line.replace("FOLDER", str(images)))
        name = name.removeprefix("tools/").removesuffix(".py")
        if name == "train":
            if "image_folder" not in line and "nobn" not in line:
                arguments += ["data.name=fake", "data.samples=24", "data.image_size=9"]
            if "nobn" in line:
                arguments += ["data.val_fraction=0.9", "data.batch_size=128"]
            out = [] if "--out" in line else ["--out", "runs/reactnet_nobn" if "nobn" in line else f"runs/{len(line)}"]
            arguments += [*SHRUNK, *out]
        code, _, errors = tool(name, *arguments)
        assert code == 0, f"{line}: {errors}"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", TEXT))
def test_every_link_leads_somewhere(link):
    assert (ROOT / link).exists()
