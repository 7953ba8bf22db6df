"""Messages on a stream, however the stream cuts them."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshllm.errors import ProtocolError
from meshllm.quic.framing import framed, read_exactly, read_framed
from meshllm.quic.transport import Stream


class Bytes:
    """A stream that gives `data` in parts of at most the given sizes, and then ends."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self._data, self._sizes = data, sizes

    async def read(self, limit: int = 1 << 18) -> bytes:
        size = min(limit, self._sizes.pop(0) if self._sizes else limit)
        part, self._data = self._data[:size], self._data[size:]
        return part


def stream(data: bytes, sizes: list[int] | None = None) -> Stream:
    return cast(Stream, Bytes(data, sizes or []))


async def all_of(source: Stream, limit: int) -> list[bytes]:
    found = []
    while (message := await read_framed(source, limit)) is not None:
        found.append(message)
    return found


@given(st.lists(st.binary(max_size=50), max_size=5), st.lists(st.integers(1, 9), max_size=60))
def test_messages_come_whole(messages: list[bytes], sizes: list[int]) -> None:
    data = b"".join(map(framed, messages))
    assert asyncio.run(all_of(stream(data, sizes), 50)) == messages


@given(st.binary(min_size=1, max_size=50), st.data())
def test_a_message_cut_off_is_none(message: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(message) + 3))
    assert asyncio.run(read_framed(stream(framed(message)[:cut]), 50)) is None


def test_a_length_beyond_the_limit_is_not_read() -> None:
    with pytest.raises(ProtocolError, match="a message of 4294967295 bytes; at most 50 are allowed"):
        asyncio.run(read_framed(stream(b"\xff" * 9), 50))


def test_exactly_so_much() -> None:
    source = stream(b"abcdef", [1, 1])
    assert [asyncio.run(read_exactly(source, n)) for n in (0, 4, 2, 1)] == [b"", b"abcd", b"ef", None]
