"""Which server gets a request: by its model, by where its prefix is cached, and by load. No I/O."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from meshllm.errors import NotJsonError, UnknownModelError, WrongModelError
from meshllm.mesh.announcement import Capability
from meshllm.models.names import matching

_BLOCK_BYTES = 512  # of a prompt, about a hundred tokens: a shorter cached prefix is not worth a longer queue
_MAX_BLOCKS = 256
_MAX_REMEMBERED = 1 << 14
_WORTH_WAITING = 2  # more requests than at the least loaded server, for a cached prefix
_FAILED = 1000  # requests that a failed server is counted with
_REPORT_S = 10.0  # how long a server's report of its load counts
# llama-server's paths, with or without /v1 before them
_NEEDS = dict.fromkeys(
    ("chat/completions", "completions", "completion", "messages", "responses", "infill"), Capability.COMPLETION
)
_NEEDS |= dict.fromkeys(("embeddings", "embedding"), Capability.EMBEDDING)
_NEEDS |= dict.fromkeys(("rerank", "reranking"), Capability.RERANK)


@dataclass(frozen=True)
class RequestInfo:
    """The model that a request names, "" for none; digests of longer and longer prefixes of its prompt; what it asks
    of a model, if that follows from its path.
    """

    model: str = ""
    prefixes: tuple[bytes, ...] = ()
    needs: Capability | None = None


def read_request_info(body: bytes, query_model: str = "", must_be_json: bool = False) -> RequestInfo:
    """Reads a JSON body. Any other names no model, or raises NotJsonError if the body `must_be_json`."""
    content: Any = {}
    try:
        if must_be_json or body.lstrip()[:1] == b"{":
            content = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        if must_be_json:
            raise NotJsonError(f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        content = {}
    model = content.get("model") or query_model
    return RequestInfo(model if isinstance(model, str) else "", tuple(_prefixes(content)))


def _prefixes(content: dict[str, Any]) -> Iterable[bytes]:
    """Chained digests, which two conversations share as far as they are equal."""
    begin = [content.get(key) for key in ("tools", "system", "instructions")]
    text = next((content[key] for key in ("messages", "prompt", "input") if content.get(key)), None)
    if text is None:
        return
    data = orjson.dumps([begin, text])[:-2]  # without the closing brackets, which move as it grows
    digest = b""
    for at in range(0, min(len(data) // _BLOCK_BYTES, _MAX_BLOCKS) * _BLOCK_BYTES, _BLOCK_BYTES):
        digest = hashlib.blake2b(digest + data[at : at + _BLOCK_BYTES], digest_size=16).digest()
        yield digest


def needed_for(path: str) -> Capability | None:
    """What a request to that path asks of a model."""
    return _NEEDS.get(path.removeprefix("/v1").strip("/"))


def check_capability(capability: Capability, info: RequestInfo) -> None:
    """Raises WrongModelError if a model that does not complete text is asked to; llama-server would fail, or write
    nonsense. For the other uses llama-server may have been given options, and else says so itself.
    """
    if info.needs is Capability.COMPLETION and capability is not Capability.COMPLETION:
        does = "makes embeddings" if capability is Capability.EMBEDDING else "ranks documents"
        where = "embeddings" if capability is Capability.EMBEDDING else "rerank"
        raise WrongModelError(f"this model only {does}, at /v1/{where}; it does not complete text")


def find_model(wanted: str, served: Sequence[tuple[str, str]], known: Sequence[tuple[str, str]]) -> str:
    """The fingerprint for a name, among (name, fingerprint) pairs: first of served models, then of all known ones.

    Raises UnknownModelError.
    """
    for models in (served, known):
        names = {name: fingerprint for name, fingerprint in reversed(models)}
        if chosen := matching(wanted, names):
            return names[chosen[0]]
    there = ", ".join(dict.fromkeys(name for name, _ in [*served, *known])) or "none"
    raise UnknownModelError(f"the model '{wanted}' is not served here; served: {there}")


@dataclass(frozen=True)
class Candidate:
    """A ready server: `busy` requests in work; `distance` in seconds, 0 for this node's own."""

    node_id: str
    busy: int
    distance: float


class Affinity:
    """Which server has seen which prefix last."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, str] = OrderedDict()

    def choose(self, candidates: Sequence[Candidate], info: RequestInfo) -> Candidate:
        """The server with the longest cached prefix, unless it is much busier; else the least busy, or the nearest."""
        best = min(candidates, key=lambda c: (c.busy, c.distance, c.node_id))
        by_id = {c.node_id: c for c in candidates}
        for digest in reversed(info.prefixes):
            cached = by_id.get(self._seen.get(digest, ""))
            if cached:
                return cached if cached.busy - best.busy <= _WORTH_WAITING else best
        return best

    def remember(self, info: RequestInfo, node_id: str) -> None:
        for digest in info.prefixes:
            self._seen[digest] = node_id
            self._seen.move_to_end(digest)
        while len(self._seen) > _MAX_REMEMBERED:
            self._seen.popitem(last=False)


class Load:
    """Requests in work at one server: those sent by this node, and those that the server reports of others.

    Use as `with` around each request. `idle` is called when the last request of this node has ended.
    """

    def __init__(self, clock: Callable[[], float], idle: Callable[[], None] = lambda: None) -> None:
        self.through_here = 0
        self._clock, self._idle = clock, idle
        self._others, self._reported_at = 0, -math.inf

    def __enter__(self) -> None:
        self.through_here += 1

    def __exit__(self, *_error: object) -> None:
        self.through_here -= 1
        if not self.through_here:
            self._idle()

    def report(self, busy: int) -> None:
        """The server's own count of all requests, including this node's."""
        self._others, self._reported_at = max(0, busy - self.through_here), self._clock()

    def fail(self) -> None:
        """Puts the server last for a while."""
        self._others, self._reported_at = _FAILED, self._clock()

    @property
    def total(self) -> int:
        fresh = self._clock() - self._reported_at < _REPORT_S
        return self.through_here + (self._others if fresh else 0)
