"""The implementations of `transport.Transport`, by name."""

from __future__ import annotations

import importlib.util

from meshllm.errors import TransportError
from meshllm.quic.transport import MakeTransport

STACKS = ("native", "aioquic")


def has_native() -> bool:
    """Whether this installation has the compiled QUIC endpoint."""
    return importlib.util.find_spec("meshllm.quic._quic") is not None


def default_stack(client: bool) -> str:
    """aioquic for a lite client, which moves little data and may lack compiled code."""
    return "native" if has_native() and not client else "aioquic"


def stack_named(name: str) -> MakeTransport:
    """The endpoint of one of STACKS. Raises TransportError if it is not installed."""
    if name == "native":
        if not has_native():
            raise TransportError("this installation was built without the native QUIC stack; use --quic aioquic")
        from meshllm.quic.native import NativeEndpoint

        return NativeEndpoint
    from meshllm.quic.aio_endpoint import AioEndpoint

    return AioEndpoint
