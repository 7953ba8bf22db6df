"""`mesh-llm device-server`: lends this machine's devices to a host."""

from __future__ import annotations

import signal
from threading import Event

import click

from meshllm.cli.options import Command, max_vram, option, threads
from meshllm.cli.output import Output
from meshllm.units import GB, in_gb

_LOG_INTERVAL_S = 0.5
_EXAMPLES = """\b
Example:
  mesh-llm device-server --listen 192.168.1.12:50052 --allow-remote
  mesh-llm --model qwen3-32b --stage 192.168.1.12:50052     on the host
"""


@click.command("device-server", cls=Command, epilog=_EXAMPLES)
@option("--listen", required=True, metavar="ADDRESS", help="HOST:PORT, or unix:/path.")
@option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="GGUF file or model name whose weights may be read from this machine's disk; repeatable; default: all models "
    "on disk.",
)
@option(
    "--device",
    "devices",
    multiple=True,
    metavar="NAME",
    help="Device to lend, such as CUDA0; repeatable; default: all GPUs, or else the CPU.",
)
@threads()
@max_vram()
@option(
    "--allow-remote",
    is_flag=True,
    help="Accept connections from other machines. They are NEITHER encrypted NOR authenticated.",
)
def device_server(
    listen: str,
    models: tuple[str, ...],
    devices: tuple[str, ...],
    threads: int,
    max_vram: float | None,
    allow_remote: bool,
) -> None:
    """Lend this machine's devices to a host, without a mesh."""
    from meshllm import rpc  # loads ggml, which --help does not need
    from meshllm.models.store import Store, resolve

    stop = Event()
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
    output.emit(f"computed {done['graphs_computed']} graphs in {done['compute_ns'] / 1e9:.3f} s of compute time")
