"""The fuzzers, for a bounded time: MESH_LLM_FUZZ_SECONDS for each, 20 when it is not set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
@pytest.mark.parametrize("name", ["frames", "session", "graph", "quic"])
def test_fuzzer_finds_nothing(name: str) -> None:
    script = Path(__file__).parents[2] / "scripts" / "fuzz"
    seconds = os.environ.get("MESH_LLM_FUZZ_SECONDS", "20")
    result = subprocess.run([sys.executable, str(script), seconds, name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    assert f"fuzz_{name}:" in result.stdout
