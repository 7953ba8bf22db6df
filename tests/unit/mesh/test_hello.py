"""The hello: who is admitted, and one clear line for whoever is not."""

from __future__ import annotations

from dataclasses import replace

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshllm.errors import MeshError, MeshLlmError, ProtocolError
from meshllm.mesh import hello
from meshllm.mesh.hello import Credentials
from meshllm.mesh.token import make_ticket

MESH, SECRET, NODE, OTHER = "ab" * 16, b"s" * 16, "cd" * 32, "ef" * 32
TICKET = make_ticket(SECRET, MESH, "12" * 16)


def talk(
    joiner: Credentials, member: Credentials, peer: str = OTHER, revoked: frozenset[str] = frozenset()
) -> hello.Welcome:
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
        (Credentials("00" * 16, None, TICKET), OTHER, frozenset(), "different meshes"),
        (Credentials(MESH, None, replace(TICKET, mac="0" * 64)), OTHER, frozenset(), "does not belong to this mesh"),
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
    with pytest.raises(MeshError, match="not a member"):
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
