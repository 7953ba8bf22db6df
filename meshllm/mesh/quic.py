"""Links and streams over aioquic: one UDP socket for all, mutual TLS, flow control that follows the reader.

The version of aioquic is pinned: `_MeshQuic` relies on private names of it, each said why.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import time
from collections import deque
from typing import Any

from aioquic._buffer import Buffer
from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import MAX_STREAM_DATA_FRAME_CAPACITY, QuicConnection
from aioquic.quic.packet import QuicFrameType, QuicPacketType, encode_quic_version_negotiation, pull_quic_header
from aioquic.quic.recovery import QuicPacketPacer

from meshllm.errors import TransportError
from meshllm.mesh.identity import Identity, node_id_of
from meshllm.mesh.token import join_address, split_address
from meshllm.mesh.transport import ALPN, LinkHandler, StreamHandler, StreamKind

_WINDOW = 1 << 20  # bytes in flight on one stream: 100 Mbit/s at 80 ms
_WINDOW_STEP = _WINDOW // 4  # by which it moves
_WRITE_AHEAD = 1 << 20  # bytes held for one stream until they are acknowledged
_SOCKET_BUFFER = 4 << 20
_BATCH = 64  # datagrams read before other work has its turn
_DATAGRAM_SIZES = (1452, 1200)  # for an MTU of 1500, and what RFC 9000 section 14 asks every path to carry
_SMALLEST_INITIAL = 1200
_IDLE_TIMEOUT_S = 20.0
_KEEP_ALIVE_S = 5.0
_HANDSHAKE_TIMEOUT_S = 5.0
_MAX_HANDSHAKES = 64  # of strangers, at one time
_TICK_S = 0.001
_CLOSE_CODE = 0x100


class _CoarsePacer(QuicPacketPacer):
    """Lets short messages out at once and wakes the loop a thousand times a second at most.

    aioquic's own waits for every packet, in steps of microseconds that no event loop's timer can keep.
    """

    def next_send_time(self, now: float) -> float:
        at: float | None = super().next_send_time(now)
        # aioquic's own annotation forgets that nothing may be in the way
        return at if at is None else max(at, now + _TICK_S)  # type: ignore[return-value]

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        super().update_rate(congestion_window, smoothed_rtt)
        self.bucket_max = max(32 * (self.packet_time or 0.0), 4 * _TICK_S)


class _MeshQuic(QuicConnection):
    """With client certificates, acknowledgements at once, and a receive window that opens as the reader reads."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._ack_delay = 0.0
        self._loss._pacer = _CoarsePacer(max_datagram_size=self._max_datagram_size)
        self.read_offsets: dict[int, int] = {}  # stream -> bytes that its reader has taken

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls._request_client_certificate = not self._is_client

    def _write_stream_limits(self, builder: Any, space: Any, stream: Any) -> None:
        # aioquic doubles the limit on receipt, whoever reads; ours moves with the reader.
        if not stream.max_stream_data_local:
            return
        limit = self.read_offsets.get(stream.stream_id, 0) + _WINDOW
        if limit - stream.max_stream_data_local >= _WINDOW_STEP:
            stream.max_stream_data_local = limit
        if stream.max_stream_data_local_sent != stream.max_stream_data_local:
            buf = builder.start_frame(
                QuicFrameType.MAX_STREAM_DATA,
                capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
                handler=self._on_max_stream_data_delivery,
                handler_args=(stream,),
            )
            buf.push_uint_var(stream.stream_id)
            buf.push_uint_var(stream.max_stream_data_local)
            stream.max_stream_data_local_sent = stream.max_stream_data_local

    @property
    def peer_node_id(self) -> str | None:
        return node_id_of(self.tls._peer_certificate)

    @property
    def smoothed_rtt_s(self) -> float | None:
        loss = self._loss
        return loss._rtt_smoothed if loss._rtt_initialized else None

    def unacknowledged(self, stream_id: int) -> int:
        stream = self._streams.get(stream_id)
        return stream.sender._buffer_stop - stream.sender._buffer_start if stream else 0


class QuicStream:
    """See transport.Stream."""

    def __init__(self, link: QuicLink, stream_id: int) -> None:
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
            raise TransportError(self._error or "written after its end")

    def finish(self) -> None:
        if not self._error and not self._finished:
            self._finished = True
            self._link.send(self._id, b"", end=True)
            self._link.forget_if_done(self._id, self)

    def abort(self) -> None:
        if not (self._finished and self._eof):
            self._link.reset(self._id)
            self.fail("the stream was dropped")

    # --- what the link calls ---

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


class QuicLink:
    """See transport.Link; also owns the connection's timer."""

    def __init__(self, endpoint: QuicEndpoint, quic: _MeshQuic, dialled: bool) -> None:
        self._endpoint = endpoint
        self._quic = quic
        self.dialled = dialled
        self.peer_id = ""
        self.peer_address = ""
        self.bytes_sent = self.bytes_received = 0
        self.handshaken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._streams: dict[int, QuicStream] = {}
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

    def open(self, kind: StreamKind) -> QuicStream:
        if self.closed:
            raise TransportError(self._closed.result())
        stream_id = self._quic.get_next_available_stream_id()
        stream = self._streams[stream_id] = QuicStream(self, stream_id)
        self.send(stream_id, bytes([kind]))
        return stream

    def close(self, reason: str = "") -> None:
        if not self.closed:
            self._quic.close(error_code=_CLOSE_CODE, reason_phrase=reason[:200])
            self.transmit()

    # --- what streams call ---

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
            if before // _WINDOW_STEP != offsets[stream_id] // _WINDOW_STEP:
                self._schedule_transmit()  # the other side may be waiting for the window

    def unacknowledged(self, stream_id: int) -> int:
        return self._quic.unacknowledged(stream_id)

    def forget_if_done(self, stream_id: int, stream: QuicStream) -> None:
        if stream.done:
            self._streams.pop(stream_id, None)
            self._quic.read_offsets.pop(stream_id, None)

    # --- what the endpoint calls ---

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
        for data, address in self._quic.datagrams_to_send(now=now):
            self.bytes_sent += len(data)
            self._endpoint.send_datagram(data, address)
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
            self._timer = asyncio.get_running_loop().call_later(max(_TICK_S, at - now), self._handle_timer)

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
                        stream.fail("the peer dropped the stream")
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
            self.close("a certificate with an Ed25519 key is needed")
            return
        self.peer_id = peer_id
        if not self.handshaken.done():
            self.handshaken.set_result(None)
        self._keep_alive = asyncio.get_running_loop().call_later(_KEEP_ALIVE_S, self._send_keep_alive)
        self._endpoint.link_ready(self)

    def _send_keep_alive(self) -> None:
        if not self.closed:
            self._quic.send_ping(0)
            self.transmit()
            self._keep_alive = asyncio.get_running_loop().call_later(_KEEP_ALIVE_S, self._send_keep_alive)

    def _stream_received(self, stream_id: int, data: bytes, end: bool) -> None:
        stream = self._streams.get(stream_id)
        if stream is not None:
            stream.received(data, end)
            return
        if stream_id % 2 == (0 if self.dialled else 1) or not data:
            return  # of ours and already dropped, or nothing in it
        if stream_id % 4 >= 2 or data[0] not in StreamKind.__members__.values():
            self.reset(stream_id)
            return
        stream = self._streams[stream_id] = QuicStream(self, stream_id)
        self._quic.read_offsets[stream_id] = 1
        stream.received(data[1:], end)
        self._endpoint.on_stream(self, StreamKind(data[0]), stream)

    def _terminated(self, reason: str) -> None:
        if self.closed:
            return
        self._closed.set_result(reason)
        for handle in (self._timer, self._keep_alive, self._transmit_soon):
            if handle:
                handle.cancel()
        if not self.handshaken.done():
            self.handshaken.set_exception(TransportError(reason))
            self.handshaken.exception()  # seen, also when nobody awaits it
        for stream in list(self._streams.values()):
            stream.fail(reason)
        self._streams.clear()
        self._endpoint.link_closed(self)

    def abandon(self, reason: str) -> None:
        """Without a word to the other side, which may never have answered."""
        self._quic.close(reason_phrase=reason)
        self.transmit()
        self._terminated(reason)

    @property
    def overdue(self) -> bool:
        return not self.handshaken.done() and time.monotonic() - self._began > _HANDSHAKE_TIMEOUT_S


class QuicEndpoint:
    """See transport.Transport. `on_link` hears of links that others dialled; streams come to `on_stream`."""

    def __init__(self, identity: Identity, on_link: LinkHandler, on_stream: StreamHandler) -> None:
        self._identity = identity
        self._on_link = on_link
        self.on_stream = on_stream
        self._links: dict[bytes, QuicLink] = {}  # by connection id
        self._socket: socket.socket | None = None
        self._server_configuration = self._configuration(is_client=False, datagram_size=_DATAGRAM_SIZES[0])

    @property
    def port(self) -> int:
        assert self._socket
        return int(self._socket.getsockname()[1])

    def start(self, port: int) -> None:
        """Binds, to all addresses of both families. Raises TransportError."""
        try:
            self._socket = _bind(port)
        except OSError as error:
            why = "is in use; choose another with --bind-port" if error.errno == 98 else f"cannot be used: {error}"
            raise TransportError(f"UDP port {port} {why}") from None
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def _configuration(self, is_client: bool, datagram_size: int) -> QuicConfiguration:
        return QuicConfiguration(
            alpn_protocols=[ALPN],
            is_client=is_client,
            certificate=self._identity.certificate,
            private_key=self._identity.key,
            verify_mode=0,  # ssl.CERT_NONE: no authority; the key in the certificate is the peer's name
            congestion_control_algorithm="cubic",
            idle_timeout=_IDLE_TIMEOUT_S,
            max_datagram_size=datagram_size,
            max_data=64 * _WINDOW,
            max_stream_data=_WINDOW,
        )

    async def dial(self, address: str, peer_id: str | None, timeout_s: float) -> QuicLink:
        deadline = time.monotonic() + timeout_s
        target = await self._resolve(address)
        for datagram_size in _DATAGRAM_SIZES:
            last = datagram_size == _DATAGRAM_SIZES[-1]
            remaining = deadline - time.monotonic()
            link = self._start_dial(target, datagram_size)
            try:
                await asyncio.wait_for(asyncio.shield(link.handshaken), remaining if last else remaining / 2)
            except TimeoutError:
                link.abandon("no answer")
                continue
            except asyncio.CancelledError:
                link.abandon("not needed")
                raise
            if peer_id is not None and link.peer_id != peer_id:
                link.close("another node was expected here")
                raise TransportError(f"{address} is node {link.peer_id[:10]}, not {peer_id[:10]}")
            return link
        raise TransportError(f"{address} does not answer")

    def _start_dial(self, target: Any, datagram_size: int) -> QuicLink:
        link = QuicLink(self, _MeshQuic(configuration=self._configuration(True, datagram_size)), dialled=True)
        self._links[link._quic.host_cid] = link
        link.dial(target)
        return link

    async def _resolve(self, address: str) -> Any:
        assert self._socket
        parts = split_address(address)
        if parts is None:
            raise TransportError(f"{address} is not an address")
        v6 = self._socket.family == socket.AF_INET6
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(
                *parts,
                family=self._socket.family,
                type=socket.SOCK_DGRAM,
                flags=socket.AI_V4MAPPED | socket.AI_ALL if v6 else 0,
            )
        except OSError as error:
            raise TransportError(f"cannot resolve {address}: {error.strerror or error}") from None
        return infos[0][4]

    async def close(self) -> None:
        for link in set(self._links.values()):
            link.close("leaving")
            link._terminated("closed here")
        self._links.clear()
        if self._socket:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    # --- what links call ---

    def send_datagram(self, data: bytes, address: Any) -> None:
        # A full buffer or an unreachable network loses the datagram, as the network would.
        if self._socket:
            with contextlib.suppress(OSError):
                self._socket.sendto(data, address)

    def add_cid(self, cid: bytes, link: QuicLink) -> None:
        self._links[cid] = link

    def remove_cid(self, cid: bytes) -> None:
        self._links.pop(cid, None)

    def link_ready(self, link: QuicLink) -> None:
        if not link.dialled:
            self._on_link(link)

    def link_closed(self, link: QuicLink) -> None:
        for cid in [cid for cid, other in self._links.items() if other is link]:
            del self._links[cid]

    # --- datagrams ---

    def _readable(self) -> None:
        touched: dict[QuicLink, None] = {}
        for _ in range(_BATCH):
            assert self._socket
            try:
                data, address = self._socket.recvfrom(65536)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                continue  # an ICMP error of an earlier datagram
            if link := self._link_of(data, address):
                link.datagram_received(data, address)
                touched[link] = None
        for link in touched:
            link.settle()

    def _link_of(self, data: bytes, address: Any) -> QuicLink | None:
        """The link that a datagram is for; a stranger's first one makes a link. Anything else is dropped."""
        configuration = self._server_configuration
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=configuration.connection_id_length)
        except ValueError:
            return None
        link = self._links.get(header.destination_cid)
        if link or header.packet_type != QuicPacketType.INITIAL or len(data) < _SMALLEST_INITIAL:
            return link
        if header.version not in configuration.supported_versions:
            answer = encode_quic_version_negotiation(
                source_cid=header.destination_cid,
                destination_cid=header.source_cid,
                supported_versions=configuration.supported_versions,
            )
            self.send_datagram(answer, address)
            return None
        if not self._room_for_stranger():
            return None
        size = _DATAGRAM_SIZES[0] if len(data) >= _DATAGRAM_SIZES[0] else _DATAGRAM_SIZES[1]
        configuration = self._configuration(is_client=False, datagram_size=size)
        quic = _MeshQuic(configuration=configuration, original_destination_connection_id=header.destination_cid)
        link = QuicLink(self, quic, dialled=False)
        self._links[header.destination_cid] = self._links[quic.host_cid] = link
        return link

    def _room_for_stranger(self) -> bool:
        waiting = {link for link in self._links.values() if not link.dialled and not link.handshaken.done()}
        for link in [link for link in waiting if link.overdue]:
            link.abandon("the handshake took too long")
            waiting.discard(link)
        return len(waiting) < _MAX_HANDSHAKES


def _bind(port: int) -> socket.socket:
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        address: tuple[Any, ...] = ("::", port)
    except OSError:  # a machine without IPv6
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        address = ("0.0.0.0", port)
    try:
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)
        sock.bind(address)
    except BaseException:
        sock.close()
        raise
    return sock


def readable_address(address: Any) -> str:
    """ "host:port" of a socket's address, IPv4 without its disguise as IPv6."""
    host = str(address[0])
    with contextlib.suppress(ValueError):
        ip = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
            host = str(ip.ipv4_mapped)
    return join_address(host, int(address[1]))


def random_hex(n_bytes: int) -> str:
    return os.urandom(n_bytes).hex()
