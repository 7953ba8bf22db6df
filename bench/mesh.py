"""What the mesh costs: the split model through QUIC against the same data plane over bare TCP, in one run.

    python bench/mesh.py [--rtt-ms 0,5,20] [--mbit 1000] [--nodes 2,3] [--tokens 64] [--repeat 3] [--threads 1]

Runs in netlab (root): the host h1, and stages on the others, each with the same share of the layers. "TCP" is mesh-llm
--stage over device servers, the others are nodes with one token over either QUIC engine. Time to first token is of a
prompt of some 300 tokens.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import MODEL, PORT, THREADS, LabApi, device_servers, median, running, table
from support import lab as netlab
from support.processes import MeshLlm, eventually

WORDS = "Rome was not built in a day, and the people who built it were not always of one mind about the plan. "
BULK_BYTES = 64 << 20


@contextmanager
def mesh(lab: Any, threads: int, hosts: Sequence[str], engine_name: str) -> Iterator[LabApi]:
    """A node on h1 and on each of `hosts`; the API of the host once all are stages."""
    engine = ("--", "-t", str(threads), "--poll", "0", "-c", "4096")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def node(host: str, *args: str) -> MeshLlm:
            data = Path(folder) / host
            data.mkdir()
            argv = ("--name", host, "--quic", engine_name, "--threads", str(threads), *args, *engine)
            return stack.enter_context(MeshLlm(*argv, port=PORT, prefix=netlab.prefix(lab, host), data=data))

        seed = node("h1", "--model", str(MODEL), "--split", "--tensor-split", even(hosts))
        token = re.findall(r"--join (\S+)", seed.wait_output("--join "))[-1]
        for host in hosts:
            node(host, "--join", token)
        api = LabApi(lab)
        stack.callback(api.close)

        def complete() -> bool:
            engine = api.request("/mesh/status")["engine"]
            return engine is not None and len(engine["stages"]) == len(hosts) and engine["state"] == "ready"

        eventually(complete, 60, "the stages")
        yield api


def even(hosts: Sequence[str]) -> str:
    """The host has a stage's share too."""
    return ",".join(["1"] * (len(hosts) + 1))


def figures(api: LabApi, n_tokens: int, repeat: int) -> list[tuple[float, float]]:
    """Milliseconds a token, and to the first token of a long prompt."""
    api.complete(8)
    each = [float(api.complete(n_tokens)["timings"]["predicted_per_token_ms"]) for _ in range(repeat)]
    first = [float(api.complete(1, WORDS * 12)["timings"]["prompt_ms"]) for _ in range(repeat)]
    return list(zip(each, first, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", default="0,5,20")
    parser.add_argument("--mbit", type=float, default=1000, help="of every host's link; 0 for no limit")
    parser.add_argument("--nodes", default="2,3")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS, help="of every process that computes")
    args = parser.parse_args()
    if why := netlab.missing():
        raise SystemExit(why)
    table(("nodes", "RTT ms", "", "ms a token", "tok/s", "x TCP", "first token, ms", "x TCP"), [])
    for n_nodes in map(int, args.nodes.split(",")):
        for rtt_ms in map(float, args.rtt_ms.split(",")):
            with netlab.make_lab(hosts=n_nodes, rtt_ms=rtt_ms, rate_mbit=args.mbit) as lab:
                found = measure(lab, n_nodes, args)
            tcp = found["TCP"]
            for kind, (each, first) in found.items():
                ratios = (tcp[0] / each, first, tcp[1] / first)
                table((), [(n_nodes, f"{rtt_ms:g}", kind, each, 1000 / each, *ratios)])


def measure(lab: Any, n_nodes: int, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """In turns, three times, so that a slow minute of the machine is shared by all; medians."""
    runs: dict[str, list[tuple[float, float]]] = {"TCP": [], "native": [], "aioquic": []}
    hosts = [f"h{i}" for i in range(2, n_nodes + 1)]
    options = ("--no-draft", "--tensor-split", even(hosts))
    for _ in range(3):
        for kind, found in runs.items():
            with ExitStack() as stack:
                if kind == "TCP":
                    servers = stack.enter_context(device_servers(lab, "ours", args.threads, hosts))
                    api, _seconds = stack.enter_context(
                        running(lab, "ours", servers, threads=args.threads, options=options)
                    )
                else:
                    api = stack.enter_context(mesh(lab, args.threads, hosts, kind))
                found += figures(api, args.tokens, args.repeat)
    return {kind: (median([e for e, _ in each]), median([f for _, f in each])) for kind, each in runs.items()}


if __name__ == "__main__":
    main()
