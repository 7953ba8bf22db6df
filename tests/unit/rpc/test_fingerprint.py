"""The fingerprint of a model: what changes it, what does not, and its cache."""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import orjson
import platformdirs
import pytest
from support.cut import written
from support.processes import smollm2

from meshllm import rpc
from meshllm.errors import GgufError

SAMPLE = 4096  # bytes
BIG = np.arange(16 * SAMPLE, dtype=np.uint8).view(np.float32)  # a tensor with bytes between the samples
SMALL = np.arange(3 * SAMPLE, dtype=np.uint8).view(np.float32)  # and the largest one without

# What the docstring describes, so that machines with different versions of this program agree.
REAL_MODEL = "9938f94345885b8e6ae95a15ae1a4f8036fac3ff78c4cffeedcd7241de1ffeca"


def write_model(path: Path, split_max_tensors: int = 0) -> list[str]:
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    writer.add_string("general.name", "test")
    writer.add_tensor("z.weight", BIG)  # not in the order of names
    writer.add_tensor("a.weight", SMALL)
    return list(map(str, written(writer, path)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: folder / name)
    return folder / "mesh-llm" / "fingerprints.json"


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "model.gguf")[0]


@pytest.fixture
def parts(tmp_path: Path) -> list[str]:
    return write_model(tmp_path / "split.gguf", split_max_tensors=1)


def flip(path: str, at: int) -> None:
    """Changes one byte, and the time as any writer does."""
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))


def tensor(path: str, name: str) -> rpc.TensorInfo:
    return next(t for t in rpc.read_gguf([path]).tensors if t.name == name)


def described(files: list[str]) -> bytes:
    """The docstring once more, by the gguf package's reader."""
    digest = hashlib.sha256(b"mesh-llm gguf fingerprint 1\0")
    samples = {}
    for path in files:
        content = Path(path).read_bytes()
        reader = gguf.GGUFReader(path)
        digest.update(len(content).to_bytes(8, "little") + content[: reader.data_offset])
        for t in reader.tensors:
            data = content[t.data_offset : t.data_offset + t.n_bytes]
            middle = (len(data) - SAMPLE) // 2
            cuts = [data[:SAMPLE], data[middle : middle + SAMPLE], data[-SAMPLE:]]
            samples[t.name] = data if len(data) <= 3 * SAMPLE else b"".join(cuts)
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.digest()


def test_it_is_what_the_docstring_describes(model: str, parts: list[str]) -> None:
    assert rpc.fingerprint([model]) == described([model])
    assert len(parts) == 2
    assert rpc.fingerprint(parts) == described(parts)


def test_the_real_model_has_the_fingerprint_it_always_had() -> None:
    assert rpc.fingerprint([str(smollm2())]).hex() == REAL_MODEL


def test_names_and_times_do_not_matter(model: str, tmp_path: Path) -> None:
    before = rpc.fingerprint([model])
    os.utime(model, (1, 1))
    assert rpc.fingerprint([model]) == before
    copy = tmp_path / "another folder" / "another name"
    copy.parent.mkdir()
    shutil.copy(model, copy)
    assert rpc.fingerprint([str(copy)]) == before


def test_header_and_samples_matter(model: str) -> None:
    big, small = tensor(model, "z.weight"), tensor(model, "a.weight")
    middle = big.offset + (big.size - SAMPLE) // 2
    name = Path(model).read_bytes().index(b"test")
    places = [name, big.offset, big.offset + SAMPLE - 1, middle, middle + SAMPLE - 1]
    places += [big.offset + big.size - SAMPLE, big.offset + big.size - 1]
    places += [small.offset, small.offset + SAMPLE + 1, small.offset + small.size - 1]
    seen = {rpc.fingerprint([model])}
    for at in places:
        flip(model, at)
        seen.add(rpc.fingerprint([model]))
        flip(model, at)
    with open(model, "ab") as file:
        file.write(b"\0")
    seen.add(rpc.fingerprint([model]))
    assert len(seen) == len(places) + 2


def test_bytes_between_the_samples_are_not_looked_at(model: str) -> None:
    """A limit that the docstring names, not a wish."""
    before = rpc.fingerprint([model])
    flip(model, tensor(model, "z.weight").offset + SAMPLE)
    assert rpc.fingerprint([model]) == before


def test_all_parts_matter(parts: list[str]) -> None:
    before = rpc.fingerprint(parts)
    flip(parts[1], rpc.read_gguf(parts).data_offsets[1])
    assert rpc.fingerprint(parts) != before


def test_what_cannot_be_read_is_an_error(model: str, tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"none\.gguf: No such file"):
        rpc.fingerprint([str(tmp_path / "none.gguf")])
    with pytest.raises(GgufError, match="is not a file"):
        rpc.fingerprint([str(tmp_path)])
    rpc.fingerprint([model])
    os.truncate(model, 100)
    with pytest.raises(GgufError, match="truncated or broken"):
        rpc.fingerprint([model])


# The cache


def test_a_second_call_reads_only_the_cache(model: str) -> None:
    before = rpc.fingerprint([model])
    stat = os.stat(model)
    flip(model, tensor(model, "z.weight").offset)
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as if nothing had happened
    assert rpc.fingerprint([model]) == before
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert rpc.fingerprint([model]) != before


def test_another_file_in_its_place_is_noticed(model: str, tmp_path: Path) -> None:
    before = rpc.fingerprint([model])
    stat = os.stat(model)
    copy = tmp_path / "copy"
    shutil.copy(model, copy)
    flip(str(copy), tensor(model, "z.weight").offset)
    os.replace(copy, model)
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert rpc.fingerprint([model]) != before


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"{", b"[]", b"null", b'{"a": 1}', b'{"a": "zz"}', b"[" * 100_000],
    ids=["empty", "no text", "cut", "list", "null", "number", "no digest", "deep"],
)
def test_a_broken_cache_is_ignored_and_replaced(model: str, cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    assert rpc.fingerprint([model]) == described([model])
    assert list(orjson.loads(cache.read_bytes()).values()) == [described([model]).hex()]


@pytest.mark.parametrize("value", [1, "zz" * 32, "00" * 31, None, []])
def test_a_broken_entry_is_ignored(model: str, cache: Path, value: object) -> None:
    rpc.fingerprint([model])
    entries = orjson.loads(cache.read_bytes())
    cache.write_bytes(orjson.dumps(dict.fromkeys(entries, value)))
    assert rpc.fingerprint([model]) == described([model])


def test_a_cache_that_cannot_be_written_is_done_without(model: str, cache: Path) -> None:
    cache.parent.parent.mkdir(parents=True)
    cache.parent.touch()  # a file where its folder belongs
    assert rpc.fingerprint([model]) == described([model])
    cache.parent.unlink()
    cache.mkdir(parents=True)  # a folder where the file belongs
    assert rpc.fingerprint([model]) == described([model])
    assert list(cache.parent.iterdir()) == [cache]  # and no temporary file is left


def test_the_cache_does_not_grow_for_ever(model: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(orjson.dumps({str(i): "00" * 32 for i in range(2000)}))
    result = rpc.fingerprint([model])
    entries = orjson.loads(cache.read_bytes())
    assert len(entries) == 1000
    assert list(entries.values())[-1] == result.hex()


def test_a_name_that_is_no_text_is_cached_too(model: str, cache: Path) -> None:
    name = os.fsencode(model) + b"\xff"
    try:
        os.rename(model, name)
    except OSError:
        pytest.skip("this file system takes only names that are text")
    rpc.fingerprint([os.fsdecode(name)])
    assert len(orjson.loads(cache.read_bytes())) == 1


def test_many_at_once(tmp_path: Path, cache: Path) -> None:
    files = [str(tmp_path / f"{i}.gguf") for i in range(4)]
    for path in files:
        write_model(Path(path))
    with ThreadPoolExecutor(8) as pool:
        results = set(pool.map(lambda i: rpc.fingerprint([files[i % 4]]), range(64)))
    assert results == {described(files[:1])}
    assert orjson.loads(cache.read_bytes())
    assert list(cache.parent.iterdir()) == [cache]
