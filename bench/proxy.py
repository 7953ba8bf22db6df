"""What the endpoint costs: time to the first token and between tokens, against asking llama-server directly.

    python bench/proxy.py [--requests 40] [--tokens 48]

On loopback: a host, a worker that lends too little to serve, and a lite client. "direct" is the host's llama-server at
its own Unix socket; the requests of all four go in turn. Milliseconds, medians; "between" is of all gaps of a stream.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import aiohttp
from common import MODEL, table
from support.processes import MeshLlm

PROMPT = "The history of Rome begins with a village on a hill, and goes on with"


async def stream(session: aiohttp.ClientSession, url: str, n_tokens: int) -> tuple[float, list[float]]:
    """Seconds to the first token, and between tokens."""
    body = {"prompt": PROMPT, "n_predict": n_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    began = time.perf_counter()
    times = []
    async with session.post(url, json=body) as response:
        async for line in response.content:
            if line.startswith(b"data: "):
                times.append(time.perf_counter())
    times = times[:n_tokens]
    return times[0] - began, [b - a for a, b in itertools.pairwise(times)]


async def measure(urls: dict[str, tuple[str, Path | None]], requests: int, n_tokens: int) -> list[list[object]]:
    sessions = {}
    for way, (_, socket) in urls.items():
        connector = aiohttp.UnixConnector(path=str(socket)) if socket else aiohttp.TCPConnector()
        sessions[way] = aiohttp.ClientSession(connector=connector)
    firsts: dict[str, list[float]] = {way: [] for way in urls}
    gaps: dict[str, list[float]] = {way: [] for way in urls}
    for i in range(requests + 2):
        for way, (base, _) in urls.items():
            first, between = await stream(sessions[way], f"{base}/completion", n_tokens)
            if i >= 2:  # the first ones warm up
                firsts[way].append(first)
                gaps[way] += between
    for session in sessions.values():
        await session.close()
    rows: list[list[object]] = []
    direct_first, direct_gap = statistics.median(firsts["direct"]), statistics.median(gaps["direct"])
    for way in urls:
        first, gap = statistics.median(firsts[way]), statistics.median(gaps[way])
        worst = sorted(gaps[way])[int(len(gaps[way]) * 0.99)]
        rows.append([way, first * 1e3, (first - direct_first) * 1e3, gap * 1e3, (gap - direct_gap) * 1e3, worst * 1e3])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    with ExitStack() as stack:
        host = stack.enter_context(MeshLlm("--model", str(MODEL), "--", "-c", "2048", "-t", "1")).ready()
        token = host.command("token").stdout.strip()
        worker = stack.enter_context(MeshLlm("--join", token, "--max-vram", "0.01", "--no-fetch")).ready()
        client = stack.enter_context(MeshLlm("--join", token, "--client")).ready()
        socket = next(Path(tempfile.gettempdir()).glob(f"mesh-llm-{host.popen.pid}-*/engine.sock"))
        urls: dict[str, tuple[str, Path | None]] = {"direct": ("http://engine", socket)}
        urls |= {name: (node.api.base, None) for name, node in (("host", host), ("worker", worker), ("client", client))}
        rows = asyncio.run(measure(urls, args.requests, args.tokens))
    table(("asked", "first token ms", "more than direct", "between tokens ms", "more", "99th percentile"), rows)


if __name__ == "__main__":
    main()
