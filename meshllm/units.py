"""How numbers and ids are written for people."""

from __future__ import annotations

GB = 10**9


def in_gb(n_bytes: float) -> str:
    """Two digits that tell: "12.3 GB", "340 MB"."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"


def short_id(node_id: str) -> str:
    """Enough of a node id to tell nodes apart."""
    return node_id[:10]


def socket_id(node_id: str) -> str:
    """For names of Unix sockets, whose paths may be 107 bytes long; 64 bits, so that nobody makes a second one."""
    return node_id[:16]
