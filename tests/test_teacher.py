"""A teacher sees images as it was trained to see them, or is refused by name before training."""

import pytest
import torch
from helpers import TINY, tiny, train
from torch import nn

from bnnfree.data.datasets import Data, load_data
from bnnfree.errors import BnnfreeError
from bnnfree.models import MODELS
from bnnfree.train.checkpoint import load_model
from bnnfree.train.teacher import Teacher, View, converted, load_teacher

SHORT = ["stages=[{epochs: 1}]", "model.width=0.25"]


def view(size=(9, 9), mean=(0.5, 0.25, 0.125), std=(0.5, 0.25, 2.0)):
    return View(size, len(mean), mean, std)


def pixels(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normalised(images, view):
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (view.mean, view.std))
    return (images - mean) / std


def test_other_statistics_are_converted():
    images, given, wanted = pixels(5, 3, 9, 9), view(), view(mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    assert torch.allclose(converted(normalised(images, given), given, wanted), normalised(images, wanted), atol=1e-6)


def test_another_size_is_resized_as_pixels_are():
    images, given, wanted = pixels(2, 3, 9, 7), view((9, 7)), view((21, 16))
    flat = torch.full((2, 3, 9, 7), 0.75)
    assert converted(normalised(images, given), given, wanted).shape == (2, 3, 21, 16)
    got = converted(normalised(flat, given), given, wanted)
    assert torch.allclose(got, normalised(torch.full((2, 3, 21, 16), 0.75), wanted), atol=1e-6)
    half = converted(normalised(pixels(1, 3, 8, 8), view((8, 8))), view((8, 8)), view((4, 4)))
    assert half.shape == (1, 3, 4, 4) and half.std() < normalised(pixels(1, 3, 8, 8), view()).std()  # antialiased


def test_grey_and_colour_are_converted():
    grey, colour = view(mean=(0.5,), std=(0.25,)), view()
    images = pixels(4, 1, 9, 9)
    got = converted(normalised(images, grey), grey, colour)
    assert torch.allclose(got, normalised(images.expand(-1, 3, -1, -1), colour), atol=1e-6)
    assert torch.allclose(converted(got, colour, grey), normalised(images, grey), atol=1e-5)


def test_the_same_images_reach_the_teacher_to_the_bit():
    class Seen(nn.Module):
        def forward(self, x):
            self.x = x
            return x

    teacher, images = Teacher(Seen(), view(), view()), pixels(2, 3, 9, 9)
    assert teacher(images) is images


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run whose network is a teacher: 9x9, three channels, four classes."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(folder, *SHORT)
    return folder


def test_a_teacher_answers_as_on_its_own_images(taught):
    student = load_data(tiny("data.image_size=16").data)
    teacher = load_teacher(str(taught), MODELS, student)
    net, state = load_model(taught, MODELS)
    seen = state["data"]
    own = View.of(seen["image_size"], seen["channels"], seen["mean"], seen["std"])
    given = View.of(student.image_size, 3, student.mean, student.std)
    images = pixels(3, 3, 16, 16)
    small = nn.functional.interpolate(images, (9, 9), mode="bilinear", antialias=True)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert torch.allclose(teacher(normalised(images, given)), net(normalised(small, own)), atol=1e-3)


@pytest.mark.parametrize("keys", [["data.image_size=21"], ["data.channels=1"]], ids=" ".join)
def test_a_student_of_other_images_is_taught(tmp_path, taught, keys):
    result = train(tmp_path / "run", *SHORT, *keys, "loss.name=distribution", f"loss.teacher={taught}")
    assert result["epochs"] == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [(["data.channels=5"], "takes images of 3 channels, and this recipe's data have 5"),
     (["data.classes=3"], "trained on other classes .4: class0, .* than this recipe's data have .3: class0")],
)  # fmt: skip
def test_a_teacher_that_cannot_see_the_images_is_refused_before_training(tmp_path, taught, keys, words):
    with pytest.raises(BnnfreeError, match=words) as caught:
        train(tmp_path / "run", *SHORT, *keys, "loss.name=distribution", f"loss.teacher={taught}")
    assert len(str(caught.value).splitlines()) == 1 and not (tmp_path / "run" / "last.pt").exists()


@pytest.fixture
def zoo(monkeypatch):
    """torchvision without a network to fetch weights by."""
    from torchvision import models

    whole = models.get_model
    monkeypatch.setattr(models, "get_model", lambda name, weights: whole(name, weights=None))


def student_of(classes, size=32, channels=3):
    nothing: list = []
    names = [str(i) for i in range(classes)]
    half = [0.5] * channels
    return Data(nothing, None, nothing, names, channels, (size, size), half, half)  # type: ignore[arg-type]


def test_torchvisions_classifiers_see_imagenets_statistics_at_224_pixels(zoo):
    teacher = load_teacher("torchvision:resnet18", MODELS, student_of(1000))
    assert teacher.own == View((224, 224), 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    sizes = []
    teacher.net.conv1.register_forward_pre_hook(lambda layer, args: sizes.append(tuple(args[0].shape)))
    assert teacher(torch.zeros(1, 3, 32, 32)).shape == (1, 1000) and sizes == [(1, 3, 224, 224)]


@pytest.mark.parametrize(
    ("name", "classes", "words"),
    [("resnet18", 4, "knows 1000 classes, and this recipe's data have 4"),
     ("resnet81", 1000, "no model 'resnet81' that tells classes. Did you mean 'torchvision:resnet18'"),
     ("fasterrcnn_resnet50_fpn", 1000, "no model")],
)  # fmt: skip
def test_a_classifier_of_torchvision_that_does_not_fit_is_refused(zoo, name, classes, words):
    with pytest.raises(BnnfreeError, match=words):
        load_teacher(f"torchvision:{name}", MODELS, student_of(classes))


def test_the_tiny_recipe_is_what_these_tests_take_it_for():
    assert (TINY["data"]["image_size"], TINY["data"]["channels"], TINY["data"]["classes"]) == (9, 3, 4)
