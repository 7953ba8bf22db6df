"""What a node remembers between runs: the mesh that it founded, those that it joined, and their members' addresses.

JSON beside the identity file, mode 0600, since it holds the meshes' secrets.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from meshllm.mesh.token import SECRET_BYTES

_MAX_JOINED = 32


@dataclass
class KnownMesh:
    """`peers` are (address, node id)."""

    secret: bytes
    peers: list[tuple[str, str]] = field(default_factory=list)
    revoked: list[str] = field(default_factory=list)


class KnownMeshes:
    """Stored at `path`; with None nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.own: str | None = None  # id of the mesh that this node founded
        self.meshes: dict[str, KnownMesh] = {}
        if path:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                self._load(orjson.loads(path.read_bytes()))

    def _load(self, content: Any) -> None:
        """Entries that are broken are left out."""
        for mesh, entry in content["meshes"].items():
            secret = bytes.fromhex(entry["secret"])
            if len(secret) == SECRET_BYTES:
                peers = [(str(a), str(i)) for a, i in entry["peers"]]
                self.meshes[mesh] = KnownMesh(secret, peers, [str(s) for s in entry["revoked"]])
        own = content["own"]
        self.own = own if isinstance(own, str) and own in self.meshes else None

    def save(self) -> None:
        """Replaces the file as a whole. On a full disk the old one stays."""
        if self._path is None:
            return
        names = list(self.meshes)[-_MAX_JOINED:]
        kept = [self.own, *names] if self.own and self.own not in names else names
        meshes = {
            mesh: {"secret": known.secret.hex(), "peers": known.peers, "revoked": known.revoked}
            for mesh, known in self.meshes.items()
            if mesh in kept
        }
        with contextlib.suppress(OSError):
            fd, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(orjson.dumps({"own": self.own, "meshes": meshes}))
                os.replace(name, self._path)
            except OSError:
                os.unlink(name)
                raise
