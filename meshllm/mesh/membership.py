"""Who is in the mesh: SWIM-like gossip of versioned announcements, as a state machine without I/O.

Every `PERIOD_S` a node pings one other, in shuffled order. If no answer comes, it pings again, directly and through up
to three other nodes. If there is still no answer, the node is suspected, and every node that hears of this probes it at
once. A suspect is dead once two nodes have failed to reach it, or after `LONELY_SUSPICION_S` if only one has tried,
unless it refutes with a higher version. The dead are remembered with their version, so that old news does not revive
them, and are called now and then, so that the two halves of a mended network find each other.

News goes at once to three other nodes, who pass it on if it is new to them, and rides on pings and acks for a while.
Digests catch what was missed; they are exchanged when a link comes up, and with a random node every `DIGEST_S`.

`now` is any monotonic clock; nodes need not agree on it. After Das, Gupta, Motivala: SWIM (2002).
"""

from __future__ import annotations

import enum
import math
import random
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from meshllm.errors import ProtocolError
from meshllm.mesh.announcement import MAX_VERSION, Announcement, decode_announcement

PERIOD_S = 0.5
PING_TIMEOUT_S = 0.5  # plus twice the RTT
INDIRECT_TIMEOUT_S = 0.7
LONELY_SUSPICION_S = 3.0
CONFIRMED_SUSPICION_S = 0.3  # time for a refutation to arrive
DIGEST_S = 10.0
CALL_DEAD_S = 3.0  # between digests to a dead node
FORGET_DEAD_S = 3600.0
STRANGERS_DEAD_S = 60.0  # the same, of nodes that were dead when first heard of
FANOUT = 3  # nodes that news goes to at once
MAX_MESSAGE_BYTES = 1 << 20
_MAX_MEMBERS = 1024
_MAX_NEWS_PER_PING = 8
_MAX_ACCUSERS = 8  # in one update
_UPDATES_PER_MESSAGE = 16
_NEWS_REPEATS = 3  # times log2 of the mesh's size: how often an update rides on pings


class State(enum.StrEnum):
    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"

    @property
    def present(self) -> bool:
        return self in (State.ALIVE, State.SUSPECT)


@dataclass
class Member:
    announcement: Announcement
    state: State
    since: float  # of the state
    accusers: set[str] = field(default_factory=set)

    @property
    def version(self) -> int:
        return self.announcement.version


@dataclass
class _Probe:
    sequence: int
    deadline: float
    indirect: bool = False


class Membership:
    """Driven by `receive`, `tick` and `link_up`. The caller sends what is in `outbox`, and resets `changed`."""

    def __init__(self, me: Announcement, rng: random.Random, now: float) -> None:
        self.me = me
        self.outbox: deque[tuple[str, bytes]] = deque()
        self.changed = True  # whether the view has, since the caller last reset this
        self.leaving = False
        self.n_failures = 0  # members found dead
        self._rng = rng
        self._now = now
        self._last_tick = now
        self._members: dict[str, Member] = {}
        self._round: list[str] = []
        self._probes: dict[str, _Probe] = {}
        self._relayed: dict[int, tuple[str, int, float]] = {}  # our sequence -> (asker, the asker's sequence, deadline)
        self._sequence = 0
        self._news: dict[str, int] = {}  # member -> how many more times its update rides on pings
        self._next_ping = now
        self._next_digest = now + DIGEST_S
        self._next_call = now + CALL_DEAD_S

    # --- the view ---

    def member(self, node_id: str) -> Member | None:
        return self._members.get(node_id)

    def present(self) -> dict[str, Announcement]:
        """All nodes believed alive, including this one."""
        view = {i: m.announcement for i, m in self._members.items() if m.state.present}
        return view | {self.me.node_id: self.me}

    def members(self) -> dict[str, Member]:
        """All other nodes, including dead ones."""
        return self._members

    def announce(self, me: Announcement) -> None:
        """Replaces this node's announcement and increments its version."""
        self.me = replace(me, version=self.me.version + 1)
        self.changed = True
        self._spread(self.me.node_id)

    def leave(self) -> None:
        """Tells all others that this node leaves. The caller sends the outbox and ends."""
        self.leaving = True
        self.me = replace(self.me, version=self.me.version + 1)
        for node_id in self._others():
            self._send(node_id, "news", [self._update_of(self.me.node_id)])

    # --- time ---

    def next_wake(self) -> float:
        """The latest time for the next `tick`."""
        times = [self._next_ping, self._next_digest, self._next_call]
        times += [probe.deadline for probe in self._probes.values()]
        times += [self._verdict_at(m) for m in self._members.values() if m.state is State.SUSPECT]
        return min(times)

    def tick(self, now: float) -> None:
        self._now = now
        lag_s = now - self._last_tick - PERIOD_S
        self._last_tick = now
        if self.leaving:
            return
        if lag_s > 0:  # this process was held up: answers may be waiting in the socket
            for probe in self._probes.values():
                probe.deadline += lag_s
        for node_id, probe in list(self._probes.items()):
            if now >= probe.deadline:
                self._probe_failed(node_id, probe)
        for node_id, member in self._members.items():
            if member.state is State.SUSPECT and now >= self._verdict_at(member):
                self._set_state(node_id, member, State.DEAD)
        if now >= self._next_ping:
            self._next_ping = now + PERIOD_S
            self._ping_next()
        if now >= self._next_digest:
            self._next_digest = now + DIGEST_S * self._rng.uniform(0.8, 1.2)
            self._clean()
            for node_id in self._some(1):
                self._send_digest(node_id)
        if now >= self._next_call:
            self._next_call = now + CALL_DEAD_S * self._rng.uniform(0.8, 1.2)
            self._call_dead()

    def _verdict_at(self, member: Member) -> float:
        return member.since + (CONFIRMED_SUSPICION_S if len(member.accusers) > 1 else LONELY_SUSPICION_S)

    def _clean(self) -> None:
        for node_id, member in list(self._members.items()):
            if not member.state.present and self._now - member.since > FORGET_DEAD_S:
                del self._members[node_id]
        self._relayed = {s: r for s, r in self._relayed.items() if r[2] > self._now}

    # --- probing ---

    def _ping_next(self) -> None:
        while self._round:
            node_id = self._round.pop()
            if node_id in self._others():
                self._probe(node_id)
                return
        self._round = self._others()
        self._rng.shuffle(self._round)
        if self._round:
            self._probe(self._round.pop())

    def _probe(self, node_id: str) -> None:
        if node_id not in self._probes:
            rtt_s = self.me.rtts_ms.get(node_id, 0.0) / 1000
            self._sequence += 1
            self._probes[node_id] = _Probe(self._sequence, self._now + PING_TIMEOUT_S + 2 * rtt_s)
            self._send(node_id, "ping", sequence=self._sequence)

    def _probe_failed(self, node_id: str, probe: _Probe) -> None:
        member = self._members.get(node_id)
        if member is None or not member.state.present:
            del self._probes[node_id]
        elif not probe.indirect:
            probe.indirect = True
            probe.deadline = self._now + INDIRECT_TIMEOUT_S
            self._send(node_id, "ping", sequence=probe.sequence)
            for helper in self._some(FANOUT, without=node_id):
                self._send(helper, "ping_req", sequence=probe.sequence, target=node_id)
        else:
            del self._probes[node_id]
            self._accuse(node_id, member, self.me.node_id)

    def _accuse(self, node_id: str, member: Member, accuser: str) -> None:
        if member.state is State.ALIVE:
            member.accusers = {accuser}
            self._set_state(node_id, member, State.SUSPECT)
        elif accuser not in member.accusers:
            member.accusers.add(accuser)
            self._spread(node_id)
        if accuser != self.me.node_id and self.me.node_id not in member.accusers:
            self._probe(node_id)

    def _call_dead(self) -> None:
        """A dead node may be alive on the other side of a network that has been mended."""
        dead = [i for i, m in self._members.items() if m.state is State.DEAD]
        if dead:
            self._send_digest(self._rng.choice(dead))

    # --- messages ---

    def link_up(self, node_id: str, now: float) -> None:
        """A link to this member has come up: sends it a digest."""
        self._now = now
        self._send_digest(node_id)

    def receive(self, sender: str, message: bytes, now: float) -> None:
        """Raises ProtocolError if the message violates the protocol."""
        self._now = now
        try:
            fields = orjson.loads(message)
            kind, news, sequence = fields["t"], fields["n"], fields.get("q", 0)
            if not isinstance(kind, str) or not isinstance(news, list) or type(sequence) is not int:
                raise ValueError("invalid kind, news or sequence")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ProtocolError("malformed gossip message") from None
        for update in news:
            self._merge(update, sender)
        handler = _HANDLERS.get(kind)
        if handler is None:
            raise ProtocolError(f"a gossip message of an unknown kind {kind[:20]!r}")
        handler(self, sender, sequence, fields)

    def _on_ping(self, sender: str, sequence: int, _fields: dict[str, Any]) -> None:
        self._send(sender, "ack", sequence=sequence)

    def _on_ack(self, sender: str, sequence: int, fields: dict[str, Any]) -> None:
        if relay := self._relayed.pop(sequence, None):
            asker, theirs, _ = relay
            self._send(asker, "ack", sequence=theirs, target=sender)
        target = fields.get("target", sender)
        probe = self._probes.get(target) if isinstance(target, str) else None
        if probe and probe.sequence == sequence:
            del self._probes[target]

    def _on_ping_req(self, sender: str, sequence: int, fields: dict[str, Any]) -> None:
        target = fields.get("target")
        if isinstance(target, str) and target in self._members and len(self._relayed) < _MAX_MEMBERS:
            self._sequence += 1
            self._relayed[self._sequence] = (sender, sequence, self._now + INDIRECT_TIMEOUT_S * 2)
            self._send(target, "ping", sequence=self._sequence)

    def _on_news(self, _sender: str, _sequence: int, _fields: dict[str, Any]) -> None:
        pass  # the updates are all

    def _on_digest(self, sender: str, _sequence: int, fields: dict[str, Any]) -> None:
        digest = fields.get("d")
        if not isinstance(digest, dict):
            raise ProtocolError("malformed digest")
        about_me = _rank(digest.get(self.me.node_id))
        if about_me > (self.me.version, 0):
            self._refute(about_me[0])
        mine = self._digest()
        # a dead node is news only to those who knew it
        newer = [i for i, e in mine.items() if _rank(e) > _rank(digest.get(i)) and (i in digest or _present(e))]
        wanted = [i for i, e in digest.items() if _rank(e) > _rank(mine.get(i)) and (i in mine or _present(e))]
        if newer:
            self._send_updates(sender, newer)
        if wanted:
            self._send(sender, "want", ids=wanted[:_MAX_MEMBERS])

    def _on_want(self, sender: str, _sequence: int, fields: dict[str, Any]) -> None:
        ids = fields.get("ids")
        if not isinstance(ids, list):
            raise ProtocolError("malformed request for updates")
        self._send_updates(
            sender, [i for i in ids if isinstance(i, str) and (i == self.me.node_id or i in self._members)]
        )

    # --- merging ---

    def _merge(self, update: Any, sender: str) -> None:
        try:
            state = State(update["s"])
            announcement = decode_announcement(update["a"])
            accusers = [a for a in update["by"] if isinstance(a, str) and len(a) == 64][:_MAX_ACCUSERS]
        except (ValueError, KeyError, TypeError):
            raise ProtocolError("malformed update") from None
        node_id, version = announcement.node_id, announcement.version
        if node_id == self.me.node_id:
            if (version, state is not State.ALIVE) > (self.me.version, False):
                self._refute(version)
                self._send(sender, "news", [self._update_of(self.me.node_id)])
            return
        member = self._members.get(node_id)
        if member is None:
            if len(self._members) < _MAX_MEMBERS:
                self._meet(announcement, state, set(accusers))
        elif version > member.version:
            member.announcement = announcement
            member.accusers = set(accusers)
            self._set_state(node_id, member, state)
        elif version == member.version and member.state.present:
            if state is State.SUSPECT:
                for accuser in accusers:
                    self._accuse(node_id, member, accuser)
            elif not state.present:
                self._set_state(node_id, member, state)

    def _meet(self, announcement: Announcement, state: State, accusers: set[str]) -> None:
        node_id = announcement.node_id
        member = self._members[node_id] = Member(announcement, state, self._now, accusers)
        if state.present:
            self._learnt(node_id)
        else:  # kept briefly, against old news still under way; else news of the dead would circulate forever
            member.since = self._now - FORGET_DEAD_S + STRANGERS_DEAD_S

    def _refute(self, version: int) -> None:
        if (
            not self.leaving and version < MAX_VERSION // 2
        ):  # a higher one is a lie, and past MAX_VERSION others would refuse ours
            self.me = replace(self.me, version=max(version, self.me.version) + 1)
            self._spread(self.me.node_id)

    def _set_state(self, node_id: str, member: Member, state: State) -> None:
        self.n_failures += state is State.DEAD and member.state is not State.DEAD
        member.state = state
        member.since = self._now
        if state is State.ALIVE:
            member.accusers = set()
        if not state.present:
            self._probes.pop(node_id, None)
        self._learnt(node_id)

    def _learnt(self, node_id: str) -> None:
        self.changed = True
        self._spread(node_id)

    # --- sending ---

    def _others(self) -> list[str]:
        return [i for i, m in self._members.items() if m.state.present]

    def _some(self, n: int, without: str = "") -> list[str]:
        others = [i for i in self._others() if i != without]
        return self._rng.sample(others, min(n, len(others)))

    def _spread(self, about: str) -> None:
        self._news[about] = _NEWS_REPEATS * math.ceil(math.log2(len(self._members) + 2))
        for node_id in self._some(FANOUT, without=about):
            self._send(node_id, "news", [self._update_of(about)])
        member = self._members.get(about)
        if member and member.state is State.SUSPECT:
            self._send(about, "news", [self._update_of(about)])

    def _update_of(self, node_id: str) -> dict[str, Any]:
        if node_id == self.me.node_id:
            state = State.LEFT if self.leaving else State.ALIVE
            return {"s": str(state), "a": self.me.encode(), "by": []}
        member = self._members[node_id]
        return {
            "s": str(member.state),
            "a": member.announcement.encode(),
            "by": sorted(member.accusers)[:_MAX_ACCUSERS],
        }

    def _riding_news(self, receiver: str) -> list[dict[str, Any]]:
        chosen = sorted((i for i in self._news if i != receiver), key=lambda i: -self._news[i])[:_MAX_NEWS_PER_PING]
        for node_id in chosen:
            self._news[node_id] -= 1
            if self._news[node_id] <= 0:
                del self._news[node_id]
        known = [i for i in chosen if i == self.me.node_id or i in self._members]
        member = self._members.get(receiver)
        if member and member.state is State.SUSPECT:
            known.append(receiver)  # so that it can refute
        return [self._update_of(i) for i in known]

    def _send(self, node_id: str, kind: str, news: list[dict[str, Any]] | None = None, **fields: Any) -> None:
        sequence = fields.pop("sequence", 0)
        news = self._riding_news(node_id) if news is None else news
        self.outbox.append((node_id, orjson.dumps({"t": kind, "q": sequence, "n": news} | fields)))

    def _send_updates(self, node_id: str, about: list[str]) -> None:
        for start in range(0, len(about), _UPDATES_PER_MESSAGE):
            part = about[start : start + _UPDATES_PER_MESSAGE]
            self._send(node_id, "news", [self._update_of(i) for i in part])

    def _send_digest(self, node_id: str) -> None:
        self._send(node_id, "digest", [], d=self._digest())

    def _digest(self) -> dict[str, list[object]]:
        digest: dict[str, list[object]] = {i: [m.version, str(m.state)] for i, m in self._members.items()}
        return digest | {self.me.node_id: [self.me.version, str(State.ALIVE)]}


_HANDLERS = {
    "ping": Membership._on_ping,
    "ack": Membership._on_ack,
    "ping_req": Membership._on_ping_req,
    "news": Membership._on_news,
    "digest": Membership._on_digest,
    "want": Membership._on_want,
}

_STATE_RANK = {"alive": 0, "suspect": 1, "dead": 2, "left": 2}


def _present(entry: Any) -> bool:
    return _rank(entry)[1] < 2


def _rank(entry: Any) -> tuple[int, int]:
    """How recent a digest's entry is; a missing one is the oldest."""
    match entry:
        case [int(version), str(state)] if state in _STATE_RANK:
            return version, _STATE_RANK[state]
    return 0, 0
