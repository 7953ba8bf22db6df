"""The test program of the wire codecs, which CMake builds with MESH_LLM_TESTS=ON."""

from __future__ import annotations

import subprocess

from support.processes import ENGINE


def test_wire_codecs() -> None:
    result = subprocess.run([ENGINE / "test-wire"], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith(" checks, 0 failed\n")
