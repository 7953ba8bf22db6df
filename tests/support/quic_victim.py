"""A native endpoint in a process of its own, to be attacked: it echoes RPC streams and reads no TRANSFER stream.

Prints its port; for every line on its input, "RSS_BYTES CPU_SECONDS LINKS".
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

import psutil
import uvloop

from meshllm.errors import MeshLlmError
from meshllm.quic.identity import make_identity
from meshllm.quic.native import NativeEndpoint
from meshllm.quic.transport import Link, Stream, StreamKind

_tasks: set[asyncio.Task[None]] = set()
_kept: list[Stream] = []
_links: list[Link] = []


async def _echo(stream: Stream) -> None:
    with contextlib.suppress(MeshLlmError):
        while data := await stream.read():
            await stream.write(data)
        stream.finish()


def _opened(_link: Link, kind: StreamKind, stream: Stream) -> None:
    if kind is StreamKind.RPC:
        task = asyncio.create_task(_echo(stream))
        _tasks.add(task)
        task.add_done_callback(_tasks.discard)
    else:
        _kept.append(stream)


async def main() -> None:
    endpoint = NativeEndpoint(make_identity(), _links.append, _opened)
    endpoint.start(0)
    print(endpoint.port, flush=True)
    me = psutil.Process()
    while await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline):
        used = me.cpu_times()
        alive = sum(not link.closed for link in _links)
        print(me.memory_info().rss, used.user + used.system, alive, flush=True)
    await endpoint.close()


if __name__ == "__main__":
    uvloop.run(main())
