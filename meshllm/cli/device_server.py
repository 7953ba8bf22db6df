"""`mesh-llm device-server`: lends this machine's devices to a host."""

from __future__ import annotations

import signal
import threading

import click

from meshllm import rpc
from meshllm.cli.output import Output
from meshllm.errors import GgufError
from meshllm.models import find_models, load_model, resolve

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
    offered = _offered_models(models, output)
    server = rpc.DeviceServer(
        listen,
        devices,
        [(fingerprint, files) for _, fingerprint, files in offered],
        threads=threads,
        memory_limit_bytes=int((max_vram or 0) * 1e9),
        allow_remote=allow_remote,
    )
    names = ", ".join(name for name, _, _ in offered) or "none"
    lent = ", ".join(f"{d.name} ({d.memory_free / 1e9:.1f} GB)" for d in server.devices)
    output.say(f"listening on {server.address}; devices: {lent}; models: {names}")
    while not stop.wait(_LOG_INTERVAL_S):
        for line in server.take_log():
            output.say(line)
    server.stop()
    done = server.counters()
    output.say(f"served {done['graphs_computed']} graphs in {done['compute_ns'] / 1e9:.3f} s of computing")


def _offered_models(wanted: tuple[str, ...], output: Output) -> list[tuple[str, bytes, tuple[str, ...]]]:
    """Name, fingerprint and files. A broken file that was not asked for is left out with a line."""
    if wanted:
        models = [resolve(name) for name in wanted]
        return [(m.name, m.fingerprint(), m.files) for m in models]
    offered = []
    for path in find_models().values():
        try:
            model = load_model(path)
            offered.append((model.name, model.fingerprint(), model.files))
        except GgufError as error:
            output.say(f"left out: {error}")
    return offered
