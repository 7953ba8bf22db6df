"""Folders of this user's: models, data, caches, and what a process keeps while it runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import platformdirs

from meshllm.errors import IdentityError

_PREFIX = "mesh-llm-"  # of folders that live as long as a process
_LONGEST_SOCKET = 103  # bytes of a Unix socket's path on macOS, less its zero; 107 on Linux
_LONGEST_NAME = len("/mesh-llm-4194304-abcdefgh/peer-0123456789abcdef.sock")  # of a socket in a private folder


def models_folder() -> Path:
    return Path(os.environ.get("MESH_LLM_MODELS") or Path.home() / ".models")


def partial_folder() -> Path:
    """For what is not whole yet; hidden, so that no scan finds it."""
    return models_folder() / ".partial"


def hub_cache() -> Path:
    """As huggingface_hub has it, which takes longer to import than this to read."""
    environment = os.environ
    if cache := environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE"):
        return Path(cache).expanduser()
    home = environment.get("HF_HOME") or Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "hub"


def data_folder() -> Path:
    """Made on demand, for nobody else to read. Raises IdentityError."""
    folder = platformdirs.user_data_path("mesh-llm")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise IdentityError(
            f"cannot create {folder}: {error.strerror}; give another place for the key file with --identity"
        ) from error
    return folder


def cache_folder() -> Path:
    """Made by whoever writes into it."""
    return platformdirs.user_cache_path("mesh-llm")


def control_socket(port: int) -> Path:
    """Where the node behind this API port answers to its user."""
    folder = data_folder() / "run"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{port}.sock"


def private_folder() -> Path:
    """A new one for this process, which removes it; `remove_stale_folders` does when the process was killed."""
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_folder_for_sockets()))


def _folder_for_sockets() -> Path:
    """The user's TMPDIR unless it is too long; such are the runners' of CI and of batch systems."""
    folder = Path(tempfile.gettempdir())
    return folder if len(os.fsencode(folder)) + _LONGEST_NAME <= _LONGEST_SOCKET else Path("/tmp")


def remove_stale_folders() -> None:
    """Removes folders left by a killed mesh-llm."""
    for folder in _folder_for_sockets().glob(f"{_PREFIX}[0-9]*-*"):
        pid = folder.name.removeprefix(_PREFIX).split("-")[0]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(folder, ignore_errors=True)
        except (ValueError, PermissionError):
            continue
