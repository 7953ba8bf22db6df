"""What a token costs on the network: blocking waits, frames, bytes and time, for local, stock RPC and ours in one run.

    python bench/roundtrips.py [--rtt-ms 0,5,20,50] [--rate-mbit 0,1000,100] [--tokens 64] [--repeat 3] [--threads 1]

Runs in netlab (root): the host h1 and two remote stages, h2 and h3. Waits and frames of
ours come from its counters, bytes of all from the host's network interface. "network, RTTs" is, for ours, the time
the host waits less what the stages report to have computed; for stock, which reports nothing, the time beyond what
the same tokens take on one machine in the same lab. "TCP ring" is the limit: 2304 bytes, a hidden state of the model,
once around the three hosts through bare sockets. "slower" is the compute of the stages against a whole token on
one machine: a machine that waits for its turn computes slower.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from typing import Any

from common import KINDS, THREADS, device_servers, median, running, table
from support import lab as netlab
from support.processes import Process

RING_PORT, RING_BYTES = 7200, 2304
RING_STAGE = f"""
import socket, sys
listener = socket.create_server(("0.0.0.0", {RING_PORT})); print("ready", flush=True)
before, _ = listener.accept(); after = socket.create_connection((sys.argv[1], {RING_PORT}))
after.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := before.recv(4096): after.sendall(data)
"""
RING_HOST = f"""
import socket, statistics, sys, time
listener = socket.create_server(("0.0.0.0", {RING_PORT}))
after = socket.create_connection((sys.argv[1], {RING_PORT})); before, _ = listener.accept()
after.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
for _ in range(100):
    began, missing = time.perf_counter(), {RING_BYTES}
    after.sendall(bytes(missing))
    while missing: missing -= len(before.recv(missing))
    times.append(time.perf_counter() - began); time.sleep(0.015)
print(1000 * statistics.median(times))
"""


def ring_ms(lab: Any) -> float:
    """Milliseconds from h1 over h2 and h3 back to h1."""
    with ExitStack() as stack:
        for host, after in (("h2", "h3"), ("h3", "h1")):
            argv = [*netlab.prefix(lab, host), sys.executable, "-c", RING_STAGE, lab.ip(after)]
            stage = stack.enter_context(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
            stack.callback(stage.kill)
            assert stage.stdout and stage.stdout.readline() == "ready\n"
        argv = [sys.executable, "-c", RING_HOST, lab.ip("h2")]
        return float(lab.run("h1", argv, capture_output=True, text=True, check=True, timeout=60).stdout)


def measure(lab: Any, kind: str, n_tokens: int, repeat: int, threads: int) -> dict[str, float]:
    with device_servers(lab, kind, threads) as servers:
        with running(lab, kind, servers, threads=threads) as (api, _):
            api.complete(16)
            times, first = [], counters(api, kind)
            bytes_before = netlab.interface_bytes(lab, "h1")
            for _ in range(repeat):
                times.append(float(api.complete(n_tokens)["timings"]["predicted_per_token_ms"]))
            moved = netlab.interface_bytes(lab, "h1") - bytes_before
            last = counters(api, kind)
        total = n_tokens * repeat
        result = {"ms": median(times), "bytes": moved / total}
        result |= {key: (last[key] - first[key]) / total for key in first}
        if kind == "ours":
            result["compute_ms"] = sum(compute_ms(server) for server in servers)
    return result


def compute_ms(server: Process) -> float:
    """Per graph, as the device server says when it ends."""
    server.kill(signal.SIGTERM)
    server.wait()
    found = re.search(r"computed (\d+) graphs in ([\d.]+) s", server.output())
    assert found, server.output()
    return 1000 * float(found[2]) / int(found[1])


def counters(api: Any, kind: str) -> dict[str, float]:
    if kind != "ours":
        return {}
    stages = [stage["counters"] for stage in api.request("/mesh/status")["engine"]["stages"]]
    waits = sum(c["blocking_waits"] for c in stages)
    frames = sum(c["frames_sent"] + c["frames_received"] for c in stages)
    wait_ms = sum(c["wait_ns"] for c in stages) / 1e6
    return {"waits": waits, "frames": frames, "wait_ms": wait_ms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", default="0,5,20,50")
    parser.add_argument("--rate-mbit", default="0,1000,100")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS, help="of every process that computes")
    args = parser.parse_args()
    if why := netlab.missing():
        raise SystemExit(why)
    rates = [float(r) for r in args.rate_mbit.split(",")]
    links = [(float(rtt), rates[0]) for rtt in args.rtt_ms.split(",")] + [(20.0, rate) for rate in rates[1:]]
    head = ["RTT ms", "Mbit/s", "", "waits", "frames", "bytes"]
    table([*head, "ms a token", "tok/s", "x stock", "network, RTTs", "slower"], [])
    for rtt_ms, rate_mbit in links:
        with netlab.make_lab(hosts=3, rtt_ms=rtt_ms, rate_mbit=rate_mbit) as lab:
            ring = ring_ms(lab)
            results = {kind: measure(lab, kind, args.tokens, args.repeat, args.threads) for kind in KINDS}
        rate = f"{rate_mbit:g}" if rate_mbit else "unlimited"
        ring_rtts = f"{ring / rtt_ms:.2f}" if rtt_ms else "-"
        table((), [[f"{rtt_ms:g}", rate, "TCP ring", "-", "-", "-", ring, "-", "-", ring_rtts, "-"]])
        for kind, r in results.items():
            figures = [f"{r[key]:.2f}" if key in r else "-" for key in ("waits", "frames")]
            ratio = results["stock"]["ms"] / r["ms"]
            beyond = r["wait_ms"] - r["compute_ms"] if kind == "ours" else r["ms"] - results["local"]["ms"]
            share = f"{beyond / rtt_ms:.2f}" if rtt_ms and kind != "local" else "-"
            slower = f"{r['compute_ms'] / results['local']['ms']:.2f}" if kind == "ours" else "-"
            row = [f"{rtt_ms:g}", rate, kind, *figures, f"{r['bytes']:.0f}"]
            table((), [[*row, r["ms"], 1000 / r["ms"], ratio, share, slower]])


if __name__ == "__main__":
    main()
