"""Proof that two machines have the same model, without reading all of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orjson
import platformdirs

from meshllm.errors import GgufError
from meshllm.rpc._native import read_gguf

_DOMAIN = b"mesh-llm gguf fingerprint 1\0"
_SAMPLE = 4096  # bytes, at the beginning, in the middle and at the end of each tensor


def fingerprint(files: Sequence[str]) -> bytes:
    """32 bytes that are equal for two models exactly when what is compared is equal.

    SHA-256 over, for each file in order, its size and all bytes before the tensor data (all metadata and all tensor
    infos), then for every tensor in the order of names samples of 4 KiB at the beginning, in the middle and at the
    end of its data. Paths and times do not matter. Another quantisation, another version of the weights or a truncated
    download gives another fingerprint; a file that somebody altered on purpose between the samples does not.

    Cached by path, size, time and inode of the files. Raises GgufError when a file cannot be read.
    """
    try:
        key = _cache_key(files)
        cached = _load_cache().get(key)
        if cached is not None:
            return bytes.fromhex(cached)
        result = _compute(files)
    except OSError as error:
        raise GgufError(f"cannot read {error.filename}: {error.strerror}") from error
    _store_cache(key, result.hex())
    return result


def _compute(files: Sequence[str]) -> bytes:
    info = read_gguf(files)
    digest = hashlib.sha256(_DOMAIN)
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(open(path, "rb", buffering=0)) for path in files]
        for handle, data_offset, size in zip(handles, info.data_offsets, info.sizes, strict=True):
            digest.update(size.to_bytes(8, "little"))
            digest.update(_read(handle.fileno(), 0, min(data_offset, size)))
        for tensor in sorted(info.tensors, key=lambda t: t.name):
            n = min(_SAMPLE, tensor.size)
            for start in (0, (tensor.size - n) // 2, tensor.size - n):
                digest.update(_read(handles[tensor.file].fileno(), tensor.offset + start, n))
    return digest.digest()


def _read(fd: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(fd, size, offset)
        if not part:
            raise GgufError("a model file became shorter while it was read")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def _cache_path() -> Path:
    return platformdirs.user_cache_path("mesh-llm") / "fingerprints.json"


def _cache_key(files: Sequence[str]) -> str:
    stats = [(os.path.realpath(path), os.stat(path)) for path in files]
    return "|".join(f"{path}:{s.st_size}:{s.st_mtime_ns}:{s.st_ino}" for path, s in stats)


def _load_cache() -> dict[str, str]:
    """What is broken or unreadable counts as empty."""
    try:
        content = orjson.loads(_cache_path().read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, str) and len(v) == 64 and _is_hex(v)}


def _is_hex(text: str) -> bool:
    with contextlib.suppress(ValueError):
        bytes.fromhex(text)
        return True
    return False


def _store_cache(key: str, value: str) -> None:
    path = _cache_path()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(orjson.dumps(_load_cache() | {key: value}))
        os.replace(file.name, path)
