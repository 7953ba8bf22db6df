"""What the commands print: one line per event, and one line that changes while something loads."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import orjson

from meshllm.errors import MeshLlmError


class Output:
    def __init__(self, verbose: bool = False, json: bool = False) -> None:
        self._verbose = verbose
        self._json = json
        self._live = sys.stderr.isatty() and not verbose and not json
        self._shown = ""

    def emit(self, text: str) -> None:
        self._clear()
        self._print("event", text)

    def progress(self, text: str) -> None:
        """On a terminal the line changes in place; elsewhere each new text is a line."""
        if text == self._shown:
            return
        if self._live:
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()
        else:
            self._print("progress", text)
        self._shown = text

    def _print(self, kind: str, text: str) -> None:
        if self._json:
            text = orjson.dumps({"time": round(time.time(), 3), kind: text}).decode()
        print(text, file=sys.stderr, flush=True)

    def engine_log(self) -> IO[str] | None:
        """Where llama-server's own lines go."""
        return sys.stderr if self._verbose else None

    def _clear(self) -> None:
        if self._live and self._shown:
            sys.stderr.write("\r\033[K")
        self._shown = ""


@contextmanager
def open_engine_log(output: Output, path: Path | None) -> Iterator[IO[str] | None]:
    """Where llama-server's lines go: to a file, to the terminal, or nowhere. Raises MeshLlmError."""
    if path is None:
        yield output.engine_log()
        return
    try:
        file = path.open("w")
    except OSError as error:
        raise MeshLlmError(f"cannot write {path}: {error.strerror}") from error
    with contextlib.closing(file):
        yield file
