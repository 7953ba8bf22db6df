"""The narrow interface between the mesh and the packets below it: links between two nodes, and streams on them.

`native_quic.py` implements it with the compiled engine, `quic.py` with aioquic. Both speak the same QUIC: ALPN, mutual
certificates, and the first byte of a stream that says its kind.
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
    """First byte of every stream, sent by the side that opened it."""

    HELLO = 0  # admission: the only kind before the other side is known as a member
    GOSSIP = 1
    RPC = 2  # ggml-rpc frames to the device server of the side that accepts
    HTTP = 3  # HTTP/1.1 to the API of the side that accepts
    TRANSFER = 4  # model files


class Stream(Protocol):
    """Bytes in both directions. Raises TransportError once the stream or its link is gone."""

    async def read(self, limit: int = 1 << 18) -> bytes:
        """What has come, at most `limit` bytes; b"" after the other side has finished."""
        ...

    async def write(self, data: bytes) -> None:
        """Returns when so much of it has left that little is held here: backpressure."""
        ...

    def finish(self) -> None:
        """No more of ours follows; may be called again."""
        ...

    def abort(self) -> None:
        """Drops the stream in both directions at once, unless both have finished."""
        ...

    async def splice(self, sock: socket.socket) -> None:
        """Takes a connected socket, and joins both: until both directions have ended, or one has failed."""
        ...


class Link(Protocol):
    """An encrypted connection to one peer that has proved its node id."""

    @property
    def peer_id(self) -> str: ...
    @property
    def peer_address(self) -> str: ...
    @property
    def dialled(self) -> bool:
        """Whether this side opened it."""
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
        """Why it was closed."""
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
        """A link to who answers at "host:port", which must be `peer_id` if that is given. Raises TransportError."""
        ...

    async def close(self) -> None: ...


LinkHandler = Callable[[Link], None]
StreamHandler = Callable[[Link, StreamKind, Stream], None]
MakeTransport = Callable[[Identity, LinkHandler, StreamHandler], Transport]
