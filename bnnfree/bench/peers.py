"""The same packed model in other runtimes, each made to run one image as fast as it can on so many threads.

To add one: a function (model, threads) -> (image uint8 [1, H, W, C] -> output, flat) and a line of PEERS.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnnfree.bench.openvino_graph import compile_openvino, said_of
from bnnfree.errors import BnnfreeError
from bnnfree.format import PackedModel

Run = Callable[[np.ndarray], np.ndarray]
CALIBRATION = 16  # random images


@dataclass
class Peer:
    """make: builds it; package: what --against names; needs: modules, by the name pip knows; note: what should be
    known of it, for a model."""

    make: Callable[[PackedModel, int], Run]
    package: str
    needs: dict[str, str]
    exact: bool  # the same network, up to the order of float sums
    note: Callable[[PackedModel], str] = lambda model: ""

    def missing(self) -> list[str]:
        """Packages that pip must install."""
        return [pip for module, pip in self.needs.items() if importlib.util.find_spec(module) is None]


def _onnxruntime_fp32(model: PackedModel, threads: int) -> Run:
    from bnnfree.export.onnx import to_onnx

    return _session(to_onnx(model).SerializeToString(), threads)


def _onnxruntime_int8(model: PackedModel, threads: int) -> Run:
    """Static quantisation as its documentation proposes: QDQ, weights per channel, calibrated with random images."""
    from onnxruntime import quantization

    from bnnfree.export.onnx import write_onnx

    class Images(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(random_images(model, CALIBRATION, seed=1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.left, None)
            return None if image is None else {"image": image[None]}

    before = logging.root.level
    logging.root.setLevel(logging.ERROR)  # Why: its advice to preprocess is about graphs that it did not get from us
    try:
        with tempfile.TemporaryDirectory() as folder:
            floats, whole = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
            write_onnx(model, floats)
            kind, formats = quantization.QuantType, quantization.QuantFormat
            types: dict[str, Any] = {"activation_type": kind.QUInt8, "weight_type": kind.QInt8}
            options = {"quant_format": formats.QDQ, "per_channel": True, **types}
            quantization.quantize_static(str(floats), str(whole), Images(), **options)
            return _session(whole.read_bytes(), threads)
    finally:
        logging.root.setLevel(before)


def _session(graph: bytes, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return lambda image: session.run(["logits"], {"image": image})[0].reshape(-1)


_ONNX = {"onnx": "onnx", "onnxruntime": "onnxruntime"}
PEERS: dict[str, Peer] = {
    "openvino_binary": Peer(compile_openvino, "openvino", {"openvino": "openvino"}, exact=True, note=said_of),
    "onnxruntime_fp32": Peer(_onnxruntime_fp32, "onnxruntime", {**_ONNX, "torch": "torch"}, exact=True),
    "onnxruntime_int8": Peer(_onnxruntime_int8, "onnxruntime", {**_ONNX, "torch": "torch"}, exact=False),
}
PACKAGES = tuple(dict.fromkeys(peer.package for peer in PEERS.values()))


def random_images(model: PackedModel, count: int, seed: int = 0) -> np.ndarray:
    """Shape: uint8 [count, H, W, C]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *model.image_shape), np.uint8)


def difference(run: Run, images: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of an output to `expected` over its largest value, as a share."""
    got = np.stack([run(image[None]).copy() for image in images]).reshape(expected.shape)
    if not np.isfinite(got).all():
        raise BnnfreeError("peer: got outputs that are no finite numbers.")
    return float(np.abs(got - expected).max() / (np.abs(expected).max() or 1.0))
