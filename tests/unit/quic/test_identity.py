"""A node's key and certificate."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from meshllm.errors import IdentityError
from meshllm.quic.identity import IdentityFile, make_identity, node_id_of


def test_identity_is_kept_locked_and_private(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    first = IdentityFile(path)
    identity = first.load()
    assert identity and node_id_of(identity.certificate) == identity.node_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert IdentityFile(path).load() is None  # a second node of the same name would be taken for this one
    first.close()
    again = IdentityFile(path)
    loaded = again.load()
    assert loaded and loaded.node_id == identity.node_id
    again.close()
    os.chmod(path, 0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        IdentityFile(path).load()
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(IdentityError, match="not an Ed25519 key"):
        IdentityFile(path).load()
    assert make_identity().node_id != make_identity().node_id
