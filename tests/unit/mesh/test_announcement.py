"""What a node tells all others, and what it cannot have told."""

from __future__ import annotations

from typing import Any

import pytest

from meshllm.errors import ProtocolError
from meshllm.mesh.announcement import Announcement, Capability, ModelInfo, Need, ProjectorInfo, decode_announcement

MODEL = ModelInfo("m", "ab" * 32, 1000, 4)
SEEING = Announcement("a" * 64, 1, models=(MODEL,), projectors={MODEL.fingerprint: ProjectorInfo("cd" * 32, 100)})


def test_projectors_arrive_as_they_were_sent() -> None:
    assert decode_announcement(SEEING.encode()) == SEEING
    older = {key: value for key, value in SEEING.encode().items() if key != "proj"}
    assert decode_announcement(older).projectors == {}


def test_what_models_are_for_arrives_as_it_was_sent() -> None:
    embeds = Announcement("a" * 64, 1, models=(MODEL,), capabilities={MODEL.fingerprint: Capability.EMBEDDING})
    assert decode_announcement(embeds.encode()) == embeds
    older = {key: value for key, value in embeds.encode().items() if key != "caps"}
    assert decode_announcement(older).capabilities == {}
    for wrong in ({MODEL.fingerprint: "world domination"}, {"m": "embedding"}, ["embedding"]):
        with pytest.raises(ProtocolError):
            decode_announcement(embeds.encode() | {"caps": wrong})


def test_needs_arrive_as_they_were_sent() -> None:
    told = Announcement("a" * 64, 1, models=(MODEL,), needs={MODEL.fingerprint: Need(4096, 1000, 20, 30)})
    assert decode_announcement(told.encode()) == told
    older = {key: value for key, value in told.encode().items() if key != "needs"}
    assert decode_announcement(older).needs == {}
    for wrong in ([4096, 0, 1, 1], [4096, 1, -1, 1], [4096, 1, 1], [4096, 1 << 61, 1, 1], [4096.0, 1, 1, 1], "4096"):
        with pytest.raises(ProtocolError):
            decode_announcement(told.encode() | {"needs": {MODEL.fingerprint: wrong}})


@pytest.mark.parametrize(
    "projectors",
    [
        [],
        {"short": ["cd" * 32, 100]},
        {"ab" * 32: ["../../etc/passwd", 100]},
        {"ab" * 32: ["cd" * 32, 0]},
        {"ab" * 32: ["cd" * 32, True]},
        {"ab" * 32: ["cd" * 32]},
        {"ab" * 32: None},
    ],
)
def test_projectors_that_nobody_has(projectors: Any) -> None:
    with pytest.raises(ProtocolError):
        decode_announcement(SEEING.encode() | {"proj": projectors})
