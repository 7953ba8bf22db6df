"""What a node remembers of the meshes that it was in."""

from __future__ import annotations

import stat
from pathlib import Path

from meshllm.mesh.known_meshes import KnownMesh, KnownMeshes

MESH, SECRET, NODE = "ab" * 16, b"s" * 16, "cd" * 32


def test_state_is_remembered_and_garbage_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "mesh.json"
    state = KnownMeshes(path)
    state.own = MESH
    state.meshes[MESH] = KnownMesh(SECRET, [("10.0.0.1:1", NODE)], ["12" * 16])
    state.save()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KnownMeshes(path).meshes == state.meshes and KnownMeshes(path).own == MESH
    for content in (b"", b"[]", b'{"meshes": {"a": {"secret": "zz"}}}', b'{"meshes": []}'):
        path.write_bytes(content)
        assert KnownMeshes(path).own is None
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.json"]
