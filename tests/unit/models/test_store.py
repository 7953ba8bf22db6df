"""What `--model` means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.processes import smollm2

from meshllm.errors import GgufError, ModelError
from meshllm.models.folders import find_models
from meshllm.models.store import resolve

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / ".hub"))
    return tmp_path


def test_default_model_when_nothing_is_on_disk() -> None:
    model = resolve(None)
    assert model.name == DEFAULT_MODEL and model.n_layers == 30 and model.architecture == "llama"


def test_the_only_model_on_disk_is_taken(folder: Path) -> None:
    os.symlink(smollm2(), folder / "Other-Q8_0.gguf")
    assert resolve(None).name == "Other-Q8_0"
    assert resolve("other").files == (str(folder / "Other-Q8_0.gguf"),)
    assert set(find_models()) == {"Other-Q8_0", DEFAULT_MODEL}


def test_several_models_need_a_name(folder: Path) -> None:
    for name in ("A-Q4_0", "A-Q8_0"):
        os.symlink(smollm2(), folder / f"{name}.gguf")
    with pytest.raises(ModelError, match="choose one with --model"):
        resolve(None)
    with pytest.raises(ModelError, match="matches several models: A-Q4_0, A-Q8_0"):
        resolve("a")
    assert resolve("a-q8_0").name == "A-Q8_0"


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"did you mean smollm2\?"):
        resolve("smolm2")
    with pytest.raises(GgufError, match="cannot open"):
        resolve("/nowhere/model.gguf")
