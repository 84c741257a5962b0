"""Files are written whole or not at all, whoever else writes and whatever ends the writing."""

import errno
import os
import subprocess
import sys

import pytest

from bnnfree.errors import BnnfreeError
from bnnfree.files import OutputError, replacing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "deep" / "a.json"
    for text in ("old", "new"):
        with replacing(path) as temporary:
            assert temporary.parent == path.parent and temporary.name.startswith(f".a.json.{os.getpid()}.")
            assert temporary.name.endswith(".tmp") and temporary.read_bytes() == b""
            temporary.write_text(text)
            assert (path.read_text() == "old") if text == "new" else not path.exists()
    assert path.read_text() == "new" and names(path.parent) == ["a.json"]


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), KeyboardInterrupt(), SystemExit(3), OSError(errno.ECONNRESET, "x"), BnnfreeError()]
)
def test_errors_that_are_not_of_the_file_pass_and_the_old_file_stays(tmp_path, error):
    (tmp_path / "a").write_text("old")
    with pytest.raises(type(error)) as caught, replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise error
    assert caught.value is error
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with replacing(tmp_path / "a") as one, replacing(tmp_path / "a") as two:
        assert one != two
        one.write_text("one")
        two.write_text("two")
    assert (tmp_path / "a").read_text() == "one" and names(tmp_path) == ["a"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_one_error_even_behind_another(tmp_path, wrapped):
    """As torch.save hides it."""
    (tmp_path / "a").write_text("old")
    with pytest.raises(OutputError, match="a: cannot be written: disk full"), replacing(tmp_path / "a"):
        try:
            with open("/dev/full", "wb", 0) as full:
                full.write(b"x")
        except OSError:
            if wrapped:
                raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904
            raise
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    (tmp_path / "a").write_text("old")
    code = (
        "import os, sys; from bnnfree.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary: temporary.write_text('half'); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")], check=False)
    assert done.returncode == 9 and (tmp_path / "a").read_text() == "old" and len(names(tmp_path)) == 2
