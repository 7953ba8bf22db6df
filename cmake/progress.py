"""How far a long build is: reads Ninja's or make's progress, and shows it where the user can see it.

pip hides what a build prints unless it is called with -v. MESH_LLM_BUILD_PROGRESS names a file to write to instead
(scripts/install sets it); failing that, a build that pip runs writes to the controlling terminal, if there is one.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Callable
from typing import TextIO

_LINE_S = 30.0  # a new line at least this often where lines cannot be rewritten ...
_LINE_PART = 0.1  # ... and for every tenth of the work
_ESTIMATE_FROM = 0.02  # before that, the time left is a guess
_PATTERN = re.compile(r"\[\s*(?:(?P<done>\d+)/(?P<total>\d+)|(?P<percent>\d+)%)\]")


def parse(line: str) -> float | None:
    """The part that is done, from 0 to 1: Ninja's "[12/345] ..." or make's "[ 12%] ..."; None for other lines."""
    match = _PATTERN.match(line)
    if match is None:
        return None
    if match["percent"]:
        return min(int(match["percent"]), 100) / 100
    total = int(match["total"])
    return min(int(match["done"]) / total, 1.0) if total else None


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class Screen:
    """Where lines go. `live`: the last line can be rewritten."""

    def __init__(self, file: TextIO, live: bool) -> None:
        self._file, self.live = file, live
        self._open = False  # a line that may be rewritten

    def say(self, text: str) -> None:
        self._write(("\r\033[K" if self._open else "") + f"-- {text}\n")
        self._open = False

    def rewrite(self, text: str) -> None:
        self._write(f"\r\033[K-- {text}")
        self._open = True

    def close(self) -> None:
        self._file.close()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed does not end the build
            self._file.write(text)
            self._file.flush()


class Progress:
    """Shows how far `what` is, from the lines that its build prints."""

    def __init__(self, what: str, screen: Screen, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._screen, self._clock = what, screen, clock
        self._began = self._shown_at = clock()
        self._shown_part = 0.0

    def feed(self, line: str) -> None:
        part = parse(line)
        if part is None:
            return
        if self._screen.live:
            self._screen.rewrite(self._text(part))
        elif part - self._shown_part >= _LINE_PART or self._clock() - self._shown_at >= _LINE_S:
            self._shown_part, self._shown_at = part, self._clock()
            self._screen.say(self._text(part))

    def done(self) -> None:
        self._screen.say(f"{self._what}: built in {duration(self._clock() - self._began)}")

    def _text(self, part: float) -> str:
        elapsed = self._clock() - self._began
        text = f"{self._what}: {part:.0%}, {duration(elapsed)}"
        if _ESTIMATE_FROM <= part < 1:
            text += f", about {duration(elapsed * (1 - part) / part)} left"
        return text


def find_screen() -> Screen:
    if named := os.environ.get("MESH_LLM_BUILD_PROGRESS"):
        with contextlib.suppress(OSError):
            file = open(named, "w")  # noqa: SIM115 - open for as long as the program runs
            return Screen(file, file.isatty())
    elif "PIP_BUILD_TRACKER" in os.environ:
        with contextlib.suppress(OSError):
            file = open("/dev/tty", "w")  # noqa: SIM115
            file.write("\n")  # pip's own line stays, and its spinner would disturb one that is rewritten
            return Screen(file, live=False)
    return Screen(sys.stderr, sys.stderr.isatty())
