"""aioquic's connection, tuned for the mesh. This relies on private names, so aioquic's version is pinned."""

from __future__ import annotations

from typing import Any

from aioquic.quic.connection import MAX_STREAM_DATA_FRAME_CAPACITY, QuicConnection
from aioquic.quic.packet import QuicFrameType
from aioquic.quic.recovery import QuicPacketPacer

from meshllm.quic.identity import node_id_of

WINDOW = 1 << 20  # bytes in flight on one stream: 100 Mbit/s at 80 ms
WINDOW_STEP = WINDOW // 4  # by which it moves
TICK_S = 0.001


class _CoarsePacer(QuicPacketPacer):
    """Sends short messages at once, and wakes the event loop at most a thousand times a second.

    aioquic's own pacer waits before every packet, for microseconds that no event loop's timer can keep.
    """

    def next_send_time(self, now: float) -> float:
        at: float | None = super().next_send_time(now)
        # aioquic's annotation lacks None, which means that it may send now
        return at if at is None else max(at, now + TICK_S)  # type: ignore[return-value]

    def update_rate(self, congestion_window: int, smoothed_rtt: float) -> None:
        super().update_rate(congestion_window, smoothed_rtt)
        self.bucket_max = max(32 * (self.packet_time or 0.0), 4 * TICK_S)


class MeshQuic(QuicConnection):
    """Asks for client certificates, acknowledges at once, and opens the receive window as the reader reads."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._ack_delay = 0.0
        self._loss._pacer = _CoarsePacer(max_datagram_size=self._max_datagram_size)
        self.read_offsets: dict[int, int] = {}  # stream -> bytes that its reader has taken

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        self.tls._request_client_certificate = not self._is_client

    def _write_stream_limits(self, builder: Any, space: Any, stream: Any) -> None:
        # aioquic doubles the limit on receipt, even if nobody reads; ours moves with the reader.
        if not stream.max_stream_data_local:
            return
        limit = self.read_offsets.get(stream.stream_id, 0) + WINDOW
        if limit - stream.max_stream_data_local >= WINDOW_STEP:
            stream.max_stream_data_local = limit
        if stream.max_stream_data_local_sent != stream.max_stream_data_local:
            buf = builder.start_frame(
                QuicFrameType.MAX_STREAM_DATA,
                capacity=MAX_STREAM_DATA_FRAME_CAPACITY,
                handler=self._on_max_stream_data_delivery,
                handler_args=(stream,),
            )
            buf.push_uint_var(stream.stream_id)
            buf.push_uint_var(stream.max_stream_data_local)
            stream.max_stream_data_local_sent = stream.max_stream_data_local

    @property
    def peer_node_id(self) -> str | None:
        return node_id_of(self.tls._peer_certificate)

    @property
    def smoothed_rtt_s(self) -> float | None:
        loss = self._loss
        return loss._rtt_smoothed if loss._rtt_initialized else None

    def unacknowledged(self, stream_id: int) -> int:
        stream = self._streams.get(stream_id)
        return stream.sender._buffer_stop - stream.sender._buffer_start if stream else 0
