"""How long answers take, in the buckets that Prometheus wants."""

from __future__ import annotations

BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    def __init__(self) -> None:
        self._counts = [0] * len(BOUNDS_S)
        self._count, self._sum = 0, 0.0

    def observe(self, seconds: float) -> None:
        self._count += 1
        self._sum += seconds
        for i, bound in enumerate(BOUNDS_S):
            self._counts[i] += seconds <= bound

    def describe(self) -> dict[str, object]:
        """`buckets`: upper bound in seconds, and answers that took no longer."""
        buckets = [[bound, count] for bound, count in zip(BOUNDS_S, self._counts, strict=True)]
        return {"buckets": buckets, "count": self._count, "sum": round(self._sum, 6)}


class Latencies:
    def __init__(self) -> None:
        self.first_byte = Histogram()
        self.answer = Histogram()

    def describe(self) -> dict[str, object]:
        return {"first_byte": self.first_byte.describe(), "answer": self.answer.describe()}
