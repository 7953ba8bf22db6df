"""The status of a node, as `mesh-llm status --json`, GET /mesh/status and the dashboard give it; docs/api.md.

Its JSON is that of these records. Fields may be added; one that goes or changes its meaning needs a new `API`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshllm.api.latencies import LatencyStatus
from meshllm.mesh.announcement import Announcement, Serving
from meshllm.mesh.engine_status import EngineStatus, EngineSummary
from meshllm.mesh.groups import Group, Placement
from meshllm.quic.transport import Link

API = 1


@dataclass(frozen=True)
class NodeStatus:
    """A node, and the link to it: `rtt_ms` and `address` are None without one."""

    id: str
    name: str
    role: str
    state: str
    device: str
    memory_bytes: int
    engine: str  # version of ggml; its name belongs to API 1
    requests_per_min: Mapping[str, float]
    models: tuple[str, ...]
    fetching: Mapping[str, float]
    rtt_ms: float | None
    address: str | None
    bytes_sent: int
    bytes_received: int
    serving: tuple[Serving, ...]


@dataclass(frozen=True)
class GroupStatus:
    host: str
    stages: tuple[str, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class ModelStatus:
    """A model that is wanted in the mesh. `reasons`: node id to what the node is to it, or why it is no stage."""

    name: str
    fingerprint: str
    size_bytes: int
    need_bytes: int
    have_bytes: int
    groups: tuple[GroupStatus, ...]
    reasons: Mapping[str, str]


@dataclass(frozen=True)
class CountStatus:
    elections: int
    failures: int


@dataclass(frozen=True)
class MeshStatus:
    """The mesh as one node sees it."""

    api: int
    version: str
    node_id: str
    mesh_id: str
    port: int
    nodes: tuple[NodeStatus, ...]
    models: tuple[ModelStatus, ...]
    served: tuple[str, ...]
    dropped: tuple[str, ...]
    engine: EngineStatus | None
    device_server: Mapping[str, int]
    reason: str
    counts: CountStatus
    latencies: LatencyStatus


@dataclass(frozen=True)
class Snippet:
    """Something to copy from the dashboard."""

    title: str
    text: str


@dataclass(frozen=True)
class FullStatus(MeshStatus):
    """With what takes questions to other nodes, and what only the command knows."""

    engines: Mapping[str, EngineSummary]
    api_port: int
    agents: tuple[Snippet, ...]


def node_status(node: Announcement, state: str, link: Link | None) -> NodeStatus:
    return NodeStatus(
        id=node.node_id,
        name=node.name,
        role=str(node.role),
        state=state,
        device=node.device,
        memory_bytes=node.memory_bytes,
        engine=node.ggml_version,
        requests_per_min=node.requests_per_min,
        models=tuple(model.name for model in node.models),
        fetching=node.fetching,
        rtt_ms=round(link.rtt_s * 1000, 1) if link and link.rtt_s is not None else None,
        address=link.peer_address if link else None,
        bytes_sent=link.bytes_sent if link else 0,
        bytes_received=link.bytes_received if link else 0,
        serving=node.serving,
    )


def model_status(placement: Placement) -> ModelStatus:
    model = placement.model
    return ModelStatus(
        name=model.name,
        fingerprint=model.fingerprint,
        size_bytes=model.size_bytes,
        need_bytes=placement.need_bytes,
        have_bytes=sum(placement.have_bytes),
        groups=tuple(_group_status(group) for group in placement.groups),
        reasons={node_id: str(reason) for node_id, reason in placement.reasons.items()},
    )


def _group_status(group: Group) -> GroupStatus:
    return GroupStatus(group.host, group.stages, tuple(round(share, 3) for share in group.shares))
