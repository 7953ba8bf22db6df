"""Where a model would be served: as the mesh decides, with llama.cpp's figures."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.memories import MB, layer, memory_of, models

from meshllm.engine.memory import ModelMemory
from meshllm.mesh.announcement import ModelInfo
from meshllm.mesh.groups import needed_bytes
from meshllm.node.outlook import Machine, outlook

INFO = ModelInfo("m", "ab" * 32, 300 * MB, 30)
MEMORY = memory_of(*[layer(10 * MB, 1000)] * 30)


def machines(*sizes: int, rtt_ms: float | None = 5.0) -> list[Machine]:
    return [Machine(f"m{i}", size, rtt_ms) for i, size in enumerate(sizes)]


def test_one_machine_with_as_much_context_as_fits() -> None:
    whole = outlook(INFO, MEMORY, 0, machines(2000 * MB, 100 * MB), 4096)
    assert [m.name for m in whole.machines] == ["m0"] and whole.fit is not None
    assert whole.fit.n_ctx == MEMORY.n_ctx_train == whole.most and whole.fit.layers == (30,)
    less = outlook(INFO, MEMORY, 0, machines(600 * MB, 100 * MB), 4096)
    assert less.fit is not None and 4096 <= less.fit.n_ctx < MEMORY.n_ctx_train
    assert less.fit.sizes_bytes[0] <= 600 * MB


def test_the_fewest_machines_that_hold_the_least_context() -> None:
    found = outlook(INFO, MEMORY, 0, machines(250 * MB, 240 * MB, 230 * MB), 4096)
    assert [m.name for m in found.machines] == ["m1", "m0"]
    assert found.fit is not None and found.fit.n_ctx >= 4096 and sum(found.fit.layers) == 30


def test_what_would_fit_is_told() -> None:
    found = outlook(INFO, MEMORY, 0, machines(190 * MB, 190 * MB), 4096)
    assert found.fit is None and found.machines == () and 256 <= found.most < 4096
    assert outlook(INFO, MEMORY, 0, machines(190 * MB, 190 * MB), found.most).fit is not None
    assert outlook(INFO, MEMORY, 0, machines(100 * MB), 4096).most == 0
    assert outlook(INFO, MEMORY, 0, machines(190 * MB, 290 * MB, rtt_ms=None), 4096).fit is None  # unknown


@settings(deadline=None)
@given(models, st.lists(st.integers(50 * MB, 9000 * MB), min_size=1, max_size=16), st.integers(0, 3))
def test_whatever_the_mesh_serves_fits(memory: ModelMemory, sizes: list[int], host_min: int) -> None:
    n_layers = len(memory.layers)
    weights = sum(each.weight_bytes for each in memory.layers)
    info = ModelInfo("m", "ab" * 32, needed_bytes(weights), n_layers - host_min)
    found = outlook(info, memory, host_min, machines(*sizes), 4096)
    assert (found.fit is not None) == bool(found.placement.groups)
    if found.fit is None:
        assert found.most < memory.least_ctx(4096)
        return
    assert all(n <= m.memory_bytes for n, m in zip(found.fit.sizes_bytes, found.machines, strict=True))
    assert found.fit.n_ctx >= memory.least_ctx(4096) and sum(found.fit.layers) == n_layers
