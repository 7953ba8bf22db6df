"""Where the engine's programs and libraries are installed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from meshllm.errors import EngineError

_LIBRARY = "libggml-mesh.dylib" if sys.platform == "darwin" else "libggml-mesh.so"


@dataclass(frozen=True)
class Binaries:
    llama_server: Path
    leash: Path
    backend: Path  # libggml-mesh
    measure: Path


def engine_folder() -> Path:
    """Where `pip install` puts them, beside the package."""
    from importlib.resources import files

    return Path(str(files("meshllm"))) / "_bin"


def find_binaries(bin_dir: Path | None) -> Binaries:
    """llama-server from `bin_dir` if that is given; the others are our own. Raises EngineError."""
    own = engine_folder()
    binaries = Binaries(
        (bin_dir or own) / "llama-server", own / "mesh-llm-leash", own / _LIBRARY, own / "mesh-llm-measure"
    )
    for path in (binaries.llama_server, binaries.leash, binaries.backend, binaries.measure):
        if not path.is_file():
            advice = "check --bin-dir" if bin_dir and path.parent == bin_dir else "install mesh-llm again"
            raise EngineError(f"{path} is missing; {advice}")
    return binaries
