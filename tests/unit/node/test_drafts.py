"""What guesses for a model: its own head, a draft model, or repetition."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import smollm2

from meshllm.engine import Speculation
from meshllm.engine.speculation import with_draft
from meshllm.errors import ModelError
from meshllm.models.store import Model, load_model
from meshllm.node.drafts import Drafting

TARGET, DRAFT = "Qwen2.5-7B-Instruct-Q4_K_M", "Qwen2.5-0.5B-Instruct-Q8_0"  # a pair of the catalog


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path))
    return tmp_path


def model_named(folder: Path, name: str) -> Model:
    os.symlink(smollm2(), folder / f"{name}.gguf")
    return load_model(folder / f"{name}.gguf")


def with_tensors(model: Model, architecture: str, *names: str, n_nextn: int = 0) -> Model:
    """The model as if its file had these tensors only."""
    tensors = tuple(replace(model.info.tensors[0], name=name) for name in names)
    return replace(model, architecture=architecture, n_nextn=n_nextn, info=replace(model.info, tensors=tensors))


def test_the_catalogs_draft_is_taken_once_it_is_on_disk(folder: Path) -> None:
    target, drafting = model_named(folder, TARGET), Drafting(None, None)
    assert drafting.for_model(target) is None and drafting.size_bytes == 0
    draft = model_named(folder, DRAFT)
    assert drafting.for_model(target) == Speculation("draft-simple", 8, draft, by_default=True)
    assert drafting.for_model(draft) is None  # which has no draft of its own


def test_a_draft_by_name_counts_for_the_memory(folder: Path) -> None:
    target, draft = model_named(folder, "a"), model_named(folder, "b")
    drafting = Drafting("b", 5)
    assert drafting.for_model(target) == Speculation("draft-simple", 5, draft)
    assert drafting.size_bytes == draft.size_bytes
    assert drafting.for_model(draft) is None  # no model drafts for itself


def test_none_and_repetition(folder: Path) -> None:
    target = model_named(folder, TARGET)
    model_named(folder, DRAFT)
    assert Drafting(None, 0).for_model(target) is None
    assert Drafting("ngram", 5).for_model(target) == Speculation("ngram-simple", 5)
    assert Drafting("ngram", None).for_model(target) == Speculation("ngram-simple", 8)
    assert Drafting("ngram-mod", None).for_model(target) == Speculation("ngram-mod", 64)
    assert Drafting("ngram", 0).for_model(target) is None


def test_a_models_own_head_comes_before_the_catalogs_pair(folder: Path) -> None:
    plain = model_named(folder, TARGET)
    draft = model_named(folder, DRAFT)
    head = with_tensors(plain, "qwen35", "blk.29.nextn.eh_proj.weight", n_nextn=1)
    assert Drafting(None, None).for_model(head) == Speculation("draft-mtp", 3, by_default=True)
    assert Drafting("mtp", 2).for_model(head) == Speculation("draft-mtp", 2)
    assert Drafting(DRAFT, None).for_model(head) == Speculation("draft-simple", 8, draft)
    assert Drafting(None, 0).for_model(head) is None
    assert Drafting("mtp", None).for_model(plain) is None


def test_a_head_that_llama_server_cannot_use_is_left_alone(folder: Path) -> None:
    plain = model_named(folder, "a")
    no_graph = with_tensors(plain, "glm4", "blk.29.nextn.eh_proj.weight", n_nextn=1)
    cut_out = with_tensors(plain, "qwen35", "blk.28.attn_norm.weight", n_nextn=1)
    assert Drafting(None, None).for_model(no_graph) is None and Drafting(None, None).for_model(cut_out) is None


@pytest.mark.parametrize(
    ("kind", "architecture", "n_nextn", "tensors"),
    [
        ("draft-simple", "qwen35", 0, ("blk.0.attn_norm.weight",)),
        ("draft-simple", "qwen35", 1, ("blk.0.attn_norm.weight", "blk.29.nextn.eh_proj.weight")),
        ("draft-mtp", "qwen35", 1, ("blk.29.nextn.eh_proj.weight",)),
        ("draft-mtp", "gemma4-assistant", 0, ("blk.0.attn_norm.weight",)),
        ("draft-eagle3", "eagle3", 0, ("fc.weight",)),
        ("draft-dflash", "dflash", 0, ("fc.weight",)),
        ("draft-dspark", "dflash", 0, ("fc.weight", "markov_w1.weight")),
    ],
)
def test_a_drafts_file_says_how_it_drafts(
    folder: Path, kind: str, architecture: str, n_nextn: int, tensors: tuple[str, ...]
) -> None:
    draft = with_tensors(model_named(folder, "a"), architecture, *tensors, n_nextn=n_nextn)
    assert with_draft(draft).kind == kind


def test_a_draft_that_there_is_not() -> None:
    with pytest.raises(ModelError, match="no model 'nothing-like-it'"):
        Drafting("nothing-like-it", 8)
