"""Addresses as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshllm.quic.address import join_address, readable_address, split_address


@pytest.mark.parametrize("text", ["", "a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:1x", "::1:5", "a b:1", "a:\uff11"])
def test_addresses_that_are_none(text: str) -> None:
    assert split_address(text) is None


@given(st.sampled_from(["10.1.2.3", "::1", "fe80::1%eth0", "a.example"]), st.integers(1, 65535))
def test_addresses_come_back(host: str, port: int) -> None:
    assert split_address(join_address(host, port)) == (host, port)


def test_ipv4_in_ipv6_is_written_as_ipv4() -> None:
    assert readable_address(("::ffff:10.0.0.1", 7, 0, 0)) == "10.0.0.1:7"
    assert readable_address(("fe80::1%eth0", 7, 0, 0)) == "[fe80::1%eth0]:7"
    assert readable_address(("10.0.0.1", 7)) == "10.0.0.1:7"
