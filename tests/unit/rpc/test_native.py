"""The index of a GGUF against the gguf package's own reader, and against files that are broken on purpose."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.cut import written
from support.processes import smollm2

from meshllm import rpc
from meshllm.errors import GgufError

HEAD = 24  # bytes: magic, version, number of tensors, number of keys

TENSORS: dict[str, np.ndarray[Any, Any]] = {
    "token_embd.weight": np.arange(96, dtype=np.float32).reshape(3, 32),
    "blk.0.attn_norm.weight": np.arange(5, dtype=np.float32),
    "blk.0.ffn_up_exps.weight": np.arange(2 * 4 * 6, dtype=np.float16).reshape(2, 4, 6),
    "output.weight": gguf.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0),
}
TYPES = {"output.weight": gguf.GGMLQuantizationType.Q8_0}
METADATA = {
    "llama.block_count": 1,
    "llama.context_length": 2**63 + 5,
    "llama.rope.freq_base": 0.5,
    "test.truth": True,
    "test.negative": -7,
    "general.name": "Ein Modell, größer",
}


def write_model(path: Path, split_max_tensors: int = 0) -> list[str]:
    """A small model of every kind of value and tensor; returns its files in order."""
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=split_max_tensors)
    writer.add_uint32("llama.block_count", 1)
    writer.add_uint64("llama.context_length", 2**63 + 5)
    writer.add_float32("llama.rope.freq_base", 0.5)
    writer.add_bool("test.truth", True)
    writer.add_int8("test.negative", -7)
    writer.add_string("general.name", "Ein Modell, größer")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    for name, data in TENSORS.items():
        writer.add_tensor(name, data, raw_dtype=TYPES.get(name))
    return list(map(str, written(writer, path)))


@pytest.fixture(scope="session")
def real_model() -> str:
    return str(smollm2())


@pytest.fixture
def model(tmp_path: Path) -> str:
    return write_model(tmp_path / "model.gguf")[0]


@pytest.fixture
def parts(tmp_path: Path) -> list[str]:
    return write_model(tmp_path / "split.gguf", split_max_tensors=2)


def rewrite(path: str, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


# Right answers


def test_the_real_model_is_read_like_the_gguf_package_does(real_model: str) -> None:
    info = rpc.read_gguf([real_model])
    reader = gguf.GGUFReader(real_model)
    expected = {
        t.name: (int(t.tensor_type), [int(n) for n in t.shape], int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    }
    found = {t.name: (t.type, list(t.ne)[: len(expected[t.name][1])], t.offset, t.size) for t in info.tensors}
    assert found == expected
    assert info.data_offsets == (reader.data_offset,)
    assert info.sizes == (os.path.getsize(real_model),)
    assert info.metadata["general.architecture"] == "llama"
    assert info.metadata["llama.block_count"] == 30


def test_tensors_lie_where_the_index_says(model: str) -> None:
    info = rpc.read_gguf([model])
    assert [t.name for t in info.tensors] == list(TENSORS)
    content = Path(model).read_bytes()
    for tensor in info.tensors:
        assert content[tensor.offset : tensor.offset + tensor.size] == TENSORS[tensor.name].tobytes()
    by_name = {t.name: t for t in info.tensors}
    assert by_name["blk.0.ffn_up_exps.weight"].ne == (6, 4, 2, 1)
    assert by_name["output.weight"].ne == (64, 4, 1, 1)
    assert by_name["output.weight"].type == gguf.GGMLQuantizationType.Q8_0


def test_metadata_holds_scalars_and_strings_of_every_type(model: str) -> None:
    metadata = rpc.read_gguf([model]).metadata
    assert {key: metadata[key] for key in METADATA} == METADATA
    assert metadata["test.truth"] is True
    assert "tokenizer.ggml.tokens" not in metadata


def test_a_split_model_is_found_by_any_of_its_parts(parts: list[str]) -> None:
    assert len(parts) == 2
    for part in parts:
        assert rpc.split_parts(part) == parts
    info = rpc.read_gguf(parts)
    assert sorted(t.name for t in info.tensors) == sorted(TENSORS)
    assert {t.file for t in info.tensors} == {0, 1}
    for tensor in info.tensors:
        content = Path(parts[tensor.file]).read_bytes()
        assert content[tensor.offset : tensor.offset + tensor.size] == TENSORS[tensor.name].tobytes()


@pytest.mark.parametrize(
    "name",
    [
        "model.gguf",
        "",
        "-00001-of-00002",
        "m-0001-of-0002.gguf",
        "m-00003-of-00002.gguf",
        "m-00000-of-00000.gguf",
        "m-+0001-of-00002.gguf",
        "m-00001-of-00002.gguf.part",
        "x" * 1_000_000,
    ],
)
def test_other_names_are_single_files(name: str) -> None:
    assert rpc.split_parts(name) == [name]


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path / "model") + b"\xff.gguf"
    try:
        os.rename(write_model(tmp_path / "model.gguf")[0], name)
    except OSError:
        pytest.skip("this file system takes only names that are text")
    files = rpc.split_parts(os.fsdecode(name))
    assert len(rpc.read_gguf(files).tensors) == len(TENSORS)


# Clear errors


def test_a_missing_part_is_named(parts: list[str]) -> None:
    os.remove(parts[1])
    with pytest.raises(GgufError, match=f"2 files and this one is missing: {parts[1]}"):
        rpc.split_parts(parts[0])


def test_parts_must_be_all_and_in_order(parts: list[str]) -> None:
    with pytest.raises(GgufError, match=r"model of 2 file\(s\), not 1"):
        rpc.read_gguf(parts[:1])
    with pytest.raises(GgufError, match="is part 2 of its model where part 1 belongs"):
        rpc.read_gguf(parts[::-1])
    with pytest.raises(GgufError, match="is part 1 of its model where part 2 belongs"):
        rpc.read_gguf([parts[0], parts[0]])
    with pytest.raises(GgufError, match="no model file is named"):
        rpc.read_gguf([])


def test_parts_of_one_model_share_no_tensor(parts: list[str]) -> None:
    # zeros keep the names' length, so that everything stays where it is; to ggml they end a name
    for path, name in zip(parts, [b"token_embd.weight", b"output.weight"], strict=True):
        content = Path(path).read_bytes()
        assert name in content
        Path(path).write_bytes(content.replace(name, b"the_same".ljust(len(name), b"\0")))
    with pytest.raises(GgufError, match="contains the tensor 'the_same' twice"):
        rpc.read_gguf(parts)


def test_a_part_of_another_model_is_noticed(parts: list[str]) -> None:
    content = bytearray(Path(parts[0]).read_bytes())
    at = content.index(b"split.tensors.count") + len("split.tensors.count") + 4
    content[at : at + 4] = (99).to_bytes(4, "little")
    Path(parts[0]).write_bytes(content)
    with pytest.raises(GgufError, match="hold 4 tensors, not the 99 that it names"):
        rpc.read_gguf(parts)


def test_what_is_no_model_file(tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("version https://git-lfs.github.com/spec/v1")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for path, message in [
        (text, "is not a GGUF file"),
        (empty, "is empty"),
        (tmp_path, "is not a file"),
        (pipe, "is not a file"),
        (tmp_path / "none.gguf", "No such file"),
        ("a\0b", "zero byte"),
    ]:
        with pytest.raises(GgufError, match=message) as caught:
            rpc.read_gguf([str(path)])
        assert "\n" not in str(caught.value)


def test_every_truncation_is_noticed(model: str, tmp_path: Path) -> None:
    content = Path(model).read_bytes()
    last = max(t.offset + t.size for t in rpc.read_gguf([model]).tensors)
    short = tmp_path / "short.gguf"
    for size in range(last):
        short.write_bytes(content[:size])
        with pytest.raises(GgufError, match=r"download it again|not a GGUF file"):
            rpc.read_gguf([str(short)])
    short.write_bytes(content[:last])  # the padding behind the last tensor carries nothing
    assert len(rpc.read_gguf([str(short)]).tensors) == len(TENSORS)


@pytest.mark.parametrize("version", [0, 1, 4, 0x03000000])
def test_a_version_that_cannot_be_read_is_named(model: str, version: int) -> None:
    rewrite(model, 4, version.to_bytes(4, "little"))
    with pytest.raises(GgufError, match=f"GGUF version {version}"):
        rpc.read_gguf([model])


def peak_memory_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("claim", [2**40, 2**30, 2**63 - 1, 2**64 - 1])
@pytest.mark.parametrize("field", ["tensors", "keys", "key length", "string length", "array length"])
def test_claims_beyond_the_file_cost_nothing(model: str, claim: int, field: str) -> None:
    content = Path(model).read_bytes()
    name = b"general.name"
    tokens = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens")
    at = {
        "tensors": 8,
        "keys": 16,
        "key length": HEAD,
        "string length": content.index(name) + len(name) + 4,
        "array length": tokens + 8,
    }[field]
    rewrite(model, at, claim.to_bytes(8, "little"))
    os.truncate(model, 64 << 30)  # a hole: the file could hold what is claimed
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak_memory_bytes()
    with pytest.raises(GgufError):
        rpc.read_gguf([model])
    assert peak_memory_bytes() - before < 64 << 20


def test_names_from_the_file_cannot_write_on_the_terminal(model: str) -> None:
    content = Path(model).read_bytes()
    rewrite(model, content.index(b"output.weight"), b"out\x1b[2J\n\xff\xfept")
    os.truncate(model, rpc.read_gguf([model]).tensors[-1].offset + 1)
    with pytest.raises(GgufError) as caught:
        rpc.read_gguf([model])
    assert str(caught.value).isprintable()
    assert "out?[2J???pt" in str(caught.value)


# Never a crash


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("mutated") / "model.gguf"
    return path, Path(write_model(path)[0]).read_bytes()


def check_invariants(info: rpc.GgufInfo, size: int) -> None:
    assert info.sizes == (size,)
    assert info.data_offsets[0] <= size
    names = [t.name for t in info.tensors if "\N{REPLACEMENT CHARACTER}" not in t.name]
    assert len(set(names)) == len(names)
    known_types = {int(t): sizes for t, sizes in gguf.GGML_QUANT_SIZES.items()}
    for tensor in info.tensors:
        assert all(n >= 0 for n in tensor.ne)
        if tensor.type in known_types:  # ggml may be ahead of the gguf package
            block, type_size = known_types[tensor.type]
            assert tensor.size == math.prod(tensor.ne) // block * type_size
        assert info.data_offsets[0] <= tensor.offset <= tensor.offset + tensor.size <= size


numbers = st.one_of(
    st.integers(0, 2**64 - 1),
    st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
).map(lambda n: n.to_bytes(8, "little"))
mutations = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.one_of(numbers, st.binary(min_size=1, max_size=8))),
    min_size=1,
    max_size=4,
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=mutations, cut=st.one_of(st.none(), st.floats(0, 1)))
@example(mutations=[(8 / 2000, (2**64 - 1).to_bytes(8, "little"))], cut=None)
def test_a_mutated_header_is_refused_or_read_right(
    small: tuple[Path, bytes], mutations: list[tuple[float, bytes]], cut: float | None
) -> None:
    path, original = small
    content = bytearray(original)
    for where, data in mutations:
        at = int(where * len(original))
        content[at : at + len(data)] = data
    if cut is not None:
        del content[int(cut * len(content)) :]
    path.write_bytes(content)
    try:
        info = rpc.read_gguf([str(path)])
    except GgufError as error:
        assert str(error).isprintable()
    else:
        check_invariants(info, len(content))
