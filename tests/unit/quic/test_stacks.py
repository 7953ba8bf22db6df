"""Which QUIC implementation a node uses."""

from __future__ import annotations

import pytest

from meshllm.errors import TransportError
from meshllm.quic import stacks
from meshllm.quic.aio_endpoint import AioEndpoint
from meshllm.quic.native import NativeEndpoint


def test_each_has_its_endpoint() -> None:
    assert [stacks.stack_named(name) for name in stacks.STACKS] == [NativeEndpoint, AioEndpoint]


def test_a_client_does_without_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (stacks.default_stack(client=False), stacks.default_stack(client=True)) == ("native", "aioquic")
    monkeypatch.setattr(stacks, "has_native", lambda: False)
    assert stacks.default_stack(client=False) == "aioquic"
    with pytest.raises(TransportError, match="--quic aioquic"):
        stacks.stack_named("native")
