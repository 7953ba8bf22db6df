"""What a model takes of each device's memory, as llama.cpp itself plans it (csrc/measure).

Asked in a process of its own, since a broken file may end it, and once for each file and set of arguments.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from meshllm.errors import EngineError
from meshllm.paths import cache_folder

_TIMEOUT_S = 120.0
_CACHE_ENTRIES = 500


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of weights, and of KV cache or state at each of the contexts that were measured."""

    weight_bytes: int
    state_bytes: tuple[int, ...]


@dataclass(frozen=True)
class ModelMemory:
    """`contexts`: tokens of all slots together, ascending; compute buffers are bytes at each of them."""

    contexts: tuple[int, ...]
    layers: tuple[LayerMemory, ...]
    embedding_bytes: int  # in the host's RAM
    output_bytes: int  # on the host's device
    tied_bytes: int  # there too, when the embedding is also the output layer; a CPU reads the one in RAM
    logits_bytes: int
    projector_bytes: int
    stage_compute_bytes: tuple[int, ...]
    host_compute_bytes: tuple[int, ...]
    output_compute_bytes: tuple[int, ...]  # on a host without layers
    cpu_compute_bytes: tuple[int, ...]  # without stages, on the CPU
    n_ctx: int  # that the arguments ask for; 0 for none
    n_ctx_train: int

    def least_ctx(self, min_ctx: int) -> int:
        """What the arguments ask for, or `min_ctx`, unless the model's own is shorter."""
        return self.n_ctx or min(min_ctx, self.n_ctx_train)

    def layer_bytes(self, il: int, n_ctx: int) -> int:
        """Weights and state. A sliding window's cache grows with the context only until the window is full."""
        layer, contexts = self.layers[il], self.contexts
        first = layer.state_bytes[0] * n_ctx / contexts[0]
        slope = (layer.state_bytes[-1] - layer.state_bytes[-2]) / (contexts[-1] - contexts[-2])
        grown = layer.state_bytes[-1] - slope * (contexts[-1] - n_ctx)
        recurrent = layer.state_bytes[0] if layer.state_bytes[0] == layer.state_bytes[-1] else 0
        return layer.weight_bytes + round(max(recurrent, min(first, grown)))

    def stage_bytes(self, first: int, n_layers: int, n_ctx: int) -> int:
        """On a stage with these layers."""
        if n_layers == 0:
            return 0
        layers = sum(self.layer_bytes(il, n_ctx) for il in range(first, first + n_layers))
        return layers + self._at(self.stage_compute_bytes, n_ctx)

    def host_bytes(self, n_layers: int, n_ctx: int, alone: bool = False) -> int:
        """On the host with the last layers; output layer, logits and projector are its own. Without an embedding of
        which only rows are read, from the file."""
        n = len(self.layers)
        layers = sum(self.layer_bytes(il, n_ctx) for il in range(n - n_layers, n))
        own = self.output_bytes + self.tied_bytes + self.logits_bytes + self.projector_bytes
        with_stages = self.host_compute_bytes if n_layers else self.output_compute_bytes
        compute = self._at(self.cpu_compute_bytes if alone else with_stages, n_ctx)
        return layers + own + compute

    def _at(self, sizes: Sequence[int], n_ctx: int) -> int:
        """Between two contexts that were measured: the larger of several graphs, so never more than the chord."""
        i = min(max(bisect_left(self.contexts, n_ctx), 1), len(self.contexts) - 1)
        low, high = self.contexts[i - 1], self.contexts[i]
        part = max(n_ctx - low, 0) / (high - low)
        return round(sizes[i - 1] + part * (sizes[i] - sizes[i - 1]))


def measure(program: Path, arguments: Sequence[str], key: str) -> ModelMemory:
    """With these arguments of llama-server. `key` says which files they name. Raises EngineError."""
    name = hashlib.sha256(repr((key, tuple(arguments), _version(program))).encode()).hexdigest()
    path = cache_folder() / "memory" / f"{name[:32]}.json"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        return _decode(orjson.loads(path.read_bytes()))
    answer = _ask(program, arguments)
    try:
        memory = _decode(orjson.loads(answer))
    except (ValueError, LookupError, TypeError) as error:
        raise EngineError(f"{program.name} answers what cannot be read: {error!r}") from None
    with contextlib.suppress(OSError):
        _store(path, answer)
    return memory


def _version(program: Path) -> tuple[int, int]:
    """Changes with every installation."""
    try:
        status = program.stat()
    except OSError as error:
        raise EngineError(f"{program} is missing: {error.strerror}; install mesh-llm again") from None
    return status.st_size, status.st_mtime_ns


def _ask(program: Path, arguments: Sequence[str]) -> bytes:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GGML_BACKEND_PATH", "MESH_LLM_"))}
    try:
        done = subprocess.run(
            [str(program), *arguments], env=environment, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"cannot ask llama.cpp what the model takes: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise EngineError(
            f"llama.cpp cannot plan the model: {lines[-1] if lines else f'exit status {done.returncode}'}"
        )
    return done.stdout


def _decode(value: Any) -> ModelMemory:
    contexts = tuple(int(n) for n in value["contexts"])
    memory = ModelMemory(
        contexts=contexts,
        layers=tuple(LayerMemory(int(each["weights"]), tuple(map(int, each["state"]))) for each in value["layers"]),
        embedding_bytes=int(value["host_weights"]),
        output_bytes=int(value["output_weights"]),
        tied_bytes=int(value["tied_weights"]),
        logits_bytes=int(value["logits"]),
        projector_bytes=int(value["projector"]),
        stage_compute_bytes=tuple(map(int, value["compute_stage"])),
        host_compute_bytes=tuple(map(int, value["compute_host"])),
        output_compute_bytes=tuple(map(int, value["compute_output"])),
        cpu_compute_bytes=tuple(map(int, value["compute_cpu"])),
        n_ctx=int(value["n_ctx"]),
        n_ctx_train=int(value["n_ctx_train"]),
    )
    lists = [memory.stage_compute_bytes, memory.host_compute_bytes, memory.cpu_compute_bytes]
    lists += [memory.output_compute_bytes, *(layer.state_bytes for layer in memory.layers)]
    if len(contexts) < 2 or not memory.layers or any(len(sizes) != len(contexts) for sizes in lists):
        raise ValueError("lists of different lengths")
    return memory


def _store(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    old = sorted(path.parent.glob("*.json"), key=lambda p: p.stat().st_mtime)
    for each in old[: max(0, len(old) - _CACHE_ENTRIES)]:
        each.unlink(missing_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
