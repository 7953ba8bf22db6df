"""Models and projectors from peers: pieces requested over transfer streams, from several peers at once, each checked.

A request is a framed message (quic/framing.py) of JSON: {"op": "layout" | "hashes" | "piece", "model": fingerprint,
"first": number}. So is the answer: {"files": [[name, size], ...]}, {"hashes": [SHA-256, ...]} of `BATCH` pieces from
`first` on, {"size": n} followed by n bytes, or {"error": text}. One peer is the reference, whose digests decide which
pieces are right; in the end the fingerprint of the whole must be the requested one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

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
from meshllm.quic.framing import read_exactly, read_framed, write_framed
from meshllm.quic.transport import Stream
from meshllm.units import short_id

BATCH = 4
MAX_PEERS = 4
_MAX_MESSAGE = 1 << 16
_CHUNK_BYTES = 1 << 18
_AHEAD = 2  # pieces requested at a time
_RETRY_S = 1.0
_GIVE_UP_S = 30.0  # without progress
_MAX_FAILURES = 3  # of one peer, per attempt


# --- the side that has the model ---


class Shared(Protocol):
    """A model, or a projector: the paths of its files in order, and their sizes in bytes."""

    @property
    def files(self) -> tuple[str, ...]: ...

    @property
    def sizes(self) -> tuple[int, ...]: ...


class Sharing:
    """Serves this node's models and projectors to peers. `models` returns them by fingerprint in hexadecimal."""

    def __init__(self, models: Callable[[], Mapping[str, Shared]]) -> None:
        self._models = models
        self._hashing = asyncio.Semaphore(1)  # so that peers cannot occupy all cores

    async def serve(self, stream: Stream) -> None:
        """Answers one peer's requests until it ends the stream."""
        try:
            while (raw := await read_framed(stream, _MAX_MESSAGE)) is not None:
                try:
                    request = orjson.loads(raw)
                    model = self._models()[request["model"]]
                    head, piece = await self._answer(request, model)
                except (KeyError, TypeError, ValueError, OSError, ProtocolError) as error:
                    await write_framed(stream, orjson.dumps({"error": str(error)[:200]}))
                    continue
                await write_framed(stream, orjson.dumps(head))
                if piece:
                    await _send_piece(stream, model, piece)
            stream.finish()
        finally:
            stream.abort()

    async def _answer(self, request: dict[str, Any], model: Shared) -> tuple[dict[str, object], Piece | None]:
        layout = layout_of(model.files, model.sizes)
        if request["op"] == "layout":
            return {"files": layout.encode()}, None
        first = request["first"]
        if type(first) is not int:
            raise ValueError("the number of a piece is missing")
        if request["op"] == "hashes":
            pieces = [layout.piece(number) for number in range(first, min(first + BATCH, layout.n_pieces))]
            async with self._hashing:
                return {"hashes": await asyncio.to_thread(digests, model.files, pieces)}, None
        if request["op"] == "piece":
            piece = layout.piece(first)
            return {"size": piece.size}, piece
        raise ValueError("unknown operation")


async def _send_piece(stream: Stream, model: Shared, piece: Piece) -> None:
    """In chunks, so that a slow reader costs little memory."""
    for offset in range(0, piece.size, _CHUNK_BYTES):
        part = Piece(piece.file, piece.offset + offset, min(_CHUNK_BYTES, piece.size - offset))
        data = await asyncio.to_thread(read_piece, model.files, part)
        if len(data) != part.size:
            raise TransportError("the file has changed")
        await stream.write(data)


# --- the side that fetches it ---


class _Peer:
    """Requests to one peer, one after another."""

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
                raise ProtocolError(f"the peer answered: {str(head['error'])[:200]}")
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
    """Fetches one model, or a projector. `owners` returns the peers that have it now, nearest first.

    `file_name`: what its only file is called here, rather than as the peer calls it.
    """

    def __init__(
        self,
        model: ModelInfo,
        owners: Callable[[], Sequence[str]],
        open_stream: Callable[[str], Awaitable[Stream]],
        progress: Callable[[int, int], None],
        file_name: str = "",
    ) -> None:
        self._model = model
        self._file_name = file_name
        self._owners, self._open, self._progress = owners, open_stream, progress
        self._peers: dict[str, _Peer] = {}
        self._reference: _Peer | None = None
        self._failures: dict[str, int] = {}  # by peer, in this attempt
        self._done_bytes = 0

    async def run(self) -> None:
        """Returns when the model is in `~/.models`. Raises ModelError, or TransportError if no peer provides it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _GIVE_UP_S
        why = "no peer nearby has it"
        try:
            while loop.time() < deadline:
                before = self._done_bytes
                try:
                    layout = decode_layout((await self._ask_reference("layout"))["files"], self._model.size_bytes)
                    if self._file_name:
                        layout = layout.renamed(self._file_name)
                    with Assembly(self._model.fingerprint, layout) as assembly:
                        await self._gather(assembly, layout)
                        await asyncio.to_thread(assembly.finish)
                    return
                except BlockingIOError:  # another node of this machine is fetching it
                    deadline = loop.time() + _GIVE_UP_S
                except OSError as error:
                    raise ModelError(f"cannot store {self._model.name}: {error.strerror}") from None
                except (TransportError, ProtocolError, KeyError, TypeError) as error:
                    why = str(error)
                if self._done_bytes > before:
                    deadline = loop.time() + _GIVE_UP_S
                self._drop_all()
                await asyncio.sleep(_RETRY_S)
        finally:
            self._drop_all()
        raise TransportError(f"cannot fetch {self._model.name} from the mesh: {why}")

    async def _ask_reference(self, op: str, first: int = 0) -> Any:
        """Asks the reference, the nearest peer that can be reached, over a stream of its own."""
        last: MeshLlmError = TransportError("no peer that has it can be reached")
        while self._reference or self._usable():
            reference = self._reference
            node_id = reference.node_id if reference else self._usable()[0]
            try:
                if reference is None:
                    stream = await self._open(node_id)
                    if self._reference is None:  # another task may have been faster
                        self._reference = _Peer(node_id, self._model.fingerprint, stream)
                    else:
                        stream.abort()
                    continue
                return await reference.ask(op, first)
            except (TransportError, ProtocolError) as error:
                last = error
                self._failures[node_id] = self._failures.get(node_id, 0) + 1
                if reference:
                    reference.close()
                if self._reference is reference:
                    self._reference = None
        raise last

    def _usable(self) -> list[str]:
        return [i for i in self._owners() if self._failures.get(i, 0) < _MAX_FAILURES][:MAX_PEERS]

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
        if self._reference:
            self._reference.close()
        self._reference = None
        self._failures.clear()

    async def _gather(self, assembly: Assembly, layout: Layout) -> None:
        """Gives batches to idle peers. A failing peer's batch goes to another, and it gets no more in this attempt."""
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
            raise failed[-1] if failed else TransportError("no peer that has it can be reached")

    async def _batch(self, assembly: Assembly, layout: Layout, node_id: str, first: int) -> None:
        numbers = range(first, min(first + BATCH, layout.n_pieces))
        hashes = (await self._ask_reference("hashes", first))["hashes"]
        if not isinstance(hashes, list) or len(hashes) != len(numbers):
            raise ProtocolError("the wrong number of digests")
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
            self._failures[node_id] = self._failures.get(node_id, 0) + 1
            raise ProtocolError(f"piece {number} arrived damaged")
        await asyncio.to_thread(assembly.write, number, data)
