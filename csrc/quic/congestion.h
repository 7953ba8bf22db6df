// Congestion control for messages beside bulk data: an algorithm of picoquic's that sends a small message at once.
#pragma once

#include <picoquic.h>
#include <string>

namespace meshllm::quic {

/// The algorithm of that name ("bbr", "cubic", ...) with room for a message. Throws std::runtime_error if unknown.
///
/// A hidden state of 20 KB every few milliseconds looks to an algorithm like a path of little bandwidth: it closes the
/// window to a few packets and spreads them over the round trip, so that each token waits for acknowledgements that are
/// not urgent to anyone. Here neither the window nor the burst that pacing allows is less than `message_packets`.
const picoquic_congestion_algorithm_t * with_room_for_messages(const std::string & name);

constexpr uint64_t message_packets = 32; // 46 KB: a hidden state of 8192 floats, and its frames

} // namespace meshllm::quic
