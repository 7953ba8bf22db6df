"""How long a token is valid, as its user writes it."""

from __future__ import annotations

import click
import pytest

from meshllm.cli.token import parse_time


@pytest.mark.parametrize(("text", "seconds"), [(None, 0), ("30s", 30), ("30m", 1800), (" 24H ", 86400), ("7d", 604800)])
def test_times(text: str | None, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "0h", "24", "h", "-1h", "1.5h", "24 hours"])
def test_other_texts(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected a number followed by s, m, h or d"):
        parse_time(text)
