"""What llama.cpp is asked to plan, against what llama-server then takes: the sizes of buffers in its log."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from support.engines import Engine, plain_and_split
from support.processes import ENGINE

from meshllm.engine.layers import assign_layers
from meshllm.engine.memory import ModelMemory, measure
from meshllm.errors import EngineError
from meshllm.models.store import load_model

_BUFFER = re.compile(r": +(\S+) +(model|KV|RS|compute|output) buffer size = +([\d.]+) MiB")
_TOLERANCE = 0.05


def taken(engine: Engine) -> Counter[str]:
    """Bytes by device. Weights that the CPU maps from the file are left out: whole pages of it, whatever is in them."""
    sizes: Counter[str] = Counter()
    for device, _, size in _BUFFER.findall(engine.process.output()):
        if device != "CPU_Mapped":
            sizes[device.removesuffix("_REPACK")] += float(size) * 2**20
    return sizes


def compare(memory: ModelMemory, model: Path, alone: Engine, split: Engine, n_ctx: int) -> None:
    loaded = load_model(model)
    layers = assign_layers(loaded.n_layers, [1, 1], 1, loaded.n_nextn)
    sizes = taken(split)
    assert len(memory.layers) == loaded.n_layers
    for i, first in enumerate((0, layers[0])):
        predicted = memory.stage_bytes(first, layers[i], n_ctx)
        assert predicted == pytest.approx(sizes[f"STAGE{i}"], rel=_TOLERANCE), f"STAGE{i}"
    mapped = memory.embedding_bytes + memory.output_bytes
    last = memory.layers[len(memory.layers) - layers[2] :]
    host = memory.host_bytes(layers[2], n_ctx) - mapped - sum(layer.weight_bytes for layer in last)
    assert host == pytest.approx(sizes["CPU"], rel=_TOLERANCE), "HOST"
    in_all = mapped + sum(layer.weight_bytes for layer in memory.layers)
    whole = memory.host_bytes(loaded.n_layers, n_ctx, alone=True) - in_all
    assert whole == pytest.approx(taken(alone)["CPU"], rel=_TOLERANCE), "alone"
    assert in_all == pytest.approx(sum(tensor.size for tensor in loaded.info.tensors), rel=_TOLERANCE), "weights"


@pytest.mark.parametrize(
    "options",
    [
        ("-c", "4096"),
        ("-c", "8192", "-np", "2", "-ub", "256"),
        ("-c", "4096", "-np", "1", "-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"),
        ("-c", "2048", "-fa", "off"),
    ],
)
def test_the_plan_is_what_a_run_takes(model: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    memory = measure(ENGINE / "mesh-llm-measure", ["--model", str(model), *options], "test")
    assert memory.n_ctx == int(options[1])
    with plain_and_split(model, tmp_path, options) as (alone, split):
        compare(memory, model, alone, split, memory.n_ctx)


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(EngineError, match="llama.cpp cannot plan the model"):
        measure(ENGINE / "mesh-llm-measure", ["--model", str(broken)], "test")
