"""The fast implementation of transport.py, over the compiled endpoint (csrc/quic).

The endpoint handles packets in a thread of its own; this module takes its events to the event loop. Received data waits
in the endpoint until it is read, and only then may the peer send more.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import weakref
from collections.abc import Callable

from cryptography.hazmat.primitives import serialization

from meshllm.errors import TransportError
from meshllm.quic import _quic
from meshllm.quic.identity import Identity
from meshllm.quic.transport import (
    ALPN,
    HANDSHAKE_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    KEEP_ALIVE_S,
    LinkHandler,
    StreamHandler,
    StreamKind,
)
from meshllm.quic.udp import bind_error, resolve
from meshllm.units import short_id

_log = logging.getLogger(__name__)

_RAW = serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
_WRITE = 1 << 20  # bytes per call of the endpoint
CONGESTION_CONTROL = "bbr"  # docs/performance.md says why


class NativeStream:
    """See transport.Stream. An unfinished stream is reset when its last reference goes."""

    def __init__(self, endpoint: _quic.Endpoint, handle: int) -> None:
        self._endpoint = endpoint
        self._handle = handle
        self._waiters: dict[int, asyncio.Future[None]] = {}  # by the event that ends the wait

    async def read(self, limit: int = 1 << 18) -> bytes:
        while True:
            data, ended = self._endpoint.read(self._handle, limit)
            if data or ended:
                return data
            await self._wait(_quic.READABLE)

    async def write(self, data: bytes) -> None:
        for start in range(0, len(data), _WRITE):
            if self._endpoint.write(self._handle, data[start : start + _WRITE]):
                await self._wait(_quic.WRITABLE)
        self._endpoint.write(self._handle, b"")  # raises if the stream has failed meanwhile

    def finish(self) -> None:
        self._endpoint.finish(self._handle)

    def abort(self) -> None:
        self._endpoint.abort(self._handle)

    async def splice(self, sock: socket.socket) -> None:
        self._endpoint.splice(self._handle, sock.detach())
        try:
            await self._wait(_quic.SPLICED)
        finally:
            self.abort()

    async def _wait(self, event: int) -> None:
        waiter = self._waiters[event] = asyncio.get_running_loop().create_future()
        await waiter

    def on_event(self, event: int) -> None:
        waiter = self._waiters.pop(event, None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def __del__(self) -> None:
        self._endpoint.release(self._handle)


class NativeLink:
    """See transport.Link."""

    def __init__(self, endpoint: NativeEndpoint, handle: int, dialled: bool) -> None:
        self._endpoint = endpoint
        self._handle = handle
        self.dialled = dialled
        self.peer_id = ""
        self.handshaken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._last = endpoint.native.state(handle)

    def _state(self) -> _quic.LinkState:
        state = self._endpoint.native.state(self._handle)
        if state.peer_address:  # else the link is gone; its last state stands
            self._last = state
        return self._last

    @property
    def peer_address(self) -> str:
        return self._state().peer_address

    @property
    def rtt_s(self) -> float | None:
        rtt_us = self._state().rtt_us
        return rtt_us / 1e6 if rtt_us else None

    @property
    def bytes_sent(self) -> int:
        return self._state().bytes_sent

    @property
    def bytes_received(self) -> int:
        return self._state().bytes_received

    @property
    def n_streams(self) -> int:
        return self._state().n_streams

    @property
    def closed(self) -> bool:
        return self._closed.done()

    async def wait_closed(self) -> str:
        return await asyncio.shield(self._closed)

    def open(self, kind: StreamKind) -> NativeStream:
        handle = 0 if self.closed else self._endpoint.native.open(self._handle, kind)
        if not handle:
            raise TransportError(self._closed.result() if self.closed else "the link is closed")
        return self._endpoint.stream(handle)

    def close(self, reason: str = "") -> None:
        self.end(reason, at_once=False)

    def end(self, reason: str, at_once: bool) -> None:
        """`at_once`: without telling the peer, which may never have answered."""
        if not self.closed:
            self._endpoint.native.close_link(self._handle, reason, at_once)
            self.ended(reason or "closed by this node")

    # --- for the endpoint ---

    def linked(self, peer_id: str) -> None:
        self._state()
        if not peer_id:
            self.close("a node must show a certificate with an Ed25519 key")
            return
        self.peer_id = peer_id
        if not self.handshaken.done():
            self.handshaken.set_result(None)

    def ended(self, reason: str) -> None:
        if self.closed:
            return
        self._state()
        self._closed.set_result(reason)
        if not self.handshaken.done():
            self.handshaken.set_exception(TransportError(reason))
            self.handshaken.exception()  # retrieved, in case nobody awaits it
        self._endpoint.forget(self._handle)


class NativeEndpoint:
    """See transport.Transport. `on_link` gets the links that others dial, `on_stream` the streams that they open."""

    def __init__(
        self,
        identity: Identity,
        on_link: LinkHandler,
        on_stream: StreamHandler,
        congestion_control: str = CONGESTION_CONTROL,
    ) -> None:
        self._identity = identity
        self._on_link = on_link
        self._on_stream = on_stream
        self._congestion_control = congestion_control
        self._native: _quic.Endpoint | None = None
        self._links: dict[int, NativeLink] = {}
        self._streams: weakref.WeakValueDictionary[int, NativeStream] = weakref.WeakValueDictionary()
        self._handlers: dict[int, Callable[[_quic.Event], None]] = {
            _quic.LINKED: self._linked,
            _quic.CLOSED: self._ended,
            _quic.OPENED: self._opened,
        }

    @property
    def native(self) -> _quic.Endpoint:
        assert self._native
        return self._native

    @property
    def port(self) -> int:
        return self.native.port

    def start(self, port: int) -> None:
        """Binds, to all addresses of both families. Raises TransportError."""
        try:
            self._native = _quic.Endpoint(
                port,
                self._identity.key.private_bytes(*_RAW),
                self._identity.certificate.public_bytes(serialization.Encoding.DER),
                ALPN,
                len(StreamKind),
                congestion_control=self._congestion_control,
                idle_timeout_s=IDLE_TIMEOUT_S,
                handshake_timeout_s=HANDSHAKE_TIMEOUT_S,
                keep_alive_s=KEEP_ALIVE_S,
            )
        except OSError as error:
            raise bind_error(port, error) from None
        asyncio.get_running_loop().add_reader(self._native.fileno(), self._take_events)

    async def dial(self, address: str, peer_id: str | None, timeout_s: float) -> NativeLink:
        deadline = time.monotonic() + timeout_s
        host, port, _flow, scope = (*await resolve(address, self.native.family), 0, 0)[:4]
        handle = self.native.dial(host, port, scope)
        link = self._links[handle] = NativeLink(self, handle, dialled=True)
        try:
            await asyncio.wait_for(asyncio.shield(link.handshaken), deadline - time.monotonic())
        except TimeoutError:
            link.end("no answer", at_once=True)
            raise TransportError(f"{address} does not answer") from None
        except asyncio.CancelledError:
            link.end("not needed", at_once=True)
            raise
        if peer_id is not None and link.peer_id != peer_id:
            link.close("another node was expected here")
            raise TransportError(
                f"{address} is now another node, {short_id(link.peer_id)} instead of {short_id(peer_id)}"
            )
        return link

    async def close(self) -> None:
        if self._native is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._native.fileno())
        await loop.run_in_executor(None, self._native.stop)
        for link in list(self._links.values()):
            link.ended("closed by this node")
        for stream in list(self._streams.values()):
            for event in (_quic.READABLE, _quic.WRITABLE, _quic.SPLICED):
                stream.on_event(event)

    # --- for links ---

    def stream(self, handle: int) -> NativeStream:
        stream = self._streams[handle] = NativeStream(self.native, handle)
        return stream

    def forget(self, link: int) -> None:
        self._links.pop(link, None)

    # --- events ---

    def _take_events(self) -> None:
        for event in self.native.take_events():
            try:
                self._take(event)
            except Exception:  # the events after it must still be handled
                _log.exception("internal error, please report it: handling a QUIC event failed")

    def _take(self, event: _quic.Event) -> None:
        if handler := self._handlers.get(event.type):
            handler(event)
        elif stream := self._streams.get(event.stream):
            stream.on_event(event.type)

    def _linked(self, event: _quic.Event) -> None:
        if event.dialled:
            if link := self._links.get(event.link):  # else the dial was given up meanwhile
                link.linked(event.peer_id)
            return
        link = NativeLink(self, event.link, dialled=False)
        link.linked(event.peer_id)
        if not link.closed:
            self._links[event.link] = link
            self._on_link(link)

    def _ended(self, event: _quic.Event) -> None:
        if link := self._links.get(event.link):
            link.ended(event.reason)

    def _opened(self, event: _quic.Event) -> None:
        stream = self.stream(event.stream)  # reset again if its link is gone
        if link := self._links.get(event.link):
            self._on_stream(link, StreamKind(event.kind), stream)
