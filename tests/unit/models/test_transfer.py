"""Models from peers, over streams in memory: whole, resumed, from several, and from peers that lie or die."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import adapters
from support.cut import rewrite
from support.processes import smollm2

from meshllm import rpc
from meshllm.errors import MeshLlmError, ModelError, ProtocolError, TransportError
from meshllm.mesh.announcement import ModelInfo
from meshllm.models import partial, pieces, transfer
from meshllm.models.store import Model, Projector, load_model
from meshllm.models.transfer import Fetch, Sharing
from meshllm.paths import partial_folder
from meshllm.quic.framing import read_framed, write_framed


class Pipe:
    """One side of a stream in memory; `break_after` bytes it fails."""

    def __init__(self) -> None:
        self._come: asyncio.Queue[bytes | None] = asyncio.Queue(64)
        self._rest = b""
        self.other: Pipe
        self.broken = False
        self.sent = 0
        self.break_after: int | None = None
        self.change: Callable[[bytes], bytes] = lambda data: data

    async def read(self, limit: int = 1 << 18) -> bytes:
        while not self._rest:
            if self.broken:
                raise TransportError("the link is gone")
            try:
                data = await asyncio.wait_for(self._come.get(), 0.05)
            except TimeoutError:
                continue
            if data is None:
                return b""
            self._rest = data
        data, self._rest = self._rest[:limit], self._rest[limit:]
        return data

    async def write(self, data: bytes) -> None:
        self.sent += len(data)
        if self.break_after is not None and self.sent > self.break_after:
            self.broken = self.other.broken = True
        if self.broken:
            raise TransportError("the link is gone")
        await self.other._come.put(self.change(data))

    def finish(self) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self.other._come.put_nowait(None)

    def abort(self) -> None:
        self.broken = self.other.broken = True

    async def splice(self, sock: socket.socket) -> None:
        raise NotImplementedError


class Peers:
    """Nodes that have a model. `break_after` bytes and `change` of what each sends, by id."""

    def __init__(self, model: Model, *ids: str) -> None:
        self.model = model
        self.ids = list(ids)
        self.sent: dict[str, int] = {}
        self.break_after: dict[str, int] = {}
        self.change: dict[str, Callable[[bytes], bytes]] = {}
        self.progress: list[int] = []
        self.third = asyncio.Event()
        self._pipes: list[tuple[str, Pipe]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._sharing = Sharing(lambda: {model.fingerprint().hex(): model})

    async def open(self, node_id: str) -> Pipe:
        ours, theirs = Pipe(), Pipe()
        ours.other, theirs.other = theirs, ours
        theirs.break_after = self.break_after.get(node_id)
        theirs.change = self.change.get(node_id, theirs.change)
        self._pipes.append((node_id, theirs))
        self._tasks.append(asyncio.create_task(self._serve(theirs)))
        return ours

    async def _serve(self, pipe: Pipe) -> None:
        with contextlib.suppress(MeshLlmError):
            await self._sharing.serve(pipe)

    def _note(self, done: int, total: int) -> None:
        self.progress.append(done)
        if done > total // 3:
            self.third.set()

    @property
    def info(self) -> ModelInfo:
        m = self.model
        return ModelInfo(m.name, m.fingerprint().hex(), m.size_bytes, m.n_layers)

    async def fetch(self) -> None:
        try:
            await Fetch(self.info, lambda: self.ids, self.open, self._note).run()
        finally:
            await asyncio.gather(*self._tasks)

    def bytes_from(self, node_id: str) -> int:
        return sum(pipe.sent for i, pipe in self._pipes if i == node_id)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(transfer, "PIECE_BYTES", 1 << 20)
    monkeypatch.setattr(transfer, "_RETRY_S", 0.05)
    monkeypatch.setattr(transfer, "_GIVE_UP_S", 1.0)
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path / "models"))
    yield


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Of three files."""
    target = tmp_path_factory.mktemp("source") / "parts-Q4_1.gguf"
    return load_model(rewrite(smollm2(), target, layers=range(6), split_max_tensors=20)[0])


def arrived(model: Model, folder: Path) -> bool:
    """Byte for byte, and nothing else."""
    got = sorted(folder.glob("*.gguf"))
    same = [a.read_bytes() == Path(b).read_bytes() for a, b in zip(got, model.files, strict=True)]
    return all(same) and not list(partial_folder().glob("*"))


def test_a_model_of_several_files_comes_from_several_peers(parts: Model, tmp_path: Path) -> None:
    peers = Peers(parts, "near", "far")
    asyncio.run(peers.fetch())
    assert len(parts.files) == 3 and arrived(parts, tmp_path / "models")
    assert min(peers.bytes_from("near"), peers.bytes_from("far")) > 1 << 20
    assert peers.progress[-1] == parts.size_bytes and peers.progress == sorted(peers.progress)


def test_a_peer_that_dies_half_way(parts: Model, tmp_path: Path) -> None:
    peers = Peers(parts, "dies", "stays")
    peers.break_after["dies"] = 5 << 20
    asyncio.run(peers.fetch())
    assert arrived(parts, tmp_path / "models") and peers.bytes_from("dies") > 5 << 20


def test_what_has_come_is_not_asked_for_again(parts: Model, tmp_path: Path) -> None:
    async def begin() -> None:
        """Ends in the middle."""
        peers = Peers(parts, "only")
        task = asyncio.create_task(peers.fetch())
        await asyncio.wait_for(peers.third.wait(), 30)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(begin())
    assert not list((tmp_path / "models").glob("*.gguf"))
    rest = Peers(parts, "only")
    asyncio.run(rest.fetch())
    assert arrived(parts, tmp_path / "models")
    assert rest.bytes_from("only") < parts.size_bytes * 0.75


def test_a_peer_that_sends_damaged_pieces_is_left(parts: Model, tmp_path: Path) -> None:
    peers = Peers(parts, "honest", "broken")
    peers.change["broken"] = lambda data: data[:-1] + bytes([data[-1] ^ 1]) if len(data) > 1000 else data
    asyncio.run(peers.fetch())
    assert arrived(parts, tmp_path / "models")


def test_a_peer_that_lies_about_everything(parts: Model, tmp_path: Path) -> None:
    """Pieces and digests fit each other, and the whole is another model."""
    liar = load_model(Path(shutil.copytree(Path(parts.files[0]).parent, tmp_path / "lie")) / Path(parts.files[0]).name)
    with open(liar.files[1], "r+b") as file:
        file.seek(-100, 2)
        file.write(b"!")
    peers = Peers(parts, "liar")
    peers._sharing = Sharing(lambda: {parts.fingerprint().hex(): load_model(Path(liar.files[0]))})
    with pytest.raises(ModelError, match="failed its check"):
        asyncio.run(peers.fetch())
    assert not list((tmp_path / "models").glob("*.gguf"))


def test_nobody_has_it(parts: Model) -> None:
    peers = Peers(parts)
    with pytest.raises(TransportError, match="no peer that has it can be reached"):
        asyncio.run(peers.fetch())


def test_no_space(parts: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "SPARE_BYTES", 1 << 60)
    with pytest.raises(ModelError, match=r"parts-Q4_1-00001-of-00003\.gguf needs another .* in"):
        asyncio.run(Peers(parts, "only").fetch())


def test_a_name_that_another_model_has_is_not_overwritten(parts: Model, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    taken = folder / Path(parts.files[0]).name
    taken.write_bytes(b"mine")
    asyncio.run(Peers(parts, "only").fetch())
    assert taken.read_bytes() == b"mine"
    mark = parts.fingerprint().hex()[:8]
    assert load_model(folder / f"{mark}-{taken.name}").fingerprint() == parts.fingerprint()


@pytest.mark.parametrize(
    "files",
    [
        None,
        [["../../etc/x.gguf", 5]],
        [["/x.gguf", 5]],
        [[".x.gguf", 5]],
        [["x.gguf", 5], ["x.gguf", 0]],
        [["x.gguf", -5], ["y.gguf", 10]],
        [["x.gguf", 4]],
        [["x.txt", 5]],
        [["x.gguf", 5.0]],
        [5],
    ],
)
def test_a_hostile_layout_is_refused(files: object) -> None:
    with pytest.raises(ProtocolError):
        pieces.decode_layout(files, 5)


@pytest.mark.parametrize(
    "question",
    [
        b"",
        b"{",
        b"[]",
        b'"%s"',
        b'{"op":"piece"}',
        b'{"op":"x","model":"%s","first":0}',
        b'{"op":"piece","model":"%s","first":-1}',
        b'{"op":"hashes","model":"%s","first":"0"}',
        b'{"op":"piece","model":"%s","first":99999999}',
    ],
)
def test_a_hostile_question_gets_an_error(parts: Model, question: bytes) -> None:
    async def ask() -> bytes | None:
        peers = Peers(parts)
        stream = await peers.open("x")
        await write_framed(stream, question.replace(b"%s", parts.fingerprint().hex().encode()))
        answer = await read_framed(stream, 1 << 16)
        stream.finish()
        await asyncio.gather(*peers._tasks)
        return answer

    answer = asyncio.run(ask())
    assert answer is not None and answer.startswith(b'{"error"')


def test_a_projector_gets_the_name_of_its_model(tmp_path: Path) -> None:
    source = adapters.projector(tmp_path / "mmproj-F16.gguf", 576)
    fingerprint = rpc.fingerprint([str(source)]).hex()
    projector = Projector(str(source), source.stat().st_size, fingerprint)

    async def fetch() -> None:
        peers = Peers(load_model(smollm2()), "peer")
        peers._sharing = Sharing(lambda: {fingerprint: projector})
        info = ModelInfo("its projector", fingerprint, projector.size_bytes, 1)
        await Fetch(info, lambda: peers.ids, peers.open, peers._note, "mmproj-A.gguf").run()
        await asyncio.gather(*peers._tasks)

    asyncio.run(fetch())
    assert (tmp_path / "models" / "mmproj-A.gguf").read_bytes() == source.read_bytes()
    assert [path.name for path in (tmp_path / "models").glob("*.gguf")] == ["mmproj-A.gguf"]
