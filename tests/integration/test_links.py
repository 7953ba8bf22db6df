"""Links and admission over real sockets on loopback: members, strangers, floods, and what a slow reader does."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest
from support.relay import Relay
from support.waiting import until

from meshllm.errors import MeshError, MeshLlmError, TransportError
from meshllm.mesh import mesh as network
from meshllm.mesh.announcement import Announcement
from meshllm.mesh.hello import Credentials
from meshllm.mesh.mesh import Mesh
from meshllm.mesh.token import Token, make_ticket
from meshllm.quic.address import join_address
from meshllm.quic.identity import Identity, make_identity
from meshllm.quic.stacks import stack_named
from meshllm.quic.transport import Link, Stream, StreamKind, Transport

MESH, SECRET = "ab" * 16, b"s" * 16
Work = Callable[["Bench"], Awaitable[None]]


class Peer:
    """A mesh node that echoes what comes on its streams."""

    def __init__(self, credentials: Credentials, identity: Identity, engine: str) -> None:
        self.log: list[str] = []
        self.streams: list[StreamKind] = []
        self.id = identity.node_id
        self._echoes: set[asyncio.Task[None]] = set()
        self.mesh = Mesh(
            identity, credentials, Announcement(self.id, 1), self._opened, self.log.append, stack_named(engine)
        )
        self.mesh.start(0)
        self._running = asyncio.create_task(self.mesh.run())

    async def leave(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.mesh.port}"

    def _opened(self, _link: Link, kind: StreamKind, stream: Stream) -> None:
        self.streams.append(kind)
        self._echoes.add(asyncio.create_task(self._echo(stream)))

    async def _echo(self, stream: Stream) -> None:
        with suppress(MeshLlmError):
            while data := await stream.read():
                await stream.write(data)
            stream.finish()


class Bench:
    """Peers that run until the test ends."""

    engines = ("aioquic", "aioquic")  # of the first peer, and of all that come after it

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._n_peers = 0

    def _engine(self) -> str:
        self._n_peers += 1
        return self.engines[min(self._n_peers, 2) - 1]

    def peer(self, secret: bytes | None = SECRET, identity: Identity | None = None, **credentials: Any) -> Peer:
        peer = Peer(Credentials(MESH, secret, **credentials), identity or make_identity(), self._engine())
        self._stack.push_async_callback(peer.leave)
        peer.mesh.announce(replace(peer.mesh.me, addresses=(peer.address,)))
        return peer

    def endpoint(self) -> Transport:
        endpoint = stack_named(self._engine())(make_identity(), lambda _link: None, lambda *_: None)
        endpoint.start(0)
        self._stack.push_async_callback(endpoint.close)
        return endpoint


@pytest.fixture(
    autouse=True,
    params=[("native", "native"), ("aioquic", "aioquic"), ("native", "aioquic"), ("aioquic", "native")],
    ids=["native", "aioquic", "native-aioquic", "aioquic-native"],
)
def _engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "engines", request.param)


def run(work: Work) -> None:
    async def main() -> None:
        bench = Bench()
        async with asyncio.timeout(30), bench._stack:
            await asyncio.sleep(0)
            await work(bench)

    asyncio.run(main())


def token_of(peer: Peer, secret: bytes = SECRET) -> Token:
    return Token(MESH, peer.id, (peer.address,), make_ticket(secret, MESH, "12" * 16))


async def joined(bench: Bench) -> tuple[Peer, Peer]:
    seed = bench.peer()
    token = token_of(seed)
    other = bench.peer(None, ticket=token.ticket)
    await asyncio.sleep(0)
    await other.mesh.join(token)
    await until(lambda: len(seed.mesh.membership.present()) == len(other.mesh.membership.present()) == 2)
    return seed, other


async def echoed(stream: Stream, data: bytes) -> bytes:
    async def send() -> None:
        await stream.write(data)
        stream.finish()

    sending = asyncio.create_task(send())
    parts = []
    while part := await stream.read():
        parts.append(part)
    await sending
    return b"".join(parts)


def test_token_joins_and_streams_carry_bytes() -> None:
    async def work(bench: Bench) -> None:
        seed, other = await joined(bench)
        assert other.mesh.credentials.secret == SECRET
        data = random.Random(1).randbytes(3_000_000)
        assert await echoed(await other.mesh.open(seed.id, StreamKind.RPC), data) == data
        assert await echoed(await seed.mesh.open(other.id, StreamKind.HTTP), b"") == b""
        assert (seed.streams, other.streams) == ([StreamKind.RPC], [StreamKind.HTTP])
        await until(lambda: all(len(p.mesh.membership.me.rtts_ms) == 1 for p in (seed, other)))

    run(work)


def test_third_node_is_reached_directly() -> None:
    async def work(bench: Bench) -> None:
        seed, other = await joined(bench)
        third = bench.peer(None, ticket=token_of(seed).ticket)
        await asyncio.sleep(0)
        await third.mesh.join(token_of(seed))
        await until(lambda: other.mesh.link(third.id) and third.mesh.link(other.id))
        assert await echoed(await third.mesh.open(other.id, StreamKind.HTTP), b"hi") == b"hi"

    run(work)


def test_revocation_outlives_who_said_it() -> None:
    async def work(bench: Bench) -> None:
        seed, other = await joined(bench)
        token = token_of(seed)
        seed.mesh.announce(replace(seed.mesh.me, revoked=(token.ticket.serial,)))
        await until(lambda: other.mesh.membership.me.revoked == (token.ticket.serial,))
        stranger = bench.peer(None, ticket=token.ticket)
        await asyncio.sleep(0)
        with pytest.raises(MeshError, match="was revoked"):
            await stranger.mesh.join(Token(MESH, other.id, (other.address,), token.ticket))

    run(work)


def test_simultaneous_dials_end_in_one_link() -> None:
    async def work(bench: Bench) -> None:
        a, b = bench.peer(), bench.peer()
        a.mesh.bootstrap, b.mesh.bootstrap = [(b.address, b.id)], [(a.address, a.id)]

        def one_link() -> bool:
            links = [[link for p in m._peers.values() for link in p.links] for m in (a.mesh, b.mesh)]
            return [len(of_peer) for of_peer in links] == [1, 1] and links[0][0].dialled != links[1][0].dialled

        await until(one_link)
        assert await echoed(await a.mesh.open(b.id, StreamKind.RPC), b"one") == b"one"

    run(work)


def test_leaving_while_the_gossip_changes_links_begins_nothing_new() -> None:
    async def work(bench: Bench) -> None:
        seed, other = await joined(bench)
        await other.mesh.join(token_of(seed))  # by a second link
        links = other.mesh._peers[seed.id].links
        links.reverse()
        await other.leave()
        assert len(links) == 2 and other.log == []

    run(work)


@pytest.mark.parametrize("credentials", [Credentials(MESH, None), Credentials(MESH, b"x" * 16)])
def test_stranger_is_refused_in_words_and_logged_once(credentials: Credentials) -> None:
    async def work(bench: Bench) -> None:
        seed = bench.peer()
        for _ in range(3):
            stranger = bench.peer(credentials.secret, ticket=make_ticket(b"y" * 16, MESH, "12" * 16))
            await asyncio.sleep(0)
            with pytest.raises(MeshError, match="does not belong to this mesh"):
                await stranger.mesh.join(token_of(seed))
            assert stranger.mesh.membership.present().keys() == {stranger.id}
        assert len(seed.log) == 1 and "refused 127.0.0.1" in seed.log[0]
        assert seed.mesh.membership.present().keys() == {seed.id}

    run(work)


@pytest.mark.parametrize("kind", [StreamKind.GOSSIP, StreamKind.RPC, StreamKind.HTTP, StreamKind.TRANSFER])
def test_stranger_opens_no_stream_but_the_hello(kind: StreamKind) -> None:
    async def work(bench: Bench) -> None:
        seed = bench.peer()
        link = await bench.endpoint().dial(seed.address, seed.id, 5)
        await link.open(kind).write(b'{"t":"news","q":0,"n":[]}')
        assert "not admitted" in await link.wait_closed()
        assert seed.streams == [] and seed.mesh.membership.present().keys() == {seed.id}

    run(work)


def test_silent_stranger_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_HELLO_TIMEOUT_S", 0.2)

    async def work(bench: Bench) -> None:
        seed = bench.peer()
        link = await bench.endpoint().dial(seed.address, seed.id, 5)
        assert "not admitted" in await link.wait_closed()

    run(work)


def test_other_node_at_the_address_is_noticed() -> None:
    async def work(bench: Bench) -> None:
        seed = bench.peer()
        with pytest.raises(TransportError, match="is now another node"):
            await bench.endpoint().dial(seed.address, "00" * 32, 5)

    run(work)


async def routed(bench: Bench, seed: Peer) -> tuple[Relay, Peer]:
    """Somebody who has joined through a router."""
    relay = await Relay.open(("127.0.0.1", seed.mesh.port), records=True)
    token = Token(MESH, seed.id, (join_address(*relay.address),), token_of(seed).ticket)
    joiner = bench.peer(None, ticket=token.ticket)
    await asyncio.sleep(0)
    await joiner.mesh.join(token)
    await until(lambda: joiner.id in seed.mesh.membership.present())
    return relay, joiner


def test_recorded_handshake_is_worth_nothing() -> None:
    async def work(bench: Bench) -> None:
        seed = bench.peer()
        relay, joiner = await routed(bench, seed)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as replayer:
            for datagram in list(relay.sent):
                replayer.sendto(datagram, ("127.0.0.1", seed.mesh.port))
        await asyncio.sleep(0.5)
        assert [len(p.links) for p in seed.mesh._peers.values()] == [1] and not seed.log
        assert await echoed(await joiner.mesh.open(seed.id, StreamKind.RPC), b"still") == b"still"
        relay.close()

    run(work)


def test_path_may_change_under_a_stream() -> None:
    async def work(bench: Bench) -> None:
        seed = bench.peer()
        relay, joiner = await routed(bench, seed)
        stream = await joiner.mesh.open(seed.id, StreamKind.RPC)
        link = joiner.mesh.link(seed.id)
        for i in range(3):
            data = os.urandom(100_000)
            await stream.write(data)
            received = b""
            while len(received) < len(data):
                received += await stream.read()
            assert received == data
            if i < 2:
                await relay.rebind()
        assert joiner.mesh.link(seed.id) is link
        relay.close()

    run(work)


def test_garbage_has_no_effect_on_the_mesh() -> None:
    async def work(bench: Bench) -> None:
        seed, other = await joined(bench)
        rng = random.Random(2)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for _ in range(3000):
                # long headers of version 1, short headers, and anything
                head = rng.choice([b"\xc3\x00\x00\x00\x01\x08", b"\x43", b"", b"\xff\x00\x00\x00\x00"])
                sender.sendto(head + rng.randbytes(rng.choice([0, 20, 1200, 1300])), ("127.0.0.1", seed.mesh.port))
        assert await echoed(await other.mesh.open(seed.id, StreamKind.RPC), b"still") == b"still"
        endpoint: Any = seed.mesh._endpoint
        waiting = {link for link in endpoint._links.values() if not link.handshaken.done()}
        assert len(waiting) <= 64
        assert not seed.log

    run(work)


def test_slow_reader_holds_the_writer_back() -> None:
    async def work(bench: Bench) -> None:
        seed, _ = await joined(bench)
        received: list[Stream] = []
        seed.mesh._on_stream = lambda _link, _kind, stream: received.append(stream)
        other = next(iter(seed.mesh._peers))
        assert other
        stream = await _.mesh.open(seed.id, StreamKind.TRANSFER)
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                await stream.write(os.urandom(65536))
                sent += 65536

        sending = asyncio.create_task(send())
        try:
            before = -1
            while sent != before:  # until nothing moves any more
                before = sent
                await asyncio.sleep(0.5)
            assert 500_000 < sent < 4_000_000
            for _i in range(40):
                await received[0].read()
            await until(lambda: sent > before)
        finally:
            sending.cancel()
            stream.abort()

    run(work)


def test_dropped_stream_ends_both_sides() -> None:
    async def work(bench: Bench) -> None:
        seed, other = await joined(bench)
        stream = await other.mesh.open(seed.id, StreamKind.RPC)
        await stream.write(b"x")
        assert await stream.read() == b"x"
        stream.abort()
        with pytest.raises(TransportError):
            await stream.read()
        await until(lambda: all(t.done() for t in seed._echoes))

    run(work)
