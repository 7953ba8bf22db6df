"""The test programs that CMake builds with MESH_LLM_TESTS=ON: of the wire codecs, of operators and of devices."""

from __future__ import annotations

import subprocess

import pytest
from support.processes import ENGINE


@pytest.mark.parametrize("program", ["test-wire", "test-ops", "test-device"])
def test_program(program: str) -> None:
    result = subprocess.run([ENGINE / program], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" checks, 0 failed\n")
