"""A model that comes in pieces, from anywhere and in any order: what is missing, what is right, when it is whole.

Pieces are at most `PIECE_BYTES` of one file, counted through the files in order. What lies in the partial folder from
an earlier time is of use: a piece is there when its SHA-256 is the one that was told.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from meshllm import rpc
from meshllm.errors import ModelError, ProtocolError
from meshllm.paths import models_folder, partial_folder
from meshllm.units import in_gb

PIECE_BYTES = 4 << 20
_FILE_NAME = re.compile(r"[\w+-][\w.+-]{0,200}\.gguf")
_SPARE_BYTES = 1 << 28  # a disk is not filled to its last byte


@dataclass(frozen=True)
class Piece:
    file: int
    offset: int
    size: int


@dataclass(frozen=True)
class Layout:
    """`files`: name and size in bytes of each, in order."""

    files: tuple[tuple[str, int], ...]

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self.files)

    @property
    def n_pieces(self) -> int:
        return sum(-(-size // PIECE_BYTES) for _, size in self.files)

    def piece(self, number: int) -> Piece:
        """Raises ProtocolError for a number that there is not."""
        if number >= 0:
            for file, (_, size) in enumerate(self.files):
                count = -(-size // PIECE_BYTES)
                if number < count:
                    offset = number * PIECE_BYTES
                    return Piece(file, offset, min(PIECE_BYTES, size - offset))
                number -= count
        raise ProtocolError("the model has no such piece")

    def encode(self) -> list[list[object]]:
        return [[name, size] for name, size in self.files]


def decode_layout(value: object, size_bytes: int) -> Layout:
    """Raises ProtocolError unless it is the layout of a model of that size. Names are plain names of GGUF files."""
    try:
        files = tuple((str(name), size) for name, size in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ProtocolError("malformed list of files") from None
    good = all(_FILE_NAME.fullmatch(name) and type(size) is int and size > 0 for name, size in files)
    if not good or len({name for name, _ in files}) != len(files) or sum(size for _, size in files) != size_bytes:
        raise ProtocolError("a list of files that does not fit the model")
    return Layout(files)


def layout_of(files: Sequence[str], sizes: Sequence[int]) -> Layout:
    """Under names that any disk takes."""
    names = [re.sub(r"[^\w.+-]", "_", Path(path).name).lstrip(".") for path in files]
    return Layout(tuple(zip(names, sizes, strict=True)))


def read_piece(files: Sequence[str], piece: Piece) -> bytes:
    """Raises OSError. Shorter than the piece where the file is."""
    with open(files[piece.file], "rb", buffering=0) as file:
        return os.pread(file.fileno(), piece.size, piece.offset)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digests(files: Sequence[str], pieces: Sequence[Piece]) -> list[str]:
    return [digest(read_piece(files, piece)) for piece in pieces]


class Assembly:
    """The partial files of one model; for one process at a time. Use as `with`. Raises OSError where the disk does."""

    def __init__(self, fingerprint: str, layout: Layout) -> None:
        self._fingerprint = fingerprint
        self._layout = layout
        self._folder = partial_folder() / fingerprint[:32]
        self._fds: list[int] = []
        self._open = threading.Lock()  # a write in a thread that nobody waits for any more finds its file open, or none

    def __enter__(self) -> Assembly:
        """Raises ModelError when there is no space, BlockingIOError when another process has it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._need_space()
            for name, size in self._layout.files:
                self._fds.append(os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o644))
                os.ftruncate(self._fds[-1], size)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        with self._open:
            for fd in (*self._fds, self._lock):
                os.close(fd)
            self._fds.clear()

    def _need_space(self) -> None:
        here = sum(path.stat().st_blocks * 512 for path in self._folder.iterdir())
        needed = self._layout.size_bytes - here + _SPARE_BYTES
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise ModelError(
                f"no space for {self._layout.files[0][0]} in {models_folder()}: {in_gb(needed)} needed, "
                f"{in_gb(free)} free"
            )

    def has(self, number: int, sha256: str) -> bool:
        piece = self._layout.piece(number)
        with self._open:
            data = os.pread(self._fds[piece.file], piece.size, piece.offset) if self._fds else b""
        return digest(data) == sha256

    def write(self, number: int, data: bytes) -> None:
        piece = self._layout.piece(number)
        done = 0
        with self._open:
            while self._fds and done < piece.size:
                done += os.pwrite(self._fds[piece.file], data[done : piece.size], piece.offset + done)

    def finish(self) -> list[Path]:
        """Gives the files their names. Raises ModelError when all pieces are right and the model is another."""
        for fd in self._fds:
            os.fsync(fd)
        paths = [self._folder / name for name, _ in self._layout.files]
        if rpc.fingerprint([str(path) for path in paths]).hex() != self._fingerprint:
            for path in paths:
                path.unlink()
            raise ModelError(f"what came is not {paths[0].name}: it was removed")
        final = [self._final(path.name) for path in paths]
        for path, target in zip(paths, final, strict=True):
            os.replace(path, target)
        with contextlib.suppress(OSError):
            shutil.rmtree(self._folder)
        return final

    def _final(self, name: str) -> Path:
        """Not the name of another model's file; the parts of one model keep what tells them apart at the end."""
        taken = any((models_folder() / other).exists() for other, _ in self._layout.files)
        return models_folder() / (f"{self._fingerprint[:8]}-{name}" if taken else name)
