"""The addresses of this machine's network interfaces."""

from __future__ import annotations

import contextlib
import ipaddress

import psutil

from meshllm.quic.address import join_address

_BRIDGES = ("docker", "br-", "veth", "virbr", "cni")  # interfaces of containers and virtual machines
_MAX_LOCAL, _MAX_BRIDGES = 12, 4


def own_addresses(port: int, observed: str = "") -> list[str]:
    """Where others may reach this node, in the order to try: its local networks, the address that a peer
    has `observed`, container bridges, loopback."""
    local: list[str] = []
    bridges: list[str] = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            with contextlib.suppress(ValueError):
                ip = ipaddress.ip_address(entry.address.partition("%")[0])
                if ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified:
                    continue
                (bridges if name.startswith(_BRIDGES) else local).append(join_address(str(ip), port))
    found = [
        *local[:_MAX_LOCAL],
        *([observed] if observed else []),
        *bridges[:_MAX_BRIDGES],
        join_address("127.0.0.1", port),
    ]
    return list(dict.fromkeys(found))
