"""The native engine on the wire: with other implementations of QUIC, under loss, and from an address that changes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import IO, Any

import pytest
import uvloop
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from support import lab as netlab
from support.relay import Relay
from support.waiting import until

from meshllm.errors import MeshLlmError
from meshllm.quic.address import join_address
from meshllm.quic.aio_endpoint import AioEndpoint
from meshllm.quic.aio_link import AioLink
from meshllm.quic.identity import make_identity
from meshllm.quic.native import NativeEndpoint
from meshllm.quic.stacks import STACKS
from meshllm.quic.transport import ALPN, Link, MakeTransport, Stream, StreamKind

MEGABYTES = 100  # each way
PIECE = 1_000_000
LOSS = 0.002
GO = Path("/usr/share/gocode/src/github.com/lucas-clemente/quic-go")


def run(work: Callable[[AsyncExitStack], Awaitable[None]], timeout_s: float = 200) -> None:
    async def main() -> None:
        async with asyncio.timeout(timeout_s), AsyncExitStack() as stack:
            await work(stack)

    uvloop.run(main())


class Echo:
    """An endpoint that answers every stream with what it carries."""

    def __init__(self, make: MakeTransport) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.links: list[Link] = []
        self.endpoint = make(make_identity(), self.links.append, self._opened)

    def _opened(self, _link: Link, _kind: StreamKind, stream: Stream) -> None:
        self._tasks.add(asyncio.create_task(self._echo(stream)))

    async def _echo(self, stream: Stream) -> None:
        with contextlib.suppress(MeshLlmError):
            while data := await stream.read():
                await stream.write(data)
            stream.finish()


async def cancelled(tasks: Collection[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def started(stack: AsyncExitStack, make: MakeTransport = NativeEndpoint) -> Echo:
    echo = Echo(make)
    echo.endpoint.start(0)
    stack.push_async_callback(echo.endpoint.close)
    return echo


async def relay_to(stack: AsyncExitStack, port: int, loss: float = LOSS) -> Relay:
    relay = await Relay.open(("127.0.0.1", port), loss)
    stack.callback(relay.close)
    return relay


# --- the other implementations ---

Exchange = Callable[[bytes], Awaitable[bytes]]
Write = Callable[[bytes], Coroutine[Any, Any, None]]


async def moved(exchange: Exchange, *events: Callable[[], Awaitable[None]]) -> None:
    """All pieces there and back again, with the events evenly between them."""
    due = {n * MEGABYTES // (len(events) + 1): event for n, event in enumerate(events, 1)}
    for i in range(MEGABYTES):
        if i in due:
            await due[i]()
        piece = os.urandom(PIECE)
        assert hashlib.sha256(await exchange(piece)).digest() == hashlib.sha256(piece).digest()


def exchange_over(
    read: Callable[[int], Awaitable[bytes]], write: Callable[[bytes], Coroutine[Any, Any, None]]
) -> Exchange:
    async def exchange(piece: bytes) -> bytes:
        writing = asyncio.create_task(write(piece))
        parts, size = [], 0
        while size < len(piece):
            parts.append(await read(len(piece) - size))
            size += len(parts[-1])
        await writing
        return b"".join(parts)

    return exchange


@pytest.mark.parametrize(("server", "client"), [(NativeEndpoint, AioEndpoint), (AioEndpoint, NativeEndpoint)])
def test_our_engines_speak_to_each_other(server: MakeTransport, client: MakeTransport) -> None:
    async def work(stack: AsyncExitStack) -> None:
        echo, dialling = await started(stack, server), await started(stack, client)
        relay = await relay_to(stack, echo.endpoint.port)
        link = await dialling.endpoint.dial(join_address(*relay.address), None, 10)
        stream = link.open(StreamKind.RPC)

        async def new_keys() -> None:
            aioquic = link if isinstance(link, AioLink) else echo.links[0]
            assert isinstance(aioquic, AioLink)
            aioquic._quic.request_key_update()

        exchange = exchange_over(stream.read, stream.write)
        await moved(exchange, relay.rebind, new_keys, relay.rebind, new_keys)
        assert len(echo.links) == 1 and not link.closed

    run(work)


def stock_configuration(is_client: bool) -> QuicConfiguration:
    identity = make_identity()
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=[ALPN],
        verify_mode=ssl.CERT_NONE,
        certificate=identity.certificate,
        private_key=identity.key,
        max_datagram_size=1400,
    )


def test_stock_aioquic_dials() -> None:
    async def work(stack: AsyncExitStack) -> None:
        echo = await started(stack)
        relay = await relay_to(stack, echo.endpoint.port)
        client = await stack.enter_async_context(connect(*relay.address, configuration=stock_configuration(True)))
        reader, writer = await client.create_stream()
        stack.callback(writer.close)
        writer.write(bytes([StreamKind.RPC]))

        async def write(piece: bytes) -> None:
            writer.write(piece)

        async def new_keys() -> None:
            client.request_key_update()

        await moved(exchange_over(reader.read, write), relay.rebind, new_keys, relay.rebind, new_keys)
        assert len(echo.links) == 1 and not echo.links[0].closed

    run(work)


def test_stock_aioquic_is_dialled() -> None:
    async def work(stack: AsyncExitStack) -> None:
        protocols: list[QuicConnectionProtocol] = []

        def made(*arguments: Any, **options: Any) -> QuicConnectionProtocol:
            protocols.append(QuicConnectionProtocol(*arguments, **options))
            return protocols[-1]

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.closing(writer):
                assert await reader.readexactly(1) == bytes([StreamKind.RPC])
                while data := await reader.read(1 << 18):
                    writer.write(data)

        tasks: set[asyncio.Task[None]] = set()
        server = await serve(
            "127.0.0.1",
            0,
            configuration=stock_configuration(False),
            create_protocol=made,
            stream_handler=lambda r, w: tasks.add(asyncio.create_task(echo(r, w))),
        )
        stack.callback(server.close)
        stack.push_async_callback(cancelled, tasks)
        assert server._transport
        port = server._transport.get_extra_info("sockname")[1]
        client = await started(stack)
        relay = await relay_to(stack, port)
        link = await client.endpoint.dial(join_address(*relay.address), None, 10)
        stream = link.open(StreamKind.RPC)

        async def new_keys() -> None:
            """Not in the same moment as a new address: aioquic drops the old keys at once, although RFC 9001 6.1
            has it keep them until the peer uses the new ones. A server that sends its new keys to the address that
            is gone can read nothing that comes from the new one, and never learns of it."""
            protocols[0].request_key_update()

        exchange = exchange_over(stream.read, stream.write)
        await moved(exchange, relay.rebind, new_keys, relay.rebind, new_keys)
        assert not link.closed
        stream.finish()
        await asyncio.gather(*tasks)

    run(work)


@pytest.fixture(scope="module")
def go_peer(tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("go") is None or not GO.is_dir():
        pytest.skip("Debian's golang-go and golang-github-lucas-clemente-quic-go-dev are not installed")
    program = tmp_path_factory.mktemp("go") / "quic_go_peer"
    source = Path(__file__).parents[1] / "native/quic_go_peer.go"
    go = os.environ | {"GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": ""}
    subprocess.run(["go", "build", "-o", str(program), str(source)], check=True, env=go)
    return str(program)


@contextlib.asynccontextmanager
async def running(*command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


def test_quic_go_dials(go_peer: str) -> None:
    async def work(stack: AsyncExitStack) -> None:
        echo = await started(stack)
        relay = await relay_to(stack, echo.endpoint.port)
        address = join_address(*relay.address)
        go = await stack.enter_async_context(running(go_peer, "dial", address, str(MEGABYTES)))
        await until(lambda: echo.links)
        await until(lambda: go.returncode is not None or echo.links[0].bytes_received > MEGABYTES * PIECE // 2)
        await relay.rebind()
        out, errors = await go.communicate()
        assert out == b"all came back\n", errors.decode()

    run(work)


def test_quic_go_is_dialled(go_peer: str) -> None:
    async def work(stack: AsyncExitStack) -> None:
        go = await stack.enter_async_context(running(go_peer, "serve"))
        assert go.stdout
        relay = await relay_to(stack, int(await go.stdout.readline()))
        client = await started(stack)
        link = await client.endpoint.dial(join_address(*relay.address), None, 10)
        stream = link.open(StreamKind.RPC)
        # No new address: this version of quic-go, as a server, keeps sending to the one that it first saw.
        await moved(exchange_over(stream.read, stream.write))
        stream.finish()
        assert await stream.read() == b"" and not link.closed

    run(work)


# --- addresses ---


@pytest.mark.parametrize("engine", STACKS)
def test_a_machine_that_gets_another_address_keeps_its_link(engine: str) -> None:
    """As a laptop does that goes from one network to another."""
    if why := netlab.missing():
        pytest.skip(why)
    support = Path(__file__).parents[1] / "support"
    with netlab.make_lab(hosts=2, rtt_ms=5) as lab, ExitStack() as stack:

        def python(host: str, script: str, *arguments: str) -> IO[str]:
            command = [*netlab.prefix(lab, host), sys.executable, "-P", str(support / script), *arguments]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout
            return process.stdout

        def ip(*arguments: str) -> None:
            subprocess.run(["ip", "-n", lab.netns("h1"), "addr", *arguments, "dev", "eth0"], check=True)

        port = python("h2", "quic_victim.py").readline().strip()
        answers = python("h1", "quic_caller.py", engine, f"{lab.ip('h2')}:{port}")
        assert [answers.readline() for _ in range(10)] == ["answered\n"] * 10
        ip("del", f"{lab.ip('h1')}/24")
        ip("add", "10.77.0.77/24")
        assert [answers.readline() for _ in range(50)] == ["answered\n"] * 50


# --- loss ---


def test_handshakes_survive_loss() -> None:
    """Whichever packet is lost: picoquic by itself repeats some so that another picoquic does not read them."""

    async def work(stack: AsyncExitStack) -> None:
        echo, client = await started(stack), await started(stack)

        async def dial(seed: int) -> None:
            relay = await relay_to(stack, echo.endpoint.port, 0.05)
            relay.random.seed(seed)
            link = await client.endpoint.dial(join_address(*relay.address), None, 10)
            link.close("it works")

        async with asyncio.TaskGroup() as group:
            for seed in range(150):
                group.create_task(dial(seed))

    run(work, 60)


def test_no_lost_packet_stops_a_stream() -> None:
    """Full last packets that are lost, with nothing behind them: their loss timer must be there (engine.cpp, send)."""

    async def work(stack: AsyncExitStack) -> None:
        echo, client = await started(stack), await started(stack)
        relay = await relay_to(stack, echo.endpoint.port, 0.02)
        link = await client.endpoint.dial(join_address(*relay.address), None, 10)
        stream = link.open(StreamKind.RPC)
        exchange = exchange_over(stream.read, stream.write)
        worst_s = 0.0
        for size in [20_000, 1380, 1440] * 300:
            began = time.monotonic()
            await exchange(bytes(size))
            worst_s = max(worst_s, time.monotonic() - began)
        assert worst_s < 3  # without it, until the keep-alive of 5 s

    run(work)


# --- what one stream may cost the others ---


def test_a_slow_stream_holds_no_other() -> None:
    async def work(stack: AsyncExitStack) -> None:
        kept: list[Stream] = []
        tasks: set[asyncio.Task[None]] = set()
        stack.push_async_callback(cancelled, tasks)
        echo = Echo(NativeEndpoint)

        def opened(link: Link, kind: StreamKind, stream: Stream) -> None:
            if kind is StreamKind.TRANSFER:
                kept.append(stream)  # and nobody reads it
            else:
                echo._opened(link, kind, stream)

        server = NativeEndpoint(make_identity(), lambda _link: None, opened)
        server.start(0)
        stack.push_async_callback(server.close)
        client = await started(stack)
        link = await client.endpoint.dial(f"127.0.0.1:{server.port}", None, 10)
        for _ in range(100):
            slow = link.open(StreamKind.TRANSFER)
            tasks.add(asyncio.create_task(slow.write(bytes(2_000_000))))
        await until(lambda: len(kept) == 100)
        stream = link.open(StreamKind.RPC)
        exchange = exchange_over(stream.read, stream.write)
        for _ in range(20):
            assert len(await exchange(bytes(PIECE))) == PIECE

    run(work, 60)


async def opened_to(stack: AsyncExitStack, loss: float = 0.0) -> Link:
    """A link to an endpoint that echoes."""
    echo, client = await started(stack), await started(stack)
    relay = await relay_to(stack, echo.endpoint.port, loss)
    return await client.endpoint.dial(join_address(*relay.address), None, 10)


async def still_carries(link: Link) -> None:
    stream = link.open(StreamKind.RPC)
    exchange = exchange_over(stream.read, stream.write)
    assert len(await exchange(bytes(PIECE))) == PIECE


def test_streams_that_are_dropped_at_once_make_room_for_others() -> None:
    async def work(stack: AsyncExitStack) -> None:
        link = await opened_to(stack)
        for i in range(600):
            link.open(StreamKind.RPC).abort()
            if i % 20 == 0:
                await asyncio.sleep(0.001)
        await still_carries(link)

    run(work, 60)


def test_streams_that_wait_for_room_may_be_dropped() -> None:
    async def work(stack: AsyncExitStack) -> None:
        link = await opened_to(stack)
        for stream in [link.open(StreamKind.RPC) for _ in range(600)]:
            stream.abort()
        await still_carries(link)

    run(work, 60)


def test_dropped_bulk_leaves_no_gap_in_the_windows() -> None:
    """Of the connection: 32 MiB, for what is lost with each of these streams."""

    async def work(stack: AsyncExitStack) -> None:
        link = await opened_to(stack, 0.02)
        for _ in range(600):
            stream = link.open(StreamKind.RPC)
            await stream.write(bytes(250_000))
            assert await stream.read(1)
            stream.abort()
        await still_carries(link)

    run(work, 100)
