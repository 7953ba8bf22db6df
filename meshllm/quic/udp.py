"""A node's UDP port: datagrams in batches, peers' addresses, and the error when the port is taken."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import socket
import struct
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from meshllm.errors import TransportError
from meshllm.quic.address import split_address

_SOCKET_BUFFER = 4 << 20
_LARGEST = 65536  # of what one call receives
_MAX_SEGMENTS = 44  # of 1452 bytes: what fits into one call
_UDP_SEGMENT, _UDP_GRO = 103, 104  # include/uapi/linux/udp.h
_U16, _INT = struct.Struct("=H"), struct.Struct("=i")

Datagram = tuple[bytes, Any]  # and the socket address of the other side


class UdpSocket:
    """Bound to all addresses of both families, or of IPv4 alone on a machine without IPv6.

    On Linux the kernel segments and coalesces datagrams (UDP GSO and GRO), so that many cost one system call.
    Raises TransportError.
    """

    def __init__(self, port: int) -> None:
        try:
            self._socket = _bind(port)
        except OSError as error:
            raise bind_error(port, error) from None
        self.family = self._socket.family
        self._offload = False
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # kernels before 2018 have neither
                self._socket.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, 0)
                self._socket.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
                self._offload = True

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self) -> list[Datagram] | None:
        """The datagrams of one system call; None when none is waiting."""
        try:
            data, controls, _flags, address = self._socket.recvmsg(_LARGEST, socket.CMSG_SPACE(_INT.size))
        except (BlockingIOError, InterruptedError):
            return None
        except OSError:
            return []  # an ICMP error about a datagram that was sent
        if not controls:
            return [(data, address)]
        size = max(1, _INT.unpack(controls[0][2][: _INT.size])[0])
        return [(data[at : at + size], address) for at in range(0, len(data), size)]

    def send(self, datagrams: Sequence[Datagram]) -> None:
        """Datagrams that the kernel does not take are lost, as the network might lose them."""
        for run, address in _runs(datagrams):
            if len(run) == 1 or not self._offload:
                self._send_singly(run, address)
                continue
            cut = (socket.IPPROTO_UDP, _UDP_SEGMENT, _U16.pack(len(run[0])))
            try:
                self._socket.sendmsg(run, [cut], 0, address)
            except BlockingIOError:
                pass
            except OSError as error:
                self._offload = error.errno != errno.EIO  # the device cannot compute the segments' checksums
                self._send_singly(run, address)

    def _send_singly(self, datagrams: Sequence[bytes], address: Any) -> None:
        for data in datagrams:
            with contextlib.suppress(OSError):
                self._socket.sendto(data, address)


def _runs(datagrams: Sequence[Datagram]) -> Iterator[tuple[list[bytes], Any]]:
    """Consecutive datagrams to one address and of one size; the last of a run may be shorter."""
    for address, group in itertools.groupby(datagrams, key=lambda one: one[1]):
        run: list[bytes] = []
        for data, _ in group:
            fits = run and len(run) < _MAX_SEGMENTS and len(data) <= len(run[0]) == len(run[-1])
            if run and not fits:
                yield run, address
                run = []
            run.append(data)
        yield run, address


def bind_error(port: int, error: OSError) -> TransportError:
    in_use = error.errno == errno.EADDRINUSE
    why = "it is in use; choose another with --bind-port" if in_use else str(error)
    return TransportError(f"cannot use UDP port {port}: {why}")


async def resolve(address: str, family: int) -> Any:
    """The socket address of "host:port" in that family, IPv4 mapped into IPv6 if need be. Raises TransportError."""
    parts = split_address(address)
    if parts is None:
        raise TransportError(f"{address} is not an address; write HOST:PORT")
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
