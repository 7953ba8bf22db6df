// All that is read from or written to picoquic's private structures: one function per quirk, with its reason. No other
// file of csrc includes picoquic_internal.h.
//
// Checked against the version that cmake/picoquic.py pins; read the functions again whenever that changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <picoquic.h>
#include <span>
#include <string>

struct st_ptls_context_t;

namespace meshllm::quic {

/// The TLS context: picoquic has no setters for the signing key, session tickets, early data and the size of messages.
st_ptls_context_t & tls_context(picoquic_quic_t * quic);

// --- memory that peers occupy ---

/// Received pieces of stream data that wait for what is missing before them, on all connections.
int pieces_waiting(const picoquic_quic_t * quic);

/// Those of one connection, beyond what an honest peer would have sent: each occupies a packet's worth of memory,
/// however small it is.
int64_t excess_pieces(picoquic_cnx_t * cnx);

// --- packets ---

/// Pads a datagram that begins with an Initial packet; returns the number of bytes added behind `length`.
///
/// picoquic does not pad an Initial packet that it retransmits, although its own client drops a short one that elicits
/// an acknowledgement (RFC 9000 section 14.1): after one lost datagram the handshake would never end.
size_t pad_initial(picoquic_cnx_t * cnx, std::span<uint8_t> datagram, size_t length);

/// Makes picoquic prepare the next packet of `cnx` from the beginning.
///
/// Its short cut for the later packets of a batch (picoquic_prepare_packet_ready_fast in sender.c) forgets the loss
/// timer when the last packet is full.
void restore_loss_timer(picoquic_quic_t * quic, picoquic_cnx_t * cnx, uint64_t now_us);

/// Bounds how long we delay acknowledgements for a peer that does not negotiate it (aioquic, quic-go).
///
/// picoquic would delay them by up to 10 ms, depending on its own sending rate, and a sender with a small window would
/// wait for each.
void limit_ack_delay(picoquic_cnx_t * cnx);

// --- streams and connections ---

/// Counts what never arrived of a reset stream as received (RFC 9000 section 4.5).
///
/// picoquic does not, so the connection's windows, of bytes and of streams, would close bit by bit. Also marks the
/// stream as discarded, so that data sent after the reset does not begin it again.
void count_reset_as_received(picoquic_cnx_t * cnx, uint64_t stream_id);

/// Whether the peer's limit lets us open this stream of ours already; picoquic has only the next id to ask for.
bool peer_allows_stream(const picoquic_cnx_t * cnx, uint64_t stream_id);

/// The reason phrase of the peer's CONNECTION_CLOSE, empty if there was none; picoquic has a getter for the code only.
std::string peer_close_reason(const picoquic_cnx_t * cnx);

// --- congestion control ---

/// The algorithm of a path's connection: picoquic does not pass its callbacks the algorithm that they belong to.
const picoquic_congestion_algorithm_t * congestion_algorithm(const picoquic_path_t * path);

/// The transmission time that pacing allows at once, now.
int64_t pacing_bucket_nanosec(const picoquic_path_t * path);

/// Raises the window, and the burst that pacing allows, to at least `n_packets`, and the bucket to `bucket_nanosec`
/// within that burst. Algorithms work by writing these fields; picoquic has no setters.
void ensure_burst(picoquic_path_t * path, uint64_t n_packets, int64_t bucket_nanosec);

} // namespace meshllm::quic
