"""What the endpoint asks of whoever knows the servers: where a request goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol

from meshllm.api.latencies import Latencies
from meshllm.api.routing import RequestInfo
from meshllm.mesh.engine_status import EngineStatus


@dataclass(frozen=True)
class Upstream:
    """A server for one request, at a Unix socket. Use as `with` for as long as the request is in work.

    `headers` go with the request; `report` gets what the server says of its load, `failed` is told when it cannot be
    reached or does not answer.
    """

    socket: Path
    headers: dict[str, str] = field(default_factory=dict)
    begin: Callable[[], None] = lambda: None
    end: Callable[[], None] = lambda: None
    report: Callable[[int], None] = lambda _busy: None
    failed: Callable[[], None] = lambda: None

    def __enter__(self) -> Upstream:
        self.begin()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.end()


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

    async def acquire(self, info: RequestInfo, timeout_s: float) -> Upstream | None:
        """Waits for one; None when there will be none in time. Raises UnknownModelError."""
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

    def note_request(self, info: RequestInfo) -> None:
        """A request came that wants a model's answer."""
        ...

    def describe(self) -> object:
        """What GET /mesh/status answers: a record that JSON can be made of."""
        ...


class PeerTarget(Target, Protocol):
    """What the endpoint of other nodes asks: of the engine of this one."""

    @property
    def busy(self) -> int:
        """Requests in work there."""
        ...

    def describe_engine(self) -> EngineStatus | None: ...
