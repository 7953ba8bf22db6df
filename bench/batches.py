"""Bytes a token when the batch changes all the time: four clients that start and stop, ours against stock RPC.

python bench/batches.py [--rtt-ms 5] [--rounds 4]
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

from common import LabApi, device_servers, running, table
from support import lab as netlab
from support.processes import in_parallel

LENGTHS = (10, 20, 30, 40)


def measure(lab: Any, kind: str, rounds: int) -> tuple[float, float, str]:
    with device_servers(lab, kind) as servers, running(lab, kind, servers, "-np", "4") as (api, _):
        clients = [LabApi(lab) for _ in LENGTHS]

        def one_round() -> None:
            in_parallel([partial(c.complete, n) for c, n in zip(clients, LENGTHS, strict=True)])

        try:
            one_round()  # shapes that are new to both
            before, began = netlab.interface_bytes(lab, "h1"), time.monotonic()
            sends = graph_sends(api, kind)
            for _ in range(rounds):
                one_round()
            seconds = time.monotonic() - began
            moved = netlab.interface_bytes(lab, "h1") - before
            again = f"{graph_sends(api, kind) - sends}" if kind == "ours" else "-"
        finally:
            for client in clients:
                client.close()
    n_tokens = sum(LENGTHS) * rounds
    return moved / n_tokens, n_tokens / seconds, again


def graph_sends(api: LabApi, kind: str) -> int:
    if kind != "ours":
        return 0
    return sum(stage["counters"]["graph_sends"] for stage in api.request("/mesh/status")["engine"]["stages"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    if why := netlab.missing():
        raise SystemExit(why)
    rows = []
    with netlab.make_lab(hosts=3, rtt_ms=args.rtt_ms) as lab:
        for kind in ("stock", "ours"):
            rows.append((kind, *measure(lab, kind, args.rounds)))
    print(f"RTT {args.rtt_ms:g} ms; clients of {LENGTHS} tokens start together, {args.rounds} rounds after the first")
    table(("", "bytes a token", "tok/s, all clients", "graphs sent again"), rows)


if __name__ == "__main__":
    main()
