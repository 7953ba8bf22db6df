"""Evidence that two machines have the same model, without reading all of it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import orjson

from meshllm.errors import GgufError
from meshllm.paths import cache_folder
from meshllm.rpc._native import read_gguf
from meshllm.rpc.types import TensorInfo

_DOMAIN = b"mesh-llm gguf fingerprint 1\0"
_SAMPLE = 4096  # bytes, at the beginning, in the middle and at the end of a tensor's data
_CACHE_ENTRIES = 1000  # the newest are kept; each takes about 200 bytes


def fingerprint(files: Sequence[str]) -> bytes:
    """32 bytes that tell whether two machines have the same model. `files` are all its parts, in order.

    SHA-256 over, for each file in order, its size (8 bytes, little-endian) and all bytes before the tensor
    data (metadata and tensor infos); then, for every tensor ordered by name, 4 KiB each at the beginning, in
    the middle and at the end of its data, or all of it if it is no longer than that. File names and times do
    not matter.

    Another model, quantisation or version of the weights has another fingerprint, and so has a truncated file.
    Bytes between the samples are not read, so it proves neither that a file is intact nor that nobody has
    altered it.

    Cached by the files' paths, sizes, times and inodes. Raises GgufError if a file cannot be read.
    """
    try:
        key = _cache_key(files)
        cached = _load_cache().get(key)
        if cached is not None:
            return bytes.fromhex(cached)
        result = _compute(files)
    except OSError as error:
        raise GgufError(f"cannot read {error.filename or ', '.join(files)}: {error.strerror}") from error
    _store_cache(key, result.hex())
    return result


def _compute(files: Sequence[str]) -> bytes:
    info = read_gguf(files)
    digest = hashlib.sha256(_DOMAIN)
    with contextlib.ExitStack() as stack:
        fds = [stack.enter_context(open(path, "rb", buffering=0)).fileno() for path in files]
        for path, fd, data_offset, size in zip(files, fds, info.data_offsets, info.sizes, strict=True):
            digest.update(size.to_bytes(8, "little"))
            digest.update(_read(path, fd, 0, data_offset))
        for tensor in sorted(info.tensors, key=lambda t: t.name):
            for start, size in _samples(tensor):
                digest.update(_read(files[tensor.file], fds[tensor.file], start, size))
    return digest.digest()


def _samples(tensor: TensorInfo) -> list[tuple[int, int]]:
    """(offset in the file, size) of each sample, in bytes."""
    if tensor.size <= 3 * _SAMPLE:
        return [(tensor.offset, tensor.size)]
    rest = tensor.size - _SAMPLE
    return [(tensor.offset + start, _SAMPLE) for start in (0, rest // 2, rest)]


def _read(path: str, fd: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0:
        part = os.pread(fd, size, offset)
        if not part:
            raise GgufError(f"{path} became shorter while it was being read; try again once nothing writes to it")
        parts.append(part)
        offset += len(part)
        size -= len(part)
    return b"".join(parts)


def _cache_path() -> Path:
    return cache_folder() / "fingerprints.json"


def _cache_key(files: Sequence[str]) -> str:
    # repr, since JSON cannot hold file names that are not UTF-8
    stats = [(os.path.realpath(path), os.stat(path)) for path in files]
    return repr((_DOMAIN, [(path, s.st_size, s.st_mtime_ns, s.st_ino) for path, s in stats]))


def _load_cache() -> dict[str, str]:
    """Broken or unreadable entries are left out."""
    try:
        content = orjson.loads(_cache_path().read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {k: v for k, v in content.items() if isinstance(v, str) and _is_digest(v)}


def _is_digest(text: str) -> bool:
    try:
        return len(bytes.fromhex(text)) == hashlib.sha256().digest_size
    except ValueError:
        return False


def _store_cache(key: str, value: str) -> None:
    """Replaces the file as a whole. An entry that another process adds at the same time may get lost."""
    path = _cache_path()
    entries = list((_load_cache() | {key: value}).items())[-_CACHE_ENTRIES:]
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(orjson.dumps(dict(entries)))
                file.flush()
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
