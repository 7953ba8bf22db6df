"""Who serves what: facts of PRODUCT's rows R4 to R9 and properties over random meshes."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from meshllm.mesh import groups as plan
from meshllm.mesh.announcement import Announcement, ModelInfo, Need, ProjectorInfo, Role, Serving
from meshllm.mesh.groups import MAX_RTT_MS, MAX_STAGES, Placement, StageStatus, needed_bytes
from meshllm.mesh.placement import place_models

GB = 10**9
BIG = ModelInfo("big", "ab" * 32, 50 * GB, 64)


def node(i: int, memory_gb: float, rtts: dict[int, float] | None = None, **options: object) -> Announcement:
    fields: dict[str, object] = {"models": (BIG,), "wants": (BIG,), "ggml_version": "e"} | options
    table = {node_id(k): v for k, v in (rtts or {}).items()}
    return Announcement(node_id(i), 1, memory_bytes=int(memory_gb * GB), rtts_ms=table, **fields)  # type: ignore[arg-type]


def node_id(i: int) -> str:
    return f"{i:064x}"


def view(*nodes: Announcement) -> dict[str, Announcement]:
    return {n.node_id: n for n in nodes}


def place_model(model: ModelInfo, mesh: dict[str, Announcement]) -> Placement:
    """With every worker for this model."""
    return plan.place_model(model, mesh, {i for i, n in mesh.items() if n.role is Role.WORKER})


def test_waits_until_the_memory_suffices() -> None:
    waiting = place_model(BIG, view(node(1, 51.5)))
    assert not waiting.groups and waiting.need_bytes == 55 * GB and waiting.have_bytes == (51.5 * GB,)
    both = place_model(BIG, view(node(1, 51.5), node(2, 103, {1: 5.0}), node(3, 4, {2: 1.0})))
    assert [g.host for g in both.groups] == [node_id(2)] and both.groups[0].stages == ()


def test_split_is_by_memory_and_the_host_has_most() -> None:
    model = ModelInfo("huge", "cd" * 32, 120 * GB, 80)
    nodes = [node(1, 51, {2: 5.0}, models=(model,), wants=(model,)), node(2, 103, models=(model,), wants=(model,))]
    group = place_model(model, view(*nodes)).groups[0]
    assert (group.host, group.stages) == (node_id(2), (node_id(1),))
    assert [round(s, 2) for s in group.shares] == [0.33, 0.67]
    by_hand = place_model(model, view(nodes[0], replace(nodes[1], tensor_split=(1.0, 3.0)))).groups[0]
    assert by_hand.shares == (0.25, 0.75)


def test_the_host_needs_memory_for_its_projector_too() -> None:
    projectors = {BIG.fingerprint: ProjectorInfo("ef" * 32, 2 * GB)}
    assert place_model(BIG, view(node(1, 56))).groups
    waiting = place_model(BIG, view(node(1, 56, projectors=projectors)))
    assert not waiting.groups and waiting.need_bytes == round(57.2 * GB)
    group = place_model(BIG, view(node(1, 56, projectors=projectors), node(2, 10, {1: 1.0}))).groups[0]
    assert (group.host, group.stages) == (node_id(1), (node_id(2),))
    assert [round(share, 3) for share in group.shares] == [0.157, 0.843]  # 10 and 53.8
    blind = place_model(BIG, view(node(1, 56, projectors=projectors), node(2, 56, {1: 1.0})))
    assert [g.host for g in blind.groups] == [node_id(2)]


NEED = Need(4096, 50 * GB, 2 * GB, 5 * GB)


def test_what_the_model_takes_counts_with_its_context() -> None:
    needs = {BIG.fingerprint: NEED}
    assert place_model(BIG, view(node(1, 55, needs=needs))).groups
    waiting = place_model(BIG, view(node(1, 30, needs=needs), node(2, 26, {1: 1.0})))
    assert not waiting.groups
    assert (waiting.need_bytes, waiting.have_bytes) == (57 * GB, (26 * GB, 30 * GB))
    group = place_model(BIG, view(node(1, 30, needs=needs), node(2, 27, {1: 1.0}))).groups[0]
    assert group.shares == (0.5, 0.5)  # 25 for layers on each
    small = place_model(BIG, view(node(1, 54, needs=needs), node(2, 2, {1: 1.0})))
    assert small.reasons[node_id(2)] is StageStatus.NO_MEMORY
    assert place_model(BIG, view(node(1, 5, needs=needs), node(2, 1, needs=needs))).have_bytes == (5 * GB,)


def test_a_node_that_has_not_measured_the_model_believes_the_others() -> None:
    fetches = node(2, 54, {1: 1.0}, models=(), fetches=True)
    mesh = view(node(1, 30, needs={BIG.fingerprint: NEED}), fetches)
    assert plan.need_of(fetches, BIG, mesh) == NEED and not plan.fits_alone(fetches, BIG, mesh)
    assert plan.need_of(fetches, BIG, view(fetches)).alone_bytes == 55 * GB


def test_no_more_stages_than_ggml_takes() -> None:
    nodes = [node(1, 10), *(node(i, 3, {1: 1.0}) for i in range(2, 21))]
    assert not place_model(BIG, view(*nodes)).groups
    forced = [node(1, 60, split=True), *(node(i, 3, {1: 1.0}) for i in range(2, 21))]
    placed = place_model(BIG, view(*forced))
    assert len(placed.groups[0].stages) == MAX_STAGES
    assert list(placed.reasons.values()).count(StageStatus.NOT_NEEDED) == 19 - MAX_STAGES


def test_two_nodes_with_a_small_model_are_two_servers() -> None:
    groups = place_model(BIG, view(node(1, 60), node(2, 70, {1: 1.0}))).groups
    assert [(g.host, g.stages) for g in groups] == [(node_id(1), ()), (node_id(2), ())]


def test_forced_split_takes_all_who_are_near() -> None:
    nodes = [node(1, 60, split=True), node(2, 50, {1: 5.0}), node(3, 50, {1: 2.0}), node(4, 50, {1: 90.0})]
    assert place_model(BIG, view(*nodes)).groups[0].stages == (node_id(3), node_id(2))
    assert place_model(BIG, view(nodes[0])).groups[0].stages == ()


def test_every_node_is_told_why() -> None:
    reasons = place_model(
        BIG,
        view(
            node(1, 40),
            node(2, 30, {1: 5.0}),
            node(3, 35, {1: 90.0}),
            node(4, 35),
            node(5, 35, {1: 5.0}, role=Role.CLIENT),
            node(6, 35, {1: 5.0}, ggml_version="other"),
            node(7, 0, {1: 5.0}),
            node(8, 20, {1: 6.0}),
            node(9, 0, {1: 90.0}),
        ),
    ).reasons
    expected = "HOST STAGE TOO_FAR UNKNOWN_RTT CLIENT OTHER_GGML NO_MEMORY NOT_NEEDED TOO_FAR"
    assert [reasons[node_id(i)] for i in range(1, 10)] == [StageStatus[name] for name in expected.split()]


def test_running_stages_stay_and_a_much_better_path_wins() -> None:
    host = node(1, 40, serving=(Serving(BIG.fingerprint, (node_id(2),), True),))
    old, new = node(2, 30, {1: 20.0}), node(3, 30, {1: 16.0})
    assert place_model(BIG, view(host, old, new)).groups[0].stages == (node_id(2),)
    assert place_model(BIG, view(host, old, replace(new, rtts_ms={node_id(1): 2.0}))).groups[0].stages == (node_id(3),)
    farther = replace(old, rtts_ms={node_id(1): 95.0})
    assert place_model(BIG, view(host, farther)).groups[0].stages == (node_id(2),)
    assert not place_model(BIG, view(host, replace(old, rtts_ms={node_id(1): 120.0}))).groups


def test_running_split_keeps_its_host_when_an_equal_or_larger_one_comes() -> None:
    host = node(2, 40, {1: 5.0}, serving=(Serving(BIG.fingerprint, (node_id(1),), False),))
    mesh = view(node(1, 40), host, node(3, 45, {1: 5.0, 2: 5.0}))
    assert place_model(BIG, mesh).groups[0].nodes == (node_id(2), node_id(1))
    assert place_model(BIG, view(*mesh.values(), node(4, 60, {2: 5.0}))).groups[0].nodes == (node_id(4),)
    assert place_model(BIG, view(mesh[node_id(2)], mesh[node_id(3)])).groups[0].host == node_id(3)


def test_host_needs_the_file_and_a_stage_does_not() -> None:
    nodes = [node(1, 40, {2: 1.0}), node(2, 45, models=(), wants=())]
    group = place_model(BIG, view(*nodes)).groups[0]
    assert (group.host, group.stages) == (node_id(1), (node_id(2),))
    assert place_model(BIG, view(nodes[1])).reasons == {node_id(2): StageStatus.NO_MODEL}


@st.composite
def meshes(draw: st.DrawFn) -> dict[str, Announcement]:
    nodes = []
    for i in range(draw(st.integers(1, 7))):
        rtts = {k: draw(st.sampled_from([1.0, 20.0, 79.0, 90.0])) for k in range(i) if draw(st.integers(0, 4))}
        serving: tuple[Serving, ...] = ()
        if draw(st.integers(0, 3)) == 0:
            stages = tuple(node_id(k) for k in draw(st.sets(st.integers(0, 6), max_size=3)) if k != i)
            serving = (Serving(BIG.fingerprint, stages, True),)
        nodes.append(
            node(
                i,
                draw(st.integers(0, 70)),
                rtts,
                role=draw(st.sampled_from([Role.WORKER, Role.WORKER, Role.WORKER, Role.CLIENT])),
                ggml_version=draw(st.sampled_from(["e", "e", "e", "f"])),
                models=(BIG,) if draw(st.integers(0, 3)) else (),
                wants=(BIG,) if i == 0 or draw(st.booleans()) else (),
                split=draw(st.integers(0, 5)) == 0,
                serving=serving,
            )
        )
    return view(*nodes)


@settings(max_examples=400, deadline=None)
@given(meshes(), st.randoms())
def test_plan_is_sound(mesh: dict[str, Announcement], rng: random.Random) -> None:
    shuffled = list(mesh.items())
    rng.shuffle(shuffled)
    assignments = place_models(mesh)
    # the same on every node, in whatever order it learnt of the others
    assert assignments == place_models(dict(shuffled))
    for placement in assignments:
        assert placement.reasons.keys() == mesh.keys()
        need = needed_bytes(placement.model.size_bytes)
        forced = any(n.split and n.role is Role.WORKER for n in mesh.values())
        for group in placement.groups:
            memory = [mesh[i].memory_bytes for i in (*group.stages, group.host)]
            assert len(set(group.nodes)) == len(group.nodes) and sum(memory) >= need
            assert abs(sum(group.shares) - 1) < 1e-9
            for share, cap in zip(group.shares, memory, strict=True):
                assert share * need <= cap * (1 + 1e-9)
            for stage in group.stages:
                rtts = [mesh[stage].rtts_ms.get(group.host), mesh[group.host].rtts_ms.get(stage)]
                known = [r for r in rtts if r is not None]
                running = {s for entry in mesh[group.host].serving for s in entry.stages}
                assert known and max(known) <= (100.0 if stage in running else MAX_RTT_MS)
                assert mesh[stage].role is Role.WORKER and mesh[stage].ggml_version == mesh[group.host].ggml_version
            if group.stages and not forced:
                assert mesh[group.host].memory_bytes < need  # never a split where one suffices
                assert fewest(placement, mesh, group.host) == len(group.stages)


def fewest(placement: object, mesh: dict[str, Announcement], host: str) -> int:
    """By trying all sets."""
    reasons = placement.reasons  # type: ignore[attr-defined]
    usable = [i for i, why in reasons.items() if why in (StageStatus.STAGE, StageStatus.NOT_NEEDED)]
    missing = needed_bytes(BIG.size_bytes) - mesh[host].memory_bytes
    for n in range(len(usable) + 1):
        if any(sum(mesh[i].memory_bytes for i in c) >= missing for c in itertools.combinations(usable, n)):
            return n
    raise AssertionError("no set suffices")
