"""How fast a model file comes from peers: from one and from two.

    python bench/transfer.py [--repeat 3]

On loopback, all on this machine: the same cores send, receive, hash and check. 95 MB in pieces of 4 MiB.
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from common import MODEL, table
from support.cut import rewrite
from support.processes import MeshLlm, eventually

ENGINE = ("--", "-c", "256", "-t", "1")


def seconds(source: Path, n_peers: int) -> float:
    """From the first piece to the whole, checked, under its name."""
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def start(name: str, *args: str, has_it: bool) -> MeshLlm:
            models = Path(folder) / name
            models.mkdir()
            if has_it:
                (models / source.name).symlink_to(source)
            env = {"MESH_LLM_MODELS": str(models), "HF_HUB_CACHE": str(models / "none")}
            return stack.enter_context(MeshLlm("--name", name, *args, *ENGINE, env=env))

        seed = start("seed", "--model", source.stem, has_it=True).ready()
        token = re.findall(r"--join (\S+)", seed.output())[-1]
        for i in range(1, n_peers):
            start(f"peer{i}", "--join", token, has_it=True).ready()
        node = start("joiner", "--join", token, has_it=False)
        eventually(lambda: "getting" in node.output(), 60)
        began = time.monotonic()
        node.wait_output("is on this machine's disk", 120)
        return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = rewrite(MODEL, Path(folder) / "bench-Q4_1.gguf", layers=range(29))[0]
        first = 16 << 20  # has come when the first line is printed
        megabytes = (source.stat().st_size - first) / 1e6
        rows = [[n, megabytes / statistics.median(seconds(source, n) for _ in range(args.repeat))] for n in (1, 2)]
    table(("peers", "MB/s"), rows)


if __name__ == "__main__":
    main()
