"""Which draft model speculates for a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.processes import smollm2

from meshllm.engine import Speculation
from meshllm.errors import ModelError
from meshllm.models.store import Model, load_model
from meshllm.node.drafts import NGRAM, Drafting

TARGET, DRAFT = "Qwen2.5-7B-Instruct-Q4_K_M", "Qwen2.5-0.5B-Instruct-Q8_0"  # a pair of the catalog


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path))
    return tmp_path


def model_named(folder: Path, name: str) -> Model:
    os.symlink(smollm2(), folder / f"{name}.gguf")
    return load_model(folder / f"{name}.gguf")


def test_the_catalogs_draft_is_taken_once_it_is_on_disk(folder: Path) -> None:
    target, drafting = model_named(folder, TARGET), Drafting(None, 8)
    assert drafting.for_model(target) is None and drafting.size_bytes == 0
    draft = model_named(folder, DRAFT)
    speculation = drafting.for_model(target)
    assert speculation and speculation.draft and speculation.draft.files == draft.files and speculation.n_max == 8
    assert drafting.for_model(draft) is None  # which has no draft of its own


def test_a_draft_by_name_counts_for_the_memory(folder: Path) -> None:
    target, draft = model_named(folder, "a"), model_named(folder, "b")
    drafting = Drafting("b", 8)
    speculation = drafting.for_model(target)
    assert speculation and speculation.draft and speculation.draft.files == draft.files
    assert drafting.size_bytes == draft.size_bytes
    assert drafting.for_model(draft) is None  # no model drafts for itself


def test_none_and_ngram(folder: Path) -> None:
    target = model_named(folder, TARGET)
    model_named(folder, DRAFT)
    assert Drafting(None, 0).for_model(target) is None
    assert Drafting(NGRAM, 5).for_model(target) == Speculation(None, 5)
    assert Drafting(NGRAM, 0).for_model(target) is None


def test_a_draft_that_there_is_not() -> None:
    with pytest.raises(ModelError, match="no model 'nothing-like-it'"):
        Drafting("nothing-like-it", 8)
