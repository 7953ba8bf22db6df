"""Messages on a stream: a big-endian 32-bit length, and as many bytes."""

from __future__ import annotations

from meshllm.errors import ProtocolError
from meshllm.quic.transport import Stream


def framed(message: bytes) -> bytes:
    return len(message).to_bytes(4, "big") + message


async def write_framed(stream: Stream, message: bytes) -> None:
    await stream.write(framed(message))


async def read_framed(stream: Stream, limit: int) -> bytes | None:
    """One message; None at the end of the stream, also in the middle of a message. Raises ProtocolError."""
    head = await read_exactly(stream, 4)
    if head is None:
        return None
    size = int.from_bytes(head, "big")
    if size > limit:
        raise ProtocolError(f"a message of {size} bytes; at most {limit} are allowed")
    return await read_exactly(stream, size)


async def read_exactly(stream: Stream, size: int) -> bytes | None:
    """None when the stream ends first."""
    parts = []
    while size:
        part = await stream.read(size)
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
