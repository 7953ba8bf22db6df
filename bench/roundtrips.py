"""What a token costs on the network: blocking waits, frames, bytes and time, for local, stock RPC and ours in one run.

    python bench/roundtrips.py [--rtt-ms 0,5,20,50] [--rate-mbit 0,1000,100] [--tokens 64] [--repeat 3]

Runs in netlab (root): the host h1 and two remote stages, h2 and h3, each with two threads. Compute is what the same
tokens take on one machine, measured in the same lab; the share of the network is what a token takes beyond that, in
round-trip times. Waits and frames of ours come from its counters; bytes of all from the host's network interface.
"""

from __future__ import annotations

import argparse
from typing import Any

from common import KINDS, device_servers, interface_bytes, median, netlab, running, table


def measure(lab: Any, kind: str, addresses: dict[str, list[str]], n_tokens: int, repeat: int) -> dict[str, float]:
    with running(lab, kind, addresses) as (api, _):
        api.complete(16)
        times, first = [], counters(api, kind)
        bytes_before = interface_bytes(lab, "h1")
        for _ in range(repeat):
            times.append(float(api.complete(n_tokens)["timings"]["predicted_per_token_ms"]))
        moved = interface_bytes(lab, "h1") - bytes_before
        last = counters(api, kind)
    total = n_tokens * repeat
    result = {"ms": median(times), "bytes": moved / total}
    return result | {key: (last[key] - first[key]) / total for key in first}


def counters(api: Any, kind: str) -> dict[str, int]:
    if kind != "ours":
        return {}
    stages = [stage["counters"] for stage in api.request("/mesh/status")["stages"]]
    waits = sum(c["blocking_waits"] for c in stages)
    frames = sum(c["frames_sent"] + c["frames_received"] for c in stages)
    return {"waits": waits, "frames": frames, "pushes": sum(c["pushes"] for c in stages)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", default="0,5,20,50")
    parser.add_argument("--rate-mbit", default="0,1000,100")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if why := netlab.missing():
        raise SystemExit(why)
    rates = [float(r) for r in args.rate_mbit.split(",")]
    links = [(float(rtt), rates[0]) for rtt in args.rtt_ms.split(",")] + [(20.0, rate) for rate in rates[1:]]
    rows = []
    for rtt_ms, rate_mbit in links:
        with (
            netlab.make_lab(hosts=3, rtt_ms=rtt_ms, rate_mbit=rate_mbit) as lab,
            device_servers(lab) as addresses,
        ):
            results = {kind: measure(lab, kind, addresses, args.tokens, args.repeat) for kind in KINDS}
        compute = results["local"]["ms"]
        for kind, r in results.items():
            share = (r["ms"] - compute) / rtt_ms if rtt_ms and kind != "local" else float("nan")
            figures = [f"{r[key]:.2f}" if key in r else "-" for key in ("waits", "frames")]
            rate = f"{rate_mbit:g}" if rate_mbit else "unlimited"
            speed = 1000 / r["ms"]
            ratio = r["ms"] / results["stock"]["ms"]
            rows.append((f"{rtt_ms:g}", rate, kind, *figures, f"{r['bytes']:.0f}", r["ms"], speed, share, 1 / ratio))
    head = (
        "RTT ms",
        "Mbit/s",
        "",
        "waits",
        "frames",
        "bytes",
        "ms a token",
        "tok/s",
        "network, RTTs",
        "x stock",
    )
    table(head, rows)


if __name__ == "__main__":
    main()
