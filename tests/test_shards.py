"""Shards: an epoch of them is an epoch of the same files, wherever they lie; what is damaged is named in a line.

Everything is written here; URLs are those of a server of this process. Must not import models or recipes.
"""

from __future__ import annotations

import functools
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import options, spoil, write_tree
from test_images import joined, same, sorted_rows

from bnnfree.data import addresses, tar_images, tar_index
from bnnfree.data.datasets import describe, load_data
from bnnfree.errors import BnnfreeError, BnnfreeWarning, DataError

webdataset = pytest.importorskip("webdataset")

ROOT = Path(__file__).resolve().parent.parent
SEED = 7
SIZE = 65  # pixels; smaller images are not streamed


@pytest.fixture(autouse=True)
def one_thread():
    """Keep the tests from competing with each other for cores."""
    torch.set_num_threads(1)


@pytest.fixture
def written(tmp_path):
    """Options for shards of 11 training images of each of 2 classes, about 3 a shard, and 11 to test."""
    root = write_tree(tmp_path / "root", count=11, size=(90, 70), ending="jpg")
    assert tar_index.write(str(root), tmp_path / "out", size=3 * os.path.getsize(root / "train" / "ant" / "0.jpg")) == 0
    return shard_options(tmp_path, root=str(tmp_path / "out"))


def shard_options(tmp_path, **changes):
    values = dict(name="shards", image_size=SIZE, cache=str(tmp_path / "cache"), classes=2)
    return options(**(values | changes))


def by_pattern(asked, parts=("train", "test")):
    """The same shards named by patterns, without their index."""
    (Path(asked.root) / "index.json").unlink()
    for part in parts:
        count = len(list(Path(asked.root).glob(f"{part}-*.tar")))
        setattr(asked, "root_" + part, f"{asked.root}/{part}-{{000000..{count - 1:06d}}}.tar")
    asked.root, asked.test_root = asked.root_train, asked.root_test
    return asked


@pytest.fixture
def server(tmp_path):
    """(URL of tmp_path, the paths asked for so far)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *given):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()


# ---- what is in them


@pytest.mark.parametrize("named", ["index", "pattern"])
def test_shards_hold_the_images_and_classes_of_the_folder(written, tmp_path, named):
    folder = load_data(options(name="image_folder", root=str(tmp_path / "root"), image_size=SIZE))
    loaded = load_data(written if named == "index" else by_pattern(written))
    assert loaded.classes == (folder.classes if named == "index" else ["class0", "class1"])
    assert loaded.image_size == (SIZE, SIZE) and loaded.channels == 3 and loaded.mean == folder.mean
    for part in ("train", "test"):
        ours, theirs = getattr(loaded, part), getattr(folder, part)
        assert sorted_rows(joined(ours.batches(9))) == sorted_rows(joined(theirs.batches(9)))
    assert describe(written)["samples"] == 22 and describe(written)["image_size"] == [SIZE, SIZE]


def test_the_library_reads_what_we_write(written):
    paths = sorted(str(path) for path in Path(written.root).glob("train-*.tar"))
    assert len(paths) > 5
    samples = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert sorted(int(sample["cls"]) for sample in samples) == [0] * 11 + [1] * 11
    assert {Image.open(io.BytesIO(sample["jpg"])).size for sample in samples} == {(90, 70)}
    assert len({sample["__key__"] for sample in samples}) == 22


def test_we_read_what_the_library_writes(tmp_path):
    random = np.random.RandomState(SEED)
    images = random.randint(0, 256, (9, 80, 70, 3), np.uint8)
    for part in ("a", "b"):
        with webdataset.ShardWriter(str(tmp_path / f"{part}-%02d.tar"), maxcount=4, verbose=0) as writer:
            for number, image in enumerate(images):
                row = {"__key__": f"x/y.z/{number}", "png": Image.fromarray(image), "cls": number % 3, "json": {"a": 1}}
                writer.write(row)
    pattern = f"{tmp_path}/{{}}-{{{{00..02}}}}.tar"
    asked = shard_options(tmp_path, root=pattern.format("a"), test_root=pattern.format("b"), classes=3)
    pixels, labels = joined(load_data(asked).test.batches(4))
    assert labels.tolist() == [0, 1, 2] * 3
    direct = [Image.fromarray(image) for image in images]
    tree = tmp_path / "root"
    for number, image in enumerate(direct):
        for part in ("train", "test"):
            (tree / part / str(number)).mkdir(parents=True)
            image.save(tree / part / str(number) / "0.png")
    expected = joined(load_data(options(name="image_folder", root=str(tree), image_size=SIZE)).test.batches(4))[0]
    assert torch.equal(pixels, expected)


def test_the_same_folder_gives_the_same_bytes(written, tmp_path):
    tar_index.write(str(tmp_path / "root"), tmp_path / "again", size=3 * 10**4)
    tar_index.write(str(tmp_path / "root"), tmp_path / "third", size=3 * 10**4)
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "third").iterdir())
    assert all((tmp_path / "again" / n).read_bytes() == (tmp_path / "third" / n).read_bytes() for n in names)


def test_a_shard_mixes_the_classes(tmp_path):
    root = write_tree(tmp_path / "root", classes=("ant", "bee", "cow"), count=40, size=(70, 66), ending="jpg")
    tar_index.write(str(root), tmp_path / "out", size=30 * 2000)
    rows = json.loads((tmp_path / "out" / "index.json").read_text())["parts"]["train"]
    assert all(set(row["labels"]) == {0, 1, 2} for row in rows if len(row["labels"]) > 15)


# ---- epochs


def test_an_epoch_has_every_image_once_and_differs_by_seed_and_epoch(written):
    written.augment = []
    split = load_data(written).train
    every = sorted_rows(joined(split.batches(5)))
    orders = [
        joined(split.train_batches(4, seed=seed, epoch=epoch)) for seed, epoch in ((1, 2), (1, 2), (1, 3), (2, 2))
    ]
    assert all(sorted_rows(order) == every for order in orders)
    assert same(orders[0], orders[1])
    assert not torch.equal(orders[0][0], orders[2][0]) and not torch.equal(orders[0][0], orders[3][0])
    assert split.train_steps(4) == len(list(split.train_batches(4, seed=1, epoch=2))) == 6


def test_resuming_workers_and_ranks_change_no_sample(written):
    batches = list(load_data(written).train.train_batches(4, seed=SEED, epoch=1))
    for written.workers in (1, 2):
        split = load_data(written).train
        assert same(joined(batches), joined(split.train_batches(4, seed=SEED, epoch=1)))
        assert same(joined(batches[3:]), joined(split.train_batches(4, seed=SEED, epoch=1, start=3)))
    ranks = [load_data(written).train.train_batches(4, seed=SEED, epoch=1, rank=rank, world=2) for rank in range(2)]
    for whole, *parts in zip(batches, *ranks, strict=True):
        assert sorted_rows(joined(parts)) == sorted_rows(whole)


def test_validation_images_are_carved_and_limits_hold(written):
    written.val_fraction, written.test_limit = 0.2, 6
    loaded = load_data(written)
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (18, 4, 6)
    rows = sorted_rows(joined(loaded.train.batches(9))) + sorted_rows(joined(loaded.val.batches(9)))
    written.val_fraction = 0.0
    assert sorted(rows) == sorted_rows(joined(load_data(written).train.batches(9)))


def test_an_epoch_opens_few_shards_at_a_time():
    rows = np.zeros(200 * 50, tar_images.MEMBER)
    rows["shard"] = np.repeat(np.arange(200), 50)
    store = tar_images.Members([""] * 200, [0] * 200, rows, Path("."), None)
    order = store.order(torch.Generator().manual_seed(SEED)).numpy()
    assert np.array_equal(np.sort(order), np.arange(len(rows)))
    used = rows["shard"][order]
    places = np.arange(len(used))
    first = np.full(200, len(used))
    np.minimum.at(first, used, places)
    last = np.zeros(200, int)
    np.maximum.at(last, used, places)
    at_once = max(((first <= place) & (place <= last)).sum() for place in range(0, len(used), 37))
    assert tar_images.WINDOW - 2 <= at_once <= tar_images.WINDOW + 1
    assert (np.diff(np.argsort(first)) != 1).mean() > 0.9, "the shards come in random order"
    assert (np.diff(used) != 0).mean() > 0.9, "images of one shard do not follow each other"


def test_as_many_files_stay_open_as_an_epoch_needs(written, monkeypatch):
    monkeypatch.setattr(tar_images, "WINDOW", 2)
    split = load_data(written).train
    expected = sorted_rows(joined(split.batches(22)))
    assert len(split.files._open) == 3 and len(split.files.places) > 8
    assert sorted_rows(joined(split.batches(22))) == expected


# ---- by URL


needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="curl fetches")


@needs_curl
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_at_a_url_are_fetched_once_and_give_the_same_batches(written, server, workers):
    expected = joined(load_data(written).train.train_batches(4, seed=SEED, epoch=0))
    url, asked = server
    written.root, written.workers = f"{url}/out", workers
    loaded = load_data(written)
    assert asked == ["/out/index.json"]
    for _ in range(2):
        assert same(expected, joined(loaded.train.train_batches(4, seed=SEED, epoch=0)))
    tars = [path for path in asked if path.endswith(".tar")]
    assert len(tars) == len(set(tars)) == len(list(Path(written.cache, "shards").glob("[!.]*.tar")))
    assert all(path.startswith("/out/train-") for path in tars)


@needs_curl
def test_a_pattern_of_urls_is_scanned_once(written, server):
    expected = joined(load_data(written).train.train_batches(4, seed=SEED, epoch=0))
    folder = written.root
    url, asked = server
    by_pattern(written)
    written.root, written.test_root = (p.replace(folder, f"{url}/out") for p in (written.root, written.test_root))
    assert same(expected, joined(load_data(written).train.train_batches(4, seed=SEED, epoch=0)))
    asked.clear()
    assert same(expected, joined(load_data(written).train.train_batches(4, seed=SEED, epoch=0))) and asked == []


@needs_curl
def test_the_cache_keeps_about_its_limit_and_fetches_again(written, server, monkeypatch):
    monkeypatch.setattr(tar_images, "WINDOW", 2)
    expected = joined(load_data(written).train.train_batches(4, seed=SEED, epoch=0))
    sizes = [path.stat().st_size for path in Path(written.root).glob("train-*.tar")]
    written.root, written.cache_gb = f"{server[0]}/out", 3.5 * max(sizes) / 1e9
    split = load_data(written).train
    for _ in range(2):
        assert same(expected, joined(split.train_batches(4, seed=SEED, epoch=0)))
        kept = list(Path(written.cache, "shards").glob("[!.]*.tar"))
        assert 2 <= len(kept) < len(sizes) and sum(path.stat().st_size for path in kept) <= 3.5 * max(sizes)
    fetched = [path for path in server[1] if path.endswith(".tar")]
    assert len(fetched) > len(sizes) and set(fetched) == {f"/out/train-{n:06d}.tar" for n in range(len(sizes))}


@needs_curl
@pytest.mark.parametrize("workers", [0, 1])
def test_a_url_without_the_shard_is_named(written, server, tmp_path, workers):
    (tmp_path / "out" / "train-000003.tar").unlink()
    written.root, written.workers = f"{server[0]}/out", workers
    with pytest.raises(
        DataError, match=r"^shard http.*/train-000003\.tar: cannot be fetched \(curl ended with 22: .*404.*\)\.$"
    ):
        list(load_data(written).train.batches(9))
    assert not [path for path in Path(written.cache, "shards").iterdir() if path.suffix == ".tmp"]
    written.root = f"{server[0]}/nowhere"
    with pytest.raises(DataError, match=r"/nowhere/index\.json: cannot be fetched"):
        load_data(written)


@needs_curl
def test_a_shard_at_a_url_that_has_changed_is_named(written, server, tmp_path):
    written.root = f"{server[0]}/out"
    split = load_data(written).train
    with open(tmp_path / "out" / "train-000002.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"train-000002\.tar: got \d+ bytes, expected \d+: it is cut short or another"):
        list(split.batches(9))


@pytest.mark.parametrize(
    "root", ["pipe:touch {}/ran; cat {}/out/train-000000.tar", "ftp://host/a.tar", "file:///a.tar", "data://x/out"]
)
def test_no_command_is_run_and_only_known_schemes_are_opened(written, tmp_path, root):
    root = root.replace("{}", str(tmp_path))
    for written.root, written.test_root in ((root, None), (f"{root}.tar", f"{root}.tar"), (f"{root}.tar", "b.tar")):
        with pytest.raises(DataError):
            load_data(written)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="got the scheme '(pipe|ftp|file|data)', expected one of http, https"):
        addresses.is_url(root)


HOSTILE = ["x';touch RAN;'", 'x";touch RAN;"', "x`touch RAN`", "x$(touch RAN) ", "x\\\ntouch RAN\n", "x|touch RAN", "é"]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("scheme", ["http", "https", "s3", "gs", "hf"])
def test_an_address_of_others_is_one_argument_or_refused(written, tmp_path, monkeypatch, scheme, name):
    monkeypatch.chdir(tmp_path)
    for written.root, written.test_root in (
        (f"{scheme}://127.0.0.1:1/{name}", None),
        (f"{scheme}://127.0.0.1:1/{name}.tar", f"{scheme}://127.0.0.1:1/a.tar"),
    ):
        with pytest.raises(DataError, match="which a URL cannot have") as caught:
            load_data(written)
        assert str(caught.value).isprintable()
    assert not (tmp_path / "RAN").exists()


def test_programs_get_an_address_as_one_argument_and_curl_stays_on_the_web(tmp_path):
    for url in ("http://h/a;b&c=$(d).tar", "s3://b/-x.tar", "gs://b/a.tar", "hf://datasets/o/n/a.tar"):
        arguments = addresses.command(url, tmp_path / "x")
        whole = "https://huggingface.co/datasets/o/n/resolve/main/a.tar" if url.startswith("hf") else url
        assert whole in arguments and str(tmp_path / "x") in arguments
        if arguments[0] == "curl":
            assert arguments[arguments.index("--proto") + 1] == arguments[arguments.index("--proto-redir") + 1]
            assert arguments[arguments.index("--proto") + 1] == "=http,https"
    with pytest.raises(DataError, match="expected hf://datasets/OWNER"):
        addresses.command("hf://datasets/owner", tmp_path)


@needs_curl
def test_a_server_cannot_send_us_to_a_file_of_this_machine(tmp_path):
    (tmp_path / "secret").write_text("secret")

    class Sends(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(302)
            self.send_header("Location", f"file://{tmp_path}/secret")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sends) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        with pytest.raises(DataError, match="cannot be fetched"):
            addresses.fetch(f"http://127.0.0.1:{served.server_port}/a", tmp_path / "got")
        served.shutdown()
    assert not (tmp_path / "got").exists() or (tmp_path / "got").read_text() != "secret"


def test_a_program_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for url, program in (("https://h/a", "curl"), ("s3://b/a", "aws"), ("gs://b/a", "gsutil")):
        with pytest.raises(DataError, match=f"no program '{program}'"):
            addresses.fetch(url, tmp_path / "x")


BOMBS = ["a-{0..30000000}.tar", "{0..9999}{0..9999}.tar", "{a,b}" * 30 + ".tar", "a{0..99999}::b{0..99999}{0..99}.tar"]


@pytest.mark.parametrize("pattern", BOMBS)
def test_a_pattern_is_bounded_before_it_is_expanded(pattern):
    with pytest.raises(DataError, match="expected at most 1,000,000"):
        addresses.expand(pattern, "data: root")


LONG = ["{" + "." * 60_000 + ".tar", "{" * 3000 + "a" + "}" * 3000, "{0..9999}" + "y" * 60_000, "a" * 10**6 + ".tar"]


@pytest.mark.parametrize("pattern", LONG, ids=["dots", "braces", "names", "one name"])
def test_a_pattern_of_thousands_of_characters_is_read_at_once_or_refused_in_one_line(pattern):
    with pytest.raises(DataError, match="^data: root: got ") as caught:
        addresses.expand(pattern, "data: root")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern, count", [
    ("a-{000..127}.tar", 128), ("{a,b}-{0..9}.tar", 20), ("{x,y{0..3}}.tar", 5), ("a.tar::b.tar", 2), ("a{9..0}", 10),
    ("{a..c}.tar", 3), ("{0..10..5}.tar", 3), ("{0..999999}.tar", 1_000_000),
    ("::".join(f"{name}-{{0..127}}.tar" for name in "abcd"), 512),
])  # fmt: skip
def test_a_pattern_names_what_its_braces_say(pattern, count):
    assert len(addresses.expand(pattern, "data: root")) == count


# ---- bad input


def damage(path, how):
    """Damage one shard."""
    data = bytearray(path.read_bytes())
    if how == "cut":
        del data[len(data) // 2 :]
    elif how == "header":
        data[512 + 512 : 1536] = bytes([255]) * 512
    elif how == "empty":
        data = bytearray()
    elif how == "text":
        data = bytearray(b"hello" * 1000)
    elif how == "gz":
        import gzip

        data = bytearray(gzip.compress(bytes(data)))
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut", "empty", "text", "gz", "header"])
@pytest.mark.parametrize("named", ["index", "pattern"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named_in_one_line(written, how, named, workers):
    folder = Path(written.root)
    written.workers, written.bad_images = workers, "skip"
    if named == "pattern":
        by_pattern(written)
    damage(folder / "train-000002.tar", how)
    with pytest.raises(DataError, match=r"train-000002\.tar: ") as caught:
        list(load_data(written).train.batches(9))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("named", ["index", "pattern"])
def test_a_missing_shard_is_named(written, named):
    folder = Path(written.root)
    if named == "pattern":
        by_pattern(written)
    (folder / "test-000001.tar").unlink()
    with pytest.raises(DataError, match=r"^data: shard .*test-000001\.tar: [Nn]o such file"):
        load_data(written)


@pytest.mark.parametrize(
    "how, said", [("zero", "has zero bytes"), ("cut", "is truncated"), ("text", "is not an image")]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_in_shards_are_named_or_dropped_and_counted(tmp_path, how, said, workers):
    root = write_tree(tmp_path / "root", count=5, size=(90, 70), ending="jpg")
    asked = shard_options(tmp_path, root=str(tmp_path / "out"), workers=workers)
    tar_index.write(str(root), asked.root, size=4 * 10**4)
    for path in Path(asked.root).glob("test-*.tar"):  # an image cannot be bad when it is written: it becomes so
        with tarfile.open(path) as tar:
            samples = {m.name: tar.extractfile(m).read() for m in tar}
        with tarfile.open(path, "w") as tar:
            for name, data in samples.items():
                if name in ("00000002.jpg", "00000007.jpg"):
                    (tmp_path / "bad").write_bytes(data)
                    spoil(tmp_path / "bad", how)
                    data = (tmp_path / "bad").read_bytes()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    by_pattern(asked)
    with pytest.raises(DataError, match=rf"^data: .*\.tar: the image at byte \d+ {said}.*data\.bad_images=skip"):
        list(load_data(asked).test.batches(10))
    asked.bad_images = "skip"
    loaded = load_data(asked)
    with pytest.warns(BnnfreeWarning, match="left out of their batches"):
        assert sum(len(labels) for _, labels in loaded.test.batches(10)) == 8
    assert loaded.skipped == 2


def test_writing_names_bad_files_or_leaves_them_out(tmp_path):
    root = write_tree(tmp_path / "root", count=4, size=(90, 70), ending="jpg")
    spoil(root / "train" / "bee" / "1.jpg", "text")
    (root / "train" / "bee" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match=r"notes\.txt is not an image file\. --skip-bad"):
        tar_index.write(str(root), tmp_path / "out")
    (root / "train" / "bee" / "notes.txt").unlink()
    with pytest.raises(DataError, match=r"1\.jpg is not an image that can be recognised\. --skip-bad"):
        tar_index.write(str(root), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"], "nothing is left of a failure"
    assert tar_index.write(str(root), tmp_path / "out", size=1000, skip_bad=True) == 1
    loaded = load_data(shard_options(tmp_path, root=str(tmp_path / "out")))
    assert loaded.train.labels.bincount().tolist() == [4, 3]
    with pytest.raises(DataError, match="is there and not empty"):
        tar_index.write(str(root), tmp_path / "out")


@pytest.mark.parametrize("change, said", [
    (lambda index: "{", "is no index of shards"),
    (lambda index: [], "is no index of shards"),
    (lambda index: index | {"format": "x"}, "format: Input should be 'bnnfree shards 1'"),
    (lambda index: index | {"classes": []}, "classes"),
    (lambda index: index | {"classes": ["ant"]}, r"train-0000\d\d\.tar: got class 1, expected 0 to 0"),
    (lambda index: index | {"parts": {"train": index["parts"]["train"]}}, "got the parts train, expected train and"),
    (lambda index: index | {"parts": index["parts"] | {"val": []}}, "parts.val"),
    (lambda index: edited(index, file="../a.tar"), r"got the file '\.\./a\.tar', expected a name without folders"),
    (lambda index: edited(index, file="a\0.tar"), r"got the file 'a\\x00\.tar', expected a name without folders"),
    (lambda index: edited(index, file="-o.tar"), "got the file '-o.tar', expected a name"),
    (lambda index: edited(index, file="a\x1b[2J.tar"), r"got the file 'a\\x1b\[2J\.tar', expected a name"),
    (lambda index: edited(index, file=".."), r"got the file '\.\.', expected a name"),
    (lambda index: "[" * 100_000, "is no index of shards"),
    (lambda index: json.dumps(index).replace("train", "9" * 10_000, 1), "is no index of shards"),
    (lambda index: '{"format": ' + "9" * 100_000 + "}", "is no index of shards"),
    (lambda index: edited(index, offsets=[2**61, 512, 512]), "its index has an image beyond its"),
    (lambda index: edited(index, file="b.tar"), r"shard .*b\.tar: No such file"),
    (lambda index: edited(index, labels=[0]), "unequal numbers of offsets and labels"),
    (lambda index: edited(index, labels=[2**70, 0, 0]), "expected 0 to 1"),
    (lambda index: edited(index, offsets=[-5, 1, 2]), "greater than or equal to 512"),
    (lambda index: edited(index, offsets=[2**70, 1, 2]), "is no index"),
    (lambda index: edited(index, lengths=[2**31, 1, 2]), "less than 2147483648"),
    (lambda index: edited(index, bytes=1), r"got \d+ bytes, expected 1: it is cut short"),
    (lambda index: edited(index, offsets=[], lengths=[], labels=[], alone=True), "hold no images"),
])  # fmt: skip
def test_a_wrong_index_is_one_line(written, change, said):
    path = Path(written.root) / "index.json"
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(DataError, match=f"^data: .*{said}") as caught:
        load_data(written)
    assert "\n" not in str(caught.value)


def odd_tar(random, form):
    """A tar of three samples with odd names, some bytes of it changed and its checksums made to fit again."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name in (f"{'é' * 120}{number}.{ending}" for number in range(3) for ending in ("jpg", "cls")):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(b"1" * 700))
    data = bytearray(buffer.getvalue())
    for place in random.randint(0, len(data), random.choice([1, 3, 20])):
        data[place] = random.choice([0, 255, 57, 10, random.randint(256)])
    for start in range(0, len(data) - 512, 512):
        if data[start + 257 : start + 262] == b"ustar":
            data[start + 148 : start + 156] = b" " * 8
            data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    return bytes(data)


def sparse_tar():
    """A sample whose header describes holes by what is no number."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.jpg")
        info.pax_headers = {"GNU.sparse.map": "abc"}
        tar.addfile(info)
    return buffer.getvalue()


def chain_tar():
    """Headers that each say that the next one's name is long."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    return (info.tobuf(tarfile.GNU_FORMAT) + b"a" + bytes(511)) * 3000


def test_a_hostile_tar_is_scanned_or_refused_in_one_line(tmp_path):
    random = np.random.RandomState(SEED)
    forms = tarfile.PAX_FORMAT, tarfile.GNU_FORMAT
    refused = 0
    for data in [sparse_tar(), chain_tar(), *(odd_tar(random, forms[number % 2]) for number in range(600))]:
        (tmp_path / "a.tar").write_bytes(data)
        try:
            tar_index.scan("a.tar", tmp_path / "a.tar")
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
    assert 50 < refused < 600


def test_an_index_of_gigabytes_is_not_read(written, monkeypatch):
    monkeypatch.setattr(tar_index, "LARGEST", 100)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("read"))
    with pytest.raises(DataError, match=r"index\.json: is no index of shards: got \d+ bytes, expected at most 100"):
        load_data(written)


@needs_curl
def test_a_server_cannot_send_a_shard_far_beyond_its_index(written, server, tmp_path):
    with open(tmp_path / "out" / "train-000001.tar", "ab") as file:
        file.truncate(10**7)
    written.root = f"{server[0]}/out"
    with pytest.raises(DataError, match=r"train-000001\.tar: cannot be fetched \(curl ended with 63: .*[Ss]ize"):
        list(load_data(written).train.batches(9))
    assert not [path for path in Path(written.cache, "shards").glob("*.tar") if path.stat().st_size > 10**5]


def test_what_a_scan_found_is_not_needed_where_it_cannot_be_kept(written, tmp_path):
    by_pattern(written)
    (tmp_path / "file").write_text("in the way")
    written.cache = str(tmp_path / "file")
    with (
        pytest.warns(BnnfreeWarning, match="cannot be used"),
        pytest.warns(BnnfreeWarning, match="cannot be written: .* The next run scans again"),
    ):
        assert len(load_data(written).train) == 22


def edited(index, alone=False, **changes):
    """The index with the first training shard changed, or with it alone."""
    rows = [index["parts"]["train"][0] | changes] + ([] if alone else index["parts"]["train"][1:])
    return index | {"parts": index["parts"] | {"train": rows}}


@pytest.mark.parametrize("name", ["offset", "length"])
def test_an_index_that_points_elsewhere_is_found_when_it_is_read(written, name):
    split = load_data(written).train
    split.files.members[name][0] += 512
    with pytest.raises(DataError, match=r"got no image of \d+ bytes at byte \d+, where its index has one"):
        list(split.batches(9))


def plain_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("files, said", [
    ([("a.jpg", b"x")], "sample 'a' has no .cls"),
    ([("a.cls", b"1")], "sample 'a' has no image"),
    ([("a.jpg", b"x"), ("a.cls", b"dog")], "got the class b'dog', expected a number"),
    ([("a.jpg", b"x"), ("a.cls", b"-1")], "got the class b'-1', expected a number"),
    ([("a.jpg", b"x"), ("a.cls", b"7")], "got class 7, expected 0 to 1. Without an index, data.classes says"),
    ([("a.jpg", b"x"), ("a.cls", b"9" * 30)], "expected 0 to 1"),
    ([], "is damaged or no tar: 0 images"),
])  # fmt: skip
def test_plain_shards_must_hold_pairs_of_known_classes(tmp_path, files, said):
    plain_tar(tmp_path / "a.tar", files)
    plain_tar(tmp_path / "b.tar", [("a.jpg", b"x"), ("a.cls", b"1")])
    asked = shard_options(tmp_path, root=f"{tmp_path}/a.tar", test_root=f"{tmp_path}/b.tar")
    with pytest.raises(DataError, match=rf"shard .*a\.tar: .*{said}"):
        load_data(asked)


@pytest.mark.parametrize("changes, said", [
    ({"root": None}, "root: got None, expected a folder or URL with index.json"),
    ({"root": "nowhere"}, "root: got 'nowhere', without index.json .*No such file"),
    ({"test_root": "a.tar"}, "belong to a root that ends in .tar"),
    ({"root": "{}/train-{{000000..000001.tar"}, "test_root: got None"),
    ({"root": "{}/train-000000.tar", "test_root": "{}/train-000000.tar"}, "named 2 times"),
    ({"root": "{}/train-{{000000..000001.tar", "test_root": "{}/test-000000.tar"}, "cannot be expanded"),
    ({"image_size": 64}, "image_size: got 64, expected more than 64.*image_folder"),
])  # fmt: skip
def test_what_does_not_fit_together_is_refused(written, changes, said):
    folder = written.root
    for key, value in changes.items():
        setattr(written, key, value.format(folder) if isinstance(value, str) else value)
    with pytest.raises(DataError, match=f"^data: .*{said}"):
        load_data(written)


def test_a_scan_is_remembered_until_a_shard_changes(written, monkeypatch):
    scanned = []
    original = tar_index.scan
    monkeypatch.setattr(tar_index, "scan", lambda place, path: scanned.append(place) or original(place, path))
    folder = Path(written.root)
    by_pattern(written)
    first = load_data(written)
    count = len(scanned)
    assert len(load_data(written).train) == len(first.train) and len(scanned) == count
    os.utime(folder / "train-000000.tar", ns=(1, 1))
    load_data(written)
    assert len(scanned) == 2 * count
    for path in Path(written.cache).glob("shards-*.json"):
        path.write_text("[{}")
    with pytest.warns(BnnfreeWarning, match="scanning again"):
        assert len(load_data(written).train) == 22


def test_without_the_library_local_shards_with_an_index_are_read_and_all_else_says_so(written, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert len(joined(load_data(written).train.batches(9))[1]) == 22
    with pytest.raises(DataError, match="writing shards needs webdataset.*pip install"):
        tar_index.write(str(tmp_path / "root"), tmp_path / "other")
    written.root = written.test_root = "a.tar"
    with pytest.raises(DataError, match="a pattern needs webdataset"):
        load_data(written)


@needs_curl
def test_a_cache_that_cannot_be_written_is_named(written, server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    written.root, written.cache = f"{server[0]}/out", str(tmp_path / "file")
    with pytest.raises(DataError, match=r"^shard http.*\.tar: cannot be kept in .*file/shards .*data\.cache"):
        list(load_data(written).train.batches(9))


# ---- the tool


def tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "shard.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_the_tool_writes_shards_and_prints_their_folder_last(tmp_path):
    root = write_tree(tmp_path / "root", count=5, size=(90, 70), ending="jpg")
    spoil(root / "train" / "ant" / "0.jpg", "zero")
    done = tool(root, "-o", tmp_path / "out", "--size", "40KB")
    assert done.returncode == 2 and "0.jpg has zero bytes" in done.stderr and done.stderr.count("error") == 1
    done = tool(root, "-o", tmp_path / "out", "--size", "40KB", "--skip-bad")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["1 bad files left out", str(tmp_path / "out")]
    assert len(load_data(shard_options(tmp_path, root=str(tmp_path / "out"))).train) == 9


def test_the_tool_takes_sizes_with_units():
    from bnnfree.commands.shard import size_of

    assert [size_of(text) for text in ("1KB", "1.5 GB", "100mb", "2000")] == [1000, 15 * 10**8, 10**8, 2000]
    for text in ("", "100", "1TB", "-5MB", "MB", "1e9", "999KB5"):
        with pytest.raises(BnnfreeError, match="--size: got"):
            size_of(text)
