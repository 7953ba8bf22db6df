"""What llama.cpp is asked to plan, against what llama-server then takes: the sizes of buffers in its log."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.engines import Engine, plain_and_split, taken
from support.processes import ENGINE

from meshllm.engine.layers import assign_layers
from meshllm.engine.memory import ModelMemory, measure
from meshllm.errors import EngineError
from meshllm.models.store import load_model

_TOLERANCE = 0.05


def near(predicted: int, real: int, what: str) -> None:
    assert predicted == pytest.approx(real, rel=_TOLERANCE, abs=64 << 10), what


def compare(memory: ModelMemory, model: Path, alone: Engine, split: Engine, n_ctx: int, exact: bool = True) -> None:
    """Without `exact`, compute buffers may be smaller than predicted, for a device without the costliest layers."""
    loaded = load_model(model)
    names = {tensor.name for tensor in loaded.info.tensors}
    layers = assign_layers(loaded.n_layers, [1, 1], 1, loaded.n_nextn)
    sizes = taken(split)
    assert len(memory.layers) == loaded.n_layers
    weights = [layer.weight_bytes for layer in memory.layers]
    held = [memory.layer_bytes(il, n_ctx) for il in range(loaded.n_layers)]

    def compare_compute(predicted: int, real: int, what: str) -> None:
        near(predicted if exact else min(predicted, real), real, what)

    first = 0
    for i, n in enumerate(layers[:-1]):
        stage, its = sizes.get(f"STAGE{i}", Counter()), slice(first, first + n)
        near(sum(held[its]), stage["model"] + stage["state"], f"STAGE{i}")
        compare_compute(memory.stage_bytes(first, n, n_ctx) - sum(held[its]), stage["compute"], f"STAGE{i} computes")
        first += n
    own = memory.embedding_bytes + memory.output_bytes
    assert memory.tied_bytes == (0 if "output.weight" in names else memory.embedding_bytes)
    near(sum(held[first:]) - sum(weights[first:]), sizes["CPU"]["state"], "HOST")
    output = memory.output_bytes + memory.tied_bytes
    host = memory.host_bytes(layers[-1], n_ctx) - output - sum(held[first:])
    compare_compute(host, sizes["CPU"]["compute"], "HOST computes")
    whole, cpu = memory.host_bytes(loaded.n_layers, n_ctx, alone=True), taken(alone)["CPU"]
    near(whole - output - sum(weights), cpu["state"] + cpu["compute"], "alone")
    near(own + sum(weights), sum(tensor.size for tensor in loaded.info.tensors), "weights")


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


def test_sliding_windows_of_a_real_model(other_model: Path, tmp_path: Path) -> None:
    memory = measure(ENGINE / "mesh-llm-measure", ["--model", str(other_model)], "test")
    with plain_and_split(other_model, tmp_path) as (alone, split):
        compare(memory, other_model, alone, split, 4096)


@pytest.mark.parametrize("i", range(6))
def test_states_windows_and_experts(tiny_models: list[Path], tmp_path: Path, i: int) -> None:
    model = tiny_models[i]
    memory = measure(ENGINE / "mesh-llm-measure", ["--model", str(model)], "test")
    with plain_and_split(model, tmp_path) as (alone, split):
        compare(memory, model, alone, split, 4096, exact=False)


def test_a_broken_file_is_told(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(EngineError, match="cannot plan the model"):
        measure(ENGINE / "mesh-llm-measure", ["--model", str(broken)], "test")
