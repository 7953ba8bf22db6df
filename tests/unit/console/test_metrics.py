"""Prometheus' text, read back by Prometheus' own parser."""

from __future__ import annotations

from dataclasses import fields, replace

from prometheus_client.parser import text_string_to_metric_families

from meshllm.api.latencies import Latencies
from meshllm.console.metrics import render
from meshllm.mesh.announcement import Announcement
from meshllm.mesh.engine_status import EngineHost, EngineModel, EngineStage, EngineStatus, StageCounters, Tokens
from meshllm.node.status import API, CountStatus, MeshStatus, node_status

ME, PEER = "a" * 64, "b" * 64


def mesh_status() -> MeshStatus:
    latencies = Latencies()
    latencies.answer.observe(0.2)
    peer = node_status(Announcement(PEER, 1, "peer"), "alive", None)
    peer = replace(peer, address="10.0.0.2:7", bytes_sent=5, bytes_received=7, rtt_ms=12.5)
    zeros = StageCounters(*(0 for _ in fields(StageCounters)))
    counters = replace(zeros, blocking_waits=3, wait_ns=10**9)
    stage = EngineStage("far", "/s", "far:1", 0, "CPU", 4, True, 1000, counters)
    return MeshStatus(
        api=API,
        version="0",
        node_id=ME,
        mesh_id="cd" * 16,
        port=7,
        nodes=(node_status(Announcement(ME, 1, "me"), "alive", None), peer),
        models=(),
        served=(),
        dropped=(),
        engine=EngineStatus(
            state="ready",
            reason="",
            restarts=2,
            model=EngineModel("m", 1, 4),
            host=EngineHost("CPU", 0),
            stages=(stage,),
            n_ctx=512,
            tokens=Tokens(10, 20),
            tokens_per_s=40.0,
            speculation=None,
        ),
        device_server={},
        reason="",
        counts=CountStatus(1, 4),
        latencies=latencies.status(),
    )


def samples(status: MeshStatus) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(render(status).decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_every_number_of_the_status_is_there() -> None:
    found = samples(mesh_status())
    peer = f"peer={PEER[:16]}"
    assert found[f"mesh_llm_peer_sent_bytes_total{{{peer}}}"] == 5
    assert found[f"mesh_llm_peer_received_bytes_total{{{peer}}}"] == 7
    assert found[f"mesh_llm_peer_rtt_seconds{{{peer}}}"] == 0.0125
    assert found["mesh_llm_nodes{state=alive}"] == 2
    assert found["mesh_llm_elections_total{}"] == 1 and found["mesh_llm_peer_failures_total{}"] == 4
    assert found["mesh_llm_tokens_total{kind=prompt}"] == 10 and found["mesh_llm_tokens_total{kind=generated}"] == 20
    assert found["mesh_llm_engine_restarts_total{}"] == 2
    assert found["mesh_llm_stage_blocking_waits_total{stage=far}"] == 3
    assert found["mesh_llm_stage_wait_seconds_total{stage=far}"] == 1.0
    assert found["mesh_llm_request_answer_seconds_bucket{le=0.25}"] == 1
    assert found["mesh_llm_request_answer_seconds_bucket{le=0.1}"] == 0
    assert found["mesh_llm_request_answer_seconds_count{}"] == 1
    assert found["mesh_llm_request_first_byte_seconds_count{}"] == 0


def test_a_node_without_an_engine_has_no_tokens() -> None:
    found = samples(replace(mesh_status(), engine=None))
    assert not [name for name in found if "tokens" in name or "stage" in name] and found
