"""Asks an endpoint that echoes, again and again: quic_caller.py ENGINE ADDRESS prints a line for each answer."""

from __future__ import annotations

import asyncio
import sys

from meshllm.quic.identity import make_identity
from meshllm.quic.stacks import stack_named
from meshllm.quic.transport import StreamKind

MESSAGE = bytes(20_000)


async def main() -> None:
    endpoint = stack_named(sys.argv[1])(make_identity(), lambda _link: None, lambda *_: None)
    endpoint.start(0)
    link = await endpoint.dial(sys.argv[2], None, 10)
    stream = link.open(StreamKind.RPC)
    while True:
        await stream.write(MESSAGE)
        left = len(MESSAGE)
        while left:
            left -= len(await stream.read(left))
        print("answered", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
