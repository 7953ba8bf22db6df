"""Peers that mean harm, against the native engine: memory and CPU stay bounded, and good peers notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aioquic._buffer import Buffer
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.tls import Epoch

from meshllm.errors import TransportError
from meshllm.quic.aio_endpoint import AioEndpoint
from meshllm.quic.aio_link import AioLink
from meshllm.quic.identity import Identity, make_identity
from meshllm.quic.native import NativeEndpoint
from meshllm.quic.transport import ALPN, Link, MakeTransport, Stream, StreamKind

MEMORY = 64 << 20  # that an attack may cost


class Victim:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout
        self.port = int(process.stdout.readline())
        self.address = f"127.0.0.1:{self.port}"

    def state(self) -> tuple[int, float, int]:
        """RSS in bytes, CPU seconds, links."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write("?\n")
        self._process.stdin.flush()
        rss, cpu_s, links = self._process.stdout.readline().split()
        return int(rss), float(cpu_s), int(links)


@pytest.fixture
def victim() -> Iterator[Victim]:
    script = Path(__file__).parents[1] / "support/quic_victim.py"
    with subprocess.Popen(
        [sys.executable, "-P", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Victim(process)
        finally:
            process.kill()


Attack = Callable[[AioLink], Awaitable[None]]


async def works(victim: Victim) -> float:
    """Seconds for a good peer to get 1 MB back."""
    good = NativeEndpoint(make_identity(), lambda _link: None, lambda *_: None)
    good.start(0)
    try:
        began = time.monotonic()
        stream = (await good.dial(victim.address, None, 10)).open(StreamKind.RPC)
        data = os.urandom(1_000_000)
        sending = asyncio.create_task(stream.write(data))
        received = b""
        while len(received) < len(data):
            received += await stream.read()
        await sending
        assert received == data
        return time.monotonic() - began
    finally:
        await good.close()


def attacked(victim: Victim, attack: Attack) -> None:
    """By a peer with a good handshake; good ones come while it goes on, and after."""

    async def main() -> None:
        await works(victim)
        before, _, links = victim.state()
        bad = AioEndpoint(make_identity(), lambda _link: None, lambda *_: None)
        bad.start(0)
        async with asyncio.timeout(60):
            link = await bad.dial(victim.address, None, 10)
            await attack(link)
            assert await works(victim) < 5
            assert victim.state()[0] - before < MEMORY
            await bad.close()
            while victim.state()[2] > links:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            assert await works(victim) < 5

    asyncio.run(main())


async def sent(link: AioLink) -> None:
    """Until the link has said all it may, or is closed."""
    for _ in range(200):
        link.transmit()
        await asyncio.sleep(0.01)
        if link.closed:
            return


def test_flood_of_streams(victim: Victim) -> None:
    async def attack(link: AioLink) -> None:
        for i in range(3000):
            link._quic.send_stream_data(4 * i, bytes([StreamKind.TRANSFER]) + bytes(1000))
        await sent(link)

    attacked(victim, attack)


def test_streams_that_never_say_what_they_are(victim: Victim) -> None:
    async def attack(link: AioLink) -> None:
        for i in range(250):
            stream = link._quic._get_or_create_stream_for_send(4 * i)
            stream.sender.write(bytes(1001))
            stream.sender._pending.subtract(0, 1)  # all but the first byte
        await sent(link)

    attacked(victim, attack)


def test_pieces_without_a_beginning(victim: Victim) -> None:
    """Each byte by itself costs its receiver what a whole packet does."""

    async def attack(link: AioLink) -> None:
        for i in range(100):
            stream = link._quic._get_or_create_stream_for_send(4 * i)
            stream.sender.write(bytes(800))
            for even in range(0, 800, 2):
                stream.sender._pending.subtract(even, even + 1)
        async with asyncio.timeout(30):
            while victim.state()[2] > 0:
                link.transmit()
                await asyncio.sleep(0.01)

    attacked(victim, attack)


def test_data_behind_a_reset_begins_no_new_stream() -> None:
    async def main() -> None:
        opened: list[Stream] = []
        server = NativeEndpoint(make_identity(), lambda _link: None, lambda _link, _kind, stream: opened.append(stream))
        bad = AioEndpoint(make_identity(), lambda _link: None, lambda *_: None)
        for endpoint in (server, bad):
            endpoint.start(0)
        link = await bad.dial(f"127.0.0.1:{server.port}", None, 10)
        quic = link._quic

        async def open_one() -> int:
            before, stream_id = len(opened), quic.get_next_available_stream_id()
            quic.send_stream_data(stream_id, bytes([StreamKind.TRANSFER]) * 10)
            link.transmit()
            async with asyncio.timeout(10):
                while len(opened) == before:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            return stream_id

        for _ in range(3):
            stream_id = await open_one()
            quic.reset_stream(stream_id, 0)
            link.transmit()
            quic._streams_queue.remove(quic._streams.pop(stream_id))
            quic._local_next_stream_id_bidi = stream_id
            quic.send_stream_data(stream_id, bytes([StreamKind.TRANSFER]) * 500)  # once more, from its beginning
            link.transmit()
        await open_one()
        assert len(opened) == 4 and not link.closed
        await bad.close()
        await server.close()

    asyncio.run(main())


def test_streams_of_unknown_kind_are_refused_and_the_link_lives(victim: Victim) -> None:
    async def attack(link: AioLink) -> None:
        for i in range(100):
            link._quic.send_stream_data(4 * i, bytes([5 + i]) + bytes(100))
        await sent(link)
        stream = link._quic.get_next_available_stream_id()
        assert not link.closed and stream
        good = link.open(StreamKind.RPC)
        await good.write(b"still")
        assert await good.read() == b"still"

    attacked(victim, attack)


def test_streams_that_nobody_reads(victim: Victim) -> None:
    """The victim's own: it keeps what it has been sent, by the window of each stream."""

    async def attack(link: AioLink) -> None:
        for i in range(100):
            link._quic.send_stream_data(4 * i, bytes([StreamKind.TRANSFER]) + bytes(1_000_000))
        await sent(link)

    attacked(victim, attack)


def test_a_peer_that_asks_and_does_not_read(victim: Victim) -> None:
    async def attack(link: AioLink) -> None:
        for i in range(50):
            link._quic.send_stream_data(4 * i, bytes([StreamKind.RPC]) + bytes(1_000_000))
        await sent(link)

    attacked(victim, attack)


def test_garbage(victim: Victim) -> None:
    async def attack(link: AioLink) -> None:
        rng = random.Random(3)
        mine = [bytes(cid.cid) for cid in link._quic._peer_cid_available] + [link._quic._peer_cid.cid]
        heads = [b"\xc3\x00\x00\x00\x01\x08", b"\xc0\x6b\x33\x43\xcf\x08", b"\x43", b"", b"\xff\x00\x00\x00\x00"]
        heads += [b"\x43" + cid for cid in mine]  # to the attacker's own link, and so into decryption
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for i in range(20_000):
                data = rng.choice(heads) + rng.randbytes(rng.choice([0, 1, 20, 60, 1200, 1400]))
                sender.sendto(data, ("127.0.0.1", victim.port))
                if i % 200 == 0:
                    await asyncio.sleep(0)

    attacked(victim, attack)


def test_strangers_that_begin_handshakes_and_go(victim: Victim) -> None:
    """Beyond some half-open ones each has to show that it hears what is sent to its address (RFC 9000 section 8.1)."""

    async def attack(link: AioLink) -> None:
        configuration = link._quic.configuration
        _, cpu_s, _ = victim.state()
        answers = 0
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            for _ in range(1000):
                quic = QuicConnection(configuration=configuration)
                quic.connect(("127.0.0.1", victim.port), now=time.monotonic())
                for data, _address in quic.datagrams_to_send(now=time.monotonic()):
                    sender.sendto(data, ("127.0.0.1", victim.port))
                with contextlib.suppress(BlockingIOError):
                    while True:
                        answers += len(sender.recv(65536)) > 0
                await asyncio.sleep(0)
        assert answers > 0
        assert victim.state()[1] - cpu_s < 2

    attacked(victim, attack)


def test_a_peer_without_a_certificate_is_refused(victim: Victim) -> None:
    async def main() -> None:
        class Anonymous(AioEndpoint):
            def _configuration(self, is_client: bool, datagram_size: int) -> Any:
                configuration = super()._configuration(is_client, datagram_size)
                configuration.certificate = configuration.private_key = None
                return configuration

        bad = Anonymous(make_identity(), lambda _link: None, lambda *_: None)
        bad.start(0)
        _, _, links = victim.state()
        with contextlib.suppress(TransportError):
            link = await bad.dial(victim.address, None, 5)
            async with asyncio.timeout(10):
                await link.wait_closed()
        assert victim.state()[2] == links == 0
        await bad.close()

    asyncio.run(main())


class Impostor(QuicConnection):
    """Shows the certificate of another node, and twice a signature that is not that node's.

    The second one, with Finished, is left in `rest`.
    """

    def __init__(self, victim: Identity) -> None:
        super().__init__(
            configuration=QuicConfiguration(
                alpn_protocols=[ALPN],
                certificate=victim.certificate,
                private_key=make_identity().key,
                verify_mode=ssl.CERT_NONE,
            )
        )
        self.rest = b""

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        finish = self.tls._client_handle_finished

        def finish_with_doubt(input_buf: Buffer, output_buf: Buffer) -> None:
            begin = output_buf.tell()
            finish(input_buf, output_buf)
            message = output_buf.data_slice(begin, output_buf.tell())
            lengths = [4 + int.from_bytes(message[1:4], "big")]
            lengths.append(lengths[0] + 4 + int.from_bytes(message[lengths[0] + 1 : lengths[0] + 4], "big"))
            output_buf.seek(begin + lengths[1])  # Certificate, CertificateVerify
            self.rest = message[lengths[0] :]  # CertificateVerify, Finished

        self.tls._client_handle_finished = finish_with_doubt  # type: ignore[method-assign]


@pytest.mark.parametrize("make", [NativeEndpoint, AioEndpoint])
def test_an_impostor_is_refused_who_insists(make: MakeTransport) -> None:
    """picotls takes a second signature unseen, after one that was wrong, in packets that come together."""

    async def main() -> None:
        links: list[Link] = []
        server = make(make_identity(), links.append, lambda *_: None)
        server.start(0)
        to = ("127.0.0.1", server.port)
        impostor = Impostor(make_identity())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            cut = (socket.IPPROTO_UDP, 103)  # UDP_SEGMENT: so that the server reads them together
            impostor.connect(to, now=time.monotonic())
            insisted = 0.0
            while not links and (not insisted or time.monotonic() - insisted < 1):
                datagrams = [data for data, _ in impostor.datagrams_to_send(now=time.monotonic())]
                if impostor.rest:
                    impostor._crypto_streams[Epoch.HANDSHAKE].sender.write(impostor.rest)
                    impostor.rest = b""
                    datagrams += [data for data, _ in impostor.datagrams_to_send(now=time.monotonic())]
                    assert len(datagrams) > 1
                    insisted = time.monotonic()
                if datagrams:
                    sock.sendmsg(datagrams, [(*cut, struct.pack("=H", len(datagrams[0])))], 0, to)
                with contextlib.suppress(TimeoutError):
                    data = await asyncio.wait_for(loop.sock_recv(sock, 65536), 0.2)
                    impostor.receive_datagram(data, to, now=time.monotonic())
        assert links == []
        await server.close()

    asyncio.run(main())
