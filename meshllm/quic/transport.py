"""The interface between the mesh and QUIC: links between two nodes, and streams on them.

`native.py` implements it with picoquic, in compiled code; `aio_endpoint.py` with aioquic. Both speak the same protocol:
one ALPN, certificates on both sides, and a first byte in every stream that gives its kind.
"""

from __future__ import annotations

import enum
import socket
from collections.abc import Callable
from typing import Protocol

from meshllm.quic.identity import Identity

ALPN = "mesh-llm/1"
IDLE_TIMEOUT_S = 20.0
KEEP_ALIVE_S = 5.0
HANDSHAKE_TIMEOUT_S = 5.0


class StreamKind(enum.IntEnum):
    """The first byte of every stream, sent by the side that opens it."""

    HELLO = 0  # admission: the only kind that is accepted before the peer is known to be a member
    GOSSIP = 1
    RPC = 2  # ggml-rpc frames to the accepting side's device server
    HTTP = 3  # HTTP/1.1 to the accepting side's API
    TRANSFER = 4  # model files


class Stream(Protocol):
    """Bytes in both directions. Methods raise TransportError once the stream or its link is gone."""

    async def read(self, limit: int = 1 << 18) -> bytes:
        """Waits for data. Returns at most `limit` bytes, and b"" once the peer has finished."""
        ...

    async def write(self, data: bytes) -> None:
        """Returns when little of it is still buffered here, which slows a fast writer down to the peer's pace."""
        ...

    def finish(self) -> None:
        """Ends this side of the stream. May be called more than once."""
        ...

    def abort(self) -> None:
        """Resets the stream in both directions, unless both have finished."""
        ...

    async def splice(self, sock: socket.socket) -> None:
        """Takes over a connected socket and copies in both directions until both have ended, or one has failed."""
        ...


class Link(Protocol):
    """An encrypted connection to a peer that has proved its node id."""

    @property
    def peer_id(self) -> str: ...
    @property
    def peer_address(self) -> str: ...
    @property
    def dialled(self) -> bool:
        """Whether this node opened it."""
        ...

    @property
    def rtt_s(self) -> float | None:
        """QUIC's smoothed estimate; None before the first sample."""
        ...

    @property
    def bytes_sent(self) -> int: ...
    @property
    def bytes_received(self) -> int: ...
    @property
    def n_streams(self) -> int: ...
    @property
    def closed(self) -> bool: ...

    def open(self, kind: StreamKind) -> Stream: ...
    async def wait_closed(self) -> str:
        """Waits, and returns why the link was closed."""
        ...

    def close(self, reason: str = "") -> None: ...


class Transport(Protocol):
    """One UDP port for all links."""

    def start(self, port: int) -> None:
        """Binds the port, 0 for any. Raises TransportError."""
        ...

    @property
    def port(self) -> int: ...
    async def dial(self, address: str, peer_id: str | None, timeout_s: float) -> Link:
        """Connects to "host:port". Raises TransportError, also if another node than `peer_id` is there."""
        ...

    async def close(self) -> None: ...


LinkHandler = Callable[[Link], None]
StreamHandler = Callable[[Link, StreamKind, Stream], None]
MakeTransport = Callable[[Identity, LinkHandler, StreamHandler], Transport]
