"""Histograms as Prometheus counts: every bucket holds what is below its bound."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshllm.api.latencies import BOUNDS_S, Histogram


@given(st.lists(st.floats(0, 1000)))
def test_buckets_are_cumulative(seconds: list[float]) -> None:
    histogram = Histogram()
    for value in seconds:
        histogram.observe(value)
    status = histogram.status()
    assert [bound for bound, _ in status.buckets] == list(BOUNDS_S)
    assert [count for _, count in status.buckets] == [sum(s <= bound for s in seconds) for bound in BOUNDS_S]
    assert status.count == len(seconds) and abs(status.sum - sum(seconds)) < 1e-3
