"""The arithmetic of pieces, and layouts that peers send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshllm.errors import ProtocolError
from meshllm.models import pieces
from meshllm.models.pieces import PIECE_BYTES, Layout, decode_layout, layout_of

SIZES = st.lists(
    st.integers(1, 5 * PIECE_BYTES) | st.sampled_from([PIECE_BYTES, 2 * PIECE_BYTES]), min_size=1, max_size=6
)


@given(SIZES)
def test_pieces_cover_every_byte_once(sizes: list[int]) -> None:
    layout = layout_of([f"/m/{i}.gguf" for i in range(len(sizes))], sizes)
    ends = [0] * len(sizes)
    for number in range(layout.n_pieces):
        piece = layout.piece(number)
        assert piece.offset == ends[piece.file] and 0 < piece.size <= PIECE_BYTES
        ends[piece.file] += piece.size
    assert ends == sizes and layout.size_bytes == sum(sizes)
    for number in (-1, layout.n_pieces):
        with pytest.raises(ProtocolError, match="no such piece"):
            layout.piece(number)


@given(SIZES)
def test_a_layout_comes_back(sizes: list[int]) -> None:
    layout = layout_of([f"/m/a b:{i}.gguf" for i in range(len(sizes))], sizes)
    assert layout.files[0][0] == "a_b_0.gguf"
    assert decode_layout(layout.encode(), sum(sizes)) == layout


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=4)), st.integers())
def test_anything_else_is_refused(value: object, size: int) -> None:
    try:
        layout = decode_layout(value, size)
    except ProtocolError:
        return
    assert layout == Layout(()) and size == 0


@pytest.mark.parametrize("name", ["../a.gguf", ".a.gguf", "a/b.gguf", "a.txt", "", "a\n.gguf", "a" * 300 + ".gguf"])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(ProtocolError, match="does not fit"):
        decode_layout([[name, 5]], 5)


def test_sizes_must_fit() -> None:
    for files, size in (([["a.gguf", 5]], 6), ([["a.gguf", True]], 1), ([["a.gguf", 3], ["a.gguf", 2]], 5)):
        with pytest.raises(ProtocolError, match="does not fit"):
            decode_layout(files, size)
    assert pieces.digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
