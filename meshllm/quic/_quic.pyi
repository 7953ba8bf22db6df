from typing import NamedTuple

LINKED: int
CLOSED: int
OPENED: int
READABLE: int
WRITABLE: int
SPLICED: int

class Event(NamedTuple):
    type: int
    link: int
    stream: int
    kind: int
    dialled: bool
    peer_id: str
    reason: str

class LinkState(NamedTuple):
    rtt_us: int
    bytes_sent: int
    bytes_received: int
    n_streams: int
    peer_address: str

class Endpoint:
    def __init__(
        self,
        port: int,
        key: bytes,
        certificate: bytes,
        alpn: str,
        max_kinds: int,
        *,
        congestion_control: str,
        idle_timeout_s: float,
        handshake_timeout_s: float,
        keep_alive_s: float,
    ) -> None: ...
    @property
    def port(self) -> int: ...
    @property
    def family(self) -> int: ...
    def fileno(self) -> int: ...
    def take_events(self) -> list[Event]: ...
    def dial(self, host: str, port: int, scope: int = ...) -> int: ...
    def close_link(self, link: int, reason: str, at_once: bool) -> None: ...
    def state(self, link: int) -> LinkState: ...
    def open(self, link: int, kind: int) -> int: ...
    def write(self, stream: int, data: bytes) -> bool: ...
    def read(self, stream: int, limit: int) -> tuple[bytes, bool]: ...
    def finish(self, stream: int) -> None: ...
    def abort(self, stream: int) -> None: ...
    def splice(self, stream: int, fd: int) -> None: ...
    def release(self, stream: int) -> None: ...
    def stop(self) -> None: ...
