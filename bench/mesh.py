"""What the mesh costs: the split model through QUIC against the same data plane over bare TCP, in one run.

    python bench/mesh.py [--rtt-ms 0,5,20] [--tokens 64] [--repeat 3] [--threads 1]

Runs in netlab (root): the host h1 and two stages, h2 and h3. "TCP" is mesh-llm --stage over device servers, "mesh"
three nodes with one token. Time to first token is of a prompt of some 300 tokens. The last table is the bulk rate of
one QUIC stream and of one TCP connection between two hosts of the lab.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import MODEL, PORT, THREADS, LabApi, device_servers, eventually, median, netlab, running, table
from support.processes import MeshLlm

WORDS = "Rome was not built in a day, and the people who built it were not always of one mind about the plan. "
BULK_BYTES = 64 << 20


@contextmanager
def mesh(lab: Any, threads: int) -> Iterator[LabApi]:
    """Three nodes; the API of the host once all are stages."""
    engine = ("--", "-t", str(threads), "--poll", "0", "-c", "4096")
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def node(host: str, *args: str) -> MeshLlm:
            data = Path(folder) / host
            data.mkdir()
            argv = ("--name", host, "--threads", str(threads), *args, *engine)
            return stack.enter_context(MeshLlm(*argv, port=PORT, prefix=netlab.prefix(lab, host), data=data))

        seed = node("h1", "--model", str(MODEL), "--split")
        token = re.findall(r"--join (\S+)", seed.wait_output("--join "))[-1]
        node("h2", "--join", token)
        node("h3", "--join", token)
        api = LabApi(lab)
        stack.callback(api.close)

        def complete() -> bool:
            engine = api.request("/mesh/status")["engine"]
            return engine is not None and len(engine["stages"]) == 2 and engine["state"] == "ready"

        eventually(complete, 60, "two stages")
        yield api


def figures(api: LabApi, n_tokens: int, repeat: int) -> tuple[float, float]:
    """Milliseconds a token, and to the first token of a long prompt."""
    api.complete(8)
    each = [float(api.complete(n_tokens)["timings"]["predicted_per_token_ms"]) for _ in range(repeat)]
    first = [float(api.complete(1, WORDS * 12)["timings"]["prompt_ms"]) for _ in range(repeat)]
    return median(each), median(first)


# --- bulk: this file is also the program on both hosts ---


async def bulk_receive(port: int) -> None:
    import asyncio

    from meshllm.mesh.identity import make_identity
    from meshllm.mesh.quic import QuicEndpoint
    from meshllm.mesh.transport import Link, Stream, StreamKind

    done = asyncio.get_running_loop().create_future()

    async def swallow(stream: Stream) -> None:
        while await stream.read():
            pass
        await stream.write(b"x")
        stream.finish()
        done.set_result(None)

    tasks = []

    def opened(_link: Link, _kind: StreamKind, stream: Stream) -> None:
        tasks.append(asyncio.create_task(swallow(stream)))

    endpoint = QuicEndpoint(make_identity(), lambda _link: None, opened)
    endpoint.start(port)
    print("ready", flush=True)
    await done
    await asyncio.sleep(0.5)
    await endpoint.close()


async def bulk_send(address: str) -> None:
    from meshllm.mesh.identity import make_identity
    from meshllm.mesh.quic import QuicEndpoint
    from meshllm.mesh.transport import StreamKind

    endpoint = QuicEndpoint(make_identity(), lambda _link: None, lambda *_: None)
    endpoint.start(0)
    link = await endpoint.dial(address, None, 5)
    stream = link.open(StreamKind.TRANSFER)
    began, chunk = time.perf_counter(), bytes(1 << 18)
    for _ in range(BULK_BYTES // len(chunk)):
        await stream.write(chunk)
    stream.finish()
    await stream.read()
    print(json.dumps(BULK_BYTES / 1e6 / (time.perf_counter() - began)))
    await endpoint.close()


TCP_RECEIVE = """
import socket, sys
s = socket.create_server(("0.0.0.0", int(sys.argv[1]))); print("ready", flush=True)
c, _ = s.accept()
while c.recv(1 << 18): pass
c.sendall(b"x")
"""
TCP_SEND = f"""
import json, socket, sys, time
c = socket.create_connection((sys.argv[1], int(sys.argv[2]))); began = time.perf_counter(); chunk = bytes(1 << 18)
for _ in range({BULK_BYTES} // len(chunk)): c.sendall(chunk)
c.shutdown(socket.SHUT_WR); c.recv(1)
print(json.dumps({BULK_BYTES} / 1e6 / (time.perf_counter() - began)))
"""


def bulk(lab: Any, kind: str) -> float:
    """Megabytes a second."""
    me, address = str(Path(__file__)), lab.ip("h2")
    receive = [me, "receive", "7100"] if kind == "QUIC" else ["-c", TCP_RECEIVE, "7100"]
    send = [me, "send", f"{address}:7100"] if kind == "QUIC" else ["-c", TCP_SEND, address, "7100"]
    prefix = netlab.prefix(lab, "h2")
    with subprocess.Popen([*prefix, sys.executable, *receive], stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout and receiver.stdout.readline() == "ready\n"
        sent = lab.run("h1", [sys.executable, *send], capture_output=True, text=True, check=True, timeout=300)
        return float(json.loads(sent.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", default="0,5,20")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=THREADS, help="of every process that computes")
    args = parser.parse_args()
    if why := netlab.missing():
        raise SystemExit(why)
    rtts = [float(rtt) for rtt in args.rtt_ms.split(",")]
    table(("RTT ms", "", "ms a token", "tok/s", "x TCP", "first token, ms", "x TCP"), [])
    for rtt_ms in rtts:
        with netlab.make_lab(hosts=3, rtt_ms=rtt_ms) as lab:
            with ExitStack() as stack:
                servers = stack.enter_context(device_servers(lab, "ours", args.threads))
                api, _ = stack.enter_context(running(lab, "ours", servers, threads=args.threads))
                tcp = figures(api, args.tokens, args.repeat)
            with mesh(lab, args.threads) as api:
                quic = figures(api, args.tokens, args.repeat)
        for kind, (each, first) in (("TCP", tcp), ("mesh", quic)):
            table((), [(f"{rtt_ms:g}", kind, each, 1000 / each, tcp[0] / each, first, tcp[1] / first)])
    print()
    table(("RTT ms", "bulk, one stream", "MB/s"), [])
    for rtt_ms in rtts:
        with netlab.make_lab(hosts=2, rtt_ms=rtt_ms) as lab:
            for kind in ("TCP", "QUIC"):
                table((), [(f"{rtt_ms:g}", kind, bulk(lab, kind))])


if __name__ == "__main__":
    import uvloop

    if sys.argv[1:2] == ["receive"]:
        uvloop.run(bulk_receive(int(sys.argv[2])))
    elif sys.argv[1:2] == ["send"]:
        uvloop.run(bulk_send(sys.argv[2]))
    else:
        main()
