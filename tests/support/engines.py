"""llama-server alone, and over two stages and the host as the product starts it, with the same options."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from meshllm import rpc
from meshllm.engine.binaries import find_binaries
from meshllm.engine.counters import COUNTERS_FILE_BYTES, read_counters
from meshllm.engine.launch import LaunchSpec, StageAddress, StageServer, make_launch_spec
from meshllm.models.store import load_model
from support.processes import Api, Process, backend_environment, eventually, free_port

_BUFFER = re.compile(r": +(\S+) +(model|KV|RS|compute|output) buffer size = +([\d.]+) MiB")


@dataclass(frozen=True)
class Engine:
    process: Process
    api: Api
    counters: Path | None = None  # of a split engine

    def waits(self) -> int:
        """Blocking waits for the stages until now."""
        assert self.counters is not None
        return sum(stage.blocking_waits for stage in read_counters(self.counters).stages)


def launch_spec(model: Path, addresses: Sequence[str], split: Sequence[float], options: Sequence[str]) -> LaunchSpec:
    servers = [
        StageServer(StageAddress(f"s{i}", address, address), rpc.probe(address, 5))
        for i, address in enumerate(addresses)
    ]
    return make_launch_spec(load_model(model), find_binaries(None), servers, split, "CPU", options)


@contextmanager
def engine(
    model: Path, folder: Path, options: Sequence[str] = (), addresses: Sequence[str] = (), split: Sequence[float] = ()
) -> Iterator[Engine]:
    """Ready to answer. With `addresses`, over those stages."""
    spec = launch_spec(model, addresses, split, ["-c", "4096", "-t", "1", *options])
    port = free_port()
    counters, config = folder / f"counters-{port}", folder / f"backend-{port}.json"
    counters.write_bytes(bytes(COUNTERS_FILE_BYTES))
    config.write_bytes(spec.backend_config(counters))
    command = [*spec.command(Path("unused")), "--host", "127.0.0.1", "--port", str(port)]
    environment = backend_environment(config) if addresses else None
    with Process(command, environment) as process:
        api = Api(f"http://127.0.0.1:{port}")

        def ready() -> bool:
            assert process.popen.poll() is None, process.output()[-3000:]
            return api.healthy()

        eventually(ready, 60, "llama-server is ready")
        yield Engine(process, api, counters if addresses else None)


@contextmanager
def plain_and_split(
    model: Path, folder: Path, options: Sequence[str] = (), split_options: Sequence[str] = ()
) -> Iterator[tuple[Engine, Engine]]:
    """Layers on two stages in this process and, the last third, on the host. `split_options` are for these alone."""
    with ExitStack() as stack:
        files = [str(model)]
        models = [(rpc.fingerprint(files), files)]
        servers = [rpc.DeviceServer("127.0.0.1:0", models=models, threads=1) for _ in range(2)]
        for server in servers:
            stack.callback(server.stop)
        alone = stack.enter_context(engine(model, folder, options))
        addresses = [server.address for server in servers]
        yield alone, stack.enter_context(engine(model, folder, [*options, *split_options], addresses, (1, 1, 1)))


def taken(engine: Engine) -> dict[str, Counter[str]]:
    """Bytes by device: `state` and `compute`, and `model` on stages, which map no file."""
    sizes: dict[str, Counter[str]] = {}
    for device, kind, size in _BUFFER.findall(engine.process.output()):
        kind = {"KV": "state", "RS": "state", "output": "compute"}.get(kind, kind)
        sizes.setdefault(device, Counter())[kind] += round(float(size) * 2**20)
    return sizes
