"""llama.cpp's own test of architectures (tests/native/test_archs.cpp) over stages in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from meshllm import rpc
from support.processes import ENGINE, backend_environment


@contextmanager
def two_stages(folder: Path) -> Iterator[tuple[dict[str, str], list[rpc.DeviceServer]]]:
    """The environment of a host with two stages, and the stages."""
    with ExitStack() as stack:
        servers = [rpc.DeviceServer("127.0.0.1:0", threads=1) for _ in range(2)]
        for server in servers:
            stack.callback(server.stop)
        addresses = [server.address for server in servers]
        stages = [{"name": f"s{i}", "address": at, "peer_address": at} for i, at in enumerate(addresses)]
        config = folder / "backend.json"
        config.write_text(json.dumps({"stages": stages, "host_device": "CPU"}))
        yield os.environ | backend_environment(config), servers


def compare(
    environment: dict[str, str], regex: str, *, ring: bool, seed: str = "1", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Tests the architectures that fit over one stage, or with `ring` over both and the host."""
    command = [str(ENGINE / "test-archs"), "-b", "STAGE0", "-s", seed, "-a", regex]
    extra = {"MESH_LLM_RING": "1"} if ring else {}
    return subprocess.run(command, env=environment | extra, text=True, check=False, **options)


def main(regex: str = ".*", seed: str = "1") -> int:
    failed = False
    with tempfile.TemporaryDirectory(prefix="mesh-archs-") as folder, two_stages(Path(folder)) as (environment, _):
        for ring in (False, True):
            print("== two stages and the host" if ring else "== one stage", flush=True)
            failed |= compare(environment, regex, ring=ring, seed=seed).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
