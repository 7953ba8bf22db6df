"""What this node serves as host: the engine of one group, from its start to its last answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from meshllm.api.routing import Load
from meshllm.errors import MeshLlmError
from meshllm.mesh.announcement import ModelInfo, Serving
from meshllm.mesh.groups import Group
from meshllm.mesh.mesh import Mesh

if TYPE_CHECKING:
    from meshllm.engine import Engine
    from meshllm.node.worker import Worker


class Hosting:
    """`stage_socket` leads to a peer's device server; `load` is that of the engine here.

    `run` keeps the announcement true until cancelled; `follow` moves to another group.
    """

    def __init__(self, mesh: Mesh, worker: Worker, stage_socket: Callable[[str], Path]) -> None:
        self._mesh, self._worker, self._stage_socket = mesh, worker, stage_socket
        self.load = Load(time.monotonic, self._idle)
        self._group: Group | None = None
        self._engine: asyncio.Task[None] | None = None
        self._draining = False
        self.n_elections = 0

    @property
    def engine(self) -> Engine | None:
        return self._worker.engine

    @property
    def socket(self) -> Path | None:
        """Of the engine, while it takes requests."""
        engine = self.engine
        if engine is None or not self._worker.ready or self._draining or engine.stage_lost:
            return None
        return engine.socket

    @property
    def fingerprint(self) -> str:
        """Of the model that is served, or about to be; "" for none."""
        return self._group.model.fingerprint if self._group else ""

    async def run(self) -> None:
        """Ready is announced when every stage is loaded and the engine answers."""
        while True:
            seen = self._mesh.changes.version
            if self._group:
                self._announce()
            await self._mesh.changes.wait(seen)

    async def follow(self, group: Group | None) -> None:
        """Serves this group, or none. An engine that still works first finishes its requests; then call again."""
        if group == self._group:
            self._draining = False
            self._announce()
            return
        if self._engine and self.load.through_here and self._works():
            self._draining = True
            self._announce()
            return
        if self._engine:
            self._announce(stopping=True)
            await self.stop()
        self._draining, self._group = False, None
        self._announce()
        if group is None or self._still_a_stage(group):
            return  # until the host, which may be draining, has let go: there is a change then
        self._group = group
        self._announce()
        self.n_elections += 1
        stages = [(self._mesh.name_of(i), self._stage_socket(i)) for i in group.stages]
        work = self._worker.serve(group, stages, self._mesh.changes.notify)
        self._engine = asyncio.create_task(work, name="engine")

    async def wait_ended(self) -> None:
        """Until the engine ends by itself; for ever when there is none."""
        await (asyncio.wait({self._engine}) if self._engine else asyncio.Event().wait())

    def take_failure(self) -> ModelInfo | None:
        """The model that the mesh chose and the engine could not run, once. Raises what a model failed with that the
        user named: only then does this node end."""
        if not (self._group and self._engine and self._engine.done()):
            return None
        model, error = self._group.model, self._engine.exception()
        self._engine = self._group = None
        self._announce()
        if error is not None and (not isinstance(error, MeshLlmError) or model in self._worker.named):
            raise error
        self._worker.emit(f"{error}; this node will not serve {model.name} (mesh-llm status shows which nodes do)")
        return model

    async def stop(self) -> None:
        if self._engine:
            self._engine.cancel()
            with contextlib.suppress(asyncio.CancelledError, MeshLlmError):
                await self._engine
            self._engine = None

    def _idle(self) -> None:
        """The last request at the engine here has ended; a new group may wait for that."""
        if self._draining:
            self._mesh.changes.notify()

    def _works(self) -> bool:
        """Whether the engine can finish what it has begun."""
        present = self._mesh.membership.present()
        return self._worker.ready and self._group is not None and all(i in present for i in self._group.nodes)

    def _still_a_stage(self, group: Group) -> bool:
        """Of another host: two models at once may be too much for the device's memory."""
        others = [n for i, n in self._mesh.membership.present().items() if i not in group.nodes]
        return any(self._mesh.me.node_id in serving.stages for n in others for serving in n.serving)

    def _announce(self, stopping: bool = False) -> None:
        group, ready = self._group, self._worker.ready and not self._draining and not stopping
        serving = (Serving(group.model.fingerprint, group.stages, ready),) if group else ()
        if serving != self._mesh.me.serving:
            self._mesh.announce(replace(self._mesh.me, serving=serving))
