"""Names and facts that recipes read without torch, against what the other rooms build.

bnnfree.names: each tuple against the table with the same keys. bnnfree.normalisers: each claim against behaviour.
"""

import inspect

import pytest
import torch
from helpers import make_model, noise, without_drop

from bnnfree import names
from bnnfree.data import augment, datasets, pixel_split
from bnnfree.errors import BnnfreeError
from bnnfree.export import pack
from bnnfree.format import schema
from bnnfree.nn import (
    LAYERS,
    NORMS,
    STES,
    BinaryBlock,
    Design,
    Sign,
    WeightLayer,
    calibrate,
    make_norm,
    settle,
    update_input_means,
)
from bnnfree.nn.fused.speed import PRECISIONS
from bnnfree.nn.react import PowerRPReLU
from bnnfree.nn.variance import BETA_MODES
from bnnfree.optim import OPTIMIZERS
from bnnfree.preprocess import MODES
from bnnfree.train.losses import LOSSES
from bnnfree.train.schedule import SCHEDULES

every_norm = pytest.mark.parametrize("norm", NORMS)


@pytest.mark.parametrize(
    ("known", "table"),
    [
        (names.LOSSES, LOSSES),
        (names.SCHEDULES, SCHEDULES),
        (names.OPTIMIZERS, OPTIMIZERS),
        (names.STES, STES),
        (names.BETA_MODES, BETA_MODES),
        (names.PRECISIONS, PRECISIONS),
        (names.DATASETS, datasets.DATASETS),
        (names.CHANNELS, MODES),
        (names.GEOMETRIES, pixel_split.GEOMETRIES),
        (names.POLICIES, augment.POLICIES),
        (names.MIXTURES, augment.MIXTURES),
        (tuple(NORMS), LAYERS),
    ],
)
def test_names_are_the_keys_of_the_table_in_its_order(known, table):
    assert known == tuple(table)


# -- normalisers


def small_block(norm, **options):
    """A transition of a block and values for it; nothing is drawn at random in training."""
    torch.manual_seed(5)
    return BinaryBlock(4, 8, Design(norm=norm, **without_drop(norm), **options), stride=2).double().train()


@every_norm
def test_a_sample_depends_on_the_others_where_the_facts_say_so(norm):
    model, x = make_model("reactnet20", norm, **without_drop(norm)).double(), noise(5, 3, 9, 7, seed=4)
    calibrate(model, x)
    model.train()
    other = torch.cat([x[:1], 3 * noise(4, 3, 9, 7, seed=5) + 1])
    changed = not torch.allclose(model(x)[0], model(other)[0], rtol=1e-9, atol=1e-9)
    assert changed == NORMS[norm].batch_dependent


def buffers_after(model, images):
    model.train()(images)
    update_input_means(model)
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@every_norm
def test_training_moves_buffers_where_the_facts_say_so(norm):
    model, x = make_model("reactnet20", norm, **without_drop(norm)), noise(5, 3, 9, 7, seed=6, dtype=torch.float32)
    calibrate(model, x)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    after = buffers_after(model, 2 * x + 1)
    assert any(not torch.equal(before[name], after[name]) for name in before) == NORMS[norm].state


@every_norm
def test_running_statistics_settle_where_the_facts_say_so(norm):
    """Input means of centred layers settle as well; they are the convolutions' own."""
    model, x = make_model("reactnet20", norm, **without_drop(norm)), noise(5, 3, 9, 7, seed=7, dtype=torch.float32)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if not name.endswith("input_mean")}
    settle(model, [x])
    moved = any(not torch.equal(before[name], dict(model.named_buffers())[name]) for name in before)
    assert moved == NORMS[norm].settles


@every_norm
def test_a_packed_file_has_no_operation_for_a_norm_that_folds(norm):
    model = make_model("reactnet20", norm)
    calibrate(model, noise(8, 3, 9, 9, seed=8, dtype=torch.float32))
    packed = pack(model.eval(), image_size=(9, 9), channels=3, mean=0.5, std=0.2).model
    assert not any(op.name in schema.NORMS for op in packed.ops) == NORMS[norm].folds


@every_norm
def test_a_block_is_made_as_the_facts_say(norm):
    rule = NORMS[norm]
    block = small_block(norm)
    units = list(block.branch)
    conv, sign = (next(m for m in units if isinstance(m, kind)) for kind in (WeightLayer, Sign))
    if LAYERS[norm] is not LAYERS["none"]:
        kind = type(make_norm(norm, 8, torch.nn.PReLU(8) if rule.proxy else None))
        places = [i for i, module in enumerate(units) if isinstance(module, kind)]
        assert places and (places[0] < units.index(sign)) == rule.before
    assert (conv.standardize, conv.scale_rule, conv.unit_output) == (rule.standardize, rule.scale, rule.unit_output)
    assert (conv.centre == "input", conv.gradient_centre is not None) == (rule.centre, rule.centre_gradient)
    assert (conv.gain is not None, conv.bias is not None) == (rule.gain, rule.bias)
    assert (float(block.alpha), sign.ste, sign.window) == (pytest.approx(rule.alpha), rule.ste, rule.ste_window)
    assert isinstance(block.act, torch.nn.Identity) == (rule.activation == "branch")
    assert isinstance(block.act, PowerRPReLU) == rule.power_slopes
    assert block.scales_shortcut == rule.scaled_shortcut and block.measured == (rule.beta == "measured")
    design = Design(norm=norm)
    assert (design.make_tail(8) is not None) == rule.before
    assert isinstance(design.make_head(8, 3), WeightLayer) == rule.centre_head
    assert make_model("reactnet20", norm).believes == rule.beliefs


@every_norm
def test_options_are_those_of_the_builder(norm):
    parameters = inspect.signature(LAYERS[norm], eval_str=True).parameters
    of_builder = {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY and key != "activation"}
    assert ("activation" in parameters) == NORMS[norm].proxy
    assert list(of_builder) == list(NORMS[norm].options)
    for key, option in NORMS[norm].options.items():
        assert type(option.default) is type(of_builder[key].default) and option.default == of_builder[key].default
        annotation = option.kind | None if option.null else option.kind
        assert of_builder[key].annotation == annotation


EDGES = [
    (norm, key, edge, outside)
    for norm, rule in NORMS.items()
    for key, option in rule.options.items()
    if option.kind is not bool
    for edge, outside in ((option.low, option.low - (1 if option.kind is int else 1e-9)),
                          (option.high, option.high + 1e-2))
    if abs(edge) < 1e9
]  # fmt: skip


@pytest.mark.parametrize(("norm", "key", "edge", "outside"), EDGES)
def test_a_builder_takes_what_is_in_range_and_nothing_else(norm, key, edge, outside):
    builder = LAYERS[norm]
    activation = {"activation": torch.nn.PReLU(8)} if NORMS[norm].proxy else {}
    builder(8, **{key: edge}, **activation)
    with pytest.raises(BnnfreeError):
        builder(8, **{key: outside}, **activation)
    with pytest.raises(BnnfreeError, match=f"norm_options.{key}: got "):
        Design(norm=norm, norm_options={key: outside})
