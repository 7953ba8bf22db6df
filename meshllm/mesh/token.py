"""The invite token: one line with all that a joiner needs. Sans-I/O.

    base64url( JSON {"v", "mesh", "id", "addrs", "serial", "expires", "mac", "sum"} ), without padding

`mac` admits the joiner: HMAC-SHA256 with the mesh's secret over mesh, serial and expiry. Only members can verify it;
`serial` tells them whether the token was revoked. The secret itself is not in the token. `sum` is a checksum that
detects copying mistakes, so that these get a clear message before anything is sent.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from dataclasses import dataclass

import orjson

from meshllm.errors import TokenError
from meshllm.quic.address import split_address

VERSION = 1
MAX_TOKEN_CHARS = 4096
MAX_ADDRESSES = 32
SECRET_BYTES = MESH_ID_BYTES = 16
_HEX_64, _HEX_32 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{32}")
_MAC_DOMAIN = b"mesh-llm ticket 1\0"


@dataclass(frozen=True)
class Ticket:
    """Admits a stranger. `expires` in seconds since 1970, 0 for never."""

    serial: str
    expires: int
    mac: str


@dataclass(frozen=True)
class Token:
    """`mesh` and `inviter` are hexadecimal ids; `addresses` are "host:port", best first."""

    mesh: str
    inviter: str
    addresses: tuple[str, ...]
    ticket: Ticket


def make_ticket(secret: bytes, mesh: str, serial: str, expires: int = 0) -> Ticket:
    """`serial` is 32 random hexadecimal digits."""
    return Ticket(serial, expires, _mac(secret, mesh, serial, expires))


def why_refused(ticket: Ticket, secret: bytes, mesh: str, revoked: frozenset[str], now: float) -> str | None:
    """The reason to refuse a ticket, or None to admit it."""
    if not hmac.compare_digest(ticket.mac, _mac(secret, mesh, ticket.serial, ticket.expires)):
        return "the token does not belong to this mesh"
    if ticket.expires and now > ticket.expires:
        return "the token has expired; ask for a new one"
    if ticket.serial in revoked:
        return "the token was revoked; ask for a new one"
    return None


def _mac(secret: bytes, mesh: str, serial: str, expires: int) -> str:
    text = f"{mesh} {serial} {expires}".encode()
    return hmac.new(secret, _MAC_DOMAIN + text, hashlib.sha256).hexdigest()


def encode(token: Token) -> str:
    ticket = token.ticket
    fields = {
        "v": VERSION,
        "mesh": token.mesh,
        "id": token.inviter,
        "addrs": list(token.addresses),
        "serial": ticket.serial,
        "expires": ticket.expires,
        "mac": ticket.mac,
    }
    fields["sum"] = _checksum(fields)
    return base64.urlsafe_b64encode(orjson.dumps(fields)).decode().rstrip("=")


def decode(text: str, now: float) -> Token:
    """Raises TokenError, whose message says what is wrong and what to do. `now` in seconds since 1970."""
    text = "".join(text.split())
    if not text.startswith("eyJ") or len(text) > MAX_TOKEN_CHARS:
        raise TokenError("this is not a mesh-llm token; one starts with eyJ and is a single line")
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        fields = orjson.loads(raw)
    except (binascii.Error, ValueError):
        raise TokenError("the token is cut off or damaged; copy the whole line again") from None
    if not isinstance(fields, dict):
        raise TokenError("the token is damaged; copy the whole line again")
    if fields.get("v") != VERSION:
        raise TokenError(
            f"the token has version {fields.get('v')}, but this mesh-llm reads version {VERSION}; "
            "install the same version of mesh-llm on both machines"
        )
    if fields.pop("sum", None) != _checksum(fields):
        raise TokenError("the token was altered while it was copied; copy the whole line again")
    token = _checked(fields)
    if token.ticket.expires and now > token.ticket.expires:
        raise TokenError("the token has expired; ask for a new one (mesh-llm token)")
    return token


def _checksum(fields: dict[str, object]) -> str:
    return hashlib.sha256(orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)).hexdigest()[:8]


def _checked(fields: dict[str, object]) -> Token:
    def text(key: str, pattern: re.Pattern[str]) -> str:
        value = fields.get(key)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise TokenError(f"the token is damaged ({key}); copy the whole line again")
        return value

    addresses, expires = fields.get("addrs"), fields.get("expires")
    if not isinstance(addresses, list) or not 0 < len(addresses) <= MAX_ADDRESSES:
        raise TokenError("the token has no addresses; ask for a new one")
    if not all(isinstance(a, str) and split_address(a) for a in addresses):
        raise TokenError("the token contains a malformed address; ask for a new one")
    if type(expires) is not int or expires < 0:
        raise TokenError("the token is damaged (expires); copy the whole line again")
    ticket = Ticket(text("serial", _HEX_32), expires, text("mac", _HEX_64))
    return Token(text("mesh", _HEX_32), text("id", _HEX_64), tuple(addresses), ticket)
