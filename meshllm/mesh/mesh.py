"""The node's place in the mesh: links to members, admission of new ones, and the gossip that runs over them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from meshllm.errors import MeshError, MeshLlmError, ProtocolError, TransportError
from meshllm.mesh import hello
from meshllm.mesh.announcement import MAX_PEERS, Announcement, Role
from meshllm.mesh.hello import Credentials
from meshllm.mesh.membership import MAX_MESSAGE_BYTES, Membership
from meshllm.mesh.token import Token
from meshllm.quic.framing import read_framed, write_framed
from meshllm.quic.identity import Identity, random_hex
from meshllm.quic.transport import Link, MakeTransport, Stream, StreamKind
from meshllm.tasks import Changes, OwnedTasks
from meshllm.units import short_id

_DIAL_TIMEOUT_S = 5.0
_STAGGER_S = 0.15  # between the addresses of one node, as RFC 8305 does it
_HELLO_TIMEOUT_S = 5.0
_REDIAL_S = 2.0
_MAX_PENDING = 64  # gossip messages kept while a peer is being dialled
_MAX_LINKED = 64  # workers; in a larger mesh only some RTTs are known
_RTT_SAMPLES = 10
_UPKEEP_S = 1.0  # between RTT samples, and between checks for missing links
_GOODBYE_S = 0.2  # per peer, to hand it the goodbye
_LAST_DATAGRAMS_S = 0.05  # for the last datagrams to leave before the links close
_MAX_EARLY = 16
_UNUSED_CHECK_S = 1.0
_REFUSAL_S = 1.0  # for the peer to read why, before the link closes
_REFUSAL_LOG_S = 60.0


@dataclass
class _Peer:
    """The links to one other node, and what is sent over them."""

    links: list[Link] = field(default_factory=list)
    dialling: asyncio.Task[None] | None = None
    boot: str = ""
    pending: deque[bytes] = field(default_factory=lambda: deque(maxlen=_MAX_PENDING))
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    rtts_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_RTT_SAMPLES))
    next_dial: float = 0.0


class Mesh:
    """`on_stream` receives streams from members (RPC, HTTP, TRANSFER); `emit` prints one line per event.

    `changes` is notified whenever the view may have changed.
    """

    def __init__(
        self,
        identity: Identity,
        credentials: Credentials,
        me: Announcement,
        on_stream: Callable[[Link, StreamKind, Stream], None],
        emit: Callable[[str], None],
        make_transport: MakeTransport,
    ) -> None:
        self.credentials = credentials
        self.membership = Membership(me, random.Random(), time.monotonic())
        self.changes = Changes()
        self.observed: str = ""  # this node's address as a peer sees it
        self.bootstrap: list[tuple[str, str | None]] = []  # (address, node id) to try while there is no link
        self._on_stream = on_stream
        self._emit = emit
        self._boot = random_hex(8)
        self._endpoint = make_transport(identity, self._incoming, self._stream_opened)
        self._self_id = identity.node_id
        self._peers: dict[str, _Peer] = {}
        self._admitted: dict[Link, float] = {}  # since when
        self._hellos: dict[Link, asyncio.Future[Stream]] = {}
        # A member that we dialled may open streams in the same flight as its answer to our hello.
        self._early: dict[Link, list[tuple[StreamKind, Stream]]] = {}
        self._tasks = OwnedTasks()
        self._moved = asyncio.Event()  # the membership changed: it may want to wake earlier
        self._refused: dict[str, float] = {}
        self._next_bootstrap = 0.0

    # --- life ---

    def start(self, port: int) -> None:
        """Binds the UDP port. Raises TransportError."""
        self._endpoint.start(port)

    @property
    def port(self) -> int:
        return self._endpoint.port

    async def run(self) -> None:
        """Runs until cancelled; then announces that this node leaves."""
        try:
            async with self._tasks:
                await self._drive()
        finally:
            await self._send_goodbye()
            await self._endpoint.close()

    async def _drive(self) -> None:
        next_upkeep = 0.0
        while True:
            self._moved.clear()
            now = time.monotonic()
            self.membership.tick(now)
            if now >= next_upkeep:
                next_upkeep = now + _UPKEEP_S
                self._measure()
                self._keep_links(now)
            self._flush()
            wake = min(self.membership.next_wake(), next_upkeep)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wake - time.monotonic()):
                    await self._moved.wait()

    async def _send_goodbye(self) -> None:
        self.membership.leave()
        for peer_id, message in self.membership.outbox:
            peer = self._peers.get(peer_id)
            if peer and (link := self._best(peer)):
                with contextlib.suppress(MeshLlmError, TimeoutError):
                    stream = link.open(StreamKind.GOSSIP)
                    async with asyncio.timeout(_GOODBYE_S):
                        await write_framed(stream, message)
                    stream.finish()  # a stream that is merely dropped loses its data
        await asyncio.sleep(_LAST_DATAGRAMS_S)

    # --- what this node announces ---

    @property
    def me(self) -> Announcement:
        return self.membership.me

    def announce(self, me: Announcement) -> None:
        """Tells the members what has changed about this node: `announce(replace(mesh.me, ...))`."""
        self.membership.announce(me)
        self._flush()
        self._moved.set()

    # --- joining ---

    async def join(self, token: Token) -> None:
        """Raises MeshError when refused, TransportError when nobody answers."""
        self.bootstrap = [(address, token.inviter) for address in token.addresses]
        link = await self._dial_any(token.addresses, token.inviter)
        await self._introduce(link)

    async def _dial_any(self, addresses: Sequence[str], peer_id: str | None) -> Link:
        """The first address that answers; all are tried almost at once."""
        errors: list[str] = []

        async def attempt(i: int, address: str) -> Link:
            await asyncio.sleep(i * _STAGGER_S)
            return await self._endpoint.dial(address, peer_id, _DIAL_TIMEOUT_S)

        tasks = [asyncio.create_task(attempt(i, a), name=f"dial {a}") for i, a in enumerate(addresses)]
        winner: Link | None = None
        try:
            for next_done in asyncio.as_completed(tasks):
                try:
                    winner = await next_done
                    return winner
                except TransportError as error:
                    errors.append(str(error))
        finally:
            for task in tasks:
                task.cancel()
            for done in await asyncio.gather(*tasks, return_exceptions=True):
                if not isinstance(done, BaseException) and done is not winner:
                    done.close("another path is used")
        raise TransportError("; ".join(errors) or "no address is known")

    async def _introduce(self, link: Link) -> None:
        """The dialling side of the hello. Closes the link and raises when it fails."""
        stream = link.open(StreamKind.HELLO)
        self._early[link] = []
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                await write_framed(stream, hello.ask(self.credentials, self._self_id, self._boot))
                reply = await read_framed(stream, hello.MAX_HELLO_BYTES)
            welcome = hello.welcome(self.credentials, reply or b"", link.peer_id)
        except TimeoutError:
            link.close("no hello")
            raise TransportError(f"{link.peer_address} does not answer") from None
        except MeshLlmError as error:
            link.close("no member")
            raise type(error)(f"{link.peer_address}: {error}") from None
        finally:
            early = self._early.pop(link)
        stream.finish()
        if welcome.secret is not None:
            self.credentials.secret = welcome.secret
        self.observed = welcome.observed or self.observed
        self._admit(link, welcome.boot)
        for kind, waiting in early:
            self._stream_opened(link, kind, waiting)

    def _incoming(self, link: Link) -> None:
        self._hellos[link] = asyncio.get_running_loop().create_future()
        self._tasks.spawn(partial(self._receive_hello, link), f"hello {link.peer_address}")

    async def _receive_hello(self, link: Link) -> None:
        """The accepting side of the hello. A stranger may open no other stream."""
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                stream = await self._hellos[link]
                question = await read_framed(stream, hello.MAX_HELLO_BYTES)
                reply, boot = hello.answer(
                    self.credentials,
                    question or b"",
                    link.peer_id,
                    self._self_id,
                    self._boot,
                    link.peer_address,
                    self.revoked(),
                    time.time(),
                )
                await write_framed(stream, reply)
                stream.finish()
            self._admit(link, boot)
        except (MeshError, ProtocolError) as error:
            self._log_refusal(link, str(error))
            with contextlib.suppress(MeshLlmError, TimeoutError):
                await write_framed(stream, hello.refusal(str(error)))
                stream.finish()
                async with asyncio.timeout(_REFUSAL_S):
                    await link.wait_closed()
        except TimeoutError:
            self._log_refusal(link, "it did not introduce itself")
        finally:
            self._hellos.pop(link, None)
            if link not in self._admitted:
                link.close("not admitted")

    def _log_refusal(self, link: Link, why: str) -> None:
        host, now = link.peer_address.rpartition(":")[0], time.monotonic()
        self._refused = {h: t for h, t in self._refused.items() if now - t < _REFUSAL_LOG_S}
        if host not in self._refused:
            self._emit(f"refused {link.peer_address}: {why}")
        self._refused[host] = now

    def revoked(self) -> frozenset[str]:
        return frozenset(s for node in self.membership.present().values() for s in node.revoked)

    # --- links ---

    def _admit(self, link: Link, boot: str) -> None:
        if link.peer_id == self._self_id:
            link.close("this is the same node")
            raise TransportError(f"{link.peer_address} is this node itself")
        peer = self._peers.setdefault(link.peer_id, _Peer())
        if peer.boot != boot:  # the peer has restarted: links to its earlier process are void
            for old in peer.links:
                old.close("the peer has restarted")
            peer.links.clear()
            peer.boot = boot
        self._admitted[link] = time.monotonic()
        peer.links.append(link)
        # When both dial at once, both keep the link that the smaller id dialled; the other is closed once unused.
        peer.links.sort(key=lambda one: one.dialled != (self._self_id < one.peer_id))
        self._tasks.spawn(partial(self._watch, link, peer), f"link {link.peer_address}")
        peer.wake.set()
        if len(peer.links) == 1:
            self._tasks.spawn(partial(self._send_gossip, peer, link), f"gossip to {link.peer_address}")
            self.membership.link_up(link.peer_id, time.monotonic())
            self._flush()
        self.changes.notify()

    async def _watch(self, link: Link, peer: _Peer) -> None:
        while not link.closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_UNUSED_CHECK_S):
                    await link.wait_closed()
            if link is not self._best(peer) and link.n_streams == 0:
                link.close("another link is used")
        self._admitted.pop(link, None)
        if link in peer.links:
            peer.links.remove(link)
        peer.wake.set()
        self.changes.notify()

    def _best(self, peer: _Peer) -> Link | None:
        return next((link for link in peer.links if not link.closed), None)

    def link(self, peer_id: str) -> Link | None:
        """The link in use, if any."""
        peer = self._peers.get(peer_id)
        return self._best(peer) if peer else None

    async def open(self, peer_id: str, kind: StreamKind) -> Stream:
        """A stream to a member; dials it when there is no link. Raises TransportError or MeshError."""
        return (await self._linked(peer_id)).open(kind)

    async def _linked(self, peer_id: str) -> Link:
        if link := self.link(peer_id):
            return link
        peer = self._peers.setdefault(peer_id, _Peer())
        if peer.dialling is None:
            peer.dialling = self._tasks.spawn(partial(self._dial_member, peer_id), f"dial {short_id(peer_id)}")
        if peer.dialling is not None:
            await asyncio.wait({peer.dialling}, timeout=2 * _DIAL_TIMEOUT_S)
            peer.dialling = None if peer.dialling is None or peer.dialling.done() else peer.dialling
        if link := self._best(peer):
            return link
        raise TransportError(f"{self.name_of(peer_id)} cannot be reached")

    async def _dial_member(self, peer_id: str) -> None:
        member = self.membership.member(peer_id)
        addresses = member.announcement.addresses if member else ()
        addresses = tuple(a for a, i in self.bootstrap if i == peer_id) + addresses
        await self._introduce(await self._dial_any(list(dict.fromkeys(addresses)), peer_id))

    def name_of(self, peer_id: str) -> str:
        member = self.membership.member(peer_id)
        return (member.announcement.name if member else "") or short_id(peer_id)

    def _keep_links(self, now: float) -> None:
        """Links this worker with all others, so that RTTs are known, and closes links to dead members."""
        for link, since in list(self._admitted.items()):
            member = self.membership.member(link.peer_id)
            if member and not member.state.present and since < member.since:
                link.close("presumed dead")  # QUIC would retransmit ever more rarely; a new dial is faster
        me = self.membership.me
        workers = [i for i, n in self.membership.present().items() if n.role is Role.WORKER and i != self._self_id]
        if me.role is Role.WORKER and len(workers) <= _MAX_LINKED:
            for node_id in workers:
                peer = self._peers.setdefault(node_id, _Peer())
                if self._best(peer) is None and peer.dialling is None and now >= peer.next_dial:
                    # The smaller id dials; the other one follows if that takes too long, perhaps because of a NAT.
                    wait_s = 0 if self._self_id < node_id or peer.next_dial else _REDIAL_S
                    peer.next_dial = now + (wait_s or _REDIAL_S)
                    if not wait_s:
                        self._tasks.spawn(partial(self._try_link, node_id), f"link {short_id(node_id)}")
        if not self._admitted and self.bootstrap and now >= self._next_bootstrap:
            self._next_bootstrap = now + 2 * _REDIAL_S
            self._tasks.spawn(self._rejoin, "rejoin")

    async def _try_link(self, node_id: str) -> None:
        await self._linked(node_id)

    async def _rejoin(self) -> None:
        for node_id in dict.fromkeys(i for _, i in self.bootstrap):
            addresses = [a for a, i in self.bootstrap if i == node_id]
            with contextlib.suppress(MeshLlmError):
                await self._introduce(await self._dial_any(addresses, node_id))
                return

    # --- streams and gossip ---

    def _stream_opened(self, link: Link, kind: StreamKind, stream: Stream) -> None:
        if kind is StreamKind.HELLO and link in self._hellos and not self._hellos[link].done():
            self._hellos[link].set_result(stream)
        elif link in self._early and len(self._early[link]) < _MAX_EARLY:
            self._early[link].append((kind, stream))
        elif link not in self._admitted:
            link.close("not admitted")
        elif kind is StreamKind.GOSSIP:
            self._tasks.spawn(partial(self._read_gossip, link, stream), f"gossip from {link.peer_address}")
        elif kind is StreamKind.HELLO:
            stream.abort()
        else:
            self._on_stream(link, kind, stream)

    async def _read_gossip(self, link: Link, stream: Stream) -> None:
        try:
            while (message := await read_framed(stream, MAX_MESSAGE_BYTES)) is not None:
                self.membership.receive(link.peer_id, message, time.monotonic())
                self._flush()
                self._moved.set()
            stream.finish()
        except ProtocolError as error:
            self._log_refusal(link, str(error))
            link.close("broken gossip")

    async def _send_gossip(self, peer: _Peer, link: Link) -> None:
        """Sends the peer's messages in order on one stream, while this link is the one in use."""
        stream = link.open(StreamKind.GOSSIP)
        try:
            while self._best(peer) is link:
                while peer.pending:
                    await write_framed(stream, peer.pending.popleft())
                peer.wake.clear()
                await peer.wake.wait()
        finally:
            stream.finish()
            if (other := self._best(peer)) and other is not link:
                self._tasks.spawn(partial(self._send_gossip, peer, other), f"gossip to {other.peer_address}")

    def _flush(self) -> None:
        outbox = self.membership.outbox
        while outbox:
            peer_id, message = outbox.popleft()
            peer = self._peers.setdefault(peer_id, _Peer())
            peer.pending.append(message)
            peer.wake.set()
            if self._best(peer) is None and peer.dialling is None and time.monotonic() >= peer.next_dial:
                peer.next_dial = time.monotonic() + _REDIAL_S
                self._tasks.spawn(partial(self._try_link, peer_id), f"link {short_id(peer_id)}")
        if self.membership.changed:
            self.membership.changed = False
            self.changes.notify()

    # --- measurements ---

    def _measure(self) -> None:
        """RTTs: the minimum of the last samples, announced again when it changes by a third."""
        known = self.membership.me.rtts_ms
        present = self.membership.present()
        rtts: dict[str, float] = {}
        for peer_id, peer in self._peers.items():
            link = self._best(peer)
            if link and link.rtt_s is not None:
                peer.rtts_ms.append(link.rtt_s * 1000)
            if peer_id in present and peer.rtts_ms and present[peer_id].role is Role.WORKER:
                rtts[peer_id] = round(min(peer.rtts_ms), 1)
        if self.membership.me.role is Role.WORKER and _differ(known, rtts):
            self.announce(replace(self.me, rtts_ms=rtts))
        if revoked := self.revoked() - set(self.membership.me.revoked):
            # every member repeats it, so that it outlives the node that revoked
            self.announce(replace(self.me, revoked=(*self.me.revoked, *sorted(revoked))[:MAX_PEERS]))


def _differ(old: dict[str, float], new: dict[str, float]) -> bool:
    if old.keys() != new.keys():
        return True
    return any(abs(new[i] - old[i]) > max(2.0, old[i] / 3) for i in new)
