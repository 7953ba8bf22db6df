"""Who may use the endpoint: holders of the API key, and web pages of known origin."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from meshllm.api.errors import error_response

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
ANY = "*"
KEY_HEADERS = ("authorization", "x-api-key")
_ADMITTED = web.RequestKey("admitted origin", str)


@dataclass(frozen=True)
class Access:
    """`api_key`: "" for none. `origins` of web pages that are admitted besides this machine's, or ANY.

    `local`: the endpoint listens on loopback addresses only, so requests that name another host are refused.
    """

    api_key: str = ""
    origins: tuple[str, ...] = ()
    local: bool = False

    def admits_key(self, headers: Mapping[str, str]) -> bool:
        if not self.api_key:
            return True
        scheme, _, bearer = headers.get("Authorization", "").partition(" ")
        keys = (bearer.strip() if scheme.lower() == "bearer" else "", headers.get("X-Api-Key", ""))
        return any(hmac.compare_digest(key.encode(errors="surrogateescape"), self.api_key.encode()) for key in keys)

    def admits_host(self, host: str) -> bool:
        """Against DNS rebinding: such a page's own host name leads here, and its requests carry that name."""
        name = (urlsplit(f"//{host}").hostname or "") if host else ""
        named = any(urlsplit(origin).hostname == name for origin in self.origins)
        return not self.local or ANY in self.origins or named or not name or _is_here(name) or _is_address(name)

    def admits_origin(self, origin: str, host: str) -> bool:
        """Admits pages of this machine, of this endpoint itself by its IP address, and of the named origins."""
        if ANY in self.origins or origin.lower().rstrip("/") in (o.lower().rstrip("/") for o in self.origins):
            return True
        try:
            parts = urlsplit(origin)
            name = parts.hostname or ""
        except ValueError:
            return False
        return _is_here(name) or (_is_address(name) and parts.netloc == host)


def _is_here(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
        return True
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def middleware(access: Access, public: Collection[str]) -> Middleware:
    """`public` paths need no key."""

    @web.middleware
    async def check(request: web.Request, handler: _Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is not None and not access.admits_origin(origin, request.host):
            text = f"pages of {origin[:100]} may not use this endpoint; allow them with --cors-origin {origin[:100]}"
            return error_response(403, "permission_error", text)
        if not access.admits_host(request.host):
            text = f"this endpoint is not {request.host[:100]}; call it localhost, or by its IP address"
            return error_response(403, "permission_error", text)
        if origin is not None:
            request[_ADMITTED] = origin
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return _preflight(request)
        if request.path not in public and not access.admits_key(request.headers):
            text = "the API key is missing or wrong; send it as Authorization: Bearer KEY"
            response = error_response(401, "authentication_error", text)
            response.headers["WWW-Authenticate"] = "Bearer"
            return response
        return await handler(request)

    return check


async def add_cors(request: web.Request, response: web.StreamResponse) -> None:
    """For aiohttp's on_response_prepare, which also sees responses that stream."""
    if origin := request.get(_ADMITTED):
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Vary"] = "Origin"


def _preflight(request: web.Request) -> web.Response:
    response = web.Response(status=204)
    response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE, OPTIONS"
    asked = request.headers.get("Access-Control-Request-Headers", "")
    response.headers["Access-Control-Allow-Headers"] = asked or "*"
    response.headers["Access-Control-Max-Age"] = "600"
    if request.headers.get("Access-Control-Request-Private-Network") == "true":
        response.headers["Access-Control-Allow-Private-Network"] = "true"
    return response
