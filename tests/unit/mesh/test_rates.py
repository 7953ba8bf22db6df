"""Request rates: a steady stream is told as it is, and what is over is forgotten."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshllm.mesh.rates import RequestRates, differ


@given(st.floats(0.2, 20), st.floats(0, 1e6))
def test_steady_stream_is_told_as_it_is(interval_s: float, began: float) -> None:
    rates = RequestRates()
    now = began
    while now < began + 400:
        rates.count("a", now)
        now += interval_s
    assert rates.per_minute(now)["a"] == pytest.approx(60 / interval_s, rel=0.25)
    assert rates.per_minute(now + 1200) == {}


def test_only_what_matters_is_told() -> None:
    assert not differ({}, {}) and not differ({"a": 10.0}, {"a": 12.0}) and not differ({}, {"a": 0.4})
    assert differ({}, {"a": 1.0}) and differ({"a": 10.0}, {"a": 13.0}) and differ({"a": 1.0}, {})
