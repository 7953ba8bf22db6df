"""llama.cpp's own test of architectures (tests/native/test_archs.cpp) over stages in this process."""

from __future__ import annotations

import json
import os
import re
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
    environment: dict[str, str], *arguments: str, ring: bool, seed: int | str = 1, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Tests the architectures that fit. With `ring`, "-b STAGE0" and "--others" mean both stages and the host."""
    command = [str(ENGINE / "test-archs"), *arguments, "-v", "2", "-s", str(seed)]  # 2: warnings too
    extra = {"MESH_LLM_RING": "1"} if ring else {}
    return subprocess.run(command, env=environment | extra, text=True, check=False, **options)


def passed(output: str, device: str = "") -> list[str]:
    """The architectures whose rows, for that device, say that what was computed is right."""
    rows = [row.split("|") for row in re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines() if row.startswith("|")]
    right = [row[1].strip() for row in rows if device in "|".join(row) and any(" OK (" in cell for cell in row[2:])]
    return list(dict.fromkeys(right))


def left_to_the_host(output: str) -> list[str]:
    """The operators that a stage refused. One without a name is not computed: llama.cpp asks where tensors may lie."""
    return [line for line in output.splitlines() if " leaves to the host: " in line and " '' " not in line]


# What has crashed before: these cast types inside their graphs, or read without a KV cache.
ONCE_CRASHED: tuple[tuple[str, ...], ...]
ONCE_CRASHED = (("-b", "STAGE0", "-a", "^(llada|llada-moe|dream|rnd1|hy_v4)$"), ("--others",))


def tiny_models(folder: Path, *names: str) -> list[Path]:
    """NAME.gguf for each, such as qwen35-dense: random weights in two layers, by llama.cpp's test of architectures."""
    regex = "|".join(name.rsplit("-", 1)[0] for name in names)
    command = [str(ENGINE / "test-archs"), "-o", str(folder), "-s", "1", "-a", f"^({regex})$"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return [folder / f"{name}.gguf" for name in names]


def main(regex: str = ".*", seed: str = "1") -> int:
    """Prints everything; the exit status."""
    forms: list[tuple[str, tuple[str, ...], bool]] = [
        ("each device alone, and each tensor split over both stages (Meta)", ("-a", regex), False),
        ("two stages and the host", ("-b", "STAGE0", "-a", regex), True),
        ("embedding models and others over one stage", ("--others", "-a", regex), False),
        ("embedding models and others over two stages and the host", ("--others", "-a", regex), True),
    ]
    failed = False
    with tempfile.TemporaryDirectory(prefix="mesh-archs-") as folder, two_stages(Path(folder)) as (environment, _):
        for title, arguments, ring in forms:
            print(f"== {title}", flush=True)
            failed |= compare(environment, *arguments, ring=ring, seed=seed).returncode != 0
        for other in range(int(seed) + 1, int(seed) + 20) if regex == ".*" else ():
            print(f"== what has crashed before, with seed {other}", flush=True)
            for arguments in ONCE_CRASHED:
                failed |= compare(environment, *arguments, ring=True, seed=other).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
