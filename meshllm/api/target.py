"""What the endpoint asks of whoever knows the servers: where a request goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from meshllm.api.latencies import Latencies
from meshllm.api.routing import Load, RequestInfo
from meshllm.mesh.engine_status import EngineStatus


@dataclass(frozen=True)
class Upstream:
    """A server for one request, at a Unix socket, with its `load`. `headers` go with the request."""

    socket: Path
    load: Load
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """A model that is ready, for the list of models."""

    name: str
    fingerprint: str
    size_bytes: int
    n_layers: int


class Target(Protocol):
    """Who serves requests now."""

    def reason_for(self, info: RequestInfo) -> str:
        """Why nobody serves it."""
        ...

    async def acquire(self, info: RequestInfo, timeout_s: float, is_new: bool) -> Upstream | None:
        """Waits for a server; None when there will be none in time. Raises UnknownModelError.

        `is_new`: the request counts as demand for its model; not when it is tried again or asks for no answer.
        """
        ...

    def failure_passes(self) -> bool:
        """Whether an engine that answers 500 has lost a machine which others will replace."""
        ...


class PublicTarget(Target, Protocol):
    """What the endpoint of people and programs asks."""

    @property
    def latencies(self) -> Latencies:
        """Of POST requests at this endpoint."""
        ...

    def served(self) -> list[Served]: ...

    def describe(self) -> object:
        """What GET /mesh/status answers: a record that JSON can be made of."""
        ...


class PeerTarget(Target, Protocol):
    """What the endpoint of other nodes asks: of the engine of this one."""

    @property
    def busy(self) -> int:
        """Requests that its engine is working on."""
        ...

    def describe_engine(self) -> EngineStatus | None: ...
