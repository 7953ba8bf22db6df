"""The implementations of `transport.Transport`, by name."""

from __future__ import annotations

import importlib.util

from meshllm.errors import TransportError
from meshllm.quic.transport import MakeTransport

STACKS = ("native", "aioquic")


def has_native() -> bool:
    """Whether the compiled engine is part of this installation."""
    return importlib.util.find_spec("meshllm.quic._quic") is not None


def default_stack(client: bool) -> str:
    """A lite client moves little, and does without compiled code."""
    return "native" if has_native() and not client else "aioquic"


def stack_named(name: str) -> MakeTransport:
    """One of STACKS. Raises TransportError when it is not installed."""
    if name == "native":
        if not has_native():
            raise TransportError("this installation is without the native QUIC engine; --quic aioquic does without")
        from meshllm.quic.native import NativeEndpoint

        return NativeEndpoint
    from meshllm.quic.aio_endpoint import QuicEndpoint

    return QuicEndpoint
