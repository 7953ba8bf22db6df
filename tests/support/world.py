"""Nodes of one mesh on the hosts of a lab."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from support import lab as netlab
from support.processes import MeshLlm

PORT, BIND_PORT = 9337, 7000
ENGINE_ARGS = ("--", "-c", "2048", "-t", "1", "-np", "2", "--no-cache-prompt")


class World:
    """A lab and the nodes in it, each with a data folder that outlives its process."""

    def __init__(self, lab: Any, folder: Path) -> None:
        self.lab = lab
        self.nodes: dict[str, MeshLlm] = {}
        self.folder = folder
        self._stack = ExitStack()

    def start(
        self,
        host: str,
        *args: str,
        engine_args: tuple[str, ...] = ENGINE_ARGS,
        prefix: list[str] | None = None,
        env: dict[str, str] | None = None,
    ) -> MeshLlm:
        data = self.folder / host
        data.mkdir(exist_ok=True)
        argv = ("--name", host, *args, *(() if "--client" in args else engine_args))
        node = MeshLlm(*argv, port=PORT, prefix=prefix or netlab.prefix(self.lab, host), data=data, env=env)
        self.nodes[host] = self._stack.enter_context(node)
        return node

    def seed(self, host: str, *args: str, **options: Any) -> str:
        """Starts a mesh and returns its token."""
        node = self.start(host, "--bind-port", str(BIND_PORT), *args, **options)
        output = node.wait_output("--join ")
        return str(re.findall(r"--join (\S+)", output)[-1])

    def stop(self, host: str, number: int) -> None:
        node = self.nodes.pop(host)
        node.kill(number)
        node.wait()

    def api(self, host: str) -> netlab.LabApi:
        return netlab.LabApi(netlab.prefix(self.lab, host), f"http://127.0.0.1:{PORT}")

    def status(self, host: str) -> Any:
        result = self.nodes[host].command("status", "--json")
        return json.loads(result.stdout) if result.returncode == 0 else {"models": [], "nodes": [], "engine": None}

    def roles(self, host: str) -> dict[str, str]:
        """Name of each node to why it is what it is, as `host` sees it."""
        status = self.status(host)
        names = {node["id"]: node["name"] for node in status["nodes"]}
        return {names[i]: why for model in status["models"] for i, why in model["reasons"].items() if i in names}

    def served_by(self, asked: str, *hosts: str) -> bool:
        """Whether `asked` sees a group of just these hosts that is ready."""
        status = self.status(asked)
        names = {node["id"]: node["name"] for node in status["nodes"]}
        living = [node for node in status["nodes"] if node["state"] == "alive"]
        groups = [
            {n["name"], *(names.get(i, "?") for i in s["stages"])} for n in living for s in n["serving"] if s["ready"]
        ]
        return groups == [set(hosts)]

    def close(self) -> None:
        self._stack.close()


@contextmanager
def world(folder: Path, **options: Any) -> Iterator[World]:
    if why := netlab.missing():
        pytest.skip(why)
    with netlab.make_lab(**options) as lab:
        made = World(lab, folder)
        try:
            yield made
        finally:
            made.close()
