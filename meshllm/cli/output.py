"""Prints one line per event, and one line that changes while something loads."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import orjson

from meshllm.errors import MeshLlmError


class Output:
    """Lines on stderr: text, or with `json` one object each; `verbose` adds llama-server's output and debug lines."""

    def __init__(self, verbose: bool = False, json: bool = False) -> None:
        self._verbose = verbose
        self._json = json
        self._live = sys.stderr.isatty() and not verbose and not json
        self._shown = ""

    def show_logs(self) -> None:
        """From now on, prints the package's log records: warnings, and with `verbose` debug records too."""
        logger = logging.getLogger("meshllm")
        logger.handlers = [_LogHandler(self._log)]
        logger.setLevel(logging.DEBUG if self._verbose else logging.WARNING)
        logger.propagate = False

    def _log(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        if record.exc_info and self._verbose:
            text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
        elif record.exc_info:
            text += f": {record.exc_info[1]!r} (--verbose shows the traceback)"
        self._clear()
        self._print("log", text)

    def emit(self, text: str) -> None:
        self._clear()
        self._print("event", text)

    def progress(self, text: str) -> None:
        """On a terminal the line changes in place; elsewhere each new text is a line of its own."""
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


class _LogHandler(logging.Handler):
    def __init__(self, write: Callable[[logging.LogRecord], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(record)


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
