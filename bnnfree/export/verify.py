"""Is the packed file the same network? torch, float64 and every engine backend, layer by layer.

The only file that sees both sides: imports torch, numpy, bnnfree.export and bnnfree.engine. What "same" means:

  backends  every activation of every backend equals the numpy backend's, bit for bit
  double    the file's own graph evaluated by torch in float64: every sum of signs and of pixels is the same whole
            number, every bit the same but for ties, every float within DOUBLE_LIMIT
  torch     the network that was trained, in float32 as users run it: every bit the same but for ties, every float
            within FLOAT_LIMIT; and over all images, run freely, the same class at least `agreement` of the time

A tie is a bit whose value lies so near its threshold (TIE) that rounding decides. When a bit differs, what
follows is compared on the engine's bits, so that one tie does not count again in every later layer.
Differences are relative to the largest value of the network up to there: a sum's error is that of its terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from bnnfree.engine import Engine, backends
from bnnfree.engine.kernels import FAST
from bnnfree.engine.run import first_values
from bnnfree.errors import BnnfreeError, one_line
from bnnfree.export.double import epilogue_double, first_double, signed
from bnnfree.export.options import check_verify
from bnnfree.export.packed import Packed
from bnnfree.export.twin import plain_mode
from bnnfree.format import PackedModel
from bnnfree.format.text import split_numbers
from bnnfree.nn import RSign, Sign
from bnnfree.ops import unpack_bits

ULP = 2.0**-23
FLOAT_LIMIT = 256 * ULP  # 3e-5: torch rounds in another order, layer after layer; seen: up to 6 ulp
DOUBLE_LIMIT = 1e-5
TIE = 1e-5


@dataclass
class LayerReport:
    """One activation of the file against one evaluation.

    error_ulp: largest difference over the largest value of any activation up to here, in ulp of float32 (2^-23);
    differing: values that are not the same; ties: differing bits that rounding explains.
    """

    name: str
    kind: str
    values: int = 0
    differing: int = 0
    ties: int = 0
    error_ulp: float = 0.0
    largest: float = 0.0
    equal: bool = True

    def merge(self, differing: int, ties: int, error: float, limit: float, values: int) -> None:
        self.values += values
        self.differing += differing
        self.ties += ties
        self.error_ulp = max(self.error_ulp, error / ULP)
        self.equal = self.equal and (error <= limit if self.kind == "real" else differing == ties)


@dataclass
class Report:
    """Result of `verify`: `equal` is its verdict, `first_difference` the place where a difference begins."""

    images: int
    agreement: float  # share of images whose class is the same in torch and in the engine, run freely
    required_agreement: float
    logit_error: float  # largest difference of a logit in those runs, over the largest logit
    torch_layers: list[LayerReport] = field(default_factory=list)
    double_layers: list[LayerReport] = field(default_factory=list)
    backends: dict[str, str | None] = field(default_factory=dict)  # backend -> first activation that differs

    @property
    def first_difference(self) -> str | None:
        for backend, name in self.backends.items():
            if name is not None:
                return f"{name} (backend {backend} against numpy)"
        for against, layers in (("float64", self.double_layers), ("torch", self.torch_layers)):
            for layer in layers:
                if not layer.equal:
                    return f"{layer.name} (engine against {against})"
        return None

    @property
    def equal(self) -> bool:
        return self.first_difference is None and self.agreement >= self.required_agreement

    def to_dict(self) -> dict[str, Any]:
        return {"equal": self.equal, "first_difference": self.first_difference, **asdict(self)}

    def table(self) -> str:
        """Fixed-width text: a line per activation, then the verdicts."""
        rows = [["activation", "kind", "values", "torch differs", "ties", "ulp", "float64 differs", "ties", "ulp"]]
        double = {layer.name: layer for layer in self.double_layers}
        for layer in self.torch_layers:
            other = double.pop(layer.name, None)
            rows.append([layer.name, layer.kind, f"{layer.values:,}", *_cells(layer), *_cells(other)])
        for layer in double.values():
            rows.append([layer.name, layer.kind, f"{layer.values:,}", *_cells(None), *_cells(layer)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        form = "  ".join(f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths))
        lines = [form.format(*row).rstrip() for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        share, least = 100 * self.agreement, 100 * self.required_agreement
        lines += ["", f"top-1 agreement  {share:.2f} % of {self.images:,} images, at least {least:g} % asked for"]
        lines.append(f"logits           within {self.logit_error:.1e} of the largest, over all images")
        if any(layer.ties for layer in (*self.torch_layers, *self.double_layers)):
            lines.append("ties             bits so near their threshold that rounding decides; they count as equal")
        for backend, name in self.backends.items():
            lines.append(f"backend {backend:10s} {'equal to the bit' if name is None else f'DIFFERS at {name}'}")
        lines.append("equal" if self.equal else f"NOT EQUAL: {self.first_difference or 'top-1 agreement'}")
        return "\n".join(map(one_line, lines))


def _cells(layer: LayerReport | None) -> list[str]:
    if layer is None:
        return ["", "", ""]
    differing = f"{layer.differing:,}" if layer.kind != "real" else ""
    ties = f"{layer.ties:,}" if layer.kind == "bits" else ""
    return [differing + ("" if layer.equal else " !"), ties, f"{layer.error_ulp:.1f}" if layer.kind == "real" else ""]


@plain_mode()
def verify(
    packed: Packed,
    model: PackedModel,
    images: np.ndarray,
    *,
    agreement: float = 0.995,
    layer_images: int = 32,
    batch_size: int = 32,
    progress: Callable[[int], object] = lambda done: None,
) -> Report:
    """Compare the file `model` with the network it should be.

    packed: `bnnfree.export.pack` of that network with the file's own options. images: uint8 [N, H, W, C]; all of
    them decide the top-1 agreement, the first `layer_images` are compared layer by layer and by all backends.
    `progress` is told how many images each step has done.
    Errors: BnnfreeError where the file is that of another network.
    """
    check_verify(packed, model, images, agreement, layer_images, batch_size)
    check_same_activations(packed, model)
    engine = Engine(model, "numpy")
    report = Report(len(images), 0.0, agreement, 0.0, backends={name: None for name in backends() if name != "numpy"})
    torch_layers: dict[str, LayerReport] = {}
    double_layers: dict[str, LayerReport] = {}
    for part in _batches(images[:layer_images], batch_size):
        traced = engine.trace(part)
        _against_torch(packed, model, part, traced, torch_layers)
        _against_double(model, part, traced, double_layers)
        for name, found in report.backends.items():
            if found is None:
                report.backends[name] = _first_unequal(model, traced, Engine(model, name).trace(part))
        progress(len(part))
    report.torch_layers, report.double_layers = list(torch_layers.values()), list(double_layers.values())
    same = 0
    scale = error = 0.0
    for part in _batches(images, batch_size):
        with torch.no_grad():
            logits = packed.module(normalised(packed, part))
        if logits.dim() == 4:  # a map: channels last, as the engine has it
            logits = logits.permute(0, 2, 3, 1)
        logits = logits.flatten(1).numpy()
        ours = engine.run(part).reshape(len(part), -1)
        same += int((logits.argmax(1) == ours.argmax(1)).sum())
        scale, error = max(scale, float(np.abs(logits).max())), max(error, float(np.abs(logits - ours).max()))
        progress(len(part))
    report.agreement, report.logit_error = same / len(images), error / scale if scale else error
    return report


def check_same_activations(packed: Packed, model: PackedModel) -> None:
    """BnnfreeError where the file cannot be that of the network, whatever its weights."""
    expected = {t.name: t.shape for t in packed.model.tensors if t.place != "constant"}
    if expected != {t.name: t.shape for t in model.tensors if t.place != "constant"}:
        raise BnnfreeError(
            "verify: the file's activations are not those of the network: it was exported from another one, or by "
            "another version. Export it again."
        )


def sample_images(shape: tuple[int, int, int], count: int, seed: int = 0) -> np.ndarray:
    """Random images with structure: coarse patterns of 2 to 8 cells a side, one per octave, and noise.

    The same for a seed everywhere. Shapes: (H, W, C) -> uint8 [count, H, W, C].
    """
    random, (height, width, channels) = np.random.RandomState(seed), shape  # Why: its stream is frozen for ever
    images = random.randint(0, 64, (count, *shape)).astype(np.int64)
    for cells in (2, 4, 8):
        coarse = random.randint(0, 64, (count, cells, cells, channels))
        rows, columns = (np.arange(side) * cells // side for side in (height, width))
        images += coarse[:, rows][:, :, columns]
    return images.astype(np.uint8)


def _batches(images: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for first in range(0, len(images), size):
        yield images[first : first + size]


def normalised(packed: Packed, images: np.ndarray) -> Tensor:
    """Input of the torch network: float32 [N, C, H, W], (pixel / 255 - mean) / std as in training."""
    about = packed.model.metadata
    mean, std = (torch.tensor(split_numbers(about[key], key), dtype=torch.float32) for key in ("mean", "std"))
    return ((torch.from_numpy(images).float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def _first_unequal(model: PackedModel, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> str | None:
    for op in model.ops:
        for index in op.writes():
            name = model.tensors[index].name
            if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes():
                return name
    return None


def _nhwc(x: Tensor, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """torch's [N, C, H, W], or what was flattened from it, as [N, H, W, C]; shape: (H, W, C)."""
    if shape is not None:
        x = x.reshape(len(x), shape[2], *shape[:2])
    return x.permute(0, 2, 3, 1).numpy()


# -- the trained network


class _Watched(fx.Interpreter):
    """Runs the network, showing each node's result to `watch`, which may put another in its place."""

    def __init__(self, module: fx.GraphModule, watch: Callable[[fx.Node, Any, Any], Any]):
        super().__init__(module)
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        source = self.env.get(n.all_input_nodes[0]) if n.all_input_nodes else None
        return self.watch(n, source, result)


def _against_torch(
    packed: Packed, model: PackedModel, images: np.ndarray, traced, layers: dict[str, LayerReport]
) -> None:
    by_node: dict[fx.Node, list[str]] = {}
    for name, (node, _) in packed.meaning.items():
        by_node.setdefault(node, []).append(name)
    modules = dict(packed.traced.module.named_modules())

    def watch(node: fx.Node, source: Any, result: Any) -> Any:
        for name in by_node.get(node, []):
            value = packed.meaning[name][1]
            ours, theirs = traced[name], _nhwc(result, value.shape)
            if value.kind == "bits":
                layer = layers.setdefault(name, LayerReport(name, "bits"))
                signs = signed(ours, value.shape[2])
                before = _before_sign(node, modules.get(str(node.target)), source, value.shape)
                bits = (theirs - value.shift) * np.where(value.scale < 0, -1, 1) < 0
                _compare_bits(layer, signs < 0, bits, np.full(signs.shape, np.inf) if before is None else before)
                taken = torch.from_numpy(signs * value.scale + value.shift).permute(0, 3, 1, 2)
                result = taken.to(result.dtype).reshape(result.shape).contiguous()
            else:
                meant = np.concatenate([ours.astype(np.float64)] * value.repeat, axis=-1) * value.scale + value.shift
                _compare_floats(layers, name, meant.reshape(theirs.shape), theirs, FLOAT_LIMIT)
        return result

    with torch.no_grad():
        _Watched(packed.traced.module, watch).run(normalised(packed, images))


def _before_sign(node: fx.Node, layer: Any, source: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Values that a node takes the sign of; None where it moves bits that have been compared."""
    if isinstance(layer, Sign):
        x = _nhwc(source, shape)
        return x + layer.bias.numpy() if isinstance(layer, RSign) else x
    compares = node.op != "call_module" and getattr(node.target, "__name__", node.target) in ("ge", "gt", "le", "lt")
    if not compares or not isinstance(node.args[1], int | float):
        return None
    return _nhwc(source, shape) - node.args[1]


def _compare_bits(layer: LayerReport, ours: np.ndarray, theirs: np.ndarray, before: np.ndarray) -> None:
    """before: the value that the bit is the sign of; 0 is the threshold."""
    differing = ours != theirs
    near = np.abs(before) <= TIE * np.abs(before).max()
    layer.merge(int(differing.sum()), int((differing & near).sum()), 0.0, 0.0, differing.size)


def _compare_floats(
    layers: dict[str, LayerReport], name: str, ours: np.ndarray, theirs: np.ndarray, limit: float
) -> None:
    layer = layers.setdefault(name, LayerReport(name, "real"))
    layer.largest = max(layer.largest, float(np.abs(theirs).max()))
    scale = max(other.largest for other in layers.values()) or 1.0
    error = float(np.abs(ours - theirs).max()) / scale
    error = error if np.isfinite(error) else np.inf
    layer.merge(int((ours != theirs).sum()), 0, error, limit, ours.size)


# -- the file in float64


def _against_double(model: PackedModel, images: np.ndarray, traced, layers: dict[str, LayerReport]) -> None:
    """The file's ops by torch in float64, bits taken over from the engine once they have been compared."""
    reals = {model.input: torch.from_numpy(images).permute(0, 3, 1, 2).double()}
    arrays = {i: traced[t.name] for i, t in enumerate(model.tensors) if t.name in traced and t.place != "constant"}
    for op in model.ops:
        v = first_double(model, op, reals)
        name = model.tensors[op.writes()[0]].name
        if op.name in ("binary_conv2d", "pixel_conv2d"):
            layer = layers.setdefault(f"{name} (sums)", LayerReport(f"{name} (sums)", "sums"))
            ours = first_values(model, op, FAST, arrays)
            differing = int((ours != _nhwc(v)).sum())
            layer.merge(differing, 0, 0.0, 0.0, ours.size)
        constants = {field: model.tensors[index] for field, index in op.constants().items()}
        threshold = constants.get("threshold")
        if threshold is None or threshold.dtype == "f32":
            v = epilogue_double(model, op, v, reals)
        if op.real is not None:
            name = model.tensors[op.real].name
            _compare_floats(layers, name, traced[name].astype(np.float64), _nhwc(v), DOUBLE_LIMIT)
            reals[op.real] = v
        if op.bits is not None:
            name, channels = model.tensors[op.bits].name, v.shape[1]
            layer = layers.setdefault(name, LayerReport(name, "bits"))
            before = _nhwc(v) if threshold is None else _nhwc(v) - threshold.data
            words = constants["flip"].data if "flip" in constants else None
            flip = np.zeros(channels, bool) if words is None else unpack_bits(words, channels)
            signs = signed(traced[name], channels)
            exact = threshold is not None and threshold.dtype == "i32"
            _compare_bits(layer, signs < 0, ~(before >= 0) ^ flip, np.full(before.shape, np.inf) if exact else before)
            reals[op.bits] = torch.from_numpy(signs).permute(0, 3, 1, 2)
