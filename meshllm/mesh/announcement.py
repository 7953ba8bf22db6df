"""What a node tells all others about itself. Checked once, when it is decoded, and immutable from then on."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, TypeVar

from meshllm.errors import ProtocolError
from meshllm.quic.address import split_address

_T = TypeVar("_T")

MAX_VERSION = 1 << 60
MAX_NAME = 80
MAX_MODELS = 256
MAX_PEERS = 1024
MAX_ADDRESSES = 32
_NODE = re.compile(r"[0-9a-f]{64}")
_SERIAL = re.compile(r"[0-9a-f]{32}")


class Role(enum.StrEnum):
    WORKER = "worker"
    CLIENT = "client"  # uses the mesh and computes nothing


class Capability(enum.StrEnum):
    """What a model is for."""

    COMPLETION = "completion"
    EMBEDDING = "embedding"
    RERANK = "rerank"


@dataclass(frozen=True)
class ModelInfo:
    """A model on a node's disk, or one that it wants served. `fingerprint`: 64 hexadecimal digits."""

    name: str
    fingerprint: str
    size_bytes: int
    n_layers: int


@dataclass(frozen=True)
class ProjectorInfo:
    """The projector that a node has beside a model. `fingerprint` as of a model, of the projector's file."""

    fingerprint: str
    size_bytes: int


@dataclass(frozen=True)
class Need:
    """Bytes that a model takes with a node as its host, at the least context with which that node would serve it.

    Layers count with their KV cache or state, and may be shared between machines; the rest may not.
    """

    n_ctx: int  # tokens; 0 if unknown
    layers_bytes: int
    stage_bytes: int  # beside its layers on each stage: compute buffers, and a layer that does not fit whole
    host_bytes: int  # beside its layers on the host: output layer, compute buffers, projector

    @property
    def alone_bytes(self) -> int:
        return self.layers_bytes + self.host_bytes

    def fits(self, stages_bytes: Sequence[int], host_bytes: int) -> bool:
        spare = [host_bytes - self.host_bytes, *(n - self.stage_bytes for n in stages_bytes)]
        return min(spare) > 0 and sum(spare) >= self.layers_bytes


@dataclass(frozen=True)
class Serving:
    """The engine that a node runs as host, or is starting."""

    fingerprint: str
    stages: tuple[str, ...]  # node ids in the order of layers
    ready: bool


@dataclass(frozen=True)
class Announcement:
    """`version` grows with every change, and past any version that others remember from an earlier run of the node."""

    node_id: str
    version: int
    name: str = ""
    role: Role = Role.WORKER
    addresses: tuple[str, ...] = ()
    device: str = ""
    memory_bytes: int = 0  # that models may take: the devices' memory under the user's cap, less the reserve
    ggml_version: str = ""  # only nodes of the same version compute together
    models: tuple[ModelInfo, ...] = ()  # on the node's disk
    projectors: dict[str, ProjectorInfo] = field(default_factory=dict)  # fingerprint of such a model -> its projector
    capabilities: dict[str, Capability] = field(default_factory=dict)  # of such models that do not complete text
    needs: dict[str, Need] = field(default_factory=dict)  # fingerprint of a model that is wanted -> what it takes
    named: tuple[str, ...] = ()  # fingerprints of the models that its user named, in that order
    wants: tuple[ModelInfo, ...] = ()  # those, and the ones that it knows other users named
    fetches: bool = False  # it fetches the file of a model that is placed on it
    cannot_fetch: tuple[str, ...] = ()  # fingerprints of models whose fetch has failed
    fetching: dict[str, float] = field(default_factory=dict)  # fingerprint -> how much has arrived, 0 to 1
    drops: dict[str, int] = field(
        default_factory=dict
    )  # fingerprint -> count, odd while dropped; the highest known counts
    split: bool = False
    tensor_split: tuple[float, ...] = ()
    serving: tuple[Serving, ...] = ()
    rtts_ms: dict[str, float] = field(default_factory=dict)
    revoked: tuple[str, ...] = ()  # serials of tokens
    requests_per_min: dict[str, float] = field(default_factory=dict)  # fingerprint -> rate at this node's endpoint

    def encode(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "id": self.node_id,
            "v": self.version,
            "name": self.name,
            "role": str(self.role),
            "addrs": list(self.addresses),
            "dev": self.device,
            "mem": self.memory_bytes,
            "eng": self.ggml_version,
            "models": [_model_fields(m) for m in self.models],
            "proj": {model: [p.fingerprint, p.size_bytes] for model, p in self.projectors.items()},
            "caps": {model: str(capability) for model, capability in self.capabilities.items()},
            "needs": {model: list(astuple(need)) for model, need in self.needs.items()},
            "named": list(self.named),
            "wants": [_model_fields(m) for m in self.wants],
            "fetches": self.fetches,
            "cannot": list(self.cannot_fetch),
            "fetching": self.fetching,
            "drops": self.drops,
            "split": self.split,
            "ts": list(self.tensor_split),
            "serving": [[s.fingerprint, list(s.stages), s.ready] for s in self.serving],
            "rtts": self.rtts_ms,
            "revoked": list(self.revoked),
            "req": self.requests_per_min,
        }


def _model_fields(model: ModelInfo) -> list[object]:
    return [model.name, model.fingerprint, model.size_bytes, model.n_layers]


def decode_announcement(value: object) -> Announcement:
    """Raises ProtocolError for anything that `encode` cannot have made."""
    try:
        return _decode(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProtocolError(f"malformed announcement: {error!r}") from None


def _decode(value: Any) -> Announcement:
    return Announcement(
        node_id=_node(value["id"]),
        version=_number(value["v"], 1, MAX_VERSION),
        name=_text(value["name"]),
        role=Role(value["role"]),
        addresses=_list(value["addrs"], _address, MAX_ADDRESSES),
        device=_text(value["dev"]),
        memory_bytes=_number(value["mem"], 0, 1 << 60),
        ggml_version=_text(value["eng"]),
        models=_list(value["models"], _model, MAX_MODELS),
        projectors=_table(value.get("proj", {}), _projector),  # older nodes know of none
        capabilities=_table(value.get("caps", {}), Capability),
        needs=_table(value.get("needs", {}), _need),
        named=_list(value["named"], _node, MAX_MODELS),
        wants=_list(value["wants"], _model, MAX_MODELS),
        fetches=_flag(value["fetches"]),
        cannot_fetch=_list(value["cannot"], _node, MAX_MODELS),
        fetching=_table(value["fetching"], _non_negative),
        drops=_table(value["drops"], lambda n: _number(n, 0, MAX_VERSION)),
        split=_flag(value["split"]),
        tensor_split=_list(value["ts"], _non_negative, 64),
        serving=_list(value["serving"], _serving, 64),
        rtts_ms=_table(value["rtts"], _non_negative),
        revoked=_list(value["revoked"], _serial, MAX_PEERS),
        requests_per_min=_table(value["req"], _non_negative),
    )


def _list(value: Any, item: Callable[[Any], _T], limit: int) -> tuple[_T, ...]:
    if not isinstance(value, list) or len(value) > limit:
        raise ValueError("not a list, or too long")
    return tuple(item(v) for v in value)


def _text(value: Any) -> str:
    """Text that is shown to people, without characters that control a terminal."""
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise ValueError("not a string, or too long")
    return "".join(c if c.isprintable() else "?" for c in value)


def _number(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError("not an integer, or out of range")
    return value


def _non_negative(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1e12:
        raise ValueError("not a number, or negative")
    return float(value)


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("not a boolean")
    return value


def _matching(pattern: re.Pattern[str], value: Any) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ValueError("not an id")
    return value


def _node(value: Any) -> str:
    return _matching(_NODE, value)


def _serial(value: Any) -> str:
    return _matching(_SERIAL, value)


def _address(value: Any) -> str:
    if not isinstance(value, str) or not split_address(value):
        raise ValueError("not an address")
    return value


def _model(value: Any) -> ModelInfo:
    name, fingerprint, size, n_layers = value
    if not _text(name):
        raise ValueError("a model without a name")
    return ModelInfo(_text(name), _node(fingerprint), _number(size, 1, 1 << 60), _number(n_layers, 1, 10000))


def _projector(value: Any) -> ProjectorInfo:
    fingerprint, size = value
    return ProjectorInfo(_node(fingerprint), _number(size, 1, 1 << 60))


def _need(value: Any) -> Need:
    n_ctx, layers, stage, host = value
    sizes = (_number(size, low, 1 << 60) for size, low in ((layers, 1), (stage, 0), (host, 0)))
    return Need(_number(n_ctx, 0, 1 << 40), *sizes)


def _serving(value: Any) -> Serving:
    fingerprint, stages, ready = value
    return Serving(_node(fingerprint), _list(stages, _node, 64), _flag(ready))


def _table(value: Any, item: Callable[[Any], _T]) -> dict[str, _T]:
    """Keys are node ids or fingerprints."""
    if not isinstance(value, dict) or len(value) > MAX_PEERS:
        raise ValueError("not an object, or too large")
    return {_node(k): item(v) for k, v in value.items()}
