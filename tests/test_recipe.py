"""The schema of recipes and how files of them are read: what is accepted, and what every mistake is told.

Every mistake is a RecipeError that names the file (or the override), the key, what was received and what is
allowed: one line per problem.
"""

import copy
import math
import random
import re

import pytest
import yaml

from bnnfree.errors import BnnfreeError
from bnnfree.models import MODELS
from bnnfree.recipe.read import RecipeError, save_recipe
from bnnfree.recipe.schema import Recipe
from bnnfree.recipe.sections import section_of
from bnnfree.recipe.tree import parse_yaml
from bnnfree.train.networks import load_recipe, parse_recipe

SEED = 5
SMALL = {
    "model": {"name": "reactnet18"},
    "data": {"name": "cifar10"},
    "stages": [{"epochs": 1}, {"epochs": 2, "lr": 0.01}],
}
RICH = {
    "model": {"name": "reactnet_a", "norm": "free_paper", "width": 0.5, "pad_value": -1, "beta": "ref"},
    "data": {"name": "image_folder", "root": "1e-3", "augment": ["crop", "flip"], "batch_size": 7},
    "stages": [{"name": "on", "epochs": 3, "binarize": "activations"}, {"name": "2e5", "epochs": 1}],
    "optimizer": {"name": "sgd", "lr": 1e-7, "nesterov": True, "betas": [0.5, 0.999]},
    "schedule": {"name": "step", "milestones": [0.5, 0.75], "gamma": 0.3},
    "agc": {"clip": 0.01},
    "loss": {"name": "distribution", "teacher": "runs/é: #1"},
    "ema": {"decay": 0.999},
    "seed": 2**62,
}


def parse(*overrides, tree=SMALL):
    return parse_recipe(tree, "recipes/x.yaml", MODELS, overrides)


def message(*overrides, tree=SMALL, lines=1) -> str:
    """Message of `parse`, which has so many lines."""
    with pytest.raises(RecipeError) as caught:
        parse(*overrides, tree=tree)
    text = str(caught.value)
    assert isinstance(caught.value, BnnfreeError)
    assert len(text.splitlines()) == lines, text
    return text


def typed(override: str) -> str:
    """What an error of an override begins with."""
    return f"override {override!r}: "


def written(tmp_path, text, name="x.yaml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def complaint(path, *overrides) -> str:
    """Message of `load_recipe`, which has one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides, MODELS)
    assert len(str(caught.value).splitlines()) == 1, str(caught.value)
    return str(caught.value)


# the schema


def test_defaults_fill_what_a_recipe_does_not_say():
    recipe = parse()
    assert (recipe.model.norm, recipe.optimizer.name, recipe.schedule.name) == ("free", "adam", "linear")
    assert recipe.data.val_fraction == 0.1 and recipe.device == "auto" and recipe.stages[0].lr is None


def test_every_key_has_a_sentence():
    sections = [Recipe]
    for section in sections:
        for name, found in section.model_fields.items():
            inner = re.findall(r"\w+Recipe", str(found.annotation))
            nested = [s for s in vars(__import__("bnnfree.recipe.schema", fromlist=["x"])).items() if s[0] in inner]
            sections += [value for _, value in nested]
            assert nested or found.description, f"{section.__name__}.{name}"
    assert len(sections) == 11


# options of the normaliser


def test_norm_options_reach_the_recipe_from_the_command_line_one_by_one():
    recipe = parse("model.norm=gn", "model.norm_options.groups=4", "model.norm_options.eps=1e-3")
    assert recipe.model.norm_options == {"groups": 4, "eps": 1e-3} and parse().model.norm_options == {}
    assert parse("model.norm=frn", "model.norm_options={tlu: false}").model.norm_options == {"tlu": False}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("model.norm=gn", "model.norm_options.grups=4"), ": got 'grups', expected one of groups, eps. Did you mean"),
        (("model.norm=bn", "model.norm_options.groups=4"), ": got 'groups', expected one of eps, momentum, ghost."),
        (("model.norm_options.eps=1",), ": got 'eps', expected none: this norm has no options."),
        (("model.norm=gn", "model.norm_options.groups=-1"), ".groups: got -1, expected a number from 1 on"),
        (("model.norm=gn", "model.norm_options.groups=99999999999999999999999"), ".groups: got 9999999999"),
        (("model.norm=gn", "model.norm_options.groups=3"), ".groups: got 3 for 64 channels"),
        (("model.norm=gn", "model.norm_options.groups=7", "model.width=0.125"), ".groups: got 7 for 8 channels"),
        (("model.norm=gn", "model.norm_options.groups=64", "model.name=reactnet_a"), ".groups: got 64 for 32 channels"),
        (("model.norm=gn", "model.norm_options.groups=true"), ".groups: got True (bool), expected int or null."),
        (("model.norm=kn", "model.norm_options.prior=2"), ".prior: got 2, expected a number from 0 to 1."),
        (
            ("model.norm=ln_pn", "model.norm_options.activation=null"),
            ": got 'activation', expected one of eps, proxy_eps",
        ),
    ],
)
def test_a_wrong_norm_option_is_one_line_that_says_what_is_right(overrides, expected):
    assert f": model.norm_options{expected}" in message(*overrides)


def test_a_wrong_centre_is_one_line_that_says_what_is_right():
    said = message("model.norm=kn", "model.centre=true")
    assert "with 'model.centre=true': model.centre: got true with norm 'kn'" in said


@pytest.mark.parametrize("value", ["3", "[1]", "{groups: four}", "{1: 2}"])
def test_norm_options_are_a_table_of_names_and_numbers(value):
    assert "model.norm_options" in message("model.norm=gn", f"model.norm_options={value}")


# unknown keys and names


@pytest.mark.parametrize(
    ("override", "key", "hint"),
    [
        ("model.nrom=free", "model.nrom", "'model.norm'"),
        ("stages.1.epoch=2", "stages.1.epoch", "'stages.1.epochs'"),
        ("stage=2", "stage", "'stages'"),
        ("optimizer.beta=[0, 0]", "optimizer.beta", "model.beta"),
        ("optimizer.momentun=0.5", "optimizer.momentun", "'optimizer.momentum'"),
        ("data.batchsize=2", "data.batchsize", "'data.batch_size'"),
        ("schedule.warmup=2", "schedule.warmup", "'schedule.warmup_steps'"),
        ("agc.clips=2", "agc.clips", "'agc.clip'"),
        ("loss.teachers=x", "loss.teachers", "'loss.teacher'"),
        ("ema.decoy=0.5", "ema.decoy", "'ema.decay'"),
        ("free.windows=2", "free.windows", "'free.window'"),
        ("lr=2", "lr", "stages.0.lr or optimizer.lr"),  # in its place elsewhere
        ("model.epochs=2", "model.epochs", "stages.0.epochs"),
        ("model.float=2", "model.float", ""),  # pydantic's own name for a branch of a union
        ("model.str=2", "model.str", "'model.ste'"),
    ],
)
def test_an_unknown_key_names_file_key_and_the_nearest(override, key, hint):
    text = message(override)
    assert text.startswith(f"{typed(override)}{key}: unknown key.")
    assert (f"Did you mean {hint}?" in text) if hint else ("Did you mean" not in text)
    assert "Allowed here: " in text


@pytest.mark.parametrize(
    ("override", "allowed", "hint"),
    [
        ("model.norm=fre", "none, bn, free, free_paper", "free"),
        ("model.name=reactnet19", "reactnet18, reactnet20, reactnet15, reactnet_a", "reactnet18"),
        ("model.binarize=weight", "none, activations, weights, both", "weights"),
        ("model.beta=reff", "nf, ref, measured, none", "ref"),
        ("model.ste_window=sampled", "fixed, sample", "sample"),
        ("model.stem=cifr", "'auto', 'cifar', 'half' or 'imagenet'", "cifar"),
        ("stages.0.binarize=bot", "none, activations, weights, both", "both"),
        ("data.name=cifar", "digits, cifar10, cifar100", "cifar10"),
        ("data.augment=[crop, flop]", "flip, crop, shift", "flip"),
        ("data.bad_images=skipp", "'error' or 'skip'", "skip"),
        ("optimizer.name=adan", "adam, adamw, sgd, bop", "adam"),
        ("schedule.name=cosin", "linear, cosine, step, constant", "cosine"),
        ("loss.name=crossentropy", "cross_entropy, distribution", "cross_entropy"),
        ("precision=bf32", "fp32, bf16, bf16_trunk", "fp32"),
        ("agc.clip=aut", "a valid number or 'auto'", "auto"),
    ],
)
def test_an_unknown_name_lists_the_known_and_the_nearest(override, allowed, hint):
    text = message(override)
    key, _, value = override.partition("=")
    assert text.startswith(f"{typed(override)}{key}")
    assert f"got '{value.strip('[]').split(', ')[-1]}'" in text
    assert allowed in text and f"Did you mean '{hint}'?" in text


def test_models_may_be_an_iterator():
    with pytest.raises(RecipeError, match=r"expected one of a, b\."):
        parse_recipe(SMALL, "x", iter(["a", "b"]))


def test_a_space_that_is_missing_is_named():
    text = message("stages=[{epochs:2}]")
    assert "stages.0.'epochs:2': unknown key. Write a space after the colon: epochs: 2." in text


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("data.augment=flip", "Write a list: 'data.augment=[flip]'."),
        ("data.augment=crop, flip", "Write a list: 'data.augment=[crop, flip]'."),
        ("data.augment.0=flip", "Write a list: 'data.augment=[flip]'."),
        ("freeze=stem.*", "Write a list: 'freeze=[stem.*]'."),
        ("data.range=0,4095", "Write a list: 'data.range=[0, 4095]'."),
        ("stages={epochs: 2}", "Write a list: 'stages=[{epochs: 2}]'."),
        ("stages={epochs:2}", "Write a list: 'stages=[{epochs: 2}]'."),
        ("stages=2", "Write a list: 'stages=[{epochs: 2}]'."),
        ("model.width=[0.5]", "Write it without brackets: model.width=0.5."),
        ("data.image_size=[32]", "Write it without brackets: data.image_size=32."),
        ("model.norm=[bn, free]", "Write one of them."),
        ("optimizer=[{lr: 0.1}]", "Write it without brackets: 'optimizer={lr: 0.1}'."),
        ("model=reactnet20", "Did you mean model.name=reactnet20?"),
        ("optimizer.lr_mult={head.*:4.0}", "Write a space after the colon: head.*: 4.0."),
        ("optimizer={lr:1}", "Write a space after the colon: lr: 1."),
        ("stages.epochs=2", "Did you mean stages.0.epochs?"),
        ("freeze=[*]", """Quote a text that begins with *, and all of it for the shell: 'freeze=["*"]'."""),
        ("freeze=[stem.*, *.gain]", """'freeze=[stem.*, "*.gain"]'."""),
        ("optimizer.lr_mult={*.gain: 2.0}", """'optimizer.lr_mult={"*.gain": 2.0}'."""),
    ],
)
def test_a_value_of_another_shape_gets_what_to_type(override, remedy):
    assert remedy in message(override)


@pytest.mark.parametrize("override", ["data.range=5", "data.augment={flip: 1}", "model.width=[[1]]", "stages=x"])
def test_no_remedy_is_made_up(override):
    assert "Write" not in message(override)


def test_a_remedy_for_a_file_is_in_the_words_of_a_file():
    text = message(tree={**SMALL, "freeze": "stem.*"})
    assert text == "recipes/x.yaml: freeze: got 'stem.*' (str), expected a valid list. Write a list: freeze: [stem.*]."


def test_what_the_file_says_is_the_files_and_what_is_typed_is_an_overrides():
    text = message("optimizer.lr=x", "model.norm=bn", tree={**SMALL, "accumulate": "y"}, lines=2)
    assert [line.split(": ")[0] for line in sorted(text.splitlines())] == [
        "override 'optimizer.lr=x'",
        "recipes/x.yaml",
    ]
    assert message("free.group=3", "model.norm=bn").startswith("override 'free.group=3': free.group: got 3, which")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("freeze: [*.gain]", "A text that begins with *, & or another sign needs quotes."),
        ("data:\n  name:fake\n", "Write a space after the colon: name: fake."),
        ("model: {name:reactnet18}", "Write a space after the colon: name: reactnet18."),
        ("seed:1", "Is there a space after each colon?"),
    ],
)
def test_slips_of_yaml_in_a_file_are_named(tmp_path, text, words):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, f"{text}\n" if "model" in text or "data" in text else PLAIN + text + "\n"))
    assert words in str(caught.value)


# bounds


@pytest.mark.parametrize(
    "override",
    ["data.image_size=999999999", "model.width=1e300", "data.samples=99999999999", "stages.0.epochs=9e19"]
    + ["stages.0.epochs=99999999999999999999", "data.batch_size=9223372036854775808", "data.classes=2147483648"]
    + ["data.channels=99999999", "data.workers=99999", "accumulate=0xffffffffffffffffff", "settle=1e30"]
    + ["schedule.warmup_steps=99999999999999999999", "free.calibration=99999999999", "probe.every=99999999999"]
    + ["data.cache_gb=1e308", "data.train_limit=99999999999999", "seed=1:30", "optimizer.lr=1:30.5", "model.width=.inf"]
    + ["model.width=900", "accumulate=0"],
)
def test_what_is_beyond_all_bounds_is_one_line(override):
    assert message(override).startswith(f"{typed(override)}{override.partition('=')[0]}: got ")


def test_fake_images_that_no_memory_holds_are_one_line():
    fake = ["data={name: fake, samples: 99999999}"]
    assert message(*fake).startswith(
        "recipes/x.yaml with 'data={name: fake, samples: 99999999}': data.samples: got 99999999, which with data"
    )


def test_long_numbers_to_base_60_take_no_time(tmp_path):
    path = written(tmp_path, PLAIN + "seed: 1" + ":1" * 200_000 + "\n")
    assert "seed: got '1:1" in complaint(path) and len(complaint(path)) < 400
    assert parse_yaml("[1:30, 12:30:45, 1_000, 0x1f, 010, -3, .5, 1e3, 1.5e+3]") == [
        "1:30", "12:30:45", 1000, 31, 8, -3, 0.5, 1000.0, 1500.0
    ]  # fmt: skip


def bomb(levels, form):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {form.replace('*', f'*a{i - 1}')}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("form", ["{l: *, r: *}", "[*, *]", "{<<: [*, *]}"])
def test_aliases_that_grow_without_end_are_one_line(tmp_path, form):
    written(tmp_path, PLAIN + bomb(40, form), "base.yaml")
    for text in ("extends: base.yaml\n" + bomb(40, form), PLAIN + bomb(40, form)):
        assert "stands for more than 100,000 values" in complaint(written(tmp_path, text))


# types and ranges


@pytest.mark.parametrize(
    ("override", "got", "expected"),
    [
        ("stages.0.epochs='3'", "'3' (str)", "a valid integer"),
        ("stages.0.epochs=2.0", "2.0 (float)", "a valid integer"),
        ("stages.0.epochs=true", "True (bool)", "a valid integer"),
        ("stages.0.epochs=null", "null", "a valid integer"),
        ("stages.0.epochs=0", "0 (int)", "greater than or equal to 1"),
        ("seed=false", "False (bool)", "a valid integer"),
        ("seed=-1", "-1 (int)", "greater than or equal to 0"),
        ("seed=18446744073709551616", "18446744073709551616 (int)", "less than 9223372036854775808"),
        ("model.width=on", "True (bool)", "a valid number"),
        ("model.width='1'", "'1' (str)", "a valid number"),
        ("model.width=.nan", "nan (float)", "a finite number"),
        ("optimizer.lr=.inf", "inf (float)", "a finite number"),
        ("optimizer.lr=1e999", "inf (float)", "a finite number"),
        ("optimizer.lr=null", "null", "a valid number"),
        ("optimizer.lr=0", "0 (int)", "greater than 0"),
        ("model.pad_value=true", "True (bool)", "a valid integer"),
        ("model.pad_value=1.0", "1.0 (float)", "a valid integer"),
        ("model.norm=null", "null", "a valid string"),
        ("model.norm=[free]", "['free'] (list)", "a valid string"),
        ("data.root=2024-01-31", "datetime.date(2024, 1, 31) (date)", "a valid string"),
        ("data.download=1", "1 (int)", "a valid boolean"),
        ("data.augment=flip", "'flip' (str)", "a valid list"),
        ("data.augment={flip: 1}", "{'flip': 1} (dict)", "a valid list"),
        ("model=[reactnet18]", "['reactnet18'] (list)", "keys with values"),
        ("model=null", "null", "keys with values"),
        ("agc=0.02", "0.02 (float)", "keys with values"),
        ("stages=[]", "[] (list)", "a list of at least 1"),
        ("stages=3", "3 (int)", "a valid list"),
        ("stages={epochs: 3}", "{'epochs': 3} (dict)", "a valid list"),
        ("optimizer.betas=[0.9]", "[0.9] (list)", "a list of at least 2"),
        ("optimizer.betas=[0.9, 0.9, 0.9]", "[0.9, 0.9, 0.9] (list)", "a list of at most 2"),
        ("agc.clip=[1]", "[1] (list)", "a valid number or 'auto'"),
    ],
)
def test_a_wrong_value_names_key_received_and_expected(override, got, expected):
    key = override.partition("=")[0]
    assert message(override).startswith(f"{typed(override)}{key}: got {got}, expected {expected}.")


@pytest.mark.parametrize(
    ("override", "key"),
    [("data.augment=[flip, 3]", "data.augment.1"),
     ("optimizer.betas=[0.9, 1]", "optimizer.betas.1"), ("stages=[{epochs: 1}, 3]", "stages.1"),
     ("schedule={name: step, milestones: [x]}", "schedule.milestones.0")],
)  # fmt: skip
def test_a_wrong_item_of_a_list_is_named_by_its_number(override, key):
    assert message(override).startswith(f"{typed(override)}{key}: got ")


@pytest.mark.parametrize("key", ["model", "data", "stages", "model.name", "data.name", "stages.0.epochs"])
def test_a_missing_key_is_named(key):
    tree = copy.deepcopy(SMALL)
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part) if part.isdigit() else part]
    del node[last]
    assert message(tree=tree) == f"recipes/x.yaml: {key}: this key is missing and has no default."


def test_every_problem_has_its_line():
    text = message("model.nrom=bn", "data.batch_size=0", "stages.1.epochs=x", "agc.clip=x", lines=4)
    keys = [line.split(": ")[1] for line in text.splitlines()]
    assert all(line.startswith("override '") for line in text.splitlines())
    assert keys == ["model.nrom", "data.batch_size", "stages.1.epochs", "agc.clip"]


@pytest.mark.parametrize("key", [1, None, True, 2.5])
def test_a_key_that_is_no_text_is_an_error(key):
    text = message(tree={**SMALL, "model": {"name": "reactnet18", key: 1}})
    assert text.startswith("recipes/x.yaml: model.") and "expected a name. Allowed here: name, norm" in text


@pytest.mark.parametrize("value", ["a\nb", "x" * 10_000, {"k" * 999: ["y\n" * 999] * 999}, 2**9000], ids=type)
def test_what_was_received_is_shown_on_one_short_line(value):
    tree = {**SMALL, "data": {"name": "cifar10", "batch_size": value if value != 2**9000 else [value]}}
    assert len(message(tree=tree)) < 700
    tree = {**SMALL, "seed": value}
    assert len(message(tree=tree)) < 700
    tree = {**SMALL, str(type(value)) + "\n": value}
    assert len(message(tree=tree)) < 700


@pytest.mark.parametrize("tree", [None, [], "x", 3])
def test_a_recipe_that_is_no_mapping_is_an_error(tree):
    assert message(tree=tree).startswith("recipes/x.yaml: ")


# contradictions


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.name=distribution"], "loss.name is 'distribution' but loss.teacher is not given"),
        (
            ["loss.teacher=runs/t"],
            "loss.teacher: got 'runs/t', which nothing reads here: it is for loss.name=distribution",
        ),
        (["loss={name: distribution, teacher: t, label_smoothing: 0.1}"], "for loss.name=cross_entropy."),
        (["loss={name: distribution, teacher: 'torchvision:resnet34'}"], "data.name is 'cifar10'"),
        (["schedule.name=step"], "schedule.milestones is empty"),
        (["schedule.milestones=[0.5]"], "schedule.milestones: got [0.5], which nothing reads here"),
        (["schedule={name: step, milestones: [1.5]}"], "each between 0 and 1"),
        (["agc.clip=0"], "agc.clip: got 0.0, expected a number above 0"),
        (["optimizer={name: sgd, nesterov: true, momentum: 0}"], "optimizer.momentum is 0"),
        (["model.norm=gn_pn", "model.activation=trunk"], "model.activation: got 'trunk' for norm 'gn_pn'"),
        (["stages.1.image_size=16"], "stages.1.image_size: got 16 for the last stage"),
        (["optimizer.name=bop"], "set model.standardize=false"),
        (["optimizer.name=bop", "model.standardize=false", "stages.1.binarize=activations"], "stages.1"),
    ],
)
def test_a_contradiction_is_told_in_the_words_of_the_recipe(overrides, words):
    text = message(*overrides)
    assert words in text and any(repr(override) in text for override in overrides)


def test_what_only_looks_like_a_contradiction_is_accepted():
    parse("optimizer.name=bop", "model.standardize=false")
    parse("optimizer.name=bop", "model.norm=none")
    parse("data.name=imagenet", "loss={name: distribution, teacher: 'torchvision:resnet34'}")
    parse("data.name=image_folder", tree={**SMALL, "data": {"name": "cifar10", "download": True}})


# overrides


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("stages.0.epochs=20", lambda r: r.stages[0].epochs, 20),
        ("stages.1.lr=1e-3", lambda r: r.stages[1].lr, 0.001),  # plain YAML 1.1 calls it text
        ("optimizer.lr=+5E-3", lambda r: r.optimizer.lr, 0.005),
        ("optimizer.lr=.5e-3", lambda r: r.optimizer.lr, 0.0005),
        ("optimizer.lr=1.e-3", lambda r: r.optimizer.lr, 0.001),
        ("optimizer.lr=1", lambda r: r.optimizer.lr, 1.0),
        ("optimizer.betas=[0.5, 0.6]", lambda r: r.optimizer.betas, [0.5, 0.6]),
        ("optimizer.betas.1=0.99", lambda r: r.optimizer.betas, [0.5, 0.99]),
        ("data.augment=[]", lambda r: r.data.augment, []),
        ("data.augment=[flip]", lambda r: r.data.augment, ["flip"]),
        ("data.root='1e-3'", lambda r: r.data.root, "1e-3"),
        ('data.root="a=b c"', lambda r: r.data.root, "a=b c"),
        ("data.root=/d/x=1", lambda r: r.data.root, "/d/x=1"),
        ("data.root=C:\\data", lambda r: r.data.root, "C:\\data"),
        ("data.root=null", lambda r: r.data.root, None),
        ("data.root=", lambda r: r.data.root, None),
        ("deterministic=false", lambda r: r.deterministic, False),
        ("model.norm=none", lambda r: r.model.norm, "none"),
        ("ema.decay=0.9", lambda r: r.ema.decay, 0.9),  # in a section that the file does not have
        ("ema={decay: 0.9}", lambda r: r.ema.decay, 0.9),
        (" seed = 3", lambda r: r.seed, 3),
        ("stages=[{epochs: 9}]", lambda r: [s.epochs for s in r.stages], [9]),
    ],
)
def test_an_override_sets_a_value_of_its_type(override, read, value):
    tree = {**SMALL, "optimizer": {"betas": [0.5, 0.6]}}
    found = read(parse(override, tree=tree))
    assert found == value and type(found) is type(value)


def test_the_last_override_wins_and_the_tree_is_not_changed():
    tree = copy.deepcopy(SMALL)
    assert parse("seed=1", "stages.0.epochs=7", "seed=2", tree=tree).seed == 2
    assert tree == SMALL


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "override 'seed': expected key=value"),
        ("=3", "override '=3': expected key=value"),
        ("", "override '': expected key=value"),
        ("model..norm=bn", "override 'model..norm=bn': expected key=value"),
        ("model.=bn", "expected key=value"),
        ("data.root=[a", "'[a' is not a value that YAML knows"),
        ("data.root=@a", "Quote a text"),
        ("data.root=*a", "is not a value that YAML knows"),
        ("data.root=2001-13-45", "is not a value that YAML knows"),  # month 13: a ValueError within PyYAML
        ("seed=0x_", "is not a value that YAML knows"),
        ("seed=!!bool maybe", "is not a value that YAML knows"),
        ("seed=!!python/object:os.system x", "is not a value that YAML knows"),
        ("data={a: 1, a: 2}", "is not a value that YAML knows"),
        ("stages.2.epochs=1", "stages.2.epochs: got item '2', expected a number from 0 to 1."),
        ("stages.-1.epochs=1", "got item '-1', expected a number from 0 to 1."),
        ("stages.²=1", "got item '²', expected a number from 0 to 1."),
        ("stages.both.epochs=1", "got item 'both', expected a number from 0 to 1."),
        ("data.augment.0=flip", "data.augment: got {'0': 'flip'} (dict), expected a valid list."),
        ("model.name.x=1", "model.name.x: model.name is a value and has no keys."),
        ("stages.0.epochs.x=1", "stages.0.epochs is a value and has no keys."),
    ],
)
def test_a_bad_override_says_what_is_wrong_with_it(override, words):
    assert words in message(override)


def test_an_item_of_an_empty_list_cannot_be_set():
    assert "the list is empty" in message("stages.0.epochs=1", tree={**SMALL, "stages": []})


def test_an_override_changes_one_place_only_where_yaml_aliases_share(tmp_path):
    text = "model: {name: reactnet18}\ndata: {name: fake}\nstages: [&s {epochs: 1}, *s]\n"
    recipe = load_recipe(written(tmp_path, text), ["stages.0.epochs=5"])
    assert [stage.epochs for stage in recipe.stages] == [5, 1]


# files

PLAIN = "model: {name: reactnet18}\ndata: {name: fake}\nstages: [{epochs: 1}]\n"


def test_a_file_is_named_in_what_is_wrong_with_its_keys(tmp_path):
    path = written(tmp_path, PLAIN + "sed: 1\n")
    assert complaint(path).startswith(f"{path}: sed: unknown key. Did you mean 'seed'?")


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = written(tmp_path, "\ufeff" + PLAIN.replace("\n", "\r\n"))
    assert load_recipe(path) == load_recipe(written(tmp_path, PLAIN, "y.yaml"))


def test_a_merge_key_is_no_duplicate(tmp_path):
    text = PLAIN.replace("[{epochs: 1}]", "[&s {epochs: 1, lr: 0.5}, {<<: *s, epochs: 2}]")
    stages = load_recipe(written(tmp_path, text)).stages
    assert [(stage.epochs, stage.lr) for stage in stages] == [(1, 0.5), (2, 0.5)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (PLAIN + "seed: 1\nseed: 2\n", "key 'seed' twice"),
        (PLAIN.replace("name: fake", "name: fake, name: fake"), "key 'name' twice"),
        ("model: {name", "not valid YAML"),
        ("model:\n\tname: x\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: &x [*x]\n", "not valid YAML"),  # a list that holds itself
        ("? {a: 1}\n: 2\n", "not valid YAML"),
        ("a: 2001-13-45\n", "not valid YAML: ValueError"),
        ("a: !!map [1]\n", "not valid YAML"),
        ("a: " + "[" * 999, "not valid YAML"),
        ("a: !!python/name:os.system\n", "not valid YAML"),
        ("", "is empty, expected keys such as model, data, stages."),
        ("# nothing\n", "is empty"),
        ("- a\n", "got a list, expected keys"),
        ("just words\n", "got a str, expected keys"),
        (b"\x80\x02\xff\xfe", "cannot be read as text"),
        (b"PK\x03\x04\x00\x00", "not valid YAML"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, words):
    path = written(tmp_path, text)
    assert complaint(path).startswith(f"recipe {path}: ") and words in complaint(path)


def test_a_missing_file_names_the_nearest(tmp_path):
    written(tmp_path, PLAIN, "cifar10_reactnet18.yaml")
    path = tmp_path / "cifar10_reactnet81.yaml"
    assert complaint(path) == f"recipe {path}: no such file. Did you mean '{tmp_path}/cifar10_reactnet18.yaml'?"
    assert complaint(tmp_path / "no" / "x.yaml").endswith("no such file.")


def test_a_folder_is_no_recipe(tmp_path):
    assert complaint(tmp_path).startswith(f"recipe {tmp_path}: cannot be read as text")


# extends


def test_extends_fills_in_what_the_file_does_not_say(tmp_path):
    written(tmp_path, PLAIN + "optimizer: {lr: 0.5, eps: 0.5}\nseed: 4\n", "base.yaml")
    path = written(tmp_path, "extends: base.yaml\noptimizer: {lr: 0.25}\nstages: [{epochs: 2}, {epochs: 3}]\n")
    recipe = load_recipe(path, ["seed=9"])
    assert (recipe.optimizer.lr, recipe.optimizer.eps, recipe.seed) == (0.25, 0.5, 9)
    assert [stage.epochs for stage in recipe.stages] == [2, 3]  # lists are replaced as a whole
    assert load_recipe(tmp_path / "base.yaml").optimizer.lr == 0.5


def test_null_and_a_null_base_are_possible(tmp_path):
    written(tmp_path, "extends: null\n" + PLAIN + "ema: {decay: 0.5}\n", "base.yaml")
    assert load_recipe(written(tmp_path, "extends: base.yaml\nema: {decay: null}\n")).ema.decay is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: bose.yaml\n", "extends: bose.yaml: no such file. Did you mean 'base.yaml'?"),
        ("extends: x.yaml\n", "extends x.yaml, which extends another; one level is allowed."),  # itself
        ("extends: middle.yaml\n", "extends middle.yaml, which extends another; one level is allowed."),
        ("extends: [base.yaml]\n", "extends: got ['base.yaml'], expected the name of a recipe beside it."),
        ("extends: ''\n", "extends: got '', expected the name"),
        ("extends: 3\n", "extends: got 3, expected the name"),
        ("extends: .\n", "extends: got '.', expected the name"),
        ("extends: ../x/base.yaml\n", "expected the name of a recipe beside it."),
        ("extends: /etc/passwd\n", "expected the name of a recipe beside it."),
        ('extends: "a\\0b"\n', "cannot be read as text"),
        ("extends: empty.yaml\n", "extends: empty.yaml: is empty"),
    ],
)
def test_a_bad_extends_names_both_files(tmp_path, text, words):
    written(tmp_path, PLAIN, "base.yaml")
    written(tmp_path, "extends: base.yaml\n", "middle.yaml")
    written(tmp_path, "", "empty.yaml")
    path = written(tmp_path, text)
    assert complaint(path).startswith(f"recipe {path}: ") and words in complaint(path)


def test_a_mistake_in_the_base_names_the_base(tmp_path):
    written(tmp_path, PLAIN + "sed: 1\n", "base.yaml")
    path = written(tmp_path, "extends: base.yaml\n")
    assert complaint(path).startswith(f"{path} (extends base.yaml): sed: unknown key.")


# saving


@pytest.mark.parametrize("tree", [SMALL, RICH], ids=["small", "rich"])
@pytest.mark.parametrize("overrides", [[], ["model.norm=bn"], ["stages.0.lr=1e-9", "model.latent_std=null"]])
def test_a_saved_recipe_is_read_back_the_same(tmp_path, tree, overrides):
    recipe = parse(*overrides, tree=tree)
    save_recipe(recipe, tmp_path / "saved.yaml", header="# two words\n")
    assert (tmp_path / "saved.yaml").read_text().startswith("# two words\n")
    again = load_recipe(tmp_path / "saved.yaml", models=MODELS)
    assert again == recipe and again.model_dump() == recipe.model_dump()
    assert parse_recipe(recipe.model_dump(), "checkpoint") == recipe


@pytest.mark.parametrize(
    "text", ["1e-3", "1e5", "on", "null", "", "~", "3", "2001-01-01", "a: b", "#", "é\n", "0x1", "- a"]
)
def test_any_text_survives_saving(tmp_path, text):
    recipe = parse_recipe({**SMALL, "data": {"name": "fake", "root": text}}, "x")
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").data.root == text


# anything at all

STRANGE = [
    None, True, False, 0, -1, 1, 3, 2**80, 0.5, -0.5, math.nan, math.inf,
    "", "x", "free", "both", "1e-3", "a\nb", "\udcff", b"x",
    [], [1], ["flip"], [[]], {}, {"name": "x"}, {1: 2}, {None: 1}, {(1, 2): 3}, {"a.b": {"": 1}},
]  # fmt: skip


def places(node, path=()):
    """The path of every node below `node`."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def mutate(tree, rng):
    """Replace, remove or add something at a random place."""
    *parents, last = rng.choice(list(places(tree)))
    node = tree
    for key in parents:
        node = node[key]
    action = rng.random()
    if action < 0.7:
        node[last] = copy.deepcopy(rng.choice(STRANGE))
    elif action < 0.85:
        del node[last]
    elif isinstance(node, dict):
        node[rng.choice(["nrom", "float", "lr", 1, None, "", "a b\n"])] = copy.deepcopy(rng.choice(STRANGE))
    else:
        node.append(copy.deepcopy(rng.choice(STRANGE)))


def test_a_mutated_recipe_is_a_recipe_or_a_recipe_error():
    rng = random.Random(SEED)
    accepted = 0
    for trial in range(400):
        tree = copy.deepcopy(rng.choice([SMALL, RICH]))
        for _ in range(rng.choice([1, 1, 2, 3])):
            if tree:
                mutate(tree, rng)
        try:
            recipe = parse_recipe(tree, "x.yaml", MODELS)
        except RecipeError as error:
            for line in str(error).splitlines():
                assert line.startswith("x.yaml: ") and len(line) < 700, (SEED, trial, line)
        else:
            assert isinstance(recipe, Recipe), (SEED, trial)
            accepted += 1
    assert 20 < accepted < 300


def test_random_yaml_is_a_value_or_a_recipe_error(tmp_path):
    rng = random.Random(SEED)
    pieces = [
        "a",
        "model",
        "stages",
        ": ",
        "- ",
        "\n",
        "  ",
        "{",
        "}",
        "[",
        "]",
        "&a ",
        "*a",
        "<<",
        "!!int ",
        "!!bool ",
    ]
    pieces += [
        "!!map ",
        "!!omap ",
        "!!timestamp ",
        "!!binary ",
        "!!float ",
        "? ",
        ",",
        '"',
        "'",
        "|",
        ">",
        "#",
        "%",
    ]
    pieces += [
        "2001-13-45",
        "0x_",
        "1e-3",
        "190:20:30",
        "~",
        "=",
        "\t",
        "\0",
        "---\n",
        ".inf",
        "_",
        "é",
        "!!set ",
    ]
    for trial in range(400):
        text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 12)))
        key = rng.choice(["model", "stages.0.epochs", "stages", "model.name", "optimizer.betas", "agc.clip", "seed"])
        try:
            parse(f"{key}={text}")
        except RecipeError as error:
            assert str(error), (SEED, trial)
        path = written(tmp_path, text)
        with pytest.raises(RecipeError):  # no such text holds a whole recipe
            load_recipe(path)


def test_what_save_recipe_writes_is_plain_yaml_to_others(tmp_path):
    recipe = parse(tree=RICH)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text()) == recipe.model_dump()


def test_the_key_table_explains_every_key():
    from bnnfree.recipe.keys import key_table

    lines = key_table().splitlines()
    explained = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line}

    def check(section, prefix):
        for name, found in section.model_fields.items():
            inner = section_of(found.annotation)
            if inner is None:
                assert found.description and explained[prefix + name].endswith(found.description)
            else:
                check(inner, f"{prefix}{name}[]." if "list" in str(found.annotation) else f"{prefix}{name}.")

    check(Recipe, "")
    assert explained["model.norm"].startswith("str") and explained["stages[].epochs"].startswith("int")
    assert "(needed)" in explained["stages[].epochs"] and "null" in explained["data.root"]
