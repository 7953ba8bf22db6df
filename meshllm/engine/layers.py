"""How many layers each device gets, and the --tensor-split with which llama.cpp assigns them so."""

from __future__ import annotations

from collections.abc import Sequence

from meshllm.errors import EngineError


def assign_layers(
    n_layers: int, stage_weights: Sequence[float], host_weight: float = 0.0, host_min: int = 0
) -> list[int]:
    """Layers for each stage and, last, for the host; they sum up to `n_layers`.

    Shares are proportional to the weights (any unit), rounded by largest remainder; every stage has at least one layer,
    and the host, whose layers are the last, at least `host_min`. Raises EngineError when there are more stages than
    layers or no weight is positive.
    """
    layers = _by_weight(n_layers, stage_weights, host_weight)
    if layers[-1] < host_min:
        layers = [*_by_weight(n_layers - host_min, stage_weights)[:-1], host_min]
    return layers


def _by_weight(n_layers: int, stage_weights: Sequence[float], host_weight: float = 0.0) -> list[int]:
    n_stages = len(stage_weights)
    weights = [*stage_weights, host_weight]
    if n_stages > n_layers:
        raise EngineError(f"the model has {n_layers} layers, too few for {n_stages} stages; use fewer stages")
    if any(w < 0 for w in weights) or sum(weights) <= 0:
        raise EngineError("the numbers of --tensor-split must be 0 or more, and at least one must be above 0")
    spare = n_layers - n_stages
    shares = [spare * w / sum(weights) for w in weights]
    layers = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda i: (layers[i] - shares[i], i))
    for i in by_remainder[: spare - sum(layers)]:
        layers[i] += 1
    return [n + 1 for n in layers[:-1]] + layers[-1:]


def tensor_split(layers: Sequence[int]) -> str:
    """llama-server's --tensor-split for `layers` of the stages and, last, of the host.

    llama.cpp gives layer il of n + 1 (the output layer is the last) to the first device whose cumulative share exceeds
    il / (n + 1) (llama-model.cpp, get_layer_buft_list). Whole layers divided by n + 1 are the same 32-bit fractions on
    both sides, so the assignment is exact; the host's one more is the output layer.
    """
    return ",".join(str(n) for n in [*layers[:-1], layers[-1] + 1])
