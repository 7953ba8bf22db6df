"""A router between a client and a UDP port: it may lose datagrams, and forget the address it gave the client."""

from __future__ import annotations

import asyncio
import random
from typing import Any


class Relay(asyncio.DatagramProtocol):
    """`sent` keeps what the client sends, when `records`."""

    def __init__(self, target: tuple[str, int], loss: float = 0.0, records: bool = False) -> None:
        self.sent: list[bytes] = []
        self._target, self._loss, self._records = target, loss, records
        self.random = random.Random(1)
        self._client: Any = None
        self._outside: list[Any] = []

    @classmethod
    async def open(cls, target: tuple[str, int], loss: float = 0.0, records: bool = False) -> Relay:
        loop = asyncio.get_running_loop()
        _, relay = await loop.create_datagram_endpoint(lambda: cls(target, loss, records), local_addr=("127.0.0.1", 0))
        await relay.rebind()
        return relay

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.inside.get_extra_info("sockname")[:2]
        return host, port

    async def rebind(self) -> None:
        """A new port towards the target, as a NAT chooses that has forgotten the old one."""
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: _Outside(self), local_addr=("127.0.0.1", 0))

    def close(self) -> None:
        for transport in [self.inside, *self._outside]:
            transport.close()

    # --- datagrams ---

    def connection_made(self, transport: Any) -> None:
        self.inside = transport

    def outside_made(self, transport: Any) -> None:
        for old in self._outside:
            old.close()
        self._outside = [transport]

    def datagram_received(self, data: bytes, address: Any) -> None:
        self._client = address
        if self._records:
            self.sent.append(data)
        if not self._lost():
            self._outside[0].sendto(data, self._target)

    def answered(self, data: bytes) -> None:
        if not self._lost():
            self.inside.sendto(data, self._client)

    def _lost(self) -> bool:
        return self._loss > 0 and self.random.random() < self._loss


class _Outside(asyncio.DatagramProtocol):
    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def connection_made(self, transport: Any) -> None:
        self._relay.outside_made(transport)

    def datagram_received(self, data: bytes, address: Any) -> None:
        self._relay.answered(data)
