"""Commands that the texts show: the tool is there, takes these arguments, and the recipe has these keys."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from bnnfree.commands import cli
from bnnfree.convert.published import VARIANTS
from bnnfree.models import MODELS
from bnnfree.recipe.read import load_recipe
from bnnfree.sweep.file import read_sweep

TEXTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("recipes/*.md"))]
TEXTS += sorted(
    str(p.relative_to(ROOT)) for folder in ("docs", "models", "bnnfree") for p in ROOT.glob(f"{folder}/**/*.md")
)
TEXTS += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("bnnfree/commands/*.py"))
TEXTS += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("recipes/**/*.yaml"))
START = re.compile(r"(?:python|torchrun)\s(?:[^`\n;&|]*\s)?(?=tools/\w+\.py)")
FOR_ANY = {  # what stands for something of the user's -> one such
    "DATA": "data.name=image_folder data.root=DATA", "RECIPE": "recipes/cifar10_reactnet20.yaml", "N": "2",
    "SOURCE": "recipes/cifar10_reactnet20.yaml", "...": "layers", "$norm": "bn", "model.norm=$norm": "model.norm=bn",
    "runs/c10_r18_$norm": "runs/c10_r18_bn",
}  # fmt: skip


class Read(BaseException):
    """The arguments that a tool was given, instead of its work."""


def commands_of(text: str) -> list[str]:
    """The commands of a text, each on one line: of code blocks with their continued lines, and between backticks."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```\w*\n.*?^```", "", text, flags=re.M | re.S))
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"^(?:# ?)? {2,}((?:python|torchrun) .*)$", text, re.M)  # a block that is indented
    lines += [" ".join(code.replace("\n#", "\n").split()) for code in inline]
    found = [line[match.end() :] for line in lines for match in START.finditer(line)]
    return list(dict.fromkeys(re.split(r"\s(?:&&|\||;|>>?|#)\s|`|;$", line)[0].strip() for line in found))


def arguments_of(command: str) -> tuple[str, list[str]]:
    """The tool's name and its arguments, with something in the place of what stands for anything."""
    tool, *words = shlex.split(command)
    words = [part for word in words for part in shlex.split(FOR_ANY.get(word, shlex.quote(word)))]
    return Path(tool).stem, words


def parsed(monkeypatch, tool: str, arguments: list[str]):
    """What the tool reads of its command line; it ends there."""

    def stop(parser, **_):
        raise Read(parser.parse_intermixed_args())

    monkeypatch.setattr(cli.Parser, "read", stop)
    monkeypatch.setattr(sys, "argv", [f"tools/{tool}.py", *arguments])
    with pytest.raises(Read) as caught:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    return caught.value.args[0]


def check(monkeypatch, command: str) -> None:
    """Errors where the command could not run for its tool, arguments, recipe or keys."""
    tool, arguments = arguments_of(command)
    if tool in ("gen_format", "NAME"):
        return  # a tool of the developers, which reads its arguments itself
    args = vars(parsed(monkeypatch, tool, arguments))
    overrides = args.get("overrides") or []
    for name in ("recipe", "source", "sweep", "train", "data"):
        given = args.get(name)
        for path in [given] if isinstance(given, str) else given if isinstance(given, list) else []:
            if tool == "sweep":
                read_sweep(path, overrides, MODELS)
            elif path.startswith("recipes/"):
                load_recipe(path, overrides, MODELS)
    if tool == "convert" and args["variant"]:
        assert args["variant"] in VARIANTS


@pytest.mark.parametrize("name", TEXTS)
def test_commands_of_the_texts_are_valid(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    faults = []
    for command in commands_of((ROOT / name).read_text(encoding="utf-8")):
        try:
            check(monkeypatch, command)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            if name == "recipes/NOTES.md" and "this key is no more" in str(error):
                continue  # the notebook keeps what was run, of keys that its findings retired too
            faults.append(f"{command}\n    {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


def test_every_text_with_a_tool_has_its_commands_found():
    """As many as `tools/NAME.py` with an argument behind it occurs after python; a form that is not seen would pass."""
    for name in TEXTS[:4]:
        text = (ROOT / name).read_text(encoding="utf-8")
        spelt = {
            (m[1], m[2]) for m in re.finditer(r"python\s+(tools/\w+\.py)\s+([\w/.:-]+)", text.replace("\n#", "\n"))
        }
        found = {tuple(shlex.split(command)[:2]) for command in commands_of(text) if " " in command}
        assert spelt <= found, spelt - found


@pytest.mark.parametrize(
    "command",
    [
        "tools/nothing.py x", "tools/train.py recipes/none.yaml", "tools/train.py recipes/cifar10_mcu.yaml --shreds 3",
        "tools/train.py recipes/cifar10_mcu.yaml data.nme=x", "tools/sweep.py recipes/sweeps/free.yaml grid.x.y=[1]",
        "tools/price.py recipes/cifar10_mcu.yaml model.norm=[bn]", "tools/convert.py x -o y.pt --variant none",
    ],
)  # fmt: skip
def test_a_command_that_cannot_run_is_found(monkeypatch, command):
    monkeypatch.chdir(ROOT)
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)):
        check(monkeypatch, command)


@pytest.mark.parametrize("name", TEXTS)
def test_recipes_that_the_texts_name_are_there(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    gone = [path for path in re.findall(r"\brecipes/[\w/]+\.yaml", text) if not (ROOT / path).is_file()]
    assert gone == []
