"""Where this node sends requests: its own engine, or a host of the model elsewhere in the mesh."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp

from meshllm.api import RequestInfo, Served, Upstream
from meshllm.api.latencies import Latencies
from meshllm.api.proxy import ENGINE_PATH, MODEL_HEADER
from meshllm.api.routing import Affinity, Candidate, Load, check_capability, find_model
from meshllm.errors import ProtocolError, UnknownModelError
from meshllm.mesh.announcement import Capability, ModelInfo
from meshllm.mesh.engine_status import MAX_ENGINE_BYTES, EngineStatus, EngineSummary, decode_engine, summarize
from meshllm.mesh.groups import Placement, StageStatus
from meshllm.mesh.mesh import Mesh
from meshllm.mesh.rates import RequestRates
from meshllm.node.status import MeshStatus
from meshllm.quic.transport import StreamKind
from meshllm.quic.tunnel import Tunnels
from meshllm.units import in_gb, socket_id

if TYPE_CHECKING:
    from meshllm.node.hosting import Hosting

_ENGINE_TIMEOUT_S = 2.0  # for a host to describe its engine
_FAR_S = 1.0  # assumed RTT of a node that is not linked yet


class Router:
    """The endpoint's `PublicTarget`, over the engine here and the hosts elsewhere."""

    def __init__(
        self, mesh: Mesh, tunnels: Tunnels, folder: Path, hosting: Hosting | None, describe: Callable[[], MeshStatus]
    ) -> None:
        self._mesh, self._tunnels, self._folder, self._hosting = mesh, tunnels, folder, hosting
        self.describe = describe
        self._self_id = mesh.me.node_id
        self.placements: Sequence[Placement] = ()
        self.rates = RequestRates()
        self.latencies = Latencies()
        self._loads = defaultdict[str, Load](lambda: Load(time.monotonic))  # of other nodes; here: `hosting.load`
        self._affinity = Affinity()

    def update(self, placements: Sequence[Placement]) -> None:
        """Takes over where the models of the mesh are placed now."""
        if placements != self.placements:
            self.placements = placements
            self._mesh.changes.notify()

    # --- `PublicTarget` ---

    def reason_for(self, info: RequestInfo) -> str:
        with contextlib.suppress(UnknownModelError):
            fingerprint = self._model_of(info, self._hosts())
            asked = [a for a in self.placements if fingerprint in (None, a.model.fingerprint)]
            if self._waits(fingerprint):
                return waiting_line(asked[0], self.placements)
            if any(why is StageStatus.FETCHING for a in asked for why in a.reasons.values()):
                return "the model is on its way to a machine that will serve it"
        return "the model is loading" if self.placements else "no model is served in this mesh"

    def served(self) -> list[Served]:
        """Every model that has a ready engine, by name."""
        found: dict[str, Served] = {}
        hosts, present = self._hosts(), self._mesh.membership.present()
        for fingerprint, infos in self._infos(hosts).items():
            info = infos[0]
            projector = any(fingerprint in present[i].projectors for i in hosts[fingerprint] if i in present)
            found[fingerprint] = Served(
                info.name,
                fingerprint,
                info.size_bytes,
                info.n_layers,
                projector,
                self._capability_of(fingerprint),
            )
        return sorted(found.values(), key=lambda served: (served.name, served.fingerprint))

    async def acquire(self, info: RequestInfo, timeout_s: float, is_new: bool) -> Upstream | None:
        deadline = time.monotonic() + timeout_s
        while True:
            seen = self._mesh.changes.version
            hosts = self._hosts()
            fingerprint = self._model_of(info, hosts)
            if is_new and fingerprint:
                self.rates.count(fingerprint, time.monotonic())
                is_new = False
            if fingerprint in hosts:
                check_capability(self._capability_of(fingerprint), info)
                candidates = [Candidate(i, self._load_of(i).total, self._distance(i)) for i in hosts[fingerprint]]
                chosen = self._affinity.choose(candidates, info).node_id
                self._affinity.remember(info, chosen)
                return await self._upstream(chosen, fingerprint)
            remaining_s = deadline - time.monotonic()
            if self._waits(fingerprint) or remaining_s <= 0:
                return None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(remaining_s):
                    await self._mesh.changes.wait(seen)

    def failure_passes(self) -> bool:
        engine = self._hosting.engine if self._hosting else None
        return engine is None or engine.stage_lost

    # --- for other nodes, and for the status ---

    @property
    def busy(self) -> int:
        """Requests that the engine here is working on."""
        return self._hosting.load.through_here if self._hosting else 0

    def acquire_local(self, fingerprint: str) -> Upstream | None:
        """The engine here, if it serves that model: for a request from another node."""
        hosting = self._hosting
        if hosting is None or hosting.socket is None or fingerprint not in ("", hosting.fingerprint):
            return None
        return Upstream(hosting.socket, hosting.load)

    async def wait_served(self) -> None:
        """Until some model is served."""
        while True:
            seen = self._mesh.changes.version
            if self._hosts():
                return
            await self._mesh.changes.wait(seen)

    def describe_engine(self) -> EngineStatus | None:
        """Of this node; None when it is no host."""
        engine = self._hosting.engine if self._hosting else None
        return engine.describe() if engine else None

    async def engines(self) -> dict[str, EngineSummary]:
        """The engines of all hosts by node id, loading ones included. Hosts that do not answer in time are left out."""
        own = self.describe_engine()
        others = sorted(i for i, n in self._mesh.membership.present().items() if n.serving and i != self._self_id)
        answers = await asyncio.gather(*(self._engine_of(node_id) for node_id in others))
        found = {self._self_id: summarize(own) if own else None} | dict(zip(others, answers, strict=True))
        return {node_id: engine for node_id, engine in found.items() if engine}

    async def _engine_of(self, node_id: str) -> EngineSummary | None:
        timeout = aiohttp.ClientTimeout(total=_ENGINE_TIMEOUT_S)
        with contextlib.suppress(aiohttp.ClientError, OSError, ProtocolError):
            connector = aiohttp.UnixConnector(path=str(await self._tunnel_to(node_id)))
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.get(f"http://host{ENGINE_PATH}") as response,
            ):
                return decode_engine(await _bounded(response, MAX_ENGINE_BYTES))
        return None

    async def _tunnel_to(self, node_id: str) -> Path:
        path = self._folder / f"http-{socket_id(node_id)}.sock"
        await self._tunnels.open(path, lambda: self._mesh.open(node_id, StreamKind.HTTP))
        return path

    def _hosts(self) -> dict[str, list[str]]:
        """Ready servers by model, this node first."""
        found: dict[str, list[str]] = {}
        if self._hosting and self._hosting.socket:
            found[self._hosting.fingerprint] = [self._self_id]
        for node_id, node in sorted(self._mesh.membership.present().items()):
            for serving in node.serving if node_id != self._self_id else ():
                if serving.ready:
                    found.setdefault(serving.fingerprint, []).append(node_id)
        return found

    def _infos(self, fingerprints: Collection[str]) -> dict[str, list[ModelInfo]]:
        """Each model under every name that a file of it has, in the same order on every node."""
        found: dict[str, set[ModelInfo]] = {}
        for node in self._mesh.membership.present().values():
            for model in (*node.wants, *node.models):
                if model.fingerprint in fingerprints:
                    found.setdefault(model.fingerprint, set()).add(model)
        return {fingerprint: sorted(models, key=lambda m: m.name) for fingerprint, models in found.items()}

    def _model_of(self, info: RequestInfo, hosts: Mapping[str, list[str]]) -> str | None:
        """The fingerprint of the named model, or of the one served here or nearest, preferably of one that can do what
        the request needs. Raises UnknownModelError.
        """
        if info.model:
            served = [(m.name, f) for f, infos in self._infos(hosts).items() for m in infos]
            known = [(a.model.name, a.model.fingerprint) for a in self.placements]
            if served or known:
                return find_model(info.model, served, known)
            return None
        suited = [f for f in hosts if self._capability_of(f) is info.needs] or hosts
        return min(suited, key=lambda f: (min(self._distance(i) for i in hosts[f]), f), default=None)

    def _capability_of(self, fingerprint: str) -> Capability:
        told = (node.capabilities.get(fingerprint) for node in self._mesh.membership.present().values())
        return next(filter(None, told), Capability.COMPLETION)

    def _waits(self, fingerprint: str | None) -> bool:
        """Whether the model, or every model, waits for memory: no point in holding the request."""
        asked = [a for a in self.placements if fingerprint in (None, a.model.fingerprint)]
        coming = any(why is StageStatus.FETCHING for a in asked for why in a.reasons.values())
        return bool(asked) and not coming and not any(a.groups for a in asked)

    def _distance(self, node_id: str) -> float:
        if node_id == self._self_id:
            return 0.0
        link = self._mesh.link(node_id)
        return link.rtt_s if link and link.rtt_s is not None else _FAR_S

    async def _upstream(self, node_id: str, fingerprint: str) -> Upstream:
        load = self._load_of(node_id)
        if node_id == self._self_id and self._hosting and self._hosting.socket:
            return Upstream(self._hosting.socket, load)
        return Upstream(await self._tunnel_to(node_id), load, {MODEL_HEADER: fingerprint})

    def _load_of(self, node_id: str) -> Load:
        if node_id == self._self_id and self._hosting:
            return self._hosting.load
        return self._loads[node_id]


class LocalTarget:
    """What requests from other nodes may reach: the engine here, and nothing beyond it.

    Without a ready engine it refuses at once, so that they try another host.
    """

    def __init__(self, router: Router) -> None:
        self._router = router

    @property
    def busy(self) -> int:
        return self._router.busy

    def describe_engine(self) -> EngineStatus | None:
        return self._router.describe_engine()

    def reason_for(self, info: RequestInfo) -> str:
        return self._router.reason_for(RequestInfo())

    async def acquire(self, info: RequestInfo, timeout_s: float, is_new: bool) -> Upstream | None:
        return self._router.acquire_local(info.model)

    def failure_passes(self) -> bool:
        return self._router.failure_passes()


async def _bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body. Raises ProtocolError when it is longer."""
    body = b""
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit:
            raise ProtocolError(f"the answer is longer than {limit} bytes")
    return body


def waiting_line(placement: Placement, placements: Sequence[Placement]) -> str:
    need, have = in_gb(placement.need_bytes), in_gb(sum(placement.have_bytes))
    which = f" for {placement.model.name}" if len(placements) > 1 else ""
    context = f" with {placement.need.n_ctx:,} tokens of context" if placement.need.n_ctx else ""
    return f"Waiting for more peers{which}: need {need}{context}, have {have}"
