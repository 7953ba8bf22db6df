"""The counters file, as the library writes it."""

from __future__ import annotations

import struct
from dataclasses import astuple, fields
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from meshllm.engine.counters import Counters, LinkState, read_counters
from meshllm.mesh.engine_status import StageCounters

N_COUNTERS = len(fields(StageCounters))


def test_missing_or_unfinished_files_read_as_starting(tmp_path: Path) -> None:
    path = tmp_path / "counters.bin"
    assert read_counters(path) == Counters()
    path.write_bytes(bytes(8192))
    assert read_counters(path) == Counters()


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=N_COUNTERS, max_size=N_COUNTERS),
    st.sampled_from(LinkState),
    st.text(max_size=100),
)
def test_what_was_written_is_read(numbers: list[int], state: LinkState, error: str) -> None:
    data = bytearray(8192)
    struct.pack_into("<8sII", data, 0, b"MLCOUNT1", 2, state)
    struct.pack_into(f"<{N_COUNTERS}Q", data, 64 + 256, *numbers)
    text = error.replace("\0", "").encode()[:511]
    data[4608 : 4608 + len(text)] = text
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / "mesh-llm-test-counters.bin"
    path.write_bytes(data)
    counters = read_counters(path)
    path.unlink()
    assert counters.state is state and counters.error == text.decode(errors="replace")
    assert list(astuple(counters.stages[1])) == numbers and not any(astuple(counters.stages[0]))
