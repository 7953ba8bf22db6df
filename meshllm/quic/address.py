"""Addresses as text: "host:port", "[host]:port"; and those of this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import Any

import psutil


def split_address(text: str) -> tuple[str, int] | None:
    """Host and port of "host:port" or "[host]:port"; None when it is neither."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        return None
    valid = colon and port.isascii() and port.isdigit() and 0 < int(port) < 65536
    return (host, int(port)) if valid and re.fullmatch(r"[0-9A-Za-z.:%_-]{1,253}", host) else None


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def readable_address(address: Any) -> str:
    """ "host:port" of a socket's address, IPv4 without its disguise as IPv6."""
    host = str(address[0])
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            host = str(ip.ipv4_mapped)
    return join_address(host, int(address[1]))


def own_addresses(port: int, observed: str = "") -> list[str]:
    """Where others may find this node, best first: the address others have seen, the local ones, loopback last."""
    public: list[str] = [observed] if observed else []
    local: list[str] = []
    bridges: list[str] = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            with contextlib.suppress(ValueError):
                ip = ipaddress.ip_address(entry.address.partition("%")[0])
                if ip.is_loopback or ip.is_link_local or ip.is_multicast or ip.is_unspecified:
                    continue
                bridge = name.startswith(("docker", "br-", "veth", "virbr", "cni"))
                (bridges if bridge else local).append(join_address(str(ip), port))
    found = [*local[:12], *public, *bridges[:4], join_address("127.0.0.1", port)]
    return list(dict.fromkeys(found))
