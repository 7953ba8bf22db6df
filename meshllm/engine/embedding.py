"""What llama-server must be told to serve embeddings or ranks, which users of other programs need not know."""

from __future__ import annotations

from meshllm.mesh.announcement import Capability
from meshllm.models.capability import Pooling, is_encoder, pooling_of
from meshllm.models.store import Model

_DEFAULT_BATCH = 512  # llama-server's own --ubatch-size
_MAX_BATCH = 4096  # a model of the size of BGE-M3 takes 288 MiB of each stage for it, for 8192 832


def embedding_arguments(model: Model) -> list[str]:
    """None for a model that continues text."""
    if model.capability is Capability.COMPLETION:
        return []
    args = ["--rerank"] if model.capability is Capability.RERANK else ["--embedding"]
    pooling = pooling_of(model.architecture, model.info.metadata)
    if model.capability is Capability.EMBEDDING and not pooling:
        args += ["--pooling", "mean"]  # as sentence-transformers does for a model that states none
    batch = min(model.n_ctx_train, _MAX_BATCH)
    if batch > _DEFAULT_BATCH and not _reads_in_parts(model, pooling):
        args += ["--batch-size", str(batch), "--ubatch-size", str(batch)]
    return args


def _reads_in_parts(model: Model, pooling: Pooling | None) -> bool:
    """Whether llama-server may cut the input into batches (server_slot::can_split); else it refuses longer ones."""
    return pooling in (Pooling.LAST, Pooling.RANK) and not is_encoder(model.architecture)
