"""One node: puts the mesh, the worker and the endpoint together, and follows the plan."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshllm import __version__
from meshllm.api.routing import RequestInfo, find_model
from meshllm.errors import MeshError, MeshLlmError
from meshllm.mesh.announcement import MAX_MODELS, Announcement, ModelInfo, Role, Serving
from meshllm.mesh.groups import Group, Placement, StageStatus, has_model, within_reach
from meshllm.mesh.hello import Credentials
from meshllm.mesh.known_meshes import KnownMesh, KnownMeshes
from meshllm.mesh.mesh import Mesh
from meshllm.mesh.placement import dropped, place_models
from meshllm.mesh.rates import differ
from meshllm.mesh.token import MESH_ID_BYTES, SECRET_BYTES, Token, make_ticket
from meshllm.mesh.token import encode as encode_token
from meshllm.node.router import Router, waiting_line
from meshllm.node.status import describe_model, describe_node
from meshllm.paths import private_folder
from meshllm.quic.address import own_addresses
from meshllm.quic.identity import Identity, random_hex
from meshllm.quic.stacks import stack_named
from meshllm.quic.transport import Link, Stream, StreamKind
from meshllm.quic.tunnel import Tunnels, serve_stream
from meshllm.units import in_gb

if TYPE_CHECKING:
    from meshllm.node.files import ModelFiles
    from meshllm.node.worker import StageAddress, Worker

_SETTLE_S = 0.3  # changes that come together make one plan
_JOIN_SETTLE_S = 1.0  # before a joiner's first plan: it hears of the others and their distance
_POLL_S = 0.1
_SAVE_S = 5.0


@dataclass(frozen=True)
class NodeConfig:
    name: str
    bind_port: int
    quic: str  # one of mesh.transport.STACKS
    advertise: tuple[str, ...]  # "host:port", before all other addresses
    token: Token | None
    split: bool
    tensor_split: tuple[float, ...]


class Node:
    """`worker` None makes it a lite client. `run()` lives as long as the node; the rest may be asked meanwhile."""

    def __init__(
        self,
        config: NodeConfig,
        identity: Identity,
        state: KnownMeshes,
        worker: Worker | None,
        emit: Callable[[str], None],
    ) -> None:
        self._config = config
        self._self_id = identity.node_id
        self._state = state
        self._worker = worker
        self._emit = emit
        self.folder = private_folder()
        self._tunnels = Tunnels()
        self._mesh = Mesh(
            identity, self._credentials(), self._announcement(), self._stream, emit, stack_named(config.quic)
        )
        self.router = Router(self._mesh, self._tunnels, self.folder, worker, self.describe)
        self._files = worker.files(self._mesh) if worker else None
        self._group: Group | None = None
        self._engine_task: asyncio.Task[None] | None = None
        self._emitted: dict[str, str] = {}
        self._n_elections = 0
        self.started = asyncio.Event()

    # --- beginnings ---

    def _credentials(self) -> Credentials:
        token, state = self._config.token, self._state
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
        known = self._state.meshes.get(self._state.own or "") if config.token is None else None
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
            async with self._tunnels, asyncio.TaskGroup() as group:
                if self._worker:
                    self._worker.start_server(self.folder / "device.sock")
                    group.create_task(self._worker.report(), name="device server log")
                group.create_task(self._mesh.run(), name="mesh")
                await self._enter()
                if self._files:
                    group.create_task(self._files.run(), name="supply")
                    group.create_task(self._get_missing(self._files), name="missing models")
                group.create_task(self._remember(), name="remember")
                group.create_task(self._watch_engine(), name="watch engine")
                await self._follow_placement()
        except* MeshLlmError as errors:
            raise _first(errors) from None
        finally:
            if self._worker:
                await self._worker.stop_server()
            shutil.rmtree(self.folder, ignore_errors=True)

    async def _enter(self) -> None:
        token, mesh = self._config.token, self._mesh
        known = self._state.meshes.get(mesh.credentials.mesh)
        mesh.bootstrap = list(known.peers) if known else []
        await asyncio.sleep(0)  # the mesh's own tasks are up
        if token:
            joined = False
            try:
                await mesh.join(token)
                joined = True
            except MeshError:
                raise
            except MeshLlmError as error:
                if not mesh.bootstrap or known is None:
                    raise MeshError(f"cannot reach the mesh: {error}") from None
            mesh.bootstrap += [(address, i) for address, i in (known.peers if known else [])]
            if joined:
                self._emit(f"joined mesh {token.mesh[:8]}")
        self._announce_addresses()
        self.started.set()
        if token:
            await asyncio.sleep(_JOIN_SETTLE_S)

    def _addresses(self) -> tuple[str, ...]:
        found = [*self._config.advertise, *own_addresses(self._mesh.port, self._mesh.observed)]
        return tuple(dict.fromkeys(found))[:32]

    def _announce_addresses(self) -> None:
        addresses = self._addresses()
        if addresses != self._mesh.membership.me.addresses:
            self._mesh.membership.announce(addresses=addresses)

    async def _remember(self) -> None:
        """Where the members are and what is revoked, for the next start; what changes slowly, for the others."""
        while True:
            present = self._mesh.membership.present()
            peers = [(a, i) for i, n in present.items() if i != self._self_id for a in n.addresses[:3]]
            credentials = self._mesh.credentials
            if credentials.secret:
                known = self._state.meshes.setdefault(credentials.mesh, KnownMesh(credentials.secret))
                revoked = sorted(self._mesh.revoked())
                if (peers and peers != known.peers) or revoked != known.revoked:
                    known.peers, known.revoked = (peers or known.peers)[:64], revoked
                    self._state.save()
            await asyncio.sleep(_SAVE_S)
            self._announce_addresses()
            rates = self.router.rates.per_minute(time.monotonic())
            if differ(self._mesh.membership.me.requests_per_min, rates):
                self._mesh.membership.announce(requests_per_min=rates)

    # --- the plan ---

    async def _follow_placement(self) -> None:
        try:
            while True:
                self._mesh.changed.clear()
                self._adopt()
                await self._open_tunnels()
                self.router.placements = place_models(self._mesh.membership.present())
                for placement in self.router.placements:
                    self._emit_placement(placement)
                self._want_file()
                groups = [g for a in self.router.placements if (g := a.group_of(self._self_id))]
                await self._run_group(groups[0] if groups else None)
                await self._wait_for_change()
        finally:
            await self._stop_engine()

    async def _wait_for_change(self) -> None:
        """Raises what ended the engine, if it ended."""
        changed = asyncio.create_task(self._mesh.changed.wait(), name="mesh change")
        waited = {changed} | ({self._engine_task} if self._engine_task else set())
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        if self._engine_task and self._engine_task.done():
            self._end_engine(self._engine_task)
        await asyncio.sleep(_SETTLE_S)

    def _end_engine(self, task: asyncio.Task[None]) -> None:
        """Raises what ended it, unless the mesh and not the user chose the model: then others may serve it."""
        try:
            task.result()
        except MeshLlmError as error:
            group, worker = self._group, self._worker
            if not (group and worker and self._files) or group.model in worker.named:
                raise
            self._emit(f"{error}; this node leaves the model to others")
            self._engine_task = self._group = None
            self._announce_serving(False)
            self._files.exclude(group.model)

    def _adopt(self) -> None:
        """What the mesh is asked for outlives who asked, while somebody has the file; drops outlive who dropped."""
        me, present = self._mesh.membership.me, self._mesh.membership.present()
        if (drops := dropped(present)) != me.drops:
            self._mesh.membership.announce(drops=drops)
        if self._worker:
            on_disk = {m.fingerprint for n in present.values() for m in n.models}
            own = {m.fingerprint: m for m in self._worker.named}
            others = {m.fingerprint: m for n in present.values() for m in n.wants if m.fingerprint in on_disk}
            wants = tuple((own | dict(sorted(others.items()))).values())[:MAX_MODELS]
            named = tuple(own)
            if (wants, named) != (me.wants, me.named):
                self._mesh.membership.announce(wants=wants, named=named)
            for model in own.values():
                if drops.get(model.fingerprint, 0) % 2:
                    line = f"{model.name} was dropped in this mesh: mesh-llm drop --undo {model.name} brings it back"
                    self._emit_once(model, line)

    def _want_file(self) -> None:
        """The file that this node should have: of the model that it is for, if it can be more than a stranger to it."""
        if self._files is None:
            return
        mine = next(
            (a for a in self.router.placements if a.reasons.get(self._self_id) not in (None, StageStatus.OTHER_MODEL)),
            None,
        )
        if mine:
            me, present = self._mesh.membership.me, self._mesh.membership.present()
            owners = [n for i, n in present.items() if i != self._self_id and has_model(n, mine.model)]
            of_use = me.memory_bytes >= mine.need_bytes or (owners and within_reach(me, owners))
            mine = mine if of_use else None
        self._files.want(mine.model if mine else None)

    async def _get_missing(self, files: ModelFiles) -> None:
        """What the user named and is not on disk. Raises ModelError."""
        assert self._worker
        for name, error in self._worker.missing.items():
            self._worker.named.append(await files.obtain(name, error))
            self._mesh.changed.set()

    async def _run_group(self, group: Group | None) -> None:
        if group == self._group:
            self.router.draining = False
            return
        if self._engine_task and self._works() and self.router.busy:
            self.router.draining = True  # _watch_engine calls again when what is in work is done
            self._announce_serving(False)
            return
        if self._engine_task:
            self._announce_serving(False)
            await self._stop_engine()
        self.router.draining = False
        self._group = None
        self._announce_serving(False)
        if group and self._still_a_stage(group):
            return  # until the host, which drains perhaps, has let go: there is a change then
        self._group = group
        self._announce_serving(False)
        if group and self._worker:
            self._n_elections += 1
            tunnels = [self._stage_address(node_id) for node_id in group.stages]
            self._engine_task = asyncio.create_task(self._worker.serve(group, tunnels), name="engine")

    def _works(self) -> bool:
        """Whether the engine that runs can end what it has begun."""
        present = self._mesh.membership.present()
        ready = self._worker is not None and self._worker.ready
        return ready and self._group is not None and all(i in present for i in self._group.nodes)

    def _still_a_stage(self, group: Group) -> bool:
        """Of another host: two models at once may be too much for the device's memory."""
        others = [n for i, n in self._mesh.membership.present().items() if i not in group.nodes]
        return any(self._self_id in serving.stages for n in others for serving in n.serving)

    async def _stop_engine(self) -> None:
        if self._engine_task:
            self._engine_task.cancel()
            with contextlib.suppress(asyncio.CancelledError, MeshLlmError):
                await self._engine_task
            self._engine_task = None

    def _announce_serving(self, ready: bool) -> None:
        group = self._group
        serving = (Serving(group.model.fingerprint, group.stages, ready),) if group else ()
        if serving != self._mesh.membership.me.serving:
            self._mesh.membership.announce(serving=serving)

    async def _watch_engine(self) -> None:
        """Ready is announced when every stage is loaded and the engine answers."""
        while True:
            await asyncio.sleep(_POLL_S)
            if self._worker and self._group:
                self._announce_serving(self._worker.ready and not self.router.draining)
                if self.router.draining and not (self.router.busy and self._works()):
                    self._mesh.changed.set()

    def _emit_placement(self, placement: Placement) -> None:
        """One line for each new state of affairs."""
        model = placement.model
        mine = placement.group_of(self._self_id)
        if not placement.groups:
            line = waiting_line(placement, self.router.placements)
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
        """A member wants something of this node."""
        if kind is StreamKind.RPC and self._worker:
            self._tunnels.spawn(serve_stream(stream, self.folder / "device.sock"), f"rpc of {link.peer_address}")
        elif kind is StreamKind.HTTP and self._worker:
            self._tunnels.spawn(serve_stream(stream, self.folder / "api.sock"), f"http of {link.peer_address}")
        elif kind is StreamKind.TRANSFER and self._worker:
            self._tunnels.spawn(self._worker.sharing.serve(stream), f"transfer to {link.peer_address}")
        else:
            stream.abort()

    def _stage_address(self, node_id: str) -> StageAddress:
        from meshllm.node.worker import StageAddress

        name = f"peer-{node_id[:16]}.sock"
        return StageAddress(self._mesh.name_of(node_id), self.folder / name, f"unix:{name}")

    async def _open_tunnels(self) -> None:
        """One to the device server of every worker, for this host's engine and for this stage's pushes."""
        present = self._mesh.membership.present()
        workers = (
            {i for i, n in present.items() if n.role is Role.WORKER and i != self._self_id} if self._worker else set()
        )
        wanted = {self.folder / f"peer-{i[:16]}.sock": i for i in workers}
        for path, node_id in wanted.items():
            await self._tunnels.open(path, lambda i=node_id: self._mesh.open(i, StreamKind.RPC))  # type: ignore[misc]
        for path in list(self.folder.glob("peer-*.sock")):
            if path not in wanted:
                await self._tunnels.close(path)

    # --- what it tells ---

    def describe(self) -> dict[str, Any]:
        members = self._mesh.membership.members()
        nodes = [describe_node(self._mesh.membership.me, "alive", None)]
        nodes += [describe_node(m.announcement, str(m.state), self._mesh.link(i)) for i, m in sorted(members.items())]
        return {
            "api": 1,
            "version": __version__,
            "node_id": self._self_id,
            "mesh_id": self._mesh.credentials.mesh,
            "port": self._mesh.port,
            "nodes": nodes,
            "models": [describe_model(a) for a in self.router.placements],
            "served": [m.name for m in self.router.served()],
            "dropped": sorted(f for f, count in self._mesh.membership.me.drops.items() if count % 2),
            "engine": self.router.describe_engine(),
            "device_server": self._worker.server_counters() if self._worker else {},
            "reason": self.router.reason_for(RequestInfo()),
            "counts": {"elections": self._n_elections, "failures": self._mesh.membership.n_failures},
            "latencies": self.router.latencies.describe(),
        }

    async def describe_all(self) -> dict[str, Any]:
        """With what every host tells of its engine, by node id."""
        return self.describe() | {"engines": await self.router.engines()}

    def drop(self, name: str, undo: bool) -> str:
        """Stops a model in the whole mesh, or lets it be served again. Returns its name. Raises UnknownModelError."""
        nodes = self._mesh.membership.present().values()
        models = sorted({(m.name, m.fingerprint) for n in nodes for m in n.wants})
        fingerprint = find_model(name, models, [])
        drops = dropped(self._mesh.membership.present())
        if drops.get(fingerprint, 0) % 2 == undo:
            self._mesh.membership.announce(drops=drops | {fingerprint: drops.get(fingerprint, 0) + 1})
            self._mesh.changed.set()
        return next(n for n, f in models if f == fingerprint)

    # --- tokens ---

    def make_token(self, expires_s: float = 0) -> str:
        """For somebody to join with; `expires_s` from now, 0 for never. Raises MeshError before it is a member."""
        credentials = self._mesh.credentials
        if credentials.secret is None:
            raise MeshError("this node is not yet a member of the mesh")
        expires = int(time.time() + expires_s) if expires_s else 0
        ticket = make_ticket(credentials.secret, credentials.mesh, random_hex(16), expires)
        return encode_token(Token(credentials.mesh, self._self_id, self._addresses(), ticket))

    def revoke(self, token: Token) -> None:
        revoked = self._mesh.membership.me.revoked
        if token.ticket.serial not in revoked:
            self._mesh.membership.announce(revoked=(*revoked, token.ticket.serial))


def default_name() -> str:
    return socket.gethostname().partition(".")[0][:40] or "node"


def _first(errors: BaseExceptionGroup[MeshLlmError]) -> MeshLlmError:
    for error in errors.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an empty group")
