"""Contents of a network and cost of one image, layer by layer. Imports torch, bnnfree.errors, bnnfree.nn.

`summarize` runs one zero image through a copy and counts what ran; `Summary` says what the counts mean.
To count another kind of layer: its class in LAYERS, if its MACs are the values of its output times the
values in one row of its weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bnnfree.errors import BnnfreeError, one_line
from bnnfree.nn import BinaryConv2d, BinaryLinear, Sign, WeightLayer

BINARY = (BinaryConv2d, BinaryLinear)
LAYERS = (WeightLayer, nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FLOAT_BYTES = 4
FLOAT_KINDS = ("stem", "head", "real", "affine")
_MARK = "_bnnfree_is_sign"


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Parameters, bytes and operations of a layer, a group or a network; units as in `Summary`."""

    bit_parameters: int = 0
    float_parameters: int = 0
    bytes: int = 0
    binary_macs: int = 0
    mixed_macs: int = 0
    float_macs: int = 0

    @property
    def parameters(self) -> int:
        return self.bit_parameters + self.float_parameters

    @property
    def bops(self) -> int:
        return self.binary_macs + self.mixed_macs

    @property
    def flops(self) -> int:
        return self.float_macs

    @property
    def ops(self) -> float:
        return self.flops + self.bops / 64


@dataclass(frozen=True, kw_only=True)
class Layer(Costs):
    """One call of a layer with weights; `call` counts from 1, and is 0 where the layer did not run.

    Parameters are the layer's own (weight, gain, bias, scale). Shapes leave the batch out.
    """

    path: str
    type: str
    call: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    weight_bits: int
    input_bits: int


@dataclass(frozen=True, kw_only=True)
class Group(Costs):
    """The modules of one type that hold parameters and are no layers with weights (RSign, RPReLU, norms)."""

    type: str
    count: int


@dataclass(frozen=True)
class Summary:
    """Result of `summarize`: image (channels, H, W), layers in the order they ran, groups, their total.

    Units:
      MAC           one multiplication and one addition, counted once, for one image. Taps on padding count
                    (nominal MACs). binary: 1-bit weights x signs; mixed: 1-bit weights x real inputs (binary
                    shortcuts); float: real weights, whatever their inputs.
      BOPs, FLOPs   MACs with 1-bit weights (binary + mixed); MACs with real weights.
      OPs           FLOPs + BOPs / 64, as the field's papers count. Convolutions and linear layers only; left
                    out: norms, signs, activations, pooling, residual adds, per-channel gains and biases,
                    products of two activations.
      weight bits   1: a binary layer whose weights are signs now (binary=True); else 32.
      input bits    1: the input comes from a Sign, or the layer was built with binary_input=True; else 32.
      bytes         of the parameters alone: per layer, 1-bit weights / 8 rounded up, and 4 per float. This is
                    not the size of a file: constants without gradient (running statistics, scales computed
                    from the latents), headers and alignment are not in it, and folding can drop floats.
      stays_float   float parameters. stem: all of the first layer that runs, head: all of the last, where
                    their weights are real; real: all of the other layers with real weights; affine: the rest
                    (gains and biases of binary layers, thresholds, slopes, norms).

    A layer called twice has two rows: MACs in both, parameters in the first. Shared parameters count once.
    uncounted: modules that hold a matrix and are of unknown type, or did not run; they have no MACs here.
    """

    image: tuple[int, int, int]
    layers: tuple[Layer, ...]
    groups: tuple[Group, ...]
    uncounted: tuple[str, ...] = ()

    @property
    def total(self) -> Costs:
        rows: tuple[Costs, ...] = (*self.layers, *self.groups)
        return Costs(**{f.name: sum(getattr(row, f.name) for row in rows) for f in fields(Costs)})

    @property
    def stays_float(self) -> dict[str, int]:
        """Float parameters by kind, a key for each of FLOAT_KINDS."""
        counts = dict.fromkeys(FLOAT_KINDS, 0)
        ran = [layer.path for layer in self.layers if layer.call]
        for layer in self.layers:
            kind = "affine"
            if layer.weight_bits == 32:
                # the only layer of a network is its head
                kind = "head" if layer.path in ran[-1:] else "stem" if layer.path in ran[:1] else "real"
            counts[kind] += layer.float_parameters
        counts["affine"] += sum(group.float_parameters for group in self.groups)
        return counts

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: image, total, stays_float, layers, groups, uncounted."""
        derived = {name: getattr(self.total, name) for name in ("parameters", "bops", "flops", "ops")}
        return {
            "image": self.image,
            "total": asdict(self.total) | derived,
            "stays_float": self.stays_float,
            "layers": [{"path": layer.path, **asdict(layer)} for layer in self.layers],
            "groups": [{"type": group.type, **asdict(group)} for group in self.groups],
            "uncounted": self.uncounted,
        }

    def table(self) -> str:
        """Fixed-width text: a line per layer, the small parameters by type, the totals and what they mean."""
        rows = [["layer", "type", "input", "output", "W bits", "in bits"]]
        rows[0] += ["1-bit params", "float params", "bytes", "binary MACs", "mixed MACs", "float MACs"]
        for layer in self.layers:
            name = (layer.path or "(model)") + (f" (call {layer.call})" if layer.call > 1 else "")
            bits = [layer.weight_bits, layer.input_bits if layer.call else 0]
            shapes = [_shape(layer.input_shape), _shape(layer.output_shape)]
            rows.append([name, layer.type, *shapes, *_numbers(bits), *_cells(layer)])
        rows += [[f"{group.count} x", group.type, "", "", "", "", *_cells(group)] for group in self.groups]
        rows.append(["total", "", "", "", "", "", *_cells(self.total)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        aligns = ["<"] * 4 + [">"] * 8
        form = "  ".join(f"{{:{align}{width}}}" for align, width in zip(aligns, widths, strict=True))
        lines = [form.format(*row).rstrip() for row in rows]
        rule = "-" * max(map(len, lines))
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1], "", *self._notes()]
        return "\n".join(map(one_line, lines))

    def _notes(self) -> Iterable[str]:
        total = self.total
        kept = ", ".join(f"{kind} {count:,}" for kind, count in self.stays_float.items())
        floats = FLOAT_BYTES * total.parameters
        parts = f"{total.bit_parameters:,} 1-bit + {total.float_parameters:,} float"
        yield f"image        {_shape(self.image)} (channels x height x width)"
        yield f"parameters   {total.parameters:,} = {parts}"
        yield f"bytes        {total.bytes:,}; {floats:,} if all were float"
        yield f"BOPs         {total.bops:,} = {total.binary_macs:,} binary + {total.mixed_macs:,} mixed MACs"
        yield f"FLOPs        {total.flops:,} float MACs"
        yield f"OPs          {total.ops:,.0f} = FLOPs + BOPs / 64"
        yield f"stays float  {kept}"
        if self.uncounted:
            yield f"NOT COUNTED  MACs of {', '.join(self.uncounted)}: of unknown type, or did not run"
        yield ""
        yield "MAC: one multiplication and one addition, counted once, for one image; taps on padding count."
        yield "binary: 1-bit weights x signs, mixed: 1-bit weights x real inputs, float: real weights."
        yield "OPs: convolutions and linear layers only; left out: norms, signs, activations, pooling,"
        yield "residual adds, per-channel gains and biases."
        yield "bytes: of the parameters alone (per layer, bits / 8 rounded up, and 4 per float). A packed"
        yield "file also holds constants without gradient, headers and alignment, and lacks what folds away."


def summarize(model: nn.Module, image_size: tuple[int, int], channels: int = 3) -> Summary:
    """Count the contents of `model` and the cost of one image [channels, H, W]; `Summary` defines the units.

    The image runs through a copy on the CPU in eval mode: the model, its training flag and the random state
    stay as they are. `model` takes [N, C, H, W]; give the bare one, not a compiled or wrapped one.
    Errors: BnnfreeError for a size below 1, a lazy layer not yet run, a model that fails on such an image.
    Example: summarize(reactnet18(10), (32, 32)).total.ops
    """
    image = (channels, *image_size)
    if len(image) != 3 or any(not isinstance(size, int) or size < 1 for size in image):
        raise BnnfreeError(
            f"summarize: got channels {channels!r} and image_size {image_size!r}, expected whole numbers "
            ">= 1, image_size as (height, width)."
        )
    for name, param in model.named_parameters():
        if isinstance(param, UninitializedParameter):
            raise BnnfreeError(f"summarize: {name} has no shape yet. Run one batch through the model first.")
    recorder = _Recorder()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            twin = copy.deepcopy(model).cpu().eval()
            dtypes = [param.dtype for param in twin.parameters() if param.is_floating_point()]
            recorder.watch(twin)
            twin(torch.zeros(1, *image, dtype=dtypes[0] if dtypes else None))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BnnfreeError(
                f"summarize: {type(model).__name__} fails on an image of {_shape(image)}: {reason}"
            ) from error
    return recorder.summary(twin, image)


class _Recorder:
    """Forward hooks that note each call, then a walk over the modules that did not run."""

    def __init__(self) -> None:
        self.paths: dict[nn.Module, str] = {}
        self.calls: dict[nn.Module, int] = {}
        self.layers: list[Layer] = []
        self.counted: set[int] = set()

    def watch(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if isinstance(module, Sign):
                module.register_forward_hook(lambda module, args, output: setattr(output, _MARK, True))
            if isinstance(module, LAYERS):
                self.paths[module] = path
                module.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        # a reshaped sign is a view whose base is the Sign's own output
        signs = getattr(x, _MARK, False) or getattr(x._base, _MARK, False)
        self.calls[module] = self.calls.get(module, 0) + 1
        self._add(module, x, output, signs or getattr(module, "binary_input", False))

    def _add(self, module: nn.Module, x: Tensor, output: Tensor, signs: bool) -> None:
        binary = isinstance(module, BINARY) and module.binary
        weight: Any = module.weight
        bits, floats = self._count(module, weight if binary else None)
        kind = "float_macs" if not binary else "binary_macs" if signs else "mixed_macs"
        self.layers.append(
            Layer(
                path=self.paths[module],
                type=type(module).__name__,
                call=self.calls.get(module, 0),
                input_shape=tuple(x.shape[1:]),
                output_shape=tuple(output.shape[1:]),
                weight_bits=1 if binary else 32,
                input_bits=1 if signs else 32,
                bit_parameters=bits,
                float_parameters=floats,
                bytes=(bits + 7) // 8 + FLOAT_BYTES * floats,
                **{kind: output.numel() * weight[0].numel()},
            )
        )

    def _count(self, module: nn.Module, bits_of: Tensor | None = None) -> tuple[int, int]:
        """Values in the module's own parameters not counted before: 1-bit (those of `bits_of`), float."""
        counts = [0, 0]
        for param in module.parameters(recurse=False):
            if id(param) not in self.counted:
                self.counted.add(id(param))
                counts[param is not bits_of] += param.numel()
        return counts[0], counts[1]

    def summary(self, model: nn.Module, image: tuple[int, int, int]) -> Summary:
        uncounted: list[str] = []
        sizes: dict[str, list[int]] = {}
        nothing = torch.empty(0)
        for path, module in model.named_modules():
            own = list(module.parameters(recurse=False))
            if module in self.calls or not own:
                continue
            if any(param.dim() > 1 for param in own):
                uncounted.append(f"{path or '(model)'} ({type(module).__name__})")
            if module in self.paths:
                self._add(module, nothing, nothing, False)
            else:
                sizes.setdefault(type(module).__name__, []).append(self._count(module)[1])
        groups = tuple(
            Group(type=name, count=len(own), float_parameters=sum(own), bytes=FLOAT_BYTES * sum(own))
            for name, own in sizes.items()
        )
        return Summary(image, tuple(self.layers), groups, tuple(uncounted))


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _numbers(numbers: Iterable[int]) -> list[str]:
    return [f"{number:,}" if number else "-" for number in numbers]


def _cells(row: Costs) -> list[str]:
    return _numbers(getattr(row, f.name) for f in fields(Costs))
