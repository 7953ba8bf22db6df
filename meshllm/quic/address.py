"""Addresses as text: "host:port" and "[host]:port"."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import Any


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
    """ "host:port" of a socket's address, with IPv4-mapped IPv6 written as IPv4."""
    host = str(address[0])
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            host = str(ip.ipv4_mapped)
    return join_address(host, int(address[1]))
