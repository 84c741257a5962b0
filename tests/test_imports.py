"""Allowed imports between rooms: one table, checked against every import statement; and openings of docstrings."""

import ast
import graphlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STDLIB = set(sys.stdlib_module_names)
TORCH = {"torch"}
TRAIN = {"torch", "torchvision", "numpy", "yaml", "pydantic", "pydantic_core", "tqdm", "PIL", "sklearn", "matplotlib"}
TRAIN |= {"webdataset"}

# room -> packages outside the standard library that it may import, and rooms of ours
RULES: dict[str, tuple[set[str], set[str]]] = {
    "bnnfree": (set(), set()),
    "bnnfree.errors": (set(), set()),
    "bnnfree.names": (set(), set()),
    "bnnfree.normalisers": (set(), {"bnnfree.errors", "bnnfree.names"}),
    "bnnfree.files": (set(), {"bnnfree.errors"}),
    "bnnfree.library": (set(), set()),
    "bnnfree.console": (set(), {"bnnfree.errors"}),
    "bnnfree.shelf": (set(), set()),
    "bnnfree.progress": ({"tqdm"}, set()),
    "bnnfree.preprocess": ({"numpy", "PIL"}, {"bnnfree.errors"}),
    "bnnfree.ops": ({"numpy"}, {"bnnfree.errors"}),
    "bnnfree.format": ({"numpy"}, {"bnnfree.errors", "bnnfree.files", "bnnfree.ops"}),
    "bnnfree.engine": ({"numpy"}, {"bnnfree.errors", "bnnfree.library", "bnnfree.ops", "bnnfree.format"}),
    "bnnfree.nn": (TORCH, {"bnnfree.errors", "bnnfree.names", "bnnfree.normalisers", "bnnfree.library"}),
    "bnnfree.export": (
        {"torch", "numpy"},
        {"bnnfree", "bnnfree.errors", "bnnfree.files", "bnnfree.ops", "bnnfree.format", "bnnfree.nn"}
        | {"bnnfree.engine"},
    ),
    "bnnfree.export.onnx_maps": ({"numpy"}, {"bnnfree.format", "bnnfree.ops"}),
    "bnnfree.export.onnx": (
        {"numpy", "onnx"},
        {"bnnfree.errors", "bnnfree.files", "bnnfree.ops", "bnnfree.format", "bnnfree.export.onnx_maps"},
    ),
    "bnnfree.optim": (TORCH, {"bnnfree.errors", "bnnfree.nn"}),
    "bnnfree.analysis": (TORCH, {"bnnfree.errors", "bnnfree.nn"}),
    "bnnfree.data": (
        TRAIN,
        {"bnnfree.errors", "bnnfree.names", "bnnfree.files", "bnnfree.preprocess", "bnnfree.data.sizes"}
        | {"bnnfree.progress"},
    ),
    "bnnfree.data.sizes": (set(), set()),
    "bnnfree.recipe": (
        {"yaml", "pydantic", "pydantic_core"},
        {"bnnfree.errors", "bnnfree.names", "bnnfree.normalisers", "bnnfree.files", "bnnfree.data.sizes"},
    ),
    "bnnfree.train": (
        TRAIN,
        {"bnnfree", "bnnfree.errors", "bnnfree.names", "bnnfree.normalisers", "bnnfree.files", "bnnfree.nn"}
        | {"bnnfree.optim", "bnnfree.analysis", "bnnfree.preprocess", "bnnfree.recipe", "bnnfree.data"}
        | {"bnnfree.convert", "bnnfree.progress", "bnnfree.shelf"},
    ),
    "bnnfree.convert": (
        TORCH,
        {"bnnfree.errors", "bnnfree.recipe", "bnnfree.data", "bnnfree.nn"},
    ),
    "bnnfree.sweep": (
        TRAIN,
        {"bnnfree.errors", "bnnfree.names", "bnnfree.normalisers", "bnnfree.files", "bnnfree.recipe"}
        | {"bnnfree.train"},
    ),
    "bnnfree.models": (TORCH, {"bnnfree.errors", "bnnfree.nn"}),
    "bnnfree.bench": (
        {"numpy", "openvino", "onnxruntime", "torch", "torchvision", "PIL"},
        {"bnnfree.errors", "bnnfree.library", "bnnfree.ops", "bnnfree.format", "bnnfree.engine", "bnnfree.export.onnx"}
        | {"bnnfree.recipe", "bnnfree.data", "bnnfree.train", "bnnfree.analysis"}
        | {"bnnfree.console", "bnnfree.models", "bnnfree.nn", "bnnfree.optim"},
    ),
    "bnnfree.commands": (
        TRAIN,
        {"bnnfree", "bnnfree.errors", "bnnfree.files", "bnnfree.nn", "bnnfree.optim", "bnnfree.analysis"}
        | {"bnnfree.preprocess", "bnnfree.recipe", "bnnfree.data", "bnnfree.train", "bnnfree.convert", "bnnfree.sweep"}
        | {
            "bnnfree.names",
            "bnnfree.models",
            "bnnfree.shelf",
            "bnnfree.console",
            "bnnfree.progress",
            "bnnfree.ops",
            "bnnfree.format",
            "bnnfree.engine",
        }
        | {"bnnfree.export", "bnnfree.export.onnx", "bnnfree.bench"},
    ),
    "bnnfree.__main__": (set(), {"bnnfree.commands"}),
    "models": (set(), {"bnnfree.models"}),
    "tools": (
        {"numpy"},
        {"bnnfree", "bnnfree.console", "bnnfree.commands", "bnnfree.errors", "bnnfree.files", "bnnfree.format"},
    ),
}


def sources():
    for top in ("bnnfree", "models", "tools"):
        yield from sorted((ROOT / top).rglob("*.py"))


def room_of(module: str) -> str:
    """The row of RULES that a dotted module belongs to: the longest that is a prefix of it."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in RULES:
            return ".".join(parts[:n])
    return ""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, types=True):
    """Every dotted name that a file imports, wherever in it the statement stands; without what is for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    passed_over = set() if types else {id(node) for block in blocks for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in passed_over:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the house writes full names"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                place = ROOT / Path(*whole.split("."))
                yield whole if place.is_dir() or place.with_suffix(".py").exists() else node.module


def violations(module: str, names) -> list[str]:
    room = room_of(module)
    packages, rooms = RULES[room]
    found = []
    for name in names:
        top = name.split(".")[0]
        if top in ("bnnfree", "models", "tools"):
            if room_of(name) != room and room_of(name) not in rooms:
                found.append(f"{module} imports {name}")
        elif top not in STDLIB and top not in packages:
            found.append(f"{module} imports {name}")
    return found


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_file_imports_only_what_its_room_may(path):
    assert violations(module_of(path), imports(path)) == []


def test_every_folder_of_the_package_has_a_row():
    folders = {module_of(p.parent / "x").rsplit(".", 1)[0] for p in (ROOT / "bnnfree").rglob("*.py")}
    assert all(room_of(folder) != "bnnfree" for folder in folders - {"bnnfree"})  # a folder within a room is part of it


def test_no_file_imports_itself_through_others():
    names = {module_of(path): set(imports(path, types=False)) for path in sources()}
    graphlib.TopologicalSorter({name: found & names.keys() for name, found in names.items()}).prepare()


def test_the_rules_have_no_circle():
    ours = {room: rooms for room, (_, rooms) in RULES.items()}
    done: set[str] = set()
    while len(done) < len(ours):
        ready = {room for room in ours if room not in done and ours[room] <= done}
        assert ready, f"a circle among {set(ours) - done}"
        done |= ready


@pytest.mark.parametrize(
    ("module", "name"),
    [("bnnfree.nn.x", "bnnfree.train.loop"), ("bnnfree.errors", "torch"), ("models.x", "bnnfree.train"),
     ("bnnfree.optim.x", "yaml"), ("bnnfree.train.x", "models"), ("bnnfree.analysis.x", "bnnfree.train")],
)  # fmt: skip
def test_a_forbidden_edge_is_found(module, name):
    assert violations(module, [name]) == [f"{module} imports {name}"]


LIGHT = (
    "bnnfree",
    "bnnfree.errors",
    "bnnfree.names",
    "bnnfree.normalisers",
    "bnnfree.files",
    "bnnfree.library",
    "bnnfree.preprocess",
    "bnnfree.ops",
    "bnnfree.format",
    "bnnfree.recipe",
)


@pytest.mark.parametrize("module", [*LIGHT, "bnnfree.engine"])
def test_light_modules_pull_in_no_heavy_package(module):
    """Allowed packages that are not installed are mocked: what else a module pulls in is seen all the same."""
    may = RULES[module][0]
    heavy = {"torch", "torchvision", "yaml", "pydantic", "tqdm", "PIL", "numpy"} - may
    absent = [package for package in may if importlib.util.find_spec(package) is None]
    code = f"import sys, unittest.mock as m; sys.modules.update({{name: m.MagicMock() for name in {absent}}})\n"
    code += f"import {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("[!_]*.py")), ids=lambda p: p.name)
def test_a_tool_hides_no_standard_module_and_starts_with_the_path(path):
    assert path.stem not in STDLIB
    tree = ast.parse(path.read_text(encoding="utf-8"))
    first_ours = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.startswith("bnnfree")]
    moved = [n.lineno for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "sys.path[0]"]
    assert len(moved) == 1 and min(first_ours) > moved[0]


QUESTIONS = {"What", "How", "Which", "Where", "Who", "Whose", "Whether", "Why", "When"}


def questions(path: Path) -> list[str]:
    """Each docstring of a file that opens with a question word, with its line."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, documented)]
    said = [(node.body[0].lineno, ast.get_docstring(node)) for node in nodes if ast.get_docstring(node)]
    return [f"{path}:{line}: {text.split(chr(10))[0]}" for line, text in said if re.match(r"\w*", text)[0] in QUESTIONS]


def test_no_docstring_opens_with_a_question_word():
    assert [line for path in sources() for line in questions(path)] == []


def test_a_question_is_found(tmp_path):
    path = tmp_path / "asks.py"
    path.write_text('"""What: it asks."""\nclass A:\n    """Whatever."""\n\n    def f(self):\n        "How?"\n')
    assert [found.split(":")[1] for found in questions(path)] == ["1", "6"]
