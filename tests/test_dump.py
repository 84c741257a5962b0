"""tools/dump.py: what a file holds, how two differ, and one line for what is no packed model."""

import json

import numpy as np
import pytest
from damage import bases, every_op
from test_tools import tool  # noqa: F401

from bnnfree.format import to_bytes, write


@pytest.fixture
def save(tmp_path):
    """save(name, edit) -> path of the model of every op, edited."""

    def saved(name, edit=lambda model: None):
        model = every_op()
        for tensor in model.tensors:
            tensor.data = None if tensor.data is None else tensor.data.copy()
        edit(model)
        write(model, tmp_path / name)
        return tmp_path / name

    return saved


def test_one_model_is_shown_op_by_op_with_its_totals(tool, save, tmp_path):  # noqa: F811
    path = save("a.bnnf")
    code, printed, errors = tool("dump", path, "--json", tmp_path / "a.json")
    assert code == 0, errors
    model, lines = every_op(), printed.splitlines()
    table = [line.split() for line in lines if line.strip()[:1].isdigit()]
    assert [row[1] for row in table] == [op.name for op in model.ops]
    assert [row[2] for row in table] == [model.tensors[op.writes()[0]].name for op in model.ops]
    conv = next(line for line in lines if " k2x3 s2x1 p0x1 g2 pad=+1 " in line)
    assert "conv2d" in conv and "i8 2x2x3x4" in conv
    assert any("scale bias other slope low high" in line and "bits 8x3x3x4" in line for line in lines)
    assert f"{path.stat().st_size:,} bytes" in printed and f"{model.arena_bytes:,} bytes" in printed
    assert "5x4x3" in printed and "test 1.0" in printed and "mean: 0.5" in printed
    assert lines[-1] == str(tmp_path / "a.json")
    about = json.loads((tmp_path / "a.json").read_text())
    assert sum(row["bytes"] for row in about["table"]) == sum(about["bytes_by_dtype"].values())
    assert about["bytes_by_dtype"]["bits"] == sum(
        t.bytes for t in model.tensors if t.place == "constant" and t.dtype == "bits"
    )
    assert about["class_names"] == model.classes and about["file_bytes"] == len(to_bytes(model))


def test_the_recipe_is_shown_only_when_asked_for(tool, save):  # noqa: F811
    path = save("a.bnnf", lambda model: model.metadata.update(recipe='{"seed": 17}'))
    assert "seed" not in tool("dump", path)[1]
    assert 'recipe: {"seed": 17}' in tool("dump", path, "--recipe")[1]


def test_what_could_move_the_terminal_is_escaped(tool, save):  # noqa: F811
    def edit(model):
        model.metadata = {"a\u202e": "b\u202e\u200b"}

    printed = tool("dump", save("a.bnnf", edit))[1]
    assert all(line.isprintable() for line in printed.splitlines()) and "\\u202e" in printed
    printed = tool("dump", save("a.bnnf", edit), save("b.bnnf"))[1]
    assert all(line.isprintable() for line in printed.splitlines()) and "\\u202e" in printed


def test_two_equal_files_are_identical(tool, save, tmp_path):  # noqa: F811
    code, printed, _ = tool("dump", save("a.bnnf"), save("b.bnnf"), "--json", tmp_path / "d.json")
    assert code == 0 and printed.splitlines() == ["identical", str(tmp_path / "d.json")]
    assert json.loads((tmp_path / "d.json").read_text()) == {"identical": True}


def _constants(model):
    first = model.ops[0]
    model.tensors[first.scale].data[1:3] += np.float32(0.25)
    model.tensors[first.weights].data[0, 0, 0, 0] ^= 1
    model.tensors[first.threshold].data[0] = np.inf
    binary = model.tensors[model.ops[1].weights].data
    binary[0, 0, 0, 0] ^= np.uint64(0b0101)


def _geometry(model):
    model.ops[7].fields["pad_value"] = 0
    model.ops[4].fields["pad_value"] = -1


def _texts(model):
    model.metadata["note"] = "smaller"
    model.metadata["new"] = "1"
    model.classes[3] = "cat"
    model.producer = "another"


def _names(model):
    model.tensors[model.ops[10].real].name = "probabilities"


def _epilogue(model):
    softmax = model.ops[3]
    model.tensors.append(model.tensors[softmax.scale].__class__(**vars(model.tensors[softmax.scale])))
    softmax.fields["bias"] = len(model.tensors) - 1


@pytest.mark.parametrize(
    ("edit", "lines"),
    [
        (_constants, ["t7  scale, f32 4: 2 of 4 values differ, by 0.25 at most",
                      "t7  weights, i8 4x3x3x3: 1 of 108 values differ, by 1 at most",
                      "t7  threshold, f32 4: 1 of 4 values differ, by infinity at most",
                      "t15  weights, bits 8x3x3x4: 2 of 288 values differ"]),
        (_geometry, ['t23  window: "k2x3 s2x1 p0x1 g2 pad=+1" -> "k2x3 s2x1 p0x1 g2 pad=-1"']),
        (_texts, ['metadata  note: "größer, 日本" -> "smaller"', 'metadata  new: null -> "1"',
                  'facts  producer: "test 1.0" -> "another"']),
        (_names, ["- softmax t31", "+ softmax probabilities"]),
        (_epilogue, ['t21  epilogue: ["scale"] -> ["scale", "bias"]', "t21  bytes: 264 -> 528"]),
    ],
    ids=["constants", "geometry", "texts", "names", "epilogue"],
)  # fmt: skip
def test_two_models_differ_in_what_was_changed_and_in_nothing_else(tool, save, tmp_path, edit, lines):  # noqa: F811
    code, printed, errors = tool("dump", save("a.bnnf"), save("b.bnnf", edit), "--json", tmp_path / "d.json")
    assert code == 1, errors
    shown = printed.splitlines()
    assert shown[-1] == str(tmp_path / "d.json")
    body = [line for line in shown[2:-1] if not line.startswith("facts  ") or line in lines]
    assert set(lines) <= set(body)
    assert len(body) == len(lines) + (edit is _names) * sum("reads" in line for line in body)
    found = json.loads((tmp_path / "d.json").read_text())
    assert found["identical"] is False and len(found["constants"]) == (4 if edit is _constants else 0)


def test_the_same_network_in_other_bytes_says_so(tool, save, tmp_path):  # noqa: F811
    path = save("a.bnnf")

    def edit(model):
        model.tensors[model.ops[0].scale].name = "another name"

    code, printed, _ = tool("dump", path, save("b.bnnf", edit))
    assert code == 1 and "other bytes" in printed.splitlines()[-1]


@pytest.mark.parametrize("blob", [b"", b"hello", bases()[0][:-1]], ids=["empty", "text", "cut"])
def test_what_is_no_packed_model_exits_2_with_one_line(tool, tmp_path, save, blob):  # noqa: F811
    path = tmp_path / "x.bnnf"
    path.write_bytes(blob)
    for arguments in ([path], [save("a.bnnf"), path], [tmp_path / "missing.bnnf"]):
        code, printed, errors = tool("dump", *arguments, "--json", tmp_path / "d.json")
        assert code == 2 and printed == "" and len(errors.strip().splitlines()) == 1
        assert not (tmp_path / "d.json").exists()
