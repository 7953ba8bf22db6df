"""What open dashboards cost the node: time to the first token with none and with fifty, in one run.

    python bench/console.py [--viewers 50] [--seconds 60] [--rounds 3]

On loopback, one host with its dashboard; all on the same cores, the readers too. Rounds without and with
viewers take turns. "status" is GET /mesh/status, which the node's event loop answers alone. Medians and 99th
percentiles in milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

import aiohttp
from common import MODEL, table
from support.processes import MeshLlm, free_port


async def sample(session: aiohttp.ClientSession, base: str, seconds: float) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"first token": [], "status": []}
    body = {"prompt": "Hi", "n_predict": 1, "temperature": 0, "cache_prompt": False}
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for name in found:
            began = time.perf_counter()
            if name == "status":
                request = session.get(f"{base}/mesh/status")
            else:
                request = session.post(f"{base}/completion", json=body)
            async with request as response:
                await response.read()
            found[name].append((time.perf_counter() - began) * 1e3)
        await asyncio.sleep(0.05)
    return found


async def watch(session: aiohttp.ClientSession, url: str) -> None:
    async with session.get(f"{url}/api/events") as response:
        async for _ in response.content.iter_any():
            pass


async def measure(base: str, url: str, viewers: int, seconds: float, rounds: int) -> list[list[object]]:
    found: dict[tuple[str, int], list[float]] = {}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for n in [0, viewers] * rounds:
            tasks = [asyncio.create_task(watch(session, url)) for _ in range(n)]
            await asyncio.sleep(2)
            for name, values in (await sample(session, base, seconds / rounds)).items():
                found.setdefault((name, n), []).extend(values)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return [
        [name, n, len(v), statistics.median(v), sorted(v)[int(len(v) * 0.99)]] for (name, n), v in sorted(found.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    port = free_port()
    with MeshLlm("--model", str(MODEL), "--console", str(port), "--", "-c", "1024", "-t", "1") as node:
        base, url = node.ready().api.base, f"http://127.0.0.1:{port}"
        rows = asyncio.run(measure(base, url, args.viewers, args.seconds, args.rounds))
    table(("asked", "dashboards", "requests", "ms", "99th percentile"), rows)


if __name__ == "__main__":
    main()
