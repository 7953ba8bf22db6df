"""Layers and tensor split, against llama.cpp's own rule."""

from __future__ import annotations

import bisect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshllm.engine.layers import assign_layers, tensor_split
from meshllm.errors import EngineError

weights = st.lists(st.floats(0.01, 1e12), min_size=1, max_size=14)


def llama_cpp_assignment(n_layers: int, split: str) -> list[int]:
    """Device of each layer and, last, of the output layer (llama-model.cpp, get_layer_buft_list), in 32-bit floats."""
    shares = [np.float32(part) for part in split.split(",")]
    total = np.float32(0)
    points = []
    for share in shares:
        total = np.float32(total + share)
        points.append(total)
    points = [np.float32(p / total) for p in points]
    n = n_layers + 1
    return [bisect.bisect_right(points, np.float32(np.float32(il) / np.float32(n))) for il in range(n)]


@given(weights, st.floats(0, 1e12), st.integers(0, 200))
def test_llama_cpp_puts_every_layer_where_it_was_planned(stage: list[float], host: float, more: int) -> None:
    n_layers = len(stage) + more
    layers = assign_layers(n_layers, stage, host)
    assert sum(layers) == n_layers and all(n >= 1 for n in layers[:-1]) and layers[-1] >= 0
    expected = [device for device, n in enumerate(layers) for _ in range(n)] + [len(stage)]
    assert llama_cpp_assignment(n_layers, tensor_split(layers)) == expected


@given(weights, st.integers(0, 200))
def test_shares_follow_the_weights(stage: list[float], more: int) -> None:
    n_layers = len(stage) + more
    layers = assign_layers(n_layers, stage)[:-1]
    for n, weight in zip(layers, stage, strict=True):
        assert abs(n - 1 - more * weight / sum(stage)) < 1 + 1e-6


@given(weights, st.floats(0, 1e12), st.integers(0, 4), st.integers(0, 200))
def test_the_host_has_its_least_and_the_rest_follows_the_weights(
    stage: list[float], host: float, least: int, more: int
) -> None:
    n_layers = len(stage) + least + more
    layers = assign_layers(n_layers, stage, host, least)
    free = assign_layers(n_layers, stage, host)
    assert sum(layers) == n_layers and all(n >= 1 for n in layers[:-1])
    assert layers == (free if free[-1] >= least else [*assign_layers(n_layers - least, stage)[:-1], least])


def test_the_example_of_the_product_page() -> None:
    assert assign_layers(80, [103, 51]) == [53, 27, 0]


@pytest.mark.parametrize(("n_layers", "stage", "host"), [(1, [1.0, 1.0], 0.0), (4, [0.0], 0.0), (4, [-1.0, 2.0], 0.0)])
def test_impossible_splits(n_layers: int, stage: list[float], host: float) -> None:
    with pytest.raises(EngineError):
        assign_layers(n_layers, stage, host)
