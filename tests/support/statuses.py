"""A status with something in every field, for what is made from one."""

from __future__ import annotations

from dataclasses import fields, replace

from meshllm.api.latencies import Latencies
from meshllm.mesh.announcement import Announcement, ModelInfo, Need, Serving
from meshllm.mesh.engine_status import (
    EngineHost,
    EngineModel,
    EngineStage,
    EngineStatus,
    SpeculationStatus,
    StageCounters,
    Tokens,
)
from meshllm.mesh.groups import Group, Placement, StageStatus
from meshllm.node.status import API, CountStatus, FullStatus, model_status, node_status

ME, PEER, LATE = "a" * 64, "b" * 64, "c" * 64
SMALL, BIG = ModelInfo("small-Q4_0", "1" * 64, 10**9, 8), ModelInfo("big-Q4_0", "2" * 64, 9 * 10**9, 80)


def full_status() -> FullStatus:
    """This node is host of SMALL with PEER as its stage; BIG waits for memory, and LATE fetches it."""
    latencies = Latencies()
    latencies.answer.observe(0.2)
    me = Announcement(ME, 1, "me", memory_bytes=2 * 10**9, serving=(Serving(SMALL.fingerprint, (PEER,), True),))
    peer = node_status(Announcement(PEER, 1, "peer", memory_bytes=10**9, device="CPU"), "alive", None)
    peer = replace(peer, address="10.0.0.2:7", bytes_sent=5_000_000, bytes_received=7_000_000, rtt_ms=12.5)
    late = node_status(Announcement(LATE, 1, "late", fetching={BIG.fingerprint: 0.25}), "suspect", None)
    zeros = StageCounters(*(0 for _ in fields(StageCounters)))
    counters = replace(zeros, blocking_waits=3, wait_ns=10**9, weight_bytes_local=4 * 10**8, pushes=6, relays=1)
    group = Group(SMALL, ME, (PEER,), (0.5, 0.5), (10**9, 2 * 10**9))
    reasons = {ME: StageStatus.HOST, PEER: StageStatus.STAGE}
    served = Placement(SMALL, (group,), Need(0, 11 * 10**8, 0, 0), group.memory, reasons)
    waiting = Placement(BIG, (), Need(0, 10 * 10**9, 0, 0), (10**9, 2 * 10**9), {LATE: StageStatus.FETCHING})
    return FullStatus(
        api=API,
        version="1.2.3",
        node_id=ME,
        mesh_id="cd" * 16,
        port=7,
        nodes=(node_status(me, "alive", None), peer, late),
        models=(model_status(served), model_status(waiting)),
        served=(SMALL.name,),
        dropped=(),
        engine=EngineStatus(
            state="ready",
            reason="",
            restarts=2,
            model=EngineModel(SMALL.name, SMALL.size_bytes, SMALL.n_layers),
            host=EngineHost("CPU", 4),
            stages=(EngineStage("peer", "/s", "peer:1", 0, "CPU", 4, True, 5 * 10**8, counters),),
            n_ctx=512,
            tokens=Tokens(10, 20),
            tokens_per_s=40.0,
            speculation=SpeculationStatus("ngram", 8, 12, 6, 3.0),
        ),
        device_server={},
        reason="",
        counts=CountStatus(1, 4),
        latencies=latencies.status(),
        engines={},
        api_port=9337,
        agents=(),
    )
