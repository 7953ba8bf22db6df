"""docs/api.md names every field of the status that programs read."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

from meshllm.mesh.engine_status import EngineStage, StageCounters
from meshllm.node.status import FullStatus

_DOC = Path(__file__).parents[3] / "docs/api.md"
# The document names these as wholes: what they hold is for those who know csrc/backend.
_WHOLE = (StageCounters, EngineStage)


def _fields(record: type) -> set[str]:
    """Of a record and of those inside it."""
    found = set()
    for field, kind in typing.get_type_hints(record).items():
        found.add(field)
        for part in (kind, *_parts(kind)):
            if dataclasses.is_dataclass(part) and part not in _WHOLE:
                found |= _fields(typing.cast(type, part))
    return found


def _parts(kind: object) -> list[object]:
    return [part for arg in typing.get_args(kind) for part in (arg, *_parts(arg))]


def test_every_field_of_the_status_is_documented() -> None:
    named = set(re.findall(r"`(\w+)`", _DOC.read_text()))
    assert _fields(FullStatus) - named == set()
    assert _fields(FullStatus) >= {"elections", "rtt_ms", "fingerprint", "stage_loaded", "buckets"}
