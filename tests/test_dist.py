"""Several processes train exactly as one does, resume to the same bits, and say in one line what is wrong."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import yaml
from helpers import ROOT, TINY, assert_same, cut_at, double_stage, metrics_of, tiny, train
from torch import nn

from bnnfree.data.datasets import describe, load_data
from bnnfree.errors import BnnfreeError, CheckpointError, DataError
from bnnfree.models import MODELS
from bnnfree.nn import BinaryConv2d, CentredLinear, centred_layers, update_input_means
from bnnfree.recipe import resolve
from bnnfree.train import dist as processes
from bnnfree.train import load_checkpoint
from bnnfree.train.checkpoint import build_model
from bnnfree.train.dist import Dist
from bnnfree.train.loop import Stage

CPU = Dist(0, 1, torch.device("cpu"))
ODD = ("data.batch_size=14", "agc.clip=0.02")  # of 72 images: 7 and 7 of a batch, 1 and 1 of the last

FREE = ("model.norm=free", "free.reference=0")  # with it steps of 2, as the last, centre by steps before in one process

EXACT = {  # options under which two processes are one
    "free": FREE,
    "accumulate": (*FREE, "accumulate=3", "data.batch_size=13"),
    "groups": (*FREE, "free.group=5", "accumulate=3", "data.batch_size=13"),
    "uncentred": ("model.norm=free", "model.centre_gradient=false"),
    "bnp": ("model.norm=free", "optimizer.precondition=bnp", "optimizer.name=sgd", "accumulate=2"),
}
SLOW = {  # python -m pytest -m slow tests/test_dist.py
    "free_paper": ("model.norm=free_paper",),
    "compiled": (*FREE, "speed=compiled", "accumulate=2"),
    "layers": (*FREE, "speed=layers", "accumulate=2"),
    "gn_pn": ("model.norm=gn_pn",),
}
BATCHED = ("bn", "kn")  # statistics of a process's own images: not one process, but the same weights in both


PRELOADED = ["torch._dynamo", "bnnfree.train", "models"]  # by one process, which those that work are forks of


def spawn(work, *arguments, count=2):
    """`work(rank, *arguments)` in `count` processes that find each other as torchrun's do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(_enter, (count, port, work, arguments), count, start_method="forkserver")


def _enter(rank, count, port, work, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    work(rank, *arguments)
    processes.stop()


def train_doubles(rank, folder, cases):
    """An epoch in float64 of each case; the weights of this process, and the preconditioner's moments."""
    dist = processes.start("cpu")
    for name, options in cases.items():
        with pytest.MonkeyPatch.context() as patch:
            stage = double_stage(patch, tiny(*ODD, *options), dist)
            assert stage.net.static_graph
            stage.train_epoch(lambda: None)
        torch.save((stage.model.state_dict(), stage.state()["precondition"]), folder / f"{name}{rank}.pt")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A folder with what two processes have done for the tests below: they take longer to start than to do it."""
    folder = tmp_path_factory.mktemp("group")
    spawn(work, folder)
    return folder


def work(rank, folder):
    train_cut(rank, folder / "ic", ("model.norm=ic",), resumed=True)
    train_cut(rank, folder / "free", FREE, resumed=False)
    train_doubles(rank, folder, EXACT | {norm: (f"model.norm={norm}", "accumulate=2") for norm in BATCHED})
    check_pieces(rank, folder)
    processes.stop()
    hang(rank, folder)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", EXACT)
def test_two_gloo_processes_equal_one(group, monkeypatch, name):
    """In float64 to 1e-9; the last batch is smaller, and of accumulated ones the last group."""
    assert_equal_one(group, monkeypatch, name, EXACT[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_so_they_do_with_more_options(tmp_path, monkeypatch, name):
    spawn(train_doubles, tmp_path, {name: SLOW[name]})
    assert_equal_one(tmp_path, monkeypatch, name, SLOW[name])


def assert_equal_one(folder, monkeypatch, name, options):
    alone = double_stage(monkeypatch, tiny(*ODD, *options))
    alone.train_epoch(lambda: None)
    (first, moments), (second, _) = (torch.load(folder / f"{name}{rank}.pt") for rank in (0, 1))
    for key, value in alone.model.state_dict().items():
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0)
        torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    theirs = alone.state()["precondition"]
    assert (moments is None) == (theirs is None)
    for layer, part in (theirs or {}).items():
        for key, value in part.items():
            torch.testing.assert_close(moments[layer][key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", BATCHED)
def test_with_statistics_of_their_own_images_processes_keep_the_same_weights(group, norm):
    (first, _), (second, _) = (torch.load(group / f"{norm}{rank}.pt") for rank in (0, 1))
    differing = [key for key in first if not torch.equal(first[key], second[key])]
    assert differing and all("running" in key for key in differing)


def float_stage(dist, *options):
    # Why SGD: the first step of Adam divides each gradient by itself, which makes much of the rounding of the smallest
    recipe = tiny(*FREE, "data.batch_size=14", "optimizer.name=sgd", *options)
    torch.manual_seed(0)
    recipe = resolve(recipe, describe(recipe.data))
    model = build_model(recipe, MODELS, describe(recipe.data), "both")
    stage = Stage(recipe, 1, model, load_data(recipe.data), dist)
    stage.calibrate()
    return stage


class Loose(nn.Module):
    """A network with a parameter that no image reaches, and one that the loss does not."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 4)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.head(self.drop(self.norm(x)).mean((2, 3)))


def check_pieces(rank, folder):
    """Assertions within each of two processes."""
    dist = processes.start("cpu")
    stage = float_stage(dist)
    before = {key: value.clone() for key, value in stage.model.state_dict().items()}
    batches = stage.data.train.train_batches(14, seed=0, epoch=0, rank=rank, world=2)
    stage._take_step([next(batches)])
    torch.save((before, stage.model.state_dict()), folder / f"float{rank}.pt")

    torch.manual_seed(3)
    model = Loose().train(rank == 0)
    kept, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    net = processes.data_parallel(model, dist, (3, 5, 5))
    assert_same(dict(model.state_dict()), kept)
    assert torch.equal(torch.get_rng_state(), random) and net.training == model.training == (rank == 0)
    assert all(p.grad is None for p in model.parameters())
    for _ in range(3):
        with net.no_sync():
            net.train()(torch.full((3, 3, 5, 5), 1.0 + rank)).sum().backward()
        net(torch.full((3, 3, 5, 5), 1.0 + rank)).sum().backward()
    rows = dist.gather(model.head.weight.grad)
    assert torch.equal(rows[0], rows[1]) and model.unused.grad is None
    if rank == 1:
        model.norm.running_mean.add_(7)
    dist.same_buffers(model)
    assert torch.equal(*dist.gather(model.norm.running_mean)) and model.norm.num_batches_tracked == 6

    assert dist.decide(rank == 0) and not dist.decide(rank == 1)
    assert dist.tell(lambda: {"rank": rank}) == {"rank": 0} and dist.together(lambda: rank) == rank
    with pytest.raises(DataError, match="of process 0"):
        dist.tell(lambda: fail(DataError, rank))
    for failing in (0, 1):
        with pytest.raises(CheckpointError, match=f"of process {failing}"):
            dist.together(lambda at=failing: fail(CheckpointError, rank) if rank == at else None)


def hang(rank, folder):
    """Process 1 does not answer for longer than the group waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "TIMEOUT", timedelta(seconds=1))
        dist = processes.start("cpu")
    dist.decide(True)
    if rank == 1:
        time.sleep(4)
    else:
        with pytest.raises(processes.LostError) as caught, processes.one_voice():
            dist.decide(True)
        (folder / "hang.txt").write_text(str(caught.value))


def test_a_process_that_does_not_answer_is_an_error_after_the_time_to_wait(group):
    said = (group / "hang.txt").read_text()
    assert said.startswith("process 0 of 2: another process is gone or does not answer (Timed out waiting 1000ms")
    assert "--resume" in said and "\n" not in said


def fail(error, rank):
    raise error(f"of process {rank}")


def test_a_float32_step_of_two_halves_is_one_of_the_whole(group):
    """The first step's change of each weight, 2 x 7 images against 1 x 14, to 1e-3 of its largest (7e-5 seen)."""
    alone = float_stage(CPU)
    (before, halves), (_, other) = (torch.load(group / f"float{rank}.pt") for rank in (0, 1))
    assert_same(dict(alone.model.state_dict()), before)
    alone._take_step([next(alone.data.train.train_batches(14, seed=0, epoch=0))])
    for key, value in alone.model.state_dict().items():
        assert torch.equal(halves[key], other[key])
        largest = (value - before[key]).abs().max().item()
        torch.testing.assert_close(halves[key] - before[key], value - before[key], rtol=0, atol=1e-3 * largest)


FULL = ("ema.decay=0.9", "accumulate=2", "stages.0.epochs=1", "stages.1.epochs=1", "data.batch_size=9")  # 2 x 4 steps


def train_cut(rank, folder, options, resumed):
    """A run without a break, one that is cut in its second stage, and what is left of that where `resumed`."""
    train(folder / "whole", *FULL, *options)
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train(folder / "cut", *FULL, *options, "checkpoint_minutes=0.0001")
    if resumed:
        train(folder / "cut", *FULL, *options, resume=True)


def assert_cut_is_whole(folder):
    for name in ("last.pt", "best.pt"):
        ours, theirs = load_checkpoint(folder / "cut" / name), load_checkpoint(folder / "whole" / name)
        for state in (ours, theirs):
            state["recipe"].pop("checkpoint_minutes")
        assert_same(ours, theirs)
    assert metrics_of(folder / "cut") == metrics_of(folder / "whole")
    assert len(metrics_of(folder / "whole")) == 2


def test_processes_that_resume_within_an_epoch_end_with_the_same_bits(group):
    """Of a norm that draws at random, at a batch of 5 and 4; each process has its own sums and draws its own."""
    assert_cut_is_whole(group / "ic")


@pytest.mark.slow  # python -m pytest -m slow tests/test_dist.py
@pytest.mark.parametrize(
    ("count", "norm", "others"),
    [
        (2, "bn", ("settle=40",)),
        (2, "brn", ()),
        (2, "kn", ()),
        (2, "ic_gn", ()),
        (3, "free", ("free.recalibrate=20",)),
        (3, "kn", ()),
    ],
)
def test_so_they_do_with_other_norms_and_more_processes(tmp_path, count, norm, others):
    spawn(train_cut, tmp_path, (f"model.norm={norm}", *others), True, count=count)
    assert_cut_is_whole(tmp_path)


def test_one_process_goes_on_from_two_where_that_is_the_same_training(group):
    cut, whole = group / "free" / "cut", group / "free" / "whole"
    assert load_checkpoint(cut / "last.pt")["step"] > 0 and not (cut / "result.json").exists()
    train(cut, *FULL, *FREE, resume=True)
    for ours, theirs in zip(metrics_of(cut), metrics_of(whole), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    assert json.loads((cut / "result.json").read_text())["processes"] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("model.norm=bn",), "norm 'bn' has statistics of one process's images"),
        # 73 images: the last of five batches is one image, which two processes leave out
        (("data.samples=81", "data.batch_size=18"), "an epoch of 73 images would have 4 batches and not 5"),
    ],
    ids=["bn", "steps"],
)
def test_other_processes_are_refused_where_it_would_be_another_training(tmp_path, monkeypatch, options, reason):
    train(tmp_path / "run", *options, "stages.0.epochs=1", "stages.1.epochs=1")
    monkeypatch.setattr(processes, "start", lambda device: Two(0, 2, torch.device("cpu")))
    monkeypatch.setattr("bnnfree.train.loop.data_parallel", lambda model, dist, image: model)
    with pytest.raises(CheckpointError, match=f"got 2 processes, expected the 1 it was trained by: {reason}"):
        train(tmp_path / "run", *options, "stages.0.epochs=1", "stages.1.epochs=1", resume=True)


class Two(Dist):
    """Process 0 of two, without the other."""

    def tell(self, make):
        return make()

    together = tell


def command(*arguments, count=2):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval", "0.1"]
    run += ["--nproc_per_node", str(count), "tools/train.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.thorough
def test_torchrun_trains_to_a_result_and_refuses_its_folder_in_one_line(tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    job = [str(tmp_path / "tiny.yaml"), "stages.0.epochs=1", "stages.1.epochs=1", "--out", str(tmp_path / "run")]
    done = command(*job)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "result.json").exists()
    said = done.stdout.strip().splitlines()
    assert said[-1] == str(tmp_path / "run") and sum("test top-1" in line for line in said) == 1
    warned = [line for line in done.stderr.splitlines() if "arning" in line]
    assert len(warned) == 1 and "data.val_fraction: got 0.1" in warned[0]  # by one process, once
    again = command(*job)
    errors = [line for line in again.stderr.splitlines() if line.startswith("error:")]
    assert again.returncode != 0 and len(errors) == 1 and "holds a run already" in errors[0]
    assert again.stderr.count("Traceback") == 1  # torchrun's own


@pytest.mark.slow  # python -m pytest -m slow tests/test_dist.py
@pytest.mark.parametrize(
    ("option", "message"),
    [("data.batch_size=1", "batch_size 1 of 72 images for 2 ranks"), ("model.nrom=free", "Did you mean 'model.norm'?")],
)
def test_what_is_wrong_in_all_processes_is_said_by_one(tmp_path, option, message):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    done = command(str(tmp_path / "tiny.yaml"), option, "--out", str(tmp_path / "run"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and message in errors[0]
    assert done.stderr.count("Traceback") == 1 and not (tmp_path / "run" / "metrics.jsonl").exists()


GROUP = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}  # nobody is there


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, r"environment WORLD_SIZE: got 'two', expected a whole number"),
        ({"RANK": "-1"}, r"environment RANK: got '-1', expected a whole number"),
        ({"RANK": "2"}, r"environment RANK: got 2 of WORLD_SIZE 2, expected a number below it"),
        ({"RANK": None}, r"environment RANK: got '', expected"),
        ({"MASTER_ADDR": None}, r"environment MASTER_ADDR:MASTER_PORT: got ':9', expected"),
        ({"MASTER_PORT": None}, r"environment MASTER_PORT: got '', expected"),
        ({"MASTER_PORT": "70000"}, r"environment MASTER_ADDR:MASTER_PORT: got '127.0.0.1:70000', expected"),
        ({}, r"process 1 of 2: the 2 processes did not meet at 127.0.0.1:9 within 0.5 s"),
    ],
)
def test_a_bad_environment_or_a_missing_master_is_named(monkeypatch, variables, message):
    monkeypatch.setattr(processes, "PATIENCE", timedelta(seconds=0.5))
    for name, value in (GROUP | variables).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    with pytest.raises(BnnfreeError, match=message):
        processes.start("cpu")
    assert time.monotonic() - started < 20


def test_more_processes_than_cuda_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {**GROUP, "WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BnnfreeError, match=r"than its 2 CUDA devices.* --nproc_per_node 2, or train with device=cpu"):
        processes.start("auto")


def test_an_error_of_torch_that_is_not_about_peers_stays_what_it_is(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="^mat1 and mat2"), processes.one_voice():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    said = "[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:9. This is typical."
    with pytest.raises(processes.LostError, match=r"does not answer \(Connection closed by peer \[10\.0\.0\.2\]:9\)"):
        with processes.one_voice():
            raise RuntimeError(said)


def follow_inputs(rank, folder):
    """Three steps of an own loop; the input means of this process."""
    processes.start("cpu")
    net = own_network()
    ddp = nn.parallel.DistributedDataParallel(net)
    for images in own_batches():
        ddp(images[rank::2]).sum().backward()
        update_input_means(ddp, window=8.0)
    torch.save({name: layer.input_mean for name, layer in centred_layers(net)}, folder / f"{rank}.pt")


def own_network():
    torch.manual_seed(0)
    net = nn.Sequential(
        BinaryConv2d(3, 5, 3, centre="input"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), CentredLinear(5, 2)
    )
    return net.double()


def own_batches():
    torch.manual_seed(1)
    return [torch.randn(6, 3, 5, 7, dtype=torch.float64) + i for i in range(3)]


def test_an_own_loop_under_ddp_follows_the_images_of_all_processes(tmp_path):
    spawn(follow_inputs, tmp_path)
    net = own_network()
    for images in own_batches():
        net(images)
        update_input_means(net, window=8.0)
    for rank in range(2):
        means = torch.load(tmp_path / f"{rank}.pt")
        for name, layer in centred_layers(net):
            torch.testing.assert_close(means[name], layer.input_mean, rtol=1e-12, atol=1e-12)
            assert layer.input_mean.abs().min() > 0
