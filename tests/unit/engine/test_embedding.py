"""llama-server's options for models that make embeddings or rank documents."""

from __future__ import annotations

import pytest

from meshllm import rpc
from meshllm.engine.embedding import embedding_arguments
from meshllm.models.capability import Pooling
from meshllm.models.store import Model


def model(architecture: str, pooling: Pooling | None = None, n_ctx: int = 512, tensor: str = "output.weight") -> Model:
    metadata: dict[str, int | float | bool | str] = {f"{architecture}.context_length": n_ctx}
    if pooling is not None:
        metadata[f"{architecture}.pooling_type"] = pooling
    tensors = (rpc.TensorInfo(tensor, 0, (1, 1, 1, 1), 0, 0, 4),)
    return Model("m", ("m.gguf",), 1, architecture, 2, rpc.GgufInfo(("m.gguf",), (0,), (1,), tensors, metadata))


@pytest.mark.parametrize(
    ("served", "expected"),
    [
        (model("llama"), ""),
        (model("bert", Pooling.CLS), "--embedding"),
        (model("bert"), "--embedding --pooling mean"),
        (model("bert", Pooling.NONE), "--embedding --pooling mean"),
        (model("nomic-bert", Pooling.MEAN, 2048), "--embedding --batch-size 2048 --ubatch-size 2048"),
        (model("modern-bert", Pooling.CLS, 65536), "--embedding --batch-size 4096 --ubatch-size 4096"),
        (model("qwen3", Pooling.LAST, 32768), "--embedding"),
        (model("llama", Pooling.MEAN, 4096), "--embedding --batch-size 4096 --ubatch-size 4096"),
        (model("qwen3", Pooling.RANK, 32768), "--rerank"),
        (model("bert", None, 8192, "cls.weight"), "--rerank --batch-size 4096 --ubatch-size 4096"),
    ],
)
def test_the_options_that_a_model_needs(served: Model, expected: str) -> None:
    assert " ".join(embedding_arguments(served)) == expected
