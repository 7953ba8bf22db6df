"""What the benchmarks share: the lab, three ways to run the model in it, and a table."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support import lab as netlab
from support.processes import ENGINE, DeviceServer, MeshLlm, Process, StockServer, eventually, smollm2

PORT, RPC_PORT, STOCK_PORT = 9337, 50052, 50053
MODEL = smollm2()
THREADS = 1  # of a process that computes: the hosts share this machine, where a second one waits for a core
KINDS = ("local", "stock", "ours")


class LabApi:
    """Requests from inside h1, by a long-lived helper, so that starting a program is not measured."""

    def __init__(self, lab: Any) -> None:
        code = (
            "import json, sys, time, urllib.request\n"
            "for line in sys.stdin:\n"
            "    path, body = json.loads(line)\n"
            "    data = None if body is None else json.dumps(body).encode()\n"
            "    head = {'Content-Type': 'application/json'}\n"
            f"    r = urllib.request.Request('http://127.0.0.1:{PORT}' + path, data, head)\n"
            "    try:\n"
            "        answer = json.load(urllib.request.urlopen(r, timeout=600))\n"
            "    except Exception as e:\n"
            "        answer = {'failed': str(e)}\n"
            "    print(json.dumps(answer), flush=True)\n"
        )
        argv = [*netlab.prefix(lab, "h1"), sys.executable, "-c", code]
        self._helper = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def request(self, path: str, body: object | None = None) -> Any:
        assert self._helper.stdin and self._helper.stdout
        self._helper.stdin.write(json.dumps([path, body]) + "\n")
        self._helper.stdin.flush()
        return json.loads(self._helper.stdout.readline())

    def healthy(self) -> bool:
        return bool(self.request("/health").get("status") == "ok")

    def complete(self, n_predict: int, prompt: str = "Hi", **options: object) -> Any:
        body = {
            "prompt": prompt,
            "n_predict": n_predict,
            "temperature": 0,
            "cache_prompt": False,
            "ignore_eos": True,
        }
        answer = self.request("/completion", body | options)
        if "failed" in answer:
            raise SystemExit(answer["failed"])
        return answer

    def close(self) -> None:
        self._helper.kill()
        self._helper.wait()


@contextmanager
def device_servers(
    lab: Any, kind: str, threads: int = THREADS, hosts: Sequence[str] = ("h2", "h3")
) -> Iterator[list[Process]]:
    """One kind on each of these hosts; their attribute `address` is where they listen."""
    with ExitStack() as stack:
        servers: list[Process] = []
        for host in hosts if kind != "local" else ():
            prefix = netlab.prefix(lab, host)
            if kind == "ours":
                args = ("--allow-remote", "--model", str(MODEL))
                server = DeviceServer(f"{lab.ip(host)}:{RPC_PORT}", *args, prefix=prefix, threads=threads)
                servers.append(stack.enter_context(server).ready())
            else:
                stock = StockServer(lab.ip(host), STOCK_PORT, prefix=prefix, threads=threads)
                servers.append(stack.enter_context(stock).ready())
        yield servers


@contextmanager
def running(
    lab: Any,
    kind: str,
    servers: Sequence[Any],
    *engine_args: str,
    threads: int = THREADS,
    options: Sequence[str] = ("--no-draft",),
) -> Iterator[tuple[LabApi, float]]:
    """The model served on h1 in one of three ways; the API and the seconds until it was healthy."""
    addresses = [server.address for server in servers]
    prefix = netlab.prefix(lab, "h1")
    # --poll 0: all hosts share this machine, where threads that spin would take the time of other hosts
    common = ["-t", str(threads), "--poll", "0", "-c", "4096", *engine_args]
    if kind == "ours":
        stages = [arg for address in addresses for arg in ("--stage", address)]
        args = ("--model", str(MODEL), *options, *stages, "--", *common)
        server: Process = MeshLlm(*args, port=PORT, prefix=prefix)
    else:
        argv = [str(ENGINE / "llama-server"), "-m", str(MODEL), "--port", str(PORT), *common]
        if kind == "stock":
            argv += ["--rpc", ",".join(addresses), "-ngl", "999", "--fit", "off"]
        server = Process(argv, prefix=prefix)
    began = time.monotonic()
    with server:
        api = LabApi(lab)
        try:
            eventually(lambda: server.popen.poll() is not None or api.healthy(), 300, "a healthy server")
            if server.popen.poll() is not None:
                raise SystemExit(server.output())
            yield api, time.monotonic() - began
        finally:
            api.close()


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Markdown, so that it can be pasted into docs/performance.md."""
    if head:
        print("| " + " | ".join(head) + " |")
        print("|" + " --- |" * len(head), flush=True)
    for row in rows:
        print("| " + " | ".join(f"{c:.2f}" if isinstance(c, float) else str(c) for c in row) + " |", flush=True)
