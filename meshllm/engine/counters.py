"""The counters that libggml-mesh keeps in a file; csrc/backend/counters.h has the layout."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, field
from pathlib import Path

_MAGIC = b"MLCOUNT1"
_STAGES_AT, _BLOCK_SIZE = 64, 256
_ERROR_AT, _ERROR_SIZE = 4608, 512
_NAMES = [
    "frames_sent",
    "frames_received",
    "bytes_sent",
    "bytes_received",
    "blocking_waits",
    "graph_hits",
    "graph_sends",
    "graph_bytes",
    "weight_bytes_sent",
    "weight_bytes_local",
    "pushes",
    "push_bytes",
    "relays",
    "relay_bytes",
    "supports_op_queries",
    "alloc_size_queries",
    "wait_ns",
    "lost",
]


class LinkState(enum.IntEnum):
    STARTING = 0
    CONNECTED = 1
    LOST = 2


@dataclass(frozen=True)
class Counters:
    """`stages` has one dictionary per stage, in order; `error` is the first error of the library."""

    state: LinkState = LinkState.STARTING
    error: str = ""
    stages: tuple[dict[str, int], ...] = field(default=())


def read_counters(path: Path) -> Counters:
    """Whatever is there; a file that is missing or not yet begun reads as starting."""
    try:
        data = path.read_bytes()
    except OSError:
        return Counters()
    if len(data) < _ERROR_AT + _ERROR_SIZE or not data.startswith(_MAGIC):
        return Counters()
    n_stages, state = struct.unpack_from("<II", data, len(_MAGIC))
    blocks = [struct.unpack_from(f"<{len(_NAMES)}Q", data, _STAGES_AT + i * _BLOCK_SIZE) for i in range(n_stages)]
    error = data[_ERROR_AT : _ERROR_AT + _ERROR_SIZE].split(b"\0", 1)[0].decode(errors="replace")
    stages = tuple(dict(zip(_NAMES, block, strict=True)) for block in blocks)
    return Counters(LinkState(min(state, LinkState.LOST)), error, stages)
