"""`mesh-llm device-server`: lends this machine's devices to a host."""

from __future__ import annotations

import signal
import threading

import click

from meshllm import rpc
from meshllm.cli.output import Output
from meshllm.models.store import Store, resolve
from meshllm.units import GB, in_gb

_LOG_INTERVAL_S = 0.5


@click.command("device-server")
@click.option("--listen", required=True, metavar="ADDRESS", help="HOST:PORT, or unix:/path.")
@click.option(
    "--model",
    "models",
    multiple=True,
    help="A model whose weights are read from this machine's disk; default: all on disk.",
)
@click.option(
    "--device", "devices", multiple=True, metavar="NAME", help="A ggml device; default: all GPUs, or the CPU."
)
@click.option("--threads", default=0, help="Threads of a CPU device; default: the number of cores.")
@click.option("--max-vram", type=float, metavar="GB", help="Memory lent of each device.")
@click.option("--allow-remote", is_flag=True, help="Listen beyond this machine. The channel is NOT encrypted.")
def device_server(
    listen: str,
    models: tuple[str, ...],
    devices: tuple[str, ...],
    threads: int,
    max_vram: float | None,
    allow_remote: bool,
) -> None:
    """Serve this machine's devices as stages of another machine's model."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    output = Output()
    output.show_logs()
    store = Store(output.emit)
    if not models:
        store.scan()
    offered = [resolve(name) for name in models] or list(store.models.values())
    server = rpc.DeviceServer(
        listen,
        devices,
        [(model.fingerprint(), model.files) for model in offered],
        threads=threads,
        memory_limit_bytes=int((max_vram or 0) * GB),
        allow_remote=allow_remote,
    )
    names = ", ".join(model.name for model in offered) or "none"
    lent = ", ".join(f"{d.name} ({in_gb(d.memory_free)})" for d in server.devices)
    output.emit(f"listening on {server.address}; devices: {lent}; models: {names}")
    while not stop.wait(_LOG_INTERVAL_S):
        for line in server.take_log():
            output.emit(line)
    server.stop()
    done = server.counters()
    output.emit(f"served {done['graphs_computed']} graphs in {done['compute_ns'] / 1e9:.3f} s of computing")
