"""One node: puts the mesh, the worker and the endpoint together, and follows the placement of models."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from meshllm import __version__
from meshllm.api.routing import RequestInfo, find_model
from meshllm.errors import MeshError, MeshLlmError
from meshllm.mesh.announcement import MAX_ADDRESSES, MAX_MODELS, Announcement, ModelInfo, Role
from meshllm.mesh.groups import Placement, StageStatus, fits_alone, has_model, within_reach
from meshllm.mesh.hello import Credentials
from meshllm.mesh.known_meshes import KnownMesh, KnownMeshes
from meshllm.mesh.mesh import Mesh
from meshllm.mesh.placement import dropped, place_models
from meshllm.mesh.rates import differ
from meshllm.mesh.token import MESH_ID_BYTES, SECRET_BYTES, Token, make_ticket
from meshllm.mesh.token import encode as encode_token
from meshllm.node.hosting import Hosting
from meshllm.node.router import Router, waiting_line
from meshllm.node.status import API, CountStatus, MeshStatus, model_status, node_status
from meshllm.paths import private_folder
from meshllm.quic.identity import Identity, random_hex
from meshllm.quic.interfaces import own_addresses
from meshllm.quic.stacks import stack_named
from meshllm.quic.transport import Link, Stream, StreamKind
from meshllm.quic.tunnel import Tunnels, serve_stream
from meshllm.tasks import OwnedTasks
from meshllm.units import in_gb, socket_id

if TYPE_CHECKING:
    from meshllm.node.files import ModelFiles
    from meshllm.node.worker import Worker

_SETTLE_S = 0.3  # changes that come together are acted on once
_JOIN_SETTLE_S = 1.0  # before a joiner's first placement: it learns who is there, and how far away
_UPKEEP_S = 5.0
_MEMORY_STEP = 0.1  # of what was announced: smaller changes are not worth another plan
_KEPT_ADDRESSES = 3  # of each member, for the next start: its best ones
_KEPT_PEERS = 64


@dataclass(frozen=True)
class NodeConfig:
    name: str
    bind_port: int
    quic: str  # one of quic.stacks.STACKS
    advertise: tuple[str, ...]  # "host:port", before all other addresses
    token: Token | None
    split: bool
    tensor_split: tuple[float, ...]


class Node:
    """A lite client when `worker` is None. `run()` lasts as long as the node; the rest may be called meanwhile."""

    def __init__(
        self,
        config: NodeConfig,
        identity: Identity,
        known_meshes: KnownMeshes,
        worker: Worker | None,
        emit: Callable[[str], None],
    ) -> None:
        self._config = config
        self._self_id = identity.node_id
        self._known_meshes = known_meshes
        self._worker = worker
        self._emit = emit
        self.folder = private_folder()
        self._tunnels, self._streams = Tunnels(), OwnedTasks()
        self._mesh = Mesh(
            identity, self._credentials(), self._announcement(), self._stream, emit, stack_named(config.quic)
        )
        self._files = worker.files(self._mesh) if worker else None
        self._hosting = Hosting(self._mesh, worker, self._stage_socket) if worker else None
        self.router = Router(self._mesh, self._tunnels, self.folder, self._hosting, self.describe)
        self._emitted: dict[str, str] = {}
        self.started = asyncio.Event()

    # --- joining ---

    def _credentials(self) -> Credentials:
        token, state = self._config.token, self._known_meshes
        if token:
            known = state.meshes.get(token.mesh)
            return Credentials(token.mesh, known.secret if known else None, token.ticket)
        if state.own is None:
            state.own = random_hex(MESH_ID_BYTES)
            state.meshes[state.own] = KnownMesh(os.urandom(SECRET_BYTES))
            state.save()
        return Credentials(state.own, state.meshes[state.own].secret)

    def _announcement(self) -> Announcement:
        worker, config = self._worker, self._config
        known = self._known_meshes.meshes.get(self._known_meshes.own or "") if config.token is None else None
        if worker is None:
            return Announcement(self._self_id, 1, config.name, Role.CLIENT)
        return Announcement(
            self._self_id,
            1,
            config.name,
            Role.WORKER,
            device=worker.device_name(),
            memory_bytes=worker.memory_bytes(),
            ggml_version=worker.ggml_version,
            models=worker.models,
            projectors=worker.projectors,
            capabilities=worker.capabilities,
            named=tuple(m.fingerprint for m in worker.named),
            wants=tuple(worker.named),
            fetches=worker.fetches,
            split=config.split,
            tensor_split=config.tensor_split,
            revoked=tuple(known.revoked) if known else (),
        )

    async def run(self) -> None:
        """Raises MeshLlmError when the mesh cannot be joined or the model cannot be served here."""
        try:
            self._mesh.start(self._config.bind_port)
            async with self._tunnels, self._streams, asyncio.TaskGroup() as group:
                if self._worker:
                    self._worker.start_server(self.folder / "device.sock")
                    group.create_task(self._worker.report(), name="device server log")
                group.create_task(self._mesh.run(), name="mesh")
                await self._enter()
                if self._files:
                    group.create_task(self._files.run(), name="model files")
                    group.create_task(self._get_missing(self._files), name="missing models")
                group.create_task(self._keep_up(), name="upkeep")
                if self._hosting:
                    group.create_task(self._hosting.run(), name="hosting")
                await self._follow_placement()
        except* MeshLlmError as errors:
            raise _first(errors) from None
        finally:
            if self._worker:
                await self._worker.stop_server()
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _enter(self) -> None:
        token, mesh = self._config.token, self._mesh
        known = self._known_meshes.meshes.get(mesh.credentials.mesh)
        mesh.bootstrap = list(known.peers) if known else []
        await asyncio.sleep(0)  # the mesh's own tasks are up
        if token:
            await self._join(token, list(mesh.bootstrap))
        self._announce_addresses()
        self.started.set()
        if token:
            await asyncio.sleep(_JOIN_SETTLE_S)

    async def _join(self, token: Token, known_peers: list[tuple[str, str | None]]) -> None:
        """Raises MeshError when refused, or when nobody answers and no other peer is known."""
        try:
            await self._mesh.join(token)
        except MeshError:
            raise
        except MeshLlmError as error:
            if not known_peers:
                raise MeshError(
                    f"cannot reach the mesh: {error}. Is a node of it running, and does its firewall let UDP through? "
                    "mesh-llm token prints a new token there"
                ) from None
        else:
            self._remember()  # a member from now on, even if this process crashes
            self._emit(f"joined mesh {token.mesh[:8]}")
        finally:
            self._mesh.bootstrap += known_peers

    def _addresses(self) -> tuple[str, ...]:
        found = [*self._config.advertise, *own_addresses(self._mesh.port, self._mesh.observed)]
        return tuple(dict.fromkeys(found))[:MAX_ADDRESSES]

    def _announce_addresses(self) -> None:
        addresses = self._addresses()
        if addresses != self._mesh.me.addresses:
            self._mesh.announce(replace(self._mesh.me, addresses=addresses))

    async def _keep_up(self) -> None:
        """Remembers the mesh for the next start, and announces what changes slowly."""
        while True:
            self._remember()
            await asyncio.sleep(_UPKEEP_S)
            self._announce_addresses()
            rates = self.router.rates.per_minute(time.monotonic())
            if differ(self._mesh.me.requests_per_min, rates):
                self._mesh.announce(replace(self._mesh.me, requests_per_min=rates))
            self._announce_memory()

    def _announce_memory(self) -> None:
        """Other programs take and free it. What runs here takes some too: then the old figure stands."""
        nodes = self._mesh.membership.present().values()
        if self._worker is None or any(self._self_id in (n.node_id, *s.stages) for n in nodes for s in n.serving):
            return
        now, told = self._worker.memory_bytes(), self._mesh.me.memory_bytes
        if abs(now - told) > _MEMORY_STEP * told:
            self._mesh.announce(replace(self._mesh.me, memory_bytes=now))

    def _remember(self) -> None:
        """The mesh's secret, where its members are, and which tokens are revoked."""
        credentials = self._mesh.credentials
        if credentials.secret is None:
            return
        known = self._known_meshes.meshes.get(credentials.mesh) or KnownMesh(credentials.secret)
        present = self._mesh.membership.present()
        peers = [(a, i) for i, n in present.items() if i != self._self_id for a in n.addresses[:_KEPT_ADDRESSES]]
        now = KnownMesh(credentials.secret, (peers or known.peers)[:_KEPT_PEERS], sorted(self._mesh.revoked()))
        if self._known_meshes.meshes.get(credentials.mesh) != now:
            self._known_meshes.meshes[credentials.mesh] = now
            self._known_meshes.save()

    # --- the placement ---

    async def _follow_placement(self) -> None:
        """Places the models again on every change of the view, and acts on what changes for this node."""
        try:
            while True:
                seen = self._mesh.changes.version
                self._adopt()
                await self._open_tunnels()
                placements = place_models(self._mesh.membership.present())
                if await self._tell_needs(placements):
                    continue
                self.router.update(placements)
                for placement in placements:
                    self._emit_placement(placement)
                self._want_file(placements)
                if self._hosting:
                    await self._hosting.follow(next((g for p in placements if (g := p.group_of(self._self_id))), None))
                await self._wait_for_change(seen)
        finally:
            if self._hosting:
                await self._hosting.stop()

    async def _wait_for_change(self, seen: int) -> None:
        """Raises the error of an engine without which this node has no purpose."""
        waits = [asyncio.create_task(self._mesh.changes.wait(seen), name="change")]
        if self._hosting:
            waits.append(asyncio.create_task(self._hosting.wait_ended(), name="engine's end"))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        if self._hosting and self._files and (failed := self._hosting.take_failure()):
            self._files.exclude(failed)
        await asyncio.sleep(_SETTLE_S)

    def _adopt(self) -> None:
        """Repeats what others want and have dropped, so that it outlives them; wants while some node has the file."""
        me, present = self._mesh.me, self._mesh.membership.present()
        if (drops := dropped(present)) != me.drops:
            self._mesh.announce(replace(self._mesh.me, drops=drops))
        if self._worker:
            on_disk = {m.fingerprint for n in present.values() for m in n.models}
            own = {m.fingerprint: m for m in self._worker.named}
            others = {m.fingerprint: m for n in present.values() for m in n.wants if m.fingerprint in on_disk}
            wants = tuple((own | dict(sorted(others.items()))).values())[:MAX_MODELS]
            named = tuple(own)
            if (wants, named) != (me.wants, me.named):
                self._mesh.announce(replace(self._mesh.me, wants=wants, named=named))
            for model in own.values():
                if drops.get(model.fingerprint, 0) % 2:
                    line = f"{model.name} was dropped in this mesh; mesh-llm drop --undo {model.name} allows it again"
                    self._emit_once(model, line)

    async def _tell_needs(self, placements: Sequence[Placement]) -> bool:
        """Announces what the wanted models that are on disk take; before that nothing is served here."""
        me, worker = self._mesh.me, self._worker
        models = [p.model for p in placements if has_model(me, p.model)] if worker else []
        if worker is None or {m.fingerprint for m in models} == me.needs.keys():
            return False
        needs = {m.fingerprint: me.needs.get(m.fingerprint) or await worker.need(m) for m in models}
        self._mesh.announce(replace(self._mesh.me, needs=needs))
        return True

    def _want_file(self, placements: Sequence[Placement]) -> None:
        """Wants the file of the model that this node is placed on, if it could serve it or be a stage of it."""
        if self._files is None:
            return
        elsewhere = (None, StageStatus.OTHER_MODEL)
        mine = next((p for p in placements if p.reasons.get(self._self_id) not in elsewhere), None)
        if mine:
            me, present = self._mesh.me, self._mesh.membership.present()
            owners = [n for i, n in present.items() if i != self._self_id and has_model(n, mine.model)]
            of_use = fits_alone(me, mine.model, present) or (owners and within_reach(me, owners))
            mine = mine if of_use else None
        self._files.want(mine.model if mine else None)

    async def _get_missing(self, files: ModelFiles) -> None:
        """Gets the models that the user named and that are not on disk. Raises ModelError."""
        assert self._worker
        for name, error in self._worker.missing.items():
            self._worker.named.append(await files.obtain(name, error))
            self._mesh.changes.notify()

    def _emit_placement(self, placement: Placement) -> None:
        """Prints a line when the placement of a model has changed."""
        model = placement.model
        mine = placement.group_of(self._self_id)
        if not placement.groups:
            line = waiting_line(placement, self.router.placements)
            if self._worker and has_model(self._mesh.me, model):
                line += self._worker.what_fits(placement)
        elif mine:
            line = f"Elected as host ({in_gb(mine.memory_bytes)} available for a {in_gb(model.size_bytes)} model)"
            if mine.stages:
                parts = [self._mesh.name_of(i) for i in mine.stages] + ["here"]
                shares = zip(parts, mine.shares, strict=True)
                line += ": " + ", ".join(f"{name} {share:.2f}" for name, share in shares)
        else:
            group = next((g for g in placement.groups if self._self_id in g.stages), placement.groups[0])
            role = "a stage of" if self._self_id in group.stages else "an API client of"
            line = f"{model.name} is served by {self._mesh.name_of(group.host)}; this node is {role} it"
        self._emit_once(model, line)

    def _emit_once(self, model: ModelInfo, line: str) -> None:
        if self._emitted.get(model.fingerprint) != line:
            self._emitted[model.fingerprint] = line
            self._emit(line)

    # --- streams ---

    def _stream(self, link: Link, kind: StreamKind, stream: Stream) -> None:
        """A member has opened a stream."""
        worker = self._worker
        if worker is None:
            stream.abort()
        elif kind is StreamKind.RPC:
            self._streams.spawn(
                lambda: serve_stream(stream, self.folder / "device.sock"), f"rpc of {link.peer_address}"
            )
        elif kind is StreamKind.HTTP:
            self._streams.spawn(lambda: serve_stream(stream, self.folder / "api.sock"), f"http of {link.peer_address}")
        elif kind is StreamKind.TRANSFER:
            self._streams.spawn(lambda: worker.sharing.serve(stream), f"transfer to {link.peer_address}")
        else:
            stream.abort()

    def _stage_socket(self, node_id: str) -> Path:
        """The Unix socket that leads to the device server of a worker."""
        return self.folder / f"peer-{socket_id(node_id)}.sock"

    async def _open_tunnels(self) -> None:
        """To the device server of every worker: for the engine here as host, and for pushes from here as stage."""
        present = self._mesh.membership.present()
        workers = [i for i, n in present.items() if n.role is Role.WORKER and i != self._self_id]
        wanted = {self._stage_socket(i): i for i in workers if self._worker}
        for path, node_id in wanted.items():
            await self._tunnels.open(path, lambda i=node_id: self._mesh.open(i, StreamKind.RPC))  # type: ignore[misc]
        for path in list(self.folder.glob("peer-*.sock")):
            if path not in wanted:
                await self._tunnels.close(path)

    # --- status and commands ---

    def describe(self) -> MeshStatus:
        members = self._mesh.membership.members()
        nodes = [node_status(self._mesh.me, "alive", None)]
        nodes += [node_status(m.announcement, str(m.state), self._mesh.link(i)) for i, m in sorted(members.items())]
        n_elections = self._hosting.n_elections if self._hosting else 0
        return MeshStatus(
            api=API,
            version=__version__,
            node_id=self._self_id,
            mesh_id=self._mesh.credentials.mesh,
            port=self._mesh.port,
            nodes=tuple(nodes),
            models=tuple(model_status(placement) for placement in self.router.placements),
            served=tuple(model.name for model in self.router.served()),
            dropped=tuple(sorted(f for f, count in self._mesh.me.drops.items() if count % 2)),
            engine=self.router.describe_engine(),
            device_server=self._worker.server_counters() if self._worker else {},
            reason=self.router.reason_for(RequestInfo()),
            counts=CountStatus(n_elections, self._mesh.membership.n_failures),
            latencies=self.router.latencies.status(),
        )

    def drop(self, name: str, undo: bool) -> str:
        """Drops a model in the whole mesh, or undoes that. Returns its name. Raises UnknownModelError."""
        nodes = self._mesh.membership.present().values()
        models = sorted({(m.name, m.fingerprint) for n in nodes for m in n.wants})
        fingerprint = find_model(name, models, [])
        drops = dropped(self._mesh.membership.present())
        if drops.get(fingerprint, 0) % 2 == undo:
            self._mesh.announce(replace(self._mesh.me, drops=drops | {fingerprint: drops.get(fingerprint, 0) + 1}))
            self._mesh.changes.notify()
        return next(n for n, f in models if f == fingerprint)

    # --- tokens ---

    def make_token(self, expires_s: float = 0) -> str:
        """An invite token that expires in `expires_s`, 0 for never. Raises MeshError before this node is a member."""
        credentials = self._mesh.credentials
        if credentials.secret is None:
            raise MeshError("this node is not yet a member of the mesh")
        expires = int(time.time() + expires_s) if expires_s else 0
        ticket = make_ticket(credentials.secret, credentials.mesh, random_hex(16), expires)
        return encode_token(Token(credentials.mesh, self._self_id, self._addresses(), ticket))

    def revoke(self, token: Token) -> None:
        revoked = self._mesh.me.revoked
        if token.ticket.serial not in revoked:
            self._mesh.announce(replace(self._mesh.me, revoked=(*revoked, token.ticket.serial)))


def default_name() -> str:
    return socket.gethostname().partition(".")[0][:40] or "node"


def _first(errors: BaseExceptionGroup[MeshLlmError]) -> MeshLlmError:
    for error in errors.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an empty group")
