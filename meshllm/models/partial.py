"""Files that have not arrived completely: one process at a time writes one, and only if the disk has room."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from meshllm.errors import ModelError
from meshllm.paths import models_folder
from meshllm.units import in_gb

SPARE_BYTES = 1 << 28  # left free, so that a download does not fill the disk


@contextlib.contextmanager
def locked(path: Path) -> Iterator[BinaryIO]:
    """The file, open for appending. Raises BlockingIOError while another process has it."""
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file


def need_space(n_bytes: int, name: str) -> None:
    """Checks that `n_bytes` more fit into the models folder. Raises ModelError."""
    folder = models_folder()
    free = shutil.disk_usage(folder).free
    if n_bytes + SPARE_BYTES > free:
        raise ModelError(
            f"{name} needs another {in_gb(n_bytes)} in {folder}, which has {in_gb(free)} free; "
            "make space, or set MESH_LLM_MODELS to another folder"
        )
