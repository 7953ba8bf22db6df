"""Hosts in network namespaces (shared/netlab beside the checkout, or where MESH_LLM_NETLAB says)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from support.processes import Api

_REPOSITORY = Path(__file__).parents[2]


def netlab_path() -> Path:
    return Path(os.environ.get("MESH_LLM_NETLAB") or _REPOSITORY.parent / "shared" / "netlab" / "netlab.py")


def missing() -> str | None:
    """Why the lab cannot run here."""
    if not netlab_path().is_file():
        return f"no netlab at {netlab_path()} (MESH_LLM_NETLAB names another)"
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.W_OK):
        return "network namespaces need root and /dev/net/tun"
    if not shutil.which("ip") or not shutil.which("cc"):
        return "iproute2 and a C compiler are needed"
    return None


def _module() -> ModuleType:
    if "netlab" not in sys.modules:
        spec = importlib.util.spec_from_file_location("netlab", netlab_path())
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules["netlab"] = module
        spec.loader.exec_module(module)
    return sys.modules["netlab"]


def make_lab(**options: Any) -> Any:
    """A netlab.Lab; see there."""
    return _module().Lab(**options)


def prefix(lab: Any, host: str) -> list[str]:
    """What makes a command run inside `host`."""
    return list(lab.command(host, []))


class LabApi(Api):
    """Requests from inside a namespace: each by a small program, so that any number may run at once."""

    def __init__(self, prefix: list[str], base: str) -> None:
        super().__init__(base)
        self._prefix = prefix

    def request(self, path: str, body: object | None = None, timeout_s: float = 240) -> Any:
        result = subprocess.run(
            [*self._prefix, sys.executable, "-m", "support.ask", self.base + path, str(timeout_s)],
            input=json.dumps(body),
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
            check=False,
        )
        if result.returncode:
            raise OSError(result.stderr or result.stdout)
        return json.loads(result.stdout)
