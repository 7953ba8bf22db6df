"""A link between a host and a stage that damages a frame on request."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Self

GRAPH_PUT = 66
_HEADER = 9  # command u8, size u64


class DamagingLink:
    """Listens at `address` and passes every connection on to `target` (host:port)."""

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._armed = threading.Event()
        self._sockets: list[socket.socket] = [self._listener]
        self._threads: list[threading.Thread] = []
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def damage_next_graph(self) -> None:
        """The next graph that is sent names a device that does not exist."""
        self._armed.set()

    @property
    def damaged(self) -> bool:
        return not self._armed.is_set()

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(self, *_exc: object) -> None:
        for s in self._sockets:
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: object, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            self._sockets += [caller, server]
            self._start(self._requests, caller, server)
            self._start(self._replies, server, caller)

    def _requests(self, caller: socket.socket, server: socket.socket) -> None:
        with suppress(OSError), caller.makefile("rb") as frames:
            while len(header := frames.read(_HEADER)) == _HEADER:
                payload = bytearray(frames.read(int.from_bytes(header[1:], "little")))
                if header[0] == GRAPH_PUT and self._armed.is_set():
                    payload[4] = 9  # the device; a slot number precedes it
                    self._armed.clear()
                server.sendall(header + payload)
            server.shutdown(socket.SHUT_WR)

    def _replies(self, server: socket.socket, caller: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                caller.sendall(data)
            caller.shutdown(socket.SHUT_WR)
