"""A wheel that runs elsewhere: what it links is in it, and so are the licences of all it carries."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux")
def test_a_repaired_wheel_is_whole(tmp_path: Path) -> None:
    tools = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(ROOT)], check=True, env=tools)
    built = next(tmp_path.glob("*.whl"))
    audit = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(tmp_path / "repaired"), str(built)]
    result = subprocess.run(audit, capture_output=True, text=True, env=tools)
    assert result.returncode == 0, result.stderr
    wheel = next((tmp_path / "repaired").glob("*manylinux*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    licences = {Path(name).name: zipfile.ZipFile(wheel).read(name) for name in names if "/licenses/" in name}
    for name in ("llama.cpp", "picoquic", "picotls", "openssl"):
        assert b"opyright" in licences[name]
    assert any("libcrypto" in name for name in names)

    place = tmp_path / "place"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    code = "from meshllm.quic import _quic; from meshllm import rpc; print(_quic.__file__, rpc.ggml_version())"
    where = {"PYTHONPATH": str(place), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=where, cwd=tmp_path)
    assert done.stdout.startswith(str(place)), done.stderr
