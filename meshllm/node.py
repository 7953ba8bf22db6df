"""One node: puts the mesh, the worker and the endpoint together, and follows the plan."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshllm import __version__
from meshllm.errors import MeshError, MeshLlmError
from meshllm.mesh.announcement import Announcement, Role, Serving
from meshllm.mesh.bridge import Doors, serve_stream
from meshllm.mesh.hello import Credentials
from meshllm.mesh.identity import Identity, random_hex
from meshllm.mesh.network import Mesh, own_addresses
from meshllm.mesh.plan import Assignment, Group, make_plan
from meshllm.mesh.rates import RequestRates, differ
from meshllm.mesh.state import KnownMesh, MeshState
from meshllm.mesh.token import MESH_ID_BYTES, SECRET_BYTES, Token, make_ticket
from meshllm.mesh.token import encode as encode_token
from meshllm.mesh.transport import Link, Stream, StreamKind

if TYPE_CHECKING:
    from meshllm.worker import Worker

_SETTLE_S = 0.3  # changes that come together make one plan
_JOIN_SETTLE_S = 1.0  # before a joiner's first plan: it hears of the others and their distance
_POLL_S = 0.1
_SAVE_S = 5.0
FOLDER_PREFIX = "mesh-llm-"


@dataclass(frozen=True)
class NodeConfig:
    name: str
    bind_port: int
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
        state: MeshState,
        worker: Worker | None,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._id = identity.node_id
        self._state = state
        self._worker = worker
        self._say = say
        self.folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER_PREFIX}{os.getpid()}-"))
        self._doors = Doors()
        self._mesh = Mesh(identity, self._credentials(), self._announcement(), self._stream, say)
        self._plan: list[Assignment] = []
        self._group: Group | None = None
        self._engine_task: asyncio.Task[None] | None = None
        self._said: dict[str, str] = {}
        self._rates = RequestRates()
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
            return Announcement(self._id, 1, config.name, Role.CLIENT)
        return Announcement(
            self._id,
            1,
            config.name,
            Role.WORKER,
            device=worker.device_name(),
            memory_bytes=worker.memory_bytes(),
            engine=worker.engine_version,
            models=worker.models,
            wants=worker.wants,
            split=config.split,
            tensor_split=config.tensor_split,
            revoked=tuple(known.revoked) if known else (),
        )

    async def run(self) -> None:
        """Raises MeshLlmError when the mesh cannot be joined or the model cannot be served here."""
        try:
            self._mesh.start(self._config.bind_port)
            async with self._doors, asyncio.TaskGroup() as group:
                if self._worker:
                    self._worker.start_server(self.folder / "device.sock")
                    group.create_task(self._worker.report(), name="device server log")
                group.create_task(self._mesh.run(), name="mesh")
                await self._enter()
                group.create_task(self._remember(), name="remember")
                group.create_task(self._watch_engine(), name="watch engine")
                await self._follow_plan()
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
                self._say(f"joined mesh {token.mesh[:8]}")
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
            peers = [(a, i) for i, n in present.items() if i != self._id for a in n.addresses[:3]]
            credentials = self._mesh.credentials
            if credentials.secret:
                known = self._state.meshes.setdefault(credentials.mesh, KnownMesh(credentials.secret))
                revoked = sorted(self._mesh.revoked())
                if (peers and peers != known.peers) or revoked != known.revoked:
                    known.peers, known.revoked = (peers or known.peers)[:64], revoked
                    self._state.save()
            await asyncio.sleep(_SAVE_S)
            self._announce_addresses()
            rates = self._rates.per_minute(time.monotonic())
            if differ(self._mesh.membership.me.requests_per_min, rates):
                self._mesh.membership.announce(requests_per_min=rates)

    # --- the plan ---

    async def _follow_plan(self) -> None:
        try:
            while True:
                self._mesh.changed.clear()
                self._adopt_models()
                await self._open_doors()
                self._plan = make_plan(self._mesh.membership.present())
                for assignment in self._plan:
                    self._say_plan(assignment)
                groups = [g for a in self._plan if (g := a.group_of(self._id))]
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
            self._engine_task.result()
        await asyncio.sleep(_SETTLE_S)

    def _adopt_models(self) -> None:
        """A worker that was told no model serves, or helps to serve, what the mesh has been asked for."""
        me = self._mesh.membership.me
        if self._worker is None or me.wants or self._config.token is None:
            return
        wanted = {m.fingerprint for n in self._mesh.membership.present().values() for m in n.wants}
        mine = tuple(m for m in me.models if m.fingerprint in wanted)
        if mine:
            self._mesh.membership.announce(wants=mine[:1])

    async def _run_group(self, group: Group | None) -> None:
        if group == self._group:
            return
        if self._engine_task:
            self._announce_serving(False)
            await self._stop_engine()
        self._group = group
        self._announce_serving(False)
        if group and self._worker:
            doors = [self._stage_door(node_id) for node_id in group.stages]
            self._engine_task = asyncio.create_task(self._worker.serve(group, doors), name="engine")

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
                self._announce_serving(self._worker.ready)

    def _say_plan(self, assignment: Assignment) -> None:
        """One line for each new state of affairs."""
        model = assignment.model
        mine = assignment.group_of(self._id)
        if not assignment.groups:
            line = self._waiting_line(assignment)
        elif mine:
            line = f"Elected as host ({_gb(mine.memory_bytes)} available for a {_gb(model.size_bytes)} model)"
            if mine.stages:
                parts = [self._mesh.name_of(i) for i in mine.stages] + ["here"]
                shares = zip(parts, mine.shares, strict=True)
                line += ": " + ", ".join(f"{name} {share:.2f}" for name, share in shares)
        else:
            group = next((g for g in assignment.groups if self._id in g.stages), assignment.groups[0])
            role = "a stage of" if self._id in group.stages else "an API client of"
            line = f"{model.name} is served by {self._mesh.name_of(group.host)}; this node is {role} it"
        if self._said.get(model.fingerprint) != line:
            self._said[model.fingerprint] = line
            self._say(line)

    # --- streams ---

    def _stream(self, link: Link, kind: StreamKind, stream: Stream) -> None:
        """A member wants something of this node."""
        if kind is StreamKind.RPC and self._worker:
            self._doors.spawn(serve_stream(stream, self.folder / "device.sock"), f"rpc of {link.peer_address}")
        elif kind is StreamKind.HTTP and self._worker:
            self._doors.spawn(serve_stream(stream, self.folder / "api.sock"), f"http of {link.peer_address}")
        else:
            stream.abort()

    def _stage_door(self, node_id: str) -> Any:
        from meshllm.worker import StageDoor

        name = f"peer-{node_id[:16]}.sock"
        return StageDoor(self._mesh.name_of(node_id), self.folder / name, f"unix:{name}")

    async def _open_doors(self) -> None:
        """One to the device server of every worker, for this host's engine and for this stage's pushes."""
        present = self._mesh.membership.present()
        workers = {i for i, n in present.items() if n.role is Role.WORKER and i != self._id} if self._worker else set()
        wanted = {self.folder / f"peer-{i[:16]}.sock": i for i in workers}
        for path, node_id in wanted.items():
            await self._doors.open(path, lambda i=node_id: self._mesh.open(i, StreamKind.RPC))  # type: ignore[misc]
        for path in list(self.folder.glob("peer-*.sock")):
            if path not in wanted:
                await self._doors.close(path)

    # --- api.Target ---

    @property
    def reason(self) -> str:
        if self._waits_for_memory:
            return next(self._waiting_line(a) for a in self._plan)
        return "the model is loading" if self._plan else "no model is served in this mesh"

    def _waiting_line(self, assignment: Assignment) -> str:
        need, have = assignment.need_bytes, assignment.have_bytes
        return f"Waiting for more peers: need {_gb(need)}, have {_gb(have)}"

    async def socket_for(self, timeout_s: float) -> Path | None:
        deadline = time.monotonic() + timeout_s
        while True:
            if path := await self.own_engine_socket():
                return path
            if host := self._nearest_host():
                path = self.folder / f"http-{host[:16]}.sock"
                await self._doors.open(path, lambda: self._mesh.open(host, StreamKind.HTTP))
                return path
            if self._waits_for_memory or time.monotonic() >= deadline:
                return None
            await asyncio.sleep(_POLL_S)

    async def own_engine_socket(self) -> Path | None:
        worker = self._worker
        return await worker.engine.socket_for(0) if worker and worker.engine and worker.ready else None

    def note_request(self) -> None:
        """Counted for the model that the node to be asked serves."""
        host = self._id if self._worker and self._worker.ready else self._nearest_host()
        node = self._mesh.membership.present().get(host or "")
        for serving in node.serving[:1] if node else ():
            self._rates.count(serving.fingerprint, time.monotonic())

    def failure_passes(self) -> bool:
        engine = self._worker.engine if self._worker else None
        return engine is None or engine.stage_lost

    async def wait_served(self) -> None:
        """Until a request would be answered."""
        while await self.socket_for(0) is None:  # noqa: ASYNC110 - many things may bring it about
            await asyncio.sleep(_POLL_S)

    @property
    def _waits_for_memory(self) -> bool:
        return bool(self._plan) and not any(a.groups for a in self._plan)

    def _nearest_host(self) -> str | None:
        view = self._mesh.membership.present()
        hosts = [i for i, n in view.items() if i != self._id and any(s.ready for s in n.serving)]

        def distance(node_id: str) -> tuple[float, str]:
            link = self._mesh.link(node_id)
            return (link.rtt_s if link and link.rtt_s is not None else 1.0), node_id

        return min(hosts, key=distance, default=None)

    def describe(self) -> dict[str, Any]:
        members = self._mesh.membership.members()
        nodes = [self._describe_node(self._mesh.membership.me, "alive")]
        nodes += [self._describe_node(m.announcement, str(m.state)) for _, m in sorted(members.items())]
        engine = self._worker.engine if self._worker else None
        return {
            "version": __version__,
            "node_id": self._id,
            "mesh_id": self._mesh.credentials.mesh,
            "port": self._mesh.port,
            "nodes": nodes,
            "models": [self._describe_model(a) for a in self._plan],
            "engine": engine.describe() if engine else None,
            "device_server": self._worker.server_counters() if self._worker else {},
            "reason": self.reason,
        }

    def _describe_node(self, node: Announcement, state: str) -> dict[str, Any]:
        link = self._mesh.link(node.node_id)
        return {
            "id": node.node_id,
            "name": node.name,
            "role": str(node.role),
            "state": state,
            "device": node.device,
            "memory_bytes": node.memory_bytes,
            "engine": node.engine,
            "requests_per_min": node.requests_per_min,
            "models": [m.name for m in node.models],
            "rtt_ms": round(link.rtt_s * 1000, 1) if link and link.rtt_s is not None else None,
            "address": link.peer_address if link else None,
            "bytes_sent": link.bytes_sent if link else 0,
            "bytes_received": link.bytes_received if link else 0,
            "serving": [
                {"fingerprint": s.fingerprint, "stages": list(s.stages), "ready": s.ready} for s in node.serving
            ],
        }

    def _describe_model(self, assignment: Assignment) -> dict[str, Any]:
        return {
            "name": assignment.model.name,
            "size_bytes": assignment.model.size_bytes,
            "need_bytes": assignment.need_bytes,
            "have_bytes": assignment.have_bytes,
            "groups": [
                {"host": g.host, "stages": list(g.stages), "shares": [round(s, 3) for s in g.shares]}
                for g in assignment.groups
            ],
            "reasons": {i: str(why) for i, why in assignment.reasons.items()},
        }

    # --- tokens ---

    def make_token(self, expires_s: float = 0) -> str:
        """For somebody to join with; `expires_s` from now, 0 for never. Raises MeshError before it is a member."""
        credentials = self._mesh.credentials
        if credentials.secret is None:
            raise MeshError("this node is not yet a member of the mesh")
        expires = int(time.time() + expires_s) if expires_s else 0
        ticket = make_ticket(credentials.secret, credentials.mesh, random_hex(16), expires)
        return encode_token(Token(credentials.mesh, self._id, self._addresses(), ticket))

    def revoke(self, token: Token) -> None:
        revoked = self._mesh.membership.me.revoked
        if token.ticket.serial not in revoked:
            self._mesh.membership.announce(revoked=(*revoked, token.ticket.serial))


class HostTarget:
    """What other nodes' requests may reach: the engine of this one, and nothing further.

    Without one that is ready it answers at once, so that they look for another host.
    """

    def __init__(self, node: Node) -> None:
        self._node = node

    @property
    def reason(self) -> str:
        return self._node.reason

    async def socket_for(self, timeout_s: float) -> Path | None:
        return await self._node.own_engine_socket()

    def note_request(self) -> None:
        """The node that was asked first has counted it."""

    def failure_passes(self) -> bool:
        return self._node.failure_passes()

    def describe(self) -> dict[str, Any]:
        return self._node.describe()


def default_name() -> str:
    return socket.gethostname().partition(".")[0][:40] or "node"


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def _first(errors: BaseExceptionGroup[MeshLlmError]) -> MeshLlmError:
    for error in errors.exceptions:
        return _first(error) if isinstance(error, BaseExceptionGroup) else error
    raise AssertionError("an empty group")
