"""Which context a model is served with, and which layers each device gets: as llama.cpp's figures allow.

Layers are whole and shared by bytes, so that all devices are filled to the same part; nobody is given more than it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from meshllm.engine.memory import ModelMemory
from meshllm.mesh.announcement import Need

MIN_CTX = 4096
_STEP = 256  # llama.cpp rounds a context up to it
_PARTS = 200  # a device is filled to a multiple of its 200th


@dataclass(frozen=True)
class Fit:
    """`layers` and `sizes_bytes`: of each stage and, last, of the host."""

    n_ctx: int
    layers: tuple[int, ...]
    sizes_bytes: tuple[int, ...]


def best_fit(
    memory: ModelMemory, stages_bytes: Sequence[int], host_bytes: int, min_ctx: int, host_min: int = 0
) -> Fit | None:
    """With the context that the user asks for, or the longest that fits, up to the model's own. None if not even
    `min_ctx` does. `host_min`: layers that only the host can have.
    """

    def fitted(n_ctx: int) -> Fit | None:
        return fit_layers(memory, n_ctx, stages_bytes, host_bytes, host_min)

    most = memory.n_ctx or memory.n_ctx_train
    n_ctx = _longest(memory.least_ctx(min_ctx), most, lambda n_ctx: fitted(n_ctx) is not None)
    return fitted(n_ctx) if n_ctx else None


def what_fits(memory: ModelMemory, stages_bytes: Sequence[int], host_bytes: int, host_min: int = 0) -> int:
    """The longest context, of whatever length, with which the mesh would serve the model; 0 if there is none."""
    return _longest(0, memory.n_ctx_train, lambda n_ctx: need(memory, n_ctx, host_min).fits(stages_bytes, host_bytes))


def advice(n_ctx: int) -> str:
    """For a line about a model that does not fit."""
    return f"; {n_ctx:,} would fit: --ctx {n_ctx}" if n_ctx else "; no context fits"


def context_of(memory: ModelMemory, layers: Sequence[int], devices_bytes: Sequence[int], min_ctx: int) -> int:
    """The longest context with these layers of each stage and, last, of the host; 0 if not even the least fits, or if
    the user has chosen one.
    """
    if memory.n_ctx:
        return 0

    def fits(n_ctx: int) -> bool:
        first = 0
        for n, free in zip(layers[:-1], devices_bytes, strict=False):
            if memory.stage_bytes(first, n, n_ctx) > free:
                return False
            first += n
        return memory.host_bytes(layers[-1], n_ctx, alone=len(layers) == 1) <= devices_bytes[-1]

    return _longest(memory.least_ctx(min_ctx), memory.n_ctx_train, fits)


def _longest(least: int, most: int, fits: Callable[[int], bool]) -> int:
    """`most`, or else the largest multiple of _STEP that fits, or else `least`; 0 if that does not."""
    if fits(most):
        return most
    low, high = least // _STEP, most // _STEP
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * _STEP) else (low, middle - 1)
    found = max(least, low * _STEP)
    return found if found > least or (least and fits(least)) else 0


def need(memory: ModelMemory, n_ctx: int, host_min: int = 0) -> Need:
    """For the mesh, which only adds up: where this says that the model fits, `fit_layers` finds how."""
    n = len(memory.layers)
    layers = [memory.layer_bytes(il, n_ctx) for il in range(n - host_min)]
    stage_bytes = memory.stage_bytes(0, 1, n_ctx) - layers[0] + max(layers)
    # with layers or without, beside stages or not, compute buffers differ
    host_bytes = max(
        memory.host_bytes(host_min, n_ctx),
        *(memory.host_bytes(n, n_ctx, alone) - sum(layers) for alone in (False, True)),
    )
    return Need(n_ctx, sum(layers), stage_bytes, host_bytes)


def as_split(layers: Sequence[int]) -> list[float]:
    """For make_launch_spec, which gives each stage one layer before it shares the others."""
    spare = [*(n - 1.0 for n in layers[:-1]), float(layers[-1])]
    return spare if any(spare) else [1.0] * len(spare)


def fit_layers(
    memory: ModelMemory, n_ctx: int, stages_bytes: Sequence[int], host_bytes: int, host_min: int = 0
) -> Fit | None:
    """At least one layer for each stage. All are filled to the smallest part of their memory that suffices."""
    best = _filled(memory, n_ctx, stages_bytes, host_bytes, host_min)
    low, high = 1, _PARTS  # `best` fills the part `high`
    while best and low < high:
        part = (low + high) // 2
        stages = [free * part // _PARTS for free in stages_bytes]
        if found := _filled(memory, n_ctx, stages, host_bytes * part // _PARTS, host_min):
            high, best = part, found
        else:
            low = part + 1
    return best


def _filled(memory: ModelMemory, n_ctx: int, stages_bytes: Sequence[int], host_bytes: int, host_min: int) -> Fit | None:
    """Each stage takes what it can, and the host the rest."""
    layers: list[int] = []
    sizes: list[int] = []
    first, n_split = 0, len(memory.layers) - host_min
    for i, free in enumerate(stages_bytes):
        n = _most_layers(memory, first, n_split - first - (len(stages_bytes) - 1 - i), n_ctx, free)
        layers.append(n)
        sizes.append(memory.stage_bytes(first, n, n_ctx))
        first += n
    rest = len(memory.layers) - first
    at_host = memory.host_bytes(rest, n_ctx, alone=not stages_bytes)
    return Fit(n_ctx, (*layers, rest), (*sizes, at_host)) if all(layers) and at_host <= host_bytes else None


def _most_layers(memory: ModelMemory, first: int, limit: int, n_ctx: int, free: int) -> int:
    low, high = 0, max(limit, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if memory.stage_bytes(first, middle, n_ctx) <= free else (low, middle - 1)
    return low
