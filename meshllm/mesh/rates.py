"""How much each model is asked for: what nodes tell each other of requests."""

from __future__ import annotations

import math

WINDOW_S = 60.0
_FORGET = 0.01  # requests a minute that are told as none


class RequestRates:
    """Requests per minute by model, the last minute counting most. `now` in seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[float, float]] = {}  # model -> decayed count, and its time

    def count(self, model: str, now: float) -> None:
        self._counts[model] = (self._now(model, now) + 1, now)

    def per_minute(self, now: float) -> dict[str, float]:
        """Rounded, so that small changes do not show."""
        self._counts = {m: (r, now) for m in self._counts if (r := self._now(m, now)) > _FORGET}
        return {model: float(f"{rate:.2g}") for model, (rate, _) in self._counts.items()}

    def _now(self, model: str, now: float) -> float:
        rate, since = self._counts.get(model, (0.0, now))
        return rate * math.exp(-(now - since) / WINDOW_S)


def differ(announced: dict[str, float], measured: dict[str, float]) -> bool:
    """Whether the change is worth announcing: a model's rate has changed by a quarter."""
    models = announced.keys() | measured.keys()
    return any(abs(announced.get(m, 0.0) - measured.get(m, 0.0)) > max(0.5, announced.get(m, 0.0) / 4) for m in models)
