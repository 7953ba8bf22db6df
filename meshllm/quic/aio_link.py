"""Links and streams over aioquic. An endpoint (aio_endpoint.py) owns the socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import deque
from typing import Any, Protocol

from aioquic.quic import events

from meshllm.errors import MeshLlmError, TransportError
from meshllm.quic.address import readable_address
from meshllm.quic.aio_tuning import TICK_S, WINDOW_STEP, MeshQuic
from meshllm.quic.transport import HANDSHAKE_TIMEOUT_S, KEEP_ALIVE_S, StreamKind
from meshllm.quic.udp import Datagram

_WRITE_AHEAD = 1 << 20  # unacknowledged bytes of one stream, beyond which its writer waits
_CLOSE_CODE = 0x100
_SPLICE_CHUNK = 1 << 18


class Endpoint(Protocol):
    """What a link needs of the endpoint."""

    def send(self, datagrams: list[Datagram]) -> None: ...
    def add_cid(self, cid: bytes, link: AioLink) -> None: ...
    def remove_cid(self, cid: bytes) -> None: ...
    def link_ready(self, link: AioLink) -> None: ...
    def link_closed(self, link: AioLink) -> None: ...
    def stream_opened(self, link: AioLink, kind: StreamKind, stream: AioStream) -> None: ...


class AioStream:
    """See transport.Stream."""

    def __init__(self, link: AioLink, stream_id: int) -> None:
        self._link = link
        self._id = stream_id
        self._chunks: deque[bytes] = deque()
        self._eof = self._finished = False
        self._error = ""
        self._read_waiter: asyncio.Future[None] | None = None
        self._write_waiter: asyncio.Future[None] | None = None

    async def read(self, limit: int = 1 << 18) -> bytes:
        while not self._chunks:
            if self._error:
                raise TransportError(self._error)
            if self._eof:
                return b""
            self._read_waiter = asyncio.get_running_loop().create_future()
            await self._read_waiter
        if len(self._chunks) == 1 and len(self._chunks[0]) <= limit:
            data = self._chunks.popleft()
        else:
            parts, size = [], 0
            while self._chunks and size < limit:
                part = self._chunks.popleft()
                if size + len(part) > limit:
                    self._chunks.appendleft(part[limit - size :])
                    part = part[: limit - size]
                parts.append(part)
                size += len(part)
            data = b"".join(parts)
        self._link.consumed(self._id, len(data))
        return data

    async def write(self, data: bytes) -> None:
        for start in range(0, len(data), _WRITE_AHEAD):
            self._check_writable()
            self._link.send(self._id, data[start : start + _WRITE_AHEAD])
            while not self._error and self._link.unacknowledged(self._id) > _WRITE_AHEAD:
                self._write_waiter = asyncio.get_running_loop().create_future()
                await self._write_waiter
        self._check_writable()

    def _check_writable(self) -> None:
        if self._error or self._finished:
            raise TransportError(self._error or "this side has already finished the stream")

    def finish(self) -> None:
        if not self._error and not self._finished:
            self._finished = True
            self._link.send(self._id, b"", end=True)
            self._link.forget_if_done(self._id, self)

    def abort(self) -> None:
        if not (self._finished and self._eof):
            self._link.reset(self._id)
            self.fail("the stream was reset here")

    async def splice(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=sock)

        async def outward() -> None:
            while data := await reader.read(_SPLICE_CHUNK):
                await self.write(data)
            self.finish()

        async def inward() -> None:
            while data := await self.read(_SPLICE_CHUNK):
                writer.write(data)
                await writer.drain()
            writer.write_eof()

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(outward(), name="splice outward")
                group.create_task(inward(), name="splice inward")
        except* (MeshLlmError, OSError):
            pass  # the other end of the socket sees it closed
        finally:
            self.abort()
            writer.transport.abort()

    # --- for the link ---

    @property
    def done(self) -> bool:
        return bool(self._error) or (self._eof and self._finished)

    def received(self, data: bytes, end: bool) -> None:
        if data:
            self._chunks.append(data)
        self._eof = self._eof or end
        self._link.forget_if_done(self._id, self)
        _wake(self._read_waiter)

    def fail(self, reason: str) -> None:
        self._error = self._error or reason
        _wake(self._read_waiter)
        _wake(self._write_waiter)

    def acknowledged(self) -> None:
        if self._write_waiter and self._link.unacknowledged(self._id) <= _WRITE_AHEAD // 2:
            _wake(self._write_waiter)


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)


class AioLink:
    """See transport.Link. It also owns the connection's timers."""

    def __init__(self, endpoint: Endpoint, quic: MeshQuic, dialled: bool) -> None:
        self._endpoint = endpoint
        self._quic = quic
        self.dialled = dialled
        self.peer_id = ""
        self.peer_address = ""
        self.bytes_sent = self.bytes_received = 0
        self.handshaken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._streams: dict[int, AioStream] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._transmit_soon: asyncio.Handle | None = None
        self._keep_alive: asyncio.TimerHandle | None = None
        self._began = time.monotonic()

    # --- transport.Link ---

    @property
    def rtt_s(self) -> float | None:
        return self._quic.smoothed_rtt_s

    @property
    def n_streams(self) -> int:
        return len(self._streams)

    @property
    def closed(self) -> bool:
        return self._closed.done()

    async def wait_closed(self) -> str:
        return await asyncio.shield(self._closed)

    def open(self, kind: StreamKind) -> AioStream:
        if self.closed:
            raise TransportError(self._closed.result())
        stream_id = self._quic.get_next_available_stream_id()
        stream = self._streams[stream_id] = AioStream(self, stream_id)
        self.send(stream_id, bytes([kind]))
        return stream

    def close(self, reason: str = "") -> None:
        if not self.closed:
            self._quic.close(error_code=_CLOSE_CODE, reason_phrase=reason[:200])
            self.transmit()

    # --- for streams ---

    def send(self, stream_id: int, data: bytes, end: bool = False) -> None:
        if not self.closed:
            self._quic.send_stream_data(stream_id, data, end)
            self._schedule_transmit()

    def reset(self, stream_id: int) -> None:
        self._streams.pop(stream_id, None)
        if not self.closed:
            with contextlib.suppress(ValueError, AssertionError, RuntimeError):
                self._quic.reset_stream(stream_id, 0)
            with contextlib.suppress(ValueError, AssertionError, RuntimeError):
                self._quic.stop_stream(stream_id, 0)
            self._schedule_transmit()

    def consumed(self, stream_id: int, n_bytes: int) -> None:
        if stream_id in self._streams:
            offsets = self._quic.read_offsets
            before = offsets.get(stream_id, 0)
            offsets[stream_id] = before + n_bytes
            if before // WINDOW_STEP != offsets[stream_id] // WINDOW_STEP:
                self._schedule_transmit()  # the other side may be waiting for the window

    def unacknowledged(self, stream_id: int) -> int:
        return self._quic.unacknowledged(stream_id)

    def forget_if_done(self, stream_id: int, stream: AioStream) -> None:
        if stream.done:
            self._streams.pop(stream_id, None)
            self._quic.read_offsets.pop(stream_id, None)

    # --- for the endpoint ---

    @property
    def host_cid(self) -> bytes:
        """The connection ID that the peer addresses first."""
        return self._quic.host_cid

    def datagram_received(self, data: bytes, address: Any) -> None:
        self.bytes_received += len(data)
        self.peer_address = self.peer_address or readable_address(address)
        self._quic.receive_datagram(data, address, now=time.monotonic())

    def dial(self, address: Any) -> None:
        self.peer_address = readable_address(address)
        self._quic.connect(address, now=time.monotonic())
        self.transmit()

    def settle(self) -> None:
        """After datagrams: events, writers that wait, answers, the timer."""
        self._process_events()
        for stream in list(self._streams.values()):
            stream.acknowledged()
        self.transmit()

    def transmit(self) -> None:
        if self._transmit_soon:
            self._transmit_soon.cancel()
            self._transmit_soon = None
        now = time.monotonic()
        datagrams = self._quic.datagrams_to_send(now=now)
        self.bytes_sent += sum(len(data) for data, _ in datagrams)
        self._endpoint.send(datagrams)
        self._arm_timer(now)

    def _schedule_transmit(self) -> None:
        if self._transmit_soon is None:
            self._transmit_soon = asyncio.get_running_loop().call_soon(self.transmit)

    def _arm_timer(self, now: float) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        at = self._quic.get_timer()
        if at is not None:
            self._timer = asyncio.get_running_loop().call_later(max(TICK_S, at - now), self._handle_timer)

    def _handle_timer(self) -> None:
        self._timer = None
        now = time.monotonic()
        due = self._quic.get_timer()
        if due is not None and due <= now:
            self._quic.handle_timer(now=now)
        self.settle()

    def _process_events(self) -> None:
        while (event := self._quic.next_event()) is not None:
            match event:
                case events.StreamDataReceived():
                    self._stream_received(event.stream_id, event.data, event.end_stream)
                case events.StreamReset() | events.StopSendingReceived():
                    if stream := self._streams.pop(event.stream_id, None):
                        stream.fail("the peer reset the stream")
                    if isinstance(event, events.StreamReset):
                        self.reset(event.stream_id)
                case events.ConnectionIdIssued():
                    self._endpoint.add_cid(event.connection_id, self)
                case events.ConnectionIdRetired():
                    self._endpoint.remove_cid(event.connection_id)
                case events.HandshakeCompleted():
                    self._handshake_completed()
                case events.ConnectionTerminated():
                    self._terminated(event.reason_phrase or f"the connection ended (code {event.error_code:#x})")

    def _handshake_completed(self) -> None:
        peer_id = self._quic.peer_node_id
        if peer_id is None:
            self.close("a node must show a certificate with an Ed25519 key")
            return
        self.peer_id = peer_id
        if not self.handshaken.done():
            self.handshaken.set_result(None)
        self._keep_alive = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._send_keep_alive)
        self._endpoint.link_ready(self)

    def _send_keep_alive(self) -> None:
        if not self.closed:
            self._quic.send_ping(0)
            self.transmit()
            self._keep_alive = asyncio.get_running_loop().call_later(KEEP_ALIVE_S, self._send_keep_alive)

    def _stream_received(self, stream_id: int, data: bytes, end: bool) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.received(data, end)
            return
        if stream_id % 2 == (0 if self.dialled else 1) or not data:
            return  # one of ours, reset already; or empty
        if stream_id % 4 >= 2 or data[0] not in StreamKind.__members__.values():
            self.reset(stream_id)
            return
        stream = self._streams[stream_id] = AioStream(self, stream_id)
        self._quic.read_offsets[stream_id] = 1
        stream.received(data[1:], end)
        self._endpoint.stream_opened(self, StreamKind(data[0]), stream)

    def _terminated(self, reason: str) -> None:
        if self.closed:
            return
        self._closed.set_result(reason)
        for handle in (self._timer, self._keep_alive, self._transmit_soon):
            if handle:
                handle.cancel()
        if not self.handshaken.done():
            self.handshaken.set_exception(TransportError(reason))
            self.handshaken.exception()  # retrieved, in case nobody awaits it
        for stream in list(self._streams.values()):
            stream.fail(reason)
        self._streams.clear()
        self._endpoint.link_closed(self)

    def abandon(self, reason: str) -> None:
        """Closes without waiting for the peer, which may never have answered."""
        with contextlib.suppress(Exception):  # aioquic's own state may be broken
            self._quic.close(reason_phrase=reason)
            self.transmit()
        self._terminated(reason)

    @property
    def overdue(self) -> bool:
        return not self.handshaken.done() and time.monotonic() - self._began > HANDSHAKE_TIMEOUT_S
