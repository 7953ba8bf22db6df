"""One run of a child process on its leash: start, output, health, end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import aiohttp

from meshllm.errors import EngineError

_KEPT_LINES = 200
_HEALTH_INTERVAL_S = 0.1
_LINE_LIMIT = 1 << 20  # llama-server prints whole chat templates in one line
_ERROR_LINE = re.compile(r"^[\d.]+ E (.*)$")


class LeashedProcess:
    """Use as `async with`; the process is gone when the block ends."""

    def __init__(
        self,
        leash: Path,
        command: Sequence[str],
        environment: Mapping[str, str],
        on_line: Callable[[str], None],
        log_file: IO[str] | None,
    ) -> None:
        self._argv = [str(leash), *command]
        self._environment = environment
        self._on_line = on_line
        self._log_file = log_file
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._leash_end = -1

    async def __aenter__(self) -> LeashedProcess:
        parent_gone, self._leash_end = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                self._argv[0],
                str(parent_gone),
                *self._argv[1:],
                pass_fds=(parent_gone,),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=dict(self._environment),
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle
                limit=_LINE_LIMIT,
            )
        except OSError as error:
            os.close(self._leash_end)
            raise EngineError(f"cannot start {self._argv[0]}: {error.strerror}") from error
        finally:
            os.close(parent_gone)
        self._reader = asyncio.create_task(self._read_output(), name="engine output")
        return self

    async def __aexit__(self, *_exc: object) -> None:
        assert self._process and self._reader
        with contextlib.suppress(ProcessLookupError):
            if self._process.returncode is None:
                self._process.terminate()
        await self._process.wait()  # after 5 s the leash kills it
        os.close(self._leash_end)
        await self._reader

    async def wait(self) -> int:
        """The exit status: 128 + signal when it was killed."""
        assert self._process and self._reader
        status = await self._process.wait()
        await asyncio.shield(self._reader)  # so that last_error() sees the last lines
        return status

    async def wait_healthy(self, socket: Path) -> None:
        """Returns when the llama-server at this Unix socket answers GET /health with 200."""
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(socket))) as session:
            while True:
                with contextlib.suppress(aiohttp.ClientError, OSError):
                    async with session.get("http://engine/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(_HEALTH_INTERVAL_S)

    def last_error(self) -> str:
        """The first of the errors that llama-server logged: later ones follow from it."""
        errors = [match[1].strip() for line in self._lines if (match := _ERROR_LINE.match(line))]
        ours = [text for text in errors if text.startswith("mesh-llm:")]
        if ours or errors:
            return (ours or errors)[0]
        return self.last_line()

    def last_line(self) -> str:
        return next((line for line in reversed(self._lines) if line), "it printed nothing")

    async def _read_output(self) -> None:
        assert self._process and self._process.stdout
        while True:
            try:
                raw = await self._process.stdout.readline()
            except ValueError:  # a line beyond the limit; what was read of it is dropped
                continue
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            self._lines.append(line)
            if self._log_file:
                print(line, file=self._log_file, flush=True)
            self._on_line(line)
