"""The UDP port of a node: addresses of peers, and what is said when it cannot be had."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from typing import Any

from meshllm.errors import TransportError
from meshllm.mesh.token import split_address

_SOCKET_BUFFER = 4 << 20


def bind(port: int) -> socket.socket:
    """To all addresses of both families, or of IPv4 alone on a machine without IPv6. Raises TransportError."""
    try:
        return _bind(port)
    except OSError as error:
        raise bind_error(port, error) from None


def bind_error(port: int, error: OSError) -> TransportError:
    in_use = error.errno == errno.EADDRINUSE
    why = "is in use; choose another with --bind-port" if in_use else f"cannot be used: {error}"
    return TransportError(f"UDP port {port} {why}")


async def resolve(address: str, family: int) -> Any:
    """The socket address of "host:port" in that family, IPv4 in the guise of IPv6 if need be. Raises TransportError."""
    parts = split_address(address)
    if parts is None:
        raise TransportError(f"{address} is not an address")
    mapped = socket.AI_V4MAPPED | socket.AI_ALL if family == socket.AF_INET6 else 0
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(
            *parts, family=family, type=socket.SOCK_DGRAM, flags=mapped
        )
    except OSError as error:
        raise TransportError(f"cannot resolve {address}: {error.strerror or error}") from None
    return infos[0][4]


def _bind(port: int) -> socket.socket:
    try:
        return _bind_family(socket.AF_INET6, "::", port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
    return _bind_family(socket.AF_INET, "0.0.0.0", port)


def _bind_family(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            with contextlib.suppress(OSError):  # the system may allow less
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock
