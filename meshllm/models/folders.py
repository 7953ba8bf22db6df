"""The folders that hold models, and the models in them by name. Opens no file and needs no compiled code."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from meshllm.models.catalog import CATALOG
from meshllm.models.names import is_projector
from meshllm.paths import hub_cache, models_folder, partial_folder

PART = re.compile(r"-(\d{5})-of-\d{5}(?=$|\.gguf$)")  # in the file names of a split model
_STALE_S = 14 * 86400.0


def tidy() -> None:
    """Removes partial files that nobody has resumed for two weeks."""
    for path in partial_folder().glob("*"):
        with contextlib.suppress(OSError):
            newest = max([path, *path.glob("*")], key=lambda p: p.stat().st_mtime)
            if time.time() - newest.stat().st_mtime > _STALE_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_models() -> dict[str, Path]:
    """Name to (first) file of every model on disk, the default model last."""
    found: dict[str, Path] = {}
    for path in _model_files():
        part = PART.search(path.stem)
        if (part is None or part[1] == "00001") and not is_projector(path.name):
            found.setdefault(PART.sub("", path.stem), path)
    return found


def _model_files() -> Iterator[Path]:
    for folder in (models_folder(), hub_cache()):
        for path in sorted(folder.rglob("*.gguf")):
            if not any(part.startswith(".") for part in path.relative_to(folder).parts):
                yield path
    if default := default_file():
        yield default


def default_file() -> Path | None:
    """The default model's file, if the package that carries it is installed."""
    entry = CATALOG.default
    spec = importlib.util.find_spec(Path(entry.files[0]).parts[0])
    for folder in (spec.submodule_search_locations if spec else None) or ():
        path = Path(folder).parent / entry.files[0]
        if path.is_file():
            return path
    return None
