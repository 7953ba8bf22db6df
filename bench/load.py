"""How long a model takes to load, and what crosses the network for it: local, stock RPC and ours in one run.

    python bench/load.py [--rate-mbit 100] [--rtt-ms 5] [--repeat 3]

Runs in netlab (root) with two remote stages; the stages of ours have the model on their own disk. The file is in the
page cache for all. Time is from the start of the program to a healthy server, warm-up included.
"""

from __future__ import annotations

import argparse

from common import KINDS, device_servers, median, running, table
from support import lab as netlab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate-mbit", type=float, default=100)
    parser.add_argument("--rtt-ms", type=float, default=5)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    if why := netlab.missing():
        raise SystemExit(why)
    rows = []
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    moved: dict[str, list[float]] = {kind: [] for kind in KINDS}
    weights: list[int] = []
    with netlab.make_lab(hosts=3, rtt_ms=args.rtt_ms, rate_mbit=args.rate_mbit) as lab:
        for kind in KINDS * args.repeat:
            with device_servers(lab, kind) as servers:
                before = netlab.interface_bytes(lab, "h1")
                with running(lab, kind, servers) as (api, seconds):
                    moved[kind].append(netlab.interface_bytes(lab, "h1") - before)
                    times[kind].append(seconds)
                    if kind == "ours":
                        stages = api.request("/mesh/status")["engine"]["stages"]
                        weights.append(sum(stage["counters"]["weight_bytes_sent"] for stage in stages))
    for kind in KINDS:
        sent = max(weights) if kind == "ours" else 0 if kind == "local" else "all of the stages' layers"
        ratio = median(times[kind]) / median(times["local"])
        rows.append((kind, median(times[kind]), ratio, f"{median(moved[kind]):.0f}", sent))
    print(f"{args.rate_mbit:g} Mbit/s, RTT {args.rtt_ms:g} ms, median of {args.repeat}")
    table(("", "seconds", "x local", "bytes on the host's link", "weight bytes sent"), rows)


if __name__ == "__main__":
    main()
