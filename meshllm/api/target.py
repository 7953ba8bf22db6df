"""The interface through which the endpoint finds a server for each request."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from meshllm.api.latencies import Latencies
from meshllm.api.routing import Load, RequestInfo
from meshllm.mesh.announcement import Capability
from meshllm.mesh.engine_status import EngineStatus


@dataclass(frozen=True)
class Upstream:
    """A server for one request, at a Unix socket, with its `load`. `headers` go with the request."""

    socket: Path
    load: Load
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """A model in the list of models: one that is ready."""

    name: str
    fingerprint: str
    size_bytes: int
    n_layers: int
    has_projector: bool = False  # takes images or sounds
    capability: Capability = Capability.COMPLETION


class Target(Protocol):
    """Knows which servers are ready."""

    def reason_for(self, info: RequestInfo) -> str:
        """Why no server takes the request."""
        ...

    async def acquire(self, info: RequestInfo, timeout_s: float, is_new: bool) -> Upstream | None:
        """Waits for a server; None if there will be none in time. Raises UnknownModelError, or
        WrongModelError for a model that cannot do what the request needs.

        `is_new`: counts the request as demand for its model; False for retries and for requests that generate nothing.
        """
        ...

    def failure_passes(self) -> bool:
        """Whether a 500 from the engine means that it lost a stage, so that another attempt may succeed."""
        ...


class PublicTarget(Target, Protocol):
    """For the endpoint of users."""

    @property
    def latencies(self) -> Latencies:
        """Of POST requests."""
        ...

    def served(self) -> list[Served]: ...

    def describe(self) -> object:
        """The answer to GET /mesh/status, a record that orjson can encode."""
        ...


class PeerTarget(Target, Protocol):
    """For the endpoint of other nodes, which reaches this node's engine only."""

    @property
    def busy(self) -> int:
        """Requests in work at the engine."""
        ...

    def describe_engine(self) -> EngineStatus | None: ...
