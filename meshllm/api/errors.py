"""Errors as OpenAI's clients read them."""

from __future__ import annotations

from aiohttp import web


def error_response(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "code": status}}, status=status)
