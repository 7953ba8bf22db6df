"""Which node is for which model: the assignment as a function of the view, and how it moves."""

from __future__ import annotations

import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from meshllm.mesh.announcement import Announcement, ModelInfo, Role, Serving
from meshllm.mesh.groups import StageStatus
from meshllm.mesh.placement import place_models, wanted_models

GB = 10**9
A, B, C = (ModelInfo(name, name * 64, 4 * GB, 32) for name in "abc")
HUGE = ModelInfo("huge", "d" * 64, 20 * GB, 64)


def node_id(i: int) -> str:
    return f"{i:064x}"


def node(i: int, memory_gb: int = 8, on_disk: tuple[ModelInfo, ...] = (A, B), **options: object) -> Announcement:
    rtts = {node_id(k): 5.0 for k in range(10) if k != i}
    fields: dict[str, object] = {"models": on_disk, "ggml_version": "e", "rtts_ms": rtts} | options
    return Announcement(node_id(i), 1, memory_bytes=memory_gb * GB, **fields)  # type: ignore[arg-type]


def seed(i: int, *models: ModelInfo, **options: object) -> Announcement:
    return node(i, wants=models, named=tuple(m.fingerprint for m in models), **options)  # type: ignore[arg-type]


def view(*nodes: Announcement) -> dict[str, Announcement]:
    return {n.node_id: n for n in nodes}


def hosts(mesh: dict[str, Announcement]) -> dict[str, list[int]]:
    """Model to the numbers of its hosts."""
    return {a.model.name: sorted(int(g.host, 16) for g in a.groups) for a in place_models(mesh)}


def settled(mesh: dict[str, Announcement]) -> dict[str, Announcement]:
    """As after everybody has carried the plan out."""
    plan = place_models(mesh)
    serving = {g.host: Serving(a.model.fingerprint, g.stages, True) for a in plan for g in a.groups}
    return {i: replace(n, serving=(serving[i],) if i in serving else ()) for i, n in mesh.items()}


def busy(announcement: Announcement, **rates: float) -> Announcement:
    return replace(announcement, requests_per_min={name * 64: rate for name, rate in rates.items()})


def test_a_joiner_takes_what_nobody_serves() -> None:
    mesh = settled(view(seed(1, A, B)))
    assert hosts(mesh) == {"a": [1], "b": []}
    mesh = settled(mesh | view(node(2)))
    assert hosts(mesh) == {"a": [1], "b": [2]}
    mesh = settled(mesh | view(node(3)))  # the least served, which both are
    assert sorted(len(i) for i in hosts(mesh).values()) == [1, 2]
    mesh = settled({i: n for i, n in mesh.items() if i != node_id(2)})
    assert all(hosts(mesh).values())  # b has a server again


def test_what_is_on_disk_comes_before_what_is_not() -> None:
    mesh = view(seed(1, A, B, C, on_disk=(A, B, C)), node(2, on_disk=(C,)), node(3, on_disk=(B,)))
    assert hosts(mesh) == {"a": [1], "b": [3], "c": [2]}


def test_who_named_a_model_serves_no_other() -> None:
    mesh = settled(view(seed(1, A), seed(2, B), seed(3, B)))
    assert hosts(mesh) == {"a": [1], "b": [2, 3]}
    mesh = {i: busy(n, a=600.0) for i, n in mesh.items()}
    assert hosts(mesh) == {"a": [1], "b": [2, 3]}


def test_a_dropped_model_frees_its_node() -> None:
    mesh = settled(view(seed(1, A, B), node(2)))
    dropped = {i: replace(n, drops={A.fingerprint: 1}) if i == node_id(2) else n for i, n in mesh.items()}
    assert [m.name for m in wanted_models(dropped)] == ["b"]
    assert hosts(dropped) == {"b": [1, 2]}
    back = {i: replace(n, drops={A.fingerprint: 2}) for i, n in settled(dropped).items()}
    assert [len(i) for i in hosts(back).values()] == [1, 1]


def test_idle_models_give_way_with_hysteresis() -> None:
    mesh = settled(view(seed(1, A, B), node(2), node(3)))
    doubled = next(name for name, where in hosts(mesh).items() if len(where) == 2)
    other = "b" if doubled == "a" else "a"
    quiet = {i: busy(n, **{other: 1.0}) for i, n in mesh.items()}  # 3 a minute: no server is busy
    assert hosts(quiet) == hosts(mesh)
    loaded = {i: busy(n, **{other: 10.0, doubled: 0.5}) for i, n in mesh.items()}
    assert [len(hosts(loaded)[name]) for name in (doubled, other)] == [1, 2]
    moved = settled(loaded)
    near_even = {i: busy(n, **{other: 10.0, doubled: 8.0}) for i, n in moved.items()}
    assert hosts(near_even) == hosts(moved)  # not back again for as much
    turned = {i: busy(n, **{other: 1.0, doubled: 20.0}) for i, n in moved.items()}
    assert [len(hosts(turned)[name]) for name in (doubled, other)] == [2, 1]


def test_a_model_that_nobody_serves_takes_a_spare_node() -> None:
    mesh = settled(view(seed(1, A, on_disk=(A, B, C)), node(2), node(3)))
    assert hosts(mesh) == {"a": [1, 2, 3]}
    mesh = settled(mesh | view(seed(4, B, memory_gb=1)))
    assert [len(where) for where in hosts(mesh).values()] == [2, 1]


def test_a_big_model_gathers_what_is_free() -> None:
    mesh = view(seed(1, HUGE, on_disk=(HUGE,)), node(2, on_disk=()), node(3, on_disk=()))
    plan = place_models(mesh)
    assert [len(g.stages) for a in plan for g in a.groups] == [2]


def test_who_gets_the_file_is_no_stage_meanwhile() -> None:
    fetching = node(2, 40, on_disk=(), fetches=True)
    plan = place_models(view(seed(1, HUGE, on_disk=(HUGE,)), fetching))
    assert plan[0].reasons[node_id(2)] is StageStatus.FETCHING and not plan[0].groups
    failed = replace(fetching, cannot_fetch=(HUGE.fingerprint,))
    plan = place_models(view(seed(1, HUGE, on_disk=(HUGE,)), failed))
    assert plan[0].groups[0].stages == (node_id(2),)


@st.composite
def meshes(draw: st.DrawFn) -> dict[str, Announcement]:
    models = (A, B, C, HUGE)
    nodes = []
    for i in range(draw(st.integers(1, 6))):
        on_disk = tuple(m for m in models if draw(st.integers(0, 2)))
        named = tuple(m for m in on_disk if draw(st.integers(0, 3)) == 0)
        nodes.append(
            node(
                i,
                draw(st.integers(0, 12)),
                on_disk,
                role=draw(st.sampled_from([Role.WORKER, Role.WORKER, Role.CLIENT])),
                wants=named,
                named=tuple(m.fingerprint for m in named),
                fetches=draw(st.booleans()),
                drops={A.fingerprint: draw(st.integers(0, 2))},
                requests_per_min={m.fingerprint: draw(st.sampled_from([0.0, 1.0, 30.0])) for m in models},
            )
        )
    return view(*nodes)


@settings(max_examples=300, deadline=None)
@given(meshes(), st.randoms())
def test_everybody_makes_the_same_plan_and_it_settles(mesh: dict[str, Announcement], rng: random.Random) -> None:
    order = list(mesh.items())
    rng.shuffle(order)
    plan = place_models(mesh)
    assert plan == place_models(dict(order))
    members = [i for a in plan for g in a.groups for i in g.nodes]
    assert len(members) == len(set(members))  # each computes for one model
    assert all(mesh[i].role is Role.WORKER for i in members)
    for _ in range(12):
        mesh = settled(mesh)
    assert settled(mesh) == mesh  # with the same load nothing moves for ever
