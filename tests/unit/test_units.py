"""Sizes and ids as people read them."""

from __future__ import annotations

import pytest

from meshllm.units import in_gb, short_id, socket_id


@pytest.mark.parametrize(
    ("n_bytes", "text"), [(12_345_678_901, "12.3 GB"), (10**9, "1.0 GB"), (340_000_000, "340 MB"), (0, "0 MB")]
)
def test_sizes(n_bytes: int, text: str) -> None:
    assert in_gb(n_bytes) == text


def test_ids() -> None:
    assert (short_id("ab" * 32), socket_id("ab" * 32)) == ("ab" * 5, "ab" * 8)
