"""Limits of cgroups, as the kernel shows them in files."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from meshllm.node import machine

GB = 10**9


def group(folder: Path, limit: str, used: int = 0, files: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - files}\ninactive_file {files}\nactive_file 0\n")


def test_the_tightest_group_counts_and_files_do_not(tmp_path: Path) -> None:
    group(tmp_path / "a/b", "max", 3 * GB)
    assert min(machine.left_by_cgroups(tmp_path, "a/b")) > 1000 * GB
    group(tmp_path / "a", str(8 * GB), 5 * GB, files=2 * GB)
    assert min(machine.left_by_cgroups(tmp_path, "a/b")) == 5 * GB
    group(tmp_path / "a/b", str(4 * GB), 3 * GB)
    assert min(machine.left_by_cgroups(tmp_path, "a/b")) == GB
    assert min(machine.left_by_cgroups(tmp_path, "c")) > 1000 * GB  # no such group
    assert min(machine.left_by_cgroups(tmp_path, "../..")) > 1000 * GB  # of another namespace


def test_no_more_than_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < machine.available_ram() <= psutil.virtual_memory().total
    monkeypatch.setattr(machine, "left_by_cgroups", lambda *_args: [-GB])
    assert machine.available_ram() == 0
