"""cmake/progress.py: what is read of a build's lines, and what is shown of it."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

import pytest


def _load() -> Any:
    path = Path(__file__).parents[3] / "cmake" / "progress.py"
    spec = importlib.util.spec_from_file_location("mesh_llm_build_progress", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


progress = _load()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(live: bool, *fed: tuple[float, str]) -> str:
    """What is written when each line comes that many seconds after the one before."""
    file, clock = io.StringIO(), Clock()
    shown = progress.Progress("llama.cpp", progress.Screen(file, live), clock)
    for after_s, line in fed:
        clock.now += after_s
        shown.feed(line)
    shown.done()
    return file.getvalue()


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("[12/345] Building CXX object a.o", 12 / 345),
        ("[345/345] Linking CXX executable bin/llama-server\n", 1.0),
        ("[  7%] Building C object b.o", 0.07),
        ("[100%] Built target ggml", 1.0),
        ("[0/0] nothing", None),
        ("[9/3] more than all", 1.0),
        ("a.cpp:[1/2]: warning", None),
        ("[build] something else", None),
        ("", None),
    ],
)
def test_ninja_and_make_are_understood(line: str, part: float | None) -> None:
    assert progress.parse(line) == (part if part is None else pytest.approx(part))


def test_a_terminal_has_one_line_that_is_rewritten() -> None:
    text = lines(True, (1, "[1/10] a"), (1, "a warning"), (8, "[5/10] b"))
    assert text.split("\r\033[K") == [
        "",
        "-- llama.cpp: 10%, 1 s, about 9 s left",
        "-- llama.cpp: 50%, 10 s, about 10 s left",
        "-- llama.cpp: built in 10 s\n",
    ]


def test_elsewhere_a_line_comes_for_each_tenth_or_half_a_minute() -> None:
    fed = [(1.0, f"[{i}/100] x") for i in range(1, 21)] + [(40.0, "[21/100] slow"), (1.0, "[22/100] x")]
    shown = lines(False, *fed).splitlines()
    assert shown == [
        "-- llama.cpp: 10%, 10 s, about 1 min 30 s left",
        "-- llama.cpp: 20%, 20 s, about 1 min 20 s left",
        "-- llama.cpp: 21%, 1 min 00 s, about 3 min 46 s left",
        "-- llama.cpp: built in 1 min 01 s",
    ]


def test_a_closed_terminal_does_not_end_the_build() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("gone")

    progress.Screen(Closed(), live=True).say("something")


def test_a_named_file_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_BUILD_PROGRESS", str(tmp_path / "lines"))
    screen = progress.find_screen()
    screen.say("downloading")
    screen.close()
    assert (tmp_path / "lines").read_text() == "-- downloading\n"
