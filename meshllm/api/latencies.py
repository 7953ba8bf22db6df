"""How long answers take, as Prometheus histograms."""

from __future__ import annotations

from dataclasses import dataclass

BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True)
class HistogramStatus:
    """`buckets`: an upper bound in seconds and the number of answers within it. `sum` in seconds."""

    buckets: tuple[tuple[float, int], ...]
    count: int
    sum: float


@dataclass(frozen=True)
class LatencyStatus:
    first_byte: HistogramStatus
    answer: HistogramStatus


class Histogram:
    def __init__(self) -> None:
        self._counts = [0] * len(BOUNDS_S)
        self._count, self._sum = 0, 0.0

    def observe(self, seconds: float) -> None:
        self._count += 1
        self._sum += seconds
        for i, bound in enumerate(BOUNDS_S):
            self._counts[i] += seconds <= bound

    def status(self) -> HistogramStatus:
        return HistogramStatus(tuple(zip(BOUNDS_S, self._counts, strict=True)), self._count, round(self._sum, 6))


class Latencies:
    """Of POST requests at one endpoint."""

    def __init__(self) -> None:
        self.first_byte = Histogram()
        self.answer = Histogram()

    def status(self) -> LatencyStatus:
        return LatencyStatus(self.first_byte.status(), self.answer.status())
