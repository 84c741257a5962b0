"""Properties that only a CUDA device can show; skipped, with that reason, where there is none."""

import pytest
import torch
from helpers import assert_same, cut_at, tiny, train

from bnnfree.models import MODELS
from bnnfree.nn import BinaryConv2d, Sign, calibrate
from bnnfree.nn.fused import choose_speed
from bnnfree.train import load_checkpoint, load_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def test_augmented_batches_equal_the_cpus():
    data = load_data(tiny().data)
    order = dict(seed=3, epoch=1)
    cpu = list(data.train.train_batches(16, **order, device="cpu"))
    gpu = list(data.train.train_batches(16, **order, device="cuda"))
    for (x, y), (u, v) in zip(cpu, gpu, strict=True):
        assert torch.equal(x, u.cpu()) and torch.equal(y, v.cpu())


def test_bf16_autocast_gives_the_signs_of_fp32():
    torch.manual_seed(0)
    model = MODELS["reactnet20"](10).cuda().train()
    images = torch.randn(8, 3, 32, 32, device="cuda")
    calibrate(model, images)
    signs: dict[bool, list] = {False: [], True: []}
    for low in signs:
        hooks = [
            m.register_forward_hook(lambda _, __, y, low=low: signs[low].append(y.clone()))
            for m in model.modules()
            if isinstance(m, Sign)
        ]
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            model(images)
        for hook in hooks:
            hook.remove()
    assert len(signs[True]) == len(signs[False]) > 0
    assert all(torch.equal(a, b) for a, b in zip(signs[True], signs[False], strict=True))


@pytest.mark.parametrize("speed", ["fused", "compiled", "fused_compiled"])
@pytest.mark.parametrize("name", ["reactnet20", "reactnet_a", "xnor_resnet18"])
def test_every_speed_has_the_gradients_of_the_layers(name, speed):
    """In float64, on the device."""
    torch.manual_seed(0)
    model = MODELS[name](3, norm="free", width=0.25, stem="cifar", latent_std=0.04).double().cuda()
    images = torch.randn(4, 3, 13, 11, dtype=torch.float64, device="cuda")
    calibrate(model, images)
    model = model.to(memory_format=torch.channels_last).train()
    found = []
    for way in ("layers", speed):
        chosen = choose_speed(model, way, "cuda")
        net = torch.compile(model, fullgraph=True, dynamic=False) if chosen.compiled else model
        model.zero_grad()
        torch.nn.functional.cross_entropy(net(images), torch.arange(4, device="cuda") % 3).backward()
        found.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, gradient in found[0].items():
        assert (found[1][key] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), key


@pytest.mark.parametrize("kernel", [1, 3])
def test_products_of_signs_are_exact_integers(kernel):
    """Also under TF32 and bf16: sums of +-1 up to 256 are exact."""
    torch.manual_seed(0)
    layer = BinaryConv2d(64, 32, kernel, scale="none", gain=False, standardize=False, binary_input=True).cuda()
    x = torch.randint(0, 2, (4, 64, 9, 7), device="cuda").float() * 2 - 1
    whole = layer.cpu().double()(x.cpu().double())
    layer.float().cuda()
    for low in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            assert torch.equal(layer(x).cpu().double(), whole)


def test_a_run_cut_in_two_ends_with_the_same_bits(tmp_path, monkeypatch):
    options = ("device=cuda", "checkpoint_minutes=0.0001")
    train(tmp_path / "whole", *options)
    with monkeypatch.context() as patch:
        cut_at(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", *options)
    train(tmp_path / "cut", *options, resume=True)
    assert_same(load_checkpoint(tmp_path / "cut" / "last.pt"), load_checkpoint(tmp_path / "whole" / "last.pt"))
