"""What the commands print: one line per event, and one line that changes while something loads."""

from __future__ import annotations

import sys
from typing import IO


class Output:
    def __init__(self, verbose: bool = False) -> None:
        self._verbose = verbose
        self._live = sys.stderr.isatty() and not verbose
        self._shown = ""

    def say(self, text: str) -> None:
        self._clear()
        print(text, file=sys.stderr, flush=True)

    def progress(self, text: str) -> None:
        """On a terminal the line changes in place; elsewhere each new text is a line."""
        if text == self._shown:
            return
        if self._live:
            sys.stderr.write(f"\r\033[K{text}")
            sys.stderr.flush()
        else:
            print(text, file=sys.stderr, flush=True)
        self._shown = text

    def engine_log(self) -> IO[str] | None:
        """Where llama-server's own lines go."""
        return sys.stderr if self._verbose else None

    def _clear(self) -> None:
        if self._live and self._shown:
            sys.stderr.write("\r\033[K")
        self._shown = ""
