"""Odd arguments of `export` and `verify` are one ExportError each: argument, value, what is allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bnnfree import preprocess
from bnnfree.export import ExportError, export, options, pack
from bnnfree.export.verify import sample_images, verify

SIZE = (12, 10)
DATA = {"image_size": SIZE, "mean": 0.41, "std": 0.3}


class Spiteful:
    def __repr__(self):
        raise RuntimeError

    __array__ = __fspath__ = __repr__


ODD = {
    "path": [b"m.bnnf", 5, None, "", ".", "a\0b", Spiteful()],
    "image_size": [0, -3, 2.5, True, None, "32", (8,), (8, 8, 3), (8, 8.0), {8: 8}, (1 << 21, 8), (1 << 20, 1 << 20),
                   torch.ones(2)],
    "channels": [0, -1, 3.0, True, "3", None, 1 << 30, Spiteful()],
    "mean": [None, "0.5", ["0.5"] * 3, [0.5] * 2, True, 1j, {}, [[0.5], [0.1, 0.2]], float("nan"), -0.1, 128,
             torch.zeros(3, requires_grad=True) + 1.5, torch.zeros(2, device="meta"), Spiteful()],
    "std": [0, -1.0, 64, float("inf"), "1", [1, 1, None], False],
    "classes": ["abc", b"abc", 5, {"a", "b"}, {"a": 1}, [b"a"], [None], ["a\nb"], ["\ud800"], [""], ["x" * 2000],
                [1.5], [True], (name for name in "ab"), Spiteful()],
    "stem": ["int4", "INT8", None, 8, ["int8"]], "head": ["real", "", False, {}],
    "resize": ["foo", "center", "", 5, ["square"], False],
    "reading": ["exif", [], {"orientation": "up"}, {"orientation": None}, {"orientations": "exif"}, {1: 2},
                {"range": 5}, {"range": [3, 1]}, {"range": [0, float("inf")]}, {"range": [0, 10**400]},
                {"range": ["0", "1"]}, {"range": [False, True]}],
    "about": ["text", [1], {"a": 1}, {"a": ""}, {"a": "b\nc"}, {"a": "\ud800"}, {"a": Spiteful()}, {"mean": "1"}],
    "check": ["no", None, 1, []],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_argument_is_refused_by_name_before_work_begins(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bnnfree.export.trace", lambda *_: pytest.fail("work has begun"))
    for value in ODD[name]:
        with pytest.raises(ExportError, match=rf"^export: {name}(: \w+)?: got .*expected [^\n]*\Z") as caught:
            export(nn.Conv2d(3, 3, 3), **{"path": "m.bnnf", **DATA, name: value})
        assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_the_names_of_the_exporter_are_those_that_images_are_read_by():
    assert set(options.RESIZES) == set(preprocess.RESIZES) and options.ORIENTATIONS == preprocess.ORIENTATIONS
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for resize in preprocess.RESIZES:
        reading = {"orientation": "stored", "range": [0, 4095.5]}
        metadata = pack(net, **DATA, resize=resize, reading=reading).model.metadata
        assert metadata["resize"] == resize
        assert preprocess.reading_of(metadata, 3, "m") == preprocess.Reading(3, "stored", (0.0, 4095.5))


@pytest.mark.parametrize(
    "name, value",
    [("packed", None), ("model", b"bnnf"), ("images", None), ("images", np.zeros((2, 12, 10, 3))),
     ("images", np.zeros((2, 10, 12, 3), np.uint8)), ("images", np.zeros((0, 12, 10, 3), np.uint8)),
     ("images", np.zeros((), np.uint8)), ("agreement", 2), ("agreement", "1"), ("agreement", float("nan")),
     ("layer_images", 0), ("layer_images", 1.5), ("batch_size", 0), ("batch_size", True)],
)  # fmt: skip
def test_an_odd_argument_of_verify_is_refused_by_name(name, value):
    packed = pack(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), **DATA)
    arguments = {"packed": packed, "model": packed.model, "images": sample_images((*SIZE, 3), 2), name: value}
    with pytest.raises(ExportError, match=rf"^verify: {name}: got .*expected .*\.\Z"):
        verify(**arguments)
