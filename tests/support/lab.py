"""Hosts in network namespaces (shared/netlab beside the checkout, or where MESH_LLM_NETLAB says)."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
    if not all(shutil.which(command) for command in ("ip", "nft", "cc")):
        return "iproute2, nftables and a C compiler are needed"
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


def interface_bytes(lab: Any, host: str) -> int:
    """Bytes that `host` has sent and received."""
    total = 0
    for direction in ("rx", "tx"):
        path = f"/sys/class/net/eth0/statistics/{direction}_bytes"
        total += int(lab.run(host, ["cat", path], capture_output=True, text=True, check=True).stdout)
    return total


@contextmanager
def behind_nat(lab: Any, host: str, subnet: str, forward_udp: int = 0) -> Iterator[list[str]]:
    """A machine of its own behind `host`, which translates addresses; what makes a command run there.

    It has `subnet`.2; `forward_udp` is a port that `host` passes on to it.
    """
    inside, gateway = lab.netns(host) + "-in", lab.netns(host)
    link = f"v{lab.netns(host)}"[-13:]

    def ip(*args: str) -> None:
        subprocess.run(["ip", *args], check=True)

    rules = "add table ip nat; add chain ip nat post { type nat hook postrouting priority 100 ; };"
    rules += "add rule ip nat post oifname eth0 masquerade;"
    if forward_udp:
        rules += "add chain ip nat pre { type nat hook prerouting priority -100 ; };"
        rules += f"add rule ip nat pre iifname eth0 udp dport {forward_udp} dnat to {subnet}.2"
    ip("netns", "add", inside)
    try:
        ip("link", "add", link, "netns", gateway, "type", "veth", "peer", "name", "eth0", "netns", inside)
        for ns, device, address in ((gateway, link, 1), (inside, "eth0", 2)):
            ip("-n", ns, "addr", "add", f"{subnet}.{address}/24", "dev", device)
            ip("-n", ns, "link", "set", device, "up")
        ip("-n", inside, "link", "set", "lo", "up")
        ip("-n", inside, "route", "add", "default", "via", f"{subnet}.1")
        lab.run(host, ["sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], check=True)
        lab.run(host, ["nft", rules], check=True)
        yield ["ip", "netns", "exec", inside]
    finally:
        ip("netns", "del", inside)


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

    def status_of(self, path: str, body: object | None = None) -> tuple[int, Any]:
        try:
            return 200, self.request(path, body)
        except OSError as error:
            status, _, answer = str(error).partition(": ")
            return int(status), json.loads(answer)
