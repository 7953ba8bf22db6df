"""The counters that libggml-mesh keeps in a file; csrc/backend/counters.h has the layout."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass, fields
from pathlib import Path

from meshllm.mesh.engine_status import StageCounters

COUNTERS_FILE_BYTES = 8192
_MAGIC = b"MLCOUNT1"
_STAGES_AT, _BLOCK_SIZE = 64, 256
_ERROR_AT, _ERROR_SIZE = 4608, 512
_N_COUNTERS = len(fields(StageCounters))


class LinkState(enum.IntEnum):
    STARTING = 0
    CONNECTED = 1
    LOST = 2


@dataclass(frozen=True)
class Counters:
    """`stages` in the order of their layers; `error` is the library's first error."""

    state: LinkState = LinkState.STARTING
    error: str = ""
    stages: tuple[StageCounters, ...] = ()


def read_counters(path: Path) -> Counters:
    """Reads the file. Before the library has begun to write it, the state is STARTING."""
    try:
        data = path.read_bytes()
    except OSError:
        return Counters()
    if len(data) < _ERROR_AT + _ERROR_SIZE or not data.startswith(_MAGIC):
        return Counters()
    n_stages, state = struct.unpack_from("<II", data, len(_MAGIC))
    blocks = [struct.unpack_from(f"<{_N_COUNTERS}Q", data, _STAGES_AT + i * _BLOCK_SIZE) for i in range(n_stages)]
    error = data[_ERROR_AT : _ERROR_AT + _ERROR_SIZE].split(b"\0", 1)[0].decode(errors="replace")
    stages = tuple(StageCounters(*block) for block in blocks)
    return Counters(LinkState(min(state, LinkState.LOST)), error, stages)
