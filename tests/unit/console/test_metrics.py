"""Prometheus' text, read back by Prometheus' own parser."""

from __future__ import annotations

from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families
from support.statuses import PEER, full_status

from meshllm.console.metrics import render
from meshllm.node.status import MeshStatus


def samples(status: MeshStatus) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(render(status).decode()):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sample.labels.items())
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_every_number_of_the_status_is_there() -> None:
    found = samples(full_status())
    peer = f"peer={PEER[:16]}"
    assert found[f"mesh_llm_peer_sent_bytes_total{{{peer}}}"] == 5e6
    assert found[f"mesh_llm_peer_received_bytes_total{{{peer}}}"] == 7e6
    assert found[f"mesh_llm_peer_rtt_seconds{{{peer}}}"] == 0.0125
    assert found["mesh_llm_nodes{state=alive}"] == 2 and found["mesh_llm_nodes{state=suspect}"] == 1
    assert found["mesh_llm_elections_total{}"] == 1 and found["mesh_llm_peer_failures_total{}"] == 4
    assert found["mesh_llm_tokens_total{kind=prompt}"] == 10 and found["mesh_llm_tokens_total{kind=generated}"] == 20
    assert found["mesh_llm_engine_restarts_total{}"] == 2
    assert found["mesh_llm_stage_blocking_waits_total{stage=peer}"] == 3
    assert found["mesh_llm_stage_wait_seconds_total{stage=peer}"] == 1.0
    assert found["mesh_llm_request_answer_seconds_bucket{le=0.25}"] == 1
    assert found["mesh_llm_request_answer_seconds_bucket{le=0.1}"] == 0
    assert found["mesh_llm_request_answer_seconds_count{}"] == 1
    assert found["mesh_llm_request_first_byte_seconds_count{}"] == 0


def test_a_node_without_an_engine_has_no_tokens() -> None:
    found = samples(replace(full_status(), engine=None))
    assert not [name for name in found if "tokens" in name or "stage" in name] and found
