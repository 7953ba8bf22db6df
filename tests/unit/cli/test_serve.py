"""Options of `serve` that do not go together are refused before anything starts."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from meshllm.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--client", "--client needs --join TOKEN"),
        ("--client --join x --model y", "--client takes no --model"),
        ("--stage a:1 --model x --model y", "--stage works with a single --model"),
        ("--console --console-host 0.0.0.0", "--api-key KEY is needed"),
        ("--draft x --no-draft", "--draft and --no-draft cannot be combined"),
        ("--stage a:1 --join x", "--stage works without a mesh"),
        ("--stage a:1 --split", "--stage works without a mesh"),
        ("--tensor-split a,b", "expected numbers separated by commas"),
        ("--draft-max 0", "0 is not in the range x>=1"),
        ("--port 70000", "70000 is not in the range 0<=x<=65535"),
        ("--bind-port 65536", "65536 is not in the range"),
        ("--console 99999", "99999 is not in the range"),
        ("--max-vram 0", "0.0 is not in the range x>0"),
        ("--quic other", "'other' is not one of 'native', 'aioquic'"),
    ],
)
def test_wrong_options(arguments: str, message: str) -> None:
    result = CliRunner().invoke(main, arguments.split())
    assert result.exit_code == 2 and message in result.output
