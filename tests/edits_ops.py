"""More edits, see edits.py: ops, how they fit together, and the arena."""

import numpy as np
from damage import File, bases
from edits import BIG, edit

from bnnfree.format import schema
from bnnfree.format.schema import NONE

# -- ops


@edit("OpError", 0, len(schema.OPS) + 1, 1 << 31, BIG)
def code(f, value):
    f.ops["code"][1] = value


@edit("OpError", *[(op, field) for op, rule in schema.OPS.items() for field in ("input", *rule.needs)])
def field_missing(f, op, field):
    f.op(op)[field] = NONE


@edit("OpError", *[(op, field) for op, rule in schema.OPS.items()
                   for field in schema.TENSOR_FIELDS if field not in {"input", *rule.needs, *rule.may}])  # fmt: skip
def field_too_many(f, op, field):
    f.op(op)[field] = f.activations()[0] if field in ("other", "real", "bits") else f.constants()[0]


@edit("OpError", *[(op, field, v) for op, field in (
    ("conv2d", "input"), ("conv2d", "weights"), ("concat", "other"), ("softmax", "real"), ("pixel_conv2d", "bits"),
) for v in (None, 1 << 16, 1 << 31, BIG - 1)])  # fmt: skip
def index_out_of_range(f, op, field, value):
    f.op(op)[field] = value or len(f.tensors)


@edit("OpError", *[(op, field, place) for place in ("constant", "image", "activation") for op, field in (
    ("conv2d", "input"), ("conv2d", "weights"), ("concat", "other"), ("softmax", "real"), ("pixel_conv2d", "bits"),
    ("pixel_conv2d", "scale"), ("binary_conv2d", "low"),
) if not (place == "activation" and field in ("input", "other", "real", "bits"))
  and not (place == "constant" and field in ("weights", "scale", "low"))])  # fmt: skip
def wrong_place(f, op, field, place):
    f.op(op)[field] = {"constant": f.constants()[0], "image": 0, "activation": f.activations()[0]}[place]


@edit("OpError", "pixel_conv2d", "binary_conv2d")
def writes_nothing(f, op):
    f.op(op)["real"] = f.op(op)["bits"] = f.op(op)["threshold"] = f.op(op)["flip"] = NONE


@edit("OpError", "pixel_conv2d")
def one_tensor_for_both(f, op):
    f.op(op)["bits"] = f.op(op)["real"]


@edit("OpError", "threshold", "flip")
def decides_bits_but_writes_none(f, field):
    f.op("conv2d")[field] = f.op("pixel_conv2d")[field]


@edit("OpError", ("binary_conv2d", "input", "stem"), ("conv2d", "input", "bits"), ("softmax", "input", "bits"),
      ("conv2d", "weights", "i32"), ("binary_conv2d", "weights", "f32"), ("pixel_conv2d", "weights", "bits"),
      ("binary_conv2d", "other", "bits"), ("pixel_conv2d", "scale", "i8"), ("pixel_conv2d", "threshold", "i32"),
      ("pixel_conv2d", "flip", "f32"), ("binary_conv2d", "real", "bits"), ("conv2d", "scale", "bits"),
      *[(op, field, kind) for op in schema.NORMS for field, kind in (
          ("input", "bits"), ("weights", "i8"), ("weights", "bits"), ("weights", "i32"), ("threshold", "i32"),
          ("other", "bits"), ("real", "bits"))])  # fmt: skip
def wrong_dtype(f, op, field, kind):
    first, wide = f.op("pixel_conv2d"), f.op("binary_conv2d", 1)
    kinds = {"stem": first["real"], "i32": wide["threshold"], "f32": first["scale"], "i8": first["weights"]}
    activation = first["bits"] if op != "binary_conv2d" else wide["bits"]
    kinds["bits"] = activation if field in ("input", "other", "real") else first["flip"]
    f.op(op)[field] = kinds[kind]


@edit("OpError", "scale", "bias", "slope", "low", "high", "other", "real")
def more_than_a_threshold_of_the_sum(f, field):
    f.op("binary_conv2d", 1)[field] = f.op("binary_conv2d")[field]


@edit("OpError", *[(op, field) for op in ("pointwise", "concat", "softmax", *schema.NORMS)
                   for field in schema.WINDOW_FIELDS])  # fmt: skip
def window_where_none_belongs(f, op, field):
    f.op(op)[field] = 1


@edit("OpError", *[(op, field, 0) for op in ("conv2d", "avg_pool2d", "pixel_conv2d", "binary_conv2d")
                   for field in schema.WINDOW_FIELDS if not field.startswith(("pad", "after")) and field != "ceil"],
      *[("conv2d", "pad_value", v) for v in (2, -2, -(1 << 31), (1 << 31) - 1)],
      *[("max_pool2d", "ceil", v) for v in (2, BIG)], ("conv2d", "ceil", 1), ("binary_conv2d", "ceil", 1),
      ("avg_pool2d", "groups", 2), ("max_pool2d", "pad_value", -1), ("pixel_conv2d", "groups", 3),
      ("pixel_conv2d", "pad_value", 1), ("max_pool2d", "padding_h", 2), ("avg_pool2d", "padding_w", 2))  # fmt: skip
def window_field(f, op, field, value):
    f.op(op)[field] = value


# -- how ops fit together


@edit("GraphError", (0, 1), (1, 4), (-1, -2))
def ops_swapped(f, a, b):
    f.ops[[a, b]] = f.ops[[b, a]]


@edit("GraphError", "binary_conv2d", "conv2d", "softmax", "group_norm")
def reads_what_it_writes(f, op):
    f.op(op)["other" if op == "binary_conv2d" else "input"] = f.op(op)["real"]


@edit("GraphError")
def written_twice(f):
    f.op("softmax")["real"] = f.op("concat")["real"]


@edit("GraphError")
def activation_that_no_op_writes(f):
    f.op("pixel_conv2d")["bits"] = f.op("pixel_conv2d")["threshold"] = f.op("pixel_conv2d")["flip"] = NONE


@edit("GraphError", "pixel_conv2d", "binary_conv2d")
def constant_that_no_op_uses(f, op):
    f.op(op)["slope"] = NONE


@edit("GraphError")
def activation_that_nothing_reads(f):
    f.op("softmax")["input"] = f.op("binary_conv2d")["real"]


@edit("GraphError", ("conv2d", "kernel_h", 9), ("conv2d", "dilation_h", 1 << 20), ("max_pool2d", "kernel_w", 1 << 17),
      ("conv2d", "stride_h", 1), ("avg_pool2d", "stride_w", 1 << 20), ("max_pool2d", "ceil", 0),
      ("conv2d", "kernel_w", 2), ("binary_conv2d", "padding_h", 0), ("pixel_conv2d", "padding_w", 2),
      ("conv2d", "groups", 1), ("conv2d", "groups", 3), ("conv2d", "groups", 1 << 20), ("pixel_conv2d", "stride_w", 2),
      ("binary_conv2d", "groups", 2), ("max_pool2d", "dilation_h", 6), ("max_pool2d", "dilation_w", 1 << 19),
      ("pixel_conv2d", "dilation_w", 2))  # fmt: skip
def window_that_does_not_fit(f, op, field, value):
    f.op(op)[field] = value


@edit("GraphError", "scale", "bias", "slope", "low", "high", "threshold", "flip")
def constant_of_another_shape(f, field):
    first, wide = f.op("pixel_conv2d"), f.op("binary_conv2d", 1)
    f.op("pointwise", 1)[field] = {"bias": first["bias"], "flip": wide["flip"]}.get(field, wide["threshold"])
    if field in ("scale", "slope", "low", "high"):
        f.op("pointwise", 1)[field] = first["scale"]
    if field in ("threshold", "flip"):
        f.op("pixel_conv2d")["threshold"] = f.op("binary_conv2d")["scale"]


@edit("GraphError", ("conv2d", 2), ("binary_conv2d", 0))
def weights_of_another_layer(f, op, number):
    other = {"conv2d": f.op("conv2d", 1), "binary_conv2d": f.op("binary_conv2d", 1)}[op]
    f.op(op)["weights"] = other["weights"]


@edit("GraphError", *[(op, *constant) for op in schema.NORMS for constant in (
    ("pointwise", 0, "scale"), ("pointwise", 1, "bias"), ("pixel_conv2d", 0, "bias"))])  # fmt: skip
def groups_that_do_not_divide(f, op, other, number, field):
    """66 and 3 of 8 channels; and a constant of rank 3."""
    f.op(op)["weights"] = f.op(other, number)[field]


@edit("GraphError")
def concat_of_other_sizes(f):
    f.op("concat")["other"] = f.op("conv2d")["real"]


@edit("GraphError", "max_pool2d", "pointwise")
def other_of_another_shape(f, op):
    f.op("pointwise", 1)["other"] = f.op(op)["real"]


# -- memory


@edit("PlanError", *[(n, v) for n in (0, 2, -1) for v in (1, 63, 1 << 30, 1 << 63, 2**64 - 64, 2**64 - 1)])
def activation_offset(f, number, value):
    f.tensors["offset"][f.activations()[number]] = value


@edit("PlanError", 0, 64, 1 << 30)
def arena(f, value):
    f.header["arena_bytes"] = value


@edit("PlanError", 64, -64)
def arena_off_by(f, by):
    f.header["arena_bytes"] = int(f.header["arena_bytes"][0]) + by


@edit("PlanError", ("real", "bits"), ("bits", "real"))
def overlap_of_what_lives_together(f, a, b):
    f.tensor(f.op("pixel_conv2d")[a])["offset"] = f.tensor(f.op("pixel_conv2d")[b])["offset"]


@edit("PlanError")
def sum_over_what_it_adds_again_and_again(f):
    op = f.op("binary_conv2d")
    f.tensor(op["real"])["offset"] = f.tensor(op["other"])["offset"]


@edit("PlanError", -64, 64)
def sum_beside_what_it_is_added_to(_, by):
    f = File(bases()[1])
    op = f.op("binary_conv2d")
    assert f.tensor(op["real"])["offset"] == f.tensor(op["other"])["offset"]
    f.tensor(op["real"])["offset"] += np.uint64(by % 2**64)
    return f.blob


@edit("PlanError")
def output_over_its_input(f):
    f.tensor(f.op("softmax")["real"])["offset"] = f.tensor(f.op("softmax")["input"])["offset"]


@edit("PlanError")
def everything_at_zero(f):
    f.tensors["offset"][f.activations()] = 0
