"""What reading a state from the stages costs, as the checkpoints of llama-server do: local, stock RPC, ours in one run.

    python bench/states.py [--tokens 1500] [--repeat 3] [--ways "" "-fa off"]

Runs in netlab (root): the host h1 and two stages, h2 and h3, behind links of several speeds. The state is the KV cache
of one slot, saved and restored by llama-server's own /slots; with `-fa off` V lies in rows of one token, as rows of a
recurrent state do. "link" is the time that the stages' part of its bytes takes on the wire at best.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from typing import Any

from common import KINDS, device_servers, median, running, table
from support import lab as netlab

LINKS = ((0.5, 1000.0), (5.0, 300.0), (20.0, 100.0))  # RTT in ms, Mbit/s
SAVE, RESTORE = "/slots/0?action=save", "/slots/0?action=restore"
WORDS = "The quick brown fox jumps over the lazy dog while seven wizards mix nine jugs of liquid. "


def measure(lab: Any, kind: str, way: str, args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="mesh-llm-bench-") as folder, device_servers(lab, kind) as servers:
        options = ["-np", "1", "--slot-save-path", f"{folder}/", *shlex.split(way)]
        with running(lab, kind, servers, *options) as (api, _):
            api.complete(1, WORDS * (args.tokens // 20), cache_prompt=True)
            before = waits(api, kind)
            saved = [api.request(SAVE, {"filename": "state"}) for _ in range(args.repeat)]
            between = waits(api, kind)
            restored = [api.request(RESTORE, {"filename": "state"}) for _ in range(args.repeat)]
            after = waits(api, kind)
        return {
            "bytes": saved[0]["n_written"],
            "save": median([each["timings"]["save_ms"] for each in saved]),
            "restore": median([each["timings"]["restore_ms"] for each in restored]),
            "save_waits": (between - before) / args.repeat,
            "restore_waits": (after - between) / args.repeat,
        }


def waits(api: Any, kind: str) -> float:
    if kind != "ours":
        return 0.0
    return float(sum(s["counters"]["blocking_waits"] for s in api.request("/mesh/status")["engine"]["stages"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1500)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["", "-fa off"])
    args = parser.parse_args()
    table(("RTT ms", "Mbit/s", "options", "way", "MB", "save ms", "waits", "restore ms", "waits", "link ms"), [])
    for rtt_ms, mbit in LINKS:
        with netlab.make_lab(hosts=3, rtt_ms=rtt_ms, rate_mbit=mbit) as lab:
            for way in args.ways:
                for kind in KINDS:
                    m = measure(lab, kind, way, args)
                    link = m["bytes"] * 8 / mbit / 1000 if kind != "local" else 0.0
                    cells = (m["save"], m["save_waits"], m["restore"], m["restore_waits"], link)
                    table((), [(rtt_ms, mbit, way or "-", kind, m["bytes"] / 1e6, *cells)])


if __name__ == "__main__":
    main()
