"""Which context and which layers: facts, and properties over random models and machines."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.memories import MB, layer, memories, memory_of, models

from meshllm.engine.fit import as_split, best_fit, context_of, fit_layers, need, what_fits
from meshllm.engine.layers import assign_layers
from meshllm.engine.memory import ModelMemory


@settings(deadline=None)
@given(models, st.lists(memories, min_size=1, max_size=5), memories, st.integers(0, 3))
def test_no_device_gets_more_than_it_has(memory: ModelMemory, stages: list[int], host: int, host_min: int) -> None:
    fit = best_fit(memory, stages, host, 4096, host_min)
    if fit is None:
        if len(stages) <= len(memory.layers) - host_min:  # as the mesh sees to
            assert what_fits(memory, stages, host, host_min) < (memory.n_ctx or 4096)
        return
    assert sum(fit.layers) == len(memory.layers)
    assert all(fit.layers[:-1]) and fit.layers[-1] >= host_min
    assert all(size <= free for size, free in zip(fit.sizes_bytes, [*stages, host], strict=True))
    first = 0
    for n, size in zip(fit.layers[:-1], fit.sizes_bytes, strict=False):
        assert memory.stage_bytes(first, n, fit.n_ctx) == size
        first += n
    assert memory.host_bytes(fit.layers[-1], fit.n_ctx) == fit.sizes_bytes[-1]
    assert fit.n_ctx == memory.n_ctx if memory.n_ctx else 4096 <= fit.n_ctx <= memory.n_ctx_train
    split = as_split(fit.layers)
    assert assign_layers(len(memory.layers), split[:-1], split[-1], host_min) == list(fit.layers)


@settings(deadline=None)
@given(models, st.lists(memories, min_size=0, max_size=5), memories, st.integers(0, 3))
def test_where_the_mesh_says_that_a_model_fits_it_does(
    memory: ModelMemory, stages: list[int], host: int, host_min: int
) -> None:
    n_ctx = memory.least_ctx(4096)
    takes = need(memory, n_ctx, host_min)
    if takes.fits(stages, host) and len(stages) <= len(memory.layers) - host_min:
        assert fit_layers(memory, n_ctx, stages, host, host_min) is not None


def test_the_longest_context_that_fits_is_taken() -> None:
    memory = memory_of(*[layer(10 * MB, 1000)] * 30)
    fit = best_fit(memory, [300 * MB], 300 * MB, 4096)
    assert fit is not None and 4096 < fit.n_ctx < 32768
    assert fit_layers(memory, fit.n_ctx + 256, [300 * MB], 300 * MB) is None
    whole = best_fit(memory, [3000 * MB], 3000 * MB, 4096)
    assert whole is not None and whole.n_ctx == 32768


def test_what_would_fit_is_told() -> None:
    memory = memory_of(*[layer(10 * MB, 1000)] * 30)
    assert best_fit(memory, [210 * MB], 210 * MB, 4096) is None
    assert 256 <= what_fits(memory, [210 * MB], 210 * MB) < 4096
    assert what_fits(memory, [100 * MB], 100 * MB) == 0


def test_a_window_and_a_state_do_not_grow() -> None:
    memory = memory_of(layer(0, 1000, window=2048), layer(0, state=7 * MB), layer(0, 1000))
    at = [[memory.layer_bytes(il, n) for n in (512, 2048, 8192, 100_000)] for il in range(3)]
    assert at[0] == [512_000, 2_048_000, 2_048_000, 2_048_000]
    assert at[1] == [7 * MB] * 4
    assert at[2] == [512_000, 2_048_000, 8_192_000, 100_000_000]


def test_the_context_of_shares_that_the_user_has_chosen() -> None:
    memory = memory_of(*[layer(10 * MB, 1000)] * 30)
    sizes = [300 * MB, 400 * MB]
    n_ctx = context_of(memory, [10, 20], sizes, 4096)
    assert 4096 < n_ctx < memory.n_ctx_train
    assert memory.stage_bytes(0, 10, n_ctx) <= sizes[0] and memory.host_bytes(20, n_ctx) <= sizes[1]
    more = n_ctx + 256
    assert memory.stage_bytes(0, 10, more) > sizes[0] or memory.host_bytes(20, more) > sizes[1]
    assert context_of(memory, [10, 20], [9000 * MB] * 2, 4096) == memory.n_ctx_train
    assert context_of(memory, [10, 20], [130 * MB, 9000 * MB], 4096) == 0
    assert 256 <= context_of(memory, [10, 20], [130 * MB, 9000 * MB], 0) < 4096
    chosen = memory_of(*[layer(10 * MB, 1000)] * 30, n_ctx=8192)
    assert context_of(chosen, [10, 20], sizes, 4096) == 0
