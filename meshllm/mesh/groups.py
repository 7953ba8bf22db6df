"""How one model is served: groups of machines, made from the workers that are placed on it (placement.py).

Computed from the view alone, so the same on every node. Workers on which the whole model fits serve it each by
themselves. Otherwise the model is split: the machine with the most memory among those with the file is the host, and
takes the smallest set of stages that suffices, of those the nearest. Running groups are kept as they are while they
can work.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace

from meshllm.mesh.announcement import Announcement, ModelInfo, Need, Role, Serving

MAX_RTT_MS = 80.0
_KEEP_RTT_MS = 100.0  # limit for a running stage, so that small changes of the RTT do not restart the engine
MAX_STAGES = 14  # of one model: ggml schedules over 16 backends (GGML_SCHED_MAX_BACKENDS), HOST and the CPU are two
_ROOM = 1.1  # a model of which nothing else is known needs its size and a tenth
_BETTER, _BETTER_MS = 0.7, 2.0  # other stages are worth a restart if their RTT is below 0.7 of the old, less 2 ms


class StageStatus(enum.StrEnum):
    """A node's part in serving a model, or why it has none."""

    HOST = "host"
    STAGE = "stage"
    NOT_NEEDED = "not needed"
    CLIENT = "API client only"
    OTHER_GGML = "another ggml version"
    UNKNOWN_RTT = "unknown RTT"
    TOO_FAR = "too far"
    NO_MEMORY = "no memory"
    NO_MODEL = "the model is not on its disk"
    FETCHING = "gets the model"
    OTHER_MODEL = "is for another model"


@dataclass(frozen=True)
class Group:
    """Machines that serve one model together. `memory` and `shares` of the layers, whose sum is 1: one for each stage
    and, last, the host's."""

    model: ModelInfo
    host: str
    stages: tuple[str, ...]
    shares: tuple[float, ...] = field(compare=False)  # what runs is not moved for other shares
    memory: tuple[int, ...] = field(compare=False)  # bytes
    by_hand: bool = False  # the shares are the user's

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory)

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.host, *self.stages)


@dataclass(frozen=True)
class Placement:
    """The groups that serve one model, or what it needs and could have."""

    model: ModelInfo
    groups: tuple[Group, ...]
    need: Need
    have_bytes: tuple[int, ...]  # of the stages that could take part, and of the host
    reasons: Mapping[str, StageStatus] = field(default_factory=dict)  # for every node of the view

    @property
    def need_bytes(self) -> int:
        """On all the machines that could take part."""
        return self.need.alone_bytes + self.need.stage_bytes * max(0, len(self.have_bytes) - 1)

    def group_of(self, host: str) -> Group | None:
        return next((g for g in self.groups if g.host == host), None)


def place_model(model: ModelInfo, view: Mapping[str, Announcement], team: Collection[str]) -> Placement:
    """`team`: the workers that are placed on this model."""
    workers = {i: n for i, n in sorted(view.items()) if i in team}
    force = any(n.split for n in workers.values())
    able = [i for i, n in workers.items() if has_model(n, model) and fits_alone(n, model, view)]
    if able and not force:
        groups = tuple(Group(model, i, (), (1.0,), (workers[i].memory_bytes,)) for i in able)
        reasons = {i: _idle_status(n, model, view) for i, n in workers.items()} | dict.fromkeys(able, StageStatus.HOST)
        found = Placement(model, groups, need_of(workers[able[0]], model, view), (groups[0].memory_bytes,), reasons)
    else:
        found = _split(model, workers, view, force)
    others = {
        i: StageStatus.CLIENT if n.role is Role.CLIENT else StageStatus.OTHER_MODEL
        for i, n in view.items()
        if i not in team
    }
    return replace(found, reasons={**others, **found.reasons})


def needed_bytes(size_bytes: int) -> int:
    """Memory that a model of this size needs, on all its machines together, as long as nothing else is known."""
    return int(size_bytes * _ROOM)


def need_of(node: Announcement, model: ModelInfo, view: Mapping[str, Announcement]) -> Need:
    """With this node as host: as it says, or else the most that another one says, or else a guess."""
    if known := node.needs.get(model.fingerprint):
        return known
    others = [need for n in view.values() if (need := n.needs.get(model.fingerprint))]
    projector = node.projectors.get(model.fingerprint)
    guess = Need(0, needed_bytes(model.size_bytes), 0, needed_bytes(projector.size_bytes) if projector else 0)
    return max(others, key=astuple, default=guess)


def fits_alone(node: Announcement, model: ModelInfo, view: Mapping[str, Announcement]) -> bool:
    """Whether the node has the memory to serve the model by itself."""
    return node.memory_bytes >= need_of(node, model, view).alone_bytes


def has_model(node: Announcement, model: ModelInfo) -> bool:
    return any(m.fingerprint == model.fingerprint for m in node.models)


def will_fetch(node: Announcement, model: ModelInfo) -> bool:
    """Whether the node fetches the model's file when it is placed on the model."""
    return node.fetches and not has_model(node, model) and model.fingerprint not in node.cannot_fetch


def _idle_status(node: Announcement, model: ModelInfo, view: Mapping[str, Announcement]) -> StageStatus:
    if not has_model(node, model):
        return StageStatus.FETCHING if will_fetch(node, model) else StageStatus.NO_MODEL
    return StageStatus.NOT_NEEDED if fits_alone(node, model, view) else StageStatus.NO_MEMORY


def _split(
    model: ModelInfo, workers: Mapping[str, Announcement], view: Mapping[str, Announcement], force: bool
) -> Placement:
    needs = {i: need_of(n, model, view) for i, n in workers.items() if has_model(n, model)}
    owners = [i for i, need in needs.items() if workers[i].memory_bytes > need.host_bytes]
    if not owners:
        need = max(needs.values(), key=astuple, default=None) or need_of(next(iter(view.values())), model, view)
        have = tuple(sorted(workers[i].memory_bytes for i in needs)[-1:])
        return Placement(model, (), need, have, {i: _idle_status(n, model, view) for i, n in workers.items()})
    host = _elect(owners, workers, model, needs, force)
    need, running = needs[host], _running(workers[host], model)
    reasons = _reasons(model, workers, workers[host], running, need)
    candidates = {
        i: _rtt(workers[host], workers[i]) or 0.0 for i, why in reasons.items() if why is StageStatus.NOT_NEEDED
    }
    at_host = workers[host].memory_bytes
    missing = need.alone_bytes - at_host
    limit = min(model.n_layers, MAX_STAGES)  # every stage takes at least one layer
    have = (*sorted((workers[i].memory_bytes for i in candidates), reverse=True)[:limit], at_host)
    memory = {i: workers[i].memory_bytes - need.stage_bytes for i in candidates}
    if force:
        stages: list[str] | None = sorted(candidates, key=lambda i: (candidates[i], i))[:limit]
        if missing > sum(memory[i] for i in stages or ()):
            stages = None
    else:
        stages = choose_stages(missing, candidates, memory, limit)
    if stages is not None and running is not None and (not force or set(running.stages) == set(stages)):
        stages = _keep(stages, running, missing, candidates, memory)
    if stages is None:
        return Placement(model, (), need, have, reasons)
    reasons |= dict.fromkeys(stages, StageStatus.STAGE)
    group = _group(model, host, stages, workers, need)
    return Placement(model, (group,), need, have, reasons)


def _elect(
    owners: Sequence[str],
    workers: Mapping[str, Announcement],
    model: ModelInfo,
    needs: Mapping[str, Need],
    force: bool,
) -> str:
    """The owner with the most memory; of equals the present host, or the smaller id. A working split keeps its host."""
    memory = {i: workers[i].memory_bytes for i in owners}
    best = min(owners, key=lambda i: (-memory[i], _running(workers[i], model) is None, i))
    if memory[best] >= needs[best].alone_bytes and not force:
        return best
    for i in sorted(owners, key=lambda i: (-memory[i], i)):
        running = _running(workers[i], model)
        if running and all(s in workers for s in running.stages):
            in_all = memory[i] + sum(workers[s].memory_bytes - needs[i].stage_bytes for s in running.stages)
            reasons = _reasons(model, workers, workers[i], running, needs[i])
            if in_all >= needs[i].alone_bytes and all(reasons[s] is StageStatus.NOT_NEEDED for s in running.stages):
                return i
    return best


def _reasons(
    model: ModelInfo, workers: Mapping[str, Announcement], host: Announcement, running: Serving | None, need: Need
) -> dict[str, StageStatus]:
    """For every worker but the host: NOT_NEEDED if it could be a stage, or why it cannot."""
    reasons: dict[str, StageStatus] = {}
    for node_id, node in workers.items():
        works = running is not None and node_id in running.stages
        if node_id == host.node_id:
            reasons[node_id] = StageStatus.HOST
        elif will_fetch(node, model) and not works:
            reasons[node_id] = StageStatus.FETCHING
        else:
            limit_ms = _KEEP_RTT_MS if works else MAX_RTT_MS
            reasons[node_id] = _stage_status(node, host, limit_ms, need.stage_bytes)
    return reasons


def within_reach(node: Announcement, others: Collection[Announcement]) -> bool:
    """Whether the node may compute together with one of them. True if there are none."""
    return not others or any(_stage_status(node, other, MAX_RTT_MS) is StageStatus.NOT_NEEDED for other in others)


def _running(host: Announcement, model: ModelInfo) -> Serving | None:
    return next((s for s in host.serving if s.fingerprint == model.fingerprint), None)


def _rtt(a: Announcement, b: Announcement) -> float | None:
    """In milliseconds, as measured by either side; the larger if both have."""
    known = [r for r in (a.rtts_ms.get(b.node_id), b.rtts_ms.get(a.node_id)) if r is not None]
    return max(known, default=None)


def _stage_status(node: Announcement, host: Announcement, limit_ms: float, least_bytes: int = 0) -> StageStatus:
    """NOT_NEEDED if the node could be a stage. Distance is checked before memory."""
    if node.ggml_version != host.ggml_version:
        return StageStatus.OTHER_GGML
    rtt_ms = _rtt(host, node)
    if rtt_ms is None:
        return StageStatus.UNKNOWN_RTT
    if rtt_ms > limit_ms:
        return StageStatus.TOO_FAR
    return StageStatus.NOT_NEEDED if node.memory_bytes > least_bytes else StageStatus.NO_MEMORY


def choose_stages(
    missing_bytes: int, rtts_ms: Mapping[str, float], memory_bytes: Mapping[str, int], limit: int
) -> list[str] | None:
    """The smallest set that holds what the host cannot, with the smallest maximal RTT; ordered by RTT.

    None if all together are too small.
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
    """The running stages if they still suffice and the new ones are not much better."""
    if set(running.stages) == set(stages):
        return list(running.stages)
    if not set(running.stages) <= rtts_ms.keys():
        return stages
    if len(running.stages) > len(stages) or sum(memory_bytes[i] for i in running.stages) < missing_bytes:
        return stages
    farthest_now = max((rtts_ms[i] for i in running.stages), default=0.0)
    farthest_then = max((rtts_ms[i] for i in stages), default=0.0)
    return stages if farthest_then < _BETTER * farthest_now - _BETTER_MS else list(running.stages)


def _group(
    model: ModelInfo, host: str, stages: Sequence[str], workers: Mapping[str, Announcement], need: Need
) -> Group:
    memory = [workers[i].memory_bytes for i in (*stages, host)]
    for_layers = [*(n - need.stage_bytes for n in memory[:-1]), memory[-1] - need.host_bytes]
    by_hand = workers[host].tensor_split
    chosen = len(by_hand) == len(memory) and sum(by_hand) > 0
    weights: Sequence[float] = by_hand if chosen else for_layers
    return Group(model, host, tuple(stages), tuple(w / sum(weights) for w in weights), tuple(memory), chosen)
