"""What a model is for, as its file says; and those that llama-server cannot answer with."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from support.cut import written

from meshllm.errors import GgufError
from meshllm.mesh.announcement import Capability
from meshllm.models.capability import Pooling, capability_of, pooling_of
from meshllm.models.store import Store, load_model


def write(path: Path, architecture: str, tensor: str = "token_embd.weight", pooling: Pooling | None = None) -> Path:
    """Just enough to be taken for a model."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(2048)
    if pooling is not None:
        writer.add_uint32(f"{architecture}.pooling_type", pooling)
    writer.add_tensor(tensor, np.zeros((4, 32), np.float32))
    return written(writer, path)[0]


@pytest.mark.parametrize(
    ("architecture", "pooling", "tensors", "expected"),
    [
        ("llama", None, (), Capability.COMPLETION),
        ("llama", Pooling.NONE, (), Capability.COMPLETION),
        ("llama", 0xFFFFFFFF, (), Capability.COMPLETION),  # as llama.cpp's model saver writes "unspecified"
        ("qwen3", Pooling.LAST, (), Capability.EMBEDDING),
        ("qwen3", Pooling.RANK, ("cls.output.weight",), Capability.RERANK),
        ("bert", None, (), Capability.EMBEDDING),
        ("bert", Pooling.CLS, (), Capability.EMBEDDING),
        ("bert", None, ("cls.weight", "cls.output.weight"), Capability.RERANK),  # bge-reranker
        ("modern-bert", Pooling.MEAN, ("cls.weight",), Capability.EMBEDDING),  # what the file says comes first
    ],
)
def test_what_a_model_is_for(
    architecture: str, pooling: int | None, tensors: tuple[str, ...], expected: Capability
) -> None:
    metadata = {} if pooling is None else {f"{architecture}.pooling_type": pooling}
    assert capability_of(architecture, metadata, tensors) is expected


def test_the_pooling_of_a_model() -> None:
    assert pooling_of("bert", {"bert.pooling_type": 2}) is Pooling.CLS
    for metadata in ({}, {"bert.pooling_type": 9}, {"bert.pooling_type": "mean"}, {"llama.pooling_type": 1}):
        assert pooling_of("bert", metadata) is None


def test_a_file_tells_it(tmp_path: Path) -> None:
    model = load_model(write(tmp_path / "a.gguf", "nomic-bert", pooling=Pooling.MEAN))
    assert (model.capability, model.n_ctx_train) == (Capability.EMBEDDING, 2048)
    assert load_model(write(tmp_path / "b.gguf", "bert", "cls.weight")).capability is Capability.RERANK


@pytest.mark.parametrize(
    ("architecture", "why"),
    [("t5", "an encoder-decoder model"), ("llada", "a diffusion model"), ("dream", "a diffusion model")],
)
def test_models_that_llama_server_cannot_answer_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, why: str
) -> None:
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path))
    path = write(tmp_path / "Some-F32.gguf", architecture)
    with pytest.raises(GgufError, match=f"Some-F32.gguf is {why}, "):
        load_model(path)
    lines: list[str] = []
    store = Store(lines.append)
    store.scan()
    store.scan()
    assert len(lines) == 1 and why in lines[0]
    assert "Some-F32" not in {model.name for model in store.models.values()}
