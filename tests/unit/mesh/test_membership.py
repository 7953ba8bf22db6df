"""Gossip without a network: many nodes in one process, with a clock, delays, loss and partitions of the test's own."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshllm.errors import ProtocolError
from meshllm.mesh.announcement import Announcement, Role
from meshllm.mesh.membership import Member, Membership, State


def node_id(i: int) -> str:
    return f"{i:064x}"


class World:
    """Every node ticks twice a second of its own clock; a message takes `delay_s` unless it is lost or cut off."""

    def __init__(self, n: int, seed: int, delay_s: float = 0.02, loss: float = 0.0, skew: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.delay_s, self.loss = delay_s, loss
        self.now = 0.0
        self.group: Callable[[str], object] = lambda _node: 0
        self.nodes: dict[str, Membership] = {}
        self.rates: dict[str, float] = {}
        self.skew = skew
        self.sent: Counter[str] = Counter()
        self._queue: list[tuple[float, int, str, tuple[str, bytes] | None]] = []
        self._order = itertools.count()
        for i in range(n):
            self.start(i)

    def start(self, i: int, version: int = 1) -> Membership:
        name = node_id(i)
        # a clock may be fast or slow, and begins anywhere
        self.rates[name] = 1 + self.rng.uniform(-self.skew, self.skew)
        node = Membership(Announcement(name, version, role=Role.WORKER), random.Random(i), self.clock(name))
        self.nodes[name] = node
        self._push(self.rng.uniform(0, 0.5), name, None)
        if i:
            self.introduce(name, node_id(0))
        return node

    def introduce(self, a: str, b: str) -> None:
        self.nodes[a]._members.setdefault(b, _met(self.nodes[b].me)) if b in self.nodes else None
        self.nodes[a].link_up(b, self.clock(a))
        self._flush(a)

    def clock(self, name: str) -> float:
        return 1000.0 * int(name, 16) + self.now * self.rates[name]

    def kill(self, i: int) -> None:
        del self.nodes[node_id(i)]

    def _push(self, after_s: float, name: str, message: tuple[str, bytes] | None) -> None:
        heapq.heappush(self._queue, (self.now + after_s, next(self._order), name, message))

    def _flush(self, name: str) -> None:
        node = self.nodes[name]
        while node.outbox:
            to, message = node.outbox.popleft()
            self.sent[name] += 1
            if self.group(name) == self.group(to) and self.rng.random() >= self.loss:
                self._push(self.delay_s * self.rng.uniform(0.5, 1.5), to, (name, message))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> float:
        """Seconds of the world's time that it took, `seconds` when the condition did not come true."""
        began, checked, end = self.now, self.now, self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, name, message = heapq.heappop(self._queue)
            node = self.nodes.get(name)
            if node is None:
                continue
            if message is None:
                node.tick(self.clock(name))
                self._push(0.1, name, None)
            else:
                node.receive(*message, self.clock(name))
            self._flush(name)
            if self.now >= checked + 0.1:
                checked = self.now
                if until():
                    return self.now - began
        self.now = end
        return seconds

    def views(self) -> list[frozenset[str]]:
        return [frozenset(node.present()) for node in self.nodes.values()]

    def agree(self) -> bool:
        living = frozenset(self.nodes)
        return all(len(n.members()) >= len(living) - 1 and n.present().keys() == living for n in self.nodes.values())


def _met(announcement: Announcement) -> Member:
    return Member(announcement, State.ALIVE, 0.0)


def test_two_hundred_nodes_meet_and_lose_some() -> None:
    world = World(200, seed=1)
    assert world.run(30, world.agree) < 30
    for i in (3, 77, 150):
        world.kill(i)
    assert world.run(15, world.agree) < 5
    world.run(2)
    assert world.agree()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_death_is_known_in_seconds(n: int) -> None:
    world = World(n, seed=n)
    world.run(10, world.agree)
    world.kill(1)
    assert world.run(15, world.agree) < (5 if n == 2 else 3)


def test_message_cost_of_a_node_does_not_grow_with_the_mesh() -> None:
    rates = {}
    for n in (20, 80):
        world = World(n, seed=5)
        assert world.run(40, world.agree) < 40
        world.run(20)  # what joining cost is over
        world.sent.clear()
        world.run(20)
        rates[n] = max(world.sent.values()) / 20
    assert rates[80] < 1.5 * rates[20] < 20


def test_clean_leave_is_known_at_once() -> None:
    world = World(5, seed=3)
    world.run(10, world.agree)
    leaver = world.nodes[node_id(2)]
    leaver.leave()
    world._flush(node_id(2))
    world.kill(2)
    assert world.run(5, world.agree) < 0.3
    assert {n._members[node_id(2)].state for n in world.nodes.values()} == {State.LEFT}


def test_halves_find_each_other_again() -> None:
    world = World(8, seed=4)
    world.run(10, world.agree)
    world.group = lambda node: int(node, 16) < 3
    world.run(15)
    assert sorted(len(view) for view in world.views()) == [3] * 3 + [5] * 5
    world.group = lambda node: 0
    assert world.run(60, world.agree) < 30


def test_node_with_a_new_life_and_an_old_version_is_let_in() -> None:
    world = World(4, seed=6)
    world.run(10, world.agree)
    for _ in range(20):
        world.nodes[node_id(2)].announce(replace(world.nodes[node_id(2)].me, name="x"))
    world.run(3)
    world.kill(2)
    assert world.run(15, world.agree) < 5
    world.start(2)
    assert world.run(15, world.agree) < 5


def test_old_news_does_not_bring_the_dead_back() -> None:
    world = World(4, seed=7)
    world.run(10, world.agree)
    observer = world.nodes[node_id(0)]
    old = observer._update_of(node_id(3))
    world.kill(3)
    world.run(15, world.agree)
    observer._merge(old, node_id(1))
    assert observer._members[node_id(3)].state is State.DEAD
    world.run(5)
    assert world.agree()


def test_process_that_was_held_up_blames_nobody() -> None:
    world = World(3, seed=8)
    world.run(10, world.agree)
    held = world.nodes.pop(node_id(0))
    world.run(0.9)
    world.nodes[node_id(0)] = held
    world._push(0, node_id(0), None)
    world.run(10)
    assert all(m.state is State.ALIVE for n in world.nodes.values() for m in n._members.values())


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 10),
    seed=st.integers(0, 2**32),
    loss=st.sampled_from([0.0, 0.05, 0.2]),
    skew=st.sampled_from([0.0, 0.05]),
    events=st.lists(
        st.tuples(st.sampled_from(["kill", "start", "cut", "mend", "leave"]), st.integers(1, 9)), max_size=6
    ),
)
def test_views_converge(n: int, seed: int, loss: float, skew: float, events: list[tuple[str, int]]) -> None:
    """Whatever happened: once it is quiet, everybody sees exactly those who live."""
    world = World(n, seed, loss=loss, skew=skew)
    world.run(5)
    for what, i in events:
        name = node_id(i)
        match what:
            case "kill" | "leave" if name in world.nodes:
                if what == "leave":
                    world.nodes[name].leave()
                    world._flush(name)
                world.kill(i)
            case "start" if name not in world.nodes and i < n:
                world.start(i)
            case "cut":
                world.group = lambda node, i=i: int(node, 16) % (i + 1)  # type: ignore[misc]
            case "mend":
                world.group = lambda node: 0
        world.run(4)
    world.group = lambda node: 0
    world.loss = 0.0
    for name in world.nodes:  # as a node does that was started with a token
        if name != node_id(0):
            world.introduce(name, node_id(0))
    assert world.run(180, world.agree) < 180
    world.run(20)
    assert world.agree()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_garbage_is_refused(message: bytes) -> None:
    node = Membership(Announcement(node_id(1), 1), random.Random(0), 0.0)
    with pytest.raises(ProtocolError):
        node.receive(node_id(2), message, 1.0)
    assert list(node.present()) == [node_id(1)]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["ping", "ack", "ping_req", "news", "digest", "want", "x"]),
    news=st.lists(json_values, max_size=2),
    rest=st.dictionaries(st.sampled_from(["d", "ids", "target", "q"]), json_values),
)
def test_hostile_fields_are_refused_or_harmless(kind: str, news: list[object], rest: dict[str, object]) -> None:
    node = Membership(Announcement(node_id(1), 1), random.Random(0), 0.0)
    node._members[node_id(2)] = _met(Announcement(node_id(2), 1))
    with contextlib.suppress(ProtocolError):
        node.receive(node_id(2), orjson.dumps({"t": kind, "q": 1, "n": news} | rest), 1.0)
    node.tick(2.0)
    assert set(node.present()) == {node_id(1), node_id(2)}


KINDS: list[tuple[str, str, dict[str, object]]] = [
    ("ping", "alive", {}),
    ("ack", "suspect", {"target": node_id(3)}),
    ("ping_req", "dead", {"target": node_id(2)}),
    ("digest", "left", {"d": {node_id(1): [9, "dead"], node_id(5): [2, "alive"]}}),
    ("want", "alive", {"ids": [node_id(1), node_id(2)]}),
]
MESSAGES = [
    {"t": kind, "q": 3, "n": [{"s": state, "a": Announcement(node_id(3), 7).encode(), "by": [node_id(4)]}], **rest}
    for kind, state, rest in KINDS
]


def places(value: object, path: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, v in inner for place in places(v, (*path, key)))]


@settings(max_examples=800, deadline=None)
@given(st.sampled_from(MESSAGES), st.data())
def test_good_messages_with_one_thing_changed_do_no_harm(message: dict[str, object], data: st.DataObject) -> None:
    changed = orjson.loads(orjson.dumps(message))
    *way, last = data.draw(st.sampled_from([place for place in places(changed) if place]))
    target = changed
    for key in way:
        target = target[key]
    target[last] = data.draw(json_values)
    node = Membership(Announcement(node_id(1), 1), random.Random(0), 0.0)
    node._members[node_id(2)] = _met(Announcement(node_id(2), 1))
    with contextlib.suppress(ProtocolError):
        node.receive(node_id(2), orjson.dumps(changed), 1.0)
    for now in (2.0, 4.0, 8.0, 20.0):
        node.tick(now)
    assert all(orjson.loads(m)["t"] for _, m in node.outbox)
