"""Models from peers: pieces asked for over transfer streams, from several peers at once, each checked.

A question is 4 bytes of length, big-endian, and JSON: {"op": "layout" | "hashes" | "piece", "model": fingerprint,
"first": number}. The answer is framed in the same way: {"files": [[name, size], ...]}, {"hashes": [SHA-256, ...]} of
`BATCH` pieces from `first` on, or {"size": n} with n bytes behind it; or {"error": text}. One peer is the measure: its
digests decide which pieces are right; in the end the fingerprint of the whole must be the one that was asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import orjson

from meshllm.errors import MeshLlmError, ModelError, ProtocolError, TransportError
from meshllm.mesh.announcement import ModelInfo
from meshllm.models.pieces import (
    PIECE_BYTES,
    Assembly,
    Layout,
    Piece,
    decode_layout,
    digest,
    digests,
    layout_of,
    read_piece,
)
from meshllm.models.store import Model
from meshllm.quic.framing import read_exactly, read_framed, write_framed
from meshllm.quic.transport import Stream
from meshllm.units import short_id

BATCH = 4
MAX_PEERS = 4
_MAX_MESSAGE = 1 << 16
_PART = 1 << 18
_AHEAD = 2  # pieces asked for before the first has come
_RETRY_S = 1.0
_GIVE_UP_S = 30.0  # without a peer that answers
_MAX_BAD = 3  # pieces of one peer


# --- the side that has the model ---


class Sharing:
    """`models` by fingerprint in hexadecimal, as of now."""

    def __init__(self, models: Callable[[], Mapping[str, Model]]) -> None:
        self._models = models
        self._hashing = asyncio.Semaphore(1)  # peers' questions do not take all of the machine

    async def serve(self, stream: Stream) -> None:
        """Answers one peer's questions until it has no more."""
        try:
            while (raw := await read_framed(stream, _MAX_MESSAGE)) is not None:
                try:
                    question = orjson.loads(raw)
                    model = self._models()[question["model"]]
                    head, piece = await self._answer(question, model)
                except (KeyError, TypeError, ValueError, OSError, ProtocolError) as error:
                    await write_framed(stream, orjson.dumps({"error": str(error)[:200]}))
                    continue
                await write_framed(stream, orjson.dumps(head))
                if piece:
                    await _send_piece(stream, model, piece)
            stream.finish()
        finally:
            stream.abort()

    async def _answer(self, question: dict[str, Any], model: Model) -> tuple[dict[str, object], Piece | None]:
        layout = layout_of(model.files, model.info.sizes)
        if question["op"] == "layout":
            return {"files": layout.encode()}, None
        first = question["first"]
        if type(first) is not int:
            raise ValueError("no number")
        if question["op"] == "hashes":
            pieces = [layout.piece(number) for number in range(first, min(first + BATCH, layout.n_pieces))]
            async with self._hashing:
                return {"hashes": await asyncio.to_thread(digests, model.files, pieces)}, None
        if question["op"] == "piece":
            piece = layout.piece(first)
            return {"size": piece.size}, piece
        raise ValueError("no such question")


async def _send_piece(stream: Stream, model: Model, piece: Piece) -> None:
    """In parts, so that a peer which reads slowly costs little memory."""
    for offset in range(0, piece.size, _PART):
        part = Piece(piece.file, piece.offset + offset, min(_PART, piece.size - offset))
        data = await asyncio.to_thread(read_piece, model.files, part)
        if len(data) != part.size:
            raise TransportError("the file has changed")
        await stream.write(data)


# --- the side that gets it ---


class _Peer:
    """Questions to one peer, one after another."""

    def __init__(self, node_id: str, fingerprint: str, stream: Stream) -> None:
        self.node_id = node_id
        self._fingerprint = fingerprint
        self._stream = stream
        self._turn = asyncio.Lock()

    async def ask(self, op: str, first: int = 0) -> Any:
        async with self._turn:
            await self._send(op, first)
            return await self._head()

    async def pieces(self, numbers: Sequence[int]) -> list[bytes]:
        async with self._turn:
            found = []
            for i, number in enumerate(numbers):
                if i == 0:
                    for ahead in numbers[:_AHEAD]:
                        await self._send("piece", ahead)
                elif i + _AHEAD - 1 < len(numbers):
                    await self._send("piece", numbers[i + _AHEAD - 1])
                found.append(await self._body(await self._head(), number))
            return found

    async def _send(self, op: str, first: int) -> None:
        await write_framed(self._stream, orjson.dumps({"op": op, "model": self._fingerprint, "first": first}))

    async def _head(self) -> Any:
        raw = await read_framed(self._stream, _MAX_MESSAGE)
        try:
            head = orjson.loads(raw or b"")
            if "error" in head:
                raise ProtocolError(f"the peer says: {str(head['error'])[:200]}")
            return head
        except (ValueError, TypeError):
            raise ProtocolError("malformed answer") from None

    async def _body(self, head: Any, number: int) -> bytes:
        size = head.get("size")
        if type(size) is not int or not 0 <= size <= PIECE_BYTES:
            raise ProtocolError(f"piece {number} has no size")
        data = await read_exactly(self._stream, size)
        if data is None:
            raise TransportError("the stream ended")
        return data

    def close(self) -> None:
        self._stream.abort()


class Fetch:
    """One model on its way. `owners` tells who has it now, nearest first; `open_stream` opens one to a peer."""

    def __init__(
        self,
        model: ModelInfo,
        owners: Callable[[], Sequence[str]],
        open_stream: Callable[[str], Awaitable[Stream]],
        progress: Callable[[int, int], None],
    ) -> None:
        self._model = model
        self._owners, self._open, self._progress = owners, open_stream, progress
        self._peers: dict[str, _Peer] = {}
        self._measure: _Peer | None = None
        self._bad: dict[str, int] = {}  # what a peer did wrong, since the last try
        self._done_bytes = 0

    async def run(self) -> None:
        """Until the model is in `~/.models`. Raises ModelError, or TransportError when nobody can give it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _GIVE_UP_S
        why = "nobody near has it"
        try:
            while loop.time() < deadline:
                before = self._done_bytes
                try:
                    layout = decode_layout((await self._measured("layout"))["files"], self._model.size_bytes)
                    with Assembly(self._model.fingerprint, layout) as assembly:
                        await self._gather(assembly, layout)
                        await asyncio.to_thread(assembly.finish)
                    return
                except BlockingIOError:  # another node on this machine gets it
                    deadline = loop.time() + _GIVE_UP_S
                except OSError as error:
                    raise ModelError(f"cannot keep {self._model.name}: {error.strerror}") from None
                except (TransportError, ProtocolError, KeyError, TypeError) as error:
                    why = str(error)
                if self._done_bytes > before:
                    deadline = loop.time() + _GIVE_UP_S
                self._drop_all()
                await asyncio.sleep(_RETRY_S)
        finally:
            self._drop_all()
        raise TransportError(f"{self._model.name} cannot be had from the mesh: {why}")

    async def _measured(self, op: str, first: int = 0) -> Any:
        """What the peer says whose digests count: the nearest that can be reached, over a stream of its own."""
        last: MeshLlmError = TransportError("nobody who has it can be reached")
        while self._measure or self._usable():
            measure = self._measure
            node_id = measure.node_id if measure else self._usable()[0]
            try:
                if measure is None:
                    stream = await self._open(node_id)
                    if self._measure is None:  # nobody else was faster
                        self._measure = _Peer(node_id, self._model.fingerprint, stream)
                    else:
                        stream.abort()
                    continue
                return await measure.ask(op, first)
            except (TransportError, ProtocolError) as error:
                last = error
                self._bad[node_id] = self._bad.get(node_id, 0) + 1
                if measure:
                    measure.close()
                if self._measure is measure:
                    self._measure = None
        raise last

    def _usable(self) -> list[str]:
        return [i for i in self._owners() if self._bad.get(i, 0) < _MAX_BAD][:MAX_PEERS]

    async def _peer(self, node_id: str) -> _Peer | None:
        if node_id not in self._peers:
            try:
                self._peers[node_id] = _Peer(node_id, self._model.fingerprint, await self._open(node_id))
            except MeshLlmError:
                return None
        return self._peers[node_id]

    def _drop(self, node_id: str) -> None:
        if peer := self._peers.pop(node_id, None):
            peer.close()

    def _drop_all(self) -> None:
        for node_id in list(self._peers):
            self._drop(node_id)
        if self._measure:
            self._measure.close()
        self._measure = None
        self._bad.clear()

    async def _gather(self, assembly: Assembly, layout: Layout) -> None:
        """Every batch by whoever is free. A peer that fails gives its batch back and gets no other in this try."""
        waiting = list(range(0, layout.n_pieces, BATCH))[::-1]
        self._done_bytes = 0
        failed: list[MeshLlmError] = []

        async def work(node_id: str) -> None:
            while waiting:
                first = waiting.pop()
                try:
                    await self._batch(assembly, layout, node_id, first)
                except (TransportError, ProtocolError, KeyError, TypeError) as error:
                    waiting.append(first)
                    failed.append(TransportError(str(error)))
                    self._drop(node_id)
                    return

        working: dict[str, asyncio.Task[None]] = {}
        try:
            while True:
                for node_id in self._usable():
                    if node_id not in working and waiting and await self._peer(node_id):
                        working[node_id] = asyncio.create_task(work(node_id), name=f"pieces of {short_id(node_id)}")
                busy = {task for task in working.values() if not task.done()}
                if not busy:
                    break
                await asyncio.wait(busy, timeout=_RETRY_S, return_when=asyncio.FIRST_COMPLETED)
                for task in working.values():
                    if task.done():
                        task.result()
        finally:
            for task in working.values():
                task.cancel()
            await asyncio.gather(*working.values(), return_exceptions=True)
        if waiting:
            raise failed[-1] if failed else TransportError("nobody who has it can be reached")

    async def _batch(self, assembly: Assembly, layout: Layout, node_id: str, first: int) -> None:
        numbers = range(first, min(first + BATCH, layout.n_pieces))
        hashes = (await self._measured("hashes", first))["hashes"]
        if not isinstance(hashes, list) or len(hashes) != len(numbers):
            raise ProtocolError("digests that do not fit")
        right = dict(zip(numbers, map(str, hashes), strict=True))
        missing = [n for n in numbers if not await asyncio.to_thread(assembly.has, n, right[n])]
        if missing:
            peer = await self._peer(node_id)
            if peer is None:
                raise TransportError("the peer cannot be reached")
            for number, data in zip(missing, await peer.pieces(missing), strict=True):
                await self._keep(assembly, node_id, number, data, right[number])
        self._done_bytes += sum(layout.piece(n).size for n in numbers)
        self._progress(self._done_bytes, layout.size_bytes)

    async def _keep(self, assembly: Assembly, node_id: str, number: int, data: bytes, sha256: str) -> None:
        if await asyncio.to_thread(digest, data) != sha256:
            self._bad[node_id] = self._bad.get(node_id, 0) + 1
            raise ProtocolError(f"piece {number} came damaged")
        await asyncio.to_thread(assembly.write, number, data)
