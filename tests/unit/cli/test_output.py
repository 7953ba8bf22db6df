"""What goes wrong inside is one line for the user, and a traceback for who asks."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from meshllm.cli.output import Output


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    logger = logging.getLogger("meshllm")
    kept = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = kept


def _fail() -> None:
    log = logging.getLogger("meshllm.somewhere")
    log.debug("dialling")
    try:
        raise RuntimeError("a fault of ours")
    except RuntimeError:
        log.exception("internal error, please report it: gossip")


def test_a_fault_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Output().show_logs()
    _fail()
    assert capsys.readouterr().err.splitlines() == [
        "error: internal error, please report it: gossip: RuntimeError('a fault of ours') "
        "(--verbose shows the traceback)"
    ]


def test_verbose_shows_debug_lines_and_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    Output(verbose=True).show_logs()
    _fail()
    text = capsys.readouterr().err
    assert text.startswith("debug: dialling\n") and "Traceback" in text and 'raise RuntimeError("a fault' in text


def test_json_stays_json(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.show_logs()
    _fail()
    output.emit("joined")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert "a fault of ours" in lines[0]["log"] and lines[1]["event"] == "joined"
