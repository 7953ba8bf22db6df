"""What other nodes answer about their engines is untrusted."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshllm.errors import ProtocolError
from meshllm.mesh.engine_status import (
    EngineHost,
    EngineModel,
    EngineStage,
    EngineStatus,
    EngineSummary,
    SpeculationStatus,
    StageCounters,
    Tokens,
    decode_engine,
    summarize,
)

N_COUNTERS = len(dataclasses.fields(StageCounters))
COUNTERS = StageCounters(*range(N_COUNTERS))
STAGE = EngineStage("s", "unix:/s", "unix:s", 0, "CPU", 15, True, 1000, COUNTERS)
SPECULATION = SpeculationStatus("draft", 8, 100, 60, 2.5)
STATUS = EngineStatus(
    "ready", "", 0, EngineModel("m", 98, 30), EngineHost("CPU", 1), (STAGE,), 4096, Tokens(5, 7), 12.5, SPECULATION
)

texts = st.text(max_size=100)
counts = st.integers(0, 1 << 60)
rates = st.floats(0, 1e9)
stages = st.builds(
    EngineStage, texts, texts, texts, counts, texts, counts, st.booleans(), counts, st.none() | st.just(COUNTERS)
)
statuses = st.builds(
    EngineStatus,
    texts,
    texts,
    counts,
    st.builds(EngineModel, texts, counts, counts),
    st.builds(EngineHost, texts, counts),
    st.lists(stages, max_size=5).map(tuple),
    counts,
    st.builds(Tokens, counts, counts),
    rates,
    st.none() | st.builds(SpeculationStatus, texts, counts, counts, counts, rates),
)
json = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def check_bounds(summary: EngineSummary) -> None:
    for text in (summary.state, summary.model.name, summary.speculation.draft if summary.speculation else ""):
        assert len(text) <= 80
    assert len(summary.stage_layers) == len(summary.stage_loaded) <= 64
    assert all(0 <= part <= 1 for part in summary.stage_loaded)
    assert 0 <= summary.tokens_per_s < float("inf")
    numbers = (summary.n_ctx, summary.host_layers, *summary.stage_layers, *dataclasses.astuple(summary.tokens))
    assert all(type(number) is int and 0 <= number <= 1 << 60 for number in numbers)


@given(statuses)
def test_every_status_can_be_summarized(status: EngineStatus) -> None:
    summary = summarize(status)
    check_bounds(summary)
    assert summary.stage_layers == tuple(stage.n_layers for stage in status.stages)
    assert summary.tokens == status.tokens and summary.n_ctx == status.n_ctx


def test_the_part_of_the_weights_that_a_stage_has() -> None:
    def part(weight_bytes: int, counters: StageCounters | None) -> float:
        stage = dataclasses.replace(STAGE, weight_bytes=weight_bytes, counters=counters)
        return summarize(dataclasses.replace(STATUS, stages=(stage,))).stage_loaded[0]

    half = dataclasses.replace(COUNTERS, weight_bytes_local=300, weight_bytes_sent=200)
    assert [part(1000, None), part(1000, half), part(100, half), part(0, half)] == [0, 0.5, 1.0, 1.0]


def test_a_newer_node_may_send_more_fields() -> None:
    body = orjson.loads(orjson.dumps(STATUS)) | {"new": [1, 2, 3]}
    assert decode_engine(orjson.dumps(body)) == summarize(STATUS)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for key, part in inner for p in _paths(part, (*path, key)))]


BODY = orjson.loads(orjson.dumps(STATUS))


@given(st.sampled_from(_paths(BODY)), json)
def test_one_thing_replaced_is_refused_or_stays_in_bounds(path: tuple[Any, ...], value: Any) -> None:
    body = orjson.loads(orjson.dumps(BODY))
    place: Any = {"": body}
    for key in ("", *path)[:-1]:
        place = place[key]
    place[("", *path)[-1]] = value
    if not path:
        body = value
    with contextlib.suppress(ProtocolError):
        check_bounds(decode_engine(orjson.dumps(body)))


@given(st.binary(max_size=200))
def test_bytes_that_are_not_json_are_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed"):
        decode_engine(body)


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-1", b"1e400", b"9" * 400, b"true", b'"1"', b"null"])
def test_numbers_that_are_none_are_refused(number: bytes) -> None:
    body = orjson.dumps(STATUS)
    for field in (b'"n_ctx":4096', b'"tokens_per_s":12.5'):
        assert field in body
        with pytest.raises(ProtocolError, match="malformed"):
            decode_engine(body.replace(field, field.partition(b":")[0] + b":" + number))


def test_too_many_stages_are_refused() -> None:
    with pytest.raises(ProtocolError, match="stages"):
        decode_engine(orjson.dumps(dataclasses.replace(STATUS, stages=(STAGE,) * 65)))
