"""Progress of long work on standard error: a bar on a terminal, whole lines at intervals in a log.

Standard library; a terminal's bar is tqdm's. Every room may import this file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

Item = TypeVar("Item")

FIRST, SHARE, LONGEST = 15.0, 0.02, 600.0  # seconds between lines of a log: at first, of the time passed, at most


class Progress:
    """A count towards a total, shown with the time passed and left; use it in a with statement.

    total, done: in units of `unit`, which may be parts of one. what: name of the work. hidden: nothing is shown.
    delay: seconds before anything is shown; work that takes less leaves no trace.
    """

    def __init__(
        self, total: float, what: str, unit: str, *, done: float = 0, hidden: bool = False, delay: float = 0.0
    ):
        self.total, self.what, self.unit, self.delay = total, what, unit, delay
        self.done = self._first = done
        self._start = self._said = time.monotonic()
        self._shown: dict[str, str] = {}
        self._hidden, self._bar = hidden, None
        if not hidden and sys.stderr.isatty():
            self._bar = self._terminal()

    def _terminal(self) -> Any:
        from tqdm import tqdm

        form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit}, {elapsed}, {remaining} left{postfix}"
        about: dict[str, Any] = {"desc": self.what, "unit": self.unit, "bar_format": form, "delay": self.delay}
        return tqdm(total=self.total, initial=self.done, smoothing=0.02, mininterval=0.5, file=sys.stderr, **about)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self._hidden and time.monotonic() - self._start >= self.delay:
            self._line()

    def update(self, count: float = 1) -> None:
        """Count on, by so much; no further than the total."""
        count = min(count, self.total - self.done)
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif not self._hidden:
            now = time.monotonic()
            passed = now - self._start
            if now - self._said >= min(max(FIRST, SHARE * passed), LONGEST) and passed >= self.delay:
                self._line()

    def note(self, figures: Mapping[str, object]) -> None:
        """Show these figures beside the count from now on."""
        self._shown = {key: str(value) for key, value in figures.items()}
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def _line(self) -> None:
        self._said = time.monotonic()
        passed, counted = self._said - self._start, self.done - self._first
        rest = self.total - self.done
        left = duration(passed * rest / counted if counted else 0) if counted or not rest else "unknown time"
        share = 100 * self.done / self.total if self.total else 100
        figures = "".join(f", {key} {value}" for key, value in self._shown.items())
        count = f"{self.done:.0f}/{self.total:.0f} {self.unit}"
        say(f"{self.what}: {share:.0f}% {count}, {duration(passed)}, {left} left{figures}", file=sys.stderr)


def say(text: str, file: Any = None) -> None:
    """Print whole lines (default: to standard output), above a terminal's bar where there is one."""
    bars = sys.modules.get("tqdm")
    write = bars.tqdm.write if bars else print
    write(text, file=file or sys.stdout)


def duration(seconds: float) -> str:
    """A time to read: 42 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def over(items: Iterable[Item], what: str, unit: str, delay: float = 0.0) -> Iterator[Item]:
    """The items, each counted when the next is asked for."""
    items = list(items)
    with Progress(len(items), what, unit, delay=delay) as bar:
        for item in items:
            yield item
            bar.update()
