"""Models of any shape as llama.cpp would plan them, for tests of what fits."""

from __future__ import annotations

from hypothesis import strategies as st

from meshllm.engine.memory import LayerMemory, ModelMemory

CONTEXTS = (1024, 4096, 16384, 131072, 262144)
MB = 10**6


def growing(at_0: int, slope: int) -> tuple[int, ...]:
    return tuple(at_0 + slope * n for n in CONTEXTS)


def layer(weight: int, slope: int = 0, window: int = 1 << 30, state: int = 0) -> LayerMemory:
    return LayerMemory(weight, tuple(state or slope * min(n, window) for n in CONTEXTS))


def memory_of(*layers: LayerMemory, compute: int = 10 * MB, slope: int = 100, n_ctx: int = 0) -> ModelMemory:
    sizes = growing(compute, slope)
    return ModelMemory(CONTEXTS, layers, 50 * MB, 20 * MB, 0, MB, 0, sizes, sizes, sizes, sizes, n_ctx, 32768)


layers = st.builds(layer, st.integers(MB, 300 * MB), st.integers(0, 9000), st.sampled_from([2048, 8192, 1 << 30]))
states = st.builds(layer, st.integers(MB, 300 * MB), state=st.integers(1, 90 * MB))
models = st.builds(
    lambda each, compute, slope, n_ctx: memory_of(*each, compute=compute, slope=slope, n_ctx=n_ctx),
    st.lists(layers | states, min_size=6, max_size=60),
    st.integers(0, 500 * MB),
    st.integers(0, 5000),
    st.sampled_from([0, 0, 300, 5000, 32768]),
)
memories = st.integers(50 * MB, 9000 * MB)
