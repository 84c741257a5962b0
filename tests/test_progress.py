"""Progress of long work: whole lines at intervals in a log, a bar on a terminal, nothing of what is short."""

import io
import re
import sys
import time

import pytest

from bnnfree import progress
from bnnfree.progress import Progress, duration, over


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_log_gets_whole_lines_with_the_time_left_at_intervals(clock, capsys):
    with Progress(100, "training", "steps", done=10) as bar:
        for step in range(11, 101):
            clock.now += 1
            bar.note({"epoch": step // 50})
            bar.update()
    out, log = capsys.readouterr()
    lines = log.splitlines()
    assert out == "" and "\r" not in log
    assert lines[0] == "training: 25% 25/100 steps, 15 s, 75 s left, epoch 0"
    assert lines[-1] == "training: 100% 100/100 steps, 2 min, 0 s left, epoch 2"
    assert len(lines) == 90 // 15 + 1


def test_lines_of_a_long_log_become_fewer(clock, capsys):
    with Progress(10**6, "training", "steps") as bar:
        for _ in range(48 * 3600 // 60):
            clock.now += 60
            bar.update(10**6 / 2880)
    lines = capsys.readouterr().err.splitlines()
    assert 288 <= len(lines) <= 500  # one each ten minutes at last, in two days
    assert "100%" in lines[-1] and "48.0 h" in lines[-1]


def test_what_is_over_before_the_delay_leaves_no_trace(clock, capsys):
    assert list(over([3, 5, 7], "decoding", "images", delay=1)) == [3, 5, 7]
    assert capsys.readouterr().err == ""
    for _ in over([3, 5, 7], "decoding", "images", delay=1):
        clock.now += 0.7
    assert re.fullmatch(r"decoding: 100% 3/3 images, 2 s, 0 s left\n", capsys.readouterr().err)


def test_a_hidden_count_and_an_empty_one_say_nothing_wrong(clock, capsys):
    with Progress(5, "x", "steps", hidden=True) as bar:
        clock.now += 99
        bar.update(5)
    assert capsys.readouterr().err == ""
    with Progress(5, "x", "steps", done=5):
        pass
    assert capsys.readouterr().err == "x: 100% 5/5 steps, 0 s, 0 s left\n"
    with Progress(0, "x", "steps") as bar:
        bar.update()
    assert bar.done == 0 and "100% 0/0" in capsys.readouterr().err


def test_no_count_passes_its_total(clock, capsys):
    with Progress(2.5, "engine", "s") as bar:
        bar.update(2)
        bar.update(2)
    assert bar.done == 2.5


def test_work_that_is_cut_tells_how_far_it_was(clock, capsys):
    with pytest.raises(KeyboardInterrupt), Progress(8, "x", "steps") as bar:
        bar.update(2)
        clock.now += 3
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "x: 25% 2/8 steps, 3 s, 9 s left\n"


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with Progress(4, "training", "steps") as bar:
        bar.update(4)
        progress.say("a line", file=shown)
    assert "\r" in shown.getvalue() and "a line\n" in shown.getvalue() and "4/4 steps" in shown.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_a_time_is_short(seconds, text):
    assert duration(seconds) == text
