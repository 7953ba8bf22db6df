"""Who serves what: from the view of the mesh to one group per model. A pure function, the same on every node.

A model that fits on one machine is served there, whole, by every machine that was asked for it. One that does not is
split: the machine with most memory among those that have its file is the host, and takes in the fewest others with
which the model fits, the nearest such set. What runs already stays as it is while it can.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from meshllm.mesh.announcement import Announcement, ModelInfo, Role, Serving

MAX_RTT_MS = 80.0
_KEEP_RTT_MS = 100.0  # a stage that works is not sent away for a little more
_ROOM = 1.1  # a model needs its size and a tenth
_BETTER = 0.7  # a new set of stages is worth a restart when its farthest is this much nearer


class Why(enum.StrEnum):
    """Why a node is, or is not, a stage of a model."""

    HOST = "host"
    STAGE = "stage"
    NOT_NEEDED = "not needed"
    CLIENT = "API client only"
    OTHER_ENGINE = "another engine version"
    UNKNOWN_RTT = "unknown RTT"
    TOO_FAR = "too far"
    NO_MEMORY = "no memory"
    NO_MODEL = "the model is not on its disk"


@dataclass(frozen=True)
class Group:
    """The machines that serve one model. `shares` of the layers: one per stage and, last, the host's; sum 1."""

    model: ModelInfo
    host: str
    stages: tuple[str, ...]
    shares: tuple[float, ...]
    memory_bytes: int  # of all of them

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.host, *self.stages)


@dataclass(frozen=True)
class Assignment:
    """What becomes of one model: groups that serve it, or how much memory is missing."""

    model: ModelInfo
    groups: tuple[Group, ...]
    need_bytes: int
    have_bytes: int  # of all that could take part
    reasons: Mapping[str, Why] = field(default_factory=dict)  # every node of the view

    def group_of(self, host: str) -> Group | None:
        return next((g for g in self.groups if g.host == host), None)


def wanted_models(view: Mapping[str, Announcement]) -> list[ModelInfo]:
    """What anybody asked for, each once, in the order of fingerprints."""
    models = {model.fingerprint: model for _, node in sorted(view.items()) for model in node.wants}
    return [models[key] for key in sorted(models)]


def make_plan(view: Mapping[str, Announcement]) -> list[Assignment]:
    """One assignment per wanted model."""
    return [assign(model, view) for model in wanted_models(view)]


def assign(model: ModelInfo, view: Mapping[str, Announcement]) -> Assignment:
    need = needed_bytes(model)
    workers = {i: n for i, n in sorted(view.items()) if n.role is Role.WORKER}
    askers = [i for i, n in workers.items() if any(m.fingerprint == model.fingerprint for m in n.wants)]
    force = any(workers[i].split for i in askers)
    able = [i for i in askers if _has(workers[i], model) and workers[i].memory_bytes >= need]
    if able and not force:
        groups = tuple(Group(model, i, (), (1.0,), workers[i].memory_bytes) for i in able)
        reasons = {i: _why_idle(n, model, need) for i, n in view.items()} | dict.fromkeys(able, Why.HOST)
        return Assignment(model, groups, need, groups[0].memory_bytes, reasons)
    return _split(model, view, workers, need, force)


def needed_bytes(model: ModelInfo) -> int:
    return int(model.size_bytes * _ROOM)


def _has(node: Announcement, model: ModelInfo) -> bool:
    return any(m.fingerprint == model.fingerprint for m in node.models)


def _why_idle(node: Announcement, model: ModelInfo, need: int) -> Why:
    if node.role is Role.CLIENT:
        return Why.CLIENT
    if not _has(node, model):
        return Why.NO_MODEL
    return Why.NOT_NEEDED if node.memory_bytes >= need else Why.NO_MEMORY


def _split(
    model: ModelInfo, view: Mapping[str, Announcement], workers: Mapping[str, Announcement], need: int, force: bool
) -> Assignment:
    owners = [i for i, n in workers.items() if _has(n, model) and n.memory_bytes > 0]
    if not owners:
        nobody = {i: Why.CLIENT if n.role is Role.CLIENT else Why.NO_MODEL for i, n in view.items()}
        return Assignment(model, (), need, 0, nobody)
    host = _elect(owners, workers, model, need, force)
    running = _running(workers[host], model)
    reasons = _reasons(view, workers[host], running)
    candidates = {i: _rtt(workers[host], workers[i]) or 0.0 for i, why in reasons.items() if why is Why.NOT_NEEDED}
    missing = need - workers[host].memory_bytes
    have = workers[host].memory_bytes + sum(workers[i].memory_bytes for i in candidates)
    limit = model.n_layers  # every stage takes a layer at least
    memory = {i: workers[i].memory_bytes for i in candidates}
    if force:
        stages: list[str] | None = sorted(candidates, key=lambda i: (candidates[i], i))[:limit]
        if missing > sum(memory[i] for i in stages or ()):
            stages = None
    else:
        stages = choose_stages(missing, candidates, memory, limit)
    if stages is not None and running is not None and (not force or set(running.stages) == set(stages)):
        stages = _keep(stages, running, missing, candidates, memory)
    if stages is None:
        return Assignment(model, (), need, have, reasons)
    reasons |= dict.fromkeys(stages, Why.STAGE)
    group = _group(model, host, stages, workers)
    return Assignment(model, (group,), need, have, reasons)


def _elect(owners: Sequence[str], workers: Mapping[str, Announcement], model: ModelInfo, need: int, force: bool) -> str:
    """Most memory wins; between equals who is host already, then the smaller id. A split that works keeps its host."""
    best = min(owners, key=lambda i: (-workers[i].memory_bytes, _running(workers[i], model) is None, i))
    if workers[best].memory_bytes >= need and not force:
        return best
    for i in sorted(owners, key=lambda i: (-workers[i].memory_bytes, i)):
        running = _running(workers[i], model)
        if running and all(s in workers for s in running.stages):
            memory = sum(workers[s].memory_bytes for s in (i, *running.stages))
            reasons = _reasons(workers, workers[i], running)
            if memory >= need and all(reasons[s] is Why.NOT_NEEDED for s in running.stages):
                return i
    return best


def _reasons(view: Mapping[str, Announcement], host: Announcement, running: Serving | None) -> dict[str, Why]:
    """For everybody but the host whether it could be a stage: NOT_NEEDED, or why not."""
    reasons: dict[str, Why] = {}
    for node_id, node in view.items():
        limit = _KEEP_RTT_MS if running and node_id in running.stages else MAX_RTT_MS
        reasons[node_id] = Why.HOST if node_id == host.node_id else _why_not(node, host, limit)
    return reasons


def _running(host: Announcement, model: ModelInfo) -> Serving | None:
    return next((s for s in host.serving if s.fingerprint == model.fingerprint), None)


def _rtt(a: Announcement, b: Announcement) -> float | None:
    """In milliseconds, as either side has measured it; the larger where both have."""
    known = [r for r in (a.rtts_ms.get(b.node_id), b.rtts_ms.get(a.node_id)) if r is not None]
    return max(known, default=None)


def _why_not(node: Announcement, host: Announcement, limit_ms: float) -> Why:
    """NOT_NEEDED when it could be a stage. The distance counts before the memory."""
    if node.role is Role.CLIENT:
        return Why.CLIENT
    if node.engine != host.engine:
        return Why.OTHER_ENGINE
    rtt_ms = _rtt(host, node)
    if rtt_ms is None:
        return Why.UNKNOWN_RTT
    if rtt_ms > limit_ms:
        return Why.TOO_FAR
    return Why.NOT_NEEDED if node.memory_bytes > 0 else Why.NO_MEMORY


def choose_stages(
    missing_bytes: int, rtts_ms: Mapping[str, float], memory_bytes: Mapping[str, int], limit: int
) -> list[str] | None:
    """The fewest that hold what the host cannot, and of such sets one whose farthest is nearest; nearest first.

    None when all together are too small.
    """
    if missing_bytes <= 0:
        return []
    by_memory = sorted(rtts_ms, key=lambda i: (-memory_bytes[i], rtts_ms[i], i))
    total, fewest = 0, 0
    while total < missing_bytes:
        if fewest == min(len(by_memory), limit):
            return None
        total += memory_bytes[by_memory[fewest]]
        fewest += 1
    for radius in sorted(set(rtts_ms.values())):
        near = [i for i in by_memory if rtts_ms[i] <= radius][:fewest]
        if sum(memory_bytes[i] for i in near) >= missing_bytes:
            return sorted(near, key=lambda i: (rtts_ms[i], i))
    return None  # unreachable: the largest radius holds `fewest`


def _keep(
    stages: list[str],
    running: Serving,
    missing_bytes: int,
    rtts_ms: Mapping[str, float],
    memory_bytes: Mapping[str, int],
) -> list[str]:
    """The running stages where they still do and the new ones are not much better."""
    if set(running.stages) == set(stages):
        return list(running.stages)
    if not set(running.stages) <= rtts_ms.keys():
        return stages
    if len(running.stages) > len(stages) or sum(memory_bytes[i] for i in running.stages) < missing_bytes:
        return stages
    farthest_now = max((rtts_ms[i] for i in running.stages), default=0.0)
    farthest_then = max((rtts_ms[i] for i in stages), default=0.0)
    return stages if farthest_then < _BETTER * farthest_now - 2.0 else list(running.stages)


def _group(model: ModelInfo, host: str, stages: Sequence[str], workers: Mapping[str, Announcement]) -> Group:
    memory = [workers[i].memory_bytes for i in (*stages, host)]
    total = sum(memory)
    by_hand = workers[host].tensor_split
    weights: Sequence[float] = by_hand if len(by_hand) == len(memory) and sum(by_hand) > 0 else memory
    return Group(model, host, tuple(stages), tuple(w / sum(weights) for w in weights), total)
