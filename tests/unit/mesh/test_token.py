"""The invite token: what admits, and one clear line for whatever does not."""

from __future__ import annotations

import base64
import contextlib
from dataclasses import replace

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshllm.errors import TokenError
from meshllm.mesh.token import Token, decode, encode, make_ticket, why_refused
from meshllm.quic.address import join_address

MESH, SECRET, NODE, OTHER = "ab" * 16, b"s" * 16, "cd" * 32, "ef" * 32
TICKET = make_ticket(SECRET, MESH, "12" * 16)
TOKEN = Token(MESH, NODE, ("10.0.0.1:7000", "[fe80::1]:7000", "127.0.0.1:7000"), TICKET)


@given(
    st.binary(min_size=16, max_size=16),
    st.lists(
        st.tuples(st.sampled_from(["10.1.2.3", "::1", "a.example"]), st.integers(1, 65535)), min_size=1, max_size=9
    ),
    st.integers(0, 2**40),
)
def test_token_round_trip(serial: bytes, addresses: list[tuple[str, int]], expires: int) -> None:
    ticket = make_ticket(SECRET, MESH, serial.hex(), expires)
    token = Token(MESH, NODE, tuple(join_address(*a) for a in addresses), ticket)
    text = encode(token)
    assert text.startswith("eyJ") and text.isascii() and "\n" not in text and "=" not in text
    assert decode(text, now=0) == token
    assert decode(f"  {text[:50]}\n {text[50:]} \n", now=0) == token  # a terminal has wrapped it
    assert SECRET.hex() not in base64.b64decode(text + "===", altchars=b"-_").decode()


def altered(**changes: object) -> str:
    fields = orjson.loads(base64.b64decode(encode(TOKEN) + "===", altchars=b"-_")) | changes
    return base64.urlsafe_b64encode(orjson.dumps(fields)).decode().rstrip("=")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "is not a mesh-llm token"),
        ("", "is not a mesh-llm token"),
        (encode(TOKEN)[:-30], "cut off"),
        (altered(mesh="00" * 16), "was altered"),
        (altered(expires=99), "was altered"),
        (altered(v=2), "has version 2"),
        (encode(replace(TOKEN, ticket=make_ticket(SECRET, MESH, "12" * 16, expires=100))), "has expired"),
        (encode(replace(TOKEN, addresses=())), "has no addresses"),
        (encode(replace(TOKEN, addresses=("/etc/passwd",))), "malformed address"),
    ],
)
def test_bad_tokens_get_a_clear_line(text: str, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        decode(text, now=1000)


@settings(max_examples=300)
@given(st.integers(3, len(encode(TOKEN)) - 1), st.characters(codec="utf-8"))
def test_damaged_tokens_are_refused(position: int, character: str) -> None:
    text = encode(TOKEN)
    damaged = text[:position] + character + text[position + 1 :]
    with contextlib.suppress(TokenError):
        assert decode(damaged, now=1000) == TOKEN  # the last character has bits to spare, and spaces are dropped


def test_tickets_are_of_one_mesh_and_may_end() -> None:
    ticket = make_ticket(SECRET, MESH, "12" * 16, expires=100)
    assert why_refused(ticket, SECRET, MESH, frozenset(), now=50) is None
    assert "expired" in str(why_refused(ticket, SECRET, MESH, frozenset(), now=101))
    assert "revoked" in str(why_refused(ticket, SECRET, MESH, frozenset({"12" * 16}), now=50))
    assert "does not belong to this mesh" in str(why_refused(ticket, b"t" * 16, MESH, frozenset(), now=50))
    assert "does not belong to this mesh" in str(
        why_refused(replace(ticket, expires=200), SECRET, MESH, frozenset(), now=50)
    )
