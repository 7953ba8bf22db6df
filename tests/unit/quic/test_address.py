"""Addresses as text."""

from __future__ import annotations

import pytest

from meshllm.quic.address import split_address


@pytest.mark.parametrize("text", ["", "a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:1x", "::1:5", "a b:1", "a:\uff11"])
def test_addresses_that_are_none(text: str) -> None:
    assert split_address(text) is None
