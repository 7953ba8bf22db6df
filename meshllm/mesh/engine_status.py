"""What a host knows of its engine, and how much of that other nodes take over from it. Sans-I/O.

A host answers other nodes with the JSON of `EngineStatus`. They keep an `EngineSummary`, checked field by field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from meshllm.errors import ProtocolError

MAX_ENGINE_BYTES = 1 << 20  # of the JSON that another node answers with
_MAX_TEXT = 80
_MAX_STAGES = 64  # as in announcements
_MAX_NUMBER = 1 << 60

_T = TypeVar("_T")


@dataclass(frozen=True)
class StageCounters:
    """The counters of libggml-mesh for one stage, in the order of csrc/backend/counters.h."""

    frames_sent: int
    frames_received: int
    bytes_sent: int
    bytes_received: int
    blocking_waits: int
    graph_hits: int
    graph_sends: int
    graph_bytes: int
    weight_bytes_sent: int
    weight_bytes_local: int
    pushes: int
    push_bytes: int
    relays: int
    relay_bytes: int
    supports_op_queries: int
    alloc_size_queries: int
    wait_ns: int
    lost: int
    refusals: int = 0


@dataclass(frozen=True)
class EngineModel:
    name: str
    size_bytes: int
    n_layers: int


@dataclass(frozen=True)
class EngineHost:
    device: str
    n_layers: int


@dataclass(frozen=True)
class EngineStage:
    """`counters` is None until the library has written them."""

    name: str
    address: str
    peer_address: str
    device: int
    description: str
    n_layers: int
    has_model: bool
    weight_bytes: int
    counters: StageCounters | None


@dataclass(frozen=True)
class Tokens:
    """Since the node's engine started first."""

    prompt: int = 0
    generated: int = 0


@dataclass(frozen=True)
class SpeculationStatus:
    """`tokens_per_step`: how many tokens a verified batch yields, 1 without drafts; 0 before the first request."""

    draft: str
    n_max: int
    drafted: int
    accepted: int
    tokens_per_step: float


@dataclass(frozen=True)
class EngineStatus:
    state: str
    reason: str
    restarts: int
    model: EngineModel
    host: EngineHost
    stages: tuple[EngineStage, ...]
    n_ctx: int
    tokens: Tokens
    tokens_per_s: float  # of the last answer
    speculation: SpeculationStatus | None


@dataclass(frozen=True)
class EngineSummary:
    """What dashboards show. `stage_loaded`: the part of its weights that each stage has."""

    state: str
    model: EngineModel
    n_ctx: int
    host_layers: int
    stage_layers: tuple[int, ...]
    stage_loaded: tuple[float, ...]
    tokens: Tokens
    tokens_per_s: float
    speculation: SpeculationStatus | None


def summarize(status: EngineStatus) -> EngineSummary:
    return decode_engine(orjson.dumps(status))


def decode_engine(body: bytes) -> EngineSummary:
    """From the JSON of an `EngineStatus`; fields that a summary lacks are ignored. Raises ProtocolError."""
    try:
        return _decode(orjson.loads(body))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"malformed engine status: {error!r}") from None


def _decode(value: Any) -> EngineSummary:
    stages = value["stages"]
    if not isinstance(stages, list) or len(stages) > _MAX_STAGES:
        raise ValueError("stages are not a list, or too many")
    return EngineSummary(
        state=_text(value["state"]),
        model=_model(value["model"]),
        n_ctx=_count(value["n_ctx"]),
        host_layers=_count(value["host"]["n_layers"]),
        stage_layers=_each(stages, lambda stage: _count(stage["n_layers"])),
        stage_loaded=_each(stages, _loaded),
        tokens=Tokens(_count(value["tokens"]["prompt"]), _count(value["tokens"]["generated"])),
        tokens_per_s=_rate(value["tokens_per_s"]),
        speculation=None if value["speculation"] is None else _speculation(value["speculation"]),
    )


def _model(value: Any) -> EngineModel:
    return EngineModel(_text(value["name"]), _count(value["size_bytes"]), _count(value["n_layers"]))


def _speculation(value: Any) -> SpeculationStatus:
    return SpeculationStatus(
        draft=_text(value["draft"]),
        n_max=_count(value["n_max"]),
        drafted=_count(value["drafted"]),
        accepted=_count(value["accepted"]),
        tokens_per_step=_rate(value["tokens_per_step"]),
    )


def _loaded(stage: Any) -> float:
    counters, expected = stage["counters"], _count(stage["weight_bytes"])
    present = _count(counters["weight_bytes_local"]) + _count(counters["weight_bytes_sent"]) if counters else 0
    return round(min(1.0, present / expected), 2) if expected > 0 else 1.0


def _each(values: Sequence[Any], item: Callable[[Any], _T]) -> tuple[_T, ...]:
    return tuple(item(value) for value in values)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a string, or too long")
    return value[:_MAX_TEXT]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MAX_NUMBER:
        raise ValueError("not a count, or out of range")
    return value


def _rate(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= _MAX_NUMBER:
        raise ValueError("not a rate, or out of range")
    return float(value)
