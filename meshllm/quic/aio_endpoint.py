"""Links and streams over aioquic: one UDP socket for all, mutual TLS, flow control that follows the reader."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.packet import QuicPacketType, encode_quic_version_negotiation, pull_quic_header

from meshllm.errors import TransportError
from meshllm.quic.aio_link import AioLink, AioStream
from meshllm.quic.aio_tuning import WINDOW, MeshQuic
from meshllm.quic.identity import Identity
from meshllm.quic.transport import ALPN, IDLE_TIMEOUT_S, LinkHandler, StreamHandler, StreamKind
from meshllm.quic.udp import Datagram, UdpSocket, resolve
from meshllm.units import short_id

_BATCH = 64  # datagrams read before the event loop does other work
_DATAGRAM_SIZES = (1452, 1200)  # for an MTU of 1500, and what RFC 9000 section 14 asks every path to carry
_SMALLEST_INITIAL = 1200
_MAX_HANDSHAKES = 64  # of strangers, at the same time


class AioEndpoint:
    """See transport.Transport. `on_link` gets the links that others dial, `on_stream` the streams that they open."""

    def __init__(self, identity: Identity, on_link: LinkHandler, on_stream: StreamHandler) -> None:
        self._identity = identity
        self._on_link = on_link
        self._on_stream = on_stream
        self._links: dict[bytes, AioLink] = {}  # by connection id
        self._socket: UdpSocket | None = None
        self._server_configuration = self._configuration(is_client=False, datagram_size=_DATAGRAM_SIZES[0])

    @property
    def port(self) -> int:
        assert self._socket
        return self._socket.port

    def start(self, port: int) -> None:
        """Binds, to all addresses of both families. Raises TransportError."""
        self._socket = UdpSocket(port)
        asyncio.get_running_loop().add_reader(self._socket.fileno(), self._readable)

    def _configuration(self, is_client: bool, datagram_size: int) -> QuicConfiguration:
        return QuicConfiguration(
            alpn_protocols=[ALPN],
            is_client=is_client,
            certificate=self._identity.certificate,
            private_key=self._identity.key,
            verify_mode=0,  # ssl.CERT_NONE: no authority; the key in the certificate is the peer's name
            congestion_control_algorithm="cubic",
            idle_timeout=IDLE_TIMEOUT_S,
            max_datagram_size=datagram_size,
            max_data=64 * WINDOW,
            max_stream_data=WINDOW,
        )

    async def dial(self, address: str, peer_id: str | None, timeout_s: float) -> AioLink:
        deadline = time.monotonic() + timeout_s
        assert self._socket
        target = await resolve(address, self._socket.family)
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
                raise TransportError(
                    f"{address} is now another node, {short_id(link.peer_id)} instead of {short_id(peer_id)}"
                )
            return link
        raise TransportError(f"{address} does not answer")

    def _start_dial(self, target: Any, datagram_size: int) -> AioLink:
        link = AioLink(self, MeshQuic(configuration=self._configuration(True, datagram_size)), dialled=True)
        self._links[link.host_cid] = link
        link.dial(target)
        return link

    async def close(self) -> None:
        for link in set(self._links.values()):
            link.abandon("leaving")
        self._links.clear()
        if self._socket:
            asyncio.get_running_loop().remove_reader(self._socket.fileno())
            self._socket.close()
            self._socket = None

    # --- for links ---

    def send(self, datagrams: list[Datagram]) -> None:
        if self._socket:
            self._socket.send(datagrams)

    def add_cid(self, cid: bytes, link: AioLink) -> None:
        self._links[cid] = link

    def remove_cid(self, cid: bytes) -> None:
        self._links.pop(cid, None)

    def link_ready(self, link: AioLink) -> None:
        if not link.dialled:
            self._on_link(link)

    def stream_opened(self, link: AioLink, kind: StreamKind, stream: AioStream) -> None:
        self._on_stream(link, kind, stream)

    def link_closed(self, link: AioLink) -> None:
        for cid in [cid for cid, other in self._links.items() if other is link]:
            del self._links[cid]

    # --- datagrams ---

    def _readable(self) -> None:
        touched: dict[AioLink, None] = {}
        n_datagrams = 0
        while n_datagrams < _BATCH and self._socket and (received := self._socket.receive()) is not None:
            n_datagrams += max(1, len(received))
            for data, address in received:
                if link := self._link_of(data, address):
                    self._contained(link, partial(link.datagram_received, data, address))
                    touched[link] = None
        for link in touched:
            self._contained(link, link.settle)

    def _contained(self, link: AioLink, work: Callable[[], None]) -> None:
        """A datagram that makes aioquic raise ends the link it came on, and no other."""
        try:
            work()
        except Exception as error:
            link.abandon(f"a broken packet ({error!r})")

    def _link_of(self, data: bytes, address: Any) -> AioLink | None:
        """The link that a datagram belongs to. A stranger's Initial packet makes a new one; others are dropped."""
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
            self.send([(answer, address)])
            return None
        if not self._room_for_stranger():
            return None
        size = _DATAGRAM_SIZES[0] if len(data) >= _DATAGRAM_SIZES[0] else _DATAGRAM_SIZES[1]
        configuration = self._configuration(is_client=False, datagram_size=size)
        quic = MeshQuic(configuration=configuration, original_destination_connection_id=header.destination_cid)
        link = AioLink(self, quic, dialled=False)
        self._links[header.destination_cid] = self._links[quic.host_cid] = link
        return link

    def _room_for_stranger(self) -> bool:
        waiting = {link for link in self._links.values() if not link.dialled and not link.handshaken.done()}
        for link in [link for link in waiting if link.overdue]:
            link.abandon("the handshake took too long")
            waiting.discard(link)
        return len(waiting) < _MAX_HANDSHAKES
