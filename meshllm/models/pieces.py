"""A model that arrives in pieces, in any order: which are missing, whether they are right, when it is complete.

A piece is up to `PIECE_BYTES` of one file; pieces are numbered through all files in order. Files in the partial folder
from an earlier attempt are reused: a piece is present if its SHA-256 is right.
"""

from __future__ import annotations

import contextlib
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
from meshllm.models.partial import locked, need_space
from meshllm.paths import models_folder, partial_folder

PIECE_BYTES = 4 << 20
_FILE_NAME = re.compile(r"[\w+-][\w.+-]{0,200}\.gguf")


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
        """Raises ProtocolError if there is no piece of that number."""
        if number >= 0:
            for file, (_, size) in enumerate(self.files):
                count = -(-size // PIECE_BYTES)
                if number < count:
                    offset = number * PIECE_BYTES
                    return Piece(file, offset, min(PIECE_BYTES, size - offset))
                number -= count
        raise ProtocolError("the model has no such piece")

    def renamed(self, name: str) -> Layout:
        """With another name for its only file. Raises ProtocolError if it has several."""
        if len(self.files) != 1:
            raise ProtocolError("a projector of several files")
        return Layout(((name, self.size_bytes),))

    def encode(self) -> list[list[object]]:
        return [[name, size] for name, size in self.files]


def decode_layout(value: object, size_bytes: int) -> Layout:
    """Raises ProtocolError unless `value` is the layout of a model of that size, with plain names of GGUF files."""
    try:
        files = tuple((str(name), size) for name, size in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise ProtocolError("malformed list of files") from None
    good = all(_FILE_NAME.fullmatch(name) and type(size) is int and size > 0 for name, size in files)
    if not good or len({name for name, _ in files}) != len(files) or sum(size for _, size in files) != size_bytes:
        raise ProtocolError("a list of files that does not fit the model")
    return Layout(files)


def layout_of(files: Sequence[str], sizes: Sequence[int]) -> Layout:
    """The layout of these files, under names that every file system takes."""
    names = [re.sub(r"[^\w.+-]", "_", Path(path).name).lstrip(".") for path in files]
    return Layout(tuple(zip(names, sizes, strict=True)))


def read_piece(files: Sequence[str], piece: Piece) -> bytes:
    """Shorter than the piece if the file is. Raises OSError."""
    with open(files[piece.file], "rb", buffering=0) as file:
        return os.pread(file.fileno(), piece.size, piece.offset)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digests(files: Sequence[str], pieces: Sequence[Piece]) -> list[str]:
    return [digest(read_piece(files, piece)) for piece in pieces]


class Assembly:
    """The partial files of one model, for one process at a time. Use as `with`. Methods raise OSError."""

    def __init__(self, fingerprint: str, layout: Layout) -> None:
        self._fingerprint = fingerprint
        self._layout = layout
        self._folder = partial_folder() / fingerprint[:32]
        self._fds: list[int] = []
        self._stack = contextlib.ExitStack()
        self._open = threading.Lock()  # a thread that outlives the block finds its file either open or gone

    def __enter__(self) -> Assembly:
        """Raises ModelError if there is no space, BlockingIOError while another process has the model."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._stack.enter_context(locked(self._folder / "lock"))
            here = sum(path.stat().st_blocks * 512 for path in self._folder.iterdir())
            need_space(self._layout.size_bytes - here, self._layout.files[0][0])
            for name, size in self._layout.files:
                self._fds.append(os.open(self._folder / name, os.O_RDWR | os.O_CREAT, 0o644))
                os.ftruncate(self._fds[-1], size)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        with self._open:
            for fd in self._fds:
                os.close(fd)
            self._fds.clear()
            self._stack.close()

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
        """Moves the complete files into the models folder. Raises ModelError if their fingerprint is another."""
        for fd in self._fds:
            os.fsync(fd)
        paths = [self._folder / name for name, _ in self._layout.files]
        if rpc.fingerprint([str(path) for path in paths]).hex() != self._fingerprint:
            for path in paths:
                path.unlink()
            raise ModelError(f"the copy of {paths[0].name} that arrived failed its check and was removed")
        final = [self._final(path.name) for path in paths]
        for path, target in zip(paths, final, strict=True):
            os.replace(path, target)
        with contextlib.suppress(OSError):
            shutil.rmtree(self._folder)
        return final

    def _final(self, name: str) -> Path:
        """Avoids the names of other models' files. The prefix leaves the part numbers at the end alone."""
        taken = any((models_folder() / other).exists() for other, _ in self._layout.files)
        return models_folder() / (f"{self._fingerprint[:8]}-{name}" if taken else name)
