"""What is found on disk, and what is not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from meshllm.models.folders import default_file, find_models, tidy
from meshllm.paths import partial_folder


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "models"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_models_in_both_folders_by_name(folder: Path) -> None:
    mine = touch(folder / "sub" / "A-Q4_0.gguf")
    cached = touch(folder.parent / "hub" / "models--u--r" / "snapshots" / "1" / "B-Q8_0.gguf")
    touch(folder.parent / "hub" / "A-Q4_0.gguf")  # the user's own folder comes first
    default = default_file()
    assert default and find_models() == {"A-Q4_0": mine, "B-Q8_0": cached, default.stem: default}


def test_what_is_no_model_of_its_own(folder: Path) -> None:
    first = touch(folder / "Big-00001-of-00002.gguf")
    touch(folder / "Big-00002-of-00002.gguf")
    touch(folder / "mmproj-Big-f16.gguf")
    touch(folder / "Big.mmproj-Q8_0.gguf")
    touch(folder / ".partial" / "C.gguf")
    touch(folder / "notes.txt")
    assert list(find_models())[:-1] == ["Big"] and find_models()["Big"] == first


def test_nothing_there_at_all() -> None:
    assert len(find_models()) == 1  # the default model's package


def test_what_nobody_has_gone_on_with_is_removed() -> None:
    old, old_folder = touch(partial_folder() / "old"), touch(partial_folder() / "old-model" / "a").parent
    new_inside = touch(partial_folder() / "going-on" / "a").parent
    new = touch(partial_folder() / "new")
    long_ago = time.time() - 15 * 86400
    for path in (old, old_folder / "a", old_folder, new_inside):
        os.utime(path, (long_ago, long_ago))
    tidy()
    assert set(partial_folder().iterdir()) == {new, new_inside}
