"""The stubs of the extensions say what these have."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meshllm import rpc
from meshllm.errors import MeshLlmError
from meshllm.rpc import _native

CYTHON_INTERNALS = ["__reduce_cython__", "__setstate_cython__", "__test__"]


def stubtest(folder: Path, module: str, extra: str = "") -> subprocess.CompletedProcess[str]:
    """mypy's comparison of the stub, with `extra` behind it, and the extension that Python imports here."""
    package = Path(_native.__file__).parents[1]
    # a copy, since mypy looks into site-packages only for what is marked as typed
    shutil.copytree(package, folder / "meshllm", ignore=shutil.ignore_patterns("*.so", "_bin"))
    with open(folder / (module.replace(".", "/") + ".pyi"), "a") as stub:
        stub.write(extra)
    (folder / "allowed").write_text("\n".join(f"{module}.{name}" for name in CYTHON_INTERNALS))
    (folder / "mypy.ini").write_text("[mypy]\n")
    options = "--ignore-disjoint-bases --allowlist allowed --mypy-config-file mypy.ini"
    return subprocess.run(
        [sys.executable, "-P", "-m", "mypy.stubtest", module, *options.split()],
        cwd=folder,
        env=os.environ | {"MYPYPATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("module", ["meshllm.rpc._native", "meshllm.quic._quic"])
def test_the_stub_says_what_the_extension_has(tmp_path: Path, module: str) -> None:
    result = stubtest(tmp_path, module)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_stub_that_says_more_is_noticed(tmp_path: Path) -> None:
    result = stubtest(tmp_path, "meshllm.rpc._native", "def nonsense() -> None: ...")
    assert result.returncode != 0
    assert "nonsense is not present at runtime" in result.stdout


def test_the_stub_knows_the_arguments_of_device_server() -> None:
    """A compiled constructor has no signature that a program can ask for; so it is called."""
    stub = Path(_native.__file__).with_name("_native.pyi").read_text()
    server = next(n for n in ast.parse(stub).body if isinstance(n, ast.ClassDef) and n.name == "DeviceServer")
    init = next(n for n in server.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    values: dict[str, Any] = {"threads": 1, "memory_limit_bytes": 1, "allow_remote": False}
    positional = [a.arg for a in init.args.args[2:]]
    keywords = positional + [a.arg for a in init.args.kwonlyargs]
    with pytest.raises(MeshLlmError):  # and no TypeError
        rpc.DeviceServer("", **{name: values.get(name, ()) for name in keywords})
    with pytest.raises(MeshLlmError):
        rpc.DeviceServer("", *(() for _ in positional))
    with pytest.raises(TypeError):
        rpc.DeviceServer("", *(() for _ in positional), 1)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        rpc.DeviceServer("", nonsense=1)  # type: ignore[call-arg]
