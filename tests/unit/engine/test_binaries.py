"""Where the engine's programs are looked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from meshllm.engine.binaries import find_binaries
from meshllm.errors import EngineError


def test_what_was_installed_is_found_and_runs() -> None:
    found = find_binaries(None)
    assert os.access(found.llama_server, os.X_OK) and os.access(found.leash, os.X_OK) and found.backend.is_file()


def test_a_llama_server_of_the_users(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"llama-server is missing; check --bin-dir"):
        find_binaries(tmp_path)
    (tmp_path / "llama-server").touch()
    found, ours = find_binaries(tmp_path), find_binaries(None)
    assert found.llama_server == tmp_path / "llama-server"
    assert (found.leash, found.backend) == (ours.leash, ours.backend)


def test_an_incomplete_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meshllm.engine.binaries.engine_folder", lambda: tmp_path)
    with pytest.raises(EngineError, match=r"llama-server is missing; install mesh-llm again"):
        find_binaries(None)
