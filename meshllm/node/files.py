"""The model files of a node: which are on its disk, and fetching the one it needs from peers or the hub."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from meshllm.engine import LeashedProcess
from meshllm.errors import MeshLlmError, ModelError
from meshllm.mesh.announcement import MAX_MODELS, Capability, ModelInfo, ProjectorInfo
from meshllm.mesh.groups import MAX_RTT_MS, has_model, will_fetch
from meshllm.mesh.mesh import Mesh
from meshllm.models.download import can_be_had
from meshllm.models.folders import tidy
from meshllm.models.names import matching
from meshllm.models.projectors import file_name
from meshllm.models.store import Model, Store, load_model
from meshllm.models.transfer import Fetch
from meshllm.paths import models_folder
from meshllm.quic.transport import Stream, StreamKind

_log = logging.getLogger(__name__)

_SCAN_S = 10.0
_ANNOUNCED_STEP = 0.1  # part of a file between two announcements of progress


class ModelFiles:
    """`on_models` is called in a thread when the models on disk have changed. `emit`, `progress`: see Worker."""

    def __init__(
        self,
        mesh: Mesh,
        store: Store,
        leash: Path,
        on_models: Callable[[], None],
        emit: Callable[[str], None],
        progress: Callable[[str], None],
    ) -> None:
        self._mesh, self._store, self._leash = mesh, store, leash
        self._on_models, self._emit, self._progress = on_models, emit, progress
        self._wanted: ModelInfo | None = None
        self._fetch_task: asyncio.Task[None] | None = None
        self._coming: ModelInfo | ProjectorInfo | None = None
        self._wake = asyncio.Event()

    def want(self, model: ModelInfo | None) -> None:
        """The model that this node is placed on now."""
        if model != self._wanted:
            self._wanted = model
            self._wake.set()

    def exclude(self, model: ModelInfo) -> None:
        """Ignores the file of a model that cannot be served from it."""
        self._store.exclude(model.fingerprint)
        self._announce_models()
        self._mark_unavailable(model)

    def _mark_unavailable(self, model: ModelInfo) -> None:
        cannot = (*self._mesh.me.cannot_fetch, model.fingerprint)
        self._mesh.announce(replace(self._mesh.me, cannot_fetch=cannot[-MAX_MODELS:]))

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.to_thread(tidy)
        try:
            while True:
                await self.look()
                await self._update_fetch()
                self._wake.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_SCAN_S):
                        await self._wake.wait()
        finally:
            await self._stop()

    async def look(self) -> None:
        """Rescans the disk."""
        if await asyncio.to_thread(self._store.scan):
            await asyncio.to_thread(self._on_models)
            self._announce_models()

    def _announce_models(self) -> None:
        store = self._store
        self._mesh.announce(
            replace(
                self._mesh.me,
                models=model_infos(store),
                projectors=projector_infos(store),
                capabilities=capabilities(store),
            )
        )

    async def _update_fetch(self) -> None:
        """Fetches the wanted model, or else its projector, and nothing else."""
        wanted = self._wanted if self._wanted and will_fetch(self._mesh.me, self._wanted) else None
        coming = wanted or self._missing_projector()
        if coming == self._coming:
            return
        await self._stop()
        self._coming = coming
        if wanted:
            self._announce_progress(wanted, 0.0)
            self._fetch_task = asyncio.create_task(self._fetch(wanted), name=f"get {wanted.name}")
        elif coming and self._wanted:
            work = self._fetch_projector(self._wanted)
            self._fetch_task = asyncio.create_task(work, name=f"get the projector of {self._wanted.name}")

    def _missing_projector(self) -> ProjectorInfo | None:
        """Of the wanted model, which lies where its projector would: only peers have one, got after the model."""
        model = self._store.models.get(self._wanted.fingerprint) if self._wanted and self._mesh.me.fetches else None
        if model is None or model.projector or Path(model.files[0]).parent != models_folder():
            return None
        assert self._wanted
        known = self._projectors_of_owners(self._wanted) if self._store.takes_projectors else []
        return known[0] if known else None

    async def _fetch_projector(self, model: ModelInfo) -> None:
        await self._projector_from_peers(model)
        await self.look()
        if model.fingerprint in self._mesh.me.projectors:
            self._emit(f"the projector of {model.name} has arrived on this machine; its next start here will use it")

    async def _stop(self) -> None:
        if self._fetch_task:
            self._fetch_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._fetch_task
        self._fetch_task = self._coming = None

    async def _fetch(self, model: ModelInfo) -> None:
        """From near peers, else from the hub, else from far peers."""
        try:
            if not self._owners(model, MAX_RTT_MS) and can_be_had(model.name):
                try:
                    await self.download(model.name)
                except ModelError as error:
                    self._emit(f"{error}; fetching it from the mesh instead")
            if model.fingerprint not in self._store.models:
                await self._projector_from_peers(model)  # before the model, which is served once it is there
                await self._from_peers(model)
            await self.look()
            if model.fingerprint in self._store.models:
                self._emit(f"{model.name} has arrived on this machine")
        except MeshLlmError as error:
            self._emit(f"cannot fetch {model.name}: {error}")
            self._mark_unavailable(model)
        except Exception:  # it must end neither the node nor the search for other models
            _log.exception("internal error, please report it: fetching %s failed", model.name)
            self._mark_unavailable(model)
        finally:
            self._mesh.announce(replace(self._mesh.me, fetching={}))
            self._wake.set()

    async def _projector_from_peers(self, model: ModelInfo) -> None:
        """The nearest owner's, if any has one. A stage needs none, but may become the host later."""
        known = self._projectors_of_owners(model)
        name = file_name(model.name)
        if not known or (models_folder() / name).exists():
            return
        projector, shown = known[0], f"the projector of {model.name}"

        def owners() -> list[str]:
            present = self._mesh.membership.present()
            return [i for i in self._owners(model) if present[i].projectors.get(model.fingerprint) == projector]

        def progress(done: int, total: int) -> None:
            self._progress(f"fetching {shown} from the mesh: {100 * done // total}%")

        wanted = ModelInfo(shown, projector.fingerprint, projector.size_bytes, 1)
        try:
            await Fetch(wanted, owners, self._open, progress, name).run()
        except MeshLlmError as error:
            self._emit(f"{error}; {model.name} will take no images here")

    def _projectors_of_owners(self, model: ModelInfo) -> list[ProjectorInfo]:
        """Nearest first."""
        present = self._mesh.membership.present()
        return [p for i in self._owners(model) if (p := present[i].projectors.get(model.fingerprint))]

    async def _from_peers(self, model: ModelInfo) -> None:
        announced = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal announced
            self._progress(f"fetching {model.name} from the mesh: {100 * done // total}%")
            if done / total >= announced + _ANNOUNCED_STEP:
                announced = done / total
                self._announce_progress(model, announced)

        fetch = Fetch(model, lambda: self._owners(model), self._open, progress)
        await fetch.run()

    def _announce_progress(self, model: ModelInfo, part: float) -> None:
        self._mesh.announce(replace(self._mesh.me, fetching={model.fingerprint: round(part, 2)}))

    async def _open(self, node_id: str) -> Stream:
        return await self._mesh.open(node_id, StreamKind.TRANSFER)

    def _owners(self, model: ModelInfo, limit_ms: float = float("inf")) -> list[str]:
        """Peers that have the model, nearest first."""
        me = self._mesh.me
        present = self._mesh.membership.present()
        owners = [i for i, n in present.items() if i != me.node_id and has_model(n, model)]
        distance = {i: me.rtts_ms.get(i, 1e6) for i in owners}
        return sorted((i for i in owners if distance[i] <= limit_ms), key=lambda i: (distance[i], i))

    async def obtain(self, name: str, missing: ModelError) -> ModelInfo:
        """Finds a model that the user named: a member of the mesh has it, or the hub. Raises ModelError."""
        nodes = self._mesh.membership.present().values()
        known = {m.name: m for n in nodes for m in (*n.wants, *n.models)}
        if found := matching(name, known):
            return known[found[0]]
        if not can_be_had(name):
            raise ModelError(f"{missing}; no node of this mesh has it either")
        return model_info(await self.download(name))

    async def download(self, name: str) -> Model:
        """From the hub, in a child process that ends with this one. Raises ModelError."""
        self._emit(f"downloading {name}")
        argv = [sys.executable, "-m", "meshllm", "download", name]
        process = LeashedProcess(self._leash, argv, os.environ, self._show, None)
        async with process:
            status = await process.wait()
        last = process.last_line()
        if status:
            raise ModelError(last.removeprefix("mesh-llm: "))
        await self.look()
        return await asyncio.to_thread(load_model, Path(last))

    def _show(self, line: str) -> None:
        if not line.startswith(("mesh-llm: ", "/")):
            self._progress(line)


def model_infos(store: Store) -> tuple[ModelInfo, ...]:
    return tuple(model_info(model) for model in store.models.values())[:MAX_MODELS]


def projector_infos(store: Store) -> dict[str, ProjectorInfo]:
    """By the fingerprint of the model."""
    models = list(store.models.items())[:MAX_MODELS]
    return {f: ProjectorInfo(m.projector.fingerprint, m.projector.size_bytes) for f, m in models if m.projector}


def capabilities(store: Store) -> dict[str, Capability]:
    """By the fingerprint of the model; without those that complete text."""
    models = list(store.models.items())[:MAX_MODELS]
    return {f: m.capability for f, m in models if m.capability is not Capability.COMPLETION}


def model_info(model: Model) -> ModelInfo:
    name = model.name
    try:
        name.encode()
    except UnicodeEncodeError:  # a name on disk that is not valid UTF-8
        name = ascii(name)
    return ModelInfo(name[:80], model.fingerprint().hex(), model.size_bytes, model.n_trunk)
