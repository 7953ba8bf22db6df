"""What `mesh-llm status --json` and GET /mesh/status tell of nodes and models."""

from __future__ import annotations

from typing import Any

from meshllm.mesh.announcement import Announcement
from meshllm.mesh.groups import Placement
from meshllm.quic.transport import Link


def describe_node(node: Announcement, state: str, link: Link | None) -> dict[str, Any]:
    return {
        "id": node.node_id,
        "name": node.name,
        "role": str(node.role),
        "state": state,
        "device": node.device,
        "memory_bytes": node.memory_bytes,
        "engine": node.ggml_version,
        "requests_per_min": node.requests_per_min,
        "models": [m.name for m in node.models],
        "fetching": node.fetching,
        "rtt_ms": round(link.rtt_s * 1000, 1) if link and link.rtt_s is not None else None,
        "address": link.peer_address if link else None,
        "bytes_sent": link.bytes_sent if link else 0,
        "bytes_received": link.bytes_received if link else 0,
        "serving": [{"fingerprint": s.fingerprint, "stages": list(s.stages), "ready": s.ready} for s in node.serving],
    }


def describe_model(placement: Placement) -> dict[str, Any]:
    model = placement.model
    return {
        "name": model.name,
        "fingerprint": model.fingerprint,
        "size_bytes": model.size_bytes,
        "need_bytes": placement.need_bytes,
        "have_bytes": placement.have_bytes,
        "groups": [
            {"host": g.host, "stages": list(g.stages), "shares": [round(s, 3) for s in g.shares]}
            for g in placement.groups
        ],
        "reasons": {i: str(why) for i, why in placement.reasons.items()},
    }


def _loaded(stage: dict[str, Any]) -> float:
    """The part of its weights that a stage has."""
    counters, expected = stage["counters"], int(stage["weight_bytes"])
    here = int(counters["weight_bytes_local"]) + int(counters["weight_bytes_sent"]) if counters else 0
    return round(min(1.0, here / expected), 2) if expected > 0 else 1.0


def checked_engine(value: Any) -> dict[str, Any] | None:
    """What another node tells of its engine, as far as it is shown; None where it is anything else."""
    try:
        speculation = value["speculation"]
        return {
            "state": str(value["state"])[:80],
            "model": {"name": str(value["model"]["name"])[:80], "n_layers": int(value["model"]["n_layers"])},
            "n_ctx": int(value["n_ctx"]),
            "host_layers": int(value["host"]["n_layers"]),
            "stage_layers": [int(stage["n_layers"]) for stage in value["stages"][:64]],
            "stage_loaded": [_loaded(stage) for stage in value["stages"][:64]],
            "tokens": {kind: int(value["tokens"][kind]) for kind in ("prompt", "generated")},
            "tokens_per_s": float(value["tokens_per_s"]),
            "speculation": speculation
            and {
                "draft": str(speculation["draft"])[:80],
                "drafted": int(speculation["drafted"]),
                "accepted": int(speculation["accepted"]),
                "tokens_per_step": float(speculation["tokens_per_step"]),
            },
        }
    except (KeyError, TypeError, ValueError):
        return None
