"""The invite token and the hello: what admits, and one clear line for whatever does not."""

from __future__ import annotations

import base64
import contextlib
import os
import stat
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshllm.errors import IdentityError, MeshError, MeshLlmError, ProtocolError, TokenError
from meshllm.mesh import hello
from meshllm.mesh.hello import Credentials
from meshllm.mesh.known_meshes import KnownMesh, KnownMeshes
from meshllm.mesh.token import Token, decode, encode, make_ticket, why_refused
from meshllm.quic.address import join_address, split_address
from meshllm.quic.identity import IdentityFile, make_identity, node_id_of

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
        (altered(mesh="00" * 16), "was changed"),
        (altered(expires=99), "was changed"),
        (altered(v=2), "of version 2"),
        (encode(replace(TOKEN, ticket=make_ticket(SECRET, MESH, "12" * 16, expires=100))), "has expired"),
        (encode(replace(TOKEN, addresses=())), "names no address"),
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
    assert "not of this mesh" in str(why_refused(ticket, b"t" * 16, MESH, frozenset(), now=50))
    assert "not of this mesh" in str(why_refused(replace(ticket, expires=200), SECRET, MESH, frozenset(), now=50))


@pytest.mark.parametrize("text", ["", "a", "a:", ":1", "a:0", "a:65536", "a:-1", "a:1x", "::1:5", "a b:1", "a:\uff11"])
def test_addresses_that_are_none(text: str) -> None:
    assert split_address(text) is None


def talk(joiner: Credentials, member: Credentials, peer: str = OTHER, revoked: frozenset[str] = frozenset()):  # type: ignore[no-untyped-def]
    """What the joiner learns; `peer` is who TLS says the joiner is."""
    question = hello.ask(joiner, OTHER, "boot-1")
    reply, boot = hello.answer(member, question, peer, NODE, "boot-2", "1.2.3.4:5", revoked, now=50)
    assert boot == "boot-1"
    return hello.welcome(joiner, reply, NODE)


def test_ticket_admits_and_brings_the_secret() -> None:
    welcome = talk(Credentials(MESH, None, TICKET), Credentials(MESH, SECRET))
    assert (welcome.secret, welcome.observed, welcome.boot) == (SECRET, "1.2.3.4:5", "boot-2")


def test_members_need_no_ticket() -> None:
    assert talk(Credentials(MESH, SECRET), Credentials(MESH, SECRET)).secret is None


@pytest.mark.parametrize(
    ("joiner", "peer", "revoked", "message"),
    [
        (Credentials(MESH, None), OTHER, frozenset(), "a token is needed"),
        (Credentials(MESH, b"x" * 16), OTHER, frozenset(), "a token is needed"),
        (Credentials("00" * 16, None, TICKET), OTHER, frozenset(), "another mesh"),
        (Credentials(MESH, None, replace(TICKET, mac="0" * 64)), OTHER, frozenset(), "not of this mesh"),
        (Credentials(MESH, None, TICKET), OTHER, frozenset({TICKET.serial}), "revoked"),
        (Credentials(MESH, SECRET), NODE, frozenset(), "a token is needed"),  # somebody else's proof, recorded
    ],
)
def test_strangers_are_refused(joiner: Credentials, peer: str, revoked: frozenset[str], message: str) -> None:
    with pytest.raises(MeshError, match=message):
        talk(joiner, Credentials(MESH, SECRET), peer, revoked)


def test_impostor_without_the_secret_is_no_member() -> None:
    reply, _ = hello.answer(
        Credentials(MESH, b"x" * 16), hello.ask(Credentials(MESH, b"x" * 16), OTHER, "b"), OTHER, NODE, "b", "a:1",
        frozenset(), now=0,
    )  # fmt: skip
    with pytest.raises(MeshError, match="no member"):
        hello.welcome(Credentials(MESH, SECRET), reply, NODE)


FIELDS = st.dictionaries(
    st.sampled_from(["mesh", "boot", "proof", "ticket"]), st.none() | st.text() | st.lists(st.integers(0, 9))
)


@settings(max_examples=300)
@given(st.binary(max_size=80) | FIELDS.map(orjson.dumps))
def test_hostile_hellos_are_refused(message: bytes) -> None:
    with pytest.raises(MeshLlmError):
        hello.answer(Credentials(MESH, SECRET), message, OTHER, NODE, "b", "a:1", frozenset(), now=0)
    with pytest.raises((MeshError, ProtocolError)):
        hello.welcome(Credentials(MESH, None), message, NODE)


def test_identity_is_kept_locked_and_private(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    first = IdentityFile(path)
    identity = first.load()
    assert identity and node_id_of(identity.certificate) == identity.node_id
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert IdentityFile(path).load() is None  # a second node of the same name would be taken for this one
    first.close()
    again = IdentityFile(path)
    loaded = again.load()
    assert loaded and loaded.node_id == identity.node_id
    again.close()
    os.chmod(path, 0o644)
    with pytest.raises(IdentityError, match="chmod 600"):
        IdentityFile(path).load()
    path.chmod(0o600)
    path.write_text("no key")
    with pytest.raises(IdentityError, match="not an Ed25519 key"):
        IdentityFile(path).load()
    assert make_identity().node_id != make_identity().node_id


def test_state_is_remembered_and_garbage_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "mesh.json"
    state = KnownMeshes(path)
    state.own = MESH
    state.meshes[MESH] = KnownMesh(SECRET, [("10.0.0.1:1", NODE)], ["12" * 16])
    state.save()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KnownMeshes(path).meshes == state.meshes and KnownMeshes(path).own == MESH
    for content in (b"", b"[]", b'{"meshes": {"a": {"secret": "zz"}}}', b'{"meshes": []}'):
        path.write_bytes(content)
        assert KnownMeshes(path).own is None
    assert [p.name for p in tmp_path.iterdir()] == ["mesh.json"]
