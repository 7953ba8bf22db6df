"""What the mesh's two QUIC engines carry, against TCP and TLS in the same run.

    python bench/quic.py [--repeat 3]     loopback: latency of a hidden state, of ten, bulk, and what both cost
    python bench/quic.py --lab            emulated links of 20 ms with loss, against kernel TCP of three kinds (root)
    python bench/quic.py --fair           one link shared with a TCP flow (root)

Two processes a row (bench/quic_peers.py). "spliced" is the way of the rpc streams: a program with a Unix socket at
either end; the others are streams as Python sees them. Medians over the runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import table
from support import lab as netlab

PEERS = str(Path(__file__).with_name("quic_peers.py"))
PORT = "7100"
LOOPBACK = (
    ("TCP, asyncio on uvloop", "tcp", 1000),
    ("TLS over TCP, blocking", "tls", 1000),
    ("native, spliced", "native-splice", 1000),
    ("native, Python streams", "native", 500),
    ("aioquic tuned, spliced", "aioquic-splice", 60),
    ("aioquic tuned, Python streams", "aioquic", 60),
    ("aioquic as it comes, asyncio", "stock", 30),
)
LAB = ("tcp-blocking+bbr", "tcp-blocking+cubic", "tcp-blocking+reno", "native-splice", "aioquic-splice")
CONDITIONS = ((100, 0.0), (100, 0.001), (100, 0.01), (1000, 0.0), (1000, 0.001), (1000, 0.01))


def pair(path: str, job: str, lab: Any = None) -> dict[str, float]:
    """One run between two fresh processes."""
    here, there = (netlab.prefix(lab, host) if lab else [] for host in ("h1", "h2"))
    host = lab.ip("h2") if lab else "127.0.0.1"
    serve = [*there, sys.executable, PEERS, "serve", path, PORT if lab else "0"]
    with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = server.stdout.readline().strip()
        try:
            drive = [*here, sys.executable, PEERS, "drive", path, host, port, job]
            done = subprocess.run(drive, capture_output=True, text=True, check=True, timeout=180)
        finally:
            server.kill()
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def medians(path: str, job: str, repeat: int, lab: Any = None) -> dict[str, float]:
    runs = [pair(path, job, lab) for _ in range(repeat)]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def loopback(repeat: int) -> None:
    """In turns, so that a slow minute of the machine is shared by all."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name, *_ in LOOPBACK}
    for _ in range(repeat):
        for name, path, megabytes in LOOPBACK:
            runs[name].append(pair(path, "latency") | pair(path, f"bulk:{megabytes}"))
    columns = ("ms_20000", "ms_200000", "mb_s", "send_ms_mb", "receive_ms_mb")
    rows = [(name, *(statistics.median(run[key] for run in found) for key in columns)) for name, found in runs.items()]
    table(("path", "20 KB, ms", "200 KB, ms", "bulk, MB/s", "CPU ms a MB, sender", "receiver"), rows)


def lab(repeat: int, mbit: list[int]) -> None:
    table(("Mbit/s", "loss %", "path", "bulk, MB/s", "20 KB, ms", "99 %", "worst", "after 3 s idle"), [])
    for rate, loss in (condition for condition in CONDITIONS if condition[0] in mbit):
        for path in LAB:
            weak = loss > 0 and path.endswith(("cubic", "reno"))
            megabytes = 6 if weak else 25 if rate == 100 or path.startswith("aioquic") else 100
            with netlab.make_lab(hosts=2, rtt_ms=20, rate_mbit=rate, loss=loss) as net:
                bulk = medians(path, f"bulk:{megabytes}", repeat, net)
                latency = medians(path, "latency:100", 1, net)
                idle = medians(path, "idle:3", 1, net)
            times = (latency["ms_20000"], latency["p99_20000"], latency["max_20000"], idle["first_ms"])
            table((), [(rate, f"{loss:.1%}"[:-1], path, bulk["mb_s"], *times)])


def fair() -> None:
    """Two bulk flows for the same time, from one host to one other: what each gets, ours and two TCPs."""
    table(("Mbit/s", "one", "other", "one, MB/s", "other, MB/s", "the other's share"), [])
    for rate, seconds in ((100, 12), (300, 8)):
        for one, other in itertools.product(
            ("bbr", "cubic"), ("native-splice", "tcp-blocking+bbr", "tcp-blocking+cubic")
        ):
            queue = max(65536, int(rate * 1e6 / 8 * 0.02))  # one bandwidth-delay product, as routers have
            with netlab.make_lab(hosts=2, rtt_ms=20, rate_mbit=rate, queue_bytes=queue) as net:
                rates = together(net, (f"tcp-blocking+{one}", other), seconds)
            table((), [(rate, f"TCP {one}", other, *rates, f"{rates[1] / sum(rates):.0%}")])


def together(net: Any, paths: tuple[str, ...], seconds: float) -> list[float]:
    here, there = netlab.prefix(net, "h1"), netlab.prefix(net, "h2")
    servers, drivers = [], []
    try:
        for i, path in enumerate(paths):
            serve = [*there, sys.executable, PEERS, "serve", path, str(int(PORT) + i)]
            servers.append(subprocess.Popen(serve, stdout=subprocess.PIPE, text=True))
            assert servers[-1].stdout and servers[-1].stdout.readline()
        for i, path in enumerate(paths):
            drive = [*here, sys.executable, PEERS, "drive", path, net.ip("h2"), str(int(PORT) + i), f"timed:{seconds}"]
            drivers.append(subprocess.Popen(drive, stdout=subprocess.PIPE, text=True))
        return [float(json.loads(d.communicate(timeout=120)[0].splitlines()[-1])["mb_s"]) for d in drivers]
    finally:
        for process in servers + drivers:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--lab", action="store_true")
    parser.add_argument("--mbit", default="100,1000", help="of the links of --lab")
    parser.add_argument("--fair", action="store_true")
    args = parser.parse_args()
    if (args.lab or args.fair) and (why := netlab.missing()):
        raise SystemExit(why)
    if args.lab:
        lab(args.repeat, [int(rate) for rate in args.mbit.split(",")])
    elif args.fair:
        fair()
    else:
        loopback(args.repeat)


if __name__ == "__main__":
    main()
