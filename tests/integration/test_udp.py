"""Datagrams in batches: what the kernel cuts and joins arrives as it was sent."""

from __future__ import annotations

import errno
import select
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshllm.quic.udp import UdpSocket

SIZES = st.lists(st.sampled_from([1, 2, 30, 1200, 1452]), min_size=1, max_size=150)


def received(sock: UdpSocket, count: int) -> list[bytes]:
    found: list[bytes] = []
    while len(found) < count and select.select([sock], [], [], 5)[0]:
        found += [data for data, _ in sock.receive() or []]
    return found


@pytest.fixture(scope="module")
def pair() -> Any:
    one, other = UdpSocket(0), UdpSocket(0)
    yield one, other
    one.close()
    other.close()


def address_of(sock: UdpSocket) -> tuple[str, int]:
    return "::ffff:127.0.0.1" if sock.family.name == "AF_INET6" else "127.0.0.1", sock.port


@given(SIZES)
def test_batches_arrive_as_they_were_sent(pair: tuple[UdpSocket, UdpSocket], sizes: list[int]) -> None:
    one, other = pair
    datagrams = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
    one.send([(data, address_of(other)) for data in datagrams])
    assert received(other, len(datagrams)) == datagrams


def test_each_goes_to_its_own_address(pair: tuple[UdpSocket, UdpSocket]) -> None:
    one, other = pair
    one.send([(b"to me", address_of(one)), (b"to you", address_of(other)), (b"to you", address_of(other))])
    assert received(one, 1) == [b"to me"]
    assert received(other, 2) == [b"to you", b"to you"]


def test_a_device_that_cannot_cut_gets_them_singly() -> None:
    class Refusing:
        def __init__(self, sock: Any) -> None:
            self._sock = sock
            self.attempts = 0

        def sendmsg(self, *_arguments: Any) -> int:
            self.attempts += 1
            raise OSError(errno.EIO, "no checksums")

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

    one, other = UdpSocket(0), UdpSocket(0)
    refusing = one._socket = Refusing(one._socket)  # type: ignore[assignment]
    datagrams = [bytes(100)] * 20
    for _ in range(2):
        one.send([(data, address_of(other)) for data in datagrams])
        assert received(other, len(datagrams)) == datagrams
    assert refusing.attempts <= 1
    one.close()
    other.close()
