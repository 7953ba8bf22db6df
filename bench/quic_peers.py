"""The program at both ends of bench/quic.py's paths: one answers, the other measures.

    quic_peers.py serve PATH PORT            prints its port, serves one peer
    quic_peers.py drive PATH HOST PORT JOB   prints a line of JSON

PATH is tcp (asyncio streams), tcp-blocking, tls (blocking), stock (aioquic as it comes, on asyncio's own loop), or
ENGINE or ENGINE-splice with ENGINE native or aioquic; +NAME after it sets the congestion control, where the engine or
the kernel has it. A spliced stream is what a stage uses: a program with a Unix socket at either end, and no Python
between.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import resource
import socket
import ssl
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, Protocol

import aioquic.asyncio.client
import aioquic.asyncio.server
import uvloop
from aioquic.quic.configuration import QuicConfiguration
from cryptography.hazmat.primitives import serialization

from meshllm.quic.identity import make_identity
from meshllm.quic.stacks import stack_named
from meshllm.quic.transport import Link, Stream, StreamKind

CHUNK = 1 << 18
MB, PIECE = 1e6, 4_000_000
ECHO, SINK = 0, 1
HEAD = struct.Struct("<BQ")  # echo messages of so many bytes, or take so many and say so


class Wire(Protocol):
    async def read(self, limit: int) -> bytes: ...
    async def write(self, data: bytes) -> None: ...


class AsyncioWire:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def read(self, limit: int) -> bytes:
        return await self._reader.read(limit)

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()


async def read_exactly(wire: Wire, size: int) -> None:
    while size:
        size -= len(some(await wire.read(min(size, CHUNK))))


def some(got: Any) -> Any:
    if not got:
        raise EOFError
    return got


def message(what: int, size: int) -> Iterator[bytes]:
    """Its head and its body, in as few pieces as a program writes that has it ready."""
    data = bytes(min(size, CHUNK))
    yield HEAD.pack(what, size) + data
    for left in range(size - len(data), 0, -CHUNK):
        yield data if left >= CHUNK else data[:left]


# --- the work, over an asynchronous wire and over a blocking socket ---


async def answer(wire: Wire) -> None:
    while head := await wire.read(HEAD.size):
        what, size = HEAD.unpack(head)
        if what == ECHO:
            while size:
                part = some(await wire.read(min(size, CHUNK)))
                size -= len(part)
                await wire.write(part)
        else:
            before = cpu_s()
            await read_exactly(wire, size)
            await wire.write(struct.pack("<d", cpu_s() - before))


async def ask(wire: Wire, what: int, size: int) -> float:
    """The other side's CPU seconds, of a sink."""
    for piece in message(what, size):
        await wire.write(piece)
    if what == ECHO:
        await read_exactly(wire, size)
        return 0.0
    return float(struct.unpack("<d", await wire.read(8))[0])


def receive(sock: socket.socket, size: int) -> bytes:
    out = b""
    while len(out) < size:
        out += some(sock.recv(size - len(out)))
    return out


def swallow(sock: socket.socket, size: int, buffer: bytearray) -> None:
    while size:
        size -= some(sock.recv_into(buffer, min(size, CHUNK)))


def answer_blocking(sock: socket.socket) -> None:
    buffer = bytearray(CHUNK)
    with contextlib.suppress(EOFError, OSError):
        while True:
            what, size = HEAD.unpack(receive(sock, HEAD.size))
            if what == ECHO:
                swallow(sock, size, buffer)
                sock.sendall(memoryview(buffer)[:size])
            else:
                before = cpu_s()
                swallow(sock, size, buffer)
                sock.sendall(struct.pack("<d", cpu_s() - before))


def ask_blocking(sock: socket.socket, what: int, size: int) -> float:
    for piece in message(what, size):
        sock.sendall(piece)
    if what == ECHO:
        swallow(sock, size, bytearray(CHUNK))
        return 0.0
    return float(struct.unpack("<d", receive(sock, 8))[0])


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


# --- jobs ---

RequestInfo = Callable[[int, int], Any]


async def measure(ask: RequestInfo, job: str) -> dict[str, float]:
    """`job`: latency[:N], bulk:MEGABYTES, timed:SECONDS (bulk), or idle:SECONDS (a message, a pause, two messages)."""
    name, _, argument = job.partition(":")
    if name == "timed":
        began, done = time.perf_counter(), 0.0
        while time.perf_counter() - began < float(argument):
            await ask(SINK, PIECE)
            done += PIECE / MB
        return {"mb_s": done / (time.perf_counter() - began)}
    if name == "bulk":
        size = int(float(argument) * MB)
        await ask(SINK, 1)
        before, began = cpu_s(), time.perf_counter()
        other = await ask(SINK, size)
        took = time.perf_counter() - began
        mine = cpu_s() - before
        return {"mb_s": size / MB / took, "send_ms_mb": mine * 1e9 / size, "receive_ms_mb": other * 1e9 / size}
    if name == "idle":
        await timed(ask, 20_000)
        time.sleep(float(argument))  # noqa: ASYNC251 - nothing else is to happen
        return {"first_ms": await timed(ask, 20_000), "second_ms": await timed(ask, 20_000)}
    sizes = [(20_000, int(argument or 300)), (200_000, int(argument or 300) // 2)]
    found: dict[str, float] = {}
    for size, n in sizes:
        each = sorted([await timed(ask, size) for _ in range(n)])
        found |= {
            f"ms_{size}": statistics.median(each),
            f"p99_{size}": each[len(each) * 99 // 100],
            f"max_{size}": each[-1],
        }
    return found


def run_to_end(work: Coroutine[Any, Any, Any]) -> Any:
    """Of a coroutine that blocks and never suspends."""
    try:
        work.send(None)
    except StopIteration as result:
        return result.value
    raise AssertionError("it suspends")


async def timed(ask: RequestInfo, size: int) -> float:
    began = time.perf_counter()
    await ask(ECHO, size)
    return (time.perf_counter() - began) * 1e3


# --- paths ---


def tls(server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if server:
        identity = make_identity()
        with tempfile.NamedTemporaryFile() as file:
            encoding = serialization.Encoding.PEM
            file.write(identity.certificate.public_bytes(encoding))
            plain = serialization.NoEncryption()
            file.write(identity.key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
            file.flush()
            context.load_cert_chain(file.name)
    return context


def tuned(sock: socket.socket, control: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if control:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, control.encode())


def stock(is_client: bool) -> QuicConfiguration:
    identity = make_identity()
    return QuicConfiguration(
        is_client=is_client,
        alpn_protocols=["bench"],
        verify_mode=ssl.CERT_NONE,
        certificate=identity.certificate,
        private_key=identity.key,
    )


def transport(engine: str, control: str, on_stream: Callable[[Stream], None]) -> Any:
    make: Callable[..., Any] = stack_named(engine)
    if control:  # an option of the native stack only
        make = functools.partial(make, congestion_control=control)
    return make(make_identity(), lambda _link: None, lambda _link, _kind, stream: on_stream(stream))


async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


async def serve(path: str, control: str, port: int) -> None:
    if path in ("tcp", "tcp-blocking", "tls"):
        listener = socket.create_server(("0.0.0.0", port))
        print(listener.getsockname()[1], flush=True)
        sock, _ = await in_thread(listener.accept)
        tuned(sock, control)
        if path == "tcp":
            await answer(AsyncioWire(*await asyncio.open_connection(sock=sock)))
        else:
            await in_thread(answer_blocking, tls(True).wrap_socket(sock, server_side=True) if path == "tls" else sock)
        return
    if path == "stock":
        opened: asyncio.Queue[AsyncioWire] = asyncio.Queue()
        server = await aioquic.asyncio.server.serve(
            "0.0.0.0",
            port,
            configuration=stock(False),
            stream_handler=lambda reader, writer: opened.put_nowait(AsyncioWire(reader, writer)),
        )
        assert server._transport is not None
        print(server._transport.get_extra_info("sockname")[1], flush=True)
        await answer(await opened.get())
        return
    streams: asyncio.Queue[Stream] = asyncio.Queue()
    engine, _, spliced = path.partition("-")
    endpoint = transport(engine, control, streams.put_nowait)
    endpoint.start(port)
    print(endpoint.port, flush=True)
    stream = await streams.get()
    if spliced:
        inner, outer = socket.socketpair()
        worker = threading.Thread(target=answer_blocking, args=(outer,), daemon=True)
        worker.start()
        inner.setblocking(False)
        await stream.splice(inner)
    else:
        with contextlib.suppress(Exception):
            await answer(stream)
    await endpoint.close()


Run = Callable[[str], Awaitable[dict[str, float]]]


def run_blocking(sock: socket.socket) -> Run:
    """In a thread, as a program does that knows nothing of asyncio."""

    async def ask_it(what: int, size: int) -> float:
        return ask_blocking(sock, what, size)

    return lambda job: in_thread(run_to_end, measure(ask_it, job))


def run_async(wire: Wire) -> Run:
    return functools.partial(measure, functools.partial(ask, wire))


@contextlib.asynccontextmanager
async def connected(path: str, control: str, host: str, port: int) -> AsyncIterator[Run]:
    if path in ("tcp", "tcp-blocking", "tls"):
        sock = socket.create_connection((host, port))
        tuned(sock, control)
        if path == "tcp":
            yield run_async(AsyncioWire(*await asyncio.open_connection(sock=sock)))
        else:
            yield run_blocking(tls(False).wrap_socket(sock) if path == "tls" else sock)
        return
    if path == "stock":
        async with aioquic.asyncio.client.connect(host, port, configuration=stock(True)) as client:
            reader, writer = await client.create_stream()
            with contextlib.closing(writer):
                yield run_async(AsyncioWire(reader, writer))
        return
    engine, _, spliced = path.partition("-")
    endpoint = transport(engine, control, lambda stream: stream.abort())
    endpoint.start(0)
    link: Link = await endpoint.dial(f"{host}:{port}", None, 10)
    stream = link.open(StreamKind.RPC)
    if not spliced:
        yield run_async(stream)
    else:
        inner, outer = socket.socketpair()
        inner.setblocking(False)
        splice = asyncio.create_task(stream.splice(inner))
        yield run_blocking(outer)
        splice.cancel()
    await endpoint.close()


async def drive(path: str, control: str, host: str, port: int, job: str) -> None:
    async with connected(path, control, host, port) as run:
        if job.startswith("latency"):
            await run("latency:50")  # warm
        print(json.dumps(await run(job)), flush=True)


def main() -> None:
    role, path, *rest = sys.argv[1:]
    path, _, control = path.partition("+")
    run = asyncio.run if path == "stock" else uvloop.run  # on uvloop its timers spin
    if role == "serve":
        run(serve(path, control, int(rest[0])))
    else:
        run(drive(path, control, rest[0], int(rest[1]), rest[2]))


if __name__ == "__main__":
    main()
