"""The folders of a user, and those of a process that was killed."""

from __future__ import annotations

import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshllm import paths
from meshllm.errors import IdentityError
from meshllm.units import socket_id


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


def test_the_hubs_cache_is_where_the_hub_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert paths.hub_cache() == Path.home() / ".cache/huggingface/hub"
    for name, expected in (("XDG_CACHE_HOME", "/x/huggingface/hub"), ("HF_HOME", "/x/hub"), ("HF_HUB_CACHE", "/x")):
        monkeypatch.setenv(name, "/x")
        assert paths.hub_cache() == Path(expected)


def test_data_is_for_this_user_only(tmp_path: Path) -> None:
    control = paths.control_socket(9337)
    assert control.name == "9337.sock"
    for folder in (paths.data_folder(), control.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_file_in_the_folders_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    with pytest.raises(IdentityError, match="cannot create"):
        paths.data_folder()


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short one, which pytest's is not."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def test_sockets_of_a_private_folder_can_be_bound(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for length, follows in ((40, True), (50, True), (51, False), (200, False)):
        folder = temporary / ("x" * (length - len(str(temporary)) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        mine = paths.private_folder()
        try:
            assert mine.is_relative_to(folder) == follows
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(mine / f"peer-{socket_id('0123456789abcdef' * 4)}.sock"))
        finally:
            shutil.rmtree(mine)


def test_folders_of_the_dead_are_removed(temporary: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    mine = paths.private_folder()
    dead = temporary / f"mesh-llm-{ended.pid}-x"
    odd = temporary / "mesh-llm-0x5-x"
    for folder in (dead, odd):
        folder.mkdir()
    paths.remove_stale_folders()
    assert mine.exists() and odd.exists() and not dead.exists()
