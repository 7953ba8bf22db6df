"""Where a model would be served, and with which context, before any machine has loaded it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshllm.engine.fit import Fit, best_fit, need, what_fits
from meshllm.engine.memory import ModelMemory
from meshllm.errors import MeshLlmError
from meshllm.mesh.announcement import Announcement, ModelInfo
from meshllm.mesh.groups import Placement, place_model


@dataclass(frozen=True)
class Machine:
    """`memory_bytes` that it would announce; `rtt_ms` to each of the others, None if it is not known."""

    name: str
    memory_bytes: int
    rtt_ms: float | None = 0.0


@dataclass(frozen=True)
class Outlook:
    """`machines` of the group, the host last, as in `fit`; none if the model is not served. `most`: tokens of context
    that would fit on all machines that can take part, of whatever length; 0 if the model does not fit at all."""

    placement: Placement
    machines: tuple[Machine, ...]
    fit: Fit | None
    most: int


def outlook(model: ModelInfo, memory: ModelMemory, host_min: int, machines: Sequence[Machine], min_ctx: int) -> Outlook:
    """As these machines would decide if each had the file. `host_min`: layers that only the host can have."""
    view = _view(model, memory, host_min, machines, min_ctx)
    placement = place_model(model, view, set(view))
    by_id = {node_id: machine for (node_id, _), machine in zip(view.items(), machines, strict=True)}
    if not placement.groups:
        *stages, here = placement.have_bytes or (0,)
        return Outlook(placement, (), None, what_fits(memory, stages, here, host_min))
    group = placement.groups[0]
    fit = best_fit(memory, group.memory[:-1], group.memory[-1], min_ctx, host_min)
    return Outlook(placement, tuple(by_id[i] for i in (*group.stages, group.host)), fit, fit.n_ctx if fit else 0)


def _view(
    model: ModelInfo, memory: ModelMemory, host_min: int, machines: Sequence[Machine], min_ctx: int
) -> dict[str, Announcement]:
    if len({machine.name for machine in machines}) < len(machines):
        raise MeshLlmError("two machines have the same name")
    ids = [f"{i:064x}" for i in range(len(machines))]
    needs = {model.fingerprint: need(memory, memory.least_ctx(min_ctx), host_min)}
    view = {}
    for node_id, machine in zip(ids, machines, strict=True):
        rtts = {i: machine.rtt_ms for i in ids if i != node_id} if machine.rtt_ms is not None else {}
        view[node_id] = Announcement(
            node_id, 1, machine.name, memory_bytes=machine.memory_bytes, models=(model,), needs=needs, rtts_ms=rtts
        )
    return view
