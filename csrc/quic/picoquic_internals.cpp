#include "quic/picoquic_internals.h"

#include <algorithm>
#include <picoquic_internal.h>
#include <picotls.h>

namespace meshllm::quic {

namespace {

constexpr int64_t honest_piece = 1000;           // bytes
constexpr int64_t min_burst_nanosec = 1'000'000; // what TCP's pacing lets out at once in Linux

} // namespace

ptls_context_t & tls_context(picoquic_quic_t * quic) {
    return *static_cast<ptls_context_t *>(quic->tls_master_ctx);
}

int pieces_waiting(const picoquic_quic_t * quic) {
    return quic->nb_data_nodes_allocated - quic->nb_data_nodes_in_pool;
}

int64_t excess_pieces(picoquic_cnx_t * cnx) {
    int64_t n = 0;
    for (const auto & stream : cnx->tls_stream) {
        n += stream.stream_data_tree.size;
    }
    for (auto * stream = picoquic_first_stream(cnx); stream != nullptr; stream = picoquic_next_stream(stream)) {
        const auto missing = static_cast<int64_t>(stream->fin_offset - stream->consumed_offset);
        n += stream->stream_data_tree.size - missing / honest_piece;
    }
    return n;
}

size_t pad_initial(picoquic_cnx_t * cnx, std::span<uint8_t> datagram, size_t length) {
    const bool initial = (datagram[0] & 0xf0) == 0xc0; // RFC 9000 section 17.2.2
    if (cnx == nullptr || !initial || length >= PICOQUIC_ENFORCED_INITIAL_MTU) {
        return 0;
    }
    const size_t n = PICOQUIC_ENFORCED_INITIAL_MTU - length;
    if (!cnx->client_mode && !cnx->initial_validated) {
        // at most three times what was received (RFC 9000 section 8.1)
        if (cnx->initial_data_sent + n > 3 * cnx->initial_data_received) {
            return 0;
        }
        cnx->initial_data_sent += n;
    }
    std::fill_n(datagram.begin() + static_cast<ptrdiff_t>(length), n, uint8_t{0});
    return n;
}

void restore_loss_timer(picoquic_quic_t * quic, picoquic_cnx_t * cnx, uint64_t now_us) {
    picoquic_reinsert_by_wake_time(quic, cnx, now_us);
}

void limit_ack_delay(picoquic_cnx_t * cnx) {
    if (!cnx->is_ack_frequency_negotiated) {
        cnx->ack_delay_remote = std::min<uint64_t>(cnx->ack_delay_remote, PICOQUIC_ACK_DELAY_MIN);
    }
}

void count_reset_as_received(picoquic_cnx_t * cnx, uint64_t stream_id) {
    if (auto * stream = picoquic_find_stream(cnx, stream_id)) {
        cnx->data_received += stream->fin_offset - stream->consumed_offset;
        stream->consumed_offset = stream->fin_offset;
        stream->is_discarded = 1;
    }
}

bool peer_allows_stream(const picoquic_cnx_t * cnx, uint64_t stream_id) {
    return stream_id / 4 < cnx->max_streams_bidir_remote;
}

std::string peer_close_reason(const picoquic_cnx_t * cnx) {
    return cnx->remote_error_reason == nullptr ? "" : cnx->remote_error_reason;
}

const picoquic_congestion_algorithm_t * congestion_algorithm(const picoquic_path_t * path) {
    return path->cnx->congestion_alg;
}

int64_t pacing_bucket_nanosec(const picoquic_path_t * path) {
    return path->pacing.bucket_nanosec;
}

void ensure_burst(picoquic_path_t * path, uint64_t n_packets, int64_t bucket_nanosec) {
    path->cwin = std::max<uint64_t>(path->cwin, n_packets * path->send_mtu);
    picoquic_pacing_t & pacing = path->pacing;
    const auto n = static_cast<int64_t>(n_packets);
    const int64_t least_rate_nanosec = static_cast<int64_t>(path->smoothed_rtt) * 1000 / (2 * n);
    pacing.packet_time_nanosec =
        std::clamp<int64_t>(pacing.packet_time_nanosec, 1, std::max<int64_t>(least_rate_nanosec, 1));
    pacing.bucket_max = std::max({pacing.bucket_max, n * pacing.packet_time_nanosec, min_burst_nanosec});
    pacing.bucket_nanosec = std::min<int64_t>(std::max(pacing.bucket_nanosec, bucket_nanosec), pacing.bucket_max);
}

} // namespace meshllm::quic
