"""What llama-server does with a model: it continues text, embeds it, or ranks documents; from the GGUF alone.

Opens no file and needs no compiled code.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping

from meshllm.mesh.announcement import Capability

# llama.cpp keeps no KV cache for these (llama-model.cpp, create_memory): they read a text at once and write none.
_ENCODERS = {"bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert"}
_ENCODERS |= {"nomic-bert", "nomic-bert-moe", "t5encoder"}
_CLASSIFIERS = ("cls.weight", "cls.output.weight")
_DIFFUSION = "is a diffusion model, with which llama-server answers nothing"
_UNSERVED = dict.fromkeys(("dream", "llada", "llada-moe", "rnd1"), _DIFFUSION)
_UNSERVED["t5"] = "is an encoder-decoder model, whose encoder llama-server does not run"


class Pooling(enum.IntEnum):
    """How the vectors of all tokens become one (llama.h, llama_pooling_type)."""

    NONE = 0
    MEAN = 1
    CLS = 2
    LAST = 3
    RANK = 4


def why_not_served(architecture: str) -> str | None:
    """Why llama-server cannot answer with such a model, although it loads."""
    return _UNSERVED.get(architecture)


def is_encoder(architecture: str) -> bool:
    return architecture in _ENCODERS


def pooling_of(architecture: str, metadata: Mapping[str, object]) -> Pooling | None:
    """None if the model states none. llama.cpp itself writes -1 for that."""
    value = metadata.get(f"{architecture}.pooling_type")
    return Pooling(value) if isinstance(value, int) and value in list(Pooling) else None


def capability_of(architecture: str, metadata: Mapping[str, object], tensors: Collection[str]) -> Capability:
    """Models made for embeddings state a pooling; rerankers of the BERT family may only have a classifier."""
    pooling = pooling_of(architecture, metadata)
    if pooling is Pooling.RANK:
        return Capability.RERANK
    if pooling:
        return Capability.EMBEDDING
    if not is_encoder(architecture):
        return Capability.COMPLETION
    return Capability.RERANK if any(name in tensors for name in _CLASSIFIERS) else Capability.EMBEDDING
