"""Resolved recipes, keys that are no more, and the traits by which keys are judged without torch."""

import itertools
import subprocess
import sys

import pytest
import yaml
from helpers import ROOT, TINY, tiny, train

from bnnfree import recipe as room
from bnnfree.errors import BnnfreeError
from bnnfree.models import MODELS
from bnnfree.nn import BINARIZE, NORMS, Design
from bnnfree.normalisers import OWN
from bnnfree.recipe import RecipeError, Resolved, resolve
from bnnfree.recipe.read import save_recipe
from bnnfree.recipe.reads import TRAITS, traits_of
from bnnfree.recipe.resolve import OPEN, completed, left_open, reopened, values_of
from bnnfree.recipe.retired import RETIRED
from bnnfree.recipe.schema import Recipe
from bnnfree.train import load_checkpoint, load_recipe
from bnnfree.train.checkpoint import save_checkpoint
from bnnfree.train.networks import LAYERS, look_at, parse_recipe

SMALL, LARGE = {"image_size": [64, 65]}, {"image_size": [65, 300]}


@pytest.mark.parametrize("norm", NORMS)
def test_every_open_key_becomes_the_normalisers_own_value(norm):
    written = tiny(f"model.norm={norm}")
    assert left_open(written) == list(OPEN)
    found = resolve(written, SMALL)
    assert isinstance(found, Resolved) and left_open(found) == []
    assert found.agc.clip == NORMS[norm].agc
    assert {key: getattr(found.model, key) for key in OWN} == {key: getattr(Design(norm=norm), key) for key in OWN}
    rest = written.model_dump(exclude={"model": set(OWN) | {"stem"}, "agc": {"clip"}})
    assert found.model_dump(exclude={"model": set(OWN) | {"stem"}, "agc": {"clip"}}) == rest


def test_what_is_written_stays_and_a_resolved_recipe_is_itself():
    changes = ["model.alpha=0.3", "model.stem=imagenet", "agc.clip=null", "model.norm=free_paper", "model.scale=none"]
    found = resolve(tiny(*changes), SMALL)
    assert (found.model.alpha, found.model.stem, found.agc.clip, found.model.scale) == (0.3, "imagenet", None, "none")
    assert resolve(found, LARGE) is found
    assert resolve(parse_recipe(found.model_dump(), "x", MODELS), LARGE) == found


@pytest.mark.parametrize(("data", "stem"), [(SMALL, "cifar"), (LARGE, "imagenet")])
def test_the_stem_follows_the_shorter_side_of_the_images(data, stem):
    assert resolve(tiny(), data).model.stem == stem
    assert resolve(tiny("model.stem=half"), data).model.stem == "half"
    assert completed(tiny()).model.stem == "auto"


def test_one_recipe_resolved_leaves_the_next_as_written():
    clips = [resolve(tiny(f"model.norm={norm}"), SMALL).agc.clip for norm in ("free", "free_paper", "free")]
    assert clips == [None, 0.02, None]
    written = tiny()
    resolve(written, SMALL)
    assert written.model.alpha is None and written.agc.clip == "auto"


@pytest.mark.parametrize(
    ("norm", "changes", "gradient"),
    [("free", [], True), ("bn", [], False), ("bn", ["model.centre_head=true"], True),
     ("bn", ["model.centre=true"], False),
     ("bn", ["model.centre=true", "model.centre_head=true"], "head"),
     ("bn", ["model.centre_head=true", "model.centre_gradient=false"], False),
     ("free", ["model.centre_gradient=head"], "head")],
)  # fmt: skip
def test_a_centred_classifier_centres_its_gradient_unless_told(norm, changes, gradient):
    model = resolve(tiny(f"model.norm={norm}", *changes), SMALL).model
    assert model.centre_gradient == gradient
    net = MODELS["reactnet20"](3, **model.model_dump(exclude={"name"}))
    convs = [m for block in net.blocks for m in block.modules() if getattr(m, "gradient_centre", None) is not None]
    assert bool(convs) == (gradient is True and model.centre)
    assert (getattr(net.head, "gradient_centre", None) is not None) == bool(gradient)


@pytest.mark.parametrize("norm", NORMS)
def test_recipes_differ_in_what_was_chosen_whether_it_is_written_or_not(norm):
    written = tiny(f"model.norm={norm}", "model.alpha=0.9", "model.ste=clip")
    found = reopened(resolve(written, SMALL))
    assert found.model_dump(exclude={"model": {"stem"}}) == written.model_dump(exclude={"model": {"stem"}})
    assert resolve(found, SMALL) == resolve(written, SMALL)
    clipped = reopened(tiny(f"model.norm={norm}", "agc.clip=0.3"))
    assert clipped.agc.clip == 0.3 and clipped.model.scale is None


def test_values_that_are_kept_come_before_the_normalisers_and_after_what_is_written():
    before = resolve(tiny("model.alpha=0.7", "model.scale=none", "agc.clip=0.5"), LARGE)
    kept = values_of(before, left_open(before) + list(OPEN))
    now = resolve(tiny("model.scale=learned"), SMALL, kept)
    assert (now.model.alpha, now.model.scale, now.agc.clip, now.model.stem) == (0.7, "learned", 0.5, "imagenet")


def test_a_run_holds_the_resolved_recipe(tmp_path):
    train(tmp_path, "stages=[{epochs: 1}]")
    wanted = resolve(tiny("stages=[{epochs: 1}]"), {"image_size": [9, 9]}).model_dump()
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == wanted
    for name in ("last.pt", "best.pt"):
        state = load_checkpoint(tmp_path / name)
        assert state["recipe"] == wanted and state["open"] == list(OPEN)
    assert load_recipe(tmp_path / "recipe.yaml", models=MODELS).model_dump() == wanted
    with pytest.raises(BnnfreeError, match=r"model\.alpha \(1\.0 -> 0\.5\)"):
        train(tmp_path, "stages=[{epochs: 1}]", "model.alpha=0.5", resume=True)


@pytest.mark.parametrize("norm", NORMS)
def test_a_stored_recipe_takes_another_norm_with_that_ones_values(tmp_path, norm):
    """As the recipe does that it came from; what was chosen stays."""
    for changes in (["model.alpha=0.3"], ["model.norm=bn", "model.centre_head=true"], ["model.norm=free_paper"]):
        save_recipe(resolve(tiny(*changes), SMALL), tmp_path / "run.yaml")
        (tmp_path / "own.yaml").write_text(f"extends: run.yaml\nmodel: {{norm: {norm}, ste: clip}}\n")
        wanted = resolve(tiny(*changes, f"model.norm={norm}", "model.ste=clip"), SMALL)
        for path, overrides in (("run", [f"model.norm={norm}", "model.ste=clip"]), ("own", [])):
            found = load_recipe(tmp_path / f"{path}.yaml", overrides, MODELS)
            assert resolve(found, SMALL).model_dump() == wanted.model_dump(), (path, changes)


def test_every_recipe_is_read_and_resolved_without_torch():
    code = """
import sys
from pathlib import Path
from bnnfree.recipe import load_recipe, resolve
for path in Path("recipes").glob("*.yaml"):
    resolve(load_recipe(path, ["model.norm=gn", "model.norm_options.groups=4"]), {"image_size": [32, 32]})
print(sorted({"torch", "numpy", "PIL", "torchvision", "tqdm"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_what_was_written_and_is_left_out_on_resume_is_told(tmp_path):
    train(tmp_path, "stages=[{epochs: 1}]", "model.alpha=0.5")
    with pytest.raises(BnnfreeError, match=r"model\.alpha \(0\.5 -> 1\.0\)"):
        train(tmp_path, "stages=[{epochs: 1}]", resume=True)
    train(tmp_path, "stages=[{epochs: 2}]", "model.alpha=0.5", resume=True)


# -- traits


def test_traits_have_a_test_of_layers_each():
    assert LAYERS.keys() == TRAITS.keys()


CHANGES = [
    *([f"model.{key}={value}"] for key in ("standardize", "centre", "centre_gradient", "centre_head")
      for value in ("true", "false")),
    ["model.beta=measured"],
    ["model.centre=true", "model.centre_head=true"],
]  # fmt: skip


@pytest.mark.parametrize(("norm", "binarize"), list(itertools.product(NORMS, BINARIZE)))
def test_a_recipe_tells_the_traits_that_its_network_has(norm, binarize):
    for changes in [[], *CHANGES]:
        if norm == "kn" and "model.centre=true" in changes:
            continue
        tree = {**TINY, "stages": [{"epochs": 1}], "free": {}}
        recipe = room.parse_recipe({**tree, "model": {**TINY["model"], "norm": norm}}, "x", None)
        values = {key.removeprefix("model."): yaml.safe_load(v) for key, _, v in (c.partition("=") for c in changes)}
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={**values, "binarize": binarize})})
        assert traits_of(recipe) == look_at(recipe, MODELS), changes


@pytest.mark.parametrize("name", MODELS)
def test_no_network_has_a_trait_that_its_recipe_does_not_tell(name):
    """So that a key which is refused without builders is refused with them."""
    recipe = tiny(f"model.name={name}")
    assert look_at(recipe, MODELS) <= traits_of(recipe)


# -- retired keys


def test_a_retired_key_is_in_no_section():
    known = {f"{name}.{key}" for name, field in Recipe.model_fields.items()
             for key in getattr(field.annotation, "model_fields", {})}  # fmt: skip
    assert not RETIRED.keys() & known and known


SET = {
    "model.ste_parameter": 1.5, "model.ste_last": 0.7, "model.start": "balanced", "optimizer.gain_decay": 0.1,
    "free.freeze": 0.5, "free.gather": True, "probe.images": 20, "optimizer.bnp_floor": 0.1, "agc.eps": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("key", RETIRED)
def test_a_recipe_that_sets_a_retired_key_is_told_why_it_is_gone(tmp_path, key):
    value = SET[key]
    said = rf"tiny\.yaml: {key}: got {value!r}, but this key is no more: .*Leave it out"
    with pytest.raises(RecipeError, match=said):
        tiny(f"{key}={yaml.safe_dump(value).split()[0]}")
    section, _, name = key.partition(".")
    tree = {**TINY, section: {**TINY.get(section, {}), name: value}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(RecipeError, match=rf"x\.yaml: {key}: got {value!r}") as caught:
        load_recipe(tmp_path / "x.yaml", models=MODELS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [key for key, retired in RETIRED.items() if retired.neutral])
def test_what_a_run_stored_at_no_effect_is_left_out_and_else_refused(tmp_path, key):
    recipe = resolve(tiny("stages=[{epochs: 1}]"), SMALL)
    section, _, name = key.partition(".")
    for value in (*RETIRED[key].neutral, SET[key]):
        tree = recipe.model_dump()
        tree[section][name] = value
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        if value == SET[key]:
            for read in (lambda: load_recipe(tmp_path / "recipe.yaml"), lambda tree=tree: parse_recipe(tree, "stored")):
                with pytest.raises(RecipeError, match=rf"{key}: got {value!r}, .* An older bnnfree opens this file"):
                    read()
        else:
            assert load_recipe(tmp_path / "recipe.yaml").model_dump() == recipe.model_dump()
            assert parse_recipe(tree, "stored").model_dump() == recipe.model_dump()


@pytest.mark.parametrize(("gather", "group"), [(False, 0), (True, 32)])
def test_what_was_stored_before_groups_centres_as_it_did(tmp_path, gather, group):
    """Such files name every key: a pass was centred as a whole, or as groups are."""
    tree = resolve(tiny(), SMALL).model_dump()
    del tree["free"]["group"]
    tree["free"]["gather"] = gather
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert load_recipe(tmp_path / "recipe.yaml").free.group == group
    assert parse_recipe(tree, "stored").free.group == group


# -- checkpoints of version 2


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    """A run as version 2 wrote it: its recipe as written, with retired keys, and the values apart."""
    folder = tmp_path_factory.mktemp("second") / "run"
    changes = ["stages=[{epochs: 1}]", "model.norm=bn", "model.centre=true", "model.centre_head=true"]
    train(folder, *changes)
    return folder, changes


def as_version_2(state, changes, **more):
    """The state, and what its design was."""
    model = state["recipe"]["model"]
    design = {key: model[key] for key in (*OWN, "stem")} | {"centre_gradient": None}
    written = tiny(*changes).model_dump()
    written["agc"]["clip"] = None
    stored = [(key, retired.neutral[0]) for key, retired in RETIRED.items() if retired.neutral]
    for key, value in [*stored, *more.items()]:
        section, _, name = key.replace("__", ".").partition(".")
        written[section][name] = value
    rest = {key: value for key, value in state.items() if key != "open"}
    return {**rest, "version": 2, "recipe": written, "design": design}


def test_a_checkpoint_of_version_2_opens_and_goes_on_to_the_same_bits(tmp_path, monkeypatch, second):
    import shutil

    from helpers import assert_same

    folder, changes = second
    shutil.copytree(folder, tmp_path / "old")
    state = load_checkpoint(folder / "last.pt")
    monkeypatch.setattr("bnnfree.train.checkpoint.VERSION", 2)
    save_checkpoint(tmp_path / "old" / "last.pt", as_version_2(state, changes))
    monkeypatch.undo()
    more = [*changes, "stages.0.epochs=3"]
    shutil.copytree(folder, tmp_path / "new")
    train(tmp_path / "old", *more, resume=True)
    train(tmp_path / "new", *more, resume=True)
    old, new = (load_checkpoint(tmp_path / name / "last.pt") for name in ("old", "new"))
    assert_same(old["model"], new["model"])
    assert old["recipe"] == new["recipe"] and old["version"] == 3 and set(old["open"]) <= set(new["open"])
    assert old["recipe"]["model"]["centre_gradient"] == "head"


def test_a_checkpoint_of_version_2_with_a_retired_key_in_use_is_one_line(tmp_path, monkeypatch, second):
    folder, changes = second
    state = as_version_2(load_checkpoint(folder / "last.pt"), changes, model__start="balanced")
    monkeypatch.setattr("bnnfree.train.checkpoint.VERSION", 2)
    save_checkpoint(tmp_path / "last.pt", state)
    monkeypatch.undo()
    (tmp_path / "recipe.yaml").write_bytes((folder / "recipe.yaml").read_bytes())
    with pytest.raises(RecipeError, match=r"last\.pt: model\.start: got 'balanced', but this key is no more") as caught:
        train(tmp_path, *changes, resume=True)
    assert "\n" not in str(caught.value)
