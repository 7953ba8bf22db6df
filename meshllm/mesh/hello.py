"""Admission: the first exchange on a link, before any other stream is allowed. Sans-I/O.

TLS has proved both node ids. The dialling side sends {"mesh", "boot", "proof", "ticket"}; the other answers
{"proof", "boot", "observed", "secret"} or {"error"}. A proof is HMAC-SHA256(secret, mesh, node id): only a member can
compute it, and since TLS has checked the node id, a recorded proof is useless to anybody else. A joiner presents a
ticket (token.py) instead, and receives the mesh's secret in the answer.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Any

import orjson

from meshllm.errors import MeshError, ProtocolError
from meshllm.mesh.token import SECRET_BYTES, Ticket, why_refused

MAX_HELLO_BYTES = 4096
_PROOF_DOMAIN = b"mesh-llm member 1\0"


@dataclass
class Credentials:
    """`secret` is None until the node has been admitted to the mesh."""

    mesh: str
    secret: bytes | None
    ticket: Ticket | None = None

    def proof(self, node_id: str) -> str | None:
        if self.secret is None:
            return None
        return hmac.new(self.secret, _PROOF_DOMAIN + f"{self.mesh} {node_id}".encode(), hashlib.sha256).hexdigest()

    def proves(self, proof: object, node_id: str) -> bool:
        expected = self.proof(node_id)
        return (
            expected is not None and isinstance(proof, str) and hmac.compare_digest(proof.encode(), expected.encode())
        )


@dataclass(frozen=True)
class Welcome:
    """What the dialling side learns. `observed` is its own address as the peer sees it."""

    boot: str
    observed: str
    secret: bytes | None


def ask(credentials: Credentials, node_id: str, boot: str) -> bytes:
    ticket = credentials.ticket
    return orjson.dumps(
        {
            "mesh": credentials.mesh,
            "boot": boot,
            "proof": credentials.proof(node_id),
            "ticket": [ticket.serial, ticket.expires, ticket.mac] if ticket else None,
        }
    )


def answer(
    credentials: Credentials,
    question: bytes,
    peer_id: str,
    me: str,
    boot: str,
    observed: str,
    revoked: frozenset[str],
    now: float,
) -> tuple[bytes, str]:
    """The answer and the peer's boot id. `now` in seconds since 1970.

    Raises MeshError for a peer that is refused; its text goes to the peer by `refusal`.
    """
    fields = _fields(question)
    peer_boot = fields.get("boot")
    if fields.get("mesh") != credentials.mesh or not isinstance(peer_boot, str):
        raise MeshError("the two nodes belong to different meshes; ask for a new token")
    if credentials.secret is None:
        raise MeshError("the node that was asked is not yet a member itself; try again in a moment")
    reply: dict[str, Any] = {"proof": credentials.proof(me), "boot": boot, "observed": observed, "secret": None}
    if not credentials.proves(fields.get("proof"), peer_id):
        why = why_refused(_ticket(fields.get("ticket")), credentials.secret, credentials.mesh, revoked, now)
        if why:
            raise MeshError(why)
        reply["secret"] = credentials.secret.hex()
    return orjson.dumps(reply), peer_boot[:64]


def refusal(reason: str) -> bytes:
    return orjson.dumps({"error": reason})


def welcome(credentials: Credentials, reply: bytes, peer_id: str) -> Welcome:
    """Reads the answer to `ask`. Raises MeshError for a refusal or a peer that is no member."""
    fields = _fields(reply)
    if isinstance(error := fields.get("error"), str):
        raise MeshError(error[:200])
    boot, observed, secret = fields.get("boot"), fields.get("observed"), fields.get("secret")
    if not isinstance(boot, str) or not isinstance(observed, str):
        raise ProtocolError("malformed answer to the hello")
    if credentials.secret is not None:
        if not credentials.proves(fields.get("proof"), peer_id):
            raise MeshError("the other node is not a member of this mesh")
        return Welcome(boot[:64], observed[:64], None)
    try:
        received = bytes.fromhex(secret) if isinstance(secret, str) else b""
    except ValueError:
        received = b""
    if len(received) != SECRET_BYTES:
        raise ProtocolError("the answer to the hello lacks the mesh's secret")
    return Welcome(boot[:64], observed[:64], received)


def _ticket(value: object) -> Ticket:
    match value:
        case [str(serial), int(expires), str(mac)] if mac.isascii():
            return Ticket(serial, expires, mac)
    raise MeshError("a token is needed to join this mesh (mesh-llm --join TOKEN)")


def _fields(message: bytes) -> dict[str, Any]:
    try:
        fields = orjson.loads(message)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise ProtocolError("malformed hello")
    return fields
