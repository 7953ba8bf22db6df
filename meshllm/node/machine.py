"""How much of this machine's RAM a model may take now."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def available_ram() -> int:
    """Bytes: what the kernel could free for a new program, and what the cgroups of this process leave of it."""
    return max(0, min(int(psutil.virtual_memory().available), *left_by_cgroups(Path("/sys/fs/cgroup"), _cgroup())))


def _cgroup() -> str:
    """Of version 2, as containers and systemd have it; "" elsewhere."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")


def left_by_cgroups(root: Path, path: str) -> Iterator[int]:
    """Of the group and of those around it; pages of files can be freed. https://docs.kernel.org/admin-guide/cgroup-v2"""
    group = root / path
    yield 1 << 60
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        try:
            limit = int((folder / "memory.max").read_text())
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue  # no limit ("max"), or no such group
        yield limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
