"""Which model each worker is placed on: one at a time, computed from the view alone, so the same on every node.

A placed worker stays where it is. A worker whose user named models takes one of those. Any other is free: it takes a
model that nobody serves yet, preferring one on its disk, or else the one with the fewest servers. A free worker moves
in two cases only: to a model that nobody serves and that it would complete; and from a model with several servers to
one with much more demand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshllm.mesh.announcement import Announcement, ModelInfo, Role
from meshllm.mesh.groups import Placement, fits_alone, has_model, place_model, will_fetch, within_reach

_BUSY_PER_MIN = 6.0  # requests per server, below which another server is of no use
_MUCH_MORE = 4.0  # times the load per server that the move leaves behind: moving back takes a factor of sixteen


def dropped(view: Mapping[str, Announcement]) -> dict[str, int]:
    """Drop counts by fingerprint, the highest that any node knows."""
    known: dict[str, int] = {}
    for node in view.values():
        for fingerprint, count in node.drops.items():
            known[fingerprint] = max(count, known.get(fingerprint, 0))
    return known


def wanted_models(view: Mapping[str, Announcement]) -> list[ModelInfo]:
    """The models that somebody named and nobody has dropped, ordered by fingerprint."""
    drops = dropped(view)
    models = {model.fingerprint: model for _, node in sorted(view.items()) for model in node.wants}
    return [models[key] for key in sorted(models) if drops.get(key, 0) % 2 == 0]


def place_models(view: Mapping[str, Announcement]) -> list[Placement]:
    """One placement per wanted model."""
    teams = _Teams(view)
    teams.settle()
    return [teams.placement(fingerprint) for fingerprint in teams.models]


def requests_per_min(view: Mapping[str, Announcement]) -> dict[str, float]:
    """Request rates by fingerprint, summed over all endpoints."""
    rates: dict[str, float] = {}
    for node in view.values():
        for fingerprint, rate in node.requests_per_min.items():
            rates[fingerprint] = rates.get(fingerprint, 0.0) + rate
    return rates


@dataclass
class _Teams:
    """The workers of each model, while they are being chosen."""

    view: Mapping[str, Announcement]
    models: dict[str, ModelInfo] = field(init=False)
    members: dict[str, set[str]] = field(init=False)
    rates: Mapping[str, float] = field(init=False)
    _placements: dict[str, Placement] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = {m.fingerprint: m for m in wanted_models(self.view)}
        self.members = {fingerprint: set() for fingerprint in self.models}
        self.rates = requests_per_min(self.view)

    def settle(self) -> None:
        if not self.models:
            return
        workers = {i: n for i, n in sorted(self.view.items()) if n.role is Role.WORKER}
        current = self._current()
        newcomers = []
        for node_id, node in workers.items():
            if (now := current.get(node_id)) in self._allowed(node):
                self._put(node_id, str(now))
            else:
                newcomers.append(node_id)

        def order(node_id: str) -> tuple[bool, int, int, str]:
            node = workers[node_id]
            return self._is_free(node), len(self._allowed(node)), -node.memory_bytes, node_id

        newcomers.sort(key=order)
        for node_id in newcomers:
            self._put(node_id, self._choice(workers[node_id]))
        self._rescue()
        self._relieve()

    def placement(self, fingerprint: str) -> Placement:
        if fingerprint not in self._placements:
            self._placements[fingerprint] = place_model(self.models[fingerprint], self.view, self.members[fingerprint])
        return self._placements[fingerprint]

    def _put(self, node_id: str, fingerprint: str) -> None:
        for other, team in self.members.items():
            if node_id in team:
                team.discard(node_id)
                self._placements.pop(other, None)
        self.members[fingerprint].add(node_id)
        self._placements.pop(fingerprint, None)

    def _current(self) -> dict[str, str]:
        """Node id to the model that the node serves, helps to serve, or fetches."""
        found: dict[str, str] = {}
        for node_id, node in sorted(self.view.items()):
            for serving in node.serving:
                for member in (node_id, *serving.stages):
                    found.setdefault(member, serving.fingerprint)
        for node_id, node in self.view.items():
            for fingerprint in sorted(node.fetching):
                found.setdefault(node_id, fingerprint)
        return found

    def _is_free(self, node: Announcement) -> bool:
        """Whether its user left the choice to the mesh."""
        return not any(f in self.models for f in node.named)

    def _allowed(self, node: Announcement) -> list[str]:
        return list(self.models) if self._is_free(node) else [f for f in node.named if f in self.models]

    def _choice(self, node: Announcement) -> str:
        allowed = self._allowed(node)
        if not self._is_free(node):  # the first named wins, all else being equal
            return min(allowed, key=lambda f: (self._servers(f) > 0, allowed.index(f)))
        return min(allowed, key=lambda f: (*self._rank(node, f), f))

    def _rank(self, node: Announcement, fingerprint: str) -> tuple[float, ...]:
        """Sorts models by how much they need a free node: unserved first, then on its disk, then with few servers."""
        model = self.models[fingerprint]
        alone, lacks = self._may_serve(node, model), not has_model(node, model)
        n_servers = self._servers(fingerprint)
        if not n_servers:
            helps = alone or within_reach(node, [self.view[i] for i in self.members[fingerprint]])
            placement = self.placement(fingerprint)
            return (0 if helps else 2, lacks, placement.need.alone_bytes - sum(placement.have_bytes))
        servers = n_servers / (1.0 + self.rates.get(fingerprint, 0.0))
        return (1 if alone else 3, servers, lacks)

    def _servers(self, fingerprint: str) -> int:
        """How many nodes serve the model, counting those that fetch its file and will serve it alone."""
        model, placement = self.models[fingerprint], self.placement(fingerprint)
        serving = {g.host for g in placement.groups}
        team = (self.view[i] for i in self.members[fingerprint] - serving)
        coming = [node for node in team if will_fetch(node, model) and self._may_serve(node, model)]
        return len(serving) + len(coming)

    def _spare(self, fingerprint: str) -> list[str]:
        """Free nodes that serve the model alone, if it has other servers too."""
        groups = self.placement(fingerprint).groups
        if len(groups) < 2:
            return []
        return [g.host for g in groups if not g.stages and self._is_free(self.view[g.host])]

    def _rescue(self) -> None:
        """Gives each model that nobody serves a node of a model that has several servers."""
        for needy in [f for f in self.models if not self._servers(f)]:
            givers = sorted((f for f in self.models if f != needy), key=lambda f: (self.rates.get(f, 0.0), f))
            for node_id, giver in [(i, f) for f in givers for i in self._spare(f)]:
                self._put(node_id, needy)
                if self._servers(needy):
                    break
                self._put(node_id, giver)

    def _relieve(self) -> None:
        """Moves one node from the model with the least load per server to the one with the most."""

        def load(fingerprint: str, fewer: int = 0) -> float:
            return self.rates.get(fingerprint, 0.0) / (self._servers(fingerprint) - fewer)

        served = [f for f in self.models if self._servers(f)]
        if len(served) < 2:
            return
        busy = max(served, key=lambda f: (load(f), f))
        givers = [f for f in served if f != busy and self._spare(f)]
        for giver in sorted(givers, key=lambda f: (load(f, 1), f)):
            if load(busy) < max(_BUSY_PER_MIN, _MUCH_MORE * load(giver, 1)):
                return
            able = [i for i in self._spare(giver) if self._may_serve(self.view[i], self.models[busy])]
            able.sort(key=lambda i: not has_model(self.view[i], self.models[busy]))
            if able:
                self._put(able[0], busy)
                return

    def _may_serve(self, node: Announcement, model: ModelInfo) -> bool:
        """Whether the node can serve the model alone, now or once it has the file."""
        return fits_alone(node, model, self.view) and (has_model(node, model) or will_fetch(node, model))
